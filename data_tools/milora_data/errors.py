"""Errors that a user can act on: shown as a few clear lines by `milora_data.command.run`, never as a traceback."""


class UserError(ValueError):
    """A mistake in what was asked for. The first line of `message` says what is wrong, the others what to do."""

    def __init__(self, message: str, *, exit_code: int = 2) -> None:
        super().__init__(message)
        self.exit_code = exit_code


class DataError(UserError):
    """A mistake in a data set; the message carries the file and, where it is known, the line."""
