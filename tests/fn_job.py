"""A function of a few numbers as teacher and student: quick to trace, quick to compile."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxbrewer

VOCABULARY, CLASSES, LENGTH, WIDTH = 11, 3, 4, 5


def encode(params, ids, mask=None, labels=None):
    """Embeddings, then layers of attention and a tanh; logits of the first position."""
    x = params["embed"][ids]
    hidden, attention = [x], []
    for weight in params["layers"]:
        scores = jnp.einsum("bqd,bkd->bqk", x, x)
        attention.append(scores[:, None])
        x = jnp.tanh(jax.nn.softmax(scores) @ x @ weight) + x
        hidden.append(x)
    logits = x[:, 0] @ params["head"]
    tokens = x @ params["head"]
    loss = None
    if labels is not None:
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], 1)
        loss = -jnp.mean(picked)
    return {
        "logits": logits,
        "tokens": tokens,
        "hidden": hidden,
        "attention": attention,
        "loss": loss,
    }


def encoder(seed=0, width=WIDTH, layers=2, classes=CLASSES, **options):
    """`encode` with random parameters."""
    rng = np.random.default_rng(seed)
    params = {
        "embed": rng.normal(0, 1, (VOCABULARY, width)),
        "layers": [rng.normal(0, 0.5, (width, width)) for _ in range(layers)],
        "head": rng.normal(0, 1, (width, classes)),
    }
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    return jaxbrewer.FunctionModel(encode, params, **options)


KEYS = {
    "logits": lambda batch, outputs: outputs["logits"],
    "hidden": lambda batch, outputs: outputs["hidden"],
    "attention": lambda batch, outputs: outputs["attention"],
    "losses": lambda batch, outputs: outputs["loss"],
    "labels": lambda batch, outputs: batch["labels"],
    "inputs_mask": lambda batch, outputs: batch["mask"],
    "logits_mask": lambda batch, outputs: batch["mask"],
}


def adaptor(*keys, **others):
    """An adaptor that returns these keys; others: key → function of (batch, outputs)."""
    chosen = {key: KEYS[key] for key in keys} | others
    return lambda batch, outputs: {key: get(batch, outputs) for key, get in chosen.items()}


def tokens(batch, outputs):
    """Logits of every position."""
    return outputs["tokens"]


def batches(count, size=3, seed=0):
    """Batches of ids, a mask with padding at the end, and labels."""
    rng = np.random.default_rng(seed)
    return [
        {
            "ids": rng.integers(0, VOCABULARY, (size, LENGTH), np.int32),
            "mask": (np.arange(LENGTH) < rng.integers(2, LENGTH + 1, (size, 1))).astype(np.int32),
            "labels": rng.integers(0, CLASSES, size, np.int32),
        }
        for _ in range(count)
    ]


def match(layer_T, layer_S, loss="hidden_mse", feature="hidden", weight=1, proj=None):
    """An intermediate match."""
    found = {
        "layer_T": layer_T,
        "layer_S": layer_S,
        "feature": feature,
        "loss": loss,
        "weight": weight,
    }
    return found if proj is None else {**found, "proj": proj}


def distiller(
    folder,
    *,
    config=None,
    teacher=None,
    student=None,
    keys=("logits",),
    keys_T=None,
    keys_S=None,
    cls=jaxbrewer.GeneralDistiller,
    **training,
):
    """A distiller of `encoder`s; `keys` are an adaptor, or the keys of one."""
    keys_T, keys_S = keys if keys_T is None else keys_T, keys if keys_S is None else keys_S
    return cls(
        jaxbrewer.TrainingConfig(output_dir=folder / "out", device="cpu", **training),
        jaxbrewer.DistillationConfig(**(config or {})),
        encoder(1) if teacher is None else teacher,
        encoder(2) if student is None else student,
        keys_T if callable(keys_T) else adaptor(*keys_T),
        keys_S if callable(keys_S) else adaptor(*keys_S),
    )


SGD = optax.sgd(0.1)
