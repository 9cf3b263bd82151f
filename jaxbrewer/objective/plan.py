"""A `DistillationConfig` resolved: names become functions, layers get their tags, once."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from flax import nnx

from .. import presets
from ..configurations.configs import DistillationConfig, IntermediateMatch
from ..errors import suggest
from .tables import tabulate

Layers = int | str | Sequence[int]


@dataclass(frozen=True)
class Weight:
    """A loss weight: the configured value for the first update, then the scheduler's.

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
        loss: ``(logits_S, logits_T, temperature)``, and ``mask=`` if it takes one.
        loss_name: its name in `presets.KD_LOSS_MAP`.
        temperature: the configured temperature.
        temperature_scheduler: ``(logits_S, logits_T, temperature)``, and ``mask=`` if it takes
            one, → temperatures; or None.
        probability_shift: whether the teacher's largest logit and the label's are swapped.
        required: whether logits must be there, or are used only if both sides have them.
    """

    loss: Callable
    loss_name: str
    temperature: float
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
        weight: its weight.
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
    weight: float
    projection: str | None
    proj: tuple[str, int, int] | None
    options: Any
    tag: str

    def __str__(self) -> str:
        return f"{self.feature} T{_layers(self.layer_T)} → S{_layers(self.layer_S)} by {self.loss_name}"


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
    """

    kd: KD | None
    matches: tuple[Match, ...]
    kd_weight: Weight
    hard_label_weight: Weight
    losses_required: bool


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
    kd_loss = _look_up(presets.KD_LOSS_MAP, config.kd_loss_type, "kd_loss_type", problems)
    temperature = None
    if config.temperature_scheduler != "none":
        temperature = presets.TEMPERATURE_SCHEDULER[config.temperature_scheduler]
    matches = [
        _resolve_match(i, match, problems) for i, match in enumerate(config.intermediate_matches)
    ]
    kd = KD(
        kd_loss,
        config.kd_loss_type,
        config.temperature,
        temperature,
        config.probability_shift,
        logits_required,
    )
    return Plan(
        None if kd_loss is None else kd,
        tuple(match for match in matches if match is not None),
        _weight(config.kd_loss_weight, config.kd_loss_weight_scheduler),
        _weight(config.hard_label_weight, config.hard_label_weight_scheduler),
        losses_required,
    ), problems


def _resolve_match(i: int, match: IntermediateMatch, problems: list[str]) -> Match | None:
    where = f"intermediate_matches[{i}].loss"
    loss = _look_up(presets.MATCH_LOSS_MAP, match.loss, where, problems)
    if loss is None:
        return None
    layers = f"{_layers(match.layer_S)}_{_layers(match.layer_T)}"
    return Match(
        match.feature,
        match.layer_S,
        match.layer_T,
        loss,
        match.loss,
        match.weight,
        str(i) if match.proj is not None else None,
        tuple(match.proj[:3]) if match.proj is not None else None,
        match.proj[3] if match.proj is not None and len(match.proj) > 3 else {},
        f"unweighted_{match.feature}_{match.loss}_{layers}",
    )


def _look_up(table: Any, name: str, where: str, problems: list[str]) -> Any:
    if name in table:
        return table[name]
    problems.append(f"{where}={name!r} is not a known loss: {suggest(name, table)}")
    return None


def _weight(value: float, scheduler: str | None) -> Weight:
    return Weight(
        value, None if scheduler in ("none", None) else presets.WEIGHT_SCHEDULER[scheduler]
    )


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
    for weight, what in (
        (plan.kd_weight, _kd(plan)),
        (plan.hard_label_weight, "the student's own losses"),
    ):
        scheduled = ", then by its scheduler" if weight.scheduler else ""
        note = "  (logged only)" if weight.is_zero else ""
        lines.append(f"{weight.initial:g}{scheduled} × {what}{note}")
    for match in plan.matches:
        proj = (
            f", projected {match.proj[1]} → {match.proj[2]} ({match.proj[0]})" if match.proj else ""
        )
        note = "  (logged only)" if not match.weight else ""
        lines.append(f"{match.weight:g} × {match}{proj}{note}")
    return lines


def _kd(plan: Plan) -> str:
    return f"KD by {plan.kd.loss_name!r}, temperature {plan.kd.temperature}" if plan.kd else "KD"
