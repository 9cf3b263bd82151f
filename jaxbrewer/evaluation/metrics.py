"""Metrics: what is gathered batch by batch, and a few numbers at the end.

A metric of one's own has these two methods. Classes are the highest of the logits; labels are the
adaptor's ``labels`` or the batch's. Labels of −100 and positions whose ``logits_mask`` is 0 do not count.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, Protocol

import numpy as np
from jaxtyping import Bool, Float, Int, Shaped

Results = Mapping[str, Any]

IGNORED = -100


class Metric(Protocol):
    """A metric. It is copied before it sees a batch, so that one object serves many evaluations.

    A class attribute ``reads_teacher = True`` asks for what the teacher's adaptor returns.
    """

    def update(self, batch: Any, results: Results) -> None:
        """Takes a batch.

        Args:
            batch: the student's part of it, numpy arrays.
            results: what the adaptor returned, but for features of layers, in numpy arrays; a list of
                one stands for itself. ``labels`` are the batch's, where the adaptor gives none;
                ``teacher`` is the same of the teacher, where it is asked for.
        """
        ...

    def compute(self) -> dict[str, float]:
        """Name → number."""
        ...


class _OfClasses:
    """Gathers classes: those that are right and those that the logits say."""

    def __init__(self) -> None:
        self._labels: list[Int[np.ndarray, " count"]] = []
        self._found: list[Int[np.ndarray, " count"]] = []

    def update(self, batch: Any, results: Results) -> None:
        """See `Metric.update`; ``logits`` of shape ``[…, classes]``, ``labels`` of shape ``[…]``."""
        logits, labels = self._pair(results)
        if not np.issubdtype(labels.dtype, np.integer) or labels.shape != logits.shape[:-1]:
            raise ValueError(
                f"{type(self).__name__} wants whole numbers as labels, of the shape "
                f"{list(logits.shape[:-1])} that goes with logits {list(logits.shape)}; they are "
                f"{labels.dtype}{list(labels.shape)}"
            )
        counted = counts(results, labels)
        self._labels.append(labels[counted])
        self._found.append(logits.argmax(-1)[counted])

    def _pair(self, results: Results) -> tuple[np.ndarray, np.ndarray]:
        return needed(self, results, "logits"), needed(self, results, "labels")

    def _all(self) -> tuple[Int[np.ndarray, " count"], Int[np.ndarray, " count"]]:
        """All labels, and all classes that were found.

        Raises:
            ValueError: there is no label at all.
        """
        labels = np.concatenate([*self._labels, np.zeros(0, int)])
        if not labels.size:
            raise ValueError(
                f"{type(self).__name__} saw no label that counts: all were {IGNORED}, or masked"
            )
        return labels, np.concatenate(self._found)


class Accuracy(_OfClasses):
    """The share of labels that were found: ``accuracy``."""

    def compute(self) -> dict[str, float]:
        """See `Metric.compute`."""
        labels, found = self._all()
        return {"accuracy": float(np.mean(labels == found))}


class F1(_OfClasses):
    """``f1``, ``precision`` and ``recall``; of nothing they are 0.

    Args:
        average: ``'binary'``: of the class `positive`; ``'macro'``: the mean over all classes that
            are labels or were found.
        positive: a class.
    """

    def __init__(self, average: Literal["binary", "macro"] = "binary", positive: int = 1):
        super().__init__()
        if average not in ("binary", "macro"):
            raise ValueError(f"F1(average={average!r}): expected 'binary' or 'macro'")
        self._average, self._positive = average, positive

    def compute(self) -> dict[str, float]:
        """See `Metric.compute`."""
        labels, found = self._all()
        classes = np.union1d(labels, found) if self._average == "macro" else [self._positive]
        each = [
            f1_of(np.sum((labels == c) & (found == c)), np.sum(found == c), np.sum(labels == c))
            for c in classes
        ]
        return {name: float(np.mean([scores[name] for scores in each])) for name in each[0]}


class Matthews(_OfClasses):
    """Matthews' correlation, of two classes or more: ``matthews``; 0 where one of the two is constant.

    Gorodkin's R_K (Computational Biology and Chemistry 28, 2004), which GLUE has for CoLA.
    """

    def compute(self) -> dict[str, float]:
        """See `Metric.compute`."""
        labels, found = self._all()
        classes = np.union1d(labels, found)
        true, guess = (classes == labels[:, None]), (classes == found[:, None])
        total, right = float(len(labels)), float(np.sum(labels == found))
        t, g = true.sum(0, dtype=float), guess.sum(0, dtype=float)
        spread = (total**2 - t @ t) * (total**2 - g @ g)
        return {"matthews": float((right * total - t @ g) / np.sqrt(spread)) if spread else 0.0}


class _OfNumbers:
    """Gathers numbers: the labels and the single logit of each example."""

    def __init__(self) -> None:
        self._labels: list[Float[np.ndarray, " count"]] = []
        self._found: list[Float[np.ndarray, " count"]] = []

    def update(self, batch: Any, results: Results) -> None:
        """See `Metric.update`; ``logits`` of shape ``[batch]`` or ``[batch, 1]``."""
        logits, labels = needed(self, results, "logits"), needed(self, results, "labels")
        if logits.size != len(labels) or labels.size != len(labels):
            raise ValueError(
                f"{type(self).__name__} wants one number for each example; logits are "
                f"{list(logits.shape)} and labels {list(labels.shape)}"
            )
        self._labels.append(labels.reshape(-1).astype(np.float64))
        self._found.append(logits.reshape(-1).astype(np.float64))

    def _correlation(self, change: Any) -> float:
        labels, found = (change(np.concatenate(x)) for x in (self._labels, self._found))
        labels, found = labels - labels.mean(), found - found.mean()
        spread = np.sqrt((labels @ labels) * (found @ found))
        return float(labels @ found / spread) if spread else 0.0


class Pearson(_OfNumbers):
    """Pearson's correlation: ``pearson``; 0 where one of the two is constant."""

    def compute(self) -> dict[str, float]:
        """See `Metric.compute`."""
        return {"pearson": self._correlation(np.asarray)}


