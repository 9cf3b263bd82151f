"""Files: written whole or not at all, and text and JSON that are read with their errors named."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

PathLike = str | os.PathLike[str]


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


def read_text(path: PathLike) -> str:
    """Reads a text file.

    Raises:
        UnreadableFileError: it is not there, is no file, or is not UTF-8.
    """
    try:
        if Path(path).is_dir():
            raise UnreadableFileError(path, "is a folder, expected a file")
        return Path(path).read_text(encoding="utf-8-sig")
    except FileNotFoundError:
        where = Path(path).absolute()
        raise UnreadableFileError(path, f"there is no such file ({where})") from None
    except UnreadableFileError:
        raise
    except (OSError, ValueError) as error:  # ValueError: not UTF-8, or a name with a NUL
        raise UnreadableFileError(path, f"the file cannot be read: {error}") from error


def read_json(path: PathLike) -> Any:
    """Reads a JSON file.

    Raises:
        UnreadableFileError: it cannot be read, is not JSON (with line and column), or repeats a
            key.
    """
    text = read_text(path)
    try:
        return json.loads(text, object_pairs_hook=_without_repeats)
    except json.JSONDecodeError as error:
        problem = f"line {error.lineno}, column {error.colno}: not JSON: {error.msg}"
        raise UnreadableFileError(path, problem) from error
    except (ValueError, RecursionError) as error:  # digits or brackets without end
        raise UnreadableFileError(path, f"cannot be used as JSON: {error}") from error


def read_json_object(path: PathLike) -> dict[str, Any]:
    """Reads a JSON file that holds one object. Errors as `read_json`."""
    value = read_json(path)
    if not isinstance(value, dict):
        problem = f"holds a {type(value).__name__}, expected a JSON object"
        raise UnreadableFileError(path, problem)
    return value


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"the key {key!r} is there twice")
        found[key] = value
    return found
