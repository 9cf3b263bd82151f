"""Rows of a table by their ids, with a gradient that is the same bits each time.

The gradient adds up what comes back for each id. A GPU does this by atomic additions, in an order that
changes from run to run. Here it is products instead, of a fixed order, about as fast.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax.typing import Dtype
from jaxtyping import Array, Float, Int

FEW_ROWS = 1024  # of a table: one product with all of its rows
CHUNK = 256  # sorted ids that are compared with each other


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(
    table: Float[Array, "rows width"], ids: Int[Array, "*shape"], dtype: Dtype
) -> Float[Array, "*shape width"]:
    """The row of each id, in `dtype`: looked up, then rounded. An id beyond the table gives NaN.

    Its gradient is summed in the table's type. As in NumPy, ids below 0 count from the end.
    """
    return jnp.take(table, ids, axis=0).astype(dtype)


def _forward(table: Array, ids: Array, dtype: Dtype) -> tuple[Array, Any]:
    # The table's own array would be kept until the gradient, and only its shape and type are needed.
    return look_up(table, ids, dtype), (jnp.zeros((table.shape[0], 0), table.dtype), ids)


def _backward(dtype: Dtype, kept: Any, gradient: Array) -> tuple[Array, None]:
    like, ids = kept
    rows, width = like.shape[0], gradient.shape[-1]
    if ids.size == 0:
        return jnp.zeros((rows, width), like.dtype), None
    sums = functools.partial(_by_products, rows=rows, dtype=like.dtype)
    added = functools.partial(_by_adding, rows=rows, dtype=like.dtype)
    flat = ids.reshape(-1), gradient.reshape(-1, width)
    return jax.lax.platform_dependent(*flat, cuda=sums, default=added), None


look_up.defvjp(_forward, _backward)


def _by_adding(ids: Array, gradient: Array, *, rows: int, dtype: Dtype) -> Array:
    zeros = jnp.zeros((rows, gradient.shape[-1]), dtype)
    return zeros.at[ids].add(gradient.astype(dtype), mode="drop")


def _by_products(ids: Array, gradient: Array, *, rows: int, dtype: Dtype) -> Array:
    ids = jnp.where(ids < 0, ids + rows, ids)
    if rows <= FEW_ROWS:
        hot = jax.nn.one_hot(ids, rows, dtype=gradient.dtype, axis=0)
        return _product(hot, gradient, dtype)
    return _by_sorting(ids, gradient, rows, dtype)


def _by_sorting(
    ids: Int[Array, " count"], gradient: Float[Array, "count width"], rows: int, dtype: Dtype
) -> Float[Array, "rows width"]:
    """Sums of the gradients of equal ids.

    Sorted, equal ids lie together. In chunks, each id is compared with all others: the product with
    what came back for them gives the sum for each id of the chunk. What an id has in later chunks is
    added to its sum in the first. Then one row for each id is written, and no two to one place.
    """
    count, width = gradient.shape
    order = jnp.argsort(ids)
    spare = -count % CHUNK
    ids = jnp.pad(ids[order], (0, spare), constant_values=rows).reshape(-1, CHUNK)
    gradient = jnp.pad(gradient[order], ((0, spare), (0, 0))).reshape(-1, CHUNK, width)

    equal = (ids[:, :, None] == ids[:, None, :]).astype(gradient.dtype)
    sums = _product(equal, gradient, dtype)

    first, last = ids[:, 0], ids[:, -1]
    chunk = jnp.arange(len(ids))
    later = (last[:, None] == first[None, :]) & (chunk[:, None] < chunk[None, :])
    more = _product(later.astype(dtype), sums[:, 0], dtype)
    sums += jnp.where((ids == last[:, None])[:, :, None], more[:, None], 0)

    before = jnp.concatenate([jnp.full(1, -1, ids.dtype), ids.reshape(-1)[:-1]])
    is_first = ids.reshape(-1) != before
    place = jnp.where(
        is_first & (ids.reshape(-1) < rows), ids.reshape(-1), rows + jnp.arange(ids.size)
    )
    zeros = jnp.zeros((rows, width), dtype)
    return zeros.at[place].set(sums.reshape(-1, width), mode="drop", unique_indices=True)


def _product(left: Array, right: Array, dtype: Dtype) -> Array:
    return jnp.matmul(
        left, right, precision=jax.lax.Precision.HIGHEST, preferred_element_type=dtype
    )
