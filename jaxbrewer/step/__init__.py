"""The one compiled function: losses, gradient, update, metrics."""

from .program import Program, TrainState

__all__ = ["Program", "TrainState"]
