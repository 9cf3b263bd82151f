"""The distillation loss: plan × both sides' results → a total and its named terms.

``total = w_kd · KD + Σ w_i · match_i + w_hard · Σ mean(losses)``

Pure functions of arrays. A term whose weight is 0 throughout is computed for the log but kept out
of the gradient, and the compiler drops what only its gradient would have needed.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..models.adaptors import Results
from ..models.handle import Model
from .plan import HARD_TERM, KD, KD_TERM, Match, Plan, Weight, Weights, has_state

Project = Callable[[str, Array], Array]


def full_weights(state: Any = ()) -> Weights:
    """Weights of 1, to trace with; `state` is the objective's."""
    return Weights(jnp.ones(()), jnp.ones(()), progress=jnp.zeros(()), state=state)


def project_by_shape(projections: Mapping[str, Model]) -> Project:
    """Projections with their present weights, in evaluation mode: for tracing shapes."""

    def project(name: str, feature: Array) -> Array:
        model = projections[name]
        return model.apply(model.params, model.state, jax.random.key(0), (feature,), {}, False)[0]

    return project


class Loss(NamedTuple):
    """A loss and what it is made of.

    Attributes:
        total: scalar.
        terms: log name → scalar, unweighted.
        surplus: selected positions of the student minus those of the teacher, where logits are
            aligned by two masks (of several, the largest difference): anything but 0 is an error
            in the data.
    """

    total: Any
    terms: dict[str, Any]
    surplus: Any


def distillation_loss(
    plan: Plan, results_S: Results, results_T: Results, project: Project, weights: Weights
) -> Loss:
    """Computes the loss of a plan.

    Args:
        plan: what to compute.
        results_S: the student's results, as `adaptors.freeze` gives them.
        results_T: the teacher's.
        project: ``(name, feature_S) -> feature`` applies a match's projection.
        weights: the scheduled weights at this update.
    """
    total: Any = 0.0
    terms: dict[str, Any] = {}
    surplus: Any = 0
    state = weights.state if isinstance(weights.state, Mapping) else {}
    if plan.kd is not None and "logits" in results_S and "logits" in results_T:
        source = _detached_if(plan.kd_weight, results_S)
        value, surplus = kd_term(plan.kd, source, results_T, weights.temperature, state.get("kd"))
        terms[KD_TERM] = value
        if not plan.kd_weight.is_zero:
            total += _balanced(value, state, KD_TERM) * weights.kd
    scheduled = dict(enumerate(weights.matches))
    for i, match in enumerate(plan.matches):
        value = match_term(match, _detached_if(match.weight, results_S), results_T, project)
        terms[match.tag] = value
        if not match.weight.is_zero:
            now = scheduled.get(i)
            value = _balanced(value, state, match.tag)
            total += value * (match.weight.initial if now is None else now)
    if "losses" in results_S:
        value = hard_label_term(_detached_if(plan.hard_label_weight, results_S))
        terms[HARD_TERM] = value
        if not plan.hard_label_weight.is_zero:
            total += value * weights.hard_label
    return Loss(total, terms, surplus)


def _balanced(value: Any, state: Mapping[str, Any], name: str) -> Any:
    """A term scaled to the running size of the hard labels' loss, by its own; as it is before both."""
    if "balance" not in state:
        return value
    mine, wanted = (state["balance"][key] for key in (name, HARD_TERM))
    is_known = (mine > 0) & (wanted > 0)
    return value * jnp.where(is_known, wanted / jnp.where(is_known, mine, 1), 1)


def _detached_if(weight: Weight, results: Results) -> Results:
    return jax.lax.stop_gradient(results) if weight.is_zero else results


def hard_label_term(results_S: Results) -> Float[Array, ""]:
    """The sum of the means of the student's own losses."""
    return sum((jnp.mean(_full(loss)) for loss in results_S["losses"]), start=jnp.float32(0.0))


