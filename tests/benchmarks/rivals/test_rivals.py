"""Rivals: the ggml file, forced tokens, interleaved rounds, ratios, and the installed engines."""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from installed_rivals import needs_rivals
from made_results import make_result

from benchmarks.compare import compare_pair
from benchmarks.result import table_rows
from benchmarks.rivals import __main__ as command
from benchmarks.rivals import ggml, prepare
from benchmarks.rivals.engines import ENGINES, count_parameters, interpreter, refuse_missing
from benchmarks.rivals.prepare import Conversion
from benchmarks.rivals.protocol import (
    RULES,
    Engine,
    bench,
    forced,
    main,
    prompt_language,
    prompt_task,
    read_rules,
)
from benchmarks.rivals.race import (
    Case,
    Task,
    by_turns,
    race,
    ratio_rows,
    ratios,
    rows,
)
from benchmarks.sizes import Size
from benchmarks.speech.clips import read_manifest
from benchmarks.speech.wav import write_clips
from devices.device import open_device, run_runner
from devices.runner.decode.greedy import greedy
from devices.runner.decode.rules import Rules
from export.problem import Problem

PYTHON = interpreter()


@pytest.fixture(scope="module")
def few(clips):
    return read_manifest(clips)[:3]


# ------------------------------------------------------------------------------ the ggml file


def read_ggml(path: Path) -> tuple[list[int], np.ndarray, list[bytes], dict]:
    """Return header, filters, words and tensors, read by the format's description alone."""
    content, at = path.read_bytes(), 0

    def numbers(count: int) -> tuple[int, ...]:
        nonlocal at
        at += 4 * count
        return struct.unpack_from(f"<{count}i", content, at - 4 * count)

    def take(size: int) -> bytes:
        nonlocal at
        at += size
        assert at <= len(content)
        return content[at - size : at]

    assert take(4) == b"lmgg"
    sizes = list(numbers(11))
    mels, bins = numbers(2)
    filters = np.frombuffer(take(4 * mels * bins), "<f4").reshape(mels, bins)
    (count,) = numbers(1)
    words = [take(numbers(1)[0]) for _ in range(count)]
    tensors = {}
    while at < len(content):
        axes, length, kind = numbers(3)
        shape = numbers(axes)[::-1]
        name, total = take(length).decode(), int(np.prod(shape))
        tensors[name] = (kind, read_tensor(take, kind, total).reshape(shape))
    return sizes, filters, words, tensors


