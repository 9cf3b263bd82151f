"""The distillation loss: plan × both sides' results → a total and its named terms.

``total = w_kd · KD + Σ w_i · match_i + w_hard · Σ mean(losses)``

Pure functions of arrays. A term whose weight is 0 throughout is computed for the log but kept out
of the gradient, and the compiler drops what only its gradient would have needed.
"""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ..losses.means import mean
from ..models.adaptors import Results
from ..models.handle import Model
from .counted import EXAMPLE, counts, weighted
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
    units, shares = plan.units, weights.shares
    if plan.kd is not None and "logits" in results_S and "logits" in results_T:
        source = _detached_if(plan.kd_weight, results_S)
        value, surplus = kd_term(
            plan.kd,
            source,
            results_T,
            weights.temperature,
            state.get("kd"),
            units.get(KD_TERM),
            shares.get(KD_TERM),
        )
        terms[KD_TERM] = value
        if not plan.kd_weight.is_zero:
            total += _balanced(value, state, KD_TERM) * weights.kd
    scheduled = dict(enumerate(weights.matches))
    for i, match in enumerate(plan.matches):
        source = _detached_if(match.weight, results_S)
        value = match_term(match, source, results_T, project, *units.get(match.tag, ()))
        if match.tag in shares:
            value *= shares[match.tag][0]
        terms[match.tag] = value
        if not match.weight.is_zero:
            now = scheduled.get(i)
            value = _balanced(value, state, match.tag)
            total += value * (match.weight.initial if now is None else now)
    if "losses" in results_S:
        source = _detached_if(plan.hard_label_weight, results_S)
        value = hard_label_term(source, shares.get(HARD_TERM))
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


def hard_label_term(results_S: Results, shares: Array | None = None) -> Float[Array, ""]:
    """The sum of the means of the student's own losses, over what ``losses_mask`` selects."""
    total = jnp.float32(0.0)
    for i, (loss, mask) in enumerate(own_losses(results_S)):
        value = mean(_full(loss), None if mask is None else mask.astype(_full(loss).dtype))
        total += value if shares is None else value * shares[i]
    return total


def own_losses(results_S: Results) -> Iterator[tuple[Array, Array | None]]:
    """The student's own losses, each with the weights of its entries; None: they count alike.

    They are those of ``losses_mask`` times ``sample_weight``. What a mask leaves out may be anything.
    """
    losses, sample = results_S["losses"], results_S.get("sample_weight")
    for loss, mask in zip(losses, _spread(results_S.get("losses_mask"), len(losses)), strict=True):
        if mask is not None:
            loss = jnp.where(mask != 0, loss, 0)
        if sample is not None:
            by_row = jnp.expand_dims(sample, range(1, loss.ndim))
            mask = jnp.broadcast_to(by_row if mask is None else mask * by_row, loss.shape)
        yield loss, mask


def match_term(
    match: Match,
    results_S: Results,
    results_T: Results,
    project: Project,
    unit: str = EXAMPLE,
) -> Any:
    """The loss of one match, before its weight.

    Only the student's ``inputs_mask`` is used, and none for embeddings, which have no positions. With
    a ``sample_weight`` each example's loss counts by that; `unit` is what the loss is a mean over.
    """
    rows = match_rows(match, results_S, results_T, project)
    sample = results_S.get("sample_weight")
    if sample is None:
        return match_value(match, rows)
    count = counts(len(sample), rows["mask"])[unit]
    return weighted(functools.partial(match_value, match), rows, count, sample)


def match_value(match: Match, rows: Mapping[str, Any]) -> Any:
    """The loss of a match on what `match_rows` gives."""
    return match.loss(rows["S"], rows["T"], mask=rows["mask"])


def match_rows(
    match: Match, results_S: Results, results_T: Results, project: Project
) -> dict[str, Any]:
    """What a match compares: ``S`` and ``T``, arrays or lists of them, and the ``mask`` or None."""

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
    return {"S": feature_S, "T": feature_T, "mask": mask}


