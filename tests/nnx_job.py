"""A tiny job: two small NNX encoders, their adaptor, a loader, and a distiller of them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jaxbrewer
from jaxbrewer.training import read_scalars

VOCABULARY = 20
SGD = functools.partial(optax.sgd, learning_rate=0.1)


class Encoder(nnx.Module):
    """Embeddings and tanh layers; logits from the first position."""

    id_limits = {"input_ids": VOCABULARY}  # noqa: RUF012

    def __init__(self, layers, width, seed=0, classes=3, dropout=0.0):
        rngs = nnx.Rngs(seed)
        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(width, width, rngs=rngs) for _ in range(layers)])
        self.dropout = nnx.Dropout(dropout, rngs=rngs)
        self.head = nnx.Linear(width, classes, rngs=rngs)

    def __call__(self, input_ids, attention_mask=None, labels=None, noise=0.0):
        x = self.embed(input_ids)
        hidden = [x]
        for layer in self.layers:
            x = jnp.tanh(self.dropout(layer(x)))
            hidden.append(x)
        logits = self.head(x[:, 0])
        loss = None
        if labels is not None:
            loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
            loss += jnp.sum(noise)
        return {"logits": logits, "hidden": hidden, "loss": loss}


def adaptor(batch, outputs):
    return {
        "logits": outputs["logits"],
        "hidden": outputs["hidden"],
        "losses": outputs["loss"],
        "inputs_mask": batch["attention_mask"],
    }


def loader(count=6, size=4, length=5, seed=0):
    rng = np.random.default_rng(seed)
    return [
        {
            "input_ids": rng.integers(0, VOCABULARY, (size, length)),
            "attention_mask": np.ones((size, length), np.int32),
            "labels": rng.integers(0, 3, size),
        }
        for _ in range(count)
    ]


MATCHES = [
    {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1.0}
    | {"proj": ["linear", 4, 6, {"lr": 0.05}]},
    {"layer_T": [3, 3], "layer_S": [2, 2], "feature": "hidden", "loss": "nst", "weight": 1.0},
]


def distiller(folder, *, dropout=0.1, distillation=None, student=None, log=True, **training):
    """A `GeneralDistiller` of 3 layers of width 6 into 2 of width 4."""
    config = jaxbrewer.TrainingConfig(
        output_dir=str(folder / "out"),
        log_dir=str(folder / "log") if log else None,
        device="cpu",
        **training,
    )
    return jaxbrewer.GeneralDistiller(
        config,
        jaxbrewer.DistillationConfig(
            **{"hard_label_weight": 0.5, "intermediate_matches": MATCHES, **(distillation or {})}
        ),
        Encoder(3, 6, seed=1),
        student or Encoder(2, 4, seed=2, dropout=dropout),
        adaptor,
        adaptor,
    )


def weights(module):
    """Dotted name → numpy array."""
    state = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): np.array(value[...]) for path, value in state}


def read_events(folder):
    """Reads tag → values in order of step from tensorboard files."""
    return {tag: [c[i] for i in sorted(c)] for tag, c in read_scalars(folder).items()}


class Compiles:
    """Counts what XLA compiles while it is listening."""

    def __init__(self):
        self.count = 0
        self._on = False
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event, duration, **kwargs):
        if self._on and "backend_compile" in event:
            self.count += 1

    def __enter__(self):
        self._on = True
        return self

    def __exit__(self, *exception):
        self._on = False