def read_tensor(take, kind: int, total: int) -> np.ndarray:
    if kind == 8:
        return np.concatenate([read_block(take(34)) for _ in range(total // 32)])
    width = {0: 4, 1: 2}[kind]
    return np.frombuffer(take(width * total), f"<f{width}").astype(np.float32)


def read_block(block: bytes) -> np.ndarray:
    scale, *codes = struct.unpack("<e32b", block)
    return np.array(codes, np.float32) * np.float32(scale)


@pytest.fixture
def dense(make_whisper, processor, tmp_path) -> Path:
    """A random checkpoint with one encoder and two decoder layers, 64 wide."""
    from edgewhisper.whisper import save

    model = make_whisper(d_model=64, heads=2, ffn=256, encoder_layers=1, decoder_layers=2)
    save(model, processor, tmp_path / "dense", {})
    return tmp_path / "dense"


def stored(checkpoint: Path) -> dict[str, np.ndarray]:
    from safetensors.numpy import load_file

    return load_file(checkpoint / "model.safetensors")


@pytest.mark.parametrize(("kind", "number"), [("f16", 1), ("q8_0", 2007)])
def test_the_ggml_file_has_header_filters_and_words(dense, processor, tmp_path, kind, number):
    ggml.convert(dense, tmp_path / "out", kind)
    sizes, filters, words, _ = read_ggml(tmp_path / "out" / ggml.MODEL)
    config = json.loads((dense / "config.json").read_text())
    vocabulary, positions = config["vocab_size"], config["max_target_positions"]
    assert sizes == [vocabulary, 300, 64, 2, 1, positions, 64, 2, 2, 80, number]
    assert np.allclose(filters, processor.feature_extractor.mel_filters.T, atol=1e-7)
    assert len(words) == config["eos_token_id"]
    text = "three one"
    ids = processor.tokenizer(text, add_special_tokens=False).input_ids
    assert b"".join(words[i] for i in ids).decode() == text


def test_tensors_have_openais_names(dense, tmp_path):
    ggml.convert(dense, tmp_path / "out", "f16")
    *_, tensors = read_ggml(tmp_path / "out" / ggml.MODEL)
    layer = {"attn_ln", "attn.query", "attn.value", "attn.out", "mlp_ln", "mlp.0", "mlp.2"}
    cross = {"cross_attn_ln", "cross_attn.query", "cross_attn.value", "cross_attn.out"}
    both = {"encoder.conv1", "encoder.conv2", "encoder.ln_post", "decoder.ln"}
    both |= {f"encoder.blocks.0.{name}" for name in layer}
    both |= {f"decoder.blocks.{i}.{name}" for i in (0, 1) for name in layer | cross}
    keys = {"encoder.blocks.0.attn.key"}
    keys |= {f"decoder.blocks.{i}.{name}.key" for i in (0, 1) for name in ("attn", "cross_attn")}
    names = {f"{name}.{part}" for name in both for part in ("weight", "bias")}
    names |= {f"{name}.weight" for name in keys | {"decoder.token_embedding"}}
    names |= {f"{side}.positional_embedding" for side in ("encoder", "decoder")}
    assert tensors.keys() == names
    original = stored(dense)
    pairs = {
        "encoder.conv1.weight": "model.encoder.conv1.weight",
        "decoder.blocks.1.cross_attn.key.weight": "model.decoder.layers.1.encoder_attn."
        "k_proj.weight",
        "decoder.blocks.0.mlp_ln.bias": "model.decoder.layers.0.final_layer_norm.bias",
        "decoder.token_embedding.weight": "model.decoder.embed_tokens.weight",
    }
    for name, theirs in pairs.items():
        kind, array = tensors[name]
        exact = original[theirs].astype(np.float16) if kind else original[theirs]
        assert np.array_equal(array, exact)
    assert tensors["encoder.conv1.bias"][1].shape == (64, 1)


def test_only_matrices_are_quantised(dense, tmp_path):
    ggml.convert(dense, tmp_path / "out", "q8_0")
    *_, found = read_ggml(tmp_path / "out" / ggml.MODEL)
    exact = {name: array for name, array in ggml.tensors(dense)}
    for name, (kind, array) in found.items():
        true = exact[name]
        if kind == 0:
            assert true.ndim == 1 or "positional" in name or "conv" in name
            assert np.array_equal(array, true)
        elif kind == 1:
            assert true.ndim == 3
            assert np.array_equal(array, true.astype(np.float16).astype(np.float32))
        else:
            assert true.ndim == 2
            most = np.abs(true.reshape(-1, 32)).max(axis=1, keepdims=True)
            error = np.abs(array - true).reshape(-1, 32)
            # half a step, and 127 times the float16 error of the scale
            assert (error <= most * (0.5 / 127 + 2**-11) * 1.001 + 1e-6).all()


def test_a_block_has_known_codes():
    block = np.zeros(64, np.float32)
    block[:5] = [127, -0.5, 0.5, 0.49, -63.2]
    found = ggml.q8_0(block)
    assert len(found) == 68
    scale, *codes = struct.unpack_from("<e32b", found)
    assert scale == 1
    assert codes[:6] == [127, -1, 1, 0, -63, 0]
    assert struct.unpack_from("<e32b", found, 34) == (0, *[0] * 32)


def test_blocks_agree_with_a_loop(rng):
    array = (rng.standard_normal((3, 96)) * rng.uniform(1e-3, 10)).astype(np.float32)
    expected = b""
    for block in array.reshape(-1, 32):
        scale = np.float32(max(abs(block))) / np.float32(127)
        quotients = [float(x * (np.float32(1) / scale)) for x in block]
        codes = [int(np.floor(abs(q) + 0.5) * np.sign(q)) for q in quotients]
        expected += struct.pack("<e32b", float(np.float16(scale)), *codes)
    assert ggml.q8_0(array) == expected


def test_checkpoints_that_whisper_cpp_cannot_represent_are_refused(dense, digits, tmp_path):
    with pytest.raises(Problem, match="unknown ggml kind 'q3'"):
        ggml.convert(dense, tmp_path / "out", "q3")
    config = json.loads((dense / "config.json").read_text())
    cases = {
        "feed-forward layers are 128 wide; whisper.cpp assumes 256": {"decoder_ffn_dim": 128},
        "individual shapes": {"edgewhisper": {"format": 1}},
        "40 wide, not a multiple of q8_0's blocks of 32": {
            "d_model": 40,
            "encoder_ffn_dim": 160,
            "decoder_ffn_dim": 160,
        },
    }
    for message, change in cases.items():
        (dense / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(Problem, match=message):
            ggml.convert(dense, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------ the clip's language

MULTILINGUAL = Rules((9, 20, 30), 5, (), (), None, 20, languages={"de": 20, "fr": 21, "en": 22})
MULTILINGUAL = replace(MULTILINGUAL, tasks={"transcribe": 30, "translate": 31})
ENGLISH_ONLY = Rules((9,), 5, (), (), None, 20)


@pytest.mark.parametrize(
    ("rules", "spoken", "language"),
    [
        (MULTILINGUAL, "fr", "fr"),
        (MULTILINGUAL, "bam", "de"),
        (MULTILINGUAL, None, "de"),
        (ENGLISH_ONLY, "en", None),
        (ENGLISH_ONLY, "fr", None),
    ],
    ids=["known", "unknown-to-the-model", "not-given", "english-only", "english-only-french"],
)
def test_a_clip_is_prompted_in_its_language_if_the_model_has_it(rules, spoken, language):
    assert prompt_language(rules, spoken) == language


def test_the_task_is_the_checkpoints():
    assert prompt_task(MULTILINGUAL) == "transcribe"
    assert prompt_task(replace(MULTILINGUAL, prompt=(9, 20, 31))) == "translate"
    assert prompt_task(ENGLISH_ONLY) == "transcribe"


def test_every_converted_model_has_the_checkpoints_rules(digits, tmp_path):
    from export.artifact import read_manifest as manifest_of

    conversion = Conversion(digits, tmp_path, PYTHON)
    expected = manifest_of(prepare.artifact("fp32")(conversion))["decoding"]
    del expected["alignment"]  # for the word timestamps of native artifacts
    for write in (prepare.sherpa("fp32"), prepare.ggml("f16")):
        place = write(conversion)
        stored = json.loads((place / RULES).read_text())
        assert expected.items() <= stored.items()
        assert read_rules(place).language == "en"


def test_a_model_converted_by_an_older_version_is_replaced(digits, tmp_path):
    place = prepare.ggml("f16")(Conversion(digits, tmp_path, PYTHON))
    (place / RULES).unlink()
    (place / ggml.MODEL).write_bytes(b"old")
    assert prepare.ggml("f16")(Conversion(digits, tmp_path, PYTHON)) == place
    assert (place / RULES).is_file()
    assert (place / ggml.MODEL).stat().st_size > 1000


def write_english_only(digits: Path, out: Path) -> None:
    """Write the rules of an English-only model as write_rules() does."""
    written = ggml.decoding_rules_of(digits) | {"languages": {}, "tasks": {}}
    (out / RULES).write_text(json.dumps(written))


@pytest.fixture
def sherpa_languages(monkeypatch) -> list[str]:
    """The list of languages that a fake sherpa-onnx decodes in."""
    decoded: list[str] = []
    whisper = SimpleNamespace(language="")
    config = SimpleNamespace(model_config=SimpleNamespace(whisper=whisper))

    class Made:
        def __init__(self) -> None:
            self.config, self.recognizer, self.language = config, self, whisper.language

        @classmethod
        def from_whisper(cls, language, **options):
            whisper.language = language
            return cls()

        def set_config(self, config):
            self.language = config.model_config.whisper.language

        def create_stream(self):
            return SimpleNamespace(accept_waveform=lambda rate, pcm: None)

        def decode_stream(self, stream):
            decoded.append(self.language)
            stream.result = SimpleNamespace(tokens=[], text="")

    monkeypatch.setitem(sys.modules, "sherpa_onnx", SimpleNamespace(OfflineRecognizer=Made))
    return decoded


@pytest.mark.parametrize("multilingual", [True, False], ids=["multilingual", "english-only"])
def test_sherpa_onnx_decodes_each_clip_in_its_language(
    digits, few, tmp_path, sherpa_languages, multilingual
):
    from benchmarks.rivals.sherpa_onnx import SherpaOnnx

    for name in ("a-encoder.onnx", "a-decoder.onnx", "a-tokens.txt"):
        (tmp_path / name).touch()
    if multilingual:
        prepare.write_rules(digits, tmp_path)
    else:
        write_english_only(digits, tmp_path)
    write_clips(few[:1], tmp_path)
    engine = SherpaOnnx(tmp_path, 1, None)
    for language in ("de", "de", "en", "bam", "fr"):
        engine.transcribe(tmp_path / "00000.wav", language)
    own = ["de", "de", "en", "en", "fr"]
    assert sherpa_languages == (own if multilingual else ["en"] * 5)


PROMPTS = """
import json, sys
from pathlib import Path
from benchmarks.rivals.faster_whisper import FasterWhisper
from benchmarks.rivals.protocol import prompt_language
from benchmarks.rivals.whisper_cpp import WhisperCpp

fast, cpp = FasterWhisper(Path(sys.argv[1]), 1, None), WhisperCpp(Path(sys.argv[2]), 1, None)
found = []
for spoken in ("de", "bam", "en"):
    tokenizer = fast.tokenizer_for(spoken)
    found.append(fast.whisper.get_prompt(tokenizer, [], without_timestamps=True))
    found.append(cpp.prompted(prompt_language(cpp.rules, spoken)).prompt)
print(json.dumps({"prompts": found, "suppressed": cpp.rules.suppress_tokens,
                  "first": cpp.rules.begin_suppress_tokens, "most": cpp.rules.max_new_tokens}))
"""
"""Prints the prompts of two engines for German, Bambara (unknown to the model) and English."""


@needs_rivals
@pytest.mark.parametrize("multilingual", [True, False], ids=["multilingual", "english-only"])
def test_faster_whisper_and_whisper_cpp_are_prompted_in_each_clips_language(
    digits, tmp_path, multilingual
):
    fast = prepare.ctranslate2(Conversion(digits, tmp_path, PYTHON))
    cpp = prepare.ggml("q8_0")(Conversion(digits, tmp_path, PYTHON))
    rules = read_rules(cpp)
    if not multilingual:
        start, _, _, silent = rules.prompt
        for place in (fast, cpp):
            stored = json.loads((place / RULES).read_text())
            changes = {"languages": {}, "tasks": {}, "prompt": [start, silent]}
            (place / RULES).write_text(json.dumps(stored | changes))
    run = [str(PYTHON), "-c", PROMPTS, str(fast), str(cpp)]
    answer = json.loads(prepare.run(run).splitlines()[-1])
    start, english, task, silent = rules.prompt
    codes = [rules.languages["de"], english, english]
    expected = [[start, code, task, silent] if multilingual else [start, silent] for code in codes]
    assert answer["prompts"] == [prompt for prompt in expected for _ in range(2)]
    config = json.loads((digits / "config.json").read_text())
    assert answer["suppressed"] == list(range(rules.eos + 1, config["vocab_size"]))
    assert answer["first"][0] == rules.eos
    assert answer["most"] == config["max_target_positions"] // 2 - 4


# ---------------------------------------------------------------------------- random checkpoints


@pytest.fixture(scope="module")
def random_checkpoint(tmp_path_factory) -> Path:
    """A random checkpoint with Whisper's vocabulary, one layer and one head."""
    from benchmarks.rivals.models import write

    out = tmp_path_factory.mktemp("random") / "whisper-small-random"
    write(Size(64, 1), out)
    return out


def test_a_random_checkpoint_has_whispers_ids(random_checkpoint):
    from transformers import GenerationConfig, WhisperTokenizer

    tokenizer = WhisperTokenizer.from_pretrained(random_checkpoint)
    ids = {"<|endoftext|>": 50257, "<|startoftranscript|>": 50258, "<|en|>": 50259}
    ids |= {"<|su|>": 50357, "<|translate|>": 50358, "<|transcribe|>": 50359}
    ids |= {"<|notimestamps|>": 50363, "<|0.00|>": 50364, "<|30.00|>": 51864}
    assert {word: tokenizer.convert_tokens_to_ids(word) for word in ids} == ids
    assert len(tokenizer) == 51865
    text = "Grüße, 你好, नमस्ते"
    assert tokenizer.decode(tokenizer(text, add_special_tokens=False).input_ids) == text
    generation = GenerationConfig.from_pretrained(random_checkpoint)
    assert generation.lang_to_id["<|en|>"] == 50259
    assert len(generation.lang_to_id) == 99


def test_parameters_are_counted_from_the_file(random_checkpoint, digits):
    from edgewhisper.whisper import load

    for checkpoint in (random_checkpoint, digits):
        model = load(checkpoint)
        assert count_parameters(checkpoint) == sum(p.numel() for p in model.parameters())


def test_our_artifact_has_a_window_as_long_as_the_noise(random_checkpoint, tmp_path):
    write = prepare.artifact("int8")
    conversion = Conversion(random_checkpoint, tmp_path, PYTHON, windows_s=(5.0,))
    place = write(conversion)
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["audio"]["windows_samples"] == [80_000, 480_000]
    again = write(replace(conversion, windows_s=(30.0,)))
    assert again == place
    manifest = json.loads((place / "manifest.json").read_text())
    seconds = [n / 16_000 for n in manifest["audio"]["windows_samples"]]
    assert seconds == list(range(1, 31))  # silence in groups, as `edgewhisper export` does


def test_clips_are_joined_and_cut(digits, few, clips, tmp_path):
    given = ["--model", str(digits), "--speech", str(clips), "--seconds", "2", "--tokens", "8"]
    task = command.task_of(command.parser().parse_args(given), tmp_path, tmp_path)
    (clip,) = task.clips
    parts = np.concatenate([one.pcm() for one in few])
    assert len(clip.pcm()) == 32_000
    assert np.array_equal(clip.pcm(), parts[:32_000])
    assert clip.text.startswith(few[0].text)
    assert (task.tokens, task.windows_s) == (8, ())
    assert command.describe(task).startswith("whisper-digits: 2 s of speech, exactly 8 tokens")


def test_too_few_seconds_of_clips_are_an_error(few, tmp_path):
    with pytest.raises(Problem, match="--seconds 900: the clips of --speech have"):
        command.joined(few, 900.0, tmp_path / "speech.wav")


# -------------------------------------------------------------------------------- forced tokens

WRITTEN = Rules((9,), 5, (1,), (), None, 20)
"""Rules in which token 5 ends the text."""


def test_exactly_the_given_number_of_tokens_is_forced(rng):
    def step(ids):
        return rng.standard_normal(12).astype(np.float32) + np.eye(12, dtype=np.float32)[5] * 99

    assert greedy(step, WRITTEN, stop_loops=False) == []
    count = int(rng.integers(1, 40))
    tokens = greedy(step, forced(WRITTEN, count), stop_loops=False)
    assert len(tokens) == count
    assert not {1, 5} & set(tokens)
    assert forced(WRITTEN, None) == WRITTEN


class Scripted(Engine):
    """An engine that records its calls."""

    calls: list[str]

    def __init__(self, model, threads, tokens):
        super().__init__(model, threads, tokens)
        self.calls, self.tokens = [], tokens
        Scripted.last = self

    def transcribe(self, path, language=None):
        self.calls.append(f"{path.stem}-{language}")
        self.watch.mel_s.append(0.5)
        return [7] * self.tokens, "seven"

    def between(self):
        self.calls.append("between")

    def finish(self):
        self.calls.append("finish")


def test_every_engine_warms_up_and_repeats_equally(few, tmp_path):
    write_clips(few[:2], tmp_path)
    answer = bench(Scripted, tmp_path, tmp_path / "clips.json", threads=1, repeats=2, tokens=4)
    once = ["00000-en", "between", "00001-en", "between"]
    assert Scripted.last.calls == once * 3 + ["finish"]
    assert answer["mel_s"] == [0.5] * 4
    assert len(answer["end_to_end_s"]) == len(answer["cpu_s"]) == 4
    assert answer["tokens"] == [[7] * 4] * 2
    assert answer["peak_rss_bytes"] > 0


class Absent(Scripted):
    imports = ("no_such_engine",)


def test_a_missing_engine_is_reported(few, tmp_path, capsys):
    write_clips(few[:1], tmp_path)
    assert main(Absent, [str(tmp_path), str(tmp_path / "clips.json")]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["error"] == "this engine's environment has no module `no_such_engine`"
    assert "make rivals-env" in answer["hint"]


def test_a_missing_environment_is_reported(digits, tmp_path):
    with pytest.raises(Problem, match=r"faster-whisper, whisper\.cpp: the rivals' environment"):
        refuse_missing(["ours", "faster-whisper", "whisper.cpp"], tmp_path / "python", "x")
    with pytest.raises(Problem) as error:
        race(Task("digits", digits, ()), ["whisper.cpp"], [1], 1, tmp_path, tmp_path / "python")
    assert error.value.hint.endswith("--engines ours ours-fp32 transformers")
    refuse_missing(["ours", "transformers"], tmp_path / "python", "x")


def test_an_unknown_engine_lists_the_known_ones(digits, tmp_path, capsys):
    arguments = ["--model", str(digits), "--engines", "ours", "siri", "--models", str(tmp_path)]
    assert command.main(arguments) == 1
    output = capsys.readouterr().err
    assert "unknown engine 'siri'" in output
    assert all(name in output for name in ENGINES)
    assert command.main(["--model", str(tmp_path / "x"), "--models", str(tmp_path)]) == 1
    assert "no such directory" in capsys.readouterr().err


# ------------------------------------------------------------------------------- rounds and tables


def test_cases_take_turns():
    cases = [Case("a", 1), Case("b", 1), Case("a", 2)]
    done = []

    def run(case: Case, turn: int) -> str:
        done.append((case, turn))
        return f"{case.engine}{case.threads}{turn}"

    answers = by_turns(cases, 3, run)
    assert done == [(case, turn) for turn in range(3) for case in cases]
    assert answers[Case("a", 2)] == ["a20", "a21", "a22"]


def made(engine: str, threads: int, seconds: float, **changes) -> dict:
    rival = None if engine == "ours" else engine
    fields = {"name": f"m, {engine} {threads}", "engine": engine, "rival": rival}
    fields |= {"threads": threads, "forced_tokens": 64, "end_to_end_s": [seconds] * 30}
    return make_result(**fields | changes)


def test_ratios_are_against_the_best_rival_and_the_best_at_our_threads():
    results = [made("ours", 1, 0.1), made("a", 1, 0.4), made("b", 2, 0.3), made("a", 2, 0.5)]
    found = {(r["measure"], r["against"]): r for r in ratios(results)}
    best = found["end_to_end_s", "at its best"]
    assert best["rival"] == "b, 2 threads"
    assert best["ratio"] == pytest.approx(3)
    assert best["interval"] == pytest.approx((3, 3))
    same = found["end_to_end_s", "same threads"]
    assert same["rival"] == "a, 1 thread"
    assert same["ratio"] == pytest.approx(4)


def test_ratios_cover_the_common_measures():
    first = made("a", 1, 0.4, mel_s=[0.2] * 30, per_token_s=[], peak_rss_bytes=288_000_000)
    found = {r["measure"]: r for r in ratios([made("ours", 1, 0.1), first])}
    assert "per_token_s" not in found
    assert found["mel_s"]["ratio"] == pytest.approx(4)
    assert found["peak_rss_bytes"]["ratio"] == pytest.approx(4)
    assert found["peak_rss_bytes"]["interval"] is None
    unknown = made("a", 1, 0.4, peak_rss_bytes="unavailable")
    assert "peak_rss_bytes" not in {r["measure"] for r in ratios([made("ours", 1, 0.1), unknown])}


def test_there_are_no_ratios_without_rivals():
    assert ratios([made("ours", 1, 0.1)]) == []
    assert ratios([made("a", 1, 0.1)]) == []


def test_tables_print_milliseconds_megabytes_and_no_error_rate_where_tokens_are_forced():
    results = [made("ours", 1, 0.1), made("a", 1, 0.25)]
    assert rows(results)[0]["total ms"] == "100"
    assert rows(results)[0]["WER %"] == "-"
    assert rows([made("a", 1, 0.1, forced_tokens=None)])[0]["WER %"] == "10.0"
    assert table_rows(results)[0]["WER %"] == "-"
    by_title = {row["measure"]: row for row in ratio_rows(ratios(results))}
    assert by_title["total ms"]["best rival / ours"] == "2.50"
    assert by_title["total ms"]["value"] == "100"
    assert by_title["peak MB"]["value"] == "72.0"


def test_compare_reads_forced_results_and_leaves_error_rates_out():
    first, second = made("ours", 1, 0.1), made("a", 1, 0.25)
    assert "wer" not in {row["measure"] for row in compare_pair(first, second)}
    assert "wer" in {row["measure"] for row in compare_pair(make_result(), make_result())}
    with pytest.raises(Problem, match="different numbers of forced tokens: 64 and 20"):
        compare_pair(first, made("a", 1, 0.25, forced_tokens=20))
    with pytest.raises(Problem, match="forced tokens: 64 and None"):
        compare_pair(first, make_result())


# ------------------------------------------------------------------------------- real engines


def test_ours_and_transformers_run_on_the_shipped_model(digits, few, tmp_path):
    work = Task("digits", digits, tuple(few))
    results = race(work, ["ours", "transformers"], [1], 1, tmp_path, PYTHON)
    assert [result["rival"] for result in results] == [None, "transformers"]
    assert [result["texts"] for result in results] == [[clip.text for clip in few]] * 2
    assert all(result["wer"] == 0 for result in results)
    assert results[0]["artifact_bytes"] < results[1]["artifact_bytes"]
    assert results[0]["parameters"] == results[1]["parameters"]


def test_ours_and_transformers_decode_the_forced_tokens(digits, few, tmp_path, rng):
    count = int(rng.integers(2, 20))
    work = Task("digits", digits, tuple(few[:1]), tokens=count, repeats=2)
    results = race(work, ["ours", "transformers"], [1], 1, tmp_path, PYTHON)
    for result in results:
        assert result["forced_tokens"] == count
        assert len(result["prompt_s"]) == len(result["end_to_end_s"]) == 2
        assert len(result["per_token_s"]) == 2 * (count - 1)


@pytest.fixture
def pushed(few) -> Iterator:
    """This machine as a device, with the clips pushed."""
    import tempfile

    with open_device("local") as device, tempfile.TemporaryDirectory() as folder:
        write_clips(few, Path(folder))
        device.push(Path(folder), "clips")
        yield device


def answer_of(device, module: str, place: Path, *options: str) -> dict:
    arguments = [str(place), "clips/clips.json", "--threads", "1", *options]
    env = {"PYTHONPATH": str(prepare.PROJECT)}
    return run_runner(device, arguments, f"benchmarks.rivals.{module}", env, python=str(PYTHON))


@needs_rivals
@pytest.mark.parametrize("kind", ["f16", "q8_0"])
def test_whisper_cpp_reads_our_file_and_transcribes_the_clips(digits, few, pushed, tmp_path, kind):
    ggml.convert(digits, tmp_path / "ggml", kind)
    answer = answer_of(pushed, "whisper_cpp", tmp_path / "ggml")
    assert answer["texts"] == [clip.text for clip in few]
    assert all(answer[stage] for stage in ("mel_s", "encoder_s", "prompt_s", "per_token_s"))


@needs_rivals
def test_faster_whisper_transcribes_the_clips(digits, few, pushed, tmp_path):
    place = prepare.ctranslate2(Conversion(digits, tmp_path, PYTHON))
    answer = answer_of(pushed, "faster_whisper", place)
    assert answer["texts"] == [clip.text for clip in few]
    assert answer["per_token_s"] == []


@needs_rivals
@pytest.mark.parametrize(
    ("module", "write"),
    [
        ("whisper_cpp", prepare.ggml("q8_0")),
        ("faster_whisper", prepare.ctranslate2),
        ("sherpa_onnx", prepare.sherpa("int8")),
    ],
    ids=["whisper.cpp", "faster-whisper", "sherpa-onnx"],
)
def test_rivals_decode_the_forced_tokens(random_checkpoint, pushed, tmp_path, rng, module, write):
    count = int(rng.integers(5, 12))  # sherpa-onnx allows 6 a second
    write_clips([command.noise(2.0, tmp_path / "noise.wav")], tmp_path)
    pushed.push(tmp_path / "00000.wav", "clips/00000.wav")
    pushed.push(tmp_path / "clips.json", "clips/clips.json")
    pushed.push(tmp_path / "languages.json", "clips/languages.json")
    place = write(Conversion(random_checkpoint, tmp_path, PYTHON, tokens=count))
    answer = answer_of(pushed, module, place, "--tokens", str(count))
    assert [len(tokens) for tokens in answer["tokens"]] == [count]
    assert len(answer["encoder_s"]) == 1
    assert all(time > 0 for time in answer["per_token_s"])
