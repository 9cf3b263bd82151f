"""The train step: teacher, student, loss, gradient, update, metrics, in one compiled program."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..data.batches import Batch, sides
from ..errors import BatchError
from ..models.adaptors import Results, Side
from ..models.handle import Model
from ..models.precision import FLOAT32, Precision, used_as
from ..models.teachers import Teacher
from ..models.trainable import Parting
from ..objective.loss import Loss, Weights
from ..objective.objectives import Objective
from . import guard as guards
from . import loss_scale, memory
from .optimizer import accumulates, closes_window, drop_window, without_update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes in training.

    Attributes:
        params: ``{'student': …, 'projections': {name: …}}``; in a step, without the student's frozen
            leaves, see `Program.parted`.
        model_state: the same two keys: batch statistics and random keys.
        opt_state: the optimizer's, an open accumulation window included.
        key: the random key every step's key is folded from.
        micro_step: int32 scalar, micro-batches seen.
        scaling: the loss scale's state, see `loss_scale.Scaling`; `()` where none is needed.
        guard: the guard's state, see `guard.Guard`.
        objective: the objective's own state, see `memory`; `()` where it has none.
    """

    params: Any
    model_state: Any
    opt_state: Any
    key: jax.Array
    micro_step: jax.Array
    scaling: Any = ()
    guard: Any = ()
    objective: Any = ()