class Spearman(_OfNumbers):
    """Spearman's rank correlation, equal numbers sharing their mean rank: ``spearman``."""

    def compute(self) -> dict[str, float]:
        """See `Metric.compute`."""
        return {"spearman": self._correlation(_ranks)}


class SpanF1:
    """Spans of tags, right where both ends and the type are.

    Gives ``span_f1``, ``span_precision`` and ``span_recall``, over all spans.

    Tags are ``B-``, ``I-``, ``E-``, ``S-`` with a type, or ``O``. As in CoNLL's ``conlleval``, a span that
    begins with ``I-`` is one, and a change of type begins another.

    Args:
        names: the tag of each class, by number, as a list or as a config's ``id2label``.
    """

    def __init__(self, names: Sequence[str] | Mapping[Any, str]):
        if isinstance(names, Mapping):
            names = [name for _, name in sorted((int(k), name) for k, name in names.items())]
        self._names = list(names)
        self._right = self._found = self._labels = 0

    def update(self, batch: Any, results: Results) -> None:
        """See `Metric.update`; ``logits`` of shape ``[batch, length, tags]``."""
        logits, labels = needed(self, results, "logits"), needed(self, results, "labels")
        if labels.shape != logits.shape[:-1] or labels.ndim != 2:
            raise ValueError(
                f"SpanF1 wants logits [batch, length, tags] and labels [batch, length]; they are "
                f"{list(logits.shape)} and {list(labels.shape)}"
            )
        if logits.shape[-1] > len(self._names):
            raise ValueError(
                f"SpanF1 was given {len(self._names)} names, and logits have {logits.shape[-1]} tags"
            )
        for row, kept, best in zip(labels, counts(results, labels), logits.argmax(-1), strict=True):
            there, found = (
                set(spans([self._names[i] for i in tags[kept]])) for tags in (row, best)
            )
            self._right += len(there & found)
            self._found += len(found)
            self._labels += len(there)

    def compute(self) -> dict[str, float]:
        """See `Metric.compute`."""
        scores = f1_of(self._right, self._found, self._labels)
        return {f"span_{name}": score for name, score in scores.items()}


