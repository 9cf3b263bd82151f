"""Writers of the user's own: what they are given, where, and what it costs when they fail."""

import json
import re
import sys
import threading
import types
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxbrewer
from jaxbrewer.errors import PreflightError
from jaxbrewer.evaluation import Accuracy
from jaxbrewer.training.folders import steps_in
from jaxbrewer.training.metrics import MetricsWriter
from jaxbrewer.training.writers import given

from .. import fn_job

ROOT = Path(__file__).parents[2]
BATCHES = fn_job.batches(4)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """What is compared here does not depend on how well programs are optimized."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Recorder:
    """Keeps what it is given, and on which threads; fails at a step, or when it is closed."""

    def __init__(self, fails_at=None):
        self.fails_at, self.seen, self.closed, self.threads = fails_at, [], 0, set()

    def write(self, step, values):
        self.threads.add(threading.current_thread())
        if step == self.fails_at:
            raise ConnectionError("the server is gone")
        self.seen.append((step, values))

    def close(self):
        self.threads.add(threading.current_thread())
        self.closed += 1
        if self.fails_at == "close":
            raise ConnectionError("the server is gone")

    @property
    def steps(self):
        return [step for step, _ in self.seen]


class Quiet(Recorder):
    """Another class, of which errors must not speak."""


def train(folder, *writers, epochs=2, resume=False, log="log", **options):
    """Two epochs of four batches, with a checkpoint after each two."""
    log_dir = folder / log if log else None
    distiller = fn_job.distiller(folder, log_dir=log_dir, ckpt_frequency=2, resume=resume)
    with distiller:
        distiller.train(fn_job.SGD, BATCHES, num_epochs=epochs, writers=writers, **options)
    return distiller


def lines(folder):
    """The points of `metrics.jsonl`, as writers get them."""
    read = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    return [(line.pop("step"), {k: v for k, v in line.items() if k != "time"}) for line in read]


def weights(distiller):
    return [np.asarray(x) for x in jax.tree.leaves(distiller.model_S.params)]


# ---------------------------------------------------------------------------- what they are given


def test_every_number_in_order_on_a_thread_of_their_own(tmp_path):
    one, two = Recorder(), Quiet()
    train(tmp_path, one, two, eval_loader=BATCHES, metrics=[Accuracy()])
    assert one.seen == two.seen == lines(tmp_path)
    assert one.steps == [0, 1, 1, 2, 3, 3, 4, 5, 5, 6, 7, 7]
    assert next(iter(one.seen[1][1])) == "scalar/total_loss"
    assert list(one.seen[2][1]) == ["eval/accuracy"]
    assert all(type(value) is float for _, values in one.seen for value in values.values())
    assert one.closed == two.closed == 1
    assert one.threads == two.threads
    assert len(one.threads) == 1
    assert threading.main_thread() not in one.threads


def test_without_files_and_in_every_kind_of_training(tmp_path):
    writer = Recorder()
    train(tmp_path / "none", writer, log=None)
    assert (writer.steps, writer.closed) == ([*range(8)], 1)
    config = jaxbrewer.TrainingConfig(output_dir=tmp_path / "tasks", device="cpu", ckpt_steps=4)
    heads = dict.fromkeys("ab", fn_job.adaptor("logits"))
    teachers = {"a": fn_job.encoder(1), "b": fn_job.encoder(3)}
    tasks = jaxbrewer.MultiTaskDistiller(
        config, jaxbrewer.DistillationConfig(), teachers, fn_job.encoder(2), heads, heads
    )
    writer = Recorder()
    with tasks:
        tasks.train(fn_job.SGD, dict.fromkeys("ab", BATCHES), num_steps=4, writers=[writer])
    assert (writer.steps, writer.closed) == ([*range(4)], 1)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_what_lies_before_a_checkpoint_was_given_before_it(tmp_path):
    writer, seen = Recorder(), []
    train(tmp_path, writer, callback=lambda model, step: seen.append((step, len(writer.seen))))
    assert seen == [(2, 2), (4, 4), (6, 6), (8, 8)]


def test_a_run_that_goes_on_gives_what_comes_after_its_checkpoint(tmp_path):
    train(tmp_path, epochs=1)
    writer, finished = Recorder(), Recorder()
    train(tmp_path, writer, resume="gs2")
    assert (writer.steps, writer.closed) == ([2, 3, 4, 5, 6, 7], 1)
    train(tmp_path, finished, resume=True)
    assert (finished.steps, finished.closed) == ([], 1)
    assert [step for step, _ in lines(tmp_path)] == [*range(8)]


# ---------------------------------------------------------------------------- what fails


@pytest.mark.parametrize("fails_at", [1, 4, 7])
def test_one_that_fails_ends_the_run_and_costs_no_checkpoint(fails_at, tmp_path):
    """It is named; the files and other writers have every point that they would have."""
    failing, other = Recorder(fails_at), Quiet()
    said = (
        f"the writer Recorder failed at micro-batch {fails_at}: ConnectionError: the server is gone"
    )
    with pytest.raises(RuntimeError) as caught:
        train(tmp_path, failing, other)
    assert str(caught.value) == said
    assert isinstance(caught.value.__cause__, ConnectionError)
    assert not hasattr(caught.value, "__notes__")
    assert failing.steps == [*range(fails_at)]
    assert failing.closed == other.closed == 1
    saved = fails_at // 2 * 2 + 2  # points are looked at before a checkpoint
    assert steps_in(tmp_path / "out")[-1] == saved
    assert other.steps == [*range(saved)]
    assert other.seen == lines(tmp_path)
    if saved < 8:
        went_on, whole = train(tmp_path, resume=True), train(tmp_path / "whole")
        assert lines(tmp_path) == lines(tmp_path / "whole")
        assert all((a == b).all() for a, b in zip(weights(went_on), weights(whole), strict=True))


def test_the_run_ends_soon_without_a_checkpoint_too():
    failing, other = Recorder(fails_at=3), Quiet()
    points = MetricsWriter(given([failing, other]))
    with pytest.raises(RuntimeError, match="Recorder failed at micro-batch 3"):
        for step in range(1000):
            points.write(step, ("a",), np.float32([np.nan]))
    assert step < 100
    points.close()
    assert failing.steps == [0, 1, 2]  # nothing after what it failed at
    assert other.steps == [*range(step + 1)]
    assert all(np.isnan(values["a"]) for _, values in other.seen)


def test_one_that_cannot_be_closed_is_named_once_all_is_saved(tmp_path):
    failing, other = Recorder("close"), Quiet()
    with pytest.raises(RuntimeError, match=r"Recorder failed when it was closed: ConnectionError"):
        train(tmp_path, failing, other)
    assert steps_in(tmp_path / "out") == [2, 4, 6, 8]
    assert failing.steps == other.steps == [*range(8)]
    assert failing.closed == other.closed == 1


@pytest.mark.parametrize("options", [{"max_grad_norm": "1"}, {"nothing": 1}, {"num_steps": 0}])
def test_they_are_closed_though_nothing_was_trained(options, tmp_path):
    writer = Recorder()
    with pytest.raises((TypeError, ValueError, PreflightError)):
        train(tmp_path, writer, **options)
    assert (writer.seen, writer.closed) == ([], 1)
    assert not (tmp_path / "log").exists()


class Nothing:
    pass


class OfNames:
    def write(self, step):
        pass

    def close(self):
        pass


class Closing(Recorder):
    def close(self, status):
        pass


@pytest.mark.parametrize(
    ("writers", "said"),
    [
        (Recorder(), "writers is a Recorder; give a list of writers, writers=[MyWriter()]"),
        (None, "writers is a NoneType; give a list"),
        ([Recorder(), Recorder], "writers[1] is the class Recorder; give an object of it, Recorder("),
        ([Nothing()], "writers[0] is a Nothing, which has no method write(step, values); a writer has"),
        ([OfNames()], "writers[0] is a OfNames, whose write(step) cannot be called as write(step, values)"),
        ([Closing()], "writers[0] is a Closing, whose close(status) cannot be called as close(): miss"),
    ],
)  # fmt: skip
def test_what_is_no_writer_is_refused(writers, said, tmp_path):
    distiller = fn_job.distiller(tmp_path)
    with distiller, pytest.raises(TypeError, match=re.escape(said)):
        distiller.train(fn_job.SGD, BATCHES, num_epochs=1, writers=writers)


def test_a_misspelt_keyword_is_told(tmp_path):
    distiller = fn_job.distiller(tmp_path)
    with distiller, pytest.raises(PreflightError, match="writers"):
        distiller.train(fn_job.SGD, BATCHES, num_epochs=1, writer=[])


# ---------------------------------------------------------------------------- as documented


def test_weights_and_biases_as_documented(tmp_path, monkeypatch):
    """The code of `docs/metric_writers.md`, with a module in the place of wandb."""
    logged, made = [], []

    class Run:
        def log(self, data, step):
            logged.append((step, data))

        def finish(self):
            logged.append("finished")

    def init(**options):
        made.append(options)
        return Run()

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    text = (ROOT / "docs" / "metric_writers.md").read_text()
    (code,) = re.findall(r"```python\n(import wandb\n.*?)```", text, re.DOTALL)
    distiller = fn_job.distiller(tmp_path, log_dir=tmp_path / "log")
    known = {"distiller": distiller, "optimizer": fn_job.SGD, "loader": BATCHES}
    exec(compile(code, "metric_writers.md", "exec"), known)
    assert made == [{"project": "distil", "id": "t3-1", "resume": "allow"}]
    assert logged == [*lines(tmp_path), "finished"]
    assert [step for step, _ in lines(tmp_path)] == [0, 1, 2, 3]