@dataclass(frozen=True)
class Program:
    """What a step is made of; everything here is fixed when the step is compiled.

    Attributes:
        student: the student's side.
        teacher: the teacher.
        projections: name → projection.
        objective: both sides' results, projections and weights → loss.
        optimizer: see `optimizer.build`.
        names: the terms of the loss in the order of the metrics.
        reads: the teacher's results that the objective reads, by path (``'hidden/3'``).
        train: whether the student runs in train mode.
        precision: the level; the models are at it already.
        axis: the mapped axis over which devices average what each computed on its own rows; None
            where there is none, and the batch is seen whole.
        max_nonfinite_steps: see `guard.Guard.limit`.
        parting: which of the student's parameters are trained; None: all.
        observed: the terms of all tasks, where the objective has a state that moves on by them.
        together: ``(side, arrays, types) -> arrays``: brings those of a side, ``'student'`` (the
            projections' too) or ``'teacher'``, together before they are used, where they lie in
            pieces on devices. They come in the types they have; those in which they are used are
            enough to send.
    """

    student: Side
    teacher: Teacher
    projections: Mapping[str, Model]
    objective: Objective
    optimizer: optax.GradientTransformationExtraArgs
    names: tuple[str, ...]
    train: bool
    precision: Precision = FLOAT32
    axis: str | None = None
    reads: frozenset[str] = frozenset()
    max_nonfinite_steps: int | None = 1
    parting: Parting | None = None
    observed: tuple[str, ...] = ()
    together: Callable[[str, Any, Any], Any] = lambda side, arrays, types: arrays

    @property
    def variables(self) -> tuple[Any, Any]:
        """The parameters and the other state that training starts from, as the user holds them."""
        params = {
            "student": self.student.model.params,
            "projections": {name: p.params for name, p in self.projections.items()},
        }
        model_state = {
            "student": self.student.model.state,
            "projections": {name: p.state for name, p in self.projections.items()},
        }
        return params, model_state

    @property
    def row(self) -> np.ndarray:
        """A row of ones, for tracing: what a schedule gives an update, see `Scheduled`."""
        return np.ones(self.objective.scheduled.width, jnp.result_type(float))

    def init(self, seed: int, variables: Any = None) -> TrainState:
        """The state before the first step, in arrays of its own: nothing the user holds is donated.

        It is whole, as checkpoints hold it; what a step takes, `parted` gives. `variables` are
        `Program.variables`, perhaps placed elsewhere.
        """
        params, model_state = jax.tree.map(
            lambda x: jnp.array(x, copy=True), self.variables if variables is None else variables
        )
        key = jax.random.key(seed)
        scaling = loss_scale.start() if self.precision.is_scaled else ()
        opt_state = self.optimizer.init(self.trained(params))
        before = model_state if accumulates(opt_state) else ()
        guard = guards.start(self.max_nonfinite_steps, before)
        objective = memory.start(self.objective.init(), self.observed)
        return TrainState(
            params, model_state, opt_state, key, jnp.int32(0), scaling, guard, objective
        )

    def trained(self, params: Any) -> Any:
        """Parameters without the student's frozen leaves: what gradients and optimizer see."""
        if self.parting is None:
            return params
        return {**params, "student": self.parting.part(params["student"])[0]}

    def whole(self, params: Any, frozen: Any) -> Any:
        """The way back: with the frozen leaves."""
        if self.parting is None:
            return params
        return {**params, "student": self.parting.join(params["student"], frozen)}

    def parted(self, state: TrainState) -> tuple[TrainState, Any]:
        """A whole state → the one that a step takes, and the frozen leaves beside it."""
        if self.parting is None:
            return state, ()
        _, frozen = self.parting.part(state.params["student"])
        return replace(state, params=self.trained(state.params)), frozen

    def joined(self, state: TrainState, frozen: Any) -> TrainState:
        """The way back."""
        return replace(state, params=self.whole(state.params, frozen))

    def loss(
        self,
        params: Any,
        model_state: Any,
        key: jax.Array,
        batch: Batch,
        results_T: Results,
        weights: Weights,
    ) -> tuple[Any, tuple[Loss, Any]]:
        """The loss of a batch: ``total, (loss, new model state)``."""
        student_key, projection_key = jax.random.split(key)
        results_S, student_state = self.student(
            params["student"], model_state["student"], student_key, batch, self.train
        )
        projection_states = dict(model_state["projections"])

        def project(name: str, feature: jax.Array) -> jax.Array:
            model = self.projections[name]
            mine = params["projections"][name], projection_states[name]
            feature, projection_states[name] = model.apply(
                *mine, projection_key, (feature,), {}, self.train
            )
            return feature

        loss = self.objective(results_S, results_T, project, weights)
        return loss.total, (loss, {"student": student_state, "projections": projection_states})

    def step(
        self,
        state: TrainState,
        teacher_variables: Any,
        batch: Batch,
        schedule: jax.Array,
        frozen: Any = (),
    ) -> tuple[TrainState, jax.Array]:
        """One micro-batch.

        Args:
            state: before the step; donated.
            teacher_variables: the teacher's arrays.
            batch: from `batches.own`.
            schedule: weight of the KD loss, of the hard labels, learning-rate factor, and what else
                is scheduled: see `Scheduled.columns`; with exact accumulation the parts' shares too.
            frozen: the student's frozen leaves, see `parted`; not donated.

        Returns:
            The state after the step, and the metrics ``[3 + terms]``: the total, the surplus of
            `Loss`, the verdict of the `guard`, then the terms in the order of `names`. With a loss
            scale, two more: the scale that this micro-batch had, and the windows dropped so far.
        """
        inputs = self.inputs(state, teacher_variables, batch, schedule)
        total, backward, (loss, model_state) = jax.vjp(
            lambda params: self.loss(self._trained_together(params, frozen), *inputs),
            state.params,
            has_aux=True,
        )
        scale = state.scaling.scale if self.precision.is_scaled else 1.0
        (grads,) = backward(jnp.asarray(scale, total.dtype))
        metrics = jnp.stack([jnp.asarray(x, total.dtype) for x in self.values(loss)])
        if self.axis is not None:
            grads, model_state, metrics = average(self.axis, grads, model_state, metrics)
        model_state = self.steady(state.model_state, model_state)
        finite = guards.is_finite((metrics[0], grads))
        finite &= guards.stays_finite(state.model_state, model_state)
        if self.axis is not None:
            finite = jax.lax.pmin(finite.astype(jnp.int32), self.axis) > 0
        held = state.guard.stopped
        if self.precision.is_scaled:
            grads = loss_scale.unscale(state.scaling, grads, finite)
        else:
            held = guards.stops(state.guard, finite)
            if state.guard.counts and accumulates(state.opt_state):
                grads = guards.zero_unless(finite, grads)

        def update(trained: tuple[Any, Any]) -> tuple[Any, Any]:
            params, opt_state = trained
            updates, opt_state = self.optimizer.update(grads, opt_state, params, factor=schedule[2])
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = guards.unless(held, update, (state.params, state.opt_state))
        seen = {memory.TOTAL: metrics[0], **dict(zip(self.names, metrics[2:], strict=True))}
        new = replace(
            state,
            params=params,
            model_state=model_state,
            opt_state=opt_state,
            micro_step=state.micro_step + 1,
            objective=memory.advance(
                state.objective,
                seen,
                closes_window(opt_state),
                lambda value, means: self.objective.advance(value, means, inputs[-1]),
            ),
        )
        new, verdict = guarded(state, new, finite)
        last: Sequence[Any] = (scale, new.scaling.skipped) if self.precision.is_scaled else ()
        verdict, *last = (jnp.asarray(x, total.dtype)[None] for x in (verdict, *last))
        return new, jnp.concatenate([metrics[:2], verdict, metrics[2:], *last])

    def steady(self, old: Any, new: Any) -> Any:
        """The model state after a step, that of frozen submodules as it was."""
        if self.parting is None:
            return new
        return {**new, "student": self.parting.steady(old["student"], new["student"])}

    def inputs(
        self, state: TrainState, teacher_variables: Any, batch: Batch, schedule: Any
    ) -> tuple[Any, ...]:
        """What `loss` gets in a step beside the parameters."""
        teacher_batch, student_batch, cache = sides(batch)
        types = jax.tree.map(lambda x: x.dtype, teacher_variables)
        variables = self.together("teacher", teacher_variables, types)
        results_T = jax.lax.stop_gradient(self.teacher(variables, teacher_batch, cache))
        key = jax.random.fold_in(state.key, state.micro_step)
        if self.axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(self.axis))
        weights = self.objective.scheduled.read(schedule)
        weights = weights._replace(state=memory.value_of(state.objective))
        return state.model_state, key, student_batch, results_T, weights

    def _trained_together(self, params: Any, frozen: Any) -> Any:
        params = self.whole(params, frozen)
        types = {
            "student": used_as(self.student.model, params["student"]),
            "projections": {
                name: used_as(model, params["projections"][name])
                for name, model in self.projections.items()
            },
        }
        return self.together("student", params, types)

    def counts(
        self, state: TrainState, teacher_variables: Any, batch: Batch, frozen: Any = ()
    ) -> Any:
        """What each part of the objective is a mean over in a batch: ``[parts]``; see `objective.exact`.

        Where this comes of the batch alone, the compiler drops the models.
        """
        row = jnp.asarray(self.row)
        model_state, key, student_batch, results_T, _ = self.inputs(
            state, teacher_variables, batch, row
        )
        params = self.whole(state.params, frozen)
        student_key, _ = jax.random.split(key)
        arguments = params["student"], model_state["student"], student_key, student_batch
        results_S, _ = self.student(*arguments, self.train)
        return self.objective.counts(results_S, results_T)

    def values(self, loss: Loss) -> list[Any]:
        """What the metrics hold, in their order.

        Raises:
            BatchError: when traced for a batch whose terms are not those of the first batch.
        """
        if set(loss.terms) != set(self.names):
            raise BatchError(
                f"this batch gives the terms {sorted(loss.terms)}, and the first one gave "
                f"{sorted(self.names)}. Do some batches lack labels, or an output? All must have the "
                "same; or train them as tasks of a MultiTaskDistiller"
            )
        return [loss.total, loss.surplus, *(loss.terms[name] for name in self.names)]

    def examine(
        self,
        state: TrainState,
        teacher_variables: Any,
        batch: Batch,
        schedule: jax.Array,
        frozen: Any = (),
        term: str | None = None,
    ) -> dict[str, dict[str, jax.Array]]:
        """What is finite in a step from a state that has stopped: kind → name → whether it is.

        The kinds are the weights as they are, the teacher's results, the gradient, the weights after
        its update, and the student's new state. `term`: of which term the gradient is taken; None:
        of the total.
        """
        model_state, key, student_batch, results_T, weights = self.inputs(
            state, teacher_variables, batch, schedule
        )

        def value(params: Any) -> tuple[Any, Any]:
            whole = self.whole(params, frozen)
            inputs = whole, model_state, key, student_batch, results_T, weights
            total, (loss, new) = self.loss(*inputs)
            return (total if term is None else loss.terms[term]), new

        grads, new = jax.grad(value, has_aux=True)(state.params)
        if self.axis is not None:
            grads = jax.tree.map(lambda x: jax.lax.pmean(x, self.axis), grads)
        updates, _ = self.optimizer.update(grads, state.opt_state, state.params, factor=schedule[2])
        params = optax.apply_updates(state.params, updates)
        found = {
            "weights": by_name(guards.is_finite, self.whole(state.params, frozen)),
            "teacher": by_name(guards.is_finite, results_T),
            "gradient": by_name(guards.is_finite, grads),
            "update": by_name(guards.stays_finite, state.params, params),
            "state": by_name(guards.stays_finite, model_state, new),
        }
        if self.axis is None:
            return found
        return jax.tree.map(lambda x: jax.lax.pmin(x.astype(jnp.int32), self.axis), found)

    @functools.cached_property
    def compiled(self) -> Any:
        """The step, jitted; it owns the state it is given."""
        return jax.jit(self.step, donate_argnums=0)


