"""The one exception that speaks to the user: what was asked, what was found, what to do next."""


class Problem(ValueError):
    """A letter to the user. The command line prints it and exits with 1; libraries only raise it.

    `message` says what was asked and what was found, with the number; `hint` what to do next.
    """

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint
