"""``jaxbrewer suggest``: which layers of a teacher for which of a student."""

import importlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from jaxbrewer.commands import FINE, CommandError, say, say_line
from jaxbrewer.data.tables import read_rows
from jaxbrewer.files import replacing
from jaxbrewer.zoo import Similarity, from_pretrained, similarity, suggest_matches

_ROWS, _LENGTH = 16, 128
_MOST_ROWS = 4096
_WHAT_IT_SHOWS = """\
What this shows: how alike the layers are today, where each layer may be turned and scaled. What it does not
show: from which layer the student learns best. Of a student that was not trained, it shows where its
weights came from. Spread evenly is what is proposed; where * stands elsewhere, both are worth a run."""


def suggest(
    teacher: str, student: str, data: str, column: str, *, loss: str, plot: str | None
) -> int:
    """Suggests matches; see the command's help.

    Raises:
        CommandError: a folder, the data or the loss cannot be used, or a package is missing.
    """
    try:
        model_T, model_S = (from_pretrained(folder) for folder in (teacher, student))
        found = suggest_matches(model_T.config, model_S.config, loss)
        tokenizer = _tokenizer(teacher, student)
        _fit(tokenizer, model_T, model_S)
        alike = similarity(model_T, model_S, _batches(tokenizer, _texts(data, column)))
    except (ImportError, ValueError, OSError) as error:
        raise CommandError(str(error)) from error
    say(str(alike))
    if plot is not None:
        _draw(alike, plot)
        say_line(f"drawn to {plot}")
    say()
    say(_beside(found, alike))
    say(f"\n{_WHAT_IT_SHOWS}\n\nintermediate_matches, by depth:")
    say(json.dumps(found, indent=2))
    return FINE


def _beside(found: list[dict[str, Any]], alike: Similarity) -> str:
    """What is proposed for each of the student's hidden layers, and what is most like it."""
    from_one = found[0]["feature"] == "attention"
    proposed = {}
    for match in found:
        pair = [match["layer_S"], match["layer_T"]]
        own, theirs = (x[0] if isinstance(x, list) else x + from_one for x in pair)
        proposed[own] = theirs
    lines = [
        f"S{own}: by depth T{theirs}, most alike T{alike.best()[own]}"
        for own, theirs in proposed.items()
    ]
    return "\n".join(lines)


def _tokenizer(teacher: str, student: str) -> Any:
    """The tokenizer of both folders, which must give the same tokens.

    Raises:
        ValueError: there is none, or there are two.
        ImportError: tokenizers is not installed.
    """
    try:
        cls = importlib.import_module("tokenizers").Tokenizer
    except ImportError as error:
        raise ImportError(
            "reading text needs tokenizers, which is not installed: pip install 'jaxbrewer[text]'"
        ) from error
    files = [Path(folder) / "tokenizer.json" for folder in (teacher, student)]
    there = [file for file in files if file.is_file()]
    if not there:
        raise ValueError(f"{files[0]} is not there: copy the tokenizer's files into the folder")
    read = []
    for file in there:
        try:
            read.append(cls.from_file(str(file)))
        except Exception as error:
            raise ValueError(f"{file} cannot be read: {error}") from error
    if any(one.get_vocab() != read[0].get_vocab() for one in read):
        raise ValueError(
            f"{files[0]} and {files[1]} have other tokens: layers can be compared position by position "
            "alone, over the same tokens"
        )
    return read[0]


def _fit(tokenizer: Any, *models: Any) -> None:
    """Sets how long sentences may be; refuses a tokenizer with more tokens than a model has."""
    size = tokenizer.get_vocab_size()
    if size > (least := min(model.config.vocab_size for model in models)):
        raise ValueError(f"the tokenizer has {size} tokens, and a model has vocab_size={least}")
    longest = [model.base_model.longest() for model in models]
    tokenizer.enable_truncation(min(n for n in (_LENGTH, *longest) if n is not None))
    tokenizer.enable_padding()


def _texts(data: str, column: str) -> list[str]:
    rows = read_rows(data, most=_MOST_ROWS)
    if not rows or column not in rows[0]:
        there = ", ".join(rows[0]) if rows else "no rows"
        raise ValueError(f"{data} has no column {column!r}: there is {there}")
    return [str(row[column]) for row in rows]


def _batches(tokenizer: Any, texts: list[str]) -> Iterator[dict[str, np.ndarray]]:
    """Padded batches of the texts, in their order."""
    for start in range(0, len(texts), _ROWS):
        encoded = tokenizer.encode_batch(texts[start : start + _ROWS])
        yield {
            "input_ids": np.array([one.ids for one in encoded], np.int32),
            "attention_mask": np.array([one.attention_mask for one in encoded], np.int32),
            "token_type_ids": np.array([one.type_ids for one in encoded], np.int32),
        }


def _draw(alike: Similarity, plot: str) -> None:
    """The table as a picture.

    Raises:
        CommandError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        figure = importlib.import_module("matplotlib.figure").Figure(figsize=(5, 5))
    except ImportError as error:
        raise CommandError(
            "--plot needs matplotlib, which is not installed: pip install 'jaxbrewer[plot]'"
        ) from error
    axes = figure.subplots()
    picture = axes.imshow(alike.values, origin="lower", vmin=0, vmax=1, aspect="auto")
    axes.set(xlabel="student's layer", ylabel="teacher's layer", title="linear CKA")
    figure.colorbar(picture)
    try:
        with replacing(Path(plot)) as file:
            figure.savefig(file, dpi=120)
    except (OSError, ValueError) as error:
        raise CommandError(f"--plot {plot} cannot be written: {error}") from error
