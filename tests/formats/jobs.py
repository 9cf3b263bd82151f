"""The runs behind the files here. They are as they were when the files were written: leave them so.

Numbers come from `np.random.RandomState`, whose streams never change, and sizes are the smallest
that give every kind of array.
"""

import functools
import hashlib
import json
import random
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import linen, nnx

import jaxbrewer
from jaxbrewer import CallbackResult, DistillationConfig, FunctionModel, LinenModel, TrainingConfig

VOCABULARY, LENGTH, CLASSES = 7, 3, 2


# A large eps keeps gradients that are all rounding from becoming whole steps.
ADAMW = functools.partial(optax.adamw, learning_rate=0.02, eps=1e-3)
MOMENTUM = functools.partial(optax.sgd, learning_rate=0.1, momentum=0.5)
# A rate at which the rounding of gradients in float16 is lost in that of float32 weights.
SLOW = functools.partial(optax.sgd, learning_rate=3e-4, momentum=0.5)


def numbers(seed, name, shape):
    """Random numbers for the array of a name."""
    rng = np.random.RandomState(zlib.crc32(f"{seed} {name}".encode()))
    return jnp.asarray(rng.uniform(-1, 1, shape), jnp.float32)


def batches(count, size=4):
    """Batches of ids, a mask of ones, labels, and noise to be added to the loss."""
    rng = np.random.RandomState(5)
    return [
        {
            "ids": rng.randint(0, VOCABULARY, (size, LENGTH)).astype(np.int32),
            "mask": np.ones((size, LENGTH), np.int32),
            "labels": rng.randint(0, CLASSES, size).astype(np.int32),
            "noise": np.zeros(size, np.float32),
        }
        for _ in range(count)
    ]


def cross_entropy(logits, labels, noise):
    """The mean loss of a batch."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels) + noise)


# ---------------------------------------------------------------------------------------- models


class Encoder(nnx.Module):
    """Embeddings, a tanh layer and a head."""

    def __init__(self, seed, width, dropout=0.0):
        rngs = nnx.Rngs(seed)
        zeros = {"rngs": rngs, "kernel_init": nnx.initializers.zeros}  # quick to make
        self.embed = nnx.Embed(VOCABULARY, width, embedding_init=nnx.initializers.zeros, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(width, width, **zeros)])
        self.head = nnx.Linear(width, CLASSES, use_bias=False, **zeros)
        self.dropout = nnx.Dropout(dropout, rngs=rngs) if dropout else None
        for path, value in nnx.to_flat_state(nnx.state(self, nnx.Param)):
            name = ".".join(map(str, path))
            value[...] = numbers(seed, name, value.shape)

    def __call__(self, ids, mask, labels, noise):
        x = self.embed(ids)
        hidden = [x]
        for layer in self.layers:
            x = jnp.tanh(layer(x))
            hidden.append(x)
        if self.dropout is not None:
            x = self.dropout(x)
        logits = self.head(x[:, 0])
        return {"logits": logits, "hidden": hidden, "loss": cross_entropy(logits, labels, noise)}


class Normed(linen.Module):
    """Embeddings, batch statistics, dropout and a head."""

    @linen.compact
    def __call__(self, ids, mask, labels, noise, train=False):
        x = linen.Embed(VOCABULARY, 3, name="embed")(ids)
        x = linen.BatchNorm(use_running_average=not train, momentum=0.5, name="norm")(x)
        x = linen.Dropout(0.2, deterministic=not train)(x)
        logits = linen.Dense(CLASSES, name="head")(x[:, 0])
        return {"logits": logits, "loss": cross_entropy(logits, labels, noise)}


def normed(seed):
    """`Normed` with its variables."""
    module = Normed()
    shapes = jax.eval_shape(module.init, jax.random.key(0), **batches(1)[0])
    values = [abs(numbers(seed, name, x.shape)) for name, x in named(shapes).items()]
    variables = jax.tree.unflatten(jax.tree.structure(shapes), values)
    return LinenModel(module, variables)


ran = []
"""One entry for each time that a teacher made by `function` really ran; tracing it adds none."""


def function(seed, width):
    """A function whose parameters lie in a dict and a list."""
    shapes = {
        "embed": (VOCABULARY, width),
        "layers": [(width, width), (width, width)],
        "head": (width, CLASSES),
    }
    is_shape = {"is_leaf": lambda x: isinstance(x, tuple)}
    params = [numbers(seed, name, x) for name, x in named(shapes, **is_shape).items()]
    structure = jax.tree.structure(shapes, **is_shape)

    def encode(params, ids, mask, labels, noise):
        jax.debug.callback(lambda: ran.append(seed))
        x = params["embed"][ids]
        hidden = [x]
        for layer in params["layers"]:
            x = jnp.tanh(x @ layer)
            hidden.append(x)
        logits = x[:, 0] @ params["head"]
        return {"logits": logits, "hidden": hidden, "loss": cross_entropy(logits, labels, noise)}

    return FunctionModel(encode, jax.tree.unflatten(structure, params))


def adaptor(batch, outputs):
    """What the distillers see."""
    return {
        "logits": outputs["logits"],
        "losses": outputs["loss"],
        "inputs_mask": batch["mask"],
        **({"hidden": outputs["hidden"]} if "hidden" in outputs else {}),
    }


def named(tree, **how):
    """Dotted name → leaf."""
    leaves = jax.tree_util.tree_flatten_with_path(tree, **how)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def arrays(model):
    """Dotted name → numpy array, of all that a model holds but random keys."""
    if isinstance(model, nnx.Module):
        tree = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    else:
        tree = model.variables if isinstance(model, LinenModel) else model.params
    return {name: np.asarray(leaf) for name, leaf in named(tree).items()}


def trained(distiller):
    """The arrays of a distiller's student, and of its projections."""
    found = {f"student/{name}": x for name, x in arrays(distiller.model_S).items()}
    for i, projection in enumerate(distiller.projs):
        if projection is not None:
            found |= {f"projection {i}/{name}": x for name, x in arrays(projection).items()}
    return found


