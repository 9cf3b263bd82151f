"""Losses on logits: knowledge distillation's own."""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxbrewer.losses.shapes import (
    check_candidates,
    check_logits,
)

from .means import Scalar, as_selection, floats, log_softmax, mean, mean_square, softmax


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
    return mean(-jnp.sum(softmax(T) * log_softmax(S), axis=-1), selected)


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
    return mean_square(S - T, selected)


def kd_bce_loss(
    logits_S: Float[Array, "*positions classes"],
    logits_T: Float[Array, "*positions classes"],
    temperature: float | Float[Array, "*positions"] = 1,
    mask: Shaped[Array, "*positions"] | None = None,
) -> Scalar:
    r"""Binary cross-entropy of each class under the teacher's: labels that do not exclude each other.

    .. math:: \operatorname{mean}_{i,c} -p_T \log p_S - (1 - p_T) \log(1 - p_S),
        \quad p(i, c) = \sigma(z(i, c) / t_i)

    There is no factor :math:`t^2`. ``temperature`` is one number or one per position. ``mask``
    selects: the mean runs over all classes of the positions where it is not 0. It is torch's
    ``binary_cross_entropy_with_logits`` of the student under the teacher's probabilities;
    TextBrewer has no such loss.

    Raises:
        ValueError: Shapes of logits, temperature and mask do not fit together.
    """
    check_logits("kd_bce_loss", logits_S, logits_T, temperature, mask)
    S, T, selected = _soften(logits_S, logits_T, temperature, mask)
    return mean(jnp.mean(jax.nn.softplus(S) - S * jax.nn.sigmoid(T), axis=-1), selected)


def kd_margin_mse_loss(
    logits_S: Float[Array, "*queries candidates"],
    logits_T: Float[Array, "*queries candidates"],
    temperature: float | Float[Array, "*queries"] = 1,
    mask: Shaped[Array, "*queries"] | None = None,
) -> Scalar:
    r"""Mean squared error between the margins by which the first candidate leads the others.

    .. math:: \operatorname{mean}_{i,\,j \ge 1}
        \left(\frac{(s_{i0} - s_{ij}) - (t_{i0} - t_{ij})}{\tau_i}\right)^2

    ``logits`` are scores of candidates for a query: the relevant one first, then any number of
    others. ``temperature`` divides the scores, as in `kd_mse_loss`: set it to 1 for the paper's
    loss. ``mask`` selects: the mean runs over the queries where it is not 0.

    Hofstätter et al. 2020, `Improving Efficient Neural Ranking Models with Cross-Architecture
    Knowledge Distillation <https://arxiv.org/abs/2010.02666>`_. TextBrewer has no such loss.

    Raises:
        ValueError: Shapes of logits, temperature and mask do not fit together, or there are fewer
            than two candidates.
    """
    check_logits("kd_margin_mse_loss", logits_S, logits_T, temperature, mask)
    check_candidates("kd_margin_mse_loss", logits_S)
    S, T, selected = _soften(logits_S, logits_T, temperature, mask)
    margin_S, margin_T = (scores[..., :1] - scores[..., 1:] for scores in (S, T))
    return mean_square(margin_S - margin_T, selected)


def kd_listwise_kl_loss(
    logits_S: Float[Array, "*queries candidates"],
    logits_T: Float[Array, "*queries candidates"],
    temperature: float | Float[Array, "*queries"] = 1,
    mask: Shaped[Array, "*queries"] | None = None,
    *,
    temperature_T: float | Float[Array, "*queries"] | None = None,
) -> Scalar:
    r"""Kullback–Leibler divergence of the student's distribution over candidates from the teacher's.

    .. math:: \operatorname{mean}_i \tau_i^2 \sum_j p_T(i, j) \log \frac{p_T(i, j)}{p_S(i, j)},
        \quad p_S(i) = \operatorname{softmax}(s_i / \tau_i), \;
        p_T(i) = \operatorname{softmax}(t_i / \tau^T_i)

    ``logits`` are scores of candidates for a query. ``temperature`` is the student's, and the
    teacher's too unless ``temperature_T`` is given; to name one in a config::

        KD_LOSS_MAP["mine"] = functools.partial(kd_listwise_kl_loss, temperature_T=0.5)

    ``mask`` selects: the mean runs over the queries where it is not 0.

    Lin et al. 2020, `Distilling Dense Representations for Ranking using Tightly-Coupled Teachers
    <https://arxiv.org/abs/2010.11386>`_; the two temperatures and the factor are those of
    sentence-transformers' ``DistillKLDivLoss``. TextBrewer has no such loss: ``ce`` is, at one
    temperature and without the factor, the same up to the teacher's entropy.

    Raises:
        ValueError: Shapes of logits, temperatures and mask do not fit together, or there are fewer
            than two candidates.
    """
    check_logits("kd_listwise_kl_loss", logits_S, logits_T, temperature, mask)
    check_candidates("kd_listwise_kl_loss", logits_S)
    if temperature_T is None:
        temperature_T = temperature
    check_logits("kd_listwise_kl_loss", logits_S, logits_T, temperature_T, mask)
    S, _, selected = _soften(logits_S, logits_T, temperature, mask)
    _, T, _ = _soften(logits_S, logits_T, temperature_T, mask)
    each = jnp.sum(softmax(T) * (log_softmax(T) - log_softmax(S)), axis=-1)
    factor = jnp.square(jnp.asarray(temperature, S.dtype))
    if selected is not None and factor.ndim:
        factor = jnp.where(selected != 0, factor, 1)
    return mean(factor * each, selected)


def _soften(
    logits_S: Array, logits_T: Array, temperature: ArrayLike, mask: Array | None
) -> tuple[Array, Array, Array | None]:
    """Both logits over the temperature, and the selection; zeros where nothing is selected."""
    S, T = floats(logits_S, logits_T)
    temperature = jnp.asarray(temperature, S.dtype)
    if temperature.ndim:
        temperature = temperature[..., None]
    if mask is None:
        return S / temperature, T / temperature, None
    selected = as_selection(mask, S)
    here = selected[..., None] != 0
    if temperature.ndim:
        temperature = jnp.where(here, temperature, 1)
    S, T = (jnp.where(here, logits, 0) / temperature for logits in (S, T))
    return S, T, selected
