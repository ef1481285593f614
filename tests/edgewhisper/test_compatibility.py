"""Compatibility: common forms of checkpoints and audio files, unusual paths, and long runs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file
from transformers import WhisperConfig, WhisperFeatureExtractor

from benchmarks.speech.clips import read_manifest
from benchmarks.speech.sound import read_audio
from devices.runner.recognizer import Recognizer
from edgewhisper import decoding
from edgewhisper.whisper import WhisperForConditionalGeneration, load, load_processor
from export.onnx.to_onnx import export_onnx

POSITIONS = "model.decoder.embed_positions.weight"
TABLE = "model.decoder.embed_tokens.weight"


# -------------------------------------------------------------------------------- checkpoints


def edit(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def cast(dtype: torch.dtype) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        stored = load_file(folder / "model.safetensors")
        stored = {name: tensor.to(dtype) for name, tensor in stored.items()}
        save_file(stored, folder / "model.safetensors", {"format": "pt"})
        edit(folder / "config.json", dtype=str(dtype).removeprefix("torch."))

    return change


def in_shards(folder: Path) -> None:
    whole = folder / "model.safetensors"
    stored = load_file(whole)
    whole.unlink()
    names = sorted(stored)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in files.items():
        save_file({name: stored[name] for name in part}, folder / file, {"format": "pt"})
    index = {"weight_map": {name: file for file, part in files.items() for name in part}}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}} | index))


def without_metadata(folder: Path) -> None:
    save_file(load_file(folder / "model.safetensors"), folder / "model.safetensors")


def slow_tokenizer(folder: Path) -> None:
    """Write vocab.json, merges.txt and added_tokens.json, as slow tokenizers save them."""
    stored = json.loads((folder / "tokenizer.json").read_text())
    (folder / "vocab.json").write_text(json.dumps(stored["model"]["vocab"], ensure_ascii=False))
    merges = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in stored["model"]["merges"]
    ]
    (folder / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    added = {entry["content"]: entry["id"] for entry in stored["added_tokens"]}
    (folder / "added_tokens.json").write_text(json.dumps(added))
    special = [entry["content"] for entry in stored["added_tokens"] if entry["special"]]
    end = dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
    (folder / "special_tokens_map.json").write_text(
        json.dumps({"additional_special_tokens": special} | end)
    )
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "WhisperTokenizer", "errors": "replace"} | end)
    )
    (folder / "tokenizer.json").unlink()
    (folder / "processor_config.json").unlink()


def slow_tokenizer_without_added_tokens(folder: Path) -> None:
    slow_tokenizer(folder)
    (folder / "added_tokens.json").unlink()


def longer_position_table(folder: Path) -> None:
    stored = load_file(folder / "model.safetensors")
    stored[POSITIONS] = torch.cat([stored[POSITIONS], stored[POSITIONS], stored[POSITIONS][:8]])
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", max_target_positions=len(stored[POSITIONS]), max_length=64)


def own_output_matrix(folder: Path) -> None:
    """Store `proj_out` as well, as models with untied embeddings do."""
    stored = load_file(folder / "model.safetensors")
    stored["proj_out.weight"] = stored[TABLE].clone()
    save_file(stored, folder / "model.safetensors", {"format": "pt"})
    edit(folder / "config.json", tie_word_embeddings=False)


def first_preprocessor(folder: Path) -> None:
    """Store the mel filters in preprocessor_config.json, as OpenAI's first conversions do."""
    (folder / "processor_config.json").unlink()
    edit(folder / "preprocessor_config.json", mel_filters=[[0.0] * 201 for _ in range(80)])


FORMS = [
    cast(torch.float16),
    cast(torch.bfloat16),
    in_shards,
    without_metadata,
    slow_tokenizer,
    slow_tokenizer_without_added_tokens,
    longer_position_table,
    own_output_matrix,
    first_preprocessor,
]
NAMES = ["fp16", "bf16", *(form.__name__ for form in FORMS[2:])]


@pytest.fixture(scope="module")
def spoken(clips) -> list:
    return read_manifest(clips)[:6]


def texts(checkpoint: Path, spoken: list) -> list[str]:
    langs = [clip.lang for clip in spoken]
    sounds = [read_audio(clip.audio) for clip in spoken]
    return decoding.transcribe(load(checkpoint), load_processor(checkpoint), sounds, langs)


