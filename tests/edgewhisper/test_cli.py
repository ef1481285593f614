"""The command line as a user types it, and what it says to bad input."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from io import BytesIO
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
    """How a command ended and what it said."""

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


def letter(done: Done) -> str:
    """What a failed command told its user: two lines, exit code 1, no traceback."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = done.stderr.splitlines()[-2:]  # progress and notes come before
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
def test_every_command_explains_itself(edgewhisper, command, tmp_path):
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


def test_what_only_an_artifact_can_do_is_refused_to_a_checkpoint(edgewhisper, digits, spoken):
    found = letter(edgewhisper("transcribe", digits, spoken, "--timestamps", "--beams", "3"))
    assert "is a checkpoint, and timestamps and beams are for artifacts" in found
    found = letter(edgewhisper("transcribe", digits, spoken, "--language", "tlh"))
    assert "--language tlh: the model has no token for it" in found


def test_a_checkpoint_takes_a_language_auto_and_transcribe(edgewhisper, digits, spoken):
    for words, language in ((("--language", "auto"), None), (("--language", "English"), "en")):
        done = edgewhisper("transcribe", digits, spoken, *words, "--task", "transcribe", "--json")
        assert done.returncode == 0, done.stderr
        (found,) = json.loads(done.stdout)
        assert language in (None, found["language"])


def test_a_gate_mode_that_is_not_there_is_refused(edgewhisper, digits):
    found = letter(edgewhisper("export", digits, "--gate", "maybe"))
    assert "--gate maybe is not there" in found
    assert "use fail or warn or off" in found


def test_eval_json_has_the_agreed_names_and_nothing_else_on_stdout(
    edgewhisper, tmp_path, digits, clips
):
    lines = clips.read_text().splitlines()[:6]
    shutil.copytree(clips.parent / "test", tmp_path / "test")
    (tmp_path / "few.jsonl").write_text("\n".join(lines))
    done = edgewhisper("eval", digits, "--speech", "few.jsonl", "--json")
    found = json.loads(done.stdout)
    assert {"wer", "cer", "wer_interval", "substitutions", "deletions", "insertions"} <= set(found)
    assert 0 <= found["wer_per_utterance_mean"] <= 1
    assert (found["utterances"], found["normalizer"]) == (6, "whisper-basic")


def test_eval_writes_each_clips_text_and_counts(edgewhisper, tmp_path, digits, clips):
    shutil.copytree(clips.parent / "test", tmp_path / "test")
    (tmp_path / "few.jsonl").write_text("\n".join(clips.read_text().splitlines()[:3]))
    done = edgewhisper("eval", digits, "--speech", "few.jsonl", "--texts", "texts.jsonl", "--json")
    rows = [json.loads(line) for line in (tmp_path / "texts.jsonl").read_text().splitlines()]
    whole = json.loads(done.stdout)
    assert len(rows) == whole["utterances"] == 3
    for name in ("substitutions", "deletions", "insertions", "words"):
        assert sum(row[name] for row in rows) == whole[name]
    assert all(row["reference"] and row["text"] and row["lang"] == "en" for row in rows)


def test_the_demo_names_a_model_that_is_not_there(edgewhisper):
    text = letter(edgewhisper("demo", "--model", "./nowhere"))
    assert "there is no such checkpoint" in text and "tiny.en" in text


def test_eval_takes_a_folder_and_says_both_error_rates(edgewhisper, tmp_path, digits, spoken):
    shutil.copy(spoken, tmp_path / "a.ogg")
    (tmp_path / "metadata.csv").write_text("file_name,sentence\na.ogg,zero\n")
    done = edgewhisper("eval", digits, "--speech", tmp_path, "--normalizer", "hindi-strict")
    assert "mean of every clip's own WER" in done.stdout
    assert "normalizer hindi-strict" in done.stdout


def test_the_help_names_every_normalizer(edgewhisper):
    from benchmarks.normalizers import NORMALIZERS

    told = "".join(edgewhisper("eval", "--help").stdout.split())  # lines break at hyphens
    assert all(name in told for name in NORMALIZERS)


