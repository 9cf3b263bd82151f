"""Loaders of every kind: a run that is stopped and resumed ends in the same bits, or is refused."""

import collections
import contextlib
import json
import logging
import random
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbrewer
from jaxbrewer.data.checksums import Checksums
from jaxbrewer.data.states import (
    LoaderState,
    as_json,
    decoded,
    encoded,
    host_random,
    loader_state_problem,
    undisturbed,
)
from jaxbrewer.data.streams import EpochEnd, Position
from jaxbrewer.errors import CheckpointError
from jaxbrewer.training.position import sealed
from jaxbrewer.training.request import Feed
from jaxbrewer.training.resume import open_streams

ROWS, SIZE, EPOCHS = 12, 2, 3
BATCHES = ROWS // SIZE


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """What is compared here does not depend on how well programs are optimized."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def pick(order, size=SIZE, seed=0):
    """Batches of rows in this order: ``x``, and their ``number``."""
    x = np.random.RandomState(seed).normal(size=(99, 2)).astype(np.float32)
    for i in range(0, len(order) // size * size, size):
        rows = np.array(order[i : i + size])
        yield {"x": x[rows], "number": rows}


class Loader:
    """A loader of some order."""

    def __len__(self):
        return BATCHES

    def __iter__(self):
        return iter(list(pick(self.order())))


class GlobalNumpy(Loader):
    def order(self):
        return np.random.permutation(ROWS)


class GlobalPython(Loader):
    def order(self):
        return random.sample(range(ROWS), ROWS)


class EachFromNumpy(Loader):
    """Draws every batch from numpy's global state."""

    def __iter__(self):
        for _ in range(BATCHES):
            yield from pick(np.random.permutation(ROWS)[:SIZE])


class ShuffledList(list):
    """Shuffles itself in place, on numpy's global state."""

    def __iter__(self):
        np.random.shuffle(self)
        return super().__iter__()


class OwnSequence(collections.abc.Sequence):
    """A `Sequence` whose order is drawn from a generator it does not show."""

    def __init__(self, seed=0):
        self._rng = np.random.default_rng(seed)
        self._all = list(pick(np.arange(ROWS)))

    def __len__(self):
        return len(self._all)

    def __getitem__(self, i):
        return self._all[i]

    def __iter__(self):
        return iter([self._all[i] for i in self._rng.permutation(len(self))])


class Keras(Loader):
    """As Keras has them: batches by index, shuffled at the end of an epoch."""

    def __init__(self):
        self._rng = np.random.default_rng(0)
        self._order = np.arange(ROWS)

    def __getitem__(self, i):
        return next(pick(self._order[i * SIZE :]))

    def on_epoch_end(self):
        self._rng.shuffle(self._order)

    def __iter__(self):
        yield from (self[i] for i in range(len(self)))
        self.on_epoch_end()


class BySeedAndEpoch(Loader):
    def __init__(self):
        self._epoch = 0

    def set_epoch(self, epoch):
        self._epoch = epoch

    def order(self):
        return np.random.default_rng(self._epoch).permutation(ROWS)


class EpochIsNotEnough(BySeedAndEpoch):
    """Has a ``set_epoch`` that does not determine the order."""

    def __init__(self):
        super().__init__()
        self._rng = np.random.default_rng(0)

    def order(self):
        return self._rng.permutation(ROWS)


class WithState(Loader):
    """As torchdata's StatefulDataLoader: the loader shows a state, which goes on changing."""

    def __init__(self, seed=0):
        self._rng = np.random.default_rng(seed)
        self._state = {"at": 0, "order": None, "rng": None}
        self._is_loaded = False
        self.passed = 0

    def state_dict(self):
        return self._state

    def load_state_dict(self, state):
        self._state = state
        self._is_loaded = True

    def __iter__(self):
        if self._is_loaded:
            self._is_loaded = False
            self._rng.bit_generator.state = self._state["rng"]
        else:
            order = self._rng.permutation(ROWS)
            self._state |= {"at": 0, "order": order, "rng": self._rng.bit_generator.state}
        order = self._state["order"]
        for batch in list(pick(order))[self._state["at"] :]:
            self._state["at"] += 1
            self.passed += 1
            yield batch


