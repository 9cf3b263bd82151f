"""Knowledge distillation for NLP on JAX, with TextBrewer's configs and numbers."""

from . import data, data_utils, presets, schedulers, testing, utils, zoo
from .allocation import share_heap
from .checkpoints import export_hf, load_student
from .configurations import DistillationConfig, IntermediateMatch, TrainingConfig
from .custom import CustomMatch
from .distillers import (
    BasicDistiller,
    BasicTrainer,
    GeneralDistiller,
    MultiTaskDistiller,
    MultiTeacherDistiller,
)
from .emd import EMDDistiller
from .loop import CallbackResult
from .models import FunctionModel, LinenModel
from .objective import Loss
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

__version__ = "0.1.0"

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
    "TrainingConfig",
    "export_hf",
    "load_student",
    "data",
    "data_utils",
    "presets",
    "register_new",
    "schedulers",
    "testing",
    "utils",
    "zoo",
]