# ------------------------------------------------------------------------------------------ runs


class Shuffled(list):
    """Draws its order from numpy's global random state."""

    def __iter__(self):
        return iter([self[i] for i in np.random.permutation(len(self))])


def redrawn(batch):
    """The batch with one id from Python's global random state."""
    ids = batch["ids"].copy()
    ids[0, 0] = random.randrange(VOCABULARY)
    return batch | {"ids": ids}


class Stateful(list):
    """Has an order of its own in each pass, and shows in which pass it is and where."""

    def __init__(self, batches):
        super().__init__(batches)
        self._passes = 0
        self._at = 0

    def _order(self):
        return np.random.RandomState(self._passes).permutation(len(self))

    def state_dict(self):
        """What keeps its place, in values of every kind."""
        return {
            "passes": self._passes,
            "at": self._at,
            "order": self._order().astype(np.int16),
            "more": [b"\x00\xff", (0.1, None), True, "é"],
        }

    def load_state_dict(self, state):
        """Takes the place."""
        assert state["more"] == [b"\x00\xff", (0.1, None), True, "é"]
        self._passes, self._at = state["passes"], state["at"]
        assert (state["order"] == self._order()).all()
        assert state["order"].dtype == np.int16

    def __iter__(self):
        order = self._order()
        while self._at < len(self):
            self._at += 1
            yield self[order[self._at - 1]]
        self._passes, self._at = self._passes + 1, 0


def spoilt():
    """Batches of which one gives a loss that is not a number."""
    made = batches(6)
    made[3]["noise"][1] = np.nan
    return made


def overflowing():
    """Batches of which one overflows float16."""
    made = batches(5)
    made[3]["noise"][1] = np.inf
    return made


def score(model, step):
    """Scores for a callback: the earlier, the better."""
    return CallbackResult(score=1 / step)


def match(layer, loss, proj=None):
    """An intermediate match."""
    found = {"layer_T": layer, "layer_S": layer, "feature": "hidden", "loss": loss, "weight": 1.0}
    return found if proj is None else found | {"proj": proj}


def distilled(cls, teacher, student, **distillation):
    """Makes a function that makes a distiller."""

    def make(config):
        return cls(
            config,
            DistillationConfig(**{"temperature": 2, "hard_label_weight": 0.5} | distillation),
            teacher(),
            student(),
            adaptor,
            adaptor,
        )

    return make


def tasks(config):
    """Two tasks, each with a teacher of its own."""
    names = ("a", "b")
    return jaxbrewer.MultiTaskDistiller(
        config,
        DistillationConfig(temperature=2),
        {name: Encoder(i, 4) for i, name in enumerate(names)},
        Encoder(2, 3),
        dict.fromkeys(names, adaptor),
        dict.fromkeys(names, adaptor),
    )