class IteratorWithState:
    """As grain's: the iterator shows a state, as bytes."""

    def __init__(self, loader):
        self._loader = loader
        self._order = loader.rng.permutation(ROWS).tolist()
        self._at = 0

    def __iter__(self):
        return self

    def __next__(self):
        if self._at == BATCHES:
            raise StopIteration
        self._at += 1
        self._loader.passed += 1
        return list(pick(np.array(self._order)))[self._at - 1]

    def get_state(self):
        rng = self._loader.rng.bit_generator.state
        return json.dumps([self._order, self._at, rng]).encode()

    def set_state(self, state):
        self._order, self._at, rng = json.loads(state)
        self._loader.rng.bit_generator.state = rng


class Grain(Loader):
    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.passed = 0

    def __iter__(self):
        return IteratorWithState(self)


class StateThatCannotBeKept(OwnSequence):
    def state_dict(self):
        return {"rng": self._rng}

    def load_state_dict(self, state):
        raise AssertionError("it was not kept")


MAKE = {
    "list": lambda: list(pick(range(ROWS))),
    "tuple": lambda: tuple(pick(range(ROWS))),
    "Sequence with its own": OwnSequence,
    "Keras": Keras,
    "set_epoch": BySeedAndEpoch,
    "state_dict": WithState,
    "get_state": Grain,
    "a state that cannot be kept": StateThatCannotBeKept,
    "in place by numpy": lambda: ShuffledList(pick(range(ROWS))),
    "numpy": GlobalNumpy,
    "Python": GlobalPython,
    "every batch from numpy": EachFromNumpy,
}
BY_THE_GLOBAL_STATE = ("numpy", "Python", "every batch from numpy")


def draw():
    """What a callback draws."""
    np.random.rand()
    random.random()


def seed_all(seed):
    random.seed(seed)
    np.random.seed(seed)


def walk(loaders, position=None, *, epochs=EPOCHS, post=None, draws=draw, may_differ=False):
    """Goes through the batches as a run does, with a callback after each.

    Returns what the batches were, and the position after each, as checkpoints hold it.
    """
    loaders = loaders if isinstance(loaders, dict) else {"": loaders}
    feeds = {task: Feed.of(loader, post) for task, loader in loaders.items()}
    start = Position()
    if position is not None:
        position = json.loads(position)
        assert not any(map(loader_state_problem, position["loaders"].values()))
        kept = {task: LoaderState(**state) for task, state in position.pop("loaders").items()}
        start = Position(**position, loaders=kept, may_differ=may_differ)
    request, timeline = SimpleNamespace(feeds=feeds, tau=1.0), SimpleNamespace(epochs=epochs)
    opened = open_streams(request, timeline, start, seed=0)
    seen, positions, kept, micro_step = [], [], dict(opened.loaders), start.micro_step
    total = EPOCHS * BATCHES * len(loaders)
    for event in opened.events if micro_step < total else ():
        if isinstance(event, EpochEnd):
            continue
        kept[event.task] = event.loader
        micro_step += 1
        seen.append((event.task, event.inputs["number"].tolist(), float(event.inputs["x"].sum())))
        here = {"epoch": event.epoch, "batch": event.batch + 1, "micro_step": micro_step}
        here |= {"host_random": as_json(host_random())}
        here |= {"loaders": {task: state.as_json() for task, state in kept.items()}}
        positions.append(json.dumps(here))
        with undisturbed(loaders.values()):
            draws()
        if micro_step == total:
            break
    return seen, positions


