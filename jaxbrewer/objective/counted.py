"""Means that know over how much they are taken, so that parts of them can be put together.

A part of a loss is a mean over examples, positions or the like. With its count in each micro-batch the
means of several make the mean of all, and with a count for each row the rows can be weighed.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ..losses.means import ratio

EXAMPLE, POSITION, SELECTED, PAIR, LABEL = "example", "position", "selected", "pair", "label"

IN_WORDS = {
    EXAMPLE: "examples",
    POSITION: "positions, by the mask's values",
    SELECTED: "selected positions",
    PAIR: "pairs of positions of an example",
    LABEL: "labelled positions",
}
"""Unit → what a part of that unit is a mean over."""


def counts(
    rows: int, mask: Array | None = None, labels: Array | None = None
) -> dict[str, Float[Array, " rows"]]:
    """Unit → how many of it each row has, of the units that can be told apart.

    Args:
        rows: examples, or positions that are rows of their own.
        mask: ``[rows]`` or ``[rows, length]``.
        labels: the same; negative ones are none.
    """
    found = {EXAMPLE: jnp.ones(rows)}
    if mask is not None:
        weights = jnp.asarray(mask, jnp.result_type(float)).reshape(rows, -1)
        found[POSITION] = jnp.sum(weights, axis=1)
        found[SELECTED] = jnp.sum(weights != 0, axis=1).astype(weights.dtype)
        if jnp.ndim(mask) > 1:
            found[PAIR] = jnp.square(found[POSITION])
    if labels is not None:
        is_one = jnp.asarray(labels).reshape(rows, -1) >= 0
        if mask is not None:
            is_one &= jnp.asarray(mask).reshape(rows, -1) != 0
        found[LABEL] = jnp.sum(is_one, axis=1).astype(jnp.result_type(float))
    return found


def weighted(
    value: Callable[[Mapping[str, Any]], Any],
    rows: Mapping[str, Any],
    count: Float[Array, " rows"],
    weights: Float[Array, " rows"],
) -> Float[Array, ""]:
    """A mean whose rows weigh: each row's own mean by its count and weight.

    Args:
        value: the mean of some rows.
        rows: name → ``[rows, …]``, or a list of such, or None.
        count: what each row's mean is taken over.
        weights: of each row.
    """

    def one(row: Mapping[str, Any]) -> Any:
        return value(jax.tree.map(lambda x: x[None], row))

    each = jax.vmap(one)(rows)
    share = count.astype(each.dtype) * weights.astype(each.dtype)
    return ratio(jnp.sum(jnp.where(share != 0, each * share, 0)), jnp.sum(share))


def shares(
    window: Sequence[Float[Array, " parts"]], tasks: Sequence[str]
) -> list[Float[Array, " parts"]]:
    """What each micro-batch's parts are multiplied by, so that the window's mean is exact.

    Args:
        window: each micro-batch's counts.
        tasks: the task of each. A task has the part of the window that its micro-batches are of it.
    """
    total = {
        task: jnp.sum(
            jnp.stack([count for count, of in zip(window, tasks, strict=True) if of == task]),
            axis=0,
        )
        for task in tasks
    }
    return [
        ratio(tasks.count(task) * count, total[task])
        for count, task in zip(window, tasks, strict=True)
    ]


@functools.partial(jax.jit, static_argnums=2)
def with_shares(
    row: Any, window: Sequence[Float[Array, " parts"]], tasks: tuple[str, ...]
) -> list[Float[Array, " columns"]]:
    """The row of each micro-batch: what the schedule gives the window, and the micro-batch's `shares`."""
    return [jnp.concatenate([row, each.astype(row.dtype)]) for each in shares(window, tasks)]
