"""What is minimised: a plan of it, its loss, and the terms of that, in pure functions."""

from .loss import Loss, Project, Weights, pairs, probability_shift
from .submodules import CustomMatch

__all__ = ["CustomMatch", "Loss", "Project", "Weights", "pairs", "probability_shift"]