@pytest.mark.parametrize("form", FORMS, ids=NAMES)
def test_every_form_of_a_checkpoint_gives_the_same_text(form, digits, spoken, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(digits, folder)
    form(folder)
    assert texts(folder, spoken) == texts(digits, spoken)


@pytest.mark.parametrize("form", FORMS[4:7], ids=NAMES[4:7])
def test_an_artifact_of_each_form_gives_the_same_text(form, digits, spoken, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(digits, folder)
    form(folder)
    export_onnx(load(folder), load_processor(folder), tmp_path / "artifact", "fp32")
    recognizer = Recognizer(tmp_path / "artifact")
    actual = [recognizer.transcribe(read_audio(clip.audio)).text for clip in spoken]
    assert [text.strip() for text in actual] == [text.strip() for text in texts(digits, spoken)]


def test_the_shape_of_large_v3_turbo_decodes_as_in_transformers(tmp_path, rng):
    """128 mel bands, 51866 tokens (Cantonese is the last language), two decoder layers."""
    config = WhisperConfig(
        vocab_size=51866,
        num_mel_bins=128,
        d_model=16,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
    )
    model = WhisperForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():  # so that logits differ clearly
            parameter.add_(0.2 * torch.randn_like(parameter))
    model.save_pretrained(tmp_path / "turbo")
    (tmp_path / "turbo/generation_config.json").unlink()
    checkpoint, processor = load(tmp_path / "turbo"), load_processor(tmp_path / "turbo")
    generation = checkpoint.generation_config
    assert generation.lang_to_id["<|yue|>"] == 50358
    sound = (0.1 * rng.standard_normal(16_000)).astype(np.float32)
    features = WhisperFeatureExtractor(feature_size=128)(
        sound, sampling_rate=16_000, return_tensors="pt"
    ).input_features
    export_onnx(checkpoint, processor, tmp_path / "artifact", "fp32")
    plain = Recognizer(tmp_path / "artifact", guards=False)
    with torch.no_grad():
        expected = checkpoint.generate(
            features,
            language="yue",
            task="transcribe",
            max_new_tokens=12,
            suppress_tokens=list(range(plain.rules.timestamp_begin, len(plain.table))),
        )[0].tolist()
    tokens = plain.window(sound, language="yue")
    size = min(len(tokens), 12)
    assert tokens[:size] == expected[:size]
    assert size == 12 or expected[size:] in ([], [generation.eos_token_id])


# -------------------------------------------------------------------------------- audio


@pytest.fixture
def speech(spoken) -> np.ndarray:
    return read_audio(spoken[0].audio)


def resampled(sound: np.ndarray, rate: int) -> np.ndarray:
    import soxr

    return soxr.resample(sound, 16_000, rate)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 32_000, 44_100, 48_000, 96_000, 192_000])
