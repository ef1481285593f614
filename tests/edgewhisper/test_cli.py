"""The command line: its output, and its error messages for bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BufferedReader, BytesIO
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import typer
from ctrl_c import press_ctrl_c
from made_results import make_result

from benchmarks.result import write
from benchmarks.speech.clips import read_manifest
from devices.device import FAMILIES, load_profile, profile_names
from devices.runner.recognizer import Recognizer
from edgewhisper.cli import main


@dataclass
class Done:
    """Exit code and output of a command."""

    returncode: int
    stdout: str
    stderr: str


@pytest.fixture
def edgewhisper(monkeypatch, capsys, tmp_path) -> Callable[..., Done]:
    """The command line, in this process (a new one would import torch for seconds each time)."""

    def run(*words: object) -> Done:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", ["edgewhisper", *map(str, words)])
        monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
        code = 0
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("default")
            try:
                main()
            except SystemExit as end:
                code = int(end.code or 0)
        return Done(code, *capsys.readouterr())

    return run


def error_of(done: Done) -> str:
    """Return stderr of a failed command: it ends in an error and a hint, without a traceback."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()[-2:]  # progress and notes come first
    assert lines[0].startswith("error: ")
    assert lines[1].startswith("try:   ")
    return done.stderr


@pytest.fixture
def spoken(clips: Path) -> Path:
    """One shipped clip."""
    return sorted((clips.parent / "test").iterdir())[0]


def test_help_imports_nothing_heavy(tmp_path):
    program = (
        "import sys; from edgewhisper.cli import main; sys.argv = ['edgewhisper', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'onnx', 'onnxruntime', 'numpy', 'accelerate'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    "command",
    [
        *("compress", "export", "bench", "eval", "transcribe", "inspect", "verify", "compare"),
        *("report", "demo", "recipes", "devices"),
    ],
)
def test_every_command_has_a_help_text(edgewhisper, command, tmp_path):
    done = edgewhisper(command, "--help")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) > 4


def test_transcribe_prints_the_text(edgewhisper, tmp_path, digits, clips):
    rows = [json.loads(line) for line in clips.read_text().splitlines()][:3]
    done = edgewhisper(
        "transcribe", digits, *(clips.parent / row["audio"] for row in rows), "--json"
    )
    texts = [row["text"] for row in json.loads(done.stdout)]
    assert sum(text == row["text"] for text, row in zip(texts, rows, strict=True)) >= 2


def test_options_of_artifacts_are_refused_for_a_checkpoint(edgewhisper, digits, spoken):
    text = error_of(edgewhisper("transcribe", digits, spoken, "--timestamps", "--beams", "3"))
    assert "is a checkpoint, and timestamps and beams are for artifacts" in text
    text = error_of(edgewhisper("transcribe", digits, spoken, "--language", "tlh"))
    assert "--language tlh: the model has no token for it" in text


def test_a_checkpoint_accepts_a_language_auto_and_transcribe(edgewhisper, digits, spoken):
    for words, language in ((("--language", "auto"), None), (("--language", "English"), "en")):
        done = edgewhisper("transcribe", digits, spoken, *words, "--task", "transcribe", "--json")
        assert done.returncode == 0, done.stderr
        (transcript,) = json.loads(done.stdout)
        assert language in (None, transcript["language"])


def test_an_unknown_gate_mode_is_refused(edgewhisper, digits):
    text = error_of(edgewhisper("export", digits, "--gate", "maybe"))
    assert "unknown --gate 'maybe'" in text
    assert "choose fail, warn or off" in text


def test_eval_json_has_the_documented_keys_and_is_alone_on_stdout(
    edgewhisper, tmp_path, digits, clips
):
    lines = clips.read_text().splitlines()[:6]
    shutil.copytree(clips.parent / "test", tmp_path / "test")
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    done = edgewhisper("eval", digits, "--speech", "few.jsonl", "--json")
    score = json.loads(done.stdout)
    assert {"wer", "cer", "wer_interval", "substitutions", "deletions", "insertions"} <= set(score)
    assert 0 <= score["wer_per_utterance_mean"] <= 1
    assert (score["utterances"], score["normalizer"]) == (6, "whisper-basic")


