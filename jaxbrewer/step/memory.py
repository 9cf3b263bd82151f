"""The objective's state, which moves on once an optimizer step, on the means of its micro-batches."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool

from .guard import keep

TOTAL = "total"


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Memory:
    """The state, and what the open accumulation window has seen.

    Attributes:
        value: the objective's own state.
        sums: term → the sum of its values in the window; ``total`` of the losses.
        counts: term → the micro-batches that had it.
    """

    value: Any
    sums: Any
    counts: Any


def start(value: Any, names: Sequence[str]) -> Any:
    """The memory before the first micro-batch; ``()`` for an objective without a state."""
    if not jax.tree.leaves(value):
        return ()
    zeros = {name: jnp.zeros((), jnp.float32) for name in (TOTAL, *names)}
    value = jax.tree.map(lambda x: jnp.array(x, copy=True), value)
    return Memory(value, zeros, {name: jnp.zeros((), jnp.float32) for name in zeros})


def value_of(memory: Any) -> Any:
    """The objective's own state; ``()`` where it has none."""
    return memory.value if isinstance(memory, Memory) else ()


def advance(
    memory: Any,
    seen: Mapping[str, Array],
    closes: Bool[Array, ""],
    move: Callable[[Any, dict[str, Array]], Any],
) -> Any:
    """The memory after a micro-batch.

    Args:
        memory: before it.
        seen: its terms.
        closes: whether it is the last of its window, on which the state moves on.
        move: ``(state, means) -> state``; the mean of a term that the window did not have is NaN.
    """
    if not isinstance(memory, Memory):
        return memory
    sums, counts = dict(memory.sums), dict(memory.counts)
    for name, value in seen.items():
        sums[name] = sums[name] + value.astype(jnp.float32)
        counts[name] = counts[name] + 1
    means = {name: sums[name] / counts[name] for name in sums}
    moved = jax.tree.map(
        lambda old, new: jnp.asarray(new, old.dtype).reshape(old.shape),
        memory.value,
        move(memory.value, means),
    )
    zeros = jax.tree.map(jnp.zeros_like, (sums, counts))
    sums, counts = keep(zeros, (sums, counts), closes)
    return Memory(keep(moved, memory.value, closes), sums, counts)


def guarded(old: Any, new: Any, dropped: Bool[Array, ""], stopped: Bool[Array, ""]) -> Any:
    """The memory `new`; after a window that is dropped with the state as it was; once stopped, `old`."""
    if not isinstance(new, Memory):
        return new
    return keep(old, replace(new, value=keep(old.value, new.value, dropped)), stopped)


def forget_window(memory: Any) -> Any:
    """The memory once an incomplete window is dropped."""
    if not isinstance(memory, Memory):
        return memory
    sums, counts = jax.tree.map(jnp.zeros_like, (memory.sums, memory.counts))
    return Memory(memory.value, sums, counts)
