"""Losses on attention maps, and on what they are made of."""

from collections.abc import Callable

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxbrewer.losses.shapes import check_attention, check_relations

from .means import (
    Scalar,
    as_selection,
    as_weights,
    einsum,
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


def relation_loss(
    vectors_S: Float[Array, "batch *heads_S length width_S"],
    vectors_T: Float[Array, "batch *heads_T length width_T"],
    mask: Shaped[Array, "batch length"] | None = None,
    *,
    heads: int | None = None,
) -> Scalar:
    r"""Kullback-Leibler divergence of the student's relations between positions from the teacher's.

    .. math:: \operatorname{mean}_{b,a,i} \sum_j R^T_{baij} \log \frac{R^T_{baij}}{R^S_{baij}}, \quad
        R_{ba} = \operatorname{softmax}\left(\frac{A_{ba} A_{ba}^\top}{\sqrt{d}}\right)

    Each side is the queries, the keys or the values of a layer, (batch, heads, length, width of a
    head), or (batch, length, width) with the heads beside each other. They are cut anew into as many
    relation heads on both sides, of d numbers each: ``heads``, by default as many as the teacher has.
    So widths and numbers of heads may differ. Other numbers of relation heads are registered:
    ``MATCH_LOSS_MAP['relation48'] = functools.partial(relation_loss, heads=48)``.

    ``mask`` selects, positions as queries and as keys: the mean runs over queries where it is not 0,
    each softmax over keys where it is not 0.

    Wang et al. 2020, `MiniLMv2 <https://arxiv.org/abs/2012.15828>`_, which adds up the losses of
    queries, keys and values of the last layer, or for a large teacher of one before. TextBrewer has
    no such loss.

    Raises:
        ValueError: Batch and lengths differ, another rank, a mask that is not (batch, length), or a
            number of relation heads that does not divide both widths, or is not known.
    """
    count = check_relations("relation_loss", vectors_S, vectors_T, mask, heads)
    S, T = floats(vectors_S, vectors_T)
    selected = None if mask is None else as_selection(mask, S)
    log_S, log_T = (_log_relations(vectors, count, selected) for vectors in (S, T))
    divergence = jnp.sum(jnp.exp(log_T) * (log_T - log_S), axis=-1)
    if selected is None:
        return mean(divergence, None)
    return mean(divergence, jnp.broadcast_to(selected[:, None], divergence.shape))


def _log_relations(
    vectors: Array, heads: int, selected: Array | None
) -> Float[Array, "batch heads length length"]:
    """The logarithms of the relations; of a key that is not selected, the lowest number there is."""
    if vectors.ndim == 4:
        vectors = jnp.swapaxes(vectors, 1, 2)
    vectors = vectors.reshape(*vectors.shape[:2], -1)
    if selected is not None:
        vectors = jnp.where(selected[..., None] != 0, vectors, 0)
    vectors = jnp.swapaxes(vectors.reshape(*vectors.shape[:2], heads, -1), 1, 2)
    scores = einsum("baid,bajd->baij", vectors, vectors) / vectors.shape[-1] ** 0.5
    if selected is not None:
        scores = jnp.where(selected[:, None, None] != 0, scores, -jnp.inf)
    return log_softmax(scores)


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
