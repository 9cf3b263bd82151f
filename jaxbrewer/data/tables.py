"""Rows of text files: csv, tsv, jsonl, CoNLL columns, SQuAD's JSON, lines of text, parquet."""

import csv
import importlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import suggest
from ..files import UnreadableFileError

Row = dict[str, Any]

_SUFFIXES = {
    ".csv": "csv",
    ".tsv": "tsv",
    ".tab": "tsv",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "json",
    ".conll": "conll",
    ".annotated": "conll",
    ".bio": "conll",
    ".iob": "conll",
    ".iob2": "conll",
    ".parquet": "parquet",
    ".txt": "text",
}
_LONGEST_FIELD = 2**24  # characters; the csv module stops at 131,072 unless told


def read_rows(
    path: str | os.PathLike[str], form: str | None = None, most: int | None = None
) -> list[Row]:
    """Reads the rows of a file, each a dict by the names of its columns.

    ========== ====================================================================================
    csv        commas, fields in double quotes where they hold one; the first line has the names
    tsv        tabs, quotes mean nothing (as in GLUE's files); the first line has the names
    jsonl      one JSON object a line
    json       a list of JSON objects; or SQuAD's ``{"data": …}``: ``id``, ``question``, ``context``
               and ``answers``, ``{"text": […], "answer_start": […]}``, empty where there is none
    conll      a word a line, its columns parted by tabs or blanks, the last its tag; an empty line
               between sentences: ``tokens`` and ``tags``, two lists. Lines ``-DOCSTART-`` and
               comments before a sentence (``# …``) are left out
    text       ``text``: a line each; empty ones are left out
    parquet    where pyarrow is installed
    ========== ====================================================================================

    All are read as UTF-8, with or without a byte order mark.

    Args:
        path: the file.
        form: one of the names above; None: by the file's suffix.
        most: rows to read, the first; None: all.

    Raises:
        UnreadableFileError: the file is not there, or not in this form; names the line.
        ValueError: `form` is none of these, or the suffix tells none.
    """
    path = Path(path)
    read = _READERS[form_of(path, form)]
    rows: list[Row] = []
    try:
        if path.is_dir():
            raise UnreadableFileError(path, "is a folder, expected a file")
        for row in read(path):
            rows.append(row)
            if most is not None and len(rows) >= most:
                break
    except FileNotFoundError:
        raise UnreadableFileError(path, f"there is no such file ({path.absolute()})") from None
    except UnreadableFileError:
        raise
    except UnicodeDecodeError as error:
        raise UnreadableFileError(path, f"is not UTF-8: {error}") from error
    except (OSError, csv.Error) as error:
        raise UnreadableFileError(path, f"the file cannot be read: {error}") from error
    if not rows:
        raise UnreadableFileError(path, "has no rows")
    return rows


def form_of(path: str | os.PathLike[str], form: str | None = None) -> str:
    """The form a file is read in.

    Raises:
        ValueError: as `read_rows`.
    """
    if form is None:
        suffix = Path(path).suffix.lower()
        if suffix not in _SUFFIXES:
            raise ValueError(
                f"{os.fspath(path)}: the suffix {suffix!r} does not tell how it is to be read; give the "
                f"form, one of {', '.join(_READERS)}"
            )
        return _SUFFIXES[suffix]
    if form not in _READERS:
        raise ValueError(f"no form {form!r} of data files: {suggest(form, _READERS)}")
    return form


def column(rows: Sequence[Mapping[str, Any]], name: str, path: object) -> list[Any]:
    """One column of some rows.

    Raises:
        ValueError: a row lacks it; names the row, and the columns that there are.
    """
    for i, row in enumerate(rows):
        if row.get(name) is None:
            if name in row:
                raise ValueError(f"{path}: row {i + 1} has nothing in its column {name!r}")
            hint = _other_form(row) or suggest(name, row)
            if hint.startswith("choose") and str(path).endswith((".csv", ".tsv", ".tab")):
                hint += "; they are named in the first line"
            raise ValueError(f"{path}: row {i + 1} has no column {name!r}: {hint}")
    return [row[name] for row in rows]


def _other_form(row: Mapping[str, Any]) -> str | None:
    """The form that a file seems to be in, if its only column looks like several."""
    (only,) = row if len(row) == 1 else ("",)
    form = "tsv" if "\t" in only else "csv" if "," in only else None
    return form and f"its only column is {only!r}; if it is {form}, say so: form = {form!r}"


