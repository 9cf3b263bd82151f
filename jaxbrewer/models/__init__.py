"""The models that can be trained: NNX modules as they are, Linen modules, functions."""

from .function_model import FunctionModel
from .handle import Model
from .linen_model import LinenModel
from .nnx_model import NNXModel
from .wrap import as_model

__all__ = ["FunctionModel", "LinenModel", "Model", "NNXModel", "as_model"]
