"""The one impure place: a run, its loop, checkpoints, teacher cache and metrics."""

from .checkpoints import export_hf, load_student
from .loop import CallbackResult
from .metrics import read_scalars

__all__ = ["CallbackResult", "export_hf", "load_student", "read_scalars"]
