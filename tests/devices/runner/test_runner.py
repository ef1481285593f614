"""The runner with the embedded model: tokens, the commands, and threads."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from wav_bytes import wav

from benchmarks.speech.clips import read_manifest
from devices.device import RUNNER
from devices.runner.engines import sessions
from devices.runner.measure import bench as measure
from devices.runner.problem import RunnerProblem
from devices.runner.recognizer import Recognizer

ROOT = Path(__file__).parents[3]
WINDOW = 96_000


# --------------------------------------------------------------------- the real model, in fp32


@pytest.fixture(scope="module")
def pcms(clips) -> list[np.ndarray]:
    """Ten shipped clips, within one window."""
    return [clip.pcm()[:WINDOW] for clip in read_manifest(clips)[::4]]


def test_tokens_equal_generate_on_speech_noise_and_silence(exported, digits, processor, pcms, rng):
    from edgewhisper.decoding import greedy as reference
    from edgewhisper.whisper import load

    noise = (0.1 * rng.standard_normal(WINDOW)).astype(np.float32)
    sounds = [*pcms, noise, np.zeros(WINDOW, np.float32), pcms[0][:100]]
    recognizer = Recognizer(exported, threads=1, guards=False)
    wanted = reference(load(digits), processor, sounds, batch_size=1)
    assert [recognizer.window(pcm) for pcm in sounds] == wanted
    assert any(wanted)


def test_text_equals_the_tokenizers(exported, processor, pcms):
    recognizer = Recognizer(exported, threads=1)
    found = [recognizer.transcribe(pcm) for pcm in pcms]
    decode = processor.tokenizer.decode
    assert [t.text for t in found] == [
        decode(t.tokens, skip_special_tokens=True).strip() for t in found
    ]


def test_every_stage_of_every_window_is_timed(exported, pcms):
    recognizer = Recognizer(exported, threads=1)
    transcript = recognizer.transcribe(np.concatenate([pcms[1], pcms[2], pcms[3], pcms[4]] * 2))
    windows = len(transcript.graph_s)
    assert windows > 1
    assert len(transcript.prompt_s) == windows
    assert len(transcript.per_token_s) == len(transcript.tokens)
    assert min(transcript.graph_s + transcript.prompt_s + transcript.per_token_s) > 0


def test_a_silent_window_is_not_decoded(exported):
    transcript = Recognizer(exported, threads=1).transcribe(np.zeros(2 * WINDOW, np.float32))
    assert (transcript.text, transcript.graph_s) == ("", [])


def test_logits_of_forced_tokens_agree_with_greedy_decoding(exported, pcms):
    recognizer = Recognizer(exported, threads=1, guards=False)
    tokens = recognizer.window(pcms[3])
    logits = recognizer.logits(pcms[3], tokens)
    assert logits.shape == (len(tokens) + 1, len(recognizer.table))
    assert [*tokens, recognizer.rules.eos] == logits.argmax(axis=1).tolist()


def test_window_refuses_more_than_a_window(exported):
    with pytest.raises(RunnerProblem, match="a window holds 96000 samples, 96001 were given") as e:
        Recognizer(exported, threads=1).window(np.ones(WINDOW + 1, np.float32))
    assert "transcribe()" in e.value.hint


DAMAGE = [
    pytest.param("manifest.json", None, "no manifest.json there", "edgewhisper export", id="none"),
    pytest.param("manifest.json", b"{", "manifest.json cannot be read", "export", id="no-json"),
    pytest.param(
        "manifest.json",
        b'{"format": 7, "target": "onnx"}',
        "artifact format 7 for 'onnx'; this runner reads 2 and 3",
        "same release",
        id="future-format",
    ),
    pytest.param("encoder.onnx", b"\x08", "1 bytes instead of", "again", id="bad-graph"),
    pytest.param("decoder.onnx", None, "there is no such file", "again", id="no-graph"),
]


@pytest.mark.parametrize(("name", "content", "message", "hint"), DAMAGE)
def test_a_damaged_artifact_gets_an_error_message(exported, tmp_path, name, content, message, hint):
    folder = tmp_path / "artifact"
    shutil.copytree(exported, folder)
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(content)
    with pytest.raises(RunnerProblem, match=message) as error:
        Recognizer(folder, threads=1)
    assert hint in error.value.hint


# ------------------------------------------------------------------------------------ the commands


@pytest.fixture(scope="module")
def device_folder(tmp_path_factory, exported, pcms) -> Path:
    """A device's work folder: the runner, an artifact, two clips and a stereo one."""
    folder = tmp_path_factory.mktemp("device")
    shutil.copytree(RUNNER, folder / "runner", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(exported, folder / "artifact")
    for name, pcm in (("a.wav", pcms[1]), ("b.wav", pcms[2])):
        soundfile.write(folder / name, pcm, 16_000, subtype="FLOAT")
    soundfile.write(folder / "s.wav", np.stack([pcms[1]] * 2, axis=1), 16_000, subtype="FLOAT")
    (folder / "clips.json").write_text('["a.wav", "b.wav"]')
    (folder / "bad.wav").write_bytes(wav(rate=8000))
    return folder


def runner(folder: Path, *argv: str, piped: bytes = b"") -> tuple[int, dict, str]:
    """Run the runner in the folder only; return exit code, JSON of the last line, and stderr."""
    command = [sys.executable, "-m", "runner", *argv]
    done = subprocess.run(command, cwd=folder, env={}, capture_output=True, input=piped)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr.decode()


def python(folder: Path, *argv: str) -> subprocess.CompletedProcess[str]:
    """Run another Python in the folder only."""
    command = [sys.executable, *argv]
    return subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True)


