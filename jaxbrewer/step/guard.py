"""The guard: a number that is not finite reaches neither weights nor what else training keeps.

The unit is the accumulation window. A micro-batch whose loss, gradient or new model state is not
finite counts as a gradient of 0, and its window is dropped: weights, moments and the optimizer's
counters are what they were before it, while the global step and the schedules go on. So it is where
the update makes weights that are not finite. Under a loss scale the former is an overflow (see
`loss_scale`), which is a matter of course. All else is a fault, and so many windows with one in a row
stop the state: from that micro-batch on no step changes anything. The host, which looks some batches
later, then finds the state as it was.

Finite means every number, one by one: a norm of them all may overflow where none of them did.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int

# What the metrics say of a micro-batch: no fault (an overflow is none); a fault, so that its window is
# dropped; the state has stopped, at this one or before, for a fault or for a loss scale that is spent.
GOOD, BAD, STOPPED, EXHAUSTED = range(4)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Guard:
    """The state of the guard.

    Attributes:
        stopped: whether no step changes anything any more.
        spoiled: whether the open accumulation window had a fault.
        in_a_row: windows dropped for a fault since the last good one.
        before: the model state at the start of the window, where a window has several micro-batches.
        limit: how many such windows stop the state; None: none do.
    """

    stopped: Bool[Array, ""]
    spoiled: Bool[Array, ""]
    in_a_row: Int[Array, ""]
    before: Any = ()
    limit: int | None = field(default=1, metadata={"static": True})

    @property
    def counts(self) -> bool:
        """Whether `in_a_row` is ever anything but 0."""
        return self.limit != 1


def start(limit: int | None, before: Any = ()) -> Guard:
    """The state before the first micro-batch; `before` is copied."""
    return Guard(jnp.bool_(False), jnp.bool_(False), jnp.int32(0), _copy(before), limit)


def is_finite(tree: Any) -> Bool[Array, ""]:
    """Whether all numbers in a pytree are finite."""
    return jnp.all(jnp.array([jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(tree)]))


def stays_finite(old: Any, new: Any) -> Bool[Array, ""]:
    """Whether no float of a state has ceased to be finite; one that starts at −∞ may stay there."""

    def one(o: Array, n: Array) -> Bool[Array, ""]:
        if not jnp.issubdtype(n.dtype, jnp.inexact):
            return jnp.bool_(True)
        return jnp.all(jnp.isfinite(n) | ~jnp.isfinite(o))

    return jnp.all(jnp.array([True, *jax.tree.leaves(jax.tree.map(one, old, new))]))


def zero_unless(finite: Bool[Array, ""], grads: Any) -> Any:
    """The gradients; zeros if not `finite`."""
    return jax.tree.map(lambda g: jnp.where(finite, g, jnp.zeros_like(g)), grads)


def keep(old: Any, new: Any, dropped: Bool[Array, ""]) -> Any:
    """The pytree `old` where `dropped`, else `new`."""
    return jax.tree.map(lambda o, n: jnp.where(dropped, o, n), old, new)


def unless(held: Bool[Array, ""], update: Callable[[Any], Any], old: Any) -> Any:
    """``update(old)``, or `old` where `held`.

    On a CPU it is a loop of one round or none, since loops change what they carry in place: choosing
    between old and new arrays afterwards would read and write each of them once more. On a GPU the
    host would have to wait for `held` before it could hand over the rest of the step, while choosing
    costs nothing, in the kernel that updates.
    """

    def types(tree: Any) -> Any:
        return jax.tree.map(lambda x: (x.shape, x.dtype), tree)

    def choose(held: Bool[Array, ""], old: Any) -> Any:
        return keep(old, update(old), held)

    def loop(held: Bool[Array, ""], old: Any) -> Any:
        carry = jax.lax.while_loop(
            lambda c: ~c[0], lambda c: (jnp.bool_(True), update(c[1])), (held, old)
        )
        return carry[1]

    if types(jax.eval_shape(update, old)) != types(old):  # a loop could not carry it
        return choose(held, old)
    return jax.lax.platform_dependent(held, old, cpu=loop, default=choose)


def stops(guard: Guard, finite: Bool[Array, ""]) -> Bool[Array, ""]:
    """Whether the state stands still from this micro-batch on, or before."""
    if guard.limit is None:
        return guard.stopped
    return guard.stopped | (~finite & (guard.in_a_row + 1 >= guard.limit))


def advance(
    guard: Guard, finite: Bool[Array, ""], closes: Bool[Array, ""]
) -> tuple[Guard, Bool[Array, ""]]:
    """Takes note of a micro-batch.

    Args:
        guard: before it.
        finite: whether it went without a fault.
        closes: whether it is the last of its window.

    Returns:
        The state after it, but for `before`; and whether it ends a window that is to be dropped.
    """
    spoiled = guard.spoiled | ~finite
    in_a_row = jnp.where(spoiled, guard.in_a_row + 1, 0)
    after = replace(
        guard,
        stopped=stops(guard, finite),
        spoiled=spoiled & ~closes,
        in_a_row=jnp.where(closes, in_a_row, guard.in_a_row),
    )
    return after, spoiled & closes


def forget_window(guard: Guard, model_state: Any) -> Guard:
    """The state once an incomplete window is dropped; the next one starts with `model_state`."""
    before = _copy(model_state) if jax.tree.leaves(guard.before) else guard.before
    return replace(guard, spoiled=jnp.zeros_like(guard.spoiled), before=before)


def restored(guard: Guard, model_state: Any, in_a_row: Any = None) -> Guard:
    """The state at the start of a window, from what a checkpoint holds; None: it holds no counter."""
    guard = forget_window(guard, model_state)
    return guard if in_a_row is None else replace(guard, in_a_row=in_a_row)


def _copy(tree: Any) -> Any:
    # A state is donated, so nothing in it may lie in the same place as another part of it.
    return jax.tree.map(lambda x: jnp.array(x, copy=True), tree)
