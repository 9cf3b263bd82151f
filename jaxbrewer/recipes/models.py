"""The models of a recipe."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flax import nnx

from ..configurations.configs import DistillationConfig
from ..errors import ConfigError
from ..zoo.auto import from_config, from_pretrained, read_config
from ..zoo.folders import WeightsMismatchError
from ..zoo.students import student_config
from ..zoo.transfer import init_from_layers
from .examples import Labels
from .schema import Recipe, Student

logger = logging.getLogger(__name__)

# Feature of a match → the field of a config by which models return it.
_RETURNED_BY = {
    "hidden": "output_hidden_states",
    "attention": "output_attentions",
    "query": "output_qkv",
    "key": "output_qkv",
    "value": "output_qkv",
}


def returned(how: DistillationConfig | None) -> dict[str, bool]:
    """The fields of a config by which a model returns what the matches look at."""
    matches = how.intermediate_matches if how is not None else ()
    return {_RETURNED_BY[m.feature]: True for m in matches if m.feature in _RETURNED_BY}


def labels_of_config(config: Any) -> Labels:
    """The classes that a model's config names."""
    return Labels(config.label_names, config.num_labels)


def teacher_of(folder: str, recipe: Recipe) -> Any:
    """A teacher, with the head that its folder has.

    Raises:
        ValueError: the folder cannot be read so, or has no head of the task.
    """
    return trained(folder, recipe.task, **returned(recipe.distillation))


def trained(folder: str | Path, task: str | None, **fields: Any) -> Any:
    """A model of a folder that was trained for a task.

    Raises:
        ConfigError: the folder holds an encoder, or a model of another task.
        ValueError: it cannot be read.
    """
    try:
        return from_pretrained(folder, task, **fields)
    except WeightsMismatchError as error:
        if not error.lacks_head:
            raise
        raise ConfigError(
            str(folder),
            [
                f"it has no head of {task or 'the task that its config names'}, so it has not been trained "
                f"for it. A teacher is such a folder once a head was trained on labels: jaxbrewer init "
                f"{task or 'TASK'} --teacher writes the recipe for that"
            ],
        ) from error


def student_of(recipe: Recipe, teacher: Any, labels: Labels | None, folder: str | None) -> Any:
    """The student.

    Args:
        recipe: says where it comes from.
        teacher: the first teacher, or None.
        labels: what its head is to tell apart; None in question answering.
        folder: its folder on disk, where it comes from one.

    Raises:
        ValueError: it cannot be made so.
    """
    wanted: dict[str, Any] = {**recipe.student.config, **returned(recipe.distillation)}
    if labels is not None:
        wanted |= {"num_labels": labels.count, "label_names": labels.names}
    rngs = nnx.Rngs(recipe.training.seed)
    try:
        if folder is not None:
            return _from_folder(folder, recipe.task, wanted, rngs)
        return _from_teacher(recipe.student, recipe.task, teacher, wanted, rngs)
    except TypeError as error:  # a field that such a config does not have
        raise ConfigError("the recipe", [f"student.config: {error}"]) from error


def _from_folder(folder: str, task: str, wanted: Mapping[str, Any], rngs: nnx.Rngs) -> Any:
    """A pretrained student, whose head is begun anew where it is not there, or of other classes."""
    fits = read_config(folder).num_labels == wanted.get("num_labels", 2)
    if fits:
        try:
            return from_pretrained(folder, task, rngs=rngs, **wanted)
        except WeightsMismatchError as error:
            first = error
    try:
        model = from_pretrained(folder, task, new_head=True, rngs=rngs, **wanted)
    except WeightsMismatchError as error:
        raise first if fits else error from None
    logger.info("%s has no such head, which is begun anew", folder)
    return model


def _from_teacher(
    student: Student, task: str, teacher: Any, wanted: Mapping[str, Any], rngs: nnx.Rngs
) -> Any:
    """A student of the teacher's kind: of some of its layers, or of a shape."""
    if student.shape is not None:
        return from_config(student_config(student.shape, teacher.config, **wanted), task, rngs=rngs)
    layers: Sequence[int] = student.layers
    depth = "n_layers" if hasattr(teacher.config, "n_layers") else "num_hidden_layers"
    config = teacher.config.replace(**{depth: len(layers), **wanted})
    model = from_config(config, task, rngs=rngs)
    try:
        return init_from_layers(model, teacher, layers)
    except ValueError as error:
        raise ConfigError("the recipe", [f"student.layers: {error}"]) from error


def save(model: Any, folder: Path) -> None:
    """Writes a model that returns its logits alone, as whoever uses it later will want it."""
    whole = model.config
    fields = {name: False for name in _RETURNED_BY.values() if hasattr(whole, name)}
    model.config = model.base_model.config = whole.replace(**fields)
    try:
        model.save_pretrained(folder)
    finally:
        model.config = model.base_model.config = whole
