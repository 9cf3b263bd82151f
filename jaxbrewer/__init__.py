"""Knowledge distillation for NLP on JAX, with TextBrewer's configs and numbers."""

import importlib
from typing import TYPE_CHECKING, Any

from . import data, data_utils, evaluation, presets, schedulers, testing, utils
from .configurations.configs import DistillationConfig, IntermediateMatch, TrainingConfig
from .distillers.classes import (
    BasicDistiller,
    BasicTrainer,
    GeneralDistiller,
    MultiTaskDistiller,
    MultiTeacherDistiller,
)
from .distillers.emd import EMDDistiller
from .machine.memory import share_heap
from .models.function_model import FunctionModel
from .models.linen_model import LinenModel
from .models.outside_teacher import OutsideTeacher
from .objective.loss import Loss
from .objective.submodules import CustomMatch
from .presets import (
    ADAPTOR_KEYS,
    FEATURES,
    KD_LOSS_MAP,
    MATCH_LOSS_MAP,
    PROJ_MAP,
    TEMPERATURE_SCHEDULER,
    WEIGHT_SCHEDULER,
    register_new,
)
from .training.loop import CallbackResult
from .training.stored import export_hf, load_student
from .utils import decay_mask

if TYPE_CHECKING:
    from . import zoo
    from .recipes import predict, run_recipe

__version__ = "0.2.0"

share_heap()

Distillers = {
    "Basic": BasicDistiller,
    "General": GeneralDistiller,
    "MultiTeacher": MultiTeacherDistiller,
    "MultiTask": MultiTaskDistiller,
    "EMD": EMDDistiller,
    "Train": BasicTrainer,
}

__all__ = [
    "ADAPTOR_KEYS",
    "FEATURES",
    "KD_LOSS_MAP",
    "MATCH_LOSS_MAP",
    "PROJ_MAP",
    "TEMPERATURE_SCHEDULER",
    "WEIGHT_SCHEDULER",
    "BasicDistiller",
    "BasicTrainer",
    "CallbackResult",
    "CustomMatch",
    "DistillationConfig",
    "Distillers",
    "EMDDistiller",
    "FunctionModel",
    "GeneralDistiller",
    "IntermediateMatch",
    "LinenModel",
    "Loss",
    "MultiTaskDistiller",
    "MultiTeacherDistiller",
    "OutsideTeacher",
    "TrainingConfig",
    "decay_mask",
    "export_hf",
    "load_student",
    "predict",
    "run_recipe",
    "data",
    "data_utils",
    "evaluation",
    "presets",
    "register_new",
    "schedulers",
    "testing",
    "utils",
    "zoo",
]

_WINGS = {"zoo": "zoo", "predict": "recipes", "run_recipe": "recipes"}  # name → what it comes from


def __getattr__(name: str) -> Any:
    """Imports the zoo, or what runs recipes, once it is asked for: the engine stands without them."""
    if name not in _WINGS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = importlib.import_module(f".{_WINGS[name]}", __name__)
    return module if name == _WINGS[name] else getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_WINGS})
