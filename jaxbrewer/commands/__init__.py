"""The rooms behind ``python -m jaxbrewer``: one file a command, and what they share."""

import os
from pathlib import Path
from typing import TextIO

FINE, BY_HAND, UNUSABLE, NOT_FINITE = 0, 1, 2, 3
"""Exit codes: nothing to do; something needs the user's hand; wrong usage or an unreadable file; a loss,
a gradient or a weight that is not finite."""


class CommandError(Exception):
    """Why a command ends early.

    Attributes:
        code: the exit code, `UNUSABLE` unless given.
    """

    def __init__(self, message: str, code: int = UNUSABLE):
        super().__init__(message)
        self.code = code


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Makes a folder to write to, if it is not there.

    Raises:
        CommandError: it cannot be made.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        raise CommandError(f"--out {path}: cannot make this folder: {error}") from error
    return folder


def escaped(text: object, but: str = "") -> str:
    """Text in which no character but those of `but` moves the cursor, colours or hides anything.

    Names and JSON that are shown come from files, and a terminal would obey what is in them.
    """
    return "".join(
        c if c.isprintable() or c in but else c.encode("unicode_escape").decode() for c in str(text)
    )


def say(text: object = "", file: TextIO | None = None) -> None:
    """Prints text, perhaps of several lines; what else a terminal would obey is escaped."""
    print(escaped(text, but="\n\t"), file=file)


def say_line(text: object) -> None:
    """Prints one line: line breaks in it are escaped too."""
    print(escaped(text))
