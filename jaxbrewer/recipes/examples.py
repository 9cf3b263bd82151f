"""Rows into examples: tokens, labels, and the loader of them."""

import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..data.buckets import BucketedLoader, bucket_by_length
from ..data.tables import Row, column, read_rows
from ..errors import ConfigError, suggest
from ..evaluation.answers import Window
from .tokens import Tokens

logger = logging.getLogger(__name__)

IGNORED = -100
"""The label of a position that has none."""
_TOLD = 10  # labels that are no class, named one by one

Columns = dict[str, list[Any]]


@dataclass(frozen=True)
class Labels:
    """What labels can be.

    Attributes:
        names: of the classes, in order; None where they are numbers of classes, or just numbers.
        count: how many classes; 1: labels are numbers to come close to.
    """

    names: tuple[str, ...] | None
    count: int

    def of(self, values: Sequence[Any], path: str, where: Callable[[int], str]) -> list[Any]:
        """The labels of a file as the model takes them, an ``int`` or a ``float`` each.

        Args:
            values: as they are in the file.
            path: the file.
            where: what says in words where in it a value is, by its index.

        Raises:
            ConfigError: some are none of them; names each once, where it comes first.
        """
        found = [self._one(value) for value in values]
        places: dict[str, list[int]] = {}  # of each that is none of them
        for i, value in enumerate(values):
            if found[i] is None:
                places.setdefault(str(value), []).append(i)
        if not places:
            return found
        problems = []
        for first, *others in list(places.values())[:_TOLD]:
            again = f" and {len(others)} more" if others else ""
            problems.append(f"{where(first)}{again}: {self._problem(values[first])}")
        if len(places) > _TOLD:
            problems.append(f"and {len(places) - _TOLD} other labels")
        if self.count > 1:
            problems[-1] += (
                " (data.labels names the classes in order, where they are the same by other names)"
            )
        raise ConfigError(path, problems)

    def _one(self, value: Any) -> int | float | None:
        number = _number(value)
        if self.count == 1:
            return number
        if self.names is not None and str(value) in self.names:
            return self.names.index(str(value))
        if number is None or number != int(number) or not 0 <= number < self.count:
            return None
        return int(number)

    def _problem(self, value: Any) -> str:
        if self.count == 1:
            return f"the label is {value!r}, expected a number"
        known = self.names or [str(i) for i in range(min(self.count, 20))]
        return f"the label {value!r} is no class: {suggest(value, known)}"


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None


def read_all(paths: Sequence[str], form: str | None, most: int | None) -> list[Row]:
    """The rows of several files, one after the other; the first ones if so many are asked for."""
    rows: list[Row] = []
    for path in paths:
        if most is None or len(rows) < most:
            rows += read_rows(path, form, None if most is None else most - len(rows))
    return rows


def labels_of(
    given: Sequence[str] | None,
    of_teacher: Labels | None,
    values: Sequence[Any] | None,
) -> Labels:
    """What the labels of a job are: as the recipe says, as the teacher's, or as the data have them.

    Args:
        given: the names that the recipe gives.
        of_teacher: the teacher's.
        values: the labels in the data, or None where there are none.

    Raises:
        ValueError: they cannot be told, or do not go with the teacher.
    """
    if given is not None:
        if of_teacher is not None and of_teacher.count != len(given):
            raise ConfigError(
                "the recipe",
                [f"data.labels names {len(given)} classes, and the teacher has {of_teacher.count}"],
            )
        return Labels(tuple(given), len(given))
    if of_teacher is not None:
        return of_teacher
    if values is None:
        raise ConfigError("the recipe", ["there are no labels to learn from: name data.label"])
    texts = {str(value) for value in values}
    numbers = {_number(text) for text in texts}
    if None in numbers:
        return Labels(tuple(sorted(texts)), len(texts))
    if any(
        number != int(number) or "." in text
        for text in texts
        if (number := _number(text)) is not None
    ):
        return Labels(None, 1)
    most = max(int(number) for number in numbers if number is not None)
    return Labels(None, max(most + 1, 2))


# ------------------------------------------------------------------------------------ of each task


def classified(
    rows: Sequence[Row],
    texts: Sequence[str],
    label: tuple[str, Labels] | None,
    path: str,
    tokens: Tokens,
) -> Columns:
    """Texts, or pairs of texts, with a label each."""
    parts = [[str(text) for text in column(rows, name, path)] for name in texts]
    given = parts[0] if len(parts) == 1 else list(zip(*parts, strict=True))
    columns = _inputs(tokens.of_texts(given))
    if label is not None:
        name, labels = label
        found = column(rows, name, path)
        columns["labels"] = labels.of(found, path, lambda i: f"row {i + 1}")
    return columns


def tagged(
    rows: Sequence[Row], words: str, tags: tuple[str, Labels] | None, path: str, tokens: Tokens
) -> tuple[Columns, list[list[int | None]]]:
    """Sentences in words, each word's tag at its first piece; and each sentence's words by position."""
    sentences = column(rows, words, path)
    encodings = tokens.of_words(sentences)
    columns = _inputs(encodings)
    firsts = [_first_pieces(encoding.word_ids) for encoding in encodings]
    cut = sum(
        len(set(places) - {None}) < len(sentence)
        for places, sentence in zip(firsts, sentences, strict=True)
    )
    if cut:
        logger.warning(
            "%s: %d of %d sentences are longer than %d tokens, or have words without a token: their "
            "other words are left out",
            path, cut, len(sentences), tokens.max_length,
        )  # fmt: skip
    if tags is not None:
        name, labels = tags
        of_words = column(rows, name, path)
        for i, (sentence, row) in enumerate(zip(sentences, of_words, strict=True)):
            if len(row) != len(sentence):
                raise ValueError(
                    f"{path}: sentence {i + 1} has {len(sentence)} words and {len(row)} tags"
                )
        words_of = [(i, j) for i, sentence in enumerate(sentences) for j in range(len(sentence))]

        def where(index: int) -> str:
            i, j = words_of[index]
            return f"sentence {i + 1}, word {j + 1} ({sentences[i][j]!r})"

        found = iter(labels.of([tag for row in of_words for tag in row], path, where))
        columns["labels"] = []
        for row, places in zip(of_words, firsts, strict=True):
            mine = list(itertools.islice(found, len(row)))
            columns["labels"].append([IGNORED if p is None else mine[p] for p in places])
    return columns, firsts


