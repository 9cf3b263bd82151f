"""Objectives: what a step minimises, each a value with a call and all that preflight asks of it."""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Protocol, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..configurations.configs import DistillationConfig
from ..data.batches import Batch
from ..errors import Findings
from ..models.adaptors import Results
from ..models.handle import Model
from .exact import hard_label_counts, hard_label_units, plan_counts, plan_units
from .loss import (
    Loss,
    Project,
    distillation_loss,
    full_weights,
    hard_label_term,
    project_by_shape,
)
from .plan import (
    HARD_TERM,
    KD_TERM,
    PROGRESS,
    Match,
    Plan,
    Scheduled,
    Weights,
    apart,
    plan_terms,
    resolve,
    shared_parts,
)
from .terms import check_plan


class Objective(Protocol):
    """What is minimised.

    Attributes:
        missing: the names it looked up and did not find, each with its fix.
        scheduled: what its schedules give each update.
    """

    @property
    def missing(self) -> Sequence[str]: ...  # noqa: D102

    @property
    def scheduled(self) -> Scheduled: ...  # noqa: D102

    def __call__(
        self, results_S: Results, results_T: Results, project: Project, weights: Weights
    ) -> Loss:
        """The loss of a batch: a pure function of its arguments.

        Args:
            results_S: the student's results, as `adaptors.freeze` gives them.
            results_T: the teacher's.
            project: ``(name, feature_S) -> feature`` applies a projection.
            weights: the scheduled weights at this update.
        """
        ...

    @property
    def needs(self) -> Sequence[str]:
        """The terms by which its state moves on."""
        ...

    def init(self) -> Any:
        """The state that it starts with; an empty one has none."""
        ...

    def advance(self, state: Any, means: Mapping[str, Any], weights: Weights) -> Any:
        """The state after an optimizer step.

        Args:
            state: before it; in the step's calls it is ``weights.state``.
            means: term → the mean of its values over the step's micro-batches, ``total`` among them;
                NaN where none of them had it.
            weights: the scheduled weights at this update.
        """
        ...

    def check(
        self,
        results_S: Results,
        results_T: Results,
        batch: Batch,
        projections: Mapping[str, Model],
        found: Findings,
    ) -> None:
        """Checks both sides' results by shape; what is wrong goes into `found`."""
        ...

    def with_matches(self, matches: Sequence[Match]) -> "Objective":
        """The same objective with further matches, those of submodules."""
        ...

    def counted(
        self,
        results_S: Results,
        results_T: Results,
        projections: Mapping[str, Model],
        problems: list[str],
        *,
        is_exact: bool,
    ) -> "Objective":
        """The same objective, which knows over what each part of it is a mean: see `exact`.

        Args:
            results_S: the student's results by shape.
            results_T: the teacher's.
            projections: name → projection.
            problems: gets what is no such mean.
            is_exact: whether its rows hold the parts' shares, see `plan.Weights.shares`.
        """
        ...

    def counts(self, results_S: Results, results_T: Results) -> Array:
        """What each part of it, once `counted`, is a mean over in this batch: ``[parts]``."""
        ...

    def terms(self, names: Sequence[str]) -> list[str]:
        """The objective in words, a line a term; `names` are the terms that its loss has."""
        ...


@dataclass(frozen=True)
class PlanObjective:
    """What a `DistillationConfig` asks for.

    Attributes:
        plan: the config, resolved.
        missing: see `Objective`.
    """

    plan: Plan
    missing: tuple[str, ...] = ()

    @classmethod
    def of(
        cls, config: DistillationConfig, *, logits_required: bool, losses_required: bool = True
    ) -> Self:
        """Resolves a config; see `plan.resolve`."""
        plan, missing = resolve(
            config, logits_required=logits_required, losses_required=losses_required
        )
        return cls(plan, tuple(missing))

    @property
    def scheduled(self) -> Scheduled:
        """See `Objective`."""
        return self.plan.scheduled

    def __call__(
        self, results_S: Results, results_T: Results, project: Project, weights: Weights
    ) -> Loss:
        """See `Objective`."""
        return distillation_loss(self.plan, results_S, results_T, project, weights)

    @property
    def needs(self) -> Sequence[str]:
        """See `Objective`."""
        return self.plan.needs

    def init(self) -> Any:
        """See `Objective`."""
        return self.plan.init()

    def advance(self, state: Any, means: Mapping[str, Any], weights: Weights) -> Any:
        """See `Objective`."""
        return self.plan.advance(state, means, weights.progress)

    def check(
        self,
        results_S: Results,
        results_T: Results,
        batch: Batch,
        projections: Mapping[str, Model],
        found: Findings,
    ) -> None:
        """See `Objective`."""
        check_plan(self.plan, results_S, results_T, batch, projections, found)

    def with_matches(self, matches: Sequence[Match]) -> Self:
        """See `Objective`."""
        mine = self.plan.matches
        plan = replace(self.plan, matches=(*mine, *apart(matches, mine)))
        return replace(self, plan=plan)

    def counted(
        self,
        results_S: Results,
        results_T: Results,
        projections: Mapping[str, Model],
        problems: list[str],
        *,
        is_exact: bool,
    ) -> Self:
        """See `Objective`."""
        project = project_by_shape(projections)
        units = plan_units(self.plan, results_S, results_T, project, problems)
        return replace(self, plan=replace(self.plan, units=units, is_exact=is_exact))

    def counts(self, results_S: Results, results_T: Results) -> Array:
        """See `Objective`."""
        return plan_counts(self.plan, self.plan.units, results_S, results_T)

    def terms(self, names: Sequence[str]) -> list[str]:
        """See `Objective`; the KD and hard-label terms only where they are computed."""
        first_two = (KD_TERM, HARD_TERM)
        lines = plan_terms(self.plan)
        computed = [name in names for name in first_two]
        kept = [line for line, is_there in zip(lines, computed, strict=False) if is_there]
        return kept + lines[len(first_two) :]


