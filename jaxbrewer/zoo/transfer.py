"""A student that starts from some of its teacher's layers."""

from collections.abc import Sequence
from typing import Any, TypeVar

import jax.numpy as jnp
from flax import nnx

from jaxbrewer.zoo.bert import BertModel
from jaxbrewer.zoo.distilbert import DistilBertModel
from jaxbrewer.zoo.encoder import EncoderModel
from jaxbrewer.zoo.hf import PretrainedModel

_Model = TypeVar("_Model", bound=PretrainedModel)
# A part of the student, the part of the teacher it starts from, and what to call it.
_Pair = tuple[nnx.Module, nnx.Module | None, str]


def init_from_layers(
    student: _Model,
    teacher: PretrainedModel,
    layers: Sequence[int],
    *,
    embeddings: bool = True,
    head: bool | None = None,
) -> _Model:
    """Copies the teacher's ``layers`` into the student's, in order, and returns the student.

    ``layers`` names one teacher layer, counted from 0, for each of the student's: ``[0, 4, 8]``
    for a student of three. What the layers share, such as a table of distances or a last norm, goes
    with them. With ``embeddings`` the tables, their norm and their projection are copied too. The
    first layer of a ModernBERT has one norm fewer than the others: it is left out where one of two
    layers is a first. The pooler is copied where both models have one. ``head=None`` copies the task head
    where both have the same one, of the same shape; ``True`` demands it, ``False`` leaves the
    student's own.

    Both models are of one architecture, or the student is a DistilBERT and the teacher a BERT: then
    the first token type is added to the positions, so that a student with all of the teacher's
    layers computes what the teacher does for a single sequence.

    The student gets arrays of its own, in its own dtype; it is changed in place. With the tables
    goes the folder of their tokenizer, with the head the names of its labels, where the student's
    config has none.

    Raises ``ValueError`` that lists everything that does not fit: a layer the teacher does not
    have, another number of layers than the student has, another width.
    """
    source, target = teacher.base_model, student.base_model
    from_bert = isinstance(source, BertModel) and isinstance(target, DistilBertModel)
    if not isinstance(target, EncoderModel) or not (from_bert or type(source) is type(target)):
        raise ValueError(
            f"the student is built on {type(target).__name__}, the teacher on "
            f"{type(source).__name__}: layers can be copied only within one architecture of "
            "transformer, or from BERT to DistilBERT"
        )
    _check_layers(target, source, layers)
    pairs: list[_Pair] = []
    for position, layer in enumerate(layers):
        pairs += _layer_to_copy(target.encoder.layer[position], source.encoder.layer[layer], layer)
    pairs += [
        (part, getattr(source.encoder, name, None), f"encoder.{name}")
        for name, part in _parts(target.encoder).items()
        if name != "layer"
    ]
    if embeddings:
        pairs += _embeddings_to_copy(target, source)
    if target.pooler is not None and source.pooler is not None:
        pairs.append((target.pooler, source.pooler, "pooler"))
    copied_heads = _heads_to_copy(student, teacher, head)
    pairs += copied_heads
    problems = [problem for pair in pairs for problem in _misfits(*pair)]
    if problems:
        raise ValueError(
            "the student cannot start from this teacher: "
            + "; ".join(problems)
            + ". Give the student the teacher's widths, or leave the part out"
        )
    for theirs, ours, _ in pairs:
        _copy(ours, theirs)
    if from_bert and embeddings:
        positions = target.embeddings.position_embeddings.embedding
        first_type = source.embeddings.token_type_embeddings.embedding[0]
        positions[...] = positions[...] + first_type.astype(positions.dtype)
    _take_names(student, teacher, tokenizer=embeddings, labels=bool(copied_heads))
    return student


def _take_names(
    student: PretrainedModel, teacher: PretrainedModel, *, tokenizer: bool, labels: bool
) -> None:
    """Takes what goes with the tables and the head from the teacher's config, where it is not set."""
    labels = labels and student.config.num_labels == teacher.config.num_labels
    names = ["source_folder"] * tokenizer + ["label_names"] * labels
    missing = [name for name in names if getattr(student.config, name) is None]
    config = student.config.replace(**{name: getattr(teacher.config, name) for name in missing})
    student.config = student.base_model.config = config


