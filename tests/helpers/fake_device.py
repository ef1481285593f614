"""A device for tests: it records the calls and replays prepared results."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from devices.device import Device, DeviceProblem, Env, Finished


@dataclass
class FakeDevice(Device):
    """Returns `replies` in order for `run`, `files` for `pull` and `machine` for `describe`."""

    replies: list[Finished] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=lambda: {"model": "fake", "emulated": False})
    calls: list[tuple[str, ...]] = field(default_factory=list)
    name: str = "fake"
    python: str = "python3"

    def run(self, argv: Sequence[str], env: Env = None, timeout_s: float | None = None) -> Finished:
        """Record the command and return the next reply."""
        self.calls.append(("run", *argv))
        if not self.replies:
            raise DeviceProblem(f"fake: no reply is left for {' '.join(argv)}")
        return self.replies.pop(0)

    def push(self, local: Path, remote: str) -> None:
        """Record the push; a file's content is kept, so that it can be inspected or pulled."""
        self.calls.append(("push", remote))
        if Path(local).is_file():
            self.files[remote] = Path(local).read_bytes()

    def pull(self, remote: str, local: Path) -> None:
        """Write the prepared or pushed file."""
        self.calls.append(("pull", remote))
        if remote not in self.files:
            raise DeviceProblem(f"fake: there is no file {remote}")
        Path(local).write_bytes(self.files[remote])

    def describe(self) -> dict[str, Any]:
        """Return the prepared description."""
        self.calls.append(("describe",))
        return dict(self.machine)

    def close(self) -> None:
        self.calls.append(("close",))