@dataclass(frozen=True)
class HardLabels:
    """The model's own losses: supervised training."""

    missing: tuple[str, ...] = ()
    scheduled: Scheduled = field(default_factory=Scheduled)

    def __call__(
        self, results_S: Results, results_T: Results, project: Project, weights: Weights
    ) -> Loss:
        """The sum of the means of the model's losses."""
        return Loss(hard_label_term(results_S, weights.shares.get(HARD_TERM)), {}, 0)

    @property
    def needs(self) -> Sequence[str]:
        """See `Objective`."""
        return ()

    def init(self) -> Any:
        """See `Objective`: it has none."""
        return ()

    def advance(self, state: Any, means: Mapping[str, Any], weights: Weights) -> Any:
        """See `Objective`."""
        return state

    def check(
        self,
        results_S: Results,
        results_T: Results,
        batch: Batch,
        projections: Mapping[str, Model],
        found: Findings,
    ) -> None:
        """See `Objective`."""
        if "losses" not in results_S:
            returned = ", ".join(map(repr, results_S)) or "nothing"
            found.problems.append(
                f"the adaptor returns {returned}, but no 'losses' to minimise. Return the model's "
                "loss under 'losses' (does the batch hold the labels?)"
            )

    def with_matches(self, matches: Sequence[Match]) -> Self:
        """The same: nothing is matched without a teacher."""
        return self

    def counted(
        self,
        results_S: Results,
        results_T: Results,
        projections: Mapping[str, Model],
        problems: list[str],
        *,
        is_exact: bool,
    ) -> Self:
        """See `Objective`."""
        parts = shared_parts(hard_label_units(results_S, problems), is_exact)
        return replace(self, scheduled=self.scheduled._replace(parts=parts))

    def counts(self, results_S: Results, results_T: Results) -> Array:
        """See `Objective`."""
        return jnp.stack(hard_label_counts(results_S))

    def terms(self, names: Sequence[str]) -> list[str]:
        """See `Objective`."""
        return ["the sum of the losses the adaptor returns"]


@dataclass(frozen=True)
class Extension:
    """What objectives share that extend another, `base`.

    Attributes:
        base: the other.
        adds: what they add to it, for messages.
    """

    base: Objective
    adds: ClassVar[str] = "compute_loss"

    @property
    def missing(self) -> Sequence[str]:
        """See `Objective`."""
        return self.base.missing

    @property
    def scheduled(self) -> Scheduled:
        """See `Objective`."""
        return self.base.scheduled

    @property
    def needs(self) -> Sequence[str]:
        """See `Objective`."""
        return self.base.needs

    def init(self) -> Any:
        """See `Objective`."""
        return self.base.init()

    def advance(self, state: Any, means: Mapping[str, Any], weights: Weights) -> Any:
        """See `Objective`."""
        return self.base.advance(state, means, weights)

    def with_matches(self, matches: Sequence[Match]) -> Self:
        """See `Objective`."""
        return replace(self, base=self.base.with_matches(matches))

    def counted(
        self,
        results_S: Results,
        results_T: Results,
        projections: Mapping[str, Model],
        problems: list[str],
        *,
        is_exact: bool,
    ) -> Self:
        """See `Objective`: of what is added to `base` nothing says what it is a mean over."""
        problems.append(
            f"{self.adds} is no mean over examples, positions or labels that could be told: neither "
            "gradient_accumulation='exact' nor 'sample_weight' can be had with it. Leave these out; or "
            "write what it adds as a loss, in presets.KD_LOSS_MAP or MATCH_LOSS_MAP"
        )
        return self

    def counts(self, results_S: Results, results_T: Results) -> Array:
        """See `Objective`."""
        return self.base.counts(results_S, results_T)

    def terms(self, names: Sequence[str]) -> list[str]:
        """The names of its terms: how it weighs them, only its code says."""
        return list(names)


