"""Dynamic loss scaling for float16, by Apex's rules.

Gradients in float16 are 0 below 6e-8, so the loss is multiplied by a scale before it is
differentiated, and the gradients are divided by it afterwards. Where they overflow, the scale was
too large: that micro-batch is dropped, and with it the whole accumulation window it is in.

The rules: the scale starts at 65536; an overflow halves it; 2000 good micro-batches in a row double
it, up to 2²⁴. It changes with every micro-batch, also within a window. After a window with an
overflow weights and optimizer state are what they were, while the global step and the schedules go
on, as in TextBrewer. Two departures from Apex: a loss that is not finite counts as an overflow even
where the gradients are finite, and batch statistics do not take in an overflowing micro-batch.
"""

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from .guard import is_finite as is_finite

INITIAL = 2.0**16
LARGEST = 2.0**24
SMALLEST = 1.0  # an overflow that lower scales do not end is none
PATIENCE = 2000


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scaling:
    """The state of the loss scale.

    Attributes:
        scale: what the next loss is multiplied by.
        good: micro-batches without an overflow since the last one, or since the scale was doubled.
        spoiled: whether the open accumulation window had an overflow.
        skipped: windows dropped so far.
    """

    scale: Float[Array, ""]
    good: Int[Array, ""]
    spoiled: Bool[Array, ""]
    skipped: Int[Array, ""]


def start() -> Scaling:
    """The state before the first micro-batch."""
    return Scaling(jnp.float32(INITIAL), jnp.int32(0), jnp.bool_(False), jnp.int32(0))


def unscale(scaling: Scaling, grads: Any, finite: Bool[Array, ""]) -> Any:
    """Gradients of the scaled loss → of the loss, in their own types; zeros if not `finite`."""

    def one(g: Array) -> Array:
        wide = g.astype(jnp.promote_types(g.dtype, jnp.float32)) / scaling.scale
        return jnp.where(finite, wide, 0).astype(g.dtype)

    return jax.tree.map(one, grads)


def advance(
    scaling: Scaling, finite: Bool[Array, ""], closes: Bool[Array, ""]
) -> tuple[Scaling, Bool[Array, ""]]:
    """Takes note of a micro-batch.

    Args:
        scaling: before it.
        finite: whether it went without an overflow.
        closes: whether it is the last of its window.

    Returns:
        The state after it, and whether it ends a window that is to be dropped.
    """
    good = jnp.where(finite, scaling.good + 1, 0)
    doubles = good == PATIENCE
    raised = jnp.where(doubles, jnp.minimum(scaling.scale * 2, LARGEST), scaling.scale)
    spoiled = scaling.spoiled | ~finite
    dropped = spoiled & closes
    after = Scaling(
        scale=jnp.where(finite, raised, scaling.scale / 2),
        good=jnp.where(doubles, 0, good),
        spoiled=spoiled & ~closes,
        skipped=scaling.skipped + dropped,
    )
    return after, dropped


def forget_window(scaling: Any) -> Any:
    """The state once an incomplete window is dropped; `()`, for no scaling, stays."""
    if not isinstance(scaling, Scaling):
        return scaling
    return Scaling(scaling.scale, scaling.good, jnp.zeros_like(scaling.spoiled), scaling.skipped)


def is_exhausted(scaling: Scaling, finite: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether the scale is so low after a micro-batch that what was not `finite` was no overflow."""
    return ~finite & (scaling.scale < SMALLEST)


def too_low(scale: float, total: float, global_step: int, micro_step: int) -> str:
    """What to say of it, and what to look at."""
    halvings = int(math.log2(INITIAL / SMALLEST)) + 1
    return (
        f"the loss scale has fallen to {scale:g} at global step {global_step + 1} (micro-batch "
        f"{micro_step}), where the loss is {total:g}. After {halvings} halvings gradients in float16 "
        "are still not finite, so the scale is not the reason: the weights or a batch hold a NaN, or "
        "the model or its loss goes beyond 65504, float16's largest number. Use "
        "half_dtype='bfloat16', which has float32's range, or a lower fp16_opt_level; or train with "
        "fp16=False, which names the term that is not finite"
    )
