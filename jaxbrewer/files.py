"""Files: written whole or not at all, and JSON that is read with its errors named."""

import contextlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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


def read_json_object(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a JSON file that holds one object.

    Raises ``ValueError`` that names the file, and the line where it is malformed.
    """
    path = Path(path)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"no file {str(path)!r}: give the path of a JSON config") from None
    except json.JSONDecodeError as error:
        raise ValueError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg})"
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}, expected one JSON object")
    return values