def test_eval_writes_the_text_and_counts_of_each_clip(edgewhisper, tmp_path, digits, clips):
    shutil.copytree(clips.parent / "test", tmp_path / "test")
    (tmp_path / "few.jsonl").write_text("\n".join(clips.read_text().splitlines()[:3]))
    done = edgewhisper("eval", digits, "--speech", "few.jsonl", "--texts", "texts.jsonl", "--json")
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    whole = json.loads(done.stdout)
    assert len(rows) == whole["utterances"] == 3
    for name in ("substitutions", "deletions", "insertions", "words"):
        assert sum(row[name] for row in rows) == whole[name]
    assert all(row["reference"] and row["text"] and row["lang"] == "en" for row in rows)


def test_the_demo_refuses_a_model_that_does_not_exist(edgewhisper):
    text = error_of(edgewhisper("demo", "--model", "./nowhere"))
    assert "there is no such checkpoint" in text and "tiny.en" in text


def test_eval_reads_a_folder_and_prints_the_mean_wer_of_clips(
    edgewhisper, tmp_path, digits, spoken
):
    shutil.copy(spoken, tmp_path / "a.ogg")
    (tmp_path / "metadata.csv").write_text("file_name,sentence\na.ogg,zero\n")
    done = edgewhisper("eval", digits, "--speech", tmp_path, "--normalizer", "hindi-strict")
    assert "mean WER of the clips" in done.stdout
    assert "normalizer hindi-strict" in done.stdout


def test_the_help_of_eval_lists_every_normalizer(edgewhisper):
    from benchmarks.normalizers import NORMALIZERS

    text = "".join(edgewhisper("eval", "--help").stdout.split())  # lines break at hyphens
    assert all(name in text for name in NORMALIZERS)


def test_compare_refuses_results_with_different_normalizers(edgewhisper, tmp_path):
    for name in ("hindi-strict", "hindi-wer"):
        write([make_result(name=name, normalizer=name)], tmp_path / f"{name}.jsonl")
    done = edgewhisper("compare", "hindi-strict.jsonl", "hindi-wer.jsonl")
    assert "different normalizers: hindi-strict and hindi-wer" in error_of(done)
    assert not done.stdout
    assert edgewhisper("compare", "hindi-wer.jsonl", "hindi-wer.jsonl").returncode == 0


def test_compress_without_arguments_leaves_model_and_recipe_open(edgewhisper, monkeypatch):
    from edgewhisper import pipeline

    requests = []
    monkeypatch.setattr(pipeline, "compress", lambda request, say: requests.append(request))
    assert edgewhisper("compress").returncode == 0
    assert requests == [pipeline.Request()]


def test_compress_searches_for_a_target_and_prints_the_trials(edgewhisper, tmp_path, digits, clips):
    (tmp_path / "mine.toml").write_text(
        '[[step]]\nmethod = "shear"\nrank = 96\ncalibration = 2\n[step.training]\nsteps = 0\n'
        '[[search]]\nfield = "step.1.rank"\nlow = 64\nhigh = 112\n'
    )
    shutil.copytree(clips.parent / "test", tmp_path / "test")
    (tmp_path / "few.jsonl").write_text("\n".join(clips.read_text().splitlines()[:2]))
    speech = ("--speech", "few.jsonl", "--dev", "few.jsonl")
    words = ("--recipe", "mine.toml", *speech, "--trials", "2", "--out", "out")
    done = edgewhisper("compress", digits, *words, "--target-params", "99.5%")
    assert done.returncode == 0, done.stderr
    assert "chosen" in done.stdout and "dev WER %" in done.stdout
    assert done.stdout.splitlines()[-1] == "wrote out"
    record = json.loads((tmp_path / "out/pareto.json").read_text())
    assert record["limits"]["parameters"] == int(0.995 * record["before"]["parameters"])


def test_recipes_lists_the_fields_that_may_be_searched(edgewhisper):
    lines = edgewhisper("recipes").stdout.splitlines()
    quick = next(number for number, line in enumerate(lines) if line.startswith("quick"))
    assert lines[quick + 1].split() == ["searched:", "step.1.min_removed"]


# ------------------------------------------------------------------------------- bad input


SHEAR = '[[step]]\nmethod = "shear"\nrank = {}\ncalibration = 1\n[step.training]\nsteps = {}\n'
MERGE = '[[step]]\nmethod = "merge"\ngroups = "{}"\n[step.training]\nsteps = 0\n'
SEARCH = '[[search]]\nfield = "step.1.rank"\nlow = 64\nhigh = 96\n'
TRAIN = '[[step]]\nmethod = "tspar"\n[step.training]\nsteps = 1\nbatch_size = 2\n'
KDQ = '[[step]]\nmethod = "kdq"\nteacher = "teacher"\n[step.training]\nsteps = 1\n'


