"""Losses on logits: knowledge distillation's own.

Two options are those of all, as keywords or in a config: ``["kl", {"scale_by_t2": true}]``.

``standardize``
    Each position's logits lose their mean and are divided by their standard deviation before the
    temperature (`Sun et al. 2024 <https://arxiv.org/abs/2403.01427>`_).
``scale_by_t2``
    Each position's loss is multiplied by the square of its temperature, whatever the loss
    (Hinton et al. 2015, section 2). TextBrewer has no such factor.
"""

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Shaped

from jaxbrewer.losses.shapes import (
    check_candidates,
    check_logits,
)

from .means import (
    Scalar,
    as_selection,
    floats,
    log_softmax,
    mean,
    mean_square,
    root,
    softmax,
)


def kd_ce_loss(
    logits_S: Float[Array, "*positions classes"],
    logits_T: Float[Array, "*positions classes"],
    temperature: float | Float[Array, "*positions"] = 1,
    mask: Shaped[Array, "*positions"] | None = None,
    *,
    standardize: bool = False,
    scale_by_t2: bool = False,
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
    S, T, selected = soften(logits_S, logits_T, temperature, mask, standardize)
    each = -jnp.sum(softmax(T) * log_softmax(S), axis=-1)
    return mean(scaled(each, temperature, selected, scale_by_t2), selected)


def kd_mse_loss(
    logits_S: Float[Array, "*positions classes"],
    logits_T: Float[Array, "*positions classes"],
    temperature: float | Float[Array, "*positions"] = 1,
    mask: Shaped[Array, "*positions"] | None = None,
    *,
    standardize: bool = False,
    scale_by_t2: bool = False,
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
    S, T, selected = soften(logits_S, logits_T, temperature, mask, standardize)
    return _mean_square(S - T, temperature, selected, scale_by_t2)


def kd_bce_loss(
    logits_S: Float[Array, "*positions classes"],
    logits_T: Float[Array, "*positions classes"],
    temperature: float | Float[Array, "*positions"] = 1,
    mask: Shaped[Array, "*positions"] | None = None,
    *,
    standardize: bool = False,
    scale_by_t2: bool = False,
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
    S, T, selected = soften(logits_S, logits_T, temperature, mask, standardize)
    each = jnp.mean(jax.nn.softplus(S) - S * jax.nn.sigmoid(T), axis=-1)
    return mean(scaled(each, temperature, selected, scale_by_t2), selected)


def kd_margin_mse_loss(
    logits_S: Float[Array, "*queries candidates"],
    logits_T: Float[Array, "*queries candidates"],
    temperature: float | Float[Array, "*queries"] = 1,
    mask: Shaped[Array, "*queries"] | None = None,
    *,
    standardize: bool = False,
    scale_by_t2: bool = False,
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
    S, T, selected = soften(logits_S, logits_T, temperature, mask, standardize)
    margin_S, margin_T = (scores[..., :1] - scores[..., 1:] for scores in (S, T))
    return _mean_square(margin_S - margin_T, temperature, selected, scale_by_t2)


def kd_listwise_kl_loss(
    logits_S: Float[Array, "*queries candidates"],
    logits_T: Float[Array, "*queries candidates"],
    temperature: float | Float[Array, "*queries"] = 1,
    mask: Shaped[Array, "*queries"] | None = None,
    *,
    temperature_T: float | Float[Array, "*queries"] | None = None,
    standardize: bool = False,
    scale_by_t2: bool = True,
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
    S, _, selected = soften(logits_S, logits_T, temperature, mask, standardize)
    _, T, _ = soften(logits_S, logits_T, temperature_T, mask, standardize)
    each = jnp.sum(softmax(T) * (log_softmax(T) - log_softmax(S)), axis=-1)
    return mean(scaled(each, temperature, selected, scale_by_t2), selected)


# ---------------------------------------------------------------------------- what they share


def soften(
    logits_S: Array,
    logits_T: Array,
    temperature: ArrayLike,
    mask: Array | None,
    standardize: bool = False,
) -> tuple[Array, Array, Array | None]:
    """Both logits over the temperature, and the selection; zeros where nothing is selected.

    With ``standardize`` each position's logits lose their mean and are divided by their standard
    deviation (of a sample, plus 1e-7) first, as in `Logit Standardization in Knowledge
    Distillation <https://arxiv.org/abs/2403.01427>`_; classes at −inf stay there and do not count.
    """
    S, T = floats(logits_S, logits_T)
    temperature = jnp.asarray(temperature, S.dtype)
    if temperature.ndim:
        temperature = temperature[..., None]
    selected = None
    if mask is not None:
        selected = as_selection(mask, S)
        here = selected[..., None] != 0
        if temperature.ndim:
            temperature = jnp.where(here, temperature, 1)
        S, T = (jnp.where(here, logits, 0) for logits in (S, T))
    if standardize:
        S, T = _standard(S), _standard(T)
    return S / temperature, T / temperature, selected


def _standard(logits: Array) -> Array:
    there = logits != -jnp.inf
    count = jnp.sum(there, axis=-1, keepdims=True)
    centred = jnp.where(there, logits, 0)
    centred -= jnp.sum(centred, axis=-1, keepdims=True) / jnp.maximum(count, 1)
    squares = jnp.sum(jnp.where(there, centred**2, 0), axis=-1, keepdims=True)
    deviation = root(squares / jnp.maximum(count - 1, 1))
    return jnp.where(there, centred / (deviation + 1e-7), -jnp.inf)


def scaled(each: Array, temperature: ArrayLike, selected: Array | None, is_wanted: bool) -> Array:
    """The positions' losses times the square of their temperatures, if that is wanted.

    Gradients of a softmax over the temperature are as small as the inverse of that square (Hinton
    et al. 2015, section 2), so with it they keep their size beside the hard labels'.
    """
    if not is_wanted:
        return each
    factor = jnp.square(jnp.asarray(temperature, each.dtype))
    if selected is not None and factor.ndim:
        factor = jnp.where(selected != 0, factor, 1)
    return factor * each


def _mean_square(
    difference: Array, temperature: ArrayLike, selected: Array | None, scale_by_t2: bool
) -> Array:
    if scale_by_t2:
        factor = scaled(
            jnp.ones(difference.shape[:-1], difference.dtype), temperature, selected, True
        )
        difference = difference * jnp.sqrt(factor)[..., None]
    return mean_square(difference, selected)
