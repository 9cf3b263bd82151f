"""Malformed batches, made from good ones by a seed, and what training says of them.

As a program, ``python -m tests.durability.malformed 300`` prints a table by kind; with ``--train``
each is met in a training of its own (a second or two each), else on the way to the step alone.
"""

import collections
import datetime
import sys
import tempfile
import warnings
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from flax import linen

import jaxbrewer
from jaxbrewer.data.batches import own
from jaxbrewer.data.streams import Micro, checked, taken
from jaxbrewer.errors import BatchError
from jaxbrewer.preflight.prepare import prepare
from jaxbrewer.training import feed

VOCABULARY, CLASSES, LENGTH, ROWS, WIDTH = 11, 3, 5, 4, 4
NAMES = ("ids", "mask", "labels", "scale")
BAD = 2  # the index of the bad batch


def good(rng, rows=ROWS, length=LENGTH):
    """Ids, a mask, labels, and a number for each row."""
    return {
        "ids": rng.integers(0, VOCABULARY, (rows, length), np.int32),
        "mask": np.ones((rows, length), np.int32),
        "labels": rng.integers(0, CLASSES, rows, np.int32),
        "scale": rng.uniform(0.5, 1, rows).astype(np.float32),
    }


def change(name, new):
    return lambda rng, batch: ({**batch, name: new(rng, batch[name])}, name)


def some(new, names=NAMES):
    """A change of an input drawn from these."""

    def apply(rng, batch):
        name = names[rng.integers(len(names))]
        return {**batch, name: new(rng, batch[name])}, name

    return apply


def without(rng, batch):
    name = NAMES[rng.integers(len(NAMES))]
    return {k: v for k, v in batch.items() if k != name}, name


def another_key(rng, batch):
    name = ("title", "id", "token_type_ids")[rng.integers(3)]
    return {**batch, name: np.ones(ROWS, np.int32)}, name


def renamed(rng, batch):
    name = NAMES[rng.integers(len(NAMES))]
    return {(name + "_" if k == name else k): v for k, v in batch.items()}, name


def out_of_range(rng, ids, value):
    ids = ids.copy()
    ids[rng.integers(len(ids)), rng.integers(ids.shape[1])] = value
    return ids


def as_array(rng, x):
    return (np.asarray, jnp.asarray, torch.asarray)[rng.integers(3)](x)


def too_large(rng, ids):
    return as_array(rng, out_of_range(rng, ids, int(rng.choice([VOCABULARY, 10**6]))))


def negative(rng, ids):
    return as_array(rng, out_of_range(rng, ids, int(rng.choice([-1, -100]))))


def fewer_rows(rng, x):
    return as_array(rng, x[: rng.integers(1, ROWS)])


def ragged(rng, x):
    return [list(map(int, np.ravel(row)[: rng.integers(1, 4)])) for row in x]


def axis_more(rng, x):
    return as_array(rng, x[..., None] if rng.integers(2) else x[None])


def axis_less(rng, x):
    return as_array(rng, x[0])


def float_ids(rng, x):
    return as_array(rng, x.astype((np.float32, np.float64, np.float16)[rng.integers(3)]))


def objects(rng, x):
    return np.array([*map(list, np.atleast_2d(x)[:, :1]), None, {}], dtype=object)


def text(rng, x):
    made = np.array([["a", "b"][i % 2] for i in range(len(x))])
    return (made, list(made), "a passage")[rng.integers(3)]


def dates(rng, x):
    made = np.full(x.shape, "2020-01-01", "M8[D]")
    return (made, datetime.date(2020, 1, 1), made - made)[rng.integers(3)]


def complex_numbers(rng, x):
    return as_array(rng, x.astype(np.complex64))


def deleted(rng, x):
    array = jnp.array(x)
    array.delete()
    return array


def odd_tensor(rng, x):
    x = torch.asarray(x)
    return (x.to_sparse(), x.to("meta"), x.double().to_sparse())[rng.integers(3)]


def no_rows(rng, batch):
    return {k: as_array(rng, v[:0]) for k, v in batch.items()}, "ids"


def no_length(rng, batch):
    return {k: v[:, :0] if v.ndim == 2 else v for k, v in batch.items()}, "ids"


def transposed_all(rng, batch):
    return {k: as_array(rng, v.T) for k, v in batch.items()}, "ids"


