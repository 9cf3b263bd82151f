"""Which class of `jaxbrewer.zoo` a config file and a task mean, and models without weights."""

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxbrewer import zoo
from jaxbrewer.files import read_json_object
from jaxbrewer.zoo.folders import config_file

TASKS = (
    "sequence-classification",
    "token-classification",
    "question-answering",
    "masked-lm",
    "none",
)
"""What a model's head is for; ``none`` is the encoder alone."""


MOST_LAYERS, MOST_PARAMETERS = 1000, 2**40
"""A model beyond these is not looked at."""


def models() -> list[type[zoo.PretrainedModel]]:
    """The classes of models in the zoo."""
    return [cls for tasks in zoo.MODELS.values() for cls in tasks.values()]


def config_class(model_type: str) -> Any:
    """The class of a model type's config."""
    return next(iter(zoo.MODELS[model_type].values())).config_class


def task_of(architecture: str) -> str | None:
    """The task of the class of this name in the zoo, or None where it has no head or is not there."""
    return next((cls.task for cls in models() if cls.architecture == architecture), None)


def model_class(model_type: str, task: str) -> type[zoo.PretrainedModel]:
    """The class of a model type with the head of a task.

    Raises:
        ValueError: the zoo has none; the message lists what there is.
    """
    return zoo.model_class(model_type, None if task == "none" else task)


def model_type_of(values: Mapping[str, Any]) -> str:
    """The model type a config file names; TextBrewer's files name none and are BERT's.

    Raises:
        ValueError: it is none of the zoo's.
    """
    model_type = values.get("model_type", "bert")
    if not isinstance(model_type, str) or model_type not in zoo.MODELS:
        raise ValueError(
            f"model_type is {model_type!r}; the zoo has {', '.join(zoo.MODELS)}. Bring your own "
            "model as an nnx.Module, a LinenModel or a FunctionModel"
        )
    return model_type


def config_from(values: Mapping[str, Any], **changes: Any) -> Any:
    """The zoo's config that a JSON object describes, with some fields changed.

    Changes of fields that the config does not have, or that are None, are left out.

    Raises:
        ValueError: all that is wrong with it.
    """
    cls = config_class(model_type_of(values))
    fields = {field.name for field in dataclasses.fields(cls)}
    wanted = {k: v for k, v in changes.items() if k in fields and v is not None}
    return cls.from_dict(values, **wanted)


def read_config(path: Path) -> Mapping[str, Any]:
    """Reads a model's config: a JSON file, or the one in a folder."""
    return read_json_object(config_file(path) if path.is_dir() else path)


def by_shape(cls: type[zoo.PretrainedModel], config: Any) -> Any:
    """A model whose parameters are zeros that take no memory: one number seen as a whole array.

    Raises:
        ValueError: the config does not suit the class.
    """
    for field in dataclasses.fields(config):
        if "layers" in field.name and getattr(config, field.name) > MOST_LAYERS:
            raise ValueError(
                f"{field.name}={getattr(config, field.name)}, expected {MOST_LAYERS} or fewer"
            )
    model = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))  # type: ignore[call-arg]
    graph, state = nnx.split(model)
    size = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(state))
    if size > MOST_PARAMETERS:
        raise ValueError(
            f"a model of {size:.3g} parameters, expected {MOST_PARAMETERS:.3g} or fewer"
        )
    return nnx.merge(graph, jax.tree.map(_zeros, state))


def _zeros(leaf: Any) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jnp.broadcast_to(jax.random.key(0), leaf.shape)
    return np.broadcast_to(np.zeros((), leaf.dtype), leaf.shape)