@dataclass(frozen=True)
class Job:
    """A run that was stopped at a checkpoint, which lies here.

    Attributes:
        make: training config → distiller.
        data: makes what `train` reads.
        train: further arguments of `train`.
        stop: the step of the checkpoint.
        config: options of the training config.
        writing: more of them, for the run that wrote the checkpoint alone.
        processes: how many wrote it; each had its share of the rows.
        optimizer: of student and projections.
    """

    make: Callable[[TrainingConfig], Any]
    data: Callable[[], Any]
    train: Mapping[str, Any]
    stop: int
    config: Mapping[str, Any] = field(default_factory=dict)
    writing: Mapping[str, Any] = field(default_factory=dict)
    processes: int = 1
    optimizer: Callable[..., Any] = MOMENTUM


FIRST = match(0, "hidden_mse", ["linear", 3, 4, {"learning_rate": 0.05}])

JOBS = {
    # The order of the data from both global random states; scores beside the checkpoint.
    "plain": Job(
        distilled(
            jaxbrewer.BasicDistiller, lambda: Encoder(1, 4), lambda: Encoder(2, 3, dropout=0.2)
        ),
        lambda: Shuffled(batches(4)),
        {"num_epochs": 2, "callback": score, "batch_postprocessor": redrawn},
        stop=2,
        config={"ckpt_frequency": 2, "seed": 3, "max_to_keep": 1},
        optimizer=ADAMW,
    ),
    "projections": Job(
        distilled(
            jaxbrewer.GeneralDistiller,
            lambda: Encoder(1, 4),
            lambda: Encoder(2, 3, dropout=0.2),
            intermediate_matches=[FIRST, match([1, 1], "nst"), match(1, "cos", ["tanh", 3, 4])],
        ),
        lambda: batches(3),
        {"num_epochs": 2, "max_grad_norm": 1.0},
        stop=3,
        optimizer=ADAMW,
    ),
    # An epoch leaves a window open, which is dropped: more batches were seen than updates used.
    "accumulation": Job(
        distilled(
            jaxbrewer.GeneralDistiller,
            lambda: Encoder(1, 4),
            lambda: Encoder(2, 3, dropout=0.2),
            intermediate_matches=[FIRST],
        ),
        lambda: batches(5),
        {"num_epochs": 2},
        stop=3,
        config={"gradient_accumulation_steps": 2, "ckpt_frequency": 2, "max_to_keep": 1},
    ),
    # A window that an epoch leaves open goes on in the next; parameters in lists.
    "steps": Job(
        lambda config: jaxbrewer.BasicTrainer(config, function(2, 3), adaptor),
        lambda: batches(3),
        {"num_steps": 4},
        stop=2,
        config={"gradient_accumulation_steps": 2, "ckpt_steps": 2},
    ),
    # A window was dropped for an overflow, and the scale halved.
    "loss_scale": Job(
        distilled(jaxbrewer.BasicDistiller, lambda: Encoder(1, 4), lambda: Encoder(2, 3)),
        overflowing,
        {"num_epochs": 2},
        stop=2,
        config={
            "gradient_accumulation_steps": 2,
            "fp16": True,
            "fp16_opt_level": "O2",
            "half_dtype": "float16",
        },
        optimizer=SLOW,
    ),
    "batch_statistics": Job(
        lambda config: jaxbrewer.BasicTrainer(config, normed(2), adaptor),
        lambda: batches(3),
        {"num_epochs": 2},
        stop=3,
    ),
    "tasks": Job(
        tasks,
        lambda: {"a": batches(3), "b": batches(2, size=5)},
        {"num_steps": 6},
        stop=3,
        config={"ckpt_steps": 3},
    ),
    # Without dropout, of which under 'pmap' each device draws its own.
    "pmap": Job(
        distilled(
            jaxbrewer.GeneralDistiller,
            lambda: Encoder(1, 4),
            lambda: Encoder(2, 3),
            intermediate_matches=[FIRST],
        ),
        lambda: batches(2, size=8),
        {"num_epochs": 2},
        stop=2,
        writing={"data_parallel": True, "mapping": "pmap"},
    ),
    "two_processes": Job(
        distilled(
            jaxbrewer.GeneralDistiller,
            lambda: Encoder(1, 4),
            lambda: Encoder(2, 3, dropout=0.2),
            intermediate_matches=[FIRST],
        ),
        lambda: batches(2, size=8),
        {"num_epochs": 2},
        stop=2,
        processes=2,
    ),
}