def test_transcribe_prints_texts_and_warns_of_averaged_channels(device_folder):
    code, answer, stderr = runner(device_folder, "transcribe", "artifact", "a.wav", "s.wav")
    texts = [found["text"] for found in answer["transcripts"]]
    assert code == 0
    assert texts[0] == texts[1] != ""
    assert stderr == "note:  s.wav: 2 channels averaged into one\n"


def test_transcribe_streams_segments_and_accepts_the_options(device_folder):
    argv = ["transcribe", "artifact", "a.wav", "--language", "hi", "--beams", "2", "--stream"]
    done = python(device_folder, "-m", "runner", *argv)
    *segments, last = map(json.loads, done.stdout.splitlines())
    (found,) = last["transcripts"]
    assert (found["audio"], found["language"]) == ("a.wav", "hi")
    assert segments == [{"audio": "a.wav", **segment} for segment in found["segments"]]
    code, answer, _ = runner(device_folder, *argv[:3], "--language", "xx")
    assert code == 1
    assert "language 'xx': not among" in answer["error"]


def test_transcripts_of_a_folder_are_written_by_several_jobs(device_folder, tmp_path):
    for name in ("a.wav", "b.wav"):
        shutil.copy(device_folder / name, tmp_path)
    argv = ["transcribe", "artifact", str(tmp_path), "--output", "srt,json", "--jobs", "2"]
    code, answer, stderr = runner(device_folder, *argv)
    assert (code, stderr) == (0, "")
    for row in answer["transcripts"]:
        path = Path(row["audio"])
        assert json.loads(path.with_suffix(".json").read_text()) == row
        assert path.with_suffix(".srt").read_text().startswith("1\n00:00:00,")
        assert 0 < row["segments"][0]["no_speech_prob"] < 1
    code, answer, _ = runner(device_folder, *argv)
    assert code == 1
    assert "a.json exists already" in answer["error"] or "a.srt exists already" in answer["error"]
    code, answer, stderr = runner(device_folder, "transcribe", "artifact", "a.wav", "bad.wav")
    assert code == 1
    assert answer["transcripts"][0]["text"]
    assert stderr.startswith("error: bad.wav: sampled at 8000 Hz")


def test_audio_is_read_from_standard_input(device_folder):
    _, wanted, _ = runner(device_folder, "transcribe", "artifact", "a.wav")
    content = (device_folder / "a.wav").read_bytes()
    code, answer, _ = runner(device_folder, "transcribe", "artifact", "-", piped=content)
    assert code == 0
    assert answer["transcripts"] == [wanted["transcripts"][0] | {"audio": "-"}]
    for strict in ([], ["--strict"]):
        argv = ["transcribe", "artifact", "-", *strict]
        code, answer, notes = runner(device_folder, *argv, piped=content[:2000])
        said = answer["error"] if strict else notes
        assert code == len(strict)
        assert "-: truncated WAV file, its header promises" in said


