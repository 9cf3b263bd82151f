"""Steps written by hand for one objective: teacher, student, loss and AdamW in one jit, no more."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import turns
import workloads
from jax.nn import log_softmax, softmax


class BareStep:
    """A jitted step and a plain loop over it that reads nothing until its end.

    Args:
        loss: ``(params, teacher's variables, random key, batch) -> scalar``.
        params: what is trained.
        teacher: the teacher's variables.
        batches: numpy batches, taken in turn.

    Attributes:
        objective: ``loss``.
        arguments: the params and the teacher's variables it started from.
        loss: of the last step.
    """

    def __init__(self, loss: Callable, params: Any, teacher: Any, batches: list[Any]):
        optimizer = optax.adamw(workloads.LEARNING_RATE, weight_decay=workloads.WEIGHT_DECAY)
        self.objective, self.arguments = loss, (params, teacher)
        params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)

        def step(params: Any, moments: Any, key: jax.Array, teacher: Any, batch: Any) -> Any:
            key, mine = jax.random.split(key)
            value, grads = jax.value_and_grad(loss)(params, teacher, mine, batch)
            updates, moments = optimizer.update(grads, moments, params)
            return optax.apply_updates(params, updates), moments, key, value

        self._step = jax.jit(step, donate_argnums=(0, 1, 2))
        self._state = (params, optimizer.init(params), jax.random.key(0))
        self._teacher, self._batches, self._next = teacher, batches, 0
        self.loss: Any = None

    def run(self, steps: int) -> None:
        """Trains so many steps and waits for the last."""
        for _ in range(steps):
            batch = self._batches[self._next % len(self._batches)]
            self._next += 1
            *self._state, self.loss = self._step(*self._state, self._teacher, batch)
        jax.block_until_ready(self.loss)


def kd_loss(logits_S: jax.Array, logits_T: jax.Array) -> jax.Array:
    T, S = logits_T / workloads.TEMPERATURE, logits_S / workloads.TEMPERATURE
    return -jnp.mean(jnp.sum(softmax(T) * log_softmax(S), axis=-1))


# --- BERT -----------------------------------------------------------------------------------------


def bert(work: workloads.Work, batches: list[dict[str, np.ndarray]]) -> BareStep:
    """BERT to a student of the same width, with the objective of `workloads.jax_distiller`."""
    from flax import nnx

    from jaxbrewer.zoo import BertConfig, BertForSequenceClassification

    def model(sizes: dict[str, Any], seed: int) -> Any:
        config = BertConfig(**sizes, output_hidden_states=True)
        return BertForSequenceClassification(config, rngs=nnx.Rngs(seed))

    teacher, student = model(work.teacher, 0), model(work.student, 1)
    teacher.eval()
    student.train()
    graph_T, state_T = nnx.split(teacher)
    graph_S, params, rest = nnx.split(student, nnx.Param, ...)
    state_T, params, rest = map(nnx.to_pure_dict, (state_T, params, rest))

    def loss(params: Any, teacher: Any, key: jax.Array, batch: Any) -> jax.Array:
        state_T, rest = teacher
        outputs_T = nnx.merge(graph_T, state_T)(**batch)
        outputs_T = jax.lax.stop_gradient(outputs_T)
        keys = jax.tree.map(
            lambda x: (
                jax.random.fold_in(x, jax.random.bits(key))
                if jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
                else x
            ),
            rest,
        )
        outputs_S = nnx.merge(graph_S, params, keys)(**batch)
        total = kd_loss(outputs_S.logits, outputs_T.logits)
        total += workloads.HARD_LABEL_WEIGHT * outputs_S.loss
        mask = batch["attention_mask"].astype(jnp.float32)
        pairs = mask[:, :, None] * mask[:, None]
        for match in work.matches:
            layers = match["layer_T"], match["layer_S"]
            if match["loss"] == "mmd":
                T, S = outputs_T.hidden_states[layers[0][0]], outputs_S.hidden_states[layers[1][0]]
                T, S = (x @ x.mT / x.shape[-1] for x in (T, S))
                squares, count = pairs * (S - T) ** 2, pairs.sum()
            else:
                T, S = outputs_T.hidden_states[layers[0]], outputs_S.hidden_states[layers[1]]
                squares, count = mask[..., None] * (S - T) ** 2, mask.sum() * T.shape[-1]
            total += match["weight"] * squares.sum() / count
        return total

    return BareStep(loss, params, (state_T, rest), batches)


# --- a tiny model ---------------------------------------------------------------------------------


def tiny(batches: list[dict[str, np.ndarray]]) -> BareStep:
    """The objective of `turns.tiny_work` by hand."""

    def loss(params: Any, teacher: Any, key: jax.Array, batch: Any) -> jax.Array:
        outputs_T = jax.lax.stop_gradient(turns.tiny_apply(teacher, **batch))
        outputs_S = turns.tiny_apply(params, **batch)
        mask = batch["attention_mask"].astype(jnp.float32)
        S, T = outputs_S.hidden_states[-1], outputs_T.hidden_states[-1]
        squares = mask[..., None] * (S - T) ** 2
        return (
            kd_loss(outputs_S.logits, outputs_T.logits)
            + workloads.HARD_LABEL_WEIGHT * outputs_S.loss
            + squares.sum() / (mask.sum() * T.shape[-1])
        )

    return BareStep(loss, turns.tiny_params(1), turns.tiny_params(0), batches)