def _check_layers(student: EncoderModel, teacher: EncoderModel, layers: Sequence[int]) -> None:
    """Refuses layers that the teacher lacks, and a list of another length than the student."""
    count = len(teacher.encoder.layer)
    wrong = [layer for layer in layers if not 0 <= layer < count]
    if wrong:
        raise ValueError(f"layers {wrong} are not in the teacher, which has 0 to {count - 1}")
    if len(layers) != len(student.encoder.layer):
        raise ValueError(
            f"layers={list(layers)} names {len(layers)} layers, but the student has "
            f"{len(student.encoder.layer)}: name one for each"
        )


def _layer_to_copy(student: nnx.Module, teacher: nnx.Module, layer: int) -> list[_Pair]:
    """The pairs of a layer's parts, without the norm that only one of the two has."""
    ours, theirs = _parts(student), _parts(teacher)
    pairs: list[_Pair] = [(student, teacher, f"layer {layer}")]
    if ours.keys() ^ theirs.keys() == {"attention_norm"}:
        both = sorted(ours.keys() & theirs.keys())
        pairs = [(ours[name], theirs[name], f"layer {layer}, {name}") for name in both]
    return pairs


def _embeddings_to_copy(student: EncoderModel, teacher: EncoderModel) -> list[_Pair]:
    """The pairs of tables, of their norms and of their projections to copy."""
    pairs: list[_Pair] = [
        (part, getattr(teacher.embeddings, name, None), f"embeddings.{name}")
        for name, part in _parts(student.embeddings).items()
    ]
    ours, theirs = student.embeddings_project, teacher.embeddings_project
    if ours is not None and theirs is not None:
        pairs.append((ours, theirs, "embeddings_project"))
    return pairs


def _heads_to_copy(
    student: PretrainedModel, teacher: PretrainedModel, head: bool | None
) -> list[_Pair]:
    """The pairs of task heads to copy."""
    if head is False:
        return []
    ours, theirs = _heads(student), _heads(teacher)
    same = bool(ours) and student.task == teacher.task and ours.keys() == theirs.keys()
    pairs: list[_Pair] = [(ours[name], theirs[name], name) for name in ours] if same else []
    if head is None:
        return [] if any(_misfits(*pair) for pair in pairs) else pairs
    if not same:
        raise ValueError(
            f"head=True, but {type(student).__name__} and {type(teacher).__name__} do not have "
            "the same head: pass head=False"
        )
    return pairs


def _heads(model: PretrainedModel) -> dict[str, nnx.Module]:
    """The modules beside the encoder that hold parameters."""
    if model.base_model is model:
        return {}
    return {name: child for name, child in _parts(model).items() if child is not model.base_model}


def _parts(module: nnx.Module) -> dict[str, nnx.Module]:
    """The modules directly below one that hold parameters."""
    return {str(name): child for name, child in nnx.iter_children(module) if _parameters(child)}


def _parameters(module: nnx.Module | None) -> dict[tuple[Any, ...], Any]:
    if module is None:
        return {}
    return dict(nnx.to_flat_state(nnx.state(module, nnx.Param)))


def _misfits(student: nnx.Module, teacher: nnx.Module | None, what: str) -> list[str]:
    """Where one part of the student differs in shape from the teacher's."""
    ours, theirs = _parameters(student), _parameters(teacher)
    if ours.keys() != theirs.keys():
        return [f"{what}: the parts are built differently"]
    return [
        f"{what}, {'.'.join(map(str, path))}: {tuple(ours[path].shape)} in the student, "
        f"{tuple(theirs[path].shape)} in the teacher"
        for path in ours
        if ours[path].shape != theirs[path].shape
    ]


def _copy(source: nnx.Module | None, target: nnx.Module) -> None:
    """Copies parameters between parts of one shape, into new arrays of the target's dtype."""
    values, theirs = _parameters(target), _parameters(source)
    for path, variable in values.items():
        copied = jnp.array(theirs[path][...], dtype=variable.dtype, copy=True)
        values[path] = variable.replace(copied)
    nnx.update(target, nnx.from_flat_state(values))
