"""Losses on attention maps."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxbrewer.losses.shapes import (
    check_attention,
)

from .means import (
    Scalar,
    as_weights,
    floats,
    log_softmax,
    mean,
    mean_square_of_pairs,
    queries_and_keys,
    ratio,
    softmax,
)

# Raw attention scores at or below this are taken for padding when no mask says so.
_PADDED_SCORE = -1e-3


def att_mse_loss(
    attention_S: Float[Array, "batch heads length length"],
    attention_T: Float[Array, "batch heads length length"],
    mask: Shaped[Array, "batch length"] | None = None,
) -> Scalar:
    r"""Mean squared error between attention scores, head by head.

    .. math:: \frac{\sum_{b,h,i,j} m_{bi} m_{bj} (S_{bhij} - T_{bhij})^2}
        {H \sum_b (\sum_i m_{bi})^2}

    ``mask`` weights queries and keys. Without one, scores ≤ −0.001 are taken as 0 on both sides
    (padding, in raw scores) and the mean runs over every pair.

    Jiao et al. 2020, `TinyBERT <https://arxiv.org/abs/1909.10351>`_.

    Raises:
        ValueError: Not two 4-D arrays of one shape, or a mask that is not (batch, length).
    """
    check_attention("att_mse_loss", attention_S, attention_T, mask, heads_reduced=False)
    S, T = floats(attention_S, attention_T)
    return _attention_mse(S, T, mask)


def att_mse_sum_loss(
    attention_S: Float[Array, "batch *heads_S length length"],
    attention_T: Float[Array, "batch *heads_T length length"],
    mask: Shaped[Array, "batch length"] | None = None,
) -> Scalar:
    r"""Mean squared error between attention scores summed over the heads.

    .. math:: \frac{\sum_{b,i,j} m_{bi} m_{bj} (\sum_h S_{bhij} - \sum_h T_{bhij})^2}
        {\sum_b (\sum_i m_{bi})^2}

    Each side is 4-D with heads of its own number, or 3-D without. ``mask`` weights queries and
    keys. Without one, sums ≤ −0.001 are taken as 0 on both sides.

    Raises:
        ValueError: Batch and lengths differ, another rank, or a mask that is not (batch, length).
    """
    check_attention("att_mse_sum_loss", attention_S, attention_T, mask, heads_reduced=True)
    S, T = floats(attention_S, attention_T)
    return _attention_mse(_over_heads(jnp.sum, S), _over_heads(jnp.sum, T), mask)


def att_ce_loss(
    attention_S: Float[Array, "batch heads length length"],
    attention_T: Float[Array, "batch heads length length"],
    mask: Shaped[Array, "batch length"] | None = None,
) -> Scalar:
    r"""Cross-entropy between attention distributions (softmax of the scores), head by head.

    .. math:: \frac{-\sum_{b,h,i} m_{bi} \sum_j m_{bj} p_T(b,h,i,j) \log p_S(b,h,i,j)}
        {H \sum_{b,i} m_{bi}}

    ``mask`` weights queries and keys, after the softmax over all keys. Without one, the teacher's
    probabilities where its score is ≤ −0.001 are taken as 0 and the mean runs over every query.
    A score of −inf counts as the dtype's lowest number, where TextBrewer may give NaN.

    Raises:
        ValueError: Not two 4-D arrays of one shape, or a mask that is not (batch, length).
    """
    check_attention("att_ce_loss", attention_S, attention_T, mask, heads_reduced=False)
    S, T = floats(attention_S, attention_T)
    return _attention_ce(S, T, mask)


def att_ce_mean_loss(
    attention_S: Float[Array, "batch *heads_S length length"],
    attention_T: Float[Array, "batch *heads_T length length"],
    mask: Shaped[Array, "batch length"] | None = None,
) -> Scalar:
    r"""Cross-entropy between the softmaxes of attention scores averaged over the heads.

    .. math:: \frac{-\sum_{b,i} m_{bi} \sum_j m_{bj} p_T(b,i,j) \log p_S(b,i,j)}
        {\sum_{b,i} m_{bi}}

    Each side is 4-D with heads of its own number, or 3-D without. ``mask`` and −inf as in
    :func:`att_ce_loss`.

    Raises:
        ValueError: Batch and lengths differ, another rank, or a mask that is not (batch, length).
    """
    check_attention("att_ce_mean_loss", attention_S, attention_T, mask, heads_reduced=True)
    S, T = floats(attention_S, attention_T)
    return _attention_ce(_over_heads(jnp.mean, S), _over_heads(jnp.mean, T), mask)


def _over_heads(reduce: Callable[..., Array], attention: Array) -> Array:
    """One head, (batch, 1, length, length), for all: their sum or mean, or the one there is."""
    return reduce(attention, axis=1, keepdims=True) if attention.ndim == 4 else attention[:, None]


def _attention_mse(S: Array, T: Array, mask: Array | None) -> Array:
    if mask is None:
        S, T = (jnp.where(scores <= _PADDED_SCORE, 0, scores) for scores in (S, T))
        return mean_square_of_pairs(S - T, None)
    query, key = queries_and_keys(as_weights(mask, S), S)
    # Padded keys hold very low scores; two sides' need not be alike.
    difference = jnp.where((query != 0) & (key != 0), S - T, 0)
    return mean_square_of_pairs(difference, mask)


def _attention_ce(S: Array, T: Array, mask: Array | None) -> Array:
    if mask is None:
        probs_T = jnp.where(T <= _PADDED_SCORE, 0, softmax(T))
        return mean(-jnp.sum(probs_T * log_softmax(S), axis=-1), None)
    mask = as_weights(mask, S)
    query, key = queries_and_keys(mask, S)
    # Rows of masked queries may hold anything: they must not reach the softmax.
    S, T = (jnp.where(query != 0, scores, 0) for scores in (S, T))
    total = -jnp.sum(query * key * softmax(T) * log_softmax(S))
    return ratio(total, S.shape[1] * jnp.sum(mask))
