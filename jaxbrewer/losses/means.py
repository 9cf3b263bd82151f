"""Masked means, sums of products and softmaxes: what the losses are made of."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float

Scalar = Float[Array, ""]


def floats(*values: ArrayLike) -> list[Array]:
    """The values in their common dtype, which is at least float32."""
    dtype = jnp.promote_types(jnp.result_type(*values), jnp.float32)
    return [jnp.asarray(value, dtype) for value in values]


def as_weights(mask: ArrayLike, like: Array) -> Array:
    """The mask's values in the type of ``like``."""
    return jnp.asarray(mask, like.dtype)


def as_selection(mask: ArrayLike, like: Array) -> Array:
    """Weights of 1 where the mask is not 0."""
    return jnp.asarray(jnp.asarray(mask) != 0, like.dtype)


def queries_and_keys(mask: Array, pairs: Array) -> tuple[Array, Array]:
    """The mask along the query axis, and along the key axis, of (batch, *heads, query, key)."""
    mask = jnp.expand_dims(mask, range(1, pairs.ndim - 2))
    return mask[..., :, None], mask[..., None, :]


def ratio(total: Array, count: Array) -> Array:
    """``total / count``, and ``total`` (which is then 0) where nothing was counted."""
    return total / jnp.where(count == 0, 1, count)


def root(squares: Array) -> Array:
    """The square root, with a gradient of 0 at 0 where the root's own is infinite."""
    return jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1)), 0)


def mean(values: Array, weights: Array | None) -> Array:
    """The weighted mean of all values."""
    if weights is None:
        return jnp.mean(values)
    return ratio(jnp.sum(values * weights), jnp.sum(weights))


def mean_square(difference: Array, weights: Array | None) -> Array:
    """Mean of squares over positions, which ``weights`` are for, and the last axis."""
    if weights is None:
        return jnp.mean(jnp.square(difference))
    weight = weights[..., None]
    # Selected before the square, so that anything under the mask has a zero gradient.
    square = jnp.square(jnp.where(weight != 0, difference, 0))
    return ratio(jnp.sum(weight * square), difference.shape[-1] * jnp.sum(weights))


def mean_square_of_pairs(difference: Array, mask: Array | None) -> Array:
    """Mean of squares over (batch, *heads, query, key); a pair weighs its weights' product."""
    if mask is None:
        return jnp.mean(jnp.square(difference))
    mask = as_weights(mask, difference)
    query, key = queries_and_keys(mask, difference)
    total = jnp.sum(query * key * jnp.square(difference))
    heads = difference.size // (mask.size * mask.shape[1])
    return ratio(total, heads * jnp.sum(jnp.square(jnp.sum(mask, axis=1))))


def einsum(formula: str, x: Array, y: Array) -> Array:
    """A product that stays in float32 on hardware that would round its factors (TF32, bfloat16)."""
    return jnp.einsum(formula, x, y, precision=jax.lax.Precision.HIGHEST)


def finite(scores: Array) -> Array:
    """−inf as the lowest number, since 0 probability times −inf is NaN."""
    return jnp.where(scores == -jnp.inf, jnp.finfo(scores.dtype).min, scores)


def softmax(scores: Array) -> Array:
    """Over the last axis; −inf is let in."""
    return jax.nn.softmax(finite(scores), axis=-1)


def log_softmax(scores: Array) -> Array:
    """Over the last axis; −inf is let in."""
    return jax.nn.log_softmax(finite(scores), axis=-1)
