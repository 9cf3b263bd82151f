"""What the losses ask of their inputs' shapes, checked while tracing.

Each function takes the name of the loss that calls it and raises a :class:`ValueError` that names
the shapes that came, the shape that was expected, and the fix.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

__all__ = [
    "check_attention",
    "check_candidates",
    "check_classes",
    "check_examples",
    "check_labels",
    "check_layers",
    "check_logits",
    "check_mask",
    "check_part",
    "check_relations",
    "check_same",
    "check_states",
    "shape_of",
]

Shape = tuple[int, ...]


def shape_of(loss: str, name: str, value: Any) -> Shape:
    """The shape of one array; lists and None are refused."""
    if value is None:
        raise ValueError(
            f"{loss}: {name} is None; expected an array. Let the model return it, or match "
            "another layer."
        )
    if isinstance(value, list | tuple):
        raise ValueError(
            f"{loss}: {name} is a list of {len(value)}; expected one array. layer_T and layer_S "
            "must be single layers for this loss, not lists."
        )
    return jnp.shape(value)


def check_same(loss: str, name: str, shape_S: Shape, shape_T: Shape, axes: Sequence[str]) -> None:
    """Refuses two shapes of one rank that differ, with the fix for the last axis that does."""
    if shape_S == shape_T:
        return
    if len(shape_S) != len(shape_T):
        raise ValueError(
            f"{loss}: {name}_S has shape {shape_S} and {name}_T has shape {shape_T}; expected "
            "one shape. Match outputs of the same kind."
        )
    axis = max(i for i in range(len(axes)) if shape_S[i] != shape_T[i])
    size_S, size_T = shape_S[axis], shape_T[axis]
    fixes = {
        "width": f"Add 'proj': ['linear', {size_S}, {size_T}] to the match.",
        "classes": "Build the student's head for the teacher's classes.",
        "heads": "Use a loss that reduces the heads: attention_mse_sum or attention_ce_mean.",
    }
    fix = fixes.get(axes[axis], "Give both models inputs of one batch size and length.")
    raise ValueError(
        f"{loss}: {name}_S has shape {shape_S} and {name}_T has shape {shape_T}; expected one "
        f"{axes[axis]}, got {size_S} and {size_T}. {fix}"
    )


def check_mask(loss: str, mask: Any, expected: Shape, axes: str) -> None:
    """Refuses a mask of another shape than ``expected``; ``axes`` says in words what that is."""
    if mask is None:
        return
    if isinstance(mask, list | tuple):
        got = f"is a list of {len(mask)}"
    else:
        got = "" if jnp.shape(mask) == expected else f"has shape {jnp.shape(mask)}"
    if got:
        raise ValueError(
            f"{loss}: mask {got}; expected one array of shape {expected}, {axes}. Pass the mask "
            "that the model was given, not a broadcast or additive one."
        )


def _positions(rank: int, last: str) -> list[str]:
    """Names of the axes of an array with any number of leading positions."""
    return ["batch", *["length"] * (rank - 2), last] if rank > 1 else [last]


def check_states(loss: str, state_S: Any, state_T: Any, mask: Any) -> None:
    """Wants two states (..., width) of one shape, and a mask without the width."""
    shape_S, shape_T = shape_of(loss, "state_S", state_S), shape_of(loss, "state_T", state_T)
    for name, shape in (("state_S", shape_S), ("state_T", shape_T)):
        if len(shape) < 2:
            raise ValueError(
                f"{loss}: {name} has shape {shape}; expected (batch, length, width) or "
                "(batch, width)."
            )
    check_same(loss, "state", shape_S, shape_T, _positions(len(shape_S), "width"))
    check_mask(loss, mask, shape_S[:-1], "the states' shape without the width")


def check_logits(loss: str, logits_S: Any, logits_T: Any, temperature: Any, mask: Any) -> None:
    """Wants two (..., classes) of one shape; temperature, if not scalar, and mask without it."""
    shape_S, shape_T = shape_of(loss, "logits_S", logits_S), shape_of(loss, "logits_T", logits_T)
    for name, shape in (("logits_S", shape_S), ("logits_T", shape_T)):
        if not shape:
            raise ValueError(f"{loss}: {name} is a scalar; expected (..., classes).")
    check_same(loss, "logits", shape_S, shape_T, _positions(len(shape_S), "classes"))
    shape = jnp.shape(temperature)
    if shape not in ((), shape_S[:-1]):
        raise ValueError(
            f"{loss}: temperature has shape {shape}; expected a number, or one for each position, "
            f"{shape_S[:-1]}, for logits of shape {shape_S}."
        )
    check_mask(loss, mask, shape_S[:-1], "the logits' shape without the classes")


def check_candidates(loss: str, logits: Any) -> None:
    """Wants two or more candidates on the last axis: one alone leads no other."""
    if jnp.shape(logits)[-1] < 2:
        raise ValueError(
            f"{loss}: the logits have shape {jnp.shape(logits)}; expected scores of 2 or more "
            "candidates for each query on the last axis. Stack the scores of a query's candidates "
            "there, the relevant one first."
        )


def check_classes(loss: str, logits: Any) -> None:
    """Wants two or more classes on the last axis."""
    if jnp.shape(logits)[-1] < 2:
        raise ValueError(
            f"{loss}: the logits have shape {jnp.shape(logits)}; expected 2 or more classes on the last "
            "axis. For regression and scores use kd_mse_loss ('mse'), for a single yes or no kd_bce_loss "
            "('bce')."
        )


def check_labels(loss: str, labels: Any, logits: Any) -> None:
    """Wants one integer for each position of the logits."""
    expected = jnp.shape(logits)[:-1]
    if labels is None:
        raise ValueError(
            f"{loss}: labels is None; expected integers of shape {expected}. Return them from adaptor_S "
            "under 'labels'."
        )
    kind = jnp.result_type(labels)
    if jnp.shape(labels) != expected or not jnp.issubdtype(kind, jnp.integer):
        raise ValueError(
            f"{loss}: labels are {kind.name} of shape {jnp.shape(labels)}; expected integers of shape "
            f"{expected}, one for each position of the logits {jnp.shape(logits)}."
        )


def check_part(loss: str, name: str, value: Any, below: float | None = None) -> None:
    """Wants a number from 0 to 1, or to below ``below``."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (0 <= value <= 1 if below is None else 0 <= value < below):
        limits = "from 0 to 1" if below is None else f"from 0 to below {below}"
        raise ValueError(f"{loss}: {name} is {value!r}; expected a number {limits}.")


