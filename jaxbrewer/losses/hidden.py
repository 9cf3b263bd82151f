"""Pure losses between a student's and a teacher's outputs: arrays, and a mask, in; a scalar out.

Rules that hold for every function here:

- Half precision is computed, and returned, in float32; float64 stays float64.
- ``mask`` may have any dtype. Each docstring says whether its values are weights or only select
  (nonzero is selected). A mask that selects nothing gives 0 with zero gradients, where
  TextBrewer gives NaN.
- What stands at masked positions does not count, not even NaN, with two exceptions:
  ``fsp_loss`` and ``mmd_loss`` want it finite, and the attention cross-entropies take the softmax
  over all keys, masked ones too (where scores are usually very low).
- Shapes are checked before anything is computed; a :class:`ValueError` names both shapes and the
  fix.

Values and gradients are those of `TextBrewer <https://arxiv.org/abs/2002.12620>`_ unless a
docstring says otherwise.
"""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxbrewer.losses.shapes import (
    check_attention,
    check_layers,
    check_logits,
    check_same,
    check_states,
    shape_of,
)

__all__ = [
    "kd_ce_loss",
    "kd_mse_loss",
    "att_mse_loss",
    "att_mse_sum_loss",
    "att_ce_loss",
    "att_ce_mean_loss",
    "hid_mse_loss",
    "cos_loss",
    "pkd_loss",
    "fsp_loss",
    "mmd_loss",
]

Scalar = Float[Array, ""]

# Raw attention scores at or below this are taken for padding when no mask says so.
_PADDED_SCORE = -1e-3
# What torch adds to both squared norms of a cosine: 1e-12 as a float32, in double precision too.
_COSINE_EPSILON = 9.999999960041972e-13


def kd_ce_loss(
    logits_S: Float[Array, "*positions classes"],
    logits_T: Float[Array, "*positions classes"],
    temperature: float | Float[Array, "*positions"] = 1,
    mask: Shaped[Array, "*positions"] | None = None,
) -> Scalar:
    r"""Cross-entropy of the student's softened predictions under the teacher's.

    .. math:: \operatorname{mean}_i -\sum_c p_T(i, c) \log p_S(i, c),
        \quad p(i) = \operatorname{softmax}(z(i) / t_i)

    There is no factor :math:`t^2`. ``temperature`` is one number or one per position.
    ``mask`` selects: the mean runs over positions where it is not 0.

    Hinton et al. 2015, `Distilling the Knowledge in a Neural Network
    <https://arxiv.org/abs/1503.02531>`_. TextBrewer's function takes no mask; it selects before.

    Raises:
        ValueError: Shapes of logits, temperature and mask do not fit together.
    """
    check_logits("kd_ce_loss", logits_S, logits_T, temperature, mask)
    S, T, selected = _soften(logits_S, logits_T, temperature, mask)
    return _mean(-jnp.sum(_softmax(T) * _log_softmax(S), axis=-1), selected)


def kd_mse_loss(
    logits_S: Float[Array, "*positions classes"],
    logits_T: Float[Array, "*positions classes"],
    temperature: float | Float[Array, "*positions"] = 1,
    mask: Shaped[Array, "*positions"] | None = None,
) -> Scalar:
    r"""Mean squared error between logits, both divided by the temperature.

    .. math:: \operatorname{mean}_{i,c} \left(\frac{z_S(i, c) - z_T(i, c)}{t_i}\right)^2

    ``temperature`` is one number or one per position. ``mask`` selects: the mean runs over all
    classes of the positions where it is not 0.

    Ba & Caruana 2014, `Do Deep Nets Really Need to be Deep? <https://arxiv.org/abs/1312.6184>`_.
    TextBrewer's function takes no mask; it selects before.

    Raises:
        ValueError: Shapes of logits, temperature and mask do not fit together.
    """
    check_logits("kd_mse_loss", logits_S, logits_T, temperature, mask)
    S, T, selected = _soften(logits_S, logits_T, temperature, mask)
    return _mean_square(S - T, selected)


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
    S, T = _floats(attention_S, attention_T)
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
    S, T = _floats(attention_S, attention_T)
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
    S, T = _floats(attention_S, attention_T)
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
    S, T = _floats(attention_S, attention_T)
    return _attention_ce(_over_heads(jnp.mean, S), _over_heads(jnp.mean, T), mask)


