"""A `DistillationConfig` resolved: names become functions, layers get their tags, once."""

import functools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from .. import presets
from ..configurations.configs import DistillationConfig, IntermediateMatch
from ..errors import suggest
from .tables import tabulate

Layers = int | str | Sequence[int]
Units = Mapping[str, tuple[str, ...]]
KD_TERM, HARD_TERM = "unweighted_kd_loss", "unweighted_hard_label_loss"
_DECAY = 0.99  # of the running means that balance terms


@dataclass(frozen=True)
class Weight:
    """A loss weight, or the temperature: the configured value for the first update, then the scheduler's.

    Attributes:
        initial: the configured value.
        scheduler: fraction of training done → weight, or None for a constant weight.
    """

    initial: float
    scheduler: Callable[[float], Any] | None = None

    @property
    def is_zero(self) -> bool:
        """Whether the weight is 0 throughout, so that its term is logged but not trained on."""
        return self.scheduler is None and self.initial == 0

    def __str__(self) -> str:
        return f"{self.initial:g}{', then by its scheduler' if self.scheduler else ''}"

    def table(self, total_steps: int) -> np.ndarray:
        """The weight after each number of updates, from 0 to all: ``[total_steps + 1]`` float64.

        TextBrewer's rule: the first update uses the configured weight; after update k it becomes
        ``scheduler(k / total)``. Batches that follow the last update have the last.
        """
        table = np.full(total_steps + 1, self.initial, np.float64)
        if self.scheduler is not None:
            table[1:] = tabulate(self.scheduler, np.arange(1, total_steps + 1) / total_steps)
        return table


@dataclass(frozen=True)
class KD:
    """The distillation loss on logits.

    Attributes:
        loss: ``(logits_S, logits_T, temperature)``, and ``mask=`` if it takes one; it may have a state,
            see `losses.stateful`.
        loss_name: its name in `presets.KD_LOSS_MAP`.
        temperature: the configured temperature, for the first update, and its schedule.
        temperature_scheduler: ``(logits_S, logits_T, temperature)``, and ``mask=`` if it takes
            one, → temperatures; or None.
        probability_shift: whether the teacher's largest logit and the label's are swapped.
        required: whether logits must be there, or are used only if both sides have them.
    """

    loss: Any
    loss_name: str
    temperature: Weight
    temperature_scheduler: Callable | None
    probability_shift: bool
    required: bool


@dataclass(frozen=True)
class Match:
    """One intermediate match.

    Attributes:
        feature: the adaptor's key: ``'hidden'``, ``'attention'``, …; ``'captured'`` for
            submodules.
        layer_S: the student's layer, or several; a submodule's path.
        layer_T: the teacher's.
        loss: ``(feature_S, feature_T, mask=None)``; lists where several layers are matched.
        loss_name: its name in `presets.MATCH_LOSS_MAP`.
        weight: its weight, and the schedule of that.
        projection: the name of its projection, or None.
        proj: ``(name, dim_S, dim_T)`` of that projection, or None.
        options: that projection's optimizer options.
        tag: the name its value is logged under.
    """

    feature: str
    layer_S: Layers
    layer_T: Layers
    loss: Callable
    loss_name: str
    weight: Weight
    projection: str | None
    proj: tuple[str, int, int] | None
    options: Any
    tag: str

    def __str__(self) -> str:
        return f"{self.feature} T{_layers(self.layer_T)} → S{_layers(self.layer_S)} by {self.loss_name}"


TEMPERATURE = 3
"""The column of a schedule's row that holds the temperature, where it is scheduled."""


PROGRESS = Weight(0.0, lambda x: x)
"""The schedule of the finished part itself."""