def check_attention(
    loss: str, attention_S: Any, attention_T: Any, mask: Any, heads_reduced: bool
) -> None:
    """Wants (batch, heads, length, length) twice, or without heads where these are reduced."""
    shapes = []
    for name, attention in (("attention_S", attention_S), ("attention_T", attention_T)):
        shape = shape_of(loss, name, attention)
        if len(shape) != 4 and not (heads_reduced and len(shape) == 3):
            also = (
                " or (batch, length, length)."
                if heads_reduced
                else "; for heads already reduced use attention_mse_sum or attention_ce_mean."
            )
            raise ValueError(
                f"{loss}: {name} has shape {shape}; expected (batch, heads, length, length){also}"
            )
        shapes.append((shape[0], *shape[-2:]) if heads_reduced else shape)
    axes = ("batch", *(() if heads_reduced else ("heads",)), "query length", "key length")
    check_same(loss, "attention", shapes[0], shapes[1], axes)
    if mask is not None and shapes[0][-1] != shapes[0][-2]:
        raise ValueError(
            f"{loss}: attention_S has shape {shapes[0]}; with a mask, queries and keys must be "
            "the same positions. Leave the mask out for cross-attention."
        )
    check_mask(loss, mask, (shapes[0][0], shapes[0][-1]), "(batch, length)")


