"""From what a user passes to a model."""

from typing import Any

from flax import nnx

from .handle import Model
from .nnx_model import NNXModel


def as_model(model: Any, role: str = "model") -> Model:
    """Wraps what a user passes as a model.

    Args:
        model: an `nnx.Module`, or anything with the attributes of `Model`.
        role: what the argument is called in errors: ``'model_S'``.

    Raises:
        TypeError: for anything else, with the wrapper to use.
    """
    if isinstance(model, nnx.Module):
        return NNXModel(model)
    if isinstance(model, Model):
        return model
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, type):
        fix = f"{model.__name__} is the class itself: make an instance of it"
    elif hasattr(model, "init") and hasattr(model, "apply"):
        fix = "a Linen module comes with its variables: LinenModel(module, variables)"
    elif hasattr(model, "state_dict"):
        fix = (
            "a torch module does not run here. Read its Hugging Face folder with "
            "jaxbrewer.zoo.from_pretrained(folder), or make one of its state dict: jaxbrewer "
            "port-weights STATE_DICT --config config.json --out FOLDER"
        )
    elif callable(model):
        fix = "a function comes with its parameters: FunctionModel(apply, params)"
    else:
        fix = "give an nnx.Module, a LinenModel or a FunctionModel"
    raise TypeError(f"{role} is a {kind}; {fix}")