@pytest.fixture
def refused(edgewhisper, tmp_path, digits, clips) -> Callable[..., str]:
    """Run `compress` with a recipe on two clips, check that it leaves no output; return its error.

    `change` overrides fields of the clips; None: no clips.
    """

    def run(recipe: str, change: dict | None = None, more: tuple = (), model: Path = digits) -> str:
        shutil.copytree(clips.parent / "test", tmp_path / "test")
        rows = [json.loads(line) for line in clips.read_text().splitlines()[:2]]
        lines = [json.dumps(row | change) for row in rows] if change is not None else []
        (tmp_path / "few.jsonl").write_text("\n".join(lines))
        (tmp_path / "mine.toml").write_text(recipe)
        before = {path.name for path in tmp_path.iterdir()}
        speech = ("--speech", "few.jsonl", "--dev", "few.jsonl")
        words = ("--recipe", "mine.toml", *speech, *more, "--out", "out")
        text = error_of(edgewhisper("compress", model, *words))
        assert {path.name for path in tmp_path.iterdir()} <= before | {"edgewhisper-runs"}
        runs = tmp_path / "edgewhisper-runs"
        assert all(path.name.startswith("unfinished-") for path in runs.glob("*"))
        return text

    return run


@pytest.mark.parametrize(
    ("recipe", "change", "more", "message"),
    [
        pytest.param(TRAIN, None, (), "names no clips", id="empty manifest"),
        pytest.param(TRAIN, {"text": None}, (), "line 1: `text` is None", id="no text"),
        pytest.param(
            TRAIN,
            {"lang": "klingon"},
            (),
            "the language of 4 clips is 'klingon', which the model has no token",
            id="wrong language",
        ),
        pytest.param(TRAIN, {"lang": ""}, (), "of 4 clips is '', which", id="empty language"),
        pytest.param(
            TRAIN, {"lang": "bm"}, (), "add --language CODE", id="language without a token"
        ),
        pytest.param(
            TRAIN,
            {"lang": "bm"},
            ("--language", "bambara"),
            "--language bambara: the model has no token for it",
            id="prompt without a token",
        ),
        pytest.param(
            TRAIN,
            {"lang": "hi"},
            ("--language", "sw"),
            "--language sw: the speech is in hi",
            id="needless prompt",
        ),
        pytest.param(
            SHEAR.format(200, 0),
            {},
            (),
            "rank 200 exceeds the highest rank 128 of a table",
            id="rank above width",
        ),
        pytest.param(
            MERGE.format("0+1 2+3"),
            {},
            (),
            "must name each of the 2 decoder layers",
            id="unknown layers",
        ),
        pytest.param(
            TRAIN.replace('"tspar"', '"tspar"\nencoder_element = 1e300'),
            {},
            (),
            "the loss is inf at step 1 of 1",
            id="infinite loss",
        ),
        pytest.param(
            SHEAR.format(96, 0) + SEARCH,
            {},
            ("--target-params", "10%", "--trials", 2),
            "none of 2 trials has at most 154,867 parameters",
            id="target out of reach",
        ),
        pytest.param(
            SHEAR.format(96, 0) + SEARCH,
            {},
            ("--target-macs", "900G"),
            "is met already",
            id="target already met",
        ),
        pytest.param(
            SHEAR.format(200, 0) + SEARCH.replace("96", "200").replace("64", "190"),
            {},
            ("--max-wer-loss", 1),
            "rank 200 exceeds the highest rank 128 of a table",
            id="search beyond the width",
        ),
        pytest.param(
            SHEAR.format(120, 0),
            {},
            (),
            "factors of rank 120 have 109,320 parameters, the token table has 100,224",
            id="factors larger than the table",
        ),
        pytest.param(
            '[[step]]\nmethod = "lite"\nbudget = 0.01\nclips = 1\n',
            {},
            (),
            "budget is 0.01, but the lowest ranks",
            id="budget too small",
        ),
        pytest.param(
            '[[step]]\nmethod = "short"\nwindows_s = [99]\n',
            {},
            (),
            "windows_s is [99.0]; windows must be ascending and between 0.02 and the model's 6 s",
            id="window beyond the model's",
        ),
        pytest.param(
            TRAIN.replace('"tspar"', '"tspar"\nmin_removed = 0.95'),
            {},
            (),
            "min_removed asks for 0.950 of the parameters outside the token table; the layers",
            id="share out of reach",
        ),
        pytest.param(
            TRAIN.replace('"tspar"', '"tspar"\nlayers = "*.fc2"\nmin_removed = 0.5').replace(
                "steps = 1", "steps = 0"
            ),
            {},
            (),
            "min_removed asks for 0.500 of the parameters outside the token table; at full",
            id="share beyond the thresholds",
        ),
        pytest.param(
            '[[step]]\nmethod = "qat"\n' + TRAIN,
            None,
            (),
            "recipe mine: step 2 (tspar) would change weights that step 1 (qat) has quantised",
            id="step after quantisation",
        ),
    ],
)
def test_compress_refuses_what_it_cannot_do_and_leaves_no_output(
    recipe, change, more, message, refused
):
    assert message in refused(recipe, change, more)