_base: ContextVar[Callable[..., Loss] | None] = ContextVar("base", default=None)


@dataclass(frozen=True)
class Overridden(Extension):
    """A user's ``compute_loss`` over the objective that it overrides.

    The schedule's rows and the names come from `base`. So do the checks by shape, where the method
    evaluates it by ``super().compute_loss(…)``; what it does beside that is checked by running it.

    Attributes:
        base: the distiller's own objective.
        method: ``(results_S, results_T, project, weights) -> Loss``, or the pair
            ``(total, {name: term})``.
        begin: gives the state of the user's own that it starts with.
        move: ``(state, means, weights) -> state``, see `Objective.advance`.
    """

    method: Callable[..., Any]
    begin: Callable[[], Any] = tuple
    move: Callable[..., Any] = lambda state, means, weights: state

    @property
    def scheduled(self) -> Scheduled:
        """See `Objective`."""
        has_state = bool(jax.tree.leaves(self.begin()))
        return self.base.scheduled._replace(progress=PROGRESS) if has_state else self.base.scheduled

    def init(self) -> Any:
        """See `Objective`: the user's own, and that of `base`."""
        return {"own": self.begin(), "base": self.base.init()}

    def advance(self, state: Any, means: Mapping[str, Any], weights: Weights) -> Any:
        """See `Objective`."""
        own = self.move(state["own"], means, weights._replace(state=state["own"]))
        base = self.base.advance(state["base"], means, weights._replace(state=state["base"]))
        return {"own": own, "base": base}

    def __call__(
        self, results_S: Results, results_T: Results, project: Project, weights: Weights
    ) -> Loss:
        """See `Objective`.

        Raises:
            TypeError: the method returned something else.
        """
        return self._run(self.base, results_S, results_T, project, weights)

    def _run(self, base: Callable[..., Loss], *arguments: Any) -> Loss:
        *results, weights = arguments
        state = weights.state or {"own": (), "base": ()}

        def inner(*arguments: Any) -> Loss:
            *results, weights = arguments
            return base(*results, weights._replace(state=state["base"]))

        token = _base.set(inner)
        try:
            loss = self.method(*results, weights._replace(state=state["own"]))
        finally:
            _base.reset(token)
        if isinstance(loss, Loss):
            return loss._replace(total=_number(loss.total), terms=_numbers(loss.terms))
        if not (isinstance(loss, tuple) and len(loss) == 2 and isinstance(loss[1], Mapping)):
            raise TypeError(
                f"compute_loss returned a {type(loss).__name__}; return the pair (total, {{name: "
                "term}}) or a jaxbrewer.Loss"
            )
        return Loss(_number(loss[0]), _numbers(loss[1]), 0)

    def check(
        self,
        results_S: Results,
        results_T: Results,
        batch: Batch,
        projections: Mapping[str, Model],
        found: Findings,
    ) -> None:
        """See `Objective`."""
        calls: list[bool] = []

        def base(*arguments: Any) -> Loss:
            calls.append(True)
            return self.base(*arguments)

        def run(results_S: Results, results_T: Results) -> Any:
            project = project_by_shape(projections)
            return self._run(base, results_S, results_T, project, full_weights(self.init())).total

        # What fails here fails again, and is told, when the whole loss is traced.
        with contextlib.suppress(Exception):
            jax.eval_shape(run, results_S, results_T)
        if calls:
            self.base.check(results_S, results_T, batch, projections, found)


def _numbers(terms: Mapping[str, Any]) -> dict[str, Any]:
    return {name: _number(term) for name, term in terms.items()}


def _number(value: Any) -> Any:
    """A Python integer, such as the 0 that a sum begins with, as the float that it stands for."""
    return float(value) if isinstance(value, int) else value


def base_loss(results_S: Results, results_T: Results, project: Project, weights: Weights) -> Loss:
    """What ``super().compute_loss(…)`` gives: the objective that is overridden, while it is traced.

    Raises:
        ValueError: when called outside.
    """
    evaluate = _base.get()
    if evaluate is None:
        raise ValueError("compute_loss runs inside train() or check(), which read the config")
    return evaluate(results_S, results_T, project, weights)
