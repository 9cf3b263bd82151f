"""Files: written whole or not at all, and text and JSON that are read with their errors named."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]

MOST_JSON = 16 * 2**20
"""A longer text or JSON file is not read; the index of a model with 90,000 tensors has 9 MiB."""


class UnreadableFileError(ValueError):
    """A file that cannot be read as what it should be.

    Attributes:
        path: the file.
        problem: what is wrong, without the path.
    """

    def __init__(self, path: PathLike, problem: str):
        super().__init__(f"{os.fspath(path)}: {problem}")
        self.path = Path(path)
        self.problem = problem


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Gives a path to write to, and moves what was written there to ``path`` at the end.

    A reader of ``path`` sees the old file or the whole new one; if the writing fails, the old one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as folder:
        file = Path(folder) / path.name
        yield file
        with open(file, "rb") as written:
            os.fsync(written.fileno())
        os.replace(file, path)


def write_json(path: PathLike, value: Any) -> None:
    """Writes a value as JSON, the whole file or nothing.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(Path(path)) as file:
        file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def read_text(path: PathLike, most: int = MOST_JSON) -> str:
    """Reads a text file of at most so many bytes.

    Raises:
        UnreadableFileError: it is not there, is no file, is too long, or is not UTF-8.
    """
    try:
        _refuse_what_is_no_file(Path(path))
        with open(path, "rb") as file:
            content = file.read(most + 1)
        if len(content) > most:
            raise UnreadableFileError(
                path, f"is longer than {most / 2**20:g} MiB, too long to read"
            )
        return content.decode("utf-8-sig").replace("\r\n", "\n").replace("\r", "\n")
    except FileNotFoundError:
        where = Path(path).absolute()
        raise UnreadableFileError(path, f"there is no such file ({where})") from None
    except UnreadableFileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name with a NUL
        raise UnreadableFileError(path, f"the file cannot be read: {error}") from error


def _refuse_what_is_no_file(path: Path) -> None:
    """Reading a pipe may never end; one that the shell made, under /dev, is meant."""
    if path.is_dir():
        raise UnreadableFileError(path, "is a folder, expected a file")
    if path.exists() and not path.is_file() and path.parts[:2] != (os.sep, "dev"):
        raise UnreadableFileError(path, "is a pipe or a device, expected a file")


def read_json(path: PathLike, most: int = MOST_JSON) -> Any:
    """Reads a JSON file of at most so many bytes.

    Raises:
        UnreadableFileError: it cannot be read, is not JSON (with line and column), or repeats a
            key.
    """
    text = read_text(path, most)
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        raise UnreadableFileError(path, problem) from error
    except (ValueError, RecursionError) as error:  # digits or brackets without end
        raise UnreadableFileError(path, f"cannot be used as JSON: {error}") from error


def read_json_object(path: PathLike, most: int = MOST_JSON) -> dict[str, Any]:
    """Reads a JSON file that holds one object. Errors as `read_json`."""
    value = read_json(path, most)
    if not isinstance(value, dict):
        problem = f"holds a {type(value).__name__}, expected a JSON object"
        raise UnreadableFileError(path, problem)
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key[:80]!r} is there twice")
        found[key] = value
    return found