class Weights(NamedTuple):
    """The scheduled weights at one update, scalars.

    Attributes:
        kd: of the KD loss.
        hard_label: of the hard labels.
        temperature: the temperature; None where it is not scheduled.
        matches: of each match, in order; None where it is not scheduled, and of those left out.
        progress: the finished part of the training, where the objective has a state.
        state: the objective's own, if it has one.
        shares: term → what each of its parts is multiplied by, so that the mean over a window's
            micro-batches is that of all their examples; empty where means are accumulated.
    """

    kd: Any
    hard_label: Any
    temperature: Any = None
    matches: tuple[Any, ...] = ()
    progress: Any = None
    state: Any = ()
    shares: Mapping[str, Any] = {}


class Scheduled(NamedTuple):
    """What a schedule gives each update: one column of a row for each that is there.

    Attributes:
        kd: the weight of the KD loss.
        hard_label: that of the hard labels.
        temperature: the temperature, where it is scheduled.
        matches: each match's weight, where it is scheduled.
        progress: the finished part of the training, for an objective with a state.
        parts: term → how many parts of it have a share, see `Weights.shares`; their columns come last.
    """

    kd: Weight | None = None
    hard_label: Weight | None = None
    temperature: Weight | None = None
    matches: tuple[Weight | None, ...] = ()
    progress: Weight | None = None
    parts: Mapping[str, int] = {}

    @property
    def columns(self) -> list[Weight | None]:
        """A row's: the two weights, the learning rate (None), and what else is scheduled."""
        others = (self.temperature, *self.matches, self.progress)
        return [
            self.kd,
            self.hard_label,
            None,
            *(weight for weight in others if weight is not None),
        ]

    @property
    def width(self) -> int:
        """The length of the row that a step gets: the columns, and a share for each part."""
        return len(self.columns) + sum(self.parts.values())

    @property
    def row(self) -> np.ndarray:
        """A row of ones, without shares."""
        return np.ones(len(self.columns), jnp.result_type(float))

    def read(self, row: Any) -> Weights:
        """The weights that a row holds."""
        others = iter([row[i] for i in range(3, len(self.columns))])
        temperature, *matches, progress = (
            None if weight is None else next(others)
            for weight in (self.temperature, *self.matches, self.progress)
        )
        shares, at = {}, len(self.columns)
        for term, count in self.parts.items():
            shares[term], at = row[at : at + count], at + count
        return Weights(row[0], row[1], temperature, tuple(matches), progress, shares=shares)


@dataclass(frozen=True)
class Plan:
    """All that the objective needs to know of a config.

    Attributes:
        kd: the loss on logits, or None where its name is not known.
        matches: the intermediate matches.
        kd_weight: the KD loss's weight.
        hard_label_weight: the weight of the student's own losses.
        losses_required: whether a hard-label weight without ``losses`` is a mistake; with several
            tasks it may be meant for some of them.
        is_balanced: whether each term is scaled to the size of the hard labels' loss.
        units: term → over what each of its parts is a mean, see `counted`; empty where nobody asks.
        is_exact: whether the parts have shares, see `Weights.shares`.
    """

    kd: KD | None
    matches: tuple[Match, ...]
    kd_weight: Weight
    hard_label_weight: Weight
    losses_required: bool
    is_balanced: bool = False
    units: Units = field(default_factory=dict)
    is_exact: bool = False

    @property
    def scheduled(self) -> Scheduled:
        """What has a schedule; the KD and the hard labels' weights always count."""
        temperature = None if self.kd is None else self.kd.temperature
        return Scheduled(
            self.kd_weight,
            self.hard_label_weight,
            temperature if temperature is not None and temperature.scheduler else None,
            tuple(match.weight if match.weight.scheduler else None for match in self.matches),
            PROGRESS if self.init() else None,
            shared_parts(self.units, self.is_exact),
        )

    @property
    def needs(self) -> tuple[str, ...]:
        """The terms by which the state moves on."""
        kd = self.kd is not None and has_state(self.kd.loss)
        return (*((KD_TERM,) if kd else ()), *((HARD_TERM,) if self.is_balanced else ()))

    def init(self) -> dict[str, Any]:
        """The state that training starts with: of a KD loss that has one, and of the balance."""
        state: dict[str, Any] = {}
        if self.kd is not None and has_state(self.kd.loss):
            state["kd"] = self.kd.loss.init()
        if self.is_balanced:
            names = (KD_TERM, HARD_TERM, *(match.tag for match in self.matches))
            state["balance"] = {name: jnp.zeros((), jnp.float32) for name in names}
        return state

    def advance(self, state: Mapping[str, Any], means: Mapping[str, Any], progress: Any) -> Any:
        """The state after an optimizer step whose terms had these means; NaN: it had no such term."""
        after = dict(state)
        if "kd" in state:
            loss = means.get(KD_TERM, jnp.nan)
            moved = self.kd.loss.advance(state["kd"], loss, progress)  # type: ignore[union-attr]
            after["kd"] = jax.tree.map(
                lambda old, new: jnp.where(jnp.isnan(loss), old, new), state["kd"], moved
            )
        if "balance" in state:
            after["balance"] = {
                name: jnp.where(
                    jnp.isnan(means.get(name, jnp.nan)),
                    size,
                    _DECAY * size + (1 - _DECAY) * means.get(name, 0.0),
                )
                for name, size in state["balance"].items()
            }
        return after


