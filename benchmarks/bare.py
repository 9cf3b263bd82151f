"""Steps written by hand for one objective: teacher, student, loss and AdamW in one jit, no more."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import workloads
from jax.nn import log_softmax, softmax

TINY_VOCABULARY, TINY_WIDTH = 30, 8


class BareStep:
    """A jitted step and a plain loop over it that reads nothing until its end.

    Args:
        loss: ``(params, teacher's variables, random key, batch) -> scalar``.
        params: what is trained.
        teacher: the teacher's variables.
        batches: numpy batches, taken in turn.
    """

    def __init__(self, loss: Callable, params: Any, teacher: Any, batches: list[Any]):
        optimizer = optax.adamw(workloads.LEARNING_RATE, weight_decay=workloads.WEIGHT_DECAY)
        params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)

        def step(params: Any, moments: Any, key: jax.Array, teacher: Any, batch: Any) -> Any:
            key, mine = jax.random.split(key)
            value, grads = jax.value_and_grad(loss)(params, teacher, mine, batch)
            updates, moments = optimizer.update(grads, moments, params)
            return optax.apply_updates(params, updates), moments, key, value

        self._step = jax.jit(step, donate_argnums=(0, 1, 2))
        self._state = (params, optimizer.init(params), jax.random.key(0))
        self._teacher, self._batches, self._next = teacher, batches, 0

    def run(self, steps: int) -> None:
        """Trains so many steps and waits for the last."""
        value = None
        for _ in range(steps):
            batch = self._batches[self._next % len(self._batches)]
            self._next += 1
            *self._state, value = self._step(*self._state, self._teacher, batch)
        if value is not None:
            value.block_until_ready()


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


# --- a tiny model -----------------------------------------------------------------------------------


def tiny_apply(
    params: dict[str, Any], input_ids: Any, attention_mask: Any, labels: Any
) -> dict[str, Any]:
    """Embeddings and nine small layers: microseconds to compute, twenty arrays to carry."""
    x = params["embed"][input_ids]
    hidden = [x]
    for weight, bias in params["layers"]:
        x = jnp.tanh(x @ weight + bias)
        hidden.append(x)
    logits = x[:, 0] @ params["head"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return {"logits": logits, "hidden": hidden, "loss": loss}


def tiny_params(seed: int) -> dict[str, Any]:
    """Twenty arrays."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)

    return {
        "embed": draw(TINY_VOCABULARY, TINY_WIDTH),
        "layers": [(draw(TINY_WIDTH, TINY_WIDTH), draw(TINY_WIDTH)) for _ in range(9)],
        "head": draw(TINY_WIDTH, 2),
    }


def tiny_batches(count: int = 8) -> list[dict[str, np.ndarray]]:
    """Batches of 4 examples of 8 ids."""
    batches = [workloads.make_batch(TINY_VOCABULARY, 4, 8, seed=seed) for seed in range(count)]
    for batch in batches:
        del batch["token_type_ids"]
    return batches


def tiny_distiller(**config: Any) -> Any:
    """The tiny model distilled into its like."""
    import jaxbrewer

    def adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
        return {
            "logits": outputs["logits"],
            "hidden": outputs["hidden"],
            "losses": outputs["loss"],
            "inputs_mask": batch["attention_mask"],
        }

    match = {"layer_T": 9, "layer_S": 9, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    models = [
        jaxbrewer.FunctionModel(
            tiny_apply, tiny_params(seed), id_limits={"input_ids": TINY_VOCABULARY}
        )
        for seed in (0, 1)
    ]
    return jaxbrewer.GeneralDistiller(
        jaxbrewer.TrainingConfig(**config),
        jaxbrewer.DistillationConfig(
            temperature=workloads.TEMPERATURE,
            hard_label_weight=workloads.HARD_LABEL_WEIGHT,
            intermediate_matches=[match],
        ),
        *models,
        adaptor,
        adaptor,
    )


def tiny(batches: list[dict[str, np.ndarray]]) -> BareStep:
    """The same maths by hand."""

    def loss(params: Any, teacher: Any, key: jax.Array, batch: Any) -> jax.Array:
        outputs_T = jax.lax.stop_gradient(tiny_apply(teacher, **batch))
        outputs_S = tiny_apply(params, **batch)
        mask = batch["attention_mask"].astype(jnp.float32)
        squares = mask[..., None] * (outputs_S["hidden"][9] - outputs_T["hidden"][9]) ** 2
        return (
            kd_loss(outputs_S["logits"], outputs_T["logits"])
            + workloads.HARD_LABEL_WEIGHT * outputs_S["loss"]
            + squares.sum() / (mask.sum() * TINY_WIDTH)
        )

    return BareStep(loss, tiny_params(1), tiny_params(0), batches)
