"""The error tree: every error says what is wrong, where, and what to do.

Whatever comes from outside (a file, a flag, a request) and cannot be used ends in a `MoeplanError`; the command line
prints its one line and exits with status 2. Anything else that escapes is a defect of moeplan itself.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

__all__ = ["FormatError", "MoeplanError", "OutputError", "PlanError", "ServerError", "UsageError", "expect", "located"]


class MoeplanError(Exception):
    """Base of all errors that moeplan raises on purpose.

    Args:
        what: what is wrong, naming the value.
        where: the file, and the row or field in it, if there is one.
        hint: what the reader should do next.
    """

    def __init__(self, what: str, *, where: str | None = None, hint: str | None = None) -> None:
        self.what, self.where, self.hint = what, where, hint
        super().__init__(self.line())

    def line(self) -> str:
        """The whole error as one line: location, what is wrong, hint."""
        text = f"{self.where}: {self.what}" if self.where else self.what
        if self.hint:
            text = f"{text.rstrip('.')}; {self.hint}"
        return " ".join(text.split())


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Give `where` to errors from the block that do not name a place."""
    try:
        yield
    except MoeplanError as error:
        error.where = error.where or where
        error.args = (error.line(),)
        raise


class FormatError(MoeplanError):
    """A file is not what it should be: cut off, ragged, too new, out of range."""


class UsageError(MoeplanError):
    """A flag or an argument is wrong, or asks for something that this input cannot give."""


class PlanError(UsageError):
    """A plan cannot exist as asked: slots that do not divide, more groups than requests."""


def expect(value: object, kind: type | tuple[type, ...], hint: str) -> None:
    """Refuse an argument of another type than `kind`, with what to give instead.

    Raises:
        UsageError: it is not of that type.
    """
    if not isinstance(value, kind):
        raise UsageError(f"{str(value)[:60]!r} is of type {type(value).__name__}", hint=f"give {hint}")


class OutputError(MoeplanError):
    """The result cannot be written where it was asked for."""


class ServerError(MoeplanError):
    """A server cannot be reached, refuses a request, or keeps failing.

    Attributes:
        status: the HTTP status of a refusal; None where there was none.
    """

    def __init__(
        self, what: str, *, where: str | None = None, hint: str | None = None, status: int | None = None
    ) -> None:
        super().__init__(what, where=where, hint=hint)
        self.status = status
