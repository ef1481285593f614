"""Many files: where they are found, where their transcripts go, several at once, progress."""

from __future__ import annotations

import threading
from pathlib import Path

import numpy as np
import pytest

from devices.runner import batch
from devices.runner.batch import Job, Progress, plan, run
from devices.runner.interfaces import Segment
from devices.runner.problem import RunnerProblem

SECOND = np.zeros(16_000, np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.wav", "sub/b.WAV", "sub/notes.txt", "sub/deep/c.flac"):
        path = tmp_path / "in" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return tmp_path / "in"


def test_audio_is_found_in_folders_and_their_subfolders(folder):
    jobs = plan([folder, folder / "sub" / "notes.txt"], (".wav", ".flac"), [])
    names = [job.path.relative_to(folder).as_posix() for job in jobs]
    assert names == ["a.wav", "sub/b.WAV", "sub/deep/c.flac", "sub/notes.txt"]


def test_transcripts_are_written_to_the_folder_of_the_audio(folder):
    jobs = plan([folder], (".wav",), ["txt", "srt"])
    assert jobs[0].outputs == {"txt": folder / "a.txt", "srt": folder / "a.srt"}
    assert jobs[1].outputs["txt"] == folder / "sub" / "b.txt"


def test_an_output_folder_has_the_subfolders_of_the_audio(folder, tmp_path):
    jobs = plan([folder, folder / "sub" / "deep" / "c.flac"], (".wav",), ["txt"], tmp_path / "out")
    outputs = [job.outputs["txt"].relative_to(tmp_path / "out").as_posix() for job in jobs]
    assert outputs == ["a.txt", "sub/b.txt", "c.txt"]
    (job,) = plan([Path("-")], (), ["txt"], tmp_path / "out")
    assert job.outputs == {"txt": tmp_path / "out" / "stdin.txt"}


def test_a_folder_without_audio_is_refused(folder):
    with pytest.raises(RunnerProblem, match=r"in/sub: no audio files there, of \.mp3"):
        plan([folder / "sub"], (".mp3",), [])


def test_two_transcripts_with_one_path_are_refused(folder):
    (folder / "a.flac").touch()
    with pytest.raises(RunnerProblem, match=r"a\.flac and .*a\.wav would both be .*a\.txt"):
        plan([folder], (".wav", ".flac"), ["txt"])


def test_existing_files_are_only_replaced_with_overwrite(folder):
    for name in ("a.txt", "sub/b.txt"):
        (folder / name).write_text("mine")
    with pytest.raises(RunnerProblem, match=r"a\.txt exists already, and 1 more") as error:
        plan([folder], (".wav",), ["txt"])
    assert "--overwrite" in error.value.hint
    assert len(plan([folder], (".wav",), ["txt"], overwrite=True)) == 2


def transcribe(pcm, heard):
    heard(Segment(0.0, len(pcm) / 16_000, "one", [1]))
    return {"text": "one", "segments": []}


@pytest.mark.parametrize("workers", [1, 3])
def test_rows_come_in_the_order_of_the_files(workers, tmp_path):
    jobs = [Job(Path(f"{n}.wav"), {"txt": tmp_path / f"{n}.txt"}) for n in range(7)]
    heard = []
    rows = list(run(jobs, lambda path: SECOND, transcribe, workers, lambda *x: heard.append(x)))
    assert [row["audio"] for row in rows] == [f"{n}.wav" for n in range(7)]
    assert sorted(job.path.stem for job, _ in heard) == list("0123456")
    assert [(tmp_path / f"{n}.txt").read_text() for n in range(7)] == ["one\n"] * 7


def test_several_files_are_transcribed_at_once():
    together = threading.Barrier(3, timeout=60)

    def wait(pcm, heard):
        together.wait()
        return {"text": ""}

    jobs = [Job(Path(f"{n}.wav")) for n in range(3)]
    assert len(list(run(jobs, lambda path: SECOND, wait, 3))) == 3


def test_a_file_that_cannot_be_read_does_not_stop_the_others():
    def read(path: Path) -> np.ndarray:
        if path.stem == "1":
            raise RunnerProblem("1.wav: is empty", "record it again")
        return SECOND

    jobs = [Job(Path(f"{n}.wav")) for n in range(3)]
    rows = list(run(jobs, read, transcribe))
    assert [row.get("text") for row in rows] == ["one", None, "one"]
    assert rows[1] == {"audio": "1.wav", "error": "1.wav: is empty", "hint": "record it again"}
    with pytest.raises(RunnerProblem, match="is empty"):
        list(run(jobs[1:2], read, transcribe))


def test_an_error_stops_the_other_files_at_their_next_segment():
    begun, going_on = threading.Event(), threading.Event()

    def endless(pcm, heard):
        if len(pcm) == 1:
            begun.wait(60)
            raise RunnerProblem("failed")
        begun.set()
        for n in range(10**9):
            heard(Segment(n, n + 1.0, "", []))
        going_on.set()

    jobs = [Job(Path("1")), Job(Path("2"))]
    with pytest.raises(RunnerProblem, match="failed"):
        list(run(jobs, lambda path: SECOND[: 1 if path.name == "1" else 2], endless, 2))
    assert not going_on.is_set()


def test_the_progress_has_the_real_time_factor(monkeypatch, capsys):
    now = [0.0]
    monkeypatch.setattr(batch.time, "monotonic", lambda: now[0])
    progress = Progress(2, show=True)
    advance = progress.begin(1, Path("x/a.wav"), 4000.0)
    for now[0], position in ((5.0, 100.0), (20.0, 1000.0), (25.0, 1100.0), (40.0, 2000.0)):
        advance(position)
    progress.end()
    assert capsys.readouterr().err.splitlines() == [
        "a.wav (1 of 2): 16:40 of 1:06:40, real-time factor 0.020, about 60 s left",
        "a.wav (1 of 2): 33:20 of 1:06:40, real-time factor 0.020, about 40 s left",
        "2 files, 1:06:40 in 40 s, real-time factor 0.010",
    ]