def kd_term(
    kd: KD,
    results_S: Results,
    results_T: Results,
    temperature: Any = None,
    state: Any = None,
    units: Sequence[str] | None = None,
    shares: Array | None = None,
) -> tuple[Any, Any]:
    """The KD losses of all logits, summed; and the surplus of `Loss`.

    `temperature` is the scheduled one; None: the configured. `state` is that of a loss that has one;
    None: as it starts. `units` are what the loss of each logits is a mean over, which a
    ``sample_weight`` needs; `shares` those of `Weights`.
    """
    total: Any = 0.0
    surplus: Any = 0
    for i, pair in enumerate(pairs(results_S, results_T, labels_of(kd, results_S))):
        surplus = jnp.where(jnp.abs(pair.surplus) > jnp.abs(surplus), pair.surplus, surplus)
        rows = kd_rows(pair)
        value_of = functools.partial(kd_value, kd, temperature=temperature, state=state)
        if pair.weights is None:
            value = value_of(rows)
        else:
            count = counts(len(pair.weights), pair.mask, pair.labels)[
                units[i] if units else EXAMPLE
            ]
            value = weighted(value_of, rows, count, pair.weights)
        total += value if shares is None else value * shares[i]
    return total, surplus


def kd_rows(pair: "Pair") -> dict[str, Any]:
    """What the KD loss of one pair of logits is computed of."""
    return {"S": pair.logits_S, "T": pair.logits_T, "mask": pair.mask, "labels": pair.labels}


def kd_value(kd: KD, rows: Mapping[str, Any], temperature: Any = None, state: Any = None) -> Any:
    """The KD loss of one pair of logits, as `kd_rows` gives it; see `kd_term`."""
    loss, logits_S, logits_T = kd.loss, rows["S"], rows["T"]
    mask, labels = rows["mask"], rows["labels"]
    if has_state(loss):
        loss = functools.partial(loss, state=loss.init() if state is None else state)
    if kd.probability_shift:
        if labels is None:
            raise ValueError("probability_shift needs adaptor_S to return 'labels'")
        logits_T = probability_shift(logits_T, labels)
    base = kd.temperature.initial if temperature is None else temperature
    temperature = base
    if kd.temperature_scheduler is not None:
        temperature = call_temperature(kd.temperature_scheduler, logits_S, logits_T, base, mask)
    return call_kd(loss, logits_S, logits_T, temperature, mask, labels)


def labels_of(kd: KD, results_S: Results) -> Any:
    """The student's labels, where a KD loss cannot do without; else None."""
    return results_S.get("labels") if wants_labels(kd) else None


def wants_labels(kd: KD) -> bool:
    """Whether a KD loss cannot do without the labels."""
    return kd.probability_shift or takes_labels(kd.loss)


class Pair(NamedTuple):
    """Logits to compare: ``[…, classes]`` each, with the mask and labels of their positions.

    `weights` are of the rows, where there is a ``sample_weight``.
    """

    logits_S: Array
    logits_T: Array
    mask: Array | None
    labels: Array | None
    surplus: Any
    weights: Array | None = None


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
    sample = results_S.get("sample_weight")
    for l_S, l_T, m_S, m_T, label in zip(logits_S, logits_T, masks_S, masks_T, labels, strict=True):
        l_S, l_T = _full(l_S), _full(l_T)
        if l_S.ndim != 3 or (m_S is None and m_T is None):
            yield Pair(l_S, l_T, None, label, 0, sample)
            continue
        flat_S, flat_T = (x.reshape(-1, x.shape[-1]) for x in (l_S, l_T))
        label = None if label is None else label.reshape(-1)
        weights = None if sample is None else jnp.repeat(sample, l_S.shape[1])
        if m_S is m_T:
            yield Pair(flat_S, flat_T, m_S.reshape(-1) != 0, label, 0, weights)
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
            None if weights is None else weights[order_S],
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
