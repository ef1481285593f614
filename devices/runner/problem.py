"""The runner's letter to the user; it can import nothing of the project."""


class RunnerProblem(ValueError):
    """What was asked and what was found, with the number; `hint` says what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