@pytest.mark.parametrize("name", MAKE)
@pytest.mark.parametrize("epochs", [EPOCHS, None])
def test_whatever_comes_after_a_checkpoint_is_the_same(name, epochs):
    """At every batch. A script that seeds nothing too, where the global state says all."""
    seed_all(0)
    seen, positions = walk(MAKE[name](), epochs=epochs)
    assert len(seen) == EPOCHS * BATCHES
    for i, position in enumerate(positions):
        seed_all(1 if name in BY_THE_GLOBAL_STATE else 0)
        again, _ = walk(MAKE[name](), position, epochs=epochs)
        assert again == seen[i + 1 :], f"after batch {i}"


@pytest.mark.parametrize("name", ["state_dict", "get_state"])
def test_a_loader_with_a_state_is_not_replayed(name, caplog):
    loader = MAKE[name]()
    _, positions = walk(loader)
    with caplog.at_level(logging.INFO):
        other = MAKE[name](seed=5)  # the state says all
        walk(other, positions[BATCHES + 1])
    assert "the loader goes on by its own state" in caplog.text
    assert "replayed" not in caplog.text
    assert other.passed == EPOCHS * BATCHES - (BATCHES + 2)


def test_a_replay_is_announced_with_its_length(caplog):
    with caplog.at_level(logging.INFO):
        for name in ("set_epoch", "numpy"):
            walk(MAKE[name](), walk(MAKE[name]())[1][BATCHES + 1])
    said = [r.getMessage() for r in caplog.records]
    assert said == [
        "the loader is replayed: 2 batches of epoch 2",
        "the loader is replayed: 2 batches of epoch 2, and the 1 before it whole",
    ]


def test_a_state_that_cannot_be_kept_is_said_once(caplog):
    walk(StateThatCannotBeKept())
    (said,) = [r.getMessage() for r in caplog.records]
    assert said.startswith("the loader shows a state that cannot be kept (TypeError: a Generator")


def shuffled_otherwise():
    return list(pick(np.random.default_rng(7).permutation(ROWS)))


ORIGINAL = MAKE["list"]
CHANGED = {
    "order": (ORIGINAL, shuffled_otherwise),
    "contents": (ORIGINAL, lambda: list(pick(range(ROWS), seed=1))),
    "batch size": (ORIGINAL, lambda: list(pick(range(ROWS), size=3))),
    "batch size, as many": (ORIGINAL, lambda: list(pick(range(2 * ROWS), size=2 * SIZE))),
    "fewer": (ORIGINAL, lambda: list(pick(range(ROWS - 2)))),
    "more": (ORIGINAL, lambda: list(pick(range(ROWS + 2)))),
    "another seed": (OwnSequence, lambda: OwnSequence(1)),
    "not determined by the epoch": (EpochIsNotEnough, EpochIsNotEnough),
    "no state": (WithState, lambda: GlobalNumpy()),
    "another type": (ORIGINAL, lambda: [{**b, "x": b["x"].astype(float)} for b in ORIGINAL()]),
    "another name": (ORIGINAL, lambda: [{**b, "y": b["x"]} for b in ORIGINAL()]),
}


@pytest.mark.parametrize("name", CHANGED)
def test_other_data_are_refused(name, caplog):
    before, after = CHANGED[name]
    seed_all(0)
    _, positions = walk(before())
    for i in (BATCHES - 1, BATCHES + 1):  # at the end of the first epoch, in the second
        if name == "not determined by the epoch" and i < BATCHES:
            continue  # the epoch's order is the first that its generator gives
        seed_all(1)
        with pytest.raises(
            CheckpointError, match=r"the loader (gives other|has).*set_epoch"
        ) as raised:
            walk(after(), positions[i])
        assert "resume_changes=['data']" in str(raised.value)
        seed_all(1)
        walk(after(), positions[i], may_differ=True)
        assert "as resume_changes allows" in caplog.text


def test_a_state_that_is_not_taken_is_refused():
    _, positions = walk(Grain())

    class Other(IteratorWithState):
        def set_state(self, state):
            raise KeyError("of another version")

    class OtherGrain(Grain):
        def __iter__(self):
            return Other(self)

    with pytest.raises(CheckpointError, match=r"does not take the state .*another version"):
        walk(OtherGrain(), positions[3])


