"""Losses on logits beside TextBrewer's: other divergences between the two sides' distributions.

Throughout, :math:`p = \\operatorname{softmax}(z_T / \\tau)` is the teacher's distribution over the
classes of a position and :math:`q = \\operatorname{softmax}(z_S / \\tau)` the student's. The options
``standardize`` and ``scale_by_t2`` are those of `jaxbrewer.losses.logits`. A class at −inf on both
sides does not count (to ``dist`` it is one that does not vary); one at −inf on one side only makes
infinite what the formula makes infinite, as the largest number there is.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Shaped

from jaxbrewer.losses.shapes import check_classes, check_labels, check_logits, check_part

from .logits import scaled, soften
from .means import Scalar, finite, log_softmax, mean, ratio, root, softmax

Logits = Float[Array, "*positions classes"]
Temperature = float | Float[Array, "*positions"]
Mask = Shaped[Array, "*positions"] | None


def kd_kl_loss(
    logits_S: Logits,
    logits_T: Logits,
    temperature: Temperature = 1,
    mask: Mask = None,
    *,
    standardize: bool = False,
    scale_by_t2: bool = False,
) -> Scalar:
    r"""Kullback–Leibler divergence of the student's distribution from the teacher's.

    .. math:: \operatorname{mean}_i \sum_c p \, (\log p - \log q)

    It is ``ce`` less the teacher's entropy: the same gradient, and 0 where both sides agree.
    ``mask`` selects: the mean runs over positions where it is not 0.

    Hinton et al. 2015, `Distilling the Knowledge in a Neural Network
    <https://arxiv.org/abs/1503.02531>`_.

    Raises:
        ValueError: Shapes of logits, temperature and mask do not fit together.
    """
    check_logits("kd_kl_loss", logits_S, logits_T, temperature, mask)
    S, T, selected = soften(logits_S, logits_T, temperature, mask, standardize)
    each = _kl(log_softmax(T), log_softmax(S))
    return mean(scaled(each, temperature, selected, scale_by_t2), selected)


def kd_reverse_kl_loss(
    logits_S: Logits,
    logits_T: Logits,
    temperature: Temperature = 1,
    mask: Mask = None,
    *,
    standardize: bool = False,
    scale_by_t2: bool = False,
) -> Scalar:
    r"""Kullback–Leibler divergence of the teacher's distribution from the student's.

    .. math:: \operatorname{mean}_i \sum_c q \, (\log q - \log p)

    It draws the student to the teacher's modes and lets it leave the rest alone. ``mask`` selects:
    the mean runs over positions where it is not 0.

    Gu et al. 2023, `MiniLLM <https://arxiv.org/abs/2306.08543>`_; here of given data, without the
    paper's sampling from the student.

    Raises:
        ValueError: Shapes of logits, temperature and mask do not fit together.
    """
    check_logits("kd_reverse_kl_loss", logits_S, logits_T, temperature, mask)
    S, T, selected = soften(logits_S, logits_T, temperature, mask, standardize)
    each = _kl(log_softmax(S), log_softmax(T))
    return mean(scaled(each, temperature, selected, scale_by_t2), selected)


def kd_jsd_loss(
    logits_S: Logits,
    logits_T: Logits,
    temperature: Temperature = 1,
    mask: Mask = None,
    *,
    beta: float = 0.5,
    standardize: bool = False,
    scale_by_t2: bool = False,
) -> Scalar:
    r"""Generalised Jensen–Shannon divergence.

    .. math:: \operatorname{mean}_i \beta \operatorname{KL}(p \| m) + (1 - \beta)
        \operatorname{KL}(q \| m), \quad m = \beta p + (1 - \beta) q

    With ``beta`` 0 it is :math:`\operatorname{KL}(p \| q)` and with 1
    :math:`\operatorname{KL}(q \| p)`, as in the paper's own comparison; near both the formula itself
    goes to 0, so these are jumps. Some toolkits count ``beta`` the other way round: at ½ all agree.
    ``mask`` selects: the mean runs over positions where it is not 0.

    Agarwal et al. 2023, `On-Policy Distillation of Language Models
    <https://arxiv.org/abs/2306.13649>`_; here of given data.

    Raises:
        ValueError: Shapes of logits, temperature and mask do not fit together, or ``beta`` is not
            from 0 to 1.
    """
    check_logits("kd_jsd_loss", logits_S, logits_T, temperature, mask)
    check_part("kd_jsd_loss", "beta", beta)
    S, T, selected = soften(logits_S, logits_T, temperature, mask, standardize)
    log_p, log_q = log_softmax(T), log_softmax(S)
    if beta == 0:
        each = _kl(log_p, log_q)
    elif beta == 1:
        each = _kl(log_q, log_p)
    else:
        log_m = _mixed(log_p, log_q, beta)
        each = beta * _kl(log_p, log_m) + (1 - beta) * _kl(log_q, log_m)
    return mean(scaled(each, temperature, selected, scale_by_t2), selected)


def kd_skew_kl_loss(
    logits_S: Logits,
    logits_T: Logits,
    temperature: Temperature = 1,
    mask: Mask = None,
    *,
    alpha: float = 0.1,
    standardize: bool = False,
    scale_by_t2: bool = False,
) -> Scalar:
    r"""Kullback–Leibler divergence of a mixture of both sides from the teacher's distribution.

    .. math:: \operatorname{mean}_i \operatorname{KL}(p \| \alpha p + (1 - \alpha) q)

    With ``alpha`` 0 it is ``kl``. ``mask`` selects: the mean runs over positions where it is not 0.

    Ko et al. 2024, `DistiLLM <https://arxiv.org/abs/2402.03898>`_, whose code leaves out the
    teacher's entropy: the same gradient.

    Raises:
        ValueError: Shapes of logits, temperature and mask do not fit together, or ``alpha`` is not
            from 0 to below 1.
    """
    check_logits("kd_skew_kl_loss", logits_S, logits_T, temperature, mask)
    check_part("kd_skew_kl_loss", "alpha", alpha, below=1)
    S, T, selected = soften(logits_S, logits_T, temperature, mask, standardize)
    log_p, log_q = log_softmax(T), log_softmax(S)
    each = _kl(log_p, log_q if alpha == 0 else _mixed(log_p, log_q, alpha))
    return mean(scaled(each, temperature, selected, scale_by_t2), selected)


def kd_skew_reverse_kl_loss(
    logits_S: Logits,
    logits_T: Logits,
    temperature: Temperature = 1,
    mask: Mask = None,
    *,
    alpha: float = 0.1,
    standardize: bool = False,
    scale_by_t2: bool = False,
) -> Scalar:
    r"""Kullback–Leibler divergence of a mixture of both sides from the student's distribution.

    .. math:: \operatorname{mean}_i \operatorname{KL}(q \| (1 - \alpha) p + \alpha q)

    With ``alpha`` 0 it is ``reverse_kl``. ``mask`` selects: the mean runs over positions where it is
    not 0.

    Ko et al. 2024, `DistiLLM <https://arxiv.org/abs/2402.03898>`_.

    Raises:
        ValueError: Shapes of logits, temperature and mask do not fit together, or ``alpha`` is not
            from 0 to below 1.
    """
    check_logits("kd_skew_reverse_kl_loss", logits_S, logits_T, temperature, mask)
    check_part("kd_skew_reverse_kl_loss", "alpha", alpha, below=1)
    S, T, selected = soften(logits_S, logits_T, temperature, mask, standardize)
    log_p, log_q = log_softmax(T), log_softmax(S)
    each = _kl(log_q, log_p if alpha == 0 else _mixed(log_q, log_p, alpha))
    return mean(scaled(each, temperature, selected, scale_by_t2), selected)


def kd_tvd_loss(
    logits_S: Logits,
    logits_T: Logits,
    temperature: Temperature = 1,
    mask: Mask = None,
    *,
    standardize: bool = False,
    scale_by_t2: bool = False,
) -> Scalar:
    r"""Total variation distance of the two distributions.

    .. math:: \operatorname{mean}_i \tfrac{1}{2} \sum_c |p - q|

    ``mask`` selects: the mean runs over positions where it is not 0.

    Wen et al. 2023, `f-Divergence Minimization for Sequence-Level Knowledge Distillation
    <https://arxiv.org/abs/2307.15190>`_.

    Raises:
        ValueError: Shapes of logits, temperature and mask do not fit together.
    """
    check_logits("kd_tvd_loss", logits_S, logits_T, temperature, mask)
    S, T, selected = soften(logits_S, logits_T, temperature, mask, standardize)
    each = jnp.sum(jnp.abs(softmax(T) - softmax(S)), axis=-1) / 2
    return mean(scaled(each, temperature, selected, scale_by_t2), selected)


def kd_dkd_loss(
    logits_S: Logits,
    logits_T: Logits,
    temperature: Temperature = 1,
    mask: Mask = None,
    *,
    labels: Int[Array, "*positions"],
    alpha: float = 1,
    beta: float = 8,
    standardize: bool = False,
    scale_by_t2: bool = True,
) -> Scalar:
    r"""Decoupled knowledge distillation: the true class against the rest, and the rest by itself.

    .. math:: \operatorname{mean}_i \tau^2 \left(\alpha \operatorname{KL}(b_T \| b_S)
        + \beta \operatorname{KL}(\hat p \| \hat q)\right)

    with :math:`b = (p_y, 1 - p_y)` for the label :math:`y`, and :math:`\hat p, \hat q` the
    distributions over the other classes. The factor :math:`\tau^2` and the weights are the paper's;
    ``scale_by_t2=False`` leaves the factor out.

    ``labels`` come from the student's adaptor. Positions with a negative label, such as −100, are
    not selected; a label that is no class gives NaN. ``mask`` selects besides.

    Zhao et al. 2022, `Decoupled Knowledge Distillation <https://arxiv.org/abs/2203.08679>`_.

    Raises:
        ValueError: Shapes of logits, temperature, labels and mask do not fit together, the labels
            are no integers, or there are fewer than two classes.
    """
    check_logits("kd_dkd_loss", logits_S, logits_T, temperature, mask)
    check_classes("kd_dkd_loss", logits_S)
    check_labels("kd_dkd_loss", labels, logits_S)
    is_labelled = jnp.asarray(labels) >= 0
    mask = is_labelled if mask is None else is_labelled & (jnp.asarray(mask) != 0)
    S, T, selected = soften(logits_S, logits_T, temperature, mask, standardize)
    is_true = jnp.arange(S.shape[-1]) == jnp.asarray(labels)[..., None]
    target = _kl(_binary(T, is_true), _binary(S, is_true))
    others_S, others_T = (log_softmax(jnp.where(is_true, -jnp.inf, x)) for x in (S, T))
    each = alpha * target + beta * _kl(others_T, others_S)
    unknown = (jnp.asarray(labels) >= S.shape[-1]) & (mask != 0)
    each = jnp.where(unknown, jnp.nan, each)
    return mean(scaled(each, temperature, selected, scale_by_t2), selected)


def kd_dist_loss(
    logits_S: Logits,
    logits_T: Logits,
    temperature: Temperature = 1,
    mask: Mask = None,
    *,
    beta: float = 1,
    gamma: float = 1,
    standardize: bool = False,
    scale_by_t2: bool = True,
) -> Scalar:
    r"""Correlations instead of distances: between classes of a position, and positions of a class.

    .. math:: \tau^2 \left(\beta \left(1 - \operatorname{mean}_i \rho(q_{i\cdot}, p_{i\cdot})\right)
        + \gamma \left(1 - \operatorname{mean}_c \rho(q_{\cdot c}, p_{\cdot c})\right)\right)

    with :math:`\rho` Pearson's correlation, 0 where a side does not vary. The second part **couples
    the examples of a batch**: it is no mean over positions, so with accumulated gradients it is that
    of each micro-batch by itself. ``mask`` selects the positions that count. With one temperature for
    each position the factor is the mean of their squares; ``scale_by_t2=False`` leaves it out.

    Huang et al. 2022, `Knowledge Distillation from A Stronger Teacher
    <https://arxiv.org/abs/2205.10536>`_.

    Raises:
        ValueError: Shapes of logits, temperature and mask do not fit together, or there are fewer
            than two classes.
    """
    check_logits("kd_dist_loss", logits_S, logits_T, temperature, mask)
    check_classes("kd_dist_loss", logits_S)
    S, T, selected = soften(logits_S, logits_T, temperature, mask, standardize)
    q, p = (softmax(x).reshape(-1, x.shape[-1]) for x in (S, T))
    weights = jnp.ones(len(q), q.dtype) if selected is None else selected.reshape(-1)
    between = 1 - mean(_correlation(q, p, jnp.ones_like(q), axis=-1), weights)
    within = 1 - jnp.mean(_correlation(q, p, weights[:, None], axis=0))
    loss = beta * between + gamma * within
    if scale_by_t2:
        loss *= mean(scaled(jnp.ones(S.shape[:-1], S.dtype), temperature, selected, True), selected)
    return jnp.where(jnp.sum(weights) == 0, 0, loss)


# ---------------------------------------------------------------------------- what they share


def _kl(log_p: Array, log_q: Array) -> Array:
    """Σ p (log p − log q) over the last axis."""
    return jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)


def _mixed(log_p: Array, log_q: Array, part: float) -> Array:
    """log(part · p + (1 − part) · q), the part being above 0 and below 1."""
    return jnp.logaddexp(log_p + math.log(part), log_q + math.log1p(-part))


def _binary(logits: Array, is_true: Array) -> Array:
    """The logarithms of a class's probability and of all others' together."""
    logits = finite(logits)
    everything = jax.nn.logsumexp(logits, axis=-1)
    true = jnp.sum(jnp.where(is_true, logits, 0), axis=-1)
    others = jax.nn.logsumexp(jnp.where(is_true, jnp.finfo(logits.dtype).min, logits), axis=-1)
    return jnp.stack([true - everything, others - everything], axis=-1)


def _correlation(x: Array, y: Array, weights: Array, axis: int) -> Array:
    """Pearson's, along an axis; 0 where x or y, which are at most 1, varies by rounding alone."""
    count = jnp.sum(weights, axis=axis, keepdims=True)

    def centred(values: Array) -> Array:
        middle = ratio(jnp.sum(weights * values, axis=axis, keepdims=True), count)
        return weights * (values - middle)

    x, y = centred(x), centred(y)
    sizes = [root(jnp.sum(values * values, axis=axis)) for values in (x, y)]
    varies = jnp.minimum(*sizes) > 10 * jnp.finfo(x.dtype).eps
    product = jnp.sum(x * y, axis=axis)
    return jnp.where(varies, product / jnp.where(varies, sizes[0] * sizes[1], 1), 0)