def hid_mse_loss(
    state_S: Float[Array, "*positions width"],
    state_T: Float[Array, "*positions width"],
    mask: Shaped[Array, "*positions"] | None = None,
) -> Scalar:
    r"""Mean squared error between hidden states, usually (batch, length, width).

    .. math:: \frac{\sum_{i,d} m_i (S_{id} - T_{id})^2}{D \sum_i m_i}

    ``mask`` weights positions.

    Romero et al. 2015, `FitNets <https://arxiv.org/abs/1412.6550>`_.

    Raises:
        ValueError: The states' shapes differ, or the mask's is not that of the positions.
    """
    check_states("hid_mse_loss", state_S, state_T, mask)
    S, T = _floats(state_S, state_T)
    return _mean_square(S - T, None if mask is None else _as_weights(mask, S))


def cos_loss(
    state_S: Float[Array, "*positions width"],
    state_T: Float[Array, "*positions width"],
    mask: Shaped[Array, "*positions"] | None = None,
) -> Scalar:
    r"""One minus the cosine between hidden states, usually (batch, length, width).

    .. math:: \operatorname{mean}_i \left(1 - \frac{S_i \cdot T_i}
        {\sqrt{|S_i|^2 + \epsilon} \sqrt{|T_i|^2 + \epsilon}}\right), \quad \epsilon = 10^{-12}

    ``mask`` selects: the mean runs over positions where it is not 0. The ε is torch's; with it
    a zero vector has cosine 0 and a finite gradient.

    Sanh et al. 2019, `DistilBERT <https://arxiv.org/abs/1910.01108>`_.

    Raises:
        ValueError: The states' shapes differ, or the mask's is not that of the positions.
    """
    check_states("cos_loss", state_S, state_T, mask)
    S, T = _floats(state_S, state_T)
    selected = None if mask is None else _as_selection(mask, S)
    if selected is not None:
        S, T = (jnp.where(selected[..., None] != 0, state, 0) for state in (S, T))
    lengths = [jnp.sqrt(jnp.sum(jnp.square(x), axis=-1) + _COSINE_EPSILON) for x in (S, T)]
    return _mean(1 - jnp.sum(S * T, axis=-1) / (lengths[0] * lengths[1]), selected)


def pkd_loss(
    state_S: Float[Array, "batch *length_S width"],
    state_T: Float[Array, "batch *length_T width"],
    mask: Shaped[Array, "..."] | None = None,
) -> Scalar:
    r"""Squared distance between the unit vectors of the first positions' hidden states.

    .. math:: \operatorname{mean}_b \left| \frac{S_{b0}}{|S_{b0}|} -
        \frac{T_{b0}}{|T_{b0}|} \right|^2

    Each side is (batch, length, width), of which position 0 is taken, or (batch, width).
    ``mask`` has no effect: the first position is never padding. A zero vector stays zero, with a
    zero gradient, where TextBrewer gives NaN.

    Sun et al. 2019, `Patient Knowledge Distillation for BERT Model Compression
    <https://arxiv.org/abs/1908.09355>`_.

    Raises:
        ValueError: Batch or widths differ, or a rank other than 2 or 3.
    """
    del mask
    firsts = []
    for name, state in (("state_S", state_S), ("state_T", state_T)):
        shape = shape_of("pkd_loss", name, state)
        if len(shape) not in (2, 3):
            raise ValueError(
                f"pkd_loss: {name} has shape {shape}; expected (batch, length, width), or "
                "(batch, width) for the first positions alone."
            )
        firsts.append(state[:, 0] if len(shape) == 3 else state)
    check_same("pkd_loss", "state", firsts[0].shape, firsts[1].shape, ("batch", "width"))
    S, T = _floats(*firsts)
    return jnp.mean(jnp.sum(jnp.square(_unit(S) - _unit(T)), axis=-1))