def test_a_teacher_with_another_vocabulary_size_is_refused(
    refused, make_whisper, processor, tmp_path
):
    from edgewhisper import whisper

    teacher = make_whisper(d_model=16, ffn=16)
    teacher.resize_token_embeddings(800)
    whisper.save(teacher, processor, tmp_path / "teacher", {})
    assert "the teacher teacher has 800 tokens, the student 783" in refused(KDQ, {})


def test_a_teacher_with_another_tokenizer_is_refused(refused, digits, tmp_path):
    copy = Path(shutil.copytree(digits, tmp_path / "teacher"))
    tokenizer = json.loads((copy / "tokenizer.json").read_text("utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (copy / "tokenizer.json").write_text(json.dumps(tokenizer), "utf-8")
    text = refused(KDQ, {})
    assert "the teacher teacher has another vocabulary" in text
    assert "4 differ in text or id" in text


def test_a_quantised_checkpoint_is_refused(refused, processor, digits, tmp_path):
    """The check comes before the dev clips are decoded."""
    from edgewhisper import whisper
    from edgewhisper.compress import qat
    from edgewhisper.compress.context import Context

    context = Context(processor, [], [], tmp_path)
    model = qat.apply(whisper.load(digits), qat.Options(stem=8), context)
    whisper.save(model, processor, tmp_path / "quantised", {})
    text = refused('[[step]]\nmethod = "shrink"\n', {}, model=tmp_path / "quantised")
    assert "weights of the model are quantised, and this step would move them" in text
    assert "start from the checkpoint before quantisation" in text
    assert not (tmp_path / "edgewhisper-runs").exists()


def test_invalid_targets_are_refused(edgewhisper, tmp_path, monkeypatch):
    assert "neither a count nor a share" in error_of(
        edgewhisper("compress", "--target-params", "x")
    )
    assert "needs a device" in error_of(edgewhisper("compress", "--target-latency", "400ms"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = error_of(edgewhisper("compress", "--target-latency", "0.4s", "--device", "local"))
    assert "try:   measure it: edgewhisper devices calibrate --device local" in text
    text = error_of(edgewhisper("compress", "--max-wer-loss", "-1"))
    assert "--max-wer-loss -1 is not between 0 and 100 points" in text
    assert "nothing to search without a target" in error_of(edgewhisper("compress", "--trials", 3))
    text = error_of(edgewhisper("compress", "--recipe", "digits-imp", "--target-params", "60%"))
    assert "recipe digits-imp has no [[search]] table" in text
    assert not list(tmp_path.iterdir())


def test_an_unknown_normalizer_is_refused_before_transcription(
    edgewhisper, digits, clips, monkeypatch
):
    from edgewhisper import transcription

    monkeypatch.setattr(transcription, "transcriber", None)
    text = error_of(edgewhisper("eval", digits, "--speech", clips, "--normalizer", "hindi"))
    assert "unknown normalizer 'hindi'" in text
    assert "hindi-wer" in text


def test_a_language_without_a_normalizer_is_refused(edgewhisper, tmp_path, digits, spoken):
    row = {"audio": str(spoken), "text": "தமிழ் மொழி", "lang": "ta"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    text = error_of(edgewhisper("eval", digits, "--speech", "m.jsonl"))
    assert "'ta': whisper-basic would turn 4 of 9 characters" in text


def test_a_refused_eval_writes_no_file(edgewhisper, tmp_path, digits, spoken):
    row = {"audio": str(spoken), "text": "தமிழ் மொழி", "lang": "ta"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    done = edgewhisper("eval", digits, "--speech", "m.jsonl", "--json", "scores.json")
    assert "'ta': whisper-basic would turn 4 of 9 characters" in error_of(done)
    assert not done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


def test_an_invalid_data_set_name_is_refused(edgewhisper, digits):
    text = error_of(edgewhisper("eval", digits, "--speech", "hf:librispeech"))
    assert "'hf:librispeech' is not the name of a dataset" in text


def test_a_missing_audio_file_is_refused(edgewhisper, tmp_path, digits):
    assert "no audio file nowhere.wav" in error_of(edgewhisper("transcribe", digits, "nowhere.wav"))


def test_a_file_that_is_not_audio_is_refused(edgewhisper, tmp_path, digits):
    (tmp_path / "a.wav").write_text("not audio")
    assert "is not a readable audio file" in error_of(edgewhisper("transcribe", digits, "a.wav"))


def test_an_empty_recording_is_refused(edgewhisper, tmp_path, digits):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16000)
    assert "has no samples" in error_of(edgewhisper("transcribe", digits, "a.wav"))


def test_a_recording_of_nan_is_refused(edgewhisper, tmp_path, digits):
    soundfile.write(tmp_path / "a.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    assert "100 of 100 samples are NaN" in error_of(edgewhisper("transcribe", digits, "a.wav"))


def test_a_truncated_recording_warns_or_fails_with_strict(
    edgewhisper, tmp_path, digits, spoken, rng
):
    samples, rate = soundfile.read(spoken)
    for name in ("a.wav", "a.flac"):
        soundfile.write(tmp_path / name, samples, rate)
        content = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(content[: int(rng.integers(200, len(content)))])
    done = edgewhisper("transcribe", digits, "a.wav")
    assert done.returncode == 0
    assert "truncated WAV file, its header" in done.stderr
    assert "its text may be incomplete" in done.stderr
    for name in ("a.wav", "a.flac"):
        message = error_of(edgewhisper("transcribe", digits, name, "--strict"))
        assert re.search(
            "truncated|cannot be decoded to its end|is not a readable|no samples", message
        )


@pytest.fixture
def piped(monkeypatch) -> Callable[[bytes], None]:
    """A function that sets the bytes of standard input."""
    return lambda content: monkeypatch.setattr(
        sys, "stdin", SimpleNamespace(buffer=BytesIO(content))
    )


def test_transcribe_reads_audio_from_stdin(edgewhisper, exported, spoken, piped, tmp_path):
    expected = edgewhisper("transcribe", exported, spoken).stdout
    samples, rate = soundfile.read(spoken)
    for kind in ("WAV", "FLAC"):
        soundfile.write(tmp_path / "a", samples, rate, format=kind)
        piped((tmp_path / "a").read_bytes())
        assert edgewhisper("transcribe", exported, "-").stdout == expected
    piped(b"")
    assert "- is not a readable audio file" in error_of(edgewhisper("transcribe", exported, "-"))


def test_the_text_of_a_long_file_is_printed_as_it_is_decoded(
    edgewhisper, exported, clips, tmp_path, monkeypatch
):
    """More text is printed before each window is decoded; in the end it is the text of the JSON."""
    pcms = [clip.pcm() for clip in read_manifest(clips)[:12]]
    soundfile.write(tmp_path / "a.wav", np.concatenate(pcms), 16_000)
    written, shown, echo, over = [], [], typer.echo, Recognizer.decoder_over
    monkeypatch.setattr(typer, "echo", lambda text, **k: (written.append(text), echo(text, **k)))
    monkeypatch.setattr(
        Recognizer,
        "decoder_over",
        lambda *given: (shown.append("".join(written)), over(*given))[1],
    )
    text = edgewhisper("transcribe", exported, "a.wav").stdout
    assert len(shown) > 2
    assert all(len(a) < len(b) and text.startswith(b) for a, b in pairwise(shown))
    (row,) = json.loads(edgewhisper("transcribe", exported, "a.wav", "--json").stdout)
    assert text == row["text"] + "\n"
    both = edgewhisper("transcribe", exported, "a.wav", "a.wav").stdout
    assert both == f"a.wav\t{text}" * 2


def test_transcripts_are_written_for_files_in_folders(edgewhisper, exported, clips, tmp_path):
    for number, clip in enumerate(read_manifest(clips)[:4]):
        path = tmp_path / "in" / f"sub{number % 2}" / f"{number}.flac"
        path.parent.mkdir(parents=True, exist_ok=True)
        soundfile.write(path, clip.pcm(), 16_000)
    one = edgewhisper("transcribe", exported, "in", "--output", "txt,json")
    assert one.returncode == 0
    for line in one.stdout.splitlines():
        path, text = line.split("\t")
        row = json.loads((tmp_path / path).with_suffix(".json").read_text())
        assert (row["audio"], row["text"]) == (path, text)
        assert (tmp_path / path).with_suffix(".txt").read_text() == text + "\n"
        assert all(segment["avg_logprob"] < 0 for segment in row["segments"])
    message = error_of(edgewhisper("transcribe", exported, "in", "--output", "txt"))
    assert "0.txt exists already, and 3 more transcripts" in message
    two = edgewhisper(
        *("transcribe", exported, "in", "--output", "srt", "--output", "txt"),
        *("--output-dir", "out", "--jobs", "2"),
    )
    assert len(list((tmp_path / "out").rglob("*.srt"))) == 4
    assert two.stdout == one.stdout


def test_an_unreadable_file_among_others_gives_an_error_and_the_other_texts(
    edgewhisper, exported, spoken, tmp_path
):
    (tmp_path / "a.wav").write_bytes(b"RIFF")
    done = edgewhisper("transcribe", exported, spoken, "a.wav", spoken, "--json", "texts.json")
    first, _, second = json.loads((tmp_path / "texts.json").read_text())
    assert done.returncode == 1
    assert first == second
    assert done.stdout == f"{spoken}\t{first['text']}\n" * 2
    assert "error: a.wav: expected a WAV file" in done.stderr


def test_live_sound_is_printed_and_written(edgewhisper, exported, spoken, tmp_path, monkeypatch):
    content = BufferedReader(BytesIO(spoken.read_bytes()))
    if spoken.suffix != ".wav":
        soundfile.write(tmp_path / "a.wav", *soundfile.read(spoken))
        content = BufferedReader(BytesIO((tmp_path / "a.wav").read_bytes()))
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=content))
    done = edgewhisper("transcribe", exported, "-", "--live", "--output", "json", "--json", "x")
    (row,) = json.loads((tmp_path / "x").read_text())
    assert done.stdout == row["text"] + "\n"
    assert json.loads((tmp_path / "stdin.json").read_text()) == row
    assert "--live: a.wav is neither" in error_of(
        edgewhisper("transcribe", exported, "a.wav", "--live")
    )


def test_a_checkpoint_writes_text_but_no_subtitles(edgewhisper, digits, spoken, tmp_path):
    words = ("transcribe", digits, spoken, "--output-dir", "out")
    text = edgewhisper(*words, "--output", "txt").stdout
    assert (tmp_path / "out" / spoken.with_suffix(".txt").name).read_text() == text
    assert "--output srt is for artifacts" in error_of(edgewhisper(*words, "--output", "srt"))
    assert "--live is for artifacts" in error_of(edgewhisper(*words, "--live"))
    assert "--jobs 2 is for artifacts" in error_of(edgewhisper(*words, "--jobs", "2"))
    done = edgewhisper("transcribe", "./nowhere", spoken, "--jobs", "2")
    assert "there is no such checkpoint" in error_of(done)


def test_ctrl_c_in_a_long_file_exits_with_130_and_writes_nothing(
    edgewhisper, exported, clips, tmp_path, rng
):
    pcms = [clip.pcm() for clip in read_manifest(clips)[:12]]
    soundfile.write(tmp_path / "a.wav", np.concatenate(pcms), 16_000)
    with pytest.MonkeyPatch.context() as patch:
        press_ctrl_c(patch, Recognizer, "decoder_over", call=int(rng.integers(1, 4)))
        done = edgewhisper("transcribe", exported, "a.wav", "--json", "texts.json")
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "texts.json").exists()


def test_stereo_at_8_khz_is_converted_with_a_note(edgewhisper, tmp_path, digits, spoken):
    samples, rate = soundfile.read(spoken)
    halved = samples[::2]
    soundfile.write(tmp_path / "a.wav", np.stack([halved, halved], axis=1), rate // 2)
    done = edgewhisper("transcribe", digits, "a.wav")
    assert done.returncode == 0
    assert done.stdout.strip()
    assert "2 channels, averaged" in done.stderr
    assert "8000 Hz" in done.stderr


def test_silence_gives_no_text(edgewhisper, tmp_path, digits):
    soundfile.write(tmp_path / "a.wav", np.zeros(32000), 16000)
    done = edgewhisper("transcribe", digits, "a.wav")
    assert (done.returncode, done.stdout.strip()) == (0, "")


def test_a_recipe_with_an_unknown_key_is_refused(edgewhisper, tmp_path):
    (tmp_path / "mine.toml").write_text('[[step]]\nmethod = "tspar"\nlamda = 0.1\n')
    text = error_of(edgewhisper("compress", "--recipe", "mine.toml"))
    assert "lamda" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.toml"]


def test_a_manifest_with_an_invalid_line_is_refused(edgewhisper, tmp_path, digits):
    (tmp_path / "m.jsonl").write_text('{"audio": 3}\n')
    assert "m.jsonl, line 1: `audio` is 3" in error_of(
        edgewhisper("eval", digits, "--speech", "m.jsonl")
    )


def test_a_truncated_checkpoint_is_refused(edgewhisper, tmp_path, digits, spoken):
    copy = Path(shutil.copytree(digits, tmp_path / "checkpoint"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for command in (["transcribe", copy, spoken], ["export", copy]):
        assert "cannot be read" in error_of(edgewhisper(*command))
    assert not (tmp_path / "edgewhisper-runs").exists()


def test_a_model_without_fitting_speech_is_refused(edgewhisper, tmp_path, digits):
    copy = shutil.copytree(digits, tmp_path / "mine")
    assert "no speech to compress it with" in error_of(edgewhisper("compress", copy))


def test_an_existing_output_is_refused(edgewhisper, tmp_path, digits):
    (tmp_path / "taken").mkdir()
    assert "taken exists already" in error_of(edgewhisper("export", digits, "--out", "taken"))


def test_an_output_that_cannot_be_written_is_refused(edgewhisper, tmp_path, digits):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in error_of(edgewhisper("export", digits, "--out", "file/artifact"))


@pytest.mark.parametrize(
    ("option", "value"),
    [("--target", "tflite"), ("--precision", "int3"), ("--layout", "mlx")],
)
def test_an_unknown_export_choice_is_refused(edgewhisper, tmp_path, option, value):
    assert f"unknown {option} {value!r}" in error_of(edgewhisper("export", option, value))


@pytest.fixture
def precisions(monkeypatch) -> list[str]:
    """Replace pipeline.export; returns the list of the precisions that it is called with."""
    from edgewhisper import pipeline

    calls: list[str] = []
    monkeypatch.setattr(
        pipeline, "export", lambda _, precision, *__, **___: calls.append(precision)
    )
    return calls


@pytest.mark.parametrize("name", [*profile_names(), *FAMILIES])
def test_export_for_a_device_uses_its_best_precision(edgewhisper, precisions, name):
    profile = load_profile(name)
    done = edgewhisper("export", "--device", name)
    assert precisions == [profile.precision]
    assert f"{profile.precision} for {profile.name}: {profile.reason}" in done.stdout


def test_a_given_precision_overrides_that_of_the_device(edgewhisper, precisions):
    done = edgewhisper("export", "--device", "m1", "--precision", "int4")
    assert precisions == ["int4"]
    assert "m1" not in done.stdout
    edgewhisper("export")
    assert precisions == ["int4", None]  # the default of the target


def test_export_for_an_unknown_device_lists_the_known_ones(edgewhisper, precisions):
    assert "rpi4" in error_of(edgewhisper("export", "--device", "toaster", "--precision", "fp32"))
    assert precisions == []


def test_bench_on_an_unknown_device_lists_the_known_ones(edgewhisper):
    text = error_of(edgewhisper("bench", "--device", "toaster"))
    assert "local" in text


def test_bench_on_a_phone_needs_adb(edgewhisper, exported, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    text = error_of(edgewhisper("bench", exported, "--device", "mobile"))
    assert "adb cannot be started" in text
