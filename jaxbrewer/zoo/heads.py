"""The losses of the task heads, as transformers computes them; float32 or wider whatever comes in.

Two departures, both where transformers gives NaN or stops: when every label is ignored the loss is
0, and a label that names no class gives NaN (an error cannot be raised under ``jit``).
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Num

IGNORE_INDEX = -100


def _at_least_float32(x: Float[Array, "..."]) -> Float[Array, "..."]:
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def cross_entropy(
    logits: Float[Array, "*shape classes"],
    labels: Int[Array, "*shape"],
    ignore_index: int = IGNORE_INDEX,
) -> Float[Array, ""]:
    """The mean of ``-log softmax(logits)[label]`` over labels that are not ``ignore_index``."""
    each, kept = each_cross_entropy(logits, labels, ignore_index)
    return jnp.sum(each) / jnp.maximum(jnp.sum(kept), 1)


def each_cross_entropy(
    logits: Float[Array, "*shape classes"],
    labels: Int[Array, "*shape"],
    ignore_index: int = IGNORE_INDEX,
) -> tuple[Float[Array, "*shape"], Bool[Array, "*shape"]]:
    """``-log softmax(logits)[label]`` of each, and which count: whose mean `cross_entropy` is.

    What does not count is 0.
    """
    log_probs = jax.nn.log_softmax(_at_least_float32(logits))
    kept = labels != ignore_index
    index = jnp.where(kept, labels, 0)[..., None]
    # Chosen, not looked up: the gradient of a look-up is added up in memory, class by class.
    picked = jnp.sum(jnp.where(index == jnp.arange(logits.shape[-1]), log_probs, 0), axis=-1)
    is_class = (index[..., 0] >= 0) & (index[..., 0] < logits.shape[-1])
    picked = jnp.where(is_class, picked, jnp.nan)
    return jnp.where(kept, -picked, 0), kept


def sequence_classification_loss(
    logits: Float[Array, "batch labels"],
    labels: Num[Array, " batch"] | Num[Array, "batch labels"],
    problem_type: str | None = None,
) -> Float[Array, ""]:
    """The loss of a sequence classifier.

    ``problem_type`` is ``'regression'`` (mean squared error), ``'single_label_classification'``
    (cross-entropy; −100 is ignored) or ``'multi_label_classification'`` (binary cross-entropy of
    each class). ``None`` decides by the data: one logit is a regression, integer labels are single
    labels, any other are multi-labels.
    """
    each, kept = each_sequence_classification(logits, labels, problem_type)
    if kept is None:
        return jnp.mean(each)
    return jnp.sum(each) / jnp.maximum(jnp.sum(kept), 1)


def each_sequence_classification(
    logits: Float[Array, "batch labels"],
    labels: Num[Array, " batch"] | Num[Array, "batch labels"],
    problem_type: str | None = None,
) -> tuple[Float[Array, "batch ..."], Bool[Array, " batch"] | None]:
    """The losses whose mean `sequence_classification_loss` is, and which count; None: all do.

    Of single labels ``[batch]``; otherwise ``[batch, labels]``, each logit's own.
    """
    if problem_type is None:
        if logits.shape[-1] == 1:
            problem_type = "regression"
        elif jnp.issubdtype(labels.dtype, jnp.integer):
            problem_type = "single_label_classification"
        else:
            problem_type = "multi_label_classification"
    if problem_type == "single_label_classification":
        return each_cross_entropy(logits, labels.reshape(logits.shape[:1]))
    logits = _at_least_float32(logits)
    if labels.size != logits.size:
        raise ValueError(
            f"labels of shape {labels.shape} do not fit logits of shape {logits.shape} for a "
            f"{problem_type}: give one value for each logit, or set problem_type in the config"
        )
    targets = labels.reshape(logits.shape).astype(logits.dtype)
    if problem_type == "regression":
        return jnp.square(logits - targets), None
    each = targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits)
    return -each, None


def soft_cross_entropy(
    logits: Float[Array, "batch labels"], targets: Num[Array, "batch labels"]
) -> Float[Array, ""]:
    """The mean over examples of ``-Σ target · log softmax(logits)``."""
    if targets.shape != logits.shape:
        raise ValueError(
            f"labels of shape {targets.shape} do not fit logits of shape {logits.shape}: give one "
            "value for each logit, or one label for each example"
        )
    log_probs = jax.nn.log_softmax(_at_least_float32(logits))
    return -jnp.mean(jnp.sum(targets.astype(log_probs.dtype) * log_probs, axis=-1))


def token_classification_loss(
    logits: Float[Array, "batch length labels"], labels: Int[Array, "batch length"]
) -> Float[Array, ""]:
    """The mean cross-entropy over the tokens whose label is not −100."""
    return cross_entropy(logits, labels)


def span_loss(
    start_logits: Float[Array, "batch length"],
    end_logits: Float[Array, "batch length"],
    start_positions: Int[Array, " batch"] | Int[Array, "batch 1"],
    end_positions: Int[Array, " batch"] | Int[Array, "batch 1"],
) -> Float[Array, ""]:
    """The mean of the cross-entropies of an answer's first and last position.

    Positions are first clipped to ``[0, length]``; one past the end of the sequence is ignored,
    each side apart.
    """
    start, of_start = each_end(start_logits, start_positions)
    end, of_end = each_end(end_logits, end_positions)
    means = [
        jnp.sum(each) / jnp.maximum(jnp.sum(kept), 1)
        for each, kept in ((start, of_start), (end, of_end))
    ]
    return (means[0] + means[1]) / 2


def each_end(
    logits: Float[Array, "batch length"], positions: Int[Array, " batch"] | Int[Array, "batch 1"]
) -> tuple[Float[Array, " batch"], Bool[Array, " batch"]]:
    """The cross-entropy of one end of each answer, and which count; see `span_loss`."""
    length = logits.shape[-1]
    positions = jnp.clip(positions.reshape(logits.shape[:1]), 0, length)
    return each_cross_entropy(logits, positions, ignore_index=length)
