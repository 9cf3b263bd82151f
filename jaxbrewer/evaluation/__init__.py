"""How good a model is: metrics over a loader's batches."""

from .evaluator import Evaluator
from .metrics import (
    F1,
    Accuracy,
    Agreement,
    Divergence,
    Matthews,
    Metric,
    Pearson,
    SpanF1,
    Spearman,
)

__all__ = [
    "F1",
    "Accuracy",
    "Agreement",
    "Divergence",
    "Evaluator",
    "Matthews",
    "Metric",
    "Pearson",
    "SpanF1",
    "Spearman",
]
