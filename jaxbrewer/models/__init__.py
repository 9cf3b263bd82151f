"""The models that can be trained: NNX modules as they are, Linen modules, functions."""

from .handle import FunctionModel, LinenModel, Model, NNXModel, as_model

__all__ = ["FunctionModel", "LinenModel", "Model", "NNXModel", "as_model"]
