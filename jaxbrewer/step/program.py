"""The train step: teacher, student, loss, gradient, update, metrics, in one compiled program."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ..data.batches import Batch, sides
from ..errors import BatchError
from ..models.adaptors import Results, Side
from ..models.handle import Model
from ..models.precision import FLOAT32, Precision
from ..models.teachers import Teacher
from ..objective.loss import Loss, Weights
from ..objective.objectives import Objective
from . import loss_scale
from .optimizer import closes_window, without_update


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that changes in training.

    Attributes:
        params: ``{'student': …, 'projections': {name: …}}``.
        model_state: the same two keys: batch statistics and random keys.
        opt_state: the optimizer's, an open accumulation window included.
        key: the random key every step's key is folded from.
        micro_step: int32 scalar, micro-batches seen.
        scaling: the loss scale's state, see `loss_scale.Scaling`; `()` where none is needed.
    """

    params: Any
    model_state: Any
    opt_state: Any
    key: jax.Array
    micro_step: jax.Array
    scaling: Any = ()


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

    def init(self, seed: int, variables: Any = None) -> TrainState:
        """The state before the first step, in arrays of its own: nothing the user holds is donated.

        `variables` are `Program.variables`, perhaps placed elsewhere.
        """
        params, model_state = jax.tree.map(
            lambda x: jnp.array(x, copy=True), self.variables if variables is None else variables
        )
        key = jax.random.key(seed)
        scaling = loss_scale.start() if self.precision.is_scaled else ()
        opt_state = self.optimizer.init(params)
        return TrainState(params, model_state, opt_state, key, jnp.int32(0), scaling)

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
        self, state: TrainState, teacher_variables: Any, batch: Batch, schedule: jax.Array
    ) -> tuple[TrainState, jax.Array]:
        """One micro-batch.

        Args:
            state: before the step; donated.
            teacher_variables: the teacher's arrays.
            batch: from `batches.own`.
            schedule: ``[3]``: weight of the KD loss, of the hard labels, learning-rate factor.

        Returns:
            The state after the step, and the metrics ``[2 + terms]``: the total, the surplus of
            `Loss`, then the terms in the order of `names`. With a loss scale, two more: the scale
            that this micro-batch had, and the windows dropped so far.
        """
        teacher_batch, student_batch, cache = sides(batch)
        results_T = jax.lax.stop_gradient(self.teacher(teacher_variables, teacher_batch, cache))

        key = jax.random.fold_in(state.key, state.micro_step)
        if self.axis is not None:
            key = jax.random.fold_in(key, jax.lax.axis_index(self.axis))
        weights = Weights(kd=schedule[0], hard_label=schedule[1])
        inputs = state.model_state, key, student_batch, results_T, weights
        total, backward, (loss, model_state) = jax.vjp(
            lambda params: self.loss(params, *inputs), state.params, has_aux=True
        )
        scale = state.scaling.scale if self.precision.is_scaled else 1.0
        (grads,) = backward(jnp.asarray(scale, total.dtype))
        metrics = jnp.stack([jnp.asarray(x, total.dtype) for x in self.values(loss)])
        if self.axis is not None:
            grads, model_state, metrics = average(self.axis, grads, model_state, metrics)
        finite = None
        if self.precision.is_scaled:
            finite = loss_scale.is_finite((metrics[0], grads))
            grads = loss_scale.unscale(state.scaling, grads, finite)
        updates, opt_state = self.optimizer.update(
            grads, state.opt_state, state.params, factor=schedule[2]
        )
        params = optax.apply_updates(state.params, updates)
        new = TrainState(
            params, model_state, opt_state, state.key, state.micro_step + 1, state.scaling
        )
        if finite is not None:
            new = _guarded(state, new, finite)
            scaling = jnp.stack([jnp.asarray(x, total.dtype) for x in (scale, new.scaling.skipped)])
            metrics = jnp.concatenate([metrics, scaling])
        return new, metrics

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


def _guarded(old: TrainState, new: TrainState, finite: jax.Array) -> TrainState:
    """The state after a micro-batch with a loss scale: what an overflow touched is as it was."""
    scaling, dropped = loss_scale.advance(old.scaling, finite, closes_window(new.opt_state))
    return replace(
        new,
        params=loss_scale.keep(old.params, new.params, dropped),
        opt_state=without_update(old.opt_state, new.opt_state, dropped),
        model_state=loss_scale.keep(old.model_state, new.model_state, ~finite),
        scaling=scaling,
    )
