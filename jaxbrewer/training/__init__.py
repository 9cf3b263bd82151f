"""The one impure place: a run, its loop, checkpoints, teacher cache and metrics."""

from .checkpoints import export_hf, load_student
from .loop import CallbackResult
from .metrics import read_scalars
from .run import Outcome, report, train

__all__ = [
    "CallbackResult",
    "Outcome",
    "export_hf",
    "load_student",
    "read_scalars",
    "report",
    "train",
]