def match_term(match: Match, results_S: Results, results_T: Results, project: Project) -> Any:
    """The loss of one match, before its weight.

    Only the student's ``inputs_mask`` is used, and none for embeddings, which have no positions.
    """

    def pick(results: Results, layers: Any) -> Any:
        feature = results[match.feature]
        if isinstance(layers, int | str):
            return _full(feature[layers])
        return [_full(feature[layer]) for layer in layers]

    feature_S, feature_T = pick(results_S, match.layer_S), pick(results_T, match.layer_T)
    if match.projection is not None:
        apply = lambda x: _full(project(match.projection, x))  # noqa: E731
        feature_S = (
            [apply(x) for x in feature_S] if isinstance(feature_S, list) else apply(feature_S)
        )
    mask = None if match.feature == "embedding" else results_S.get("inputs_mask")
    return match.loss(feature_S, feature_T, mask=mask)


def kd_term(
    kd: KD, results_S: Results, results_T: Results, temperature: Any = None, state: Any = None
) -> tuple[Any, Any]:
    """The KD losses of all logits, summed; and the surplus of `Loss`.

    `temperature` is the scheduled one; None: the configured. `state` is that of a loss that has one;
    None: as it starts.
    """
    loss = kd.loss
    if has_state(loss):
        loss = functools.partial(loss, state=loss.init() if state is None else state)
    total: Any = 0.0
    surplus: Any = 0
    base = kd.temperature.initial if temperature is None else temperature
    all_labels = results_S.get("labels") if wants_labels(kd) else None
    for pair in pairs(results_S, results_T, all_labels):
        logits_S, logits_T, mask, labels, difference = pair
        surplus = jnp.where(jnp.abs(difference) > jnp.abs(surplus), difference, surplus)
        if kd.probability_shift:
            if labels is None:
                raise ValueError("probability_shift needs adaptor_S to return 'labels'")
            logits_T = probability_shift(logits_T, labels)
        temperature = base
        if kd.temperature_scheduler is not None:
            temperature = call_temperature(kd.temperature_scheduler, logits_S, logits_T, base, mask)
        total += call_kd(loss, logits_S, logits_T, temperature, mask, labels)
    return total, surplus


def wants_labels(kd: KD) -> bool:
    """Whether a KD loss cannot do without the labels."""
    return kd.probability_shift or takes_labels(kd.loss)


class Pair(NamedTuple):
    """Logits to compare: ``[…, classes]`` each, with the mask and labels of their positions."""

    logits_S: Array
    logits_T: Array
    mask: Array | None
    labels: Array | None
    surplus: Any


def pairs(results_S: Results, results_T: Results, labels: tuple | None = None) -> Iterator[Pair]:
    """Pairs the logits of both sides, each selected by its own mask; labels go with the student's.

    TextBrewer selects positions on each side and compares what is left in order: this is how two
    tokenizers are aligned on first word pieces. Here both sides keep a fixed size: where both
    have the very same mask it becomes a weight, elsewhere each side's selected positions are
    moved to the front, in order. Logits of other than three dimensions are not masked.
    """
    logits_S, logits_T = results_S["logits"], results_T["logits"]
    masks_S = _spread(results_S.get("logits_mask"), len(logits_S))
    masks_T = _spread(results_T.get("logits_mask"), len(logits_T))
    labels = labels or (None,) * len(logits_S)
    for l_S, l_T, m_S, m_T, label in zip(logits_S, logits_T, masks_S, masks_T, labels, strict=True):
        l_S, l_T = _full(l_S), _full(l_T)
        if l_S.ndim != 3 or (m_S is None and m_T is None):
            yield Pair(l_S, l_T, None, label, 0)
            continue
        flat_S, flat_T = (x.reshape(-1, x.shape[-1]) for x in (l_S, l_T))
        label = None if label is None else label.reshape(-1)
        if m_S is m_T:
            yield Pair(flat_S, flat_T, m_S.reshape(-1) != 0, label, 0)
            continue
        chosen_S, chosen_T = (m.reshape(-1) != 0 for m in (m_S, m_T))
        size = min(flat_S.shape[0], flat_T.shape[0])
        order_S, order_T = (jnp.argsort(~m, stable=True)[:size] for m in (chosen_S, chosen_T))
        count_S, count_T = jnp.sum(chosen_S), jnp.sum(chosen_T)
        yield Pair(
            flat_S[order_S],
            flat_T[order_T],
            jnp.arange(size) < count_S,
            None if label is None else label[order_S],
            count_S - count_T,
        )