def fsp_loss(
    state_S: Sequence[Float[Array, "batch length_S _"]],
    state_T: Sequence[Float[Array, "batch length_T _"]],
    mask: Shaped[Array, "batch length"] | None = None,
) -> Scalar:
    r"""Mean squared error between the two sides' Gram matrices over features (``gram``, ``fsp``).

    .. math:: \operatorname{mean}_{b,d,e} \left(G^S_{bde} - G^T_{bde}\right)^2, \quad
        G_{bde} = \frac{\sum_i m_{bi}^2 X^0_{bid} X^1_{bie}}{\sum_i m_{bi}}

    Each side is a list of two layers (X⁰, X¹), each (batch, length, width); widths agree between
    the sides. ``mask`` weights both layers, hence the square; an example without any unmasked
    position counts as G = 0. Without a mask the two sides may differ in length.

    Yim et al. 2017, `A Gift from Knowledge Distillation (CVPR)
    <https://openaccess.thecvf.com/content_cvpr_2017/papers/Yim_A_Gift_From_CVPR_2017_paper.pdf>`_.

    Raises:
        ValueError: Not two lists of two 3-D arrays, or shapes that do not fit together.
    """
    shapes_S, shapes_T = check_layers("fsp_loss", state_S, state_T, mask)
    for i, (shape_S, shape_T) in enumerate(zip(shapes_S, shapes_T, strict=True)):
        name = f"layer {i} of state"
        check_same("fsp_loss", name, shape_S[::2], shape_T[::2], ("batch", "width"))
    S0, S1, T0, T1 = _floats(*state_S, *state_T)
    weights = None if mask is None else _as_weights(mask, S0)[..., None]
    difference = _feature_gram(S0, S1, weights) - _feature_gram(T0, T1, weights)
    return jnp.mean(jnp.square(difference))


def mmd_loss(
    state_S: Sequence[Float[Array, "batch length width_S"]],
    state_T: Sequence[Float[Array, "batch length width_T"]],
    mask: Shaped[Array, "batch length"] | None = None,
) -> Scalar:
    r"""Mean squared error between the two sides' Gram matrices over positions (``mmd``, ``nst``).

    .. math:: \frac{\sum_{b,i,j} m_{bi} m_{bj} (G^S_{bij} - G^T_{bij})^2}
        {\sum_b (\sum_i m_{bi})^2}, \quad G_{bij} = \frac{1}{D} \sum_d X^0_{bid} X^1_{bjd}

    Each side is a list of two layers (X⁰, X¹), each (batch, length, width); the sides' widths D
    may differ, so no projection is needed. ``mask`` weights pairs of positions.

    Each Gram matrix is divided by its own width, with and without a mask, as in TextBrewer's
    repository; its package 0.2.1.post1 divides the masked ones by the length.

    Huang & Wang 2017, `Like What You Like: Knowledge Distill via Neuron Selectivity Transfer
    <https://arxiv.org/abs/1707.01219>`_.

    Raises:
        ValueError: Not two lists of two 3-D arrays, or shapes that do not fit together.
    """
    shapes_S, shapes_T = check_layers("mmd_loss", state_S, state_T, mask)
    for name, shapes in (("state_S", shapes_S), ("state_T", shapes_T)):
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"mmd_loss: the two layers of {name} have shapes {shapes[0]} and {shapes[1]}; "
                "expected one shape. Pick two layers of one width."
            )
    check_same("mmd_loss", "state", shapes_S[0][:2], shapes_T[0][:2], ("batch", "length"))
    S0, S1, T0, T1 = _floats(*state_S, *state_T)
    gram_S = _einsum("bid,bjd->bij", S0, S1) / S0.shape[-1]
    gram_T = _einsum("bid,bjd->bij", T0, T1) / T0.shape[-1]
    return _mean_square_of_pairs(gram_S - gram_T, mask)


# --- Sums and means -------------------------------------------------------------------------------


def _floats(*values: ArrayLike) -> list[Array]:
    """The values in their common dtype, which is at least float32."""
    dtype = jnp.promote_types(jnp.result_type(*values), jnp.float32)
    return [jnp.asarray(value, dtype) for value in values]


def _as_weights(mask: ArrayLike, like: Array) -> Array:
    return jnp.asarray(mask, like.dtype)


def _as_selection(mask: ArrayLike, like: Array) -> Array:
    """Weights of 1 where the mask is not 0."""
    return jnp.asarray(jnp.asarray(mask) != 0, like.dtype)


def _queries_and_keys(mask: Array, pairs: Array) -> tuple[Array, Array]:
    """The mask along the query axis, and along the key axis, of (batch, *heads, query, key)."""
    mask = jnp.expand_dims(mask, range(1, pairs.ndim - 2))
    return mask[..., :, None], mask[..., None, :]


def _ratio(total: Array, count: Array) -> Array:
    """``total / count``, and ``total`` (which is then 0) where nothing was counted."""
    return total / jnp.where(count == 0, 1, count)


def _mean(values: Array, weights: Array | None) -> Array:
    if weights is None:
        return jnp.mean(values)
    return _ratio(jnp.sum(values * weights), jnp.sum(weights))