def test_compare_shows_results_of_one_normalizer_only(edgewhisper, tmp_path):
    for name in ("hindi-strict", "hindi-wer"):
        write([make_result(name=name, normalizer=name)], tmp_path / f"{name}.jsonl")
    done = edgewhisper("compare", "hindi-strict.jsonl", "hindi-wer.jsonl")
    assert "different normalizers: hindi-strict and hindi-wer" in letter(done)
    assert not done.stdout
    assert edgewhisper("compare", "hindi-wer.jsonl", "hindi-wer.jsonl").returncode == 0


def test_a_bare_compress_leaves_the_choice_of_recipe_to_the_model(edgewhisper, monkeypatch):
    from edgewhisper import pipeline

    asked = []
    monkeypatch.setattr(pipeline, "compress", lambda *given: asked.append(given))
    assert edgewhisper("compress").returncode == 0
    assert asked[0][:2] == (None, None)


def test_a_target_is_searched_for_and_the_trials_are_shown(edgewhisper, tmp_path, digits, clips):
    (tmp_path / "mine.toml").write_text(
        '[[step]]\nmethod = "shear"\nrank = 96\ncalibration = 2\n[step.training]\nsteps = 0\n'
        '[[search]]\nfield = "step.1.rank"\nlow = 64\nhigh = 112\n'
    )
    shutil.copytree(clips.parent / "test", tmp_path / "test")
    (tmp_path / "few.jsonl").write_text("\n".join(clips.read_text().splitlines()[:2]))
    speech = ("--speech", "few.jsonl", "--dev", "few.jsonl")
    told = ("--recipe", "mine.toml", *speech, "--trials", "2", "--out", "out")
    done = edgewhisper("compress", digits, *told, "--target-params", "99.5%")
    assert done.returncode == 0, done.stderr
    assert "chosen" in done.stdout and "dev WER %" in done.stdout
    assert done.stdout.splitlines()[-1] == "wrote out"
    found = json.loads((tmp_path / "out/pareto.json").read_text())
    assert found["limits"]["parameters"] == int(0.995 * found["before"]["parameters"])


def test_recipes_say_what_may_be_searched(edgewhisper):
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
    """The letter that `compress` answers a recipe with, which leaves nothing half done: two clips,
    with `change` in their lines (None: no clips)."""

    def run(recipe: str, change: dict | None = None, more: tuple = (), model: Path = digits) -> str:
        shutil.copytree(clips.parent / "test", tmp_path / "test")
        rows = [json.loads(line) for line in clips.read_text().splitlines()[:2]]
        lines = [json.dumps(row | change) for row in rows] if change is not None else []
        (tmp_path / "few.jsonl").write_text("\n".join(lines))
        (tmp_path / "mine.toml").write_text(recipe)
        before = {path.name for path in tmp_path.iterdir()}
        speech = ("--speech", "few.jsonl", "--dev", "few.jsonl")
        told = ("--recipe", "mine.toml", *speech, *more, "--out", "out")
        text = letter(edgewhisper("compress", model, *told))
        assert {path.name for path in tmp_path.iterdir()} <= before | {"edgewhisper-runs"}
        runs = tmp_path / "edgewhisper-runs"
        assert all(path.name.startswith("unfinished-") for path in runs.glob("*"))
        return text

    return run