def average(axis: str, grads: Any, model_state: Any, metrics: jax.Array) -> tuple[Any, Any, Any]:
    """Averages over the devices of a mapped axis: gradients, float state such as batch statistics,
    and metrics; of the surplus (see `Loss`), the largest of all devices."""

    def mean(x: jax.Array) -> jax.Array:
        return jax.lax.pmean(x, axis) if jnp.issubdtype(x.dtype, jnp.floating) else x

    surplus = metrics[1]
    high, low = jax.lax.pmax(surplus, axis), jax.lax.pmin(surplus, axis)
    metrics = jax.lax.pmean(metrics, axis).at[1].set(jnp.where(high >= -low, high, low))
    return jax.tree.map(mean, grads), jax.tree.map(mean, model_state), metrics


def by_name(look: Callable[..., jax.Array], *trees: Any) -> dict[str, jax.Array]:
    """The name of each float leaf → what `look` says of it."""
    names = [
        jax.tree_util.keystr(path, simple=True, separator="/")
        for path, _ in jax.tree_util.tree_leaves_with_path(trees[0])
    ]
    leaves = zip(names, *(jax.tree.leaves(tree) for tree in trees), strict=True)
    return {
        name: look(*each) for name, *each in leaves if jnp.issubdtype(each[0].dtype, jnp.floating)
    }