def test_ctrl_c_ends_a_long_recording_cleanly(device_folder, pcms):
    soundfile.write(device_folder / "long.wav", np.concatenate(pcms * 40), 16_000)
    argv = ["transcribe", "artifact", "long.wav", "--stream"]
    with subprocess.Popen(
        [sys.executable, "-m", "runner", *argv],
        cwd=device_folder,
        env={},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as running:
        first = json.loads(running.stdout.readline())
        running.send_signal(signal.SIGINT)
        rest, stderr = running.communicate()
    (device_folder / "long.wav").unlink()
    assert first["start_s"] == 0
    assert all("text" in json.loads(line) for line in rest.splitlines())
    assert running.returncode == 130
    assert stderr.splitlines()[-1] == "interrupted", "there may be a progress line before"


def test_the_text_does_not_depend_on_the_number_of_threads(exported, pcms):
    one, two = (Recognizer(exported, threads=n) for n in (1, 2))
    assert [one.transcribe(pcm).tokens for pcm in pcms] == [
        two.transcribe(pcm).tokens for pcm in pcms
    ]


def test_the_python_api_works_on_a_device(device_folder):
    code = (
        "import sys, runner\n"
        "assert not {'numpy', 'onnxruntime'} & set(sys.modules)\n"
        "from runner import Recognizer\n"
        "recognizer = Recognizer('artifact', threads=1)\n"
        "for segment in recognizer.stream('a.wav'):\n"
        "    print(segment.text)\n"
        "assert recognizer.transcribe('a.wav').text == segment.text\n"
    )
    done = python(device_folder, "-c", code)
    assert done.stderr == ""
    assert done.stdout.strip()


def test_bench_prompts_each_clip_for_its_language(device_folder, monkeypatch):
    heard, transcribe = [], Recognizer.transcribe
    monkeypatch.setattr(
        Recognizer,
        "transcribe",
        lambda *given, **options: (
            heard.append(options["language"]) or transcribe(*given, **options)
        ),
    )
    languages = device_folder / "languages.json"
    languages.write_text('["hi_in", "tlh"]')
    try:
        measure.bench(device_folder / "artifact", device_folder / "clips.json", threads=1)
        assert heard == ["hi", None] * 2
        languages.write_text('["hi"]')
        with pytest.raises(RunnerProblem, match="1 entries for 2 clips"):
            measure.read_languages(device_folder / "clips.json", 2)
    finally:
        languages.unlink()
    assert measure.read_languages(device_folder / "clips.json", 2) == [None, None]


def test_bench_returns_every_sample(device_folder):
    code, answer, _ = runner(
        device_folder, *["bench", "artifact", "clips.json", "--repeats", "2", "--threads", "1"]
    )
    tokens = sum(len(found) for found in answer["tokens"])
    assert code == 0
    assert [len(answer[name]) for name in ("load_s", "end_to_end_s", "cpu_s")] == [1, 4, 4]
    assert len(answer["mel_s"]) == len(answer["encoder_s"]) == 4
    assert len(answer["per_token_s"]) == 2 * tokens
    assert 0 < answer["mel_share"] < 1
    assert answer["mel_s"][0] / answer["encoder_s"][0] == pytest.approx(
        answer["mel_share"] / (1 - answer["mel_share"])
    )
    assert all(answer["texts"])
    assert answer["peak_rss_bytes"] > 20e6
    assert set(answer["versions"]) == {"python", "numpy", "onnxruntime"}


def test_an_error_is_json_on_stdout_and_text_on_stderr(device_folder):
    code, answer, stderr = runner(device_folder, "transcribe", "artifact", "bad.wav")
    assert code == 1
    assert "sampled at 8000 Hz" in answer["error"]
    assert stderr == f"error: {answer['error']}\ntry:   {answer['hint']}\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "the list of clips is empty"),
        ("{", "not a list of clips"),
        (None, "not a list of clips"),
    ],
    ids=["empty", "no-json", "missing"],
)
def test_a_bad_list_of_clips_gets_an_error_message(tmp_path, content, message):
    path = tmp_path / "clips.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RunnerProblem, match=message):
        measure.read_clips(path)


def test_the_runner_imports_only_numpy_and_onnxruntime(device_folder):
    code = (
        "import importlib, pkgutil, sys, runner\n"
        "for module in pkgutil.walk_packages(runner.__path__, 'runner.'):\n"
        "    importlib.import_module(module.name)\n"
        "print([m for m in ('torch', 'transformers', 'tokenizers', 'onnx', 'scipy', 'soundfile',"
        " 'edgewhisper', 'benchmarks', 'export', 'devices') if m in sys.modules])"
    )
    done = python(device_folder, "-c", code)
    assert done.stdout == "[]\n"


# ---------------------------------------------------------------------------------------- threads


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs CPU affinity")
def test_an_artifact_is_run_with_as_many_threads_as_cores_that_the_process_may_use(exported):
    core = min(os.sched_getaffinity(0))
    program = f"""
import os, sys
os.sched_setaffinity(0, [{core}])
from devices.runner.recognizer import Recognizer
engine = Recognizer(sys.argv[1]).engine
sessions = engine.encoder, engine.decoder
print(*(session.get_session_options().intra_op_num_threads for session in sessions))
"""
    words = [sys.executable, "-c", program, str(exported)]
    done = subprocess.run(words, capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.split() == ["1", "1"]


@pytest.mark.parametrize("options", [{}, {"beams": 3}, {"timestamps": True}, {"fallback": True}])
def test_threads_can_share_a_recognizer(exported, pcms, options, monkeypatch):
    """Every decoder step lets other threads run before its graph runs."""
    recognizer = Recognizer(exported, threads=1)
    alone = [recognizer.transcribe(pcm, **options).text for pcm in pcms]
    assert len(set(alone)) > 1
    step = sessions.Decoder.step

    def slow(decoder, ids):
        time.sleep(0.001)
        return step(decoder, ids)

    monkeypatch.setattr(sessions.Decoder, "step", slow)
    for threads in (2, 4):
        with ThreadPoolExecutor(threads) as pool:
            found = list(pool.map(lambda pcm: recognizer.transcribe(pcm, **options).text, pcms))
        assert found == alone


def test_interleaved_streams_do_not_mix(exported, pcms):
    recognizer = Recognizer(exported, threads=1)
    long = [np.concatenate([first, *pcms]) for first in pcms[:2]]
    alone = [[segment.text for segment in recognizer.stream(pcm)] for pcm in long]
    turns = zip(*(recognizer.stream(pcm) for pcm in long), strict=False)
    found = [[segment.text for segment in segments] for segments in zip(*turns, strict=True)]
    assert len(found[0]) > 1
    assert found == [texts[: len(found[0])] for texts in alone]
