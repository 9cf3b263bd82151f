"""The one impure place: a run, its loop, checkpoints, teacher cache and metrics."""

import os

from .loop import CallbackResult
from .run import Outcome, report, train
from .stored import export_hf, load_student
from .writers import ScalarWriter

__all__ = [
    "CallbackResult",
    "Outcome",
    "ScalarWriter",
    "export_hf",
    "load_student",
    "read_scalars",
    "report",
    "train",
]


def read_scalars(folder: str | os.PathLike[str]) -> dict[str, dict[int, float]]:
    """Reads the scalars of a ``log_dir``; see `event_files.read_scalars`."""
    from . import event_files  # only who reads waits for its imports

    return event_files.read_scalars(folder)
