"""The exception for errors that the user can act on."""


class Problem(ValueError):
    """An error message for the user. The command line prints it and exits with 1; libraries raise
    it. `message` states what was requested and what is the case, with the number. `hint` states
    what to do next."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
