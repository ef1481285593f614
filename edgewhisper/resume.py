"""Stopping a training and going on: states on disk, and the signals that ask for one.

A training that was asked to stop saves its state first; one that was killed has the last it saved.
A state belongs to one training, which its fingerprint names.
"""

import json
import os
import shutil
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError
from torch import nn

from export.files import writing
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
            raise Problem(
                f"{self.directory} holds the state of another training: the model, the clips, the "
                "options or the seed differ",
                hint="choose another output directory, or delete that one",
            )
        try:
            self.accelerator.load_state(str(newest))
        except (OSError, ValueError, RuntimeError, SafetensorError) as error:
            raise unreadable(newest, error) from error
        log.losses, log.seconds = told["losses"], told["seconds"]
        log.resumed_at = [*told["resumed_at"], done]
        return done


def unreadable(state: Path, error: Exception) -> Problem:
    return Problem(
        f"{state} cannot be read as the state of a training ({error})",
        hint="delete it: training then starts from an older state, or anew",
    )


def fingerprint(
    model: nn.Module, examples: "Examples", options: "Training", others: list[int | str]
) -> str:
    """A hash of all that decides the result: weights at the start, clips, options, seed, hooks."""
    digest = sha256()
    decisive = {k: v for k, v in asdict(options).items() if k not in NOT_DECISIVE}
    names = [str(clip.audio.name) for clip in examples.clips]
    digest.update(json.dumps([decisive, others, names, examples.texts]).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


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
