"""Configs: frozen, validated text, from JSON or Python and back."""

from .configs import DistillationConfig, IntermediateMatch, TrainingConfig
from .schema import Config

__all__ = ["Config", "DistillationConfig", "IntermediateMatch", "TrainingConfig"]
