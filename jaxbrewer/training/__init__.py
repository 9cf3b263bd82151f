"""The one impure place: a run, its loop, checkpoints, teacher cache and metrics."""

from .loop import CallbackResult
from .metrics import read_scalars
from .run import Outcome, report, train
from .stored import export_hf, load_student

__all__ = [
    "CallbackResult",
    "Outcome",
    "export_hf",
    "load_student",
    "read_scalars",
    "report",
    "train",
]