# What format 1 could not hold.
SINCE_2 = {
    # The window before the checkpoint was dropped, and three in a row would stop the run.
    "guard": Job(
        lambda config: jaxbrewer.BasicTrainer(config, normed(2), adaptor),
        spoilt,
        {"num_epochs": 2},
        stop=2,
        config={
            "gradient_accumulation_steps": 2,
            "max_nonfinite_steps": 3,
            "ckpt_frequency": 3,
            "max_to_keep": 1,
        },
    ),
    # In the middle of a pass over a loader that goes on by its own state.
    "loader_state": Job(
        distilled(
            jaxbrewer.BasicDistiller, lambda: Encoder(1, 4), lambda: Encoder(2, 3, dropout=0.2)
        ),
        lambda: Stateful(batches(4)),
        {"num_epochs": 2},
        stop=2,
        config={"ckpt_frequency": 2},
    ),
}

ALL = JOBS | SINCE_2


def run(job, data=None, stop=None, **options):
    """Trains; `options` are of the training config. Returns the distiller."""
    np.random.seed(11)
    random.seed(12)
    train = dict(job.train)
    scored = train.pop("callback", None)

    def callback(model, step):
        if step == stop:
            return CallbackResult(stop=True, score=scored(model, step).score if scored else None)
        return scored(model, step) if scored else None

    distiller = job.make(TrainingConfig(**{"device": "cpu", **job.config, **options}))
    with distiller:
        distiller.train(
            job.optimizer,
            job.data() if data is None else data,
            callback=callback,
            **train,
        )
    return distiller


# Teacher caches: name → the type they are kept in. Layer 1 of the teacher is not matched.
CACHES = {"cache_float32": "float32", "cache_bfloat16": "bfloat16"}


def run_cached(cache_dir, dtype, output_dir):
    """Trains from a cache on disk, which is made if it is not there. Returns the distiller."""
    distiller = distilled(
        jaxbrewer.GeneralDistiller,
        lambda: function(1, 4),
        lambda: Encoder(2, 4),
        intermediate_matches=[match(0, "hidden_mse"), match(2, "hidden_mse") | {"layer_S": 1}],
        is_caching_logits=True,
        cache_dir=cache_dir,
        cache_dtype=dtype,
    )(TrainingConfig(device="cpu", output_dir=output_dir))
    with distiller:
        distiller.train(MOMENTUM, batches(3), num_epochs=2)
    return distiller


def read(checkpoint: Path) -> tuple[dict[str, np.ndarray], Any]:
    """All arrays of a checkpoint by name, and its position: read by Orbax alone."""
    handler = ocp.CompositeCheckpointHandler(
        student=ocp.StandardCheckpointHandler(),
        projections=ocp.StandardCheckpointHandler(),
        training=ocp.StandardCheckpointHandler(),
        position=ocp.JsonCheckpointHandler(),
    )
    here = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
    with ocp.Checkpointer(handler) as checkpointer:
        items = {
            name: ocp.args.StandardRestore(
                jax.tree.map(
                    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), item.tree
                )
            )
            for name, item in checkpointer.metadata(checkpoint).item_metadata.items()
            if name != "position" and item is not None
        }
        args = ocp.args.Composite(position=ocp.args.JsonRestore(), **items)
        found = checkpointer.restore(checkpoint, args=args)

    def plain(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    trees = {name: jax.tree.map(plain, found[name]) for name in items}
    return named(trees), found["position"]


def without_states(position):
    """A position with digests of what is long: the random states, those of loaders, and traces."""
    for process in position["processes"]:
        for name in {"host_random", "loaders"} & process.keys():
            process[name] = _digest(process[name])
    return position | ({"job": _digest(position["job"])} if "job" in position else {})


def _digest(value):
    """The SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def as_json(array):
    """``[type, shape, values]``; floats in as few digits as give them back."""
    array = np.asarray(array)
    values = [float(str(x)) if array.dtype.kind == "f" else x.item() for x in array.ravel()]
    return [str(array.dtype), list(array.shape), values]


def from_json(value):
    """The way back."""
    dtype, shape, values = value
    return np.array(values, dtype).reshape(shape)