def check_examples(
    loss: str, state_S: Any, state_T: Any, mask: Any, *, positions: bool, same_width: bool
) -> None:
    """Wants (batch, width) of one batch size twice, or (batch, length, width) where these are taken."""
    shapes = []
    for name, state in (("state_S", state_S), ("state_T", state_T)):
        shape = shape_of(loss, name, state)
        if len(shape) != 2 and not (positions and len(shape) == 3):
            also = (
                " or (batch, length, width)."
                if positions
                else ", one vector for each example. Let the adaptor return one, such as the first token's, "
                "under 'embedding', and match that."
            )
            raise ValueError(f"{loss}: {name} has shape {shape}; expected (batch, width){also}")
        shapes.append(shape)
    if not same_width:
        shapes = [(*shape[:-1], 0) for shape in shapes]
    check_same(loss, "state", shapes[0], shapes[1], _positions(len(shapes[0]), "width"))
    check_mask(loss, mask, shapes[0][:-1], "the states' shape without the width")


def check_relations(loss: str, vectors_S: Any, vectors_T: Any, mask: Any, heads: int | None) -> int:
    """The number of relation heads; wants (batch, heads, length, width) or (batch, length, width)."""
    sides, widths = [], []
    for name, vectors in (("vectors_S", vectors_S), ("vectors_T", vectors_T)):
        shape = shape_of(loss, name, vectors)
        if len(shape) not in (3, 4):
            raise ValueError(
                f"{loss}: {name} has shape {shape}; expected (batch, heads, length, width of a head), or "
                "(batch, length, width)."
            )
        sides.append((shape[0], shape[-2]))
        widths.append(shape[-1] if len(shape) == 3 else shape[1] * shape[-1])
    check_same(loss, "vectors", sides[0], sides[1], ("batch", "length"))
    check_mask(loss, mask, sides[0], "(batch, length)")
    if heads is None and jnp.ndim(vectors_T) == 3:
        raise ValueError(
            f"{loss}: vectors_T has shape {jnp.shape(vectors_T)}, without heads; expected the number of "
            "relation heads. Register functools.partial(relation_loss, heads=…) under a name."
        )
    count = jnp.shape(vectors_T)[1] if heads is None else heads
    if not isinstance(count, int) or count < 1 or any(width % count for width in widths):
        raise ValueError(
            f"{loss}: {count} relation heads, but the student's heads are {widths[0]} numbers wide "
            f"together and the teacher's {widths[1]}; expected a number that divides both. Register "
            f"functools.partial(relation_loss, heads={math.gcd(*widths)}), or with a divisor of that."
        )
    return count


def check_layers(loss: str, state_S: Any, state_T: Any, mask: Any) -> list[list[Shape]]:
    """The shapes of both sides' two layers; wants lists of two, each (batch, length, width)."""
    sides = []
    for name, layers in (("state_S", state_S), ("state_T", state_T)):
        if not isinstance(layers, list | tuple):
            got = "None" if layers is None else f"one array of shape {jnp.shape(layers)}"
        elif len(layers) != 2:
            got = f"a list of {len(layers)}"
        else:
            got = None
        if got:
            raise ValueError(
                f"{loss}: {name} must be a list of two arrays, got {got}. layer_T and layer_S "
                "must be lists of two layers, such as [0, 2]."
            )
        shapes = [shape_of(loss, f"{name}[{i}]", layer) for i, layer in enumerate(layers)]
        if any(len(shape) != 3 for shape in shapes) or shapes[0][:2] != shapes[1][:2]:
            raise ValueError(
                f"{loss}: the two layers of {name} have shapes {shapes[0]} and {shapes[1]}; "
                "expected (batch, length, width) twice, with one batch and length."
            )
        check_mask(loss, mask, shapes[0][:2], f"(batch, length) of {name}")
        sides.append(shapes)
    return sides