def shared_parts(units: Units, is_exact: bool) -> dict[str, int]:
    """Term → its parts that have a share; none where means are accumulated."""
    return {term: len(each) for term, each in units.items()} if is_exact else {}


def resolve(
    config: DistillationConfig, *, logits_required: bool, losses_required: bool = True
) -> tuple[Plan, list[str]]:
    """Looks up every name of a config.

    Args:
        config: the config.
        logits_required: whether the distiller cannot do without logits.
        losses_required: see `Plan`.

    Returns:
        The plan, without what names no known loss, so that the rest can still be checked; and
        what is wrong.
    """
    problems: list[str] = []
    kd_loss = named_loss(presets.KD_LOSS_MAP, config.kd_loss_type, "kd_loss_type", problems)
    temperature = None
    if config.temperature_scheduler != "none":
        temperature = presets.TEMPERATURE_SCHEDULER[config.temperature_scheduler]
    matches = [
        _resolve_match(i, match, problems) for i, match in enumerate(config.intermediate_matches)
    ]
    kd = KD(
        kd_loss,
        presets.in_words(config.kd_loss_type),
        weight_of(config.temperature, config.base_temperature_scheduler),
        temperature,
        config.probability_shift,
        logits_required,
    )
    return Plan(
        None if kd_loss is None else kd,
        apart([match for match in matches if match is not None]),
        weight_of(config.kd_loss_weight, config.kd_loss_weight_scheduler),
        weight_of(config.hard_label_weight, config.hard_label_weight_scheduler),
        losses_required,
        config.balance == "hard_label",
    ), problems


def _resolve_match(i: int, match: IntermediateMatch, problems: list[str]) -> Match | None:
    where = f"intermediate_matches[{i}].loss"
    loss = named_loss(presets.MATCH_LOSS_MAP, match.loss, where, problems)
    if loss is None:
        return None
    layers = f"{_layers(match.layer_S)}_{_layers(match.layer_T)}"
    name = match.loss if isinstance(match.loss, str) else match.loss[0]
    return Match(
        match.feature,
        match.layer_S,
        match.layer_T,
        loss,
        presets.in_words(match.loss),
        weight_of(match.weight, match.weight_scheduler),
        str(i) if match.proj is not None else None,
        tuple(match.proj[:3]) if match.proj is not None else None,
        match.proj[3] if match.proj is not None and len(match.proj) > 3 else {},
        f"unweighted_{match.feature}_{name}_{layers}",
    )


