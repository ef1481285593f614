"""The runner's error, with a hint for the user; imports nothing of the project."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


class RunnerProblem(ValueError):
    """An error message for the user: what was asked, what was found; `hint` is what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint


@contextmanager
def running(path: Path) -> Iterator[None]:
    """Convert errors of the engine while a graph runs to a RunnerProblem that names its file."""
    try:
        yield
    except RunnerProblem:
        raise
    except Exception as error:  # onnxruntime has one class per status code
        if (
            not isinstance(error, MemoryError | RuntimeError)
            and type(error) is not Exception  # coremltools raises plain exceptions
            and "onnx" not in type(error).__module__
        ):
            raise
        reason = (str(error).strip().splitlines() or ["out of memory"])[0]
        raise RunnerProblem(
            f"{path}: the graph cannot be run ({reason[:300]})",
            "copy the whole artifact again, or export it again",
        ) from None