def guarded(old: TrainState, new: TrainState, finite: jax.Array) -> tuple[TrainState, jax.Array]:
    """The state after a micro-batch: what it has spoilt is as it was; once stopped, all of it is.

    Args:
        old: before the micro-batch.
        new: as it would be after it; where a fault stops it, weights and optimizer are as before.
        finite: whether its loss, gradient and model state are finite.

    Returns:
        The state, and the verdict, see `guard`.
    """
    closes = closes_window(new.opt_state)
    scaling, overflowed, exhausted = old.scaling, jnp.bool_(False), jnp.bool_(False)
    updated = _may_spoil_weights(new.params)
    faultless = guards.stays_finite(old.params, new.params) if updated else jnp.bool_(True)
    if isinstance(scaling, loss_scale.Scaling):
        scaling, overflowed = loss_scale.advance(scaling, finite, closes)
        exhausted = loss_scale.is_exhausted(scaling, finite)
    else:
        faultless &= finite
    guard, dropped = guards.advance(old.guard, faultless, closes)
    stopped = guard.stopped | exhausted
    if updated or guard.counts or isinstance(scaling, loss_scale.Scaling):
        dropped |= overflowed | stopped
        new = replace(
            new,
            params=guards.keep(old.params, new.params, dropped),
            opt_state=without_update(old.opt_state, new.opt_state, dropped, stopped),
        )
    model_state = guards.keep(old.model_state, new.model_state, ~finite | stopped)
    if jax.tree.leaves(guard.before):
        before = guards.keep(guard.before, model_state, ~closes | stopped)
        guard = replace(guard, before=before)
    after = replace(
        new,
        model_state=model_state,
        micro_step=guards.keep(old.micro_step, new.micro_step, stopped),
        scaling=guards.keep(old.scaling, scaling, stopped),
        guard=replace(guards.keep(old.guard, guard, stopped), stopped=stopped),
        objective=memory.guarded(old.objective, new.objective, dropped, stopped),
    )
    verdict = jnp.where(faultless, guards.GOOD, guards.BAD)
    verdict = jnp.where(guard.stopped, guards.STOPPED, verdict)
    return after, jnp.where(exhausted & ~guard.stopped, guards.EXHAUSTED, verdict)


def _may_spoil_weights(params: Any) -> bool:
    """Whether an update by a finite gradient is looked at too: in float16 an eps of 1e-8 is 0, and
    65504 the end. Elsewhere it would cost too much; the loop looks at the weights before it saves."""
    return any(x.dtype == jnp.float16 for x in jax.tree.leaves(params))


def forget_window(state: TrainState) -> TrainState:
    """The state without its open accumulation window: the next micro-batch opens one."""
    return replace(
        state,
        opt_state=drop_window(state.opt_state),
        scaling=loss_scale.forget_window(state.scaling),
        guard=guards.forget_window(state.guard, state.model_state),
        objective=memory.forget_window(state.objective),
    )


def rewound(state: TrainState, micro_step: int) -> TrainState:
    """A state that has stopped, as it was at the start of its window, `micro_step`; it goes on."""
    if accumulates(state.opt_state):
        if jax.tree.leaves(state.guard.before):
            state = replace(state, model_state=state.guard.before)
        state = forget_window(state)
    guard = replace(state.guard, stopped=jnp.zeros_like(state.guard.stopped))
    return replace(state, guard=guard, micro_step=jnp.full_like(state.micro_step, micro_step))