def _spread(masks: tuple | None, count: int) -> tuple:
    if masks is None:
        return (None,) * count
    return masks * count if len(masks) == 1 else masks


def probability_shift(
    logits_T: Float[Array, "*positions classes"], labels: Int[Array, "*positions"]
) -> Float[Array, "*positions classes"]:
    """Swaps, at each position, the teacher's largest logit with the label's.

    Positions with a negative label are left as they are (TextBrewer does so in 3-D logits only,
    and writes into the teacher's logits). A label ≥ classes gives NaN, never another class.
    """
    top = jnp.argmax(logits_T, axis=-1)
    label = jnp.where(labels < 0, top, labels)
    largest = jnp.max(logits_T, axis=-1, keepdims=True)
    true = jnp.take_along_axis(logits_T, label[..., None], axis=-1, mode="fill", fill_value=jnp.nan)
    classes = jnp.arange(logits_T.shape[-1])
    shifted = jnp.where(classes == top[..., None], true, logits_T)
    return jnp.where(classes == label[..., None], largest, shifted)


def call_kd(
    loss: Callable,
    logits_S: Array,
    logits_T: Array,
    temperature: Any,
    mask: Array | None,
    labels: Array | None = None,
) -> Any:
    """Calls a KD loss, with the mean over selected positions if there is a mask.

    A loss that takes ``mask=`` gets it; any other is applied position by position, which is right
    only for a mean over positions (`is_position_mean` tells). One that names ``labels`` gets them.
    """
    more = {"labels": labels} if takes_labels(loss) else {}
    if mask is None:
        return loss(logits_S, logits_T, temperature, **more)
    if takes_mask(loss):
        return loss(logits_S, logits_T, temperature, mask=mask, **more)
    keep = mask[:, None]
    logits_S, logits_T = jnp.where(keep, logits_S, 0), jnp.where(keep, logits_T, 0)
    each = position_by_position(loss, logits_S, logits_T, temperature, **more)
    return jnp.sum(jnp.where(mask, each, 0)) / jnp.maximum(jnp.sum(mask), 1)


def position_by_position(
    loss: Callable, logits_S: Array, logits_T: Array, temperature: Any, **more: Any
) -> Array:
    """Applies a KD loss to each position of ``[positions, classes]`` as a batch of one.

    So are the arrays of `more`, which it gets by name: ``[positions]``.
    """
    by_position = {"logits_S": logits_S, "logits_T": logits_T, **more}
    if jnp.ndim(temperature):
        by_position["temperature"] = temperature

    def one(given: dict[str, Array]) -> Array:
        S, T, t, *_ = (
            given.pop(name, temperature) for name in ("logits_S", "logits_T", "temperature")
        )
        return loss(S, T, t, **given)

    return jax.vmap(one)({name: x[:, None] for name, x in by_position.items()})


def call_temperature(
    scheduler: Callable, logits_S: Array, logits_T: Array, base: float, mask: Array | None
) -> Any:
    """Calls a temperature scheduler; one without ``mask=`` must look at each position alone."""
    if mask is not None and takes_mask(scheduler):
        return scheduler(logits_S, logits_T, base, mask=mask)
    temperature = scheduler(logits_S, logits_T, base)
    if mask is not None and jnp.ndim(temperature):
        temperature = jnp.where(mask, temperature, base)  # whatever lies there must not be 0 or NaN
    return temperature


def takes_mask(function: Callable) -> bool:
    """Whether a user's function can be given ``mask=``."""
    parameters = inspect.signature(function).parameters
    return "mask" in parameters or any(p.kind is p.VAR_KEYWORD for p in parameters.values())


def takes_labels(function: Callable) -> bool:
    """Whether a function names ``labels``, and has none bound to it."""
    bound = getattr(function, "keywords", {})
    return "labels" in inspect.signature(function).parameters and "labels" not in bound


def _full(x: Array) -> Array:
    """Halves become float32; losses are never computed in less."""
    if jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32:
        return x.astype(jnp.float32)
    return x
