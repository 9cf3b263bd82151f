"""The train step: teacher, student, loss, gradient, update, metrics, in one compiled program."""

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import optax

from . import loss_scale
from .adaptors import Results, Side
from .batches import Batch, sides
from .errors import BatchError
from .models import Model
from .objective import Loss, Project, Weights
from .optimizer import closes_window, without_update
from .precision import FLOAT32, Precision
from .teachers import Teacher

ComputeLoss = Callable[[Results, Results, Project, Weights], Loss]


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
        compute_loss: both sides' results, projections and weights → loss.
        optimizer: see `optimizer.build`.
        names: the terms of the loss in the order of the metrics.
        train: whether the student runs in train mode.
        precision: the level; the models are at it already.
    """

    student: Side
    teacher: Teacher
    projections: Mapping[str, Model]
    compute_loss: ComputeLoss
    optimizer: optax.GradientTransformationExtraArgs
    names: tuple[str, ...]
    train: bool
    precision: Precision = FLOAT32

    def init(self, seed: int) -> TrainState:
        """The state before the first step, in arrays of its own: nothing the user holds is donated."""
        params = {
            "student": self.student.model.params,
            "projections": {name: p.params for name, p in self.projections.items()},
        }
        model_state = {
            "student": self.student.model.state,
            "projections": {name: p.state for name, p in self.projections.items()},
        }
        params, model_state = jax.tree.map(lambda x: jnp.array(x, copy=True), (params, model_state))
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

        loss = self.compute_loss(results_S, results_T, project, weights)
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
        weights = Weights(kd=schedule[0], hard_label=schedule[1])
        inputs = state.model_state, key, student_batch, results_T, weights
        total, backward, (loss, model_state) = jax.vjp(
            lambda params: self.loss(params, *inputs), state.params, has_aux=True
        )
        scale = state.scaling.scale if self.precision.is_scaled else 1.0
        (grads,) = backward(jnp.asarray(scale, total.dtype))
        finite = None
        if self.precision.is_scaled:
            finite = loss_scale.is_finite((total, grads))
            grads = loss_scale.unscale(state.scaling, grads, finite)
        updates, opt_state = self.optimizer.update(
            grads, state.opt_state, state.params, factor=schedule[2]
        )
        params = optax.apply_updates(state.params, updates)
        new = TrainState(
            params, model_state, opt_state, state.key, state.micro_step + 1, state.scaling
        )
        values = self.values(loss)
        if finite is not None:
            new = _guarded(state, new, finite)
            values += [scale, new.scaling.skipped]
        return new, jnp.stack([jnp.asarray(x, total.dtype) for x in values])

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
