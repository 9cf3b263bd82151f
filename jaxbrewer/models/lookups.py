"""Look-ups in tables, in NNX and Linen models: an id that a table lacks gives NaN, and can be named.

Nothing raises on a device. There `jax.numpy.take` gives NaN for an id beyond the table, but -1 is
its last row: a model would learn from padding that was forgotten. NaN is seen by `step.guard`.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

Notes = dict[str, tuple[int, int, int]]

_notes: ContextVar[Notes | None] = ContextVar("notes", default=None)


@contextmanager
def noted() -> Iterator[Notes]:
    """Lets the programs that are traced meanwhile note, as they run, the ids they look up.

    Yields:
        A mapping that fills: name of a table → the lowest and the highest id, and its rows. Complete
        once `jax.effects_barrier` has returned.
    """
    notes: Notes = {}
    token = _notes.set(notes)
    try:
        yield notes
    finally:
        _notes.reset(token)


def outside(notes: Notes) -> list[str]:
    """A clause for each table that was asked for a row it lacks."""
    return [
        f"{name} was asked for id {low if low < 0 else high}, and has ids 0 to {rows - 1}"
        for name, (low, high, rows) in notes.items()
        if low < 0 or high >= rows
    ]


def bounded(name: str, rows: int, ids: Any) -> Any:
    """Ids with those below 0 moved beyond the table, where taking gives NaN.

    Args:
        name: of the table.
        rows: how many it has.
        ids: of any shape; what are no whole numbers stays as it is.
    """
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        return ids
    notes = _notes.get()
    if notes is not None and ids.size:
        jax.debug.callback(functools.partial(_note, notes, name, rows), ids.min(), ids.max())
    if not jnp.issubdtype(ids.dtype, jnp.signedinteger):
        return ids
    ids = ids.astype(jnp.promote_types(ids.dtype, jnp.int32))
    return jnp.where(ids < 0, jnp.iinfo(ids.dtype).max, ids)


def _note(notes: Notes, name: str, rows: int, low: Any, high: Any) -> None:
    low, high = int(np.min(low)), int(np.max(high))
    if name in notes:
        low, high = min(low, notes[name][0]), max(high, notes[name][1])
    notes[name] = (low, high, rows)


def bound_tables(module: nnx.Module) -> None:
    """Lets every table in a module take its ids through `bounded`.

    A table is an `nnx.Embed`, or a submodule with ``num_embeddings`` that is called with ids first.
    """
    for path, submodule in nnx.iter_modules(module):
        rows = getattr(submodule, "num_embeddings", None)
        if isinstance(rows, int) and rows > 1:  # of one row, Flax looks at no id
            kind = _bounded_class(type(submodule), ".".join(map(str, path)) or "the model", rows)
            object.__setattr__(submodule, "__class__", kind)


@functools.cache
def _bounded_class(base: Any, name: str, rows: int) -> type:
    def call(self: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        return base.__call__(self, bounded(name, rows, inputs), *args, **kwargs)

    return type(base.__name__, (base,), {"__call__": call})


def intercept(
    call: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    context: linen.module.InterceptorContext,
) -> Any:
    """`bounded` for `linen.Embed`, to be used with `linen.intercept_methods`."""
    table = context.module
    is_call = isinstance(table, linen.Embed) and context.method_name == "__call__"
    if is_call and args and table.num_embeddings > 1:
        name = ".".join(table.path) or "the model"
        args = (bounded(name, table.num_embeddings, args[0]), *args[1:])
    return call(*args, **kwargs)