# ---------------------------------------------------------------------------------------- readers


def _opened(path: Path) -> IO[str]:
    return open(path, encoding="utf-8-sig", newline="")


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """The lines with their numbers, without what ends them; only line feeds part lines."""
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            yield number, line.rstrip("\r\n")


def _delimited(path: Path, **dialect: Any) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    with _opened(path) as file:
        lines = csv.reader(file, **dialect)
        names = next(lines, [])
        if len(set(names)) < len(names) or not all(names):
            raise UnreadableFileError(
                path, f"line 1: expected the names of the columns, each once, not {names}"
            )
        for fields in lines:
            if not fields:
                continue
            if len(fields) != len(names):
                raise UnreadableFileError(
                    path,
                    f"line {lines.line_num} has {len(fields)} columns, and line 1 has {len(names)}: "
                    f"{', '.join(names)}",
                )
            yield dict(zip(names, fields, strict=True))


def _csv(path: Path) -> Iterator[Row]:
    return _delimited(path, strict=True)


def _tsv(path: Path) -> Iterator[Row]:
    return _delimited(path, delimiter="\t", quoting=csv.QUOTE_NONE)


def _jsonl(path: Path) -> Iterator[Row]:
    for number, line in _lines(path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UnreadableFileError(path, f"line {number} is not JSON: {error}") from error
        if not isinstance(row, dict):
            kind = type(row).__name__
            raise UnreadableFileError(path, f"line {number} is a {kind}, expected a JSON object")
        yield row


def _json(path: Path) -> Iterator[Row]:
    with _opened(path) as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise UnreadableFileError(path, f"is not JSON: {error}") from error
    if isinstance(content, dict) and "data" in content:
        return _squad(path, content["data"])
    if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
        raise UnreadableFileError(
            path, "expected a list of JSON objects, or SQuAD's object with 'data'"
        )
    return iter(content)


def _squad(path: Path, articles: Any) -> Iterator[Row]:
    try:
        for article in articles:
            for paragraph in article["paragraphs"]:
                for asked in paragraph["qas"]:
                    answers = [] if asked.get("is_impossible") else asked.get("answers", [])
                    yield {
                        "id": asked["id"],
                        "question": asked["question"],
                        "context": paragraph["context"],
                        "answers": {
                            "text": [answer["text"] for answer in answers],
                            "answer_start": [answer["answer_start"] for answer in answers],
                        },
                    }
    except (KeyError, TypeError, AttributeError) as error:
        raise UnreadableFileError(
            path,
            f"is not as SQuAD's files are, data → paragraphs → qas: {type(error).__name__} {error}",
        ) from error


def _conll(path: Path) -> Iterator[Row]:
    tokens: list[str] = []
    tags: list[str] = []
    for number, line in _lines(path):
        fields = line.split("\t") if "\t" in line else line.split()
        is_empty = not any(field.strip() for field in fields)
        if is_empty or (fields[0] == "-DOCSTART-") or (not tokens and line.startswith("# ")):
            if tokens:
                yield {"tokens": tokens, "tags": tags}
                tokens, tags = [], []
            continue
        if len(fields) < 2 or not fields[0].strip() or not fields[-1].strip():
            raise UnreadableFileError(
                path, f"line {number}: expected a word and its tag, not {line[:60]!r}"
            )
        tokens.append(fields[0].strip())
        tags.append(fields[-1].strip())
    if tokens:
        yield {"tokens": tokens, "tags": tags}


def _text(path: Path) -> Iterator[Row]:
    return ({"text": line} for _, line in _lines(path) if line.strip())


def _parquet(path: Path) -> Iterator[Row]:
    try:
        parquet = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise UnreadableFileError(path, "is read by pyarrow: pip install pyarrow") from None
    try:
        with parquet.ParquetFile(path) as file:
            for batch in file.iter_batches():
                yield from batch.to_pylist()
    except ValueError as error:  # pyarrow's own errors are
        raise UnreadableFileError(path, f"cannot be read by pyarrow: {error}") from error


_READERS: Mapping[str, Callable[[Path], Iterator[Row]]] = {
    "csv": _csv,
    "tsv": _tsv,
    "jsonl": _jsonl,
    "json": _json,
    "conll": _conll,
    "text": _text,
    "parquet": _parquet,
}
FORMS: tuple[str, ...] = tuple(_READERS)
"""The names that `read_rows` takes."""
