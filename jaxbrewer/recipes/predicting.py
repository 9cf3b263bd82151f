"""What a model says of the rows of a file, in their order."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.buckets import BucketedLoader
from ..data.tables import Row, read_rows
from ..errors import ConfigError, suggest
from ..evaluation.answers import Spans
from ..evaluation.evaluator import Evaluator
from ..files import read_json_object
from ..zoo.adaptors import adaptor
from . import examples
from .examples import Sided
from .folders import folder_problem, on_disk, tokenizer_problem
from .models import trained
from .schema import COLUMNS, TASKS, Recipe
from .tokens import Tokens

USE = "jaxbrewer.json"
"""What lies in a student's folder beside Hugging Face's files: how its recipe used it."""


def use_of(recipe: Recipe, *, may_lack: bool = False) -> dict[str, Any]:
    """What whoever uses a student must know of its recipe."""
    data = recipe.data
    use = {
        "task": recipe.task,
        "max_length": data.max_length,
        "text": data.text,
        "stride": data.stride,
    }
    return {k: v for k, v in use.items() if v is not None} | {"may_lack_answer": may_lack}


def predict(
    folder: str | os.PathLike[str],
    rows: str | os.PathLike[str] | Sequence[Any],
    *,
    text: str | Sequence[str] | None = None,
    task: str | None = None,
    max_length: int | None = None,
    batch_size: int = 32,
    form: str | None = None,
) -> list[dict[str, Any]]:
    """What the model in a folder says of some rows, in their order.

    Args:
        folder: in Hugging Face's format with a tokenizer, such as a recipe writes it.
        rows: a data file, see `data.tables.read_rows`; or dicts by column, or texts, pairs of texts, or
            lists of words.
        text: the column of the text, or two for pairs; by the recipe if left out.
        task: by the recipe, or the folder's config, if left out.
        max_length: tokens of an example; by the recipe if left out, else 128.
        batch_size: examples of a batch.
        form: how a file is read; by its suffix if left out.

    Returns:
        A dict for each row. Classes: ``label`` and its ``probability``, and those of all as
        ``probabilities``; numbers: ``score``. Tags: ``tags``, one a word, ``O`` where a word did not fit
        in. Questions: ``answer``, empty where there is none, and ``score``, the sum of its logits.

    Raises:
        ValueError: the folder or the rows cannot be read, or the task cannot be told.
    """
    name = os.fspath(folder)
    if problem := folder_problem(name) or tokenizer_problem(name):
        raise ConfigError("predict", [problem])
    folder = Path(on_disk(name))
    use = read_json_object(folder / USE) if (folder / USE).is_file() else {}
    model = trained(folder, task or use.get("task"))
    task = model.task
    if task not in TASKS:
        raise ConfigError(
            "predict",
            [f"{folder} is a {type(model).__name__}: name its task, one of {', '.join(TASKS)}"],
        )
    chosen = [text] if isinstance(text, str) else text
    texts = chosen or use.get("text") or COLUMNS[task][0] or ["text"]
    given, path = _rows(rows, form, texts)
    if given and not chosen and task == "sequence-classification":
        texts = _columns_of(given, texts, path)
    tokens = Tokens(folder, max_length or int(use.get("max_length", 128)))
    say = _SAID[task]
    return say(_Use(model, tokens, given, path, texts, batch_size, use))


def _rows(rows: Any, form: str | None, texts: Sequence[str]) -> tuple[list[Row], str]:
    if isinstance(rows, str | os.PathLike):
        return read_rows(rows, form), os.fspath(rows)

    def of(row: Any) -> Row:
        if isinstance(row, Mapping):
            return dict(row)
        return {texts[0]: row} if len(texts) == 1 else dict(zip(texts, row, strict=True))

    return [of(row) for row in rows], "the rows"


def _columns_of(rows: Sequence[Row], usual: Sequence[str], path: str) -> Sequence[str]:
    """The columns of the text, where nobody names them: the usual ones, or the only one there is.

    Raises:
        ConfigError: it is none of these.
    """
    missing = [name for name in usual if name not in rows[0]]
    if not missing:
        return usual
    if len(usual) == 1 and len(rows[0]) == 1:
        return [*rows[0]]
    raise ConfigError(
        "predict",
        [
            f"{path}: there is no column {missing[0]!r}, as it was in training; name the text's by text= "
            f"(--text on the command line): {suggest(missing[0], rows[0])}"
        ],
    )


class _Use:
    """A model, and the rows that it is to be used on."""

    def __init__(
        self,
        model: Any,
        tokens: Tokens,
        rows: list[Row],
        path: str,
        texts: Sequence[str],
        batch_size: int,
        settings: Mapping[str, Any],
    ):
        self.model, self.tokens, self.rows, self.path = model, tokens, rows, path
        self.texts, self.settings, self._batch_size = texts, settings, batch_size
        self._takes = Sided.of(model.config)

    def logits(self, columns: examples.Columns) -> list[Any]:
        """The logits, of each example in its order; in question answering those of both ends."""
        pads = {"input_ids": self._takes.pad}
        loader: BucketedLoader = examples.loader(
            self._takes.own(columns), pads, self._batch_size, 8, seed=None
        )
        run = Evaluator(self.model, adaptor(self.model.task))
        found = run.predict(loader)
        return [value for name, value in found.items() if name.partition(".")[0] == "logits"]


def _classes(use: _Use) -> list[dict[str, Any]]:
    columns = examples.classified(use.rows, use.texts, None, use.path, use.tokens)
    logits = np.asarray(use.logits(columns)[0], float)
    if logits.shape[-1] == 1:
        return [{"score": float(row[0])} for row in logits]
    names = _names(use.model.config)
    if use.model.config.problem_type == "multi_label_classification":
        each = 1 / (1 + np.exp(-logits))
        return [
            {
                "labels": [n for n, p in zip(names, row, strict=True) if p > 0.5],
                "probabilities": _by_name(names, row),
            }
            for row in each
        ]
    each = np.exp(logits - np.logaddexp.reduce(logits, -1, keepdims=True))
    return [
        {
            "label": names[int(row.argmax())],
            "probability": float(row.max()),
            "probabilities": _by_name(names, row),
        }
        for row in each
    ]


def _by_name(names: Sequence[str], row: Any) -> dict[str, float]:
    return {name: float(p) for name, p in zip(names, row, strict=True)}


def _names(config: Any) -> Sequence[str]:
    return config.label_names or [str(i) for i in range(config.num_labels)]


def _tags(use: _Use) -> list[dict[str, Any]]:
    columns, firsts = examples.tagged(use.rows, use.texts[0], None, use.path, use.tokens)
    names = _names(use.model.config)
    found = []
    for row, places, logits in zip(use.rows, firsts, use.logits(columns)[0], strict=True):
        tags = ["O"] * len(row[use.texts[0]])
        best = np.asarray(logits).argmax(-1)
        for position, word in enumerate(places):
            if word is not None:
                tags[word] = names[int(best[position])]
        found.append({"tags": tags})
    return found


def _answers(use: _Use) -> list[dict[str, Any]]:
    stride = int(use.settings.get("stride", 64))
    columns, windows = examples.asked(use.rows, use.path, use.tokens, stride, labelled=False)
    contexts = [str(row["context"]) for row in use.rows]
    spans = Spans(windows, contexts, may_lack=bool(use.settings.get("may_lack_answer", False)))
    starts, ends = use.logits(columns)
    for start, end in zip(starts, ends, strict=True):
        spans.take(start[None], end[None])
    found = [{"answer": text, "score": score} for text, score in spans.found()]
    ids = [row.get("id") for row in use.rows]
    return [
        said if name is None else {"id": name, **said}
        for name, said in zip(ids, found, strict=True)
    ]


_SAID = {
    "sequence-classification": _classes,
    "token-classification": _tags,
    "question-answering": _answers,
}
