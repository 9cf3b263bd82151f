"""Metrics by the names that a recipe gives them."""

from collections.abc import Mapping, Sequence
from typing import Any

from .. import evaluation

GIVEN: Mapping[str, tuple[str, ...]] = {
    "accuracy": ("accuracy",),
    "f1": ("f1", "precision", "recall"),
    "matthews": ("matthews",),
    "pearson": ("pearson",),
    "spearman": ("spearman",),
    "span_f1": ("span_f1", "span_precision", "span_recall"),
    "answers": ("exact_match", "f1"),
    "agreement": ("agreement",),
    "kl": ("kl",),
}
"""Metric → the names of its numbers."""

PARAMETERS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(GIVEN, ()),
    "f1": ("average", "positive"),
}
"""Metric → the arguments it takes in a recipe."""

_PLAIN: Mapping[str, Any] = {
    "accuracy": evaluation.Accuracy,
    "f1": evaluation.F1,
    "matthews": evaluation.Matthews,
    "pearson": evaluation.Pearson,
    "spearman": evaluation.Spearman,
    "agreement": evaluation.Agreement,
    "kl": evaluation.Divergence,
}


def metric(name: str, options: Mapping[str, Any], labels: Sequence[str], answers: Any) -> Any:
    """A metric.

    Args:
        name: see `GIVEN`.
        options: its arguments.
        labels: the names of the classes.
        answers: that of questions, where there are some.
    """
    if name == "span_f1":
        return evaluation.SpanF1(labels)
    if name == "answers":
        return answers
    return _PLAIN[name](**options)