def test_a_generator_has_one_pass_and_goes_on_in_it():
    def numbers():
        yield from pick(range(EPOCHS * ROWS))

    seen, positions = walk(numbers(), epochs=None)
    for i in (0, 4, 16):
        assert walk(numbers(), positions[i], epochs=None)[0] == seen[i + 1 :]
    with pytest.raises(CheckpointError, match="gives other batches"):
        walk(pick(range(2, 2 + EPOCHS * ROWS)), positions[4], epochs=None)
    with pytest.raises(CheckpointError, match="has only 5 batches in epoch 1"):
        walk(pick(range(10)), positions[7], epochs=None)


TASKS = ("numpy", "list", "state_dict", "every batch from numpy", "get_state")


def mask(batch):
    """A postprocessor that draws."""
    return batch | {"x": batch["x"] * np.random.binomial(1, 0.5, batch["x"].shape).astype("f4")}


@pytest.mark.parametrize("seed", range(2))
def test_every_task_goes_on_where_it_was(seed):
    names = np.random.default_rng(seed).permutation(TASKS)[:3]
    names = [name for name in names if name != "every batch from numpy"]  # others draw in between
    make = {f"{i}": MAKE[name] for i, name in enumerate(names)}
    seed_all(0)
    seen, positions = walk({t: m() for t, m in make.items()}, epochs=None, post=mask)
    for i in (0, 1, 2, 7, 8, 20):
        seed_all(1)
        again = walk({t: m() for t, m in make.items()}, positions[i], epochs=None, post=mask)[0]
        assert again == seen[i + 1 :], f"after batch {i}"


def test_another_order_of_the_tasks_is_refused():
    _, positions = walk({"a": ORIGINAL(), "b": ORIGINAL()}, epochs=None)
    with pytest.raises(CheckpointError, match=r"task 'a' had [0-9]+ batches before"):
        walk({"a": ORIGINAL(), "b": ORIGINAL() * 5}, positions[15], epochs=None)


def test_a_task_whose_batches_differ_is_named():
    _, positions = walk({"a": ORIGINAL(), "b": ORIGINAL()}, epochs=None)
    with pytest.raises(CheckpointError, match="the loader of task 'b' gives other batches"):
        walk({"a": ORIGINAL(), "b": shuffled_otherwise()}, positions[15], epochs=None)


# ---------------------------------------------------------------------------------------- of torch


def torch_loader(**options):
    """Torch's own, over the same rows; its generators say all of its order."""
    from torch.utils import data

    rows = [{name: value[0] for name, value in batch.items()} for batch in pick(range(ROWS), 1)]
    if "sampler" in options:
        options["sampler"] = options["sampler"](rows)
    if "batch_sampler" in options:
        options["batch_sampler"] = options["batch_sampler"](rows)
        return data.DataLoader(rows, **options)
    return data.DataLoader(rows, batch_size=SIZE, **options)


def by_torch(name):
    """A loader, and what callbacks draw from: torch's generator, or the loader's own."""
    import torch
    from torch.utils import data

    own = torch.Generator()
    own.manual_seed(int(torch.empty((), dtype=torch.int64).random_().item()))

    def sampler(rows):
        return data.RandomSampler(rows, generator=own)

    make = {
        "the global": lambda: torch_loader(shuffle=True),
        "generator": lambda: torch_loader(shuffle=True, generator=own),
        "sampler": lambda: torch_loader(sampler=sampler),
        "batch_sampler": lambda: torch_loader(
            batch_sampler=lambda rows: data.BatchSampler(sampler(rows), SIZE, False)
        ),
        "set_epoch": lambda: torch_loader(
            sampler=lambda rows: data.DistributedSampler(rows, num_replicas=1, rank=0)
        ),
    }[name]

    def evaluate():
        torch.rand((), generator=own)
        for _ in torch_loader():  # draws from torch's global generator
            pass

    return make(), evaluate