def another_container(rng, batch):
    values = tuple(batch.values())
    made = (values, list(values), values[0], "text", None, 7, iter(values), {0: values[0]})
    return made[rng.integers(len(made))], "batch"


def another_length(rng, batch):
    length = int(rng.integers(1, 9))
    return good(rng, ROWS, length), ""


def last(rng, batch):
    return good(rng, int(rng.integers(1, ROWS))), ""


MALFORMED = {
    "a missing key": without,
    "an extra key": another_key,
    "a key renamed": renamed,
    "one transposed": some(lambda rng, x: as_array(rng, x.T), ("ids", "mask")),
    "all transposed": transposed_all,
    "an axis more": some(axis_more),
    "an axis less": some(axis_less),
    "dtype object": some(objects),
    "text": some(text),
    "None": some(lambda rng, x: None),
    "a flag": some(lambda rng, x: bool(rng.integers(2))),
    "ragged lists": some(ragged, ("ids", "mask")),
    "lists of lists": some(lambda rng, x: x.tolist()),
    "a dict for an array": some(lambda rng, x: {"values": x}),
    "an empty list": some(lambda rng, x: []),
    "float ids": some(float_ids, ("ids", "labels")),
    "whole numbers for floats": change("scale", lambda rng, x: as_array(rng, x.astype(np.int32))),
    "bool ids": change("ids", lambda rng, x: as_array(rng, x > 3)),
    "ids too large": change("ids", too_large),
    "negative ids": change("ids", negative),
    "ids beyond 32 bits": change("ids", lambda rng, x: out_of_range(rng, x.astype("i8"), 2**40)),
    "other rows": some(fewer_rows),
    "no rows": no_rows,
    "no length": no_length,
    "complex": some(complex_numbers),
    "dates": some(dates),
    "a deleted JAX array": some(deleted),
    "sparse, or without data": some(odd_tensor),
    "an empty dict": lambda rng, batch: (({}, (), [])[rng.integers(3)], "batch"),
    "another container": another_container,
}
LEGAL = {
    "a bool mask": change("mask", lambda rng, x: as_array(rng, x > 0)),
    "uint8 labels": change("labels", lambda rng, x: as_array(rng, x.astype(np.uint8))),
    "float64": change("scale", lambda rng, x: np.asarray(x, np.float64)),
    "int64": some(lambda rng, x: x.astype(np.int64), ("ids", "mask", "labels")),
    "JAX arrays": lambda rng, batch: ({k: jnp.asarray(v) for k, v in batch.items()}, ""),
    "torch tensors": lambda rng, batch: ({k: torch.asarray(v) for k, v in batch.items()}, ""),
    "fewer rows at the end": last,
    "another length": another_length,
    "keys in another order": lambda rng, batch: (dict(reversed(batch.items())), ""),
}


def as_tuple(batch):
    """A dict as a tuple, where it has the inputs the model takes; else as it is."""
    return (
        tuple(batch[k] for k in NAMES)
        if isinstance(batch, dict) and set(batch) == {*NAMES}
        else batch
    )


# ---------------------------------------------------------------------------------- the training


def encode(params, ids, mask, labels, scale):
    x = params["embed"][ids]
    pooled = (x * mask[..., None]).sum(1) / jnp.maximum(mask.sum(1), 1)[:, None]
    logits = pooled @ params["head"]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"logits": logits, "loss": jnp.mean(losses * scale)}


class Linen(linen.Module):
    @linen.compact
    def __call__(self, ids, mask, labels, scale):
        params = {
            "embed": self.param("embed", linen.initializers.normal(), (VOCABULARY, WIDTH)),
            "head": self.param("head", linen.initializers.normal(), (WIDTH, CLASSES)),
        }
        return encode(params, ids, mask, labels, scale)


def models():
    """A wrapped function and a wrapped Linen module, both of which say how many ids they know."""
    limits = {"ids": VOCABULARY}
    rng = np.random.default_rng(0)
    params = {
        "embed": jnp.asarray(rng.normal(0, 1, (VOCABULARY, WIDTH)), jnp.float32),
        "head": jnp.asarray(rng.normal(0, 1, (WIDTH, CLASSES)), jnp.float32),
    }
    module = Linen()
    variables = module.init(jax.random.key(0), **good(rng))
    return (
        jaxbrewer.FunctionModel(encode, params, id_limits=limits),
        jaxbrewer.LinenModel(module, variables, id_limits=limits),
    )


