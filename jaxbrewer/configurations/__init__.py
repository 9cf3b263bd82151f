"""Configs: frozen, validated text, from JSON or Python and back."""

from .configs import DistillationConfig, IntermediateMatch, TrainingConfig

__all__ = ["DistillationConfig", "IntermediateMatch", "TrainingConfig"]
