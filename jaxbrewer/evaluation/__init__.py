"""How good a model is: metrics over a loader's batches."""

from .answers import Answers, Window
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
    "Answers",
    "Divergence",
    "Evaluator",
    "Matthews",
    "Metric",
    "Pearson",
    "SpanF1",
    "Spearman",
    "Window",
]
