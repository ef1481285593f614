"""Stop and resume trainings: the state on disk, and the signals that request a stop.

A training that is asked to stop saves its state first; a killed one resumes from the last saved
state. A fingerprint identifies the training that a state belongs to. A method that trains in parts
stores the result of its newest finished part in `Finished` and deletes the states of older parts.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from export.files import new_directory, writing
from export.problem import Problem

if TYPE_CHECKING:
    from accelerate import Accelerator

    from edgewhisper.examples import Examples

NOT_DECISIVE = ("workers", "checkpoint_steps", "checkpoint_s")
"""Training options that may change when a training is resumed."""


class Interrupted(Problem):
    """Training was asked to stop. Its state is saved, and the same command resumes it."""


class State:
    """The saved states of a training: directories `step-000000120/`, complete or absent."""

    def __init__(self, directory: Path, accelerator: "Accelerator", fingerprint: str) -> None:
        self.directory, self.accelerator, self.fingerprint = directory, accelerator, fingerprint

    def newest(self) -> Path | None:
        states = sorted(self.directory.glob("step-*[0-9]"))
        return states[-1] if states else None

    def save(self, step: int, log: dict[str, Any]) -> None:
        """Save the state after `step` steps, then remove older states. The state is written to a
        temporary directory, which is renamed when it is complete."""
        final = self.directory / f"step-{step:09d}"
        partial = final.with_suffix(".partial")
        main = self.accelerator.is_main_process
        if main:
            shutil.rmtree(partial, ignore_errors=True)
            shutil.rmtree(final, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        with writing(self.directory):
            partial.mkdir(parents=True, exist_ok=True)
            try:
                self.accelerator.save_state(str(partial), safe_serialization=True)
            except (RuntimeError, SafetensorError) as error:  # raised when the disk is full
                raise OSError(str(error)) from error
        self.accelerator.wait_for_everyone()
        if main:
            older = list(self.directory.glob("step-*[0-9]"))
            record = {"fingerprint": self.fingerprint, "step": step, "log": log}
            (partial / "progress.json").write_text(json.dumps(record), "utf-8")
            os.replace(partial, final)
            for path in older:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def resume(self) -> tuple[int, dict[str, Any]]:
        """Load the newest state and return its number of steps and its log, or 0 and {}. Raises
        Problem if the state cannot be read or belongs to another training."""
        newest = self.newest()
        if newest is None:
            return 0, {}
        try:
            record = json.loads((newest / "progress.json").read_text("utf-8"))
            known, done, log = record["fingerprint"], int(record["step"]), dict(record["log"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise unreadable(newest, error) from error
        if known != self.fingerprint:
            raise of_another(self.directory)
        try:
            self.accelerator.load_state(str(newest))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise unreadable(newest, error) from error
        return done, log


class Finished:
    """The newest finished part of a method that trains in parts: `part-0003/`, complete or absent.

    Part n is trained in the directory `training(n)`, which is deleted when the part is finished.
    At any time, the disk holds one training state and one set of tensors for all parts together.
    `identity` is a hash of everything that determines the parts, as `digest` returns it.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        self.directory, self.identity = directory, identity

    def training(self, part: int) -> Path:
        return self.directory / f"training-{part:04d}"

    def newest(self) -> tuple[int, dict[str, Tensor], Any]:
        """Return the part's number, tensors and record; 0, {} and None before the first part."""
        parts = sorted(self.directory.glob("part-*[0-9]"))
        if not parts:
            return 0, {}, None
        try:
            record = json.loads((parts[-1] / "part.json").read_text("utf-8"))
            tensors = load_file(parts[-1] / "tensors.safetensors")
            part, known, data = int(record["part"]), record["identity"], record["told"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise unreadable(parts[-1], error) from error
        if known != self.identity:
            raise of_another(self.directory)
        return part, tensors, data

    def save(self, part: int, tensors: Mapping[str, Tensor], record: Any) -> None:
        """Save a part with its record (any JSON) on the first process. Older parts and the training
        state of this part are deleted afterwards."""
        from accelerate import PartialState

        processes = PartialState()
        processes.wait_for_everyone()  # no process still reads what is deleted
        if processes.is_main_process:
            older = [*self.directory.glob("part-*[0-9]"), *self.directory.glob("training-*")]
            with new_directory(self.directory / f"part-{part:04d}") as place:
                cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                try:
                    save_file(cpu, place / "tensors.safetensors")
                except SafetensorError as error:  # raised when the disk is full
                    raise OSError(str(error)) from error
                stored = {"part": part, "identity": self.identity, "told": record}
                (place / "part.json").write_text(json.dumps(stored), "utf-8")
            for path in older:
                shutil.rmtree(path)
        processes.wait_for_everyone()


def unreadable(state: Path, error: Exception) -> Problem:
    return Problem(
        f"{state} cannot be read as the state of a training ({error})",
        hint="delete it: training then starts from an older state, or from the beginning",
    )


def of_another(directory: Path) -> Problem:
    return Problem(
        f"{directory} holds the state of another training: the model, the clips, the options or "
        "the seed differ",
        hint="choose another output directory, or delete that one",
    )


def fingerprint(
    model: nn.Module, examples: "Examples", options: Any, others: list[int | str]
) -> str:
    """Return a hash of everything that determines the result of a training. These are the initial
    weights, the clips, the options (`Training`) and `others`: seed and hooks."""
    names = [str(clip.audio.name) for clip in examples.clips]
    return digest(
        model.state_dict(), [decisive(options), others, names, examples.texts, examples.windows]
    )


def decisive(options: Any) -> dict[str, Any]:
    """Return the options of a `Training` that determine its result."""
    return {k: v for k, v in asdict(options).items() if k not in NOT_DECISIVE}


def digest(tensors: Mapping[str, Tensor], record: Any) -> str:
    """Return a SHA-256 of named tensors and a JSON record, independent of the tensors' order."""
    result = sha256(json.dumps(record).encode())
    for name, tensor in sorted(tensors.items()):
        result.update(name.encode())
        result.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return result.hexdigest()


def interrupted(done: int, steps: int, directory: Path) -> Interrupted:
    return Interrupted(
        f"training: stopped after step {done} of {steps}; its state is in {directory}",
        hint="run the same command again to resume it",
    )


@contextmanager
def graceful_stop() -> Iterator[threading.Event]:
    """Yield an event that Ctrl-C and SIGTERM set. A second signal raises KeyboardInterrupt."""
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def ask(number: int, frame: Any) -> None:
        if stop.is_set():
            raise KeyboardInterrupt
        stop.set()

    for number in before:
        signal.signal(number, ask)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