class Agreement(_OfClasses):
    """The share of examples, or positions, where student and teacher say the same: ``agreement``."""

    reads_teacher = True

    def _pair(self, results: Results) -> tuple[np.ndarray, np.ndarray]:
        theirs = needed(self, results["teacher"], "logits")
        return needed(self, results, "logits"), theirs.argmax(-1)

    def compute(self) -> dict[str, float]:
        """See `Metric.compute`."""
        found, theirs = self._all()
        return {"agreement": float(np.mean(found == theirs))}


class Divergence:
    """How far the student is from the teacher, at temperature 1: ``kl``, in nats.

    The mean of ``KL(teacher ‖ student)`` over examples, or positions that count.
    """

    reads_teacher = True

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def update(self, batch: Any, results: Results) -> None:
        """See `Metric.update`."""
        logits = needed(self, results, "logits"), needed(self, results["teacher"], "logits")
        if logits[0].shape != logits[1].shape:
            raise ValueError(
                f"Divergence wants logits of one shape; the student's are {list(logits[0].shape)}, "
                f"the teacher's {list(logits[1].shape)}"
            )
        S, T = (
            x - np.logaddexp.reduce(x, -1, keepdims=True)
            for x in (given.astype(float) for given in logits)
        )
        each = np.sum(np.exp(T) * np.where(np.exp(T) > 0, T - S, 0), -1)
        counted = counts(results, np.zeros(each.shape, int))
        self._sum += float(each[counted].sum())
        self._count += int(counted.sum())

    def compute(self) -> dict[str, float]:
        """See `Metric.compute`."""
        return {"kl": self._sum / max(self._count, 1)}


def _ranks(values: Float[np.ndarray, " count"]) -> Float[np.ndarray, " count"]:
    """The ranks of numbers, equal ones at their mean."""
    _, which, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[which]


def needed(metric: Any, results: Results, name: str) -> Shaped[np.ndarray, "..."]:
    """One of the results.

    Raises:
        ValueError: it is not there, or is a list of several.
    """
    if name not in results:
        raise ValueError(
            f"{type(metric).__name__} needs {name!r}, and the adaptor returned {sorted(results)}: let "
            f"it return {name!r} too"
        )
    if isinstance(results[name], list):
        raise ValueError(
            f"{type(metric).__name__} takes one array as {name!r}, and the adaptor returned "
            f"{len(results[name])}: write a metric that says which is meant"
        )
    return np.asarray(results[name])


def counts(results: Results, labels: Int[np.ndarray, "..."]) -> Bool[np.ndarray, "..."]:
    """Which labels count."""
    counted = labels != IGNORED
    mask = results.get("logits_mask")
    if isinstance(mask, np.ndarray) and mask.shape == labels.shape:
        counted &= mask != 0
    return counted


def f1_of(right: Any, found: Any, there: Any) -> dict[str, float]:
    """F1, precision and recall, from how many were found, are there, and are both."""
    precision = float(right / found) if found else 0.0
    recall = float(right / there) if there else 0.0
    both = precision + recall
    return {
        "f1": 2 * precision * recall / both if both else 0.0,
        "precision": precision,
        "recall": recall,
    }


def spans(tags: Sequence[str]) -> list[tuple[str, int, int]]:
    """The spans in a row of tags: type, first and last position."""
    found: list[tuple[str, int, int]] = []
    before, kind_before = "O", ""
    for i, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if prefix != "O":
            if prefix in "BS" or before in "ESO" or kind != kind_before:
                found.append((kind, i, i))
            else:
                found[-1] = (kind, found[-1][1], i)
        before, kind_before = prefix, kind
    return found