@pytest.mark.torch
@pytest.mark.parametrize(
    "name", ["the global", "generator", "sampler", "batch_sampler", "set_epoch"]
)
def test_torch_loaders_go_on_whatever_callbacks_draw(name):
    import torch

    torch.manual_seed(0)
    loader, evaluate = by_torch(name)
    seen, positions = walk(loader, draws=evaluate)
    assert len({str(seen[i * BATCHES : (i + 1) * BATCHES]) for i in range(EPOCHS)}) == EPOCHS
    for i in (0, BATCHES - 1, BATCHES + 1, 2 * BATCHES - 1):
        torch.manual_seed(1)  # a script without a seed
        loader, evaluate = by_torch(name)
        assert walk(loader, positions[i], draws=evaluate)[0] == seen[i + 1 :], f"after batch {i}"


@pytest.mark.torch
def test_a_torch_loader_that_hides_its_order_is_refused():
    import torch

    def make(seed):
        rng = np.random.default_rng(seed)

        class Sampler:
            def __iter__(self):
                return iter(rng.permutation(ROWS).tolist())

            def __len__(self):
                return ROWS

        return torch_loader(sampler=lambda rows: Sampler())

    _, positions = walk(make(0))
    with pytest.raises(CheckpointError, match="gives other batches"):
        walk(make(1), positions[BATCHES + 1])
    assert len(walk(make(0), positions[BATCHES + 1])[0]) == BATCHES * EPOCHS - BATCHES - 2
    assert torch.is_tensor(next(iter(make(0)))["x"])


# ---------------------------------------------------------------------------------------- in a run


def model(seed):
    w = np.random.RandomState(seed).normal(size=(2, 2)).astype(np.float32)
    return jaxbrewer.FunctionModel(lambda params, x, number: {"logits": x @ params["w"]}, {"w": w})


def identity(batch, outputs):
    return outputs