def apart(matches: Sequence[Match], others: Sequence[Match] = ()) -> tuple[Match, ...]:
    """The matches with a tag each: the second of one tag gets ``_2``, the third ``_3``.

    Args:
        matches: those to be told apart.
        others: further ones, which keep their tags.
    """
    seen = Counter(match.tag for match in others)
    kept = []
    for match in matches:
        seen[match.tag] += 1
        count = seen[match.tag]
        kept.append(match if count == 1 else replace(match, tag=f"{match.tag}_{count}"))
    return tuple(kept)


def named_loss(table: Any, given: Any, where: str, problems: list[str]) -> Any:
    """The loss that a config names, with its options; None, and a problem, where there is none."""
    name = given if isinstance(given, str) else given[0]
    if name not in table:
        problems.append(f"{where}={name!r} is not a known loss: {suggest(name, table)}")
        return None
    try:
        return presets.bound(table, given)
    except ValueError as error:
        problems.append(f"{where}: {error}")
        return None


def has_state(loss: Any) -> bool:
    """Whether a KD loss learns from the losses before, see `losses.stateful`."""
    return hasattr(loss, "init") and hasattr(loss, "advance")


def without_options(function: Callable) -> Callable:
    """A function of a table as it stands there, whatever options a config gives it."""
    if has_state(function):
        return type(function)
    return function.func if isinstance(function, functools.partial) else function


def weight_of(value: float, scheduler: str | Sequence[Any] | None) -> Weight:
    """A configured weight with the schedule that a config names."""
    if scheduler in ("none", None):
        return Weight(value)
    return Weight(value, presets.bound(presets.WEIGHT_SCHEDULER, scheduler))


def _layers(layers: Layers) -> str:
    return str(layers) if isinstance(layers, int | str) else "-".join(map(str, layers))


def make_projection(proj: Any, key: jax.Array) -> nnx.Module | None:
    """Makes the projection of a match.

    Args:
        proj: None, an `nnx.Module`, or ``[name, dim_S, dim_T, …]``.
        key: for its initial weights.

    Raises:
        TypeError: if what is registered under the name makes no `nnx.Module`.
        ValueError: if `proj` is none of these.
    """
    if proj is None or isinstance(proj, nnx.Module):
        return proj
    if not isinstance(proj, list | tuple) or len(proj) < 3 or proj[0] not in presets.PROJ_MAP:
        raise ValueError(
            f"a projection is [name, dim_S, dim_T] with a name of {', '.join(presets.PROJ_MAP)}, or an "
            f"nnx.Module; got {proj!r}"
        )
    name, dim_S, dim_T = proj[:3]
    module = presets.PROJ_MAP[name](dim_S, dim_T, rngs=nnx.Rngs(key))
    if not isinstance(module, nnx.Module):
        raise TypeError(
            f"the projection {name!r} made a {type(module).__name__}; PROJ_MAP holds functions "
            "(dim_in, dim_out, *, rngs) -> nnx.Module"
        )
    return module


def plan_terms(plan: Plan) -> list[str]:
    """The terms of a plan in words; those that are only logged say so."""
    lines = []
    balanced = ", scaled to the size of the hard labels' loss" if plan.is_balanced else ""
    for weight, what in (
        (plan.kd_weight, _kd(plan) + balanced),
        (plan.hard_label_weight, "the student's own losses"),
    ):
        note = "  (logged only)" if weight.is_zero else ""
        lines.append(f"{weight} × {what}{note}")
    for match in plan.matches:
        proj = (
            f", projected {match.proj[1]} → {match.proj[2]} ({match.proj[0]})" if match.proj else ""
        )
        note = "  (logged only)" if match.weight.is_zero else ""
        lines.append(f"{match.weight} × {match}{proj}{balanced}{note}")
    return lines


def _kd(plan: Plan) -> str:
    if plan.kd is None:
        return "KD"
    scheduled = ", then by its scheduler" if plan.kd.temperature.scheduler else ""
    return f"KD by {plan.kd.loss_name!r}, temperature {plan.kd.temperature.initial}{scheduled}"
