"""Stopping a training and going on: states on disk, and the signals that ask for one.

A training that was asked to stop saves its state first; one that was killed has the last it saved.
A state belongs to one training, which its fingerprint names. A method of many trainings keeps, in
`Finished`, what the newest finished one left behind, and their states no longer than they last.
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
    from edgewhisper.training import Training, TrainingLog

NOT_DECISIVE = ("workers", "checkpoint_steps", "checkpoint_s")
"""Options that may change between a stop and its resumption."""


class Interrupted(Problem):
    """Training was asked to stop; its state is saved and the same command goes on from there."""


class State:
    """Saved states under one directory: `step-000120/` is complete or absent."""

    def __init__(self, directory: Path, accelerator: "Accelerator", fingerprint: str) -> None:
        self.directory, self.accelerator, self.fingerprint = directory, accelerator, fingerprint

    def newest(self) -> Path | None:
        found = sorted(self.directory.glob("step-*[0-9]"))
        return found[-1] if found else None

    def save(self, step: int, log: "TrainingLog") -> None:
        """Written beside its final name and renamed once whole; then older states are removed."""
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
            except (RuntimeError, SafetensorError) as error:  # what a full disk is called there
                raise OSError(str(error)) from error
        self.accelerator.wait_for_everyone()
        if main:
            older = list(self.directory.glob("step-*[0-9]"))
            record = {"fingerprint": self.fingerprint, "step": step, "log": asdict(log)}
            (partial / "progress.json").write_text(json.dumps(record), "utf-8")
            os.replace(partial, final)
            for path in older:
                shutil.rmtree(path)
        self.accelerator.wait_for_everyone()

    def resume(self, log: "TrainingLog") -> int:
        """Load the newest state, if there is one -> the number of steps already done."""
        newest = self.newest()
        if newest is None:
            return 0
        try:
            record = json.loads((newest / "progress.json").read_text("utf-8"))
            known, done, told = record["fingerprint"], int(record["step"]), record["log"]
        except (OSError, ValueError, KeyError) as error:
            raise unreadable(newest, error) from error
        if known != self.fingerprint:
            raise of_another(self.directory)
        try:
            self.accelerator.load_state(str(newest))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise unreadable(newest, error) from error
        log.losses, log.seconds = told["losses"], told["seconds"]
        log.resumed_at = [*told["resumed_at"], done]
        return done


class Finished:
    """The newest finished part of a method that trains in parts: `part-0003/`, complete or absent.

    Part n is trained in `training(n)`, a directory that goes when the part is finished: of all
    parts together one state and one set of tensors lie on the disk. `identity` says whose parts
    these are: a hash of all that decides them, such as `digest` makes.
    """

    def __init__(self, directory: Path, identity: str) -> None:
        self.directory, self.identity = directory, identity

    def training(self, part: int) -> Path:
        return self.directory / f"training-{part:04d}"

    def newest(self) -> tuple[int, dict[str, Tensor], Any]:
        """Its number, the tensors and what was told with them; 0 and nothing before the first."""
        found = sorted(self.directory.glob("part-*[0-9]"))
        if not found:
            return 0, {}, None
        try:
            record = json.loads((found[-1] / "part.json").read_text("utf-8"))
            tensors = load_file(found[-1] / "tensors.safetensors")
            part, known, told = int(record["part"]), record["identity"], record["told"]
        except (OSError, ValueError, KeyError, SafetensorError) as error:
            raise unreadable(found[-1], error) from error
        if known != self.identity:
            raise of_another(self.directory)
        return part, tensors, told

    def save(self, part: int, tensors: Mapping[str, Tensor], told: Any) -> None:
        """Written whole by the first process, then older parts and the part's training go."""
        from accelerate import PartialState

        processes = PartialState()
        processes.wait_for_everyone()  # nobody still reads what goes
        if processes.is_main_process:
            older = [*self.directory.glob("part-*[0-9]"), *self.directory.glob("training-*")]
            with new_directory(self.directory / f"part-{part:04d}") as place:
                cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
                try:
                    save_file(cpu, place / "tensors.safetensors")
                except SafetensorError as error:  # what a full disk is called there
                    raise OSError(str(error)) from error
                record = {"part": part, "identity": self.identity, "told": told}
                (place / "part.json").write_text(json.dumps(record), "utf-8")
            for path in older:
                shutil.rmtree(path)
        processes.wait_for_everyone()


def unreadable(state: Path, error: Exception) -> Problem:
    return Problem(
        f"{state} cannot be read as the state of a training ({error})",
        hint="delete it: training then starts from an older state, or anew",
    )


def of_another(directory: Path) -> Problem:
    return Problem(
        f"{directory} holds the state of another training: the model, the clips, the options or "
        "the seed differ",
        hint="choose another output directory, or delete that one",
    )


def fingerprint(
    model: nn.Module, examples: "Examples", options: "Training", others: list[int | str]
) -> str:
    """A hash of all that decides the result: weights at the start, clips, options, seed, hooks."""
    names = [str(clip.audio.name) for clip in examples.clips]
    return digest(
        model.state_dict(), [decisive(options), others, names, examples.texts, examples.windows]
    )


def decisive(options: "Training") -> dict[str, Any]:
    return {k: v for k, v in asdict(options).items() if k not in NOT_DECISIVE}


def digest(tensors: Mapping[str, Tensor], told: Any) -> str:
    """A hash of tensors, their names, and anything that JSON can write; their order is no matter,
    for files have one of their own."""
    found = sha256(json.dumps(told).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(name.encode())
        found.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def interrupted(done: int, steps: int, directory: Path) -> Interrupted:
    return Interrupted(
        f"training: stopped after step {done} of {steps}; its state is in {directory}",
        hint="run the same command again: it goes on from there",
    )


@contextmanager
def graceful_stop() -> Iterator[threading.Event]:
    """Ctrl-C and SIGTERM set the event; a second one interrupts at once."""
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