def adaptor(batch, outputs):
    return {"logits": outputs["logits"], "losses": outputs["loss"]}


def distiller_of(folder, **training):
    """A Linen student of a teacher that is a function."""
    return jaxbrewer.GeneralDistiller(
        jaxbrewer.TrainingConfig(output_dir=folder / "out", log_dir=None, device="cpu", **training),
        jaxbrewer.DistillationConfig(hard_label_weight=1.0),
        *models(),
        adaptor,
        adaptor,
    )


def train(folder, loader, **training):
    """Trains on a loader; returns the student."""
    distiller = distiller_of(folder, **training)
    with distiller:
        distiller.train(optax.sgd(0.1), loader, num_epochs=1)
    return distiller.model_S


def checks_of(folder):
    """The check of a batch as training makes it, for batches that are dicts and that are tuples."""
    distiller, found = distiller_of(folder), {}
    for container in (dict, tuple):
        first = good(np.random.default_rng(99))
        first = own(first if container is dict else as_tuple(first))
        with distiller:
            programs = prepare(distiller.job(), {"": first}, optax.sgd(0.1)).programs
        found[container] = feed.batch_check(programs[""], first)
    return found


def passed(loader, checks):
    """Sends a loader's batches the way they take in training, up to the step."""
    events = (Micro(0, i, batch) for i, batch in enumerate(loader))
    check = checks[type(loader[0])]
    return [event.inputs for event in checked(taken(events, None), {"": check})]


def made(kind, seed):
    """A loader whose batch `BAD` is of a kind, and the input that is bad."""
    rng = np.random.default_rng(seed)
    loader = [good(rng) for _ in range(4)]
    loader[BAD], name = (MALFORMED | LEGAL)[kind](rng, loader[BAD])
    if seed % 2:
        loader = [as_tuple(batch) for batch in loader]
        if isinstance(loader[BAD], dict) and kind != "another container":
            name = "batch"  # a dict of other keys among tuples
        elif kind == "another container":
            loader = [dict(zip(NAMES, b, strict=True)) if type(b) is tuple and i != BAD else b
                      for i, b in enumerate(loader)]  # fmt: skip
    return loader, name


def verdict(kind, seed, meet):
    """What came of meeting it: 'named', 'trained', or what should not be, with the message."""
    loader, name = made(kind, seed)
    places = {name, *([f"[{NAMES.index(name)}]"] if name in NAMES else [])}
    try:
        meet(loader)
    except BatchError as error:
        message = str(error)
        named = message.startswith(f"epoch 1, batch {BAD + 1} (index {BAD} of the loader): ")
        if named and any(place in message for place in places):
            return "named", message
        return "unnamed", message
    except Exception as error:  # noqa: BLE001  that is what is looked for
        return "raw", f"{type(error).__name__}: {error}"
    return "trained", ""


def meeting(in_training):
    """A function that lets a batch be met, in a training of its own or on the way to the step."""

    def met(loader):
        with tempfile.TemporaryDirectory() as folder:
            return train(Path(folder), loader)

    if in_training:
        return met
    with tempfile.TemporaryDirectory() as folder:
        return partial(passed, checks=checks_of(Path(folder)))


def tally(count, in_training, kinds):
    """Kind → what came of it → how often; what should not be is printed."""
    warnings.simplefilter("ignore")
    table, meet = collections.defaultdict(collections.Counter), meeting(in_training)
    for seed in range(count):
        kind = kinds[seed % len(kinds)]
        result, message = verdict(kind, seed, meet)
        table[kind][result] += 1
        if result != ("named" if kind in MALFORMED else "trained"):
            print(f"seed {seed}, {kind}: {result}: {message[:300]}")
    return table


def main(count, in_training):
    kinds = [*MALFORMED, *LEGAL]
    table = tally(count, in_training, kinds)
    columns = ("named", "trained", "unnamed", "raw")
    print(f"| {'kind':26} | {' | '.join(columns)} |")
    for kind in kinds:
        print(f"| {kind:26} | " + " | ".join(f"{table[kind][c]:{len(c)}}" for c in columns) + " |")


if __name__ == "__main__":
    main(int(sys.argv[1]), "--train" in sys.argv)