def _mean_square(difference: Array, weights: Array | None) -> Array:
    """Mean of squares over positions, which ``weights`` are for, and the last axis."""
    if weights is None:
        return jnp.mean(jnp.square(difference))
    weight = weights[..., None]
    # Selected before the square, so that anything under the mask has a zero gradient.
    square = jnp.square(jnp.where(weight != 0, difference, 0))
    return _ratio(jnp.sum(weight * square), difference.shape[-1] * jnp.sum(weights))


def _mean_square_of_pairs(difference: Array, mask: Array | None) -> Array:
    """Mean of squares over (batch, *heads, query, key); a pair weighs its weights' product."""
    if mask is None:
        return jnp.mean(jnp.square(difference))
    mask = _as_weights(mask, difference)
    query, key = _queries_and_keys(mask, difference)
    total = jnp.sum(query * key * jnp.square(difference))
    heads = difference.size // (mask.size * mask.shape[1])
    return _ratio(total, heads * jnp.sum(jnp.square(jnp.sum(mask, axis=1))))


def _einsum(formula: str, x: Array, y: Array) -> Array:
    """A product that stays in float32 on hardware that would round its factors (TF32, bfloat16)."""
    return jnp.einsum(formula, x, y, precision=jax.lax.Precision.HIGHEST)


def _feature_gram(x: Array, y: Array, weights: Array | None) -> Array:
    """Products of features, (batch, width, width), averaged over the length."""
    if weights is None:
        return _einsum("bid,bie->bde", x, y) / x.shape[1]
    count = jnp.sum(weights, axis=1, keepdims=True)
    return _ratio(_einsum("bid,bie->bde", x * jnp.square(weights), y), count)


def _unit(x: Array) -> Array:
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return jnp.where(square > 0, x / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


# --- Softmax, temperature, attention --------------------------------------------------------------


def _finite(scores: Array) -> Array:
    """−inf as the lowest number, since 0 probability times −inf is NaN."""
    return jnp.where(scores == -jnp.inf, jnp.finfo(scores.dtype).min, scores)


def _softmax(scores: Array) -> Array:
    return jax.nn.softmax(_finite(scores), axis=-1)


def _log_softmax(scores: Array) -> Array:
    return jax.nn.log_softmax(_finite(scores), axis=-1)


def _soften(
    logits_S: Array, logits_T: Array, temperature: ArrayLike, mask: Array | None
) -> tuple[Array, Array, Array | None]:
    """Both logits over the temperature, and the selection; zeros where nothing is selected."""
    S, T = _floats(logits_S, logits_T)
    temperature = jnp.asarray(temperature, S.dtype)
    if temperature.ndim:
        temperature = temperature[..., None]
    if mask is None:
        return S / temperature, T / temperature, None
    selected = _as_selection(mask, S)
    here = selected[..., None] != 0
    if temperature.ndim:
        temperature = jnp.where(here, temperature, 1)
    S, T = (jnp.where(here, logits, 0) / temperature for logits in (S, T))
    return S, T, selected


def _over_heads(reduce: Callable[..., Array], attention: Array) -> Array:
    """One head, (batch, 1, length, length), for all: their sum or mean, or the one there is."""
    return reduce(attention, axis=1, keepdims=True) if attention.ndim == 4 else attention[:, None]


def _attention_mse(S: Array, T: Array, mask: Array | None) -> Array:
    if mask is None:
        S, T = (jnp.where(scores <= _PADDED_SCORE, 0, scores) for scores in (S, T))
        return _mean_square_of_pairs(S - T, None)
    query, key = _queries_and_keys(_as_weights(mask, S), S)
    # Padded keys hold very low scores; two sides' need not be alike.
    difference = jnp.where((query != 0) & (key != 0), S - T, 0)
    return _mean_square_of_pairs(difference, mask)


def _attention_ce(S: Array, T: Array, mask: Array | None) -> Array:
    if mask is None:
        probs_T = jnp.where(T <= _PADDED_SCORE, 0, _softmax(T))
        return _mean(-jnp.sum(probs_T * _log_softmax(S), axis=-1), None)
    mask = _as_weights(mask, S)
    query, key = _queries_and_keys(mask, S)
    # Rows of masked queries may hold anything: they must not reach the softmax.
    S, T = (jnp.where(query != 0, scores, 0) for scores in (S, T))
    total = -jnp.sum(query * key * _softmax(T) * _log_softmax(S))
    return _ratio(total, S.shape[1] * jnp.sum(mask))
