"""TextBrewer's classes."""

from .classes import (
    BasicDistiller,
    BasicTrainer,
    GeneralDistiller,
    MultiTaskDistiller,
    MultiTeacherDistiller,
)
from .emd import EMDDistiller

__all__ = [
    "BasicDistiller",
    "BasicTrainer",
    "EMDDistiller",
    "GeneralDistiller",
    "MultiTaskDistiller",
    "MultiTeacherDistiller",
]
