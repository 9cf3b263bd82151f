"""Losses on how the examples of a batch lie to each other, on features of any width.

All **couple the examples of a batch**: none is a mean over examples. With accumulated gradients each
micro-batch is compared by itself, so a loss over two batches of four is not that over one of eight;
over several devices the whole batch is compared, except under ``mapping='pmap'``, where each device
compares its own part. The widths of the two sides may differ unless a docstring says otherwise, so no
projection is needed.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxbrewer.losses.shapes import check_examples

from .means import Scalar, as_selection, einsum, floats, mean, ratio, root

Vectors_S = Float[Array, "batch width_S"]
Vectors_T = Float[Array, "batch width_T"]


def rkd_distance_loss(
    state_S: Vectors_S, state_T: Vectors_T, mask: Shaped[Array, " batch"] | None = None
) -> Scalar:
    r"""Relational knowledge distillation by distances.

    .. math:: \frac{1}{b^2} \sum_{i,j} h\left(\frac{\|s_i - s_j\|}{\mu_S}
        - \frac{\|t_i - t_j\|}{\mu_T}\right)

    with :math:`h` Huber's loss, :math:`x^2 / 2` up to 1 and :math:`|x| - 1/2` beyond, and :math:`\mu`
    the mean of a side's distances that are not 0. ``mask`` selects examples.

    Park et al. 2019, `Relational Knowledge Distillation <https://arxiv.org/abs/1904.05068>`_; the
    paper weighs it by 1 beside 2 for `rkd_angle_loss`.

    Raises:
        ValueError: Not two arrays (batch, width) of one batch size.
    """
    check_examples("rkd_distance_loss", state_S, state_T, mask, positions=False, same_width=False)
    S, T = floats(state_S, state_T)
    pairs = _pairs(mask, S)
    distances = []
    for x in (S, T):
        distance = root(jnp.sum(jnp.square(_differences(x, mask)), axis=-1))
        counted = pairs * (distance > 0)
        middle = ratio(jnp.sum(counted * distance), jnp.sum(counted))
        distances.append(ratio(distance, middle))
    return mean(_huber(distances[0] - distances[1]), pairs)


def rkd_angle_loss(
    state_S: Vectors_S, state_T: Vectors_T, mask: Shaped[Array, " batch"] | None = None
) -> Scalar:
    r"""Relational knowledge distillation by angles.

    .. math:: \frac{1}{b^3} \sum_{i,j,k} h\left(\cos \angle s_j s_i s_k - \cos \angle t_j t_i t_k\right)

    with :math:`h` Huber's loss, as in `rkd_distance_loss`; an angle with a point that coincides with
    its vertex counts as 0. It holds the cosines of all triples, :math:`b^3` numbers. ``mask`` selects
    examples.

    Park et al. 2019, `Relational Knowledge Distillation <https://arxiv.org/abs/1904.05068>`_.

    Raises:
        ValueError: Not two arrays (batch, width) of one batch size.
    """
    check_examples("rkd_angle_loss", state_S, state_T, mask, positions=False, same_width=False)
    S, T = floats(state_S, state_T)
    cosines = []
    for x in (S, T):
        between = _differences(x, mask)
        length = root(jnp.sum(jnp.square(between), axis=-1, keepdims=True))
        unit = between / jnp.where(length > 0, length, 1)
        cosines.append(einsum("ijd,ikd->ijk", unit, unit))
    pairs = _pairs(mask, S)
    return mean(_huber(cosines[0] - cosines[1]), pairs[:, :, None] * pairs[:, None, :])


def similarity_loss(
    state_S: Float[Array, "*positions width_S"],
    state_T: Float[Array, "*positions width_T"],
    mask: Shaped[Array, "*positions"] | None = None,
) -> Scalar:
    r"""Similarity-preserving knowledge distillation.

    .. math:: \frac{1}{b^2} \|\hat G_S - \hat G_T\|_F^2, \quad G = X X^\top

    where :math:`X` has a row for each example, its positions side by side, and :math:`\hat G` is
    :math:`G` with its rows divided by their norms. Positions where ``mask`` is 0 count as zeros.
    ``b`` is the number of examples with any position selected.

    Tung & Mori 2019, `Similarity-Preserving Knowledge Distillation
    <https://arxiv.org/abs/1907.09682>`_.

    Raises:
        ValueError: Not (batch, width) or (batch, length, width) twice, or of two batch sizes or lengths.
    """
    check_examples("similarity_loss", state_S, state_T, mask, positions=True, same_width=False)
    S, T = floats(state_S, state_T)
    weights = None if mask is None else as_selection(mask, S)
    grams = []
    for x in (S, T):
        if weights is not None:
            x = jnp.where(weights[..., None] != 0, x, 0)
        gram = _gram(x.reshape(len(x), -1))
        size = root(jnp.sum(jnp.square(gram), axis=-1, keepdims=True))
        grams.append(gram / jnp.where(size > 0, size, 1))
    if weights is None:
        count = jnp.asarray(len(S), S.dtype)
    else:
        count = jnp.sum(jnp.max(weights.reshape(len(S), -1), axis=-1))
    return ratio(jnp.sum(jnp.square(grams[0] - grams[1])), count**2)


def cka_loss(
    state_S: Float[Array, "*positions width_S"],
    state_T: Float[Array, "*positions width_T"],
    mask: Shaped[Array, "*positions"] | None = None,
) -> Scalar:
    r"""One less the linear centred kernel alignment of the two sides.

    .. math:: 1 - \frac{\|Y^\top X\|_F^2}{\|X^\top X\|_F \, \|Y^\top Y\|_F}

    where :math:`X` and :math:`Y` have a row for each selected position of each example, less the mean
    row. It is blind to rotations and to the scale of either side. Where a side does not vary it is 1,
    without a gradient. ``mask`` selects.

    Kornblith et al. 2019, `Similarity of Neural Network Representations Revisited
    <https://arxiv.org/abs/1905.00414>`_; as a loss Saha et al. 2022, `Distilling Representational
    Similarity using Centered Kernel Alignment <https://bmvc2022.mpi-inf.mpg.de/535/>`_.

    Raises:
        ValueError: Not (batch, width) or (batch, length, width) twice, or of two batch sizes or lengths.
    """
    check_examples("cka_loss", state_S, state_T, mask, positions=True, same_width=False)
    S, T = floats(state_S, state_T)
    x, y = (_centred(state, mask) for state in (S, T))
    if len(x) <= max(x.shape[1], y.shape[1]):  # by whichever products are smaller; the same number
        gram_S, gram_T = _gram(x), _gram(y)
        cross, size_S, size_T = (
            jnp.sum(a * b) for a, b in ((gram_S, gram_T), (gram_S, gram_S), (gram_T, gram_T))
        )
    else:
        cross, size_S, size_T = (
            jnp.sum(jnp.square(einsum("nd,ne->de", a, b))) for a, b in ((y, x), (x, x), (y, y))
        )
    size = root(size_S) * root(size_T)
    loss = 1 - jnp.where(size > 0, cross / jnp.where(size > 0, size, 1), 0)
    return loss if mask is None else jnp.where(jnp.any(jnp.asarray(mask) != 0), loss, 0)


def infonce_loss(
    state_S: Float[Array, "batch width"],
    state_T: Float[Array, "batch width"],
    mask: Shaped[Array, " batch"] | None = None,
    *,
    temperature: float = 0.07,
) -> Scalar:
    r"""Contrastive loss: the student's vector is to find the teacher's of the same example.

    .. math:: \operatorname{mean}_i -\log \frac{\exp(\cos(s_i, t_i) / \tau)}
        {\sum_j \exp(\cos(s_i, t_j) / \tau)}

    The other examples of the batch are what the teacher's vector is told from. ``mask`` selects
    examples, on both sides. The widths must agree: add a projection where they do not.

    van den Oord et al. 2018, `Representation Learning with Contrastive Predictive Coding
    <https://arxiv.org/abs/1807.03748>`_; between student and teacher Tian et al. 2019, `Contrastive
    Representation Distillation <https://arxiv.org/abs/1910.10699>`_, here without its memory of other
    batches.

    Raises:
        ValueError: Not two arrays (batch, width) of one shape, or a temperature that is not above 0.
    """
    check_examples("infonce_loss", state_S, state_T, mask, positions=False, same_width=True)
    if not temperature > 0:
        raise ValueError(
            f"infonce_loss: temperature is {temperature!r}; expected a number above 0."
        )
    S, T = floats(state_S, state_T)
    selected = jnp.ones(len(S), S.dtype) if mask is None else as_selection(mask, S)
    units = []
    for x in (S, T):
        x = jnp.where(selected[:, None] != 0, x, 0)
        size = root(jnp.sum(jnp.square(x), axis=-1, keepdims=True))
        units.append(x / jnp.where(size > 0, size, 1))
    scores = einsum("id,jd->ij", *units) / temperature
    scores = jnp.where(selected[None, :] != 0, scores, jnp.finfo(scores.dtype).min)
    each = jax.nn.logsumexp(scores, axis=-1) - jnp.diagonal(scores)
    return mean(jnp.where(selected != 0, each, 0), selected)


# ---------------------------------------------------------------------------- what they share


def _gram(x: Array) -> Array:
    return einsum("id,jd->ij", x, x)


def _differences(x: Array, mask: Array | None) -> Array:
    """Of all pairs of rows: [rows, rows, width]; what is not selected counts as zeros."""
    if mask is not None:
        x = jnp.where(jnp.asarray(mask)[:, None] != 0, x, 0)
    return x[:, None, :] - x[None, :, :]


def _pairs(mask: Array | None, like: Array) -> Array:
    """1 for each pair of selected rows."""
    selected = jnp.ones(len(like), like.dtype) if mask is None else as_selection(mask, like)
    return selected[:, None] * selected[None, :]


def _huber(x: Array) -> Array:
    size = jnp.abs(x)
    return jnp.where(size < 1, jnp.square(x) / 2, size - 0.5)


def _centred(state: Array, mask: Array | None) -> Array:
    """A row for each position, less the mean of the selected ones; zeros elsewhere."""
    rows = state.reshape(-1, state.shape[-1])
    if mask is None:
        return rows - jnp.mean(rows, axis=0)
    selected = as_selection(mask, rows).reshape(-1, 1)
    rows = jnp.where(selected != 0, rows, 0)
    return selected * (rows - ratio(jnp.sum(rows, axis=0), jnp.sum(selected)))