@pytest.mark.parametrize(
    ("recipe", "change", "more", "told"),
    [
        pytest.param(TRAIN, None, (), "names no clips", id="empty manifest"),
        pytest.param(
            TRAIN, {"text": " "}, (), "the text of all 2 clips is empty", id="empty texts"
        ),
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
            id="prompt that nothing needs",
        ),
        pytest.param(
            SHEAR.format(200, 0), {}, (), "rank 200 is more than a table", id="rank above width"
        ),
        pytest.param(
            MERGE.format("0+1 2+3"),
            {},
            (),
            "do not name each of the 2 decoder layers",
            id="more layers than there are",
        ),
        pytest.param(
            TRAIN.replace('"tspar"', '"tspar"\nencoder_element = 1e300'),
            {},
            (),
            "the loss is inf at step 1 of 1",
            id="a loss that is not finite",
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
            "is met at once",
            id="target already met",
        ),
        pytest.param(
            SHEAR.format(200, 0) + SEARCH.replace("96", "200").replace("64", "190"),
            {},
            ("--max-wer-loss", 1),
            "rank 200 is more than a table",
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
            "a budget of 0.01 is asked for; the lowest ranks",
            id="budget too small",
        ),
        pytest.param(
            '[[step]]\nmethod = "short"\nwindows_s = [99]\n',
            {},
            (),
            "windows_s is [99.0]; it must be ascending, and between 0.02 and the model's 6 s",
            id="window beyond the model's",
        ),
        pytest.param(
            TRAIN.replace('"tspar"', '"tspar"\nmin_removed = 0.95'),
            {},
            (),
            "min_removed asks for 0.950 of the parameters outside the token table; all that is in",
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
            id="quantised first",
        ),
    ],
)
def test_what_compress_cannot_do_is_a_letter_and_leaves_no_half_output(
    recipe, change, more, told, refused
):
    assert told in refused(recipe, change, more)


def test_a_teacher_with_another_table_of_tokens(refused, make_whisper, processor, tmp_path):
    from edgewhisper import whisper

    teacher = make_whisper(d_model=16, ffn=16)
    teacher.resize_token_embeddings(800)
    whisper.save(teacher, processor, tmp_path / "teacher", {})
    assert "the teacher teacher has 800 tokens, the student 783" in refused(KDQ, {})


