"""Which layer of a teacher for which of a student: by depth, and what their likeness says beside it."""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from jaxbrewer.zoo.configuration import TransformerConfig

MOST_POSITIONS = 2048

# Losses by what they take: a pair of layers of one width, a layer twice, one on each side as it is.
_WIDTHS = ("hidden_mse", "cos")
_TWICE = ("mmd", "nst")
_ATTENTION = ("attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean")


def suggest_matches(
    teacher: TransformerConfig,
    student: TransformerConfig,
    loss: str = "hidden_mse",
    *,
    weight: float = 1,
) -> list[dict[str, Any]]:
    """Intermediate matches of two depths, the student's layers spread evenly over the teacher's.

    The student's hidden layer ``s`` of ``n`` is matched with the teacher's ``s · N / n`` of ``N``,
    rounded, a half up: the embeddings' outputs (layer 0) with each other, and the last layers.
    Attention, which has no layer 0, is counted from 0, as `jaxbrewer.presets.MATCHES` counts it.

    Args:
        teacher: its config.
        student: its config.
        loss: ``'hidden_mse'`` or ``'cos'``, through a linear projection where the widths differ;
            ``'mmd'`` or ``'nst'``, which take any widths; or a loss of attention scores.
        weight: of each match.

    Returns:
        Dicts for ``DistillationConfig(intermediate_matches=…)``, which JSON can carry.

    Raises:
        ValueError: another loss, a student deeper than its teacher, or a loss of attention where the
            heads differ in number and are not averaged.
    """
    known = (*_WIDTHS, *_TWICE, *_ATTENTION)
    if loss not in known:
        raise ValueError(f"loss={loss!r}: expected one of {', '.join(known)}")
    deep, shallow = (config.sizes.num_hidden_layers for config in (teacher, student))
    if shallow > deep:
        raise ValueError(
            f"the student has {shallow} layers and the teacher {deep}: expected no more than the teacher"
        )
    heads = [config.sizes.num_attention_heads for config in (teacher, student)]
    if loss in ("attention_mse", "attention_ce") and heads[0] != heads[1]:
        raise ValueError(
            f"{loss} compares head by head, but the teacher has {heads[0]} and the student {heads[1]}: "
            f"use {'attention_mse_sum' if loss == 'attention_mse' else 'attention_ce_mean'}"
        )
    widths = [student.output_width, teacher.output_width]
    added = {"proj": ["linear", *widths]} if loss in _WIDTHS and widths[0] != widths[1] else {}
    is_attention = loss in _ATTENTION
    return [
        {
            "layer_T": _layer(t, loss),
            "layer_S": _layer(s, loss),
            "feature": "attention" if is_attention else "hidden",
            "loss": loss,
            "weight": weight,
            **added,
        }
        for t, s in spread(deep, shallow)[1 if is_attention else 0 :]
    ]


def spread(deep: int, shallow: int) -> list[tuple[int, int]]:
    """Pairs of the teacher's and the student's hidden layers, evenly, both ends met."""
    return [((2 * s * deep + shallow) // (2 * shallow), s) for s in range(shallow + 1)]


def _layer(layer: int, loss: str) -> int | list[int]:
    if loss in _ATTENTION:
        return layer - 1
    return [layer, layer] if loss in _TWICE else layer


@dataclasses.dataclass(frozen=True)
class Similarity:
    """How alike two models' hidden layers are.

    Attributes:
        values: the teacher's layers by the student's, from 0 to 1; layer 0 is the embeddings'
            output. NaN where a layer is the same at every position.
        positions: how many positions they are taken over.
    """

    values: Float[np.ndarray, "layers_T layers_S"]
    positions: int

    def best(self) -> list[int]:
        """For each of the student's layers the teacher's that is most like it."""
        return [int(i) for i in np.where(np.isnan(self.values), -1, self.values).argmax(axis=0)]

    def __str__(self) -> str:
        """A table: a row for each of the teacher's layers, the last on top; ``*`` is a column's largest."""
        best = self.best()
        lines = [
            f"linear CKA over {self.positions:,} positions; teacher's layers down, student's across"
        ]
        for t in reversed(range(len(self.values))):
            cells = [
                f"{value:6.3f}{'*' if best[s] == t else ' '}"
                for s, value in enumerate(self.values[t])
            ]
            lines.append(f"T{t:<3}{''.join(cells)}".rstrip())
        lines.append("    " + "".join(f"{f'S{s}':>6} " for s in range(len(best))).rstrip())
        return "\n".join(lines)


def similarity(
    teacher: nnx.Module, student: nnx.Module, batches: Iterable[Mapping[str, Any]]
) -> Similarity:
    r"""Linear CKA of all pairs of hidden layers, over positions that are not masked.

    .. math:: \frac{\|Y^\top X\|_F^2}{\|X^\top X\|_F \, \|Y^\top Y\|_F}

    with X and Y the two layers' vectors, ``[positions, width]``, each column's mean taken off
    (Kornblith et al., 2019, https://arxiv.org/abs/1905.00414). It does not change where a layer is
    turned or scaled, and compares layers of different widths. Over fewer positions than a layer is
    wide everything looks alike: give a thousand or more.

    It says how alike the layers are *now*. A student that was not trained is like its teacher where it
    was cut from it and nowhere else, and what is most alike need not be what is best to learn from.

    Args:
        teacher: a model of the zoo.
        student: another, for the same tokens.
        batches: what both take: dicts of ``input_ids`` and ``attention_mask``, perhaps
            ``token_type_ids``. They are read until there are 2,048 positions.

    Raises:
        ValueError: there are fewer than two positions.
    """
    sides: list[list[list[np.ndarray]]] = [[], []]
    count = 0
    for batch in batches:
        seen = np.asarray(batch["attention_mask"]) != 0
        room = MOST_POSITIONS - count
        for found, model in zip(sides, (teacher, student), strict=True):
            found.append([x[seen][:room] for x in _hidden_states(model, batch)])
        count += min(int(seen.sum()), room)
        if count == MOST_POSITIONS:
            break
    if count < 2:
        raise ValueError(
            f"the batches have {count} positions that are not masked: expected two or more"
        )
    grams = [
        [_gram(np.concatenate(layer)) for layer in zip(*found, strict=True)] for found in sides
    ]
    values = np.array([[float((x * y).sum()) for y in grams[1]] for x in grams[0]])
    return Similarity(np.clip(values, 0, 1), count)


def _hidden_states(model: Any, batch: Mapping[str, Any]) -> list[np.ndarray]:
    """The hidden states in evaluation mode, of those inputs that the model takes."""
    twin = nnx.merge(*nnx.split(model))
    twin.eval()
    limits = twin.id_limits
    inputs = {
        name: jnp.asarray(value)
        for name, value in batch.items()
        if name != "token_type_ids" or limits.get(name, 0) > 1
    }
    outputs = twin(**inputs, output_hidden_states=True, return_dict=True)
    return [np.asarray(x, np.float64) for x in outputs.hidden_states]


def _gram(x: Float[np.ndarray, "positions width"]) -> Float[np.ndarray, "positions positions"]:
    """The products of centred vectors with each other, of norm 1; NaN where all are the same."""
    centred = x - x.mean(axis=0)
    gram = centred @ centred.T
    norm = np.linalg.norm(gram)
    return gram / norm if norm > 0 else np.full_like(gram, np.nan)
