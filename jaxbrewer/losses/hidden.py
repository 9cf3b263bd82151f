"""Losses on hidden states."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxbrewer.losses.shapes import (
    check_layers,
    check_same,
    check_states,
    shape_of,
)

from .means import (
    Scalar,
    as_selection,
    as_weights,
    einsum,
    floats,
    mean,
    mean_square,
    mean_square_of_pairs,
    ratio,
)

# What torch adds to both squared norms of a cosine: 1e-12 as a float32, in double precision too.
_COSINE_EPSILON = 9.999999960041972e-13


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
    S, T = floats(state_S, state_T)
    return mean_square(S - T, None if mask is None else as_weights(mask, S))


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
    S, T = floats(state_S, state_T)
    selected = None if mask is None else as_selection(mask, S)
    if selected is not None:
        S, T = (jnp.where(selected[..., None] != 0, state, 0) for state in (S, T))
    lengths = [jnp.sqrt(jnp.sum(jnp.square(x), axis=-1) + _COSINE_EPSILON) for x in (S, T)]
    return mean(1 - jnp.sum(S * T, axis=-1) / (lengths[0] * lengths[1]), selected)


def l2_loss(
    state_S: Float[Array, "*positions width"],
    state_T: Float[Array, "*positions width"],
    mask: Shaped[Array, "*positions"] | None = None,
) -> Scalar:
    r"""Euclidean distance between hidden states, or between embeddings (batch, width).

    .. math:: \operatorname{mean}_i \left|S_i - T_i\right|

    ``mask`` selects: the mean runs over positions where it is not 0. Where both sides are equal the
    gradient is 0, as torch's ``norm`` has it.

    Kim et al. 2023, `EmbedDistill <https://arxiv.org/abs/2301.12005>`_. TextBrewer has no such loss.

    Raises:
        ValueError: The states' shapes differ, or the mask's is not that of the positions.
    """
    check_states("l2_loss", state_S, state_T, mask)
    S, T = floats(state_S, state_T)
    difference = S - T
    selected = None if mask is None else as_selection(mask, S)
    if selected is not None:
        difference = jnp.where(selected[..., None] != 0, difference, 0)
    square = jnp.sum(jnp.square(difference), axis=-1)
    return mean(jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0), selected)


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
    S, T = floats(*firsts)
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
    S0, S1, T0, T1 = floats(*state_S, *state_T)
    weights = None if mask is None else as_weights(mask, S0)[..., None]
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
    S0, S1, T0, T1 = floats(*state_S, *state_T)
    gram_S = einsum("bid,bjd->bij", S0, S1) / S0.shape[-1]
    gram_T = einsum("bid,bjd->bij", T0, T1) / T0.shape[-1]
    return mean_square_of_pairs(gram_S - gram_T, mask)


# --- Sums and means -------------------------------------------------------------------------------


def _feature_gram(x: Array, y: Array, weights: Array | None) -> Array:
    """Products of features, (batch, width, width), averaged over the length."""
    if weights is None:
        return einsum("bid,bie->bde", x, y) / x.shape[1]
    count = jnp.sum(weights, axis=1, keepdims=True)
    return ratio(einsum("bid,bie->bde", x * jnp.square(weights), y), count)


def _unit(x: Array) -> Array:
    square = jnp.sum(jnp.square(x), axis=-1, keepdims=True)
    return jnp.where(square > 0, x / jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


# --- Softmax, temperature, attention --------------------------------------------------------------