def _first_pieces(word_ids: Sequence[int | None]) -> list[int | None]:
    """At the first piece of each word its number, elsewhere None."""
    before: int | None = None
    found: list[int | None] = []
    for word in word_ids:
        found.append(word if word != before else None)
        before = word
    return found


def asked(
    rows: Sequence[Row], path: str, tokens: Tokens, stride: int, *, labelled: bool
) -> tuple[Columns, list[Window]]:
    """Questions about contexts: a window each, or several; the answer at its first and last token.

    A window without the answer has it at its first token, as in SQuAD 2.0.
    """
    questions, contexts = (column(rows, name, path) for name in ("question", "context"))
    pairs = [(str(q).strip(), str(c)) for q, c in zip(questions, contexts, strict=True)]
    encodings, windows, ends = [], [], []
    for i, of_question in enumerate(tokens.of_questions(pairs, stride)):
        span = _span(rows[i], f"{path}: row {i + 1}") if labelled else None
        for encoding in of_question:
            offsets = _context_offsets(encoding)
            encodings.append(encoding)
            windows.append(Window(i, offsets))
            ends.append(_ends(span, offsets))
    columns = _inputs(encodings)
    if labelled:
        columns["start_positions"], columns["end_positions"] = map(list, zip(*ends, strict=True))
    return columns, windows


def _context_offsets(encoding: Any) -> tuple[tuple[int, int] | None, ...]:
    """Of each token its characters in the context; None where it is of none."""
    pairs = zip(encoding.offsets, encoding.sequence_ids, strict=True)
    return tuple(tuple(offset) if part == 1 else None for offset, part in pairs)


def _span(row: Row, where: str) -> tuple[int, int] | None:
    """The characters of a row's first answer."""
    answers = row.get("answers")
    try:
        texts, starts = answers["text"], answers["answer_start"]  # type: ignore[index]
        if not texts:
            return None
        start = int(starts[0])
        end = start + len(texts[0])
    except (TypeError, KeyError, IndexError, ValueError):
        raise ValueError(
            f"{where}: answers is {answers!r}, expected {{'text': […], 'answer_start': […]}}"
        ) from None
    if row["context"][start:end] != texts[0]:
        raise ValueError(
            f"{where}: at {start} the context has {row['context'][start:end][:40]!r}, not the answer "
            f"{texts[0][:40]!r}"
        )
    return start, end


def _ends(
    span: tuple[int, int] | None, offsets: Sequence[tuple[int, int] | None]
) -> tuple[int, int]:
    if span is None:
        return 0, 0
    begins = [i for i, place in enumerate(offsets) if place and place[0] <= span[0] < place[1]]
    ends = [i for i, place in enumerate(offsets) if place and place[0] < span[1] <= place[1]]
    return (begins[0], ends[-1]) if begins and ends else (0, 0)


def _inputs(encodings: Sequence[Any]) -> Columns:
    return {
        "input_ids": [encoding.ids for encoding in encodings],
        "attention_mask": [encoding.attention_mask for encoding in encodings],
        "token_type_ids": [encoding.type_ids for encoding in encodings],
    }


# ---------------------------------------------------------------------------------------- loaders


@dataclass(frozen=True)
class Sided:
    """How a model takes its inputs.

    Attributes:
        takes_types: whether it has types of tokens.
        pad: what its ids are padded with.
    """

    takes_types: bool
    pad: int

    @classmethod
    def of(cls, config: Any) -> "Sided":
        """By a model's config."""
        return cls("token_type_ids" in config.id_limits, config.pad_token_id or 0)

    def own(self, columns: Columns) -> Columns:
        """The columns that it takes."""
        return {k: v for k, v in columns.items() if k != "token_type_ids" or self.takes_types}


def loader(
    columns: Columns | Mapping[str, Columns],
    pads: Mapping[str, int],
    batch_size: int,
    buckets: Any,
    *,
    seed: int | None,
    share: tuple[int, int] = (1, 0),
) -> BucketedLoader:
    """A loader in buckets by length.

    Args:
        columns: of one model; or by side, ``{'teacher': …, 'student': …}``.
        pads: what ids are padded with, by the name of their column.
        batch_size: examples of a batch, of each process.
        buckets: see `bucket_by_length`.
        seed: of the order; None: in the order of lengths.
        share: how many processes train together, and which this is.
    """
    padding = {name: pad for name, pad in pads.items() if pad}
    padding |= {name: IGNORED for name in _lists_of_labels(columns)}
    return bucket_by_length(
        columns,
        batch_size,
        buckets,
        padding=padding,
        shuffle=seed is not None,
        seed=seed or 0,
        num_replicas=share[0],
        rank=share[1],
    )


def _lists_of_labels(columns: Mapping[str, Any]) -> list[str]:
    """The names of the columns that hold a label for each token."""
    found = []
    for name, inner in columns.items():
        if isinstance(inner, Mapping):
            found += [f"{name}.{field}" for field in _lists_of_labels(inner)]
        elif name == "labels" and isinstance(inner[0], list):
            found.append(name)
    return found