def test_a_teacher_that_spells_otherwise(refused, digits, tmp_path):
    copy = Path(shutil.copytree(digits, tmp_path / "teacher"))
    told = json.loads((copy / "tokenizer.json").read_text("utf-8"))
    vocabulary = told["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (copy / "tokenizer.json").write_text(json.dumps(told), "utf-8")
    text = refused(KDQ, {})
    assert "the teacher teacher spells text otherwise" in text
    assert "4 are in one vocabulary only or have another number" in text


def test_a_checkpoint_that_is_quantised_already(refused, processor, digits, tmp_path):
    """Before its dev clips are decoded."""
    from edgewhisper import whisper
    from edgewhisper.compress import qat
    from edgewhisper.compress.work import Work

    work = Work(processor, [], [], tmp_path)
    model = qat.apply(whisper.load(digits), qat.Options(stem=8), work)
    whisper.save(model, processor, tmp_path / "quantised", {})
    text = refused('[[step]]\nmethod = "shrink"\n', {}, model=tmp_path / "quantised")
    assert "weights of the model are quantised, and this step would move them" in text
    assert "start from the checkpoint before that one" in text
    assert not (tmp_path / "edgewhisper-runs").exists()


def test_targets_that_cannot_be(edgewhisper, tmp_path, monkeypatch):
    assert "neither a count nor a share" in letter(edgewhisper("compress", "--target-params", "x"))
    assert "on no device" in letter(edgewhisper("compress", "--target-latency", "400ms"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    text = letter(edgewhisper("compress", "--target-latency", "0.4s", "--device", "local"))
    assert "try:   measure it: edgewhisper devices calibrate --device local" in text
    text = letter(edgewhisper("compress", "--max-wer-loss", "-1"))
    assert "--max-wer-loss -1 is not between 0 and 100 points" in text
    assert "nothing to search without a target" in letter(edgewhisper("compress", "--trials", 3))
    text = letter(edgewhisper("compress", "--recipe", "digits-imp", "--target-params", "60%"))
    assert "recipe digits-imp: it does not say what may be searched" in text
    assert not list(tmp_path.iterdir())


def test_an_unknown_normalizer_is_said_before_anything_is_transcribed(
    edgewhisper, digits, clips, monkeypatch
):
    from edgewhisper import pipeline

    monkeypatch.setattr(pipeline, "transcriber", None)
    text = letter(edgewhisper("eval", digits, "--speech", clips, "--normalizer", "hindi"))
    assert "unknown normalizer 'hindi'" in text
    assert "hindi-wer" in text


def test_a_language_without_a_normalizer(edgewhisper, tmp_path, digits, spoken):
    row = {"audio": str(spoken), "text": "தமிழ் மொழி", "lang": "ta"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    text = letter(edgewhisper("eval", digits, "--speech", "m.jsonl"))
    assert "'ta': whisper-basic would turn 4 of 9 characters" in text


def test_a_refused_eval_writes_no_file(edgewhisper, tmp_path, digits, spoken):
    row = {"audio": str(spoken), "text": "தமிழ் மொழி", "lang": "ta"}
    (tmp_path / "m.jsonl").write_text(json.dumps(row))
    done = edgewhisper("eval", digits, "--speech", "m.jsonl", "--json", "found.json")
    assert "'ta': whisper-basic would turn 4 of 9 characters" in letter(done)
    assert not done.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["m.jsonl"]


def test_a_data_set_that_cannot_be_named_so(edgewhisper, digits):
    text = letter(edgewhisper("eval", digits, "--speech", "hf:librispeech"))
    assert "'hf:librispeech' does not name a data set" in text


def test_a_missing_audio_file(edgewhisper, tmp_path, digits):
    assert "no audio file nowhere.wav" in letter(edgewhisper("transcribe", digits, "nowhere.wav"))


def test_a_file_that_is_not_audio(edgewhisper, tmp_path, digits):
    (tmp_path / "a.wav").write_text("not audio")
    assert "is not a readable sound file" in letter(edgewhisper("transcribe", digits, "a.wav"))


def test_an_empty_recording(edgewhisper, tmp_path, digits):
    soundfile.write(tmp_path / "a.wav", np.zeros(0), 16000)
    assert "has no samples" in letter(edgewhisper("transcribe", digits, "a.wav"))


def test_a_recording_of_nan(edgewhisper, tmp_path, digits):
    soundfile.write(tmp_path / "a.wav", np.full(100, np.nan), 16000, subtype="FLOAT")
    assert "100 of 100 samples are NaN" in letter(edgewhisper("transcribe", digits, "a.wav"))


def test_a_recording_that_was_cut_short(edgewhisper, tmp_path, digits, spoken, rng):
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
        message = letter(edgewhisper("transcribe", digits, name, "--strict"))
        assert re.search("truncated|cannot be decoded to its end|is not audio|no samples", message)


@pytest.fixture
def piped(monkeypatch) -> Callable[[bytes], None]:
    """Puts bytes into standard input."""
    return lambda content: monkeypatch.setattr(
        sys, "stdin", SimpleNamespace(buffer=BytesIO(content))
    )


def test_sound_comes_through_a_pipe(edgewhisper, exported, spoken, piped, tmp_path):
    wanted = edgewhisper("transcribe", exported, spoken).stdout
    samples, rate = soundfile.read(spoken)
    for kind in ("WAV", "FLAC"):
        soundfile.write(tmp_path / "a", samples, rate, format=kind)
        piped((tmp_path / "a").read_bytes())
        assert edgewhisper("transcribe", exported, "-").stdout == wanted
    piped(b"")
    assert "- is not audio" in letter(edgewhisper("transcribe", exported, "-"))


def test_the_text_of_a_long_file_is_written_as_it_is_heard(
    edgewhisper, exported, clips, tmp_path, monkeypatch
):
    """What stands on the screen before each window is decoded, then all of it, as in the JSON."""
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


def test_ctrl_c_in_a_long_file_ends_it_cleanly(edgewhisper, exported, clips, tmp_path, rng):
    pcms = [clip.pcm() for clip in read_manifest(clips)[:12]]
    soundfile.write(tmp_path / "a.wav", np.concatenate(pcms), 16_000)
    with pytest.MonkeyPatch.context() as patch:
        press_ctrl_c(patch, Recognizer, "decoder_over", call=int(rng.integers(1, 4)))
        done = edgewhisper("transcribe", exported, "a.wav", "--json", "texts.json")
    assert done.returncode == 130
    assert done.stderr.splitlines()[-1] == "interrupted"
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "texts.json").exists()


def test_eight_kilohertz_stereo_is_converted_and_said(edgewhisper, tmp_path, digits, spoken):
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


def test_a_recipe_with_a_wrong_key(edgewhisper, tmp_path):
    (tmp_path / "mine.toml").write_text('[[step]]\nmethod = "tspar"\nlamda = 0.1\n')
    text = letter(edgewhisper("compress", "--recipe", "mine.toml"))
    assert "lamda" in text
    assert list(tmp_path.iterdir()) == [tmp_path / "mine.toml"]


def test_a_manifest_with_a_bad_line(edgewhisper, tmp_path, digits):
    (tmp_path / "m.jsonl").write_text('{"audio": 3}\n')
    assert "m.jsonl, line 1: `audio` is 3" in letter(
        edgewhisper("eval", digits, "--speech", "m.jsonl")
    )


def test_a_truncated_checkpoint(edgewhisper, tmp_path, digits, spoken):
    copy = Path(shutil.copytree(digits, tmp_path / "checkpoint"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    for command in (["transcribe", copy, spoken], ["export", copy]):
        assert "cannot be read" in letter(edgewhisper(*command))
    assert not (tmp_path / "edgewhisper-runs").exists()


def test_a_model_without_speech_for_it(edgewhisper, tmp_path, digits):
    copy = shutil.copytree(digits, tmp_path / "mine")
    assert "no speech to compress it with" in letter(edgewhisper("compress", copy))


def test_an_output_that_exists(edgewhisper, tmp_path, digits):
    (tmp_path / "taken").mkdir()
    assert "taken exists already" in letter(edgewhisper("export", digits, "--out", "taken"))


def test_an_output_that_cannot_be_written(edgewhisper, tmp_path, digits):
    (tmp_path / "file").write_text("")
    assert "cannot be written" in letter(edgewhisper("export", digits, "--out", "file/artifact"))


@pytest.mark.parametrize(
    ("option", "value"),
    [("--target", "tflite"), ("--precision", "int3"), ("--layout", "mlx")],
)
def test_an_export_that_this_release_lacks(edgewhisper, tmp_path, option, value):
    assert f"{option} {value} is not there" in letter(edgewhisper("export", option, value))


@pytest.fixture
def asked(monkeypatch) -> list[str]:
    """The precisions that an export, which does not take place, is asked for."""
    from edgewhisper import pipeline

    found: list[str] = []
    monkeypatch.setattr(pipeline, "export", lambda source, precision, *_: found.append(precision))
    return found


@pytest.mark.parametrize("name", [*profile_names(), *FAMILIES])
def test_export_for_a_device_takes_the_precision_that_pays_there(edgewhisper, asked, name):
    profile = load_profile(name)
    done = edgewhisper("export", "--device", name)
    assert asked == [profile.precision]
    assert f"{profile.precision} for {profile.name}: {profile.reason}" in done.stdout


def test_a_precision_that_is_asked_for_stands_whatever_the_device(edgewhisper, asked):
    done = edgewhisper("export", "--device", "m1", "--precision", "int4")
    assert asked == ["int4"]
    assert "m1" not in done.stdout
    edgewhisper("export")
    assert asked == ["int4", None]  # the target's own


def test_export_for_an_unknown_device_names_the_known_ones(edgewhisper, asked):
    assert "rpi4" in letter(edgewhisper("export", "--device", "toaster", "--precision", "fp32"))
    assert asked == []


def test_bench_on_an_unknown_device_names_the_known_ones(edgewhisper):
    text = letter(edgewhisper("bench", "--device", "toaster"))
    assert "local" in text


def test_a_phone_without_the_program_that_reaches_it(edgewhisper, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    text = letter(edgewhisper("bench", "--device", "mobile"))
    assert "adb cannot be started" in text
