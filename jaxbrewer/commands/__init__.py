"""The rooms behind ``python -m jaxbrewer``: one file a command, and what they share."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FINE, BY_HAND, UNUSABLE = 0, 1, 2
"""Exit codes: nothing to do; something needs the user's hand; wrong usage or an unreadable file."""


class CommandError(Exception):
    """Why a command ends early.

    Attributes:
        code: the exit code, `UNUSABLE` unless given.
    """

    def __init__(self, message: str, code: int = UNUSABLE):
        super().__init__(message)
        self.code = code


def read_text(path: Path) -> str:
    """Reads a text file.

    Raises:
        CommandError: it is not there, is no file, or is not UTF-8.
    """
    if path.is_dir():
        raise CommandError(f"{path} is a folder, expected a file")
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        raise CommandError(f"{path}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name with a NUL
        raise CommandError(f"{path} cannot be read: {error}") from error


def read_json(path: Path) -> Any:
    """Reads a JSON file.

    Raises:
        CommandError: it cannot be read, is not JSON (with line and column), or repeats a key.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        where = f"line {error.lineno}, column {error.colno}"
        raise CommandError(f"{path}, {where}: not JSON: {error.msg}") from error
    except (ValueError, RecursionError) as error:  # digits or brackets without end
        raise CommandError(f"{path} cannot be used as JSON: {error}") from error


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found


def read_json_object(path: Path) -> Mapping[str, Any]:
    """Reads a JSON file that holds an object. Errors as `read_json`."""
    value = read_json(path)
    if not isinstance(value, Mapping):
        raise CommandError(f"{path} holds a {type(value).__name__}, expected a JSON object")
    return value


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