def test_every_sampling_rate_gives_the_same_audio(rate, speech, tmp_path):
    soundfile.write(tmp_path / "a.wav", resampled(speech, rate), rate, subtype="FLOAT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # below 16 kHz, a warning names the missing band
        actual = read_audio(tmp_path / "a.wav")
    assert abs(len(actual) - len(speech)) <= 16
    size = min(len(actual), len(speech))
    error = actual[:size] - speech[:size]
    if rate >= 16_000:
        assert np.square(error).mean() < 1e-3 * np.square(speech).mean()
    assert np.corrcoef(actual[:size], speech[:size])[0, 1] > 0.8


@pytest.mark.parametrize(
    ("format", "subtype", "error"),
    [
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_32", 1e-6),
        ("WAV", "PCM_U8", 0.01),
        ("WAV", "DOUBLE", 1e-6),
        ("WAV", "ULAW", 0.01),
        ("WAV", "ALAW", 0.01),
        ("WAV", "IMA_ADPCM", 0.03),
        ("WAV", "MS_ADPCM", 0.03),
        ("WAV", "GSM610", 0.3),
        ("AU", "ULAW", 0.01),
        ("AIFF", "PCM_24", 1e-6),
        ("RF64", "PCM_24", 1e-6),
        ("RF64", "FLOAT", 1e-6),
        ("FLAC", "PCM_24", 1e-6),
        ("OGG", "OPUS", 0.3),
        ("OGG", "VORBIS", 0.3),
        ("MP3", "MPEG_LAYER_III", 0.3),
    ],
)
def test_every_encoding_gives_the_same_audio(format, subtype, error, speech, tmp_path):
    soundfile.write(tmp_path / "a", speech, 16_000, format=format, subtype=subtype)
    actual = read_audio(tmp_path / "a")
    size = min(len(actual), len(speech))
    assert size > 0.9 * len(speech)
    lag = np.correlate(actual[:size], speech[:size], "full").argmax() - (size - 1)
    left, right = actual[max(lag, 0) :], speech[max(-lag, 0) :]
    size = min(len(left), len(right))
    missed = np.square(left[:size] - right[:size]).mean() / np.square(right[:size]).mean()
    assert missed < error


@pytest.mark.parametrize("channels", [2, 3, 6])
def test_channels_are_averaged(channels, speech, tmp_path):
    gains = np.arange(1, channels + 1) / channels
    soundfile.write(tmp_path / "a.wav", speech[:, None] * gains, 16_000, subtype="FLOAT")
    with pytest.warns(UserWarning, match=f"{channels} channels, averaged to one"):
        actual = read_audio(tmp_path / "a.wav")
    assert np.allclose(actual, speech * gains.mean(), atol=1e-6)


# ------------------------------------------------------------------- paths and long runs

COMMANDS = """
import sys
from edgewhisper.cli import main
words = sys.argv[1:]
while words:
    end = words.index(";")
    sys.argv, words = ["edgewhisper", *words[:end]], words[end + 1:]
    try:
        main()
    except SystemExit as done:
        if done.code:
            raise
"""
"""Runs several commands, separated by a semicolon, in one process: each would import torch anew."""


def test_spaces_and_unicode_in_paths_under_the_c_locale(digits, spoken, tmp_path):
    """`export`, `transcribe`, `eval` and the standalone runner work with such paths."""
    folder = tmp_path / "modèle de Zoë 你好"
    folder.mkdir()
    shutil.copytree(digits, folder / "un modèle")
    sound = folder / "été 1.wav"
    soundfile.write(sound, read_audio(spoken[0].audio), 16_000)
    manifest = folder / "clips à lire.jsonl"
    line = {"audio": sound.name, "text": spoken[0].text, "lang": spoken[0].lang}
    manifest.write_text(json.dumps(line, ensure_ascii=False) + "\n", encoding="utf-8")
    artifact = folder / "l'artefact $1"

    def run(*words: str | Path) -> str:
        outcome = subprocess.run(
            [sys.executable, *map(str, words)],
            capture_output=True,
            env=os.environ | {"LC_ALL": "C"},
        )
        assert outcome.returncode == 0, outcome.stderr.decode()
        return outcome.stdout.decode()

    export = ("export", folder / "un modèle", "--out", artifact, "--gate", "off")
    transcribe, judge = ("transcribe", artifact, sound), ("eval", artifact, "--speech", manifest)
    printed = run("-c", COMMANDS, *export, ";", *transcribe, ";", *judge, ";")
    assert spoken[0].text in printed.splitlines()
    assert "WER 0.00%" in printed
    assert spoken[0].text in run("-m", "devices.runner", "transcribe", artifact, sound)


@pytest.mark.slow
def test_two_thousand_files_take_constant_memory(exported, spoken, tmp_path):
    """Compare the resident memory of one runner after 2,000 files with that after 200."""
    names = []
    for number, clip in enumerate(spoken):
        names.append(str(tmp_path / f"{number}.wav"))
        soundfile.write(names[-1], read_audio(clip.audio), 16_000)
    program = """
import sys
from devices.runner.audio import read_wav
from devices.runner.recognizer import Recognizer
recognizer, resident = Recognizer(sys.argv[1], threads=1), []
for number in range(2000):
    recognizer.transcribe(read_wav(sys.argv[2 + number % (len(sys.argv) - 2)]))
    if number in (199, 1999):
        with open("/proc/self/status") as file:
            resident.append(next(int(l.split()[1]) for l in file if l.startswith("VmRSS")))
print(*resident)
"""
    outcome = subprocess.run(
        [sys.executable, "-c", program, str(exported), *names],
        capture_output=True,
        text=True,
        check=True,
    )
    early, late = map(int, outcome.stdout.split())
    assert late < 1.03 * early