def train(folder, loader, *, stop=None, draws=draw, callback=None, cache=None, **options):
    """Trains, with checkpoints after every second step; returns the student's bits."""
    config = {"ckpt_frequency": BATCHES // 2} | options.pop("config", {})
    lengths = options or {"num_epochs": EPOCHS}
    tasks = isinstance(loader, dict)
    settings = jaxbrewer.TrainingConfig(output_dir=folder / "out", device="cpu", **config)
    distillation = {"kd_loss_type": "mse", "temperature": 1} | (cache or {})
    distillation = jaxbrewer.DistillationConfig(**distillation)
    if tasks:
        teachers = {task: model(1) for task in loader}
        heads = dict.fromkeys(loader, identity)
        mine = jaxbrewer.MultiTaskDistiller(
            settings, distillation, teachers, model(2), heads, heads
        )
    else:
        mine = jaxbrewer.GeneralDistiller(
            settings, distillation, model(1), model(2), identity, identity
        )

    def callback(model, step):
        draws()
        if step == stop:
            raise KeyboardInterrupt

    with contextlib.suppress(KeyboardInterrupt), mine:
        mine.train(optax.sgd(0.1), loader, callback=callback, **lengths)
    return np.asarray(mine.model_S.params["w"])


RUNS = {
    "numpy": (GlobalNumpy, {}),
    "numpy, across windows": (GlobalNumpy, {"config": {"gradient_accumulation_steps": 2}}),
    "state_dict": (WithState, {}),
    "by steps": (
        Grain, {"num_steps": 18, "config": {"ckpt_steps": 2, "ckpt_frequency": 1}},
    ),
    "cached": (GlobalNumpy, {"cache": {"is_caching_logits": True}}),
    "tasks": (
        lambda: {"a": GlobalNumpy(), "b": WithState()},
        {"num_steps": 18, "config": {"ckpt_steps": 2, "ckpt_frequency": 1}},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", RUNS)
def test_a_resumed_run_ends_in_the_same_bits(name, tmp_path):
    """The script seeds nothing, and its callbacks draw; the loaders' own seeds stay."""
    make, options = RUNS[name]
    seed_all(0)
    whole = train(tmp_path / "whole", make(), **options)
    seed_all(1)
    step = 4 if "windows" in name else 8
    named = options.get("config", {}) | {"resume": str(tmp_path / "whole" / "out" / f"gs{step}")}
    resumed = train(tmp_path / "other", make(), **options | {"config": named})
    np.testing.assert_array_equal(whole, resumed)


# ---------------------------------------------------------------------------------------- parts


def test_states_are_kept_as_json():
    state = {
        "numbers": [1, 2.5, None, True, 2**100],
        3: ("text", b"\x00\xff"),
        "array": np.arange(6, dtype=np.int16).reshape(2, 3),
        "rng": np.random.default_rng(3).bit_generator.state,
    }
    again = decoded(json.loads(json.dumps(encoded(state))))
    np.testing.assert_equal(again, state)
    assert again["array"].dtype == np.int16
    for value in (object(), [np.array([object()])], {"rng": np.random.default_rng(0)}):
        with pytest.raises(TypeError, match="cannot be kept as JSON"):
            encoded(value)


@pytest.mark.torch
def test_tensors_are_kept_as_tensors():
    import torch

    state = {"generator": torch.Generator().get_state(), "at": torch.tensor(3)}
    again = decoded(json.loads(json.dumps(encoded(state))))
    assert torch.equal(again["generator"], state["generator"])
    assert torch.equal(again["at"], state["at"])


DAMAGES = {
    "checksum": -1,
    "taken": True,
    "batch": 1.5,
    "length": "7",
    "begun": {"host": {"numpy": 3}},
    "shown": {"pickle": "x"},
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_state_is_named(name):
    state = json.loads(walk(Grain())[1][0])["loaders"][""]
    assert loader_state_problem(state) is None
    assert name in loader_state_problem(state | {name: DAMAGES[name]})
    assert "length" in loader_state_problem({})
    shown = {"get_state": {"bytes": "?"}}
    assert "decoded" in loader_state_problem(state | {"shown": shown})


def test_a_checksum_is_of_all_that_a_batch_holds():
    of = Checksums().of
    x = np.arange(4.0)
    batches = [
        {"x": x}, {"y": x}, {"x": x.astype("f4")}, {"x": x[::-1]}, {"x": x[:, None]}, (x,), [x, x],
        {"x": x, "flag": True}, {"x": x, "flag": None}, {"x": [0.0, 1.0, 2.0, 3.0]}, {"x": jnp.arange(4)},
    ]  # fmt: skip
    sums = [of(batch, 0) for batch in batches]
    assert len(set(sums)) == len(batches)
    assert sums == [of(batch, 0) for batch in batches]
    assert of(batches[1], sums[0]) != of(batches[0], sums[1])
    assert of({"b": x, "a": 1}, 0) == of({"a": 1, "b": x}, 0)
    endless = []
    endless.append(endless)
    of({"x": endless}, 0)


def test_what_is_not_in_host_memory_is_said_once(caplog):
    of = Checksums().of
    elsewhere = SimpleNamespace(shape=(2, 3), dtype="float32")
    with caplog.at_level(logging.INFO):
        assert of((elsewhere,), 0) == of((elsewhere,), 0)
    (said,) = [r.getMessage() for r in caplog.records]
    assert "only their types and shapes are compared" in said


def test_a_checkpoint_without_states_goes_on_with_a_line(tmp_path, caplog):
    train(tmp_path, ORIGINAL())
    path = tmp_path / "out" / "gs8" / "position" / "metadata"
    position = json.loads(path.read_text())
    for process in position["processes"]:
        del process["loaders"]
    del position["digest"]
    path.write_text(json.dumps(sealed(position)))
    named = {"resume": str(tmp_path / "out" / "gs8")}
    train(tmp_path / "other", shuffled_otherwise(), config=named)
    assert "whether the batches before it were the same cannot be compared" in caplog.text


def test_a_run_refuses_other_data(tmp_path):
    train(tmp_path, ORIGINAL(), stop=8)
    with pytest.raises(CheckpointError, match="gives other batches than before the checkpoint"):
        train(tmp_path, shuffled_otherwise(), config={"resume": True})
