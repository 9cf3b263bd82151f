"""Curves after a kill and a resume: every point is there, and none twice."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

import jaxbrewer
from jaxbrewer.training.event_files import EventWriter, Tensorboard, read_scalars
from jaxbrewer.training.metrics import MetricsWriter

from .test_loaders import identity, model, pick

ROOT = Path(__file__).parents[2]
BATCHES, EPOCHS = 6, 2


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """What is compared here does not depend on how well programs are optimized."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Killed(BaseException):
    """Stands for a kill: nothing that was only noted is written after it."""


def kill():
    raise Killed


def train(folder, *, at=None, way=kill, tasks=False, resume=False, writes=(), accumulation=1):
    """Trains, and is killed while its batch number `at` is prepared; callbacks log under `writes`.

    `writes`: how a callback counts: its own step from the optimizer's.
    """
    config = jaxbrewer.TrainingConfig(
        output_dir=folder / "out",
        log_dir=folder / "log",
        device="cpu",
        ckpt_frequency=3 if not tasks else 1,
        ckpt_steps=2 if tasks else None,
        gradient_accumulation_steps=accumulation,
        resume=resume,
    )
    distillation = jaxbrewer.DistillationConfig(kd_loss_type="mse", temperature=1)
    loader = list(pick(range(2 * BATCHES)))
    if tasks:
        names = ("a", "b")
        heads = dict.fromkeys(names, identity)
        teachers = {name: model(i) for i, name in enumerate(names)}
        mine = jaxbrewer.MultiTaskDistiller(config, distillation, teachers, model(2), heads, heads)
        loader, lengths = dict.fromkeys(names, loader), {"num_steps": 6}
    else:
        mine = jaxbrewer.GeneralDistiller(
            config, distillation, model(1), model(2), identity, identity
        )
        lengths = {"num_epochs": EPOCHS}
    seen = []

    def postprocess(batch):
        seen.append(1)
        if len(seen) - 1 == at:
            way()
        return batch

    def callback(model, step):
        for i, count in enumerate(writes):
            mine.tb_writer.add_scalar(f"callback/{i}", step, count(step))

    posts = {"batch_postprocessor": postprocess}
    if tasks:
        posts = {"batch_postprocessors": dict.fromkeys(loader, postprocess)}
    with mine:
        mine.train(optax.sgd(0.1), loader, callback=callback, **posts, **lengths)


def points(folder):
    """(tag, step) → value, as tensorboard shows it; each must be there once."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder), size_guidance={"scalars": 0})
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    shown = [(tag, e.step, e.value) for tag in tags for e in accumulator.Scalars(tag)]
    twice = [key for key, count in Counter(point[:2] for point in shown).items() if count > 1]
    assert not twice
    assert {point[:2]: point[2] for point in shown} == {
        (tag, step): value for tag, c in read_scalars(folder).items() for step, value in c.items()
    }
    found = {point[:2]: point[2] for point in shown}
    assert json_points(folder) == {
        point: value for point, value in found.items() if point[0].startswith(("scalar/", "eval/"))
    }
    return found


def json_points(folder):
    """The same, as `metrics.jsonl` has it: each must be there once, and steps be in order."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    found = [
        ((tag, line["step"]), float(np.float32(value)))
        for line in lines
        for tag, value in line.items()
        if tag not in ("step", "time")
    ]
    assert len(dict(found)) == len(found)
    return dict(found)


@pytest.mark.torch  # tensorboard comes with it
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_point_is_there_once_after_kills(accumulation, tmp_path):
    """The callbacks' own too, whether they count updates, examples or from 0."""
    options = {"accumulation": accumulation}
    options["writes"] = (lambda step: step, lambda step: 100 * step, lambda step: step - 1)
    train(tmp_path / "whole", **options)
    rng = random.Random(accumulation)
    for at in (rng.randrange(5, 8), rng.randrange(2, 5)):  # batches of each process
        with pytest.raises(Killed):
            train(tmp_path / "cut", at=at, resume=True, **options)
    train(tmp_path / "cut", resume=True, **options)
    whole, cut = points(tmp_path / "whole" / "log"), points(tmp_path / "cut" / "log")
    assert cut == whole


@pytest.mark.torch
def test_every_point_of_several_tasks_is_there_once(tmp_path):
    train(tmp_path / "whole", tasks=True)
    with pytest.raises(Killed):
        train(tmp_path / "cut", tasks=True, at=4)
    train(tmp_path / "cut", tasks=True, resume=True)
    assert points(tmp_path / "cut" / "log") == points(tmp_path / "whole" / "log")


KILLED = """
import os, pathlib, signal, sys
from tests.durability.test_curves import train

for at in map(int, sys.argv[2:]):  # in forks of a process that has computed nothing
    child = os.fork()
    if not child:
        way = lambda: os.kill(os.getpid(), signal.SIGKILL)
        train(pathlib.Path(sys.argv[1]), at=at, way=way, resume=True)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
"""


@pytest.mark.torch
def test_every_point_is_there_once_after_sigkills(tmp_path):
    command = [sys.executable, "-c", KILLED, tmp_path / "cut", *"734"]
    env = os.environ | {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    ended = subprocess.run(command, capture_output=True, check=False, cwd=ROOT, env=env)
    assert ended.returncode == 0, ended.stderr.decode()
    train(tmp_path / "cut", resume=True)
    train(tmp_path / "whole")
    assert points(tmp_path / "cut" / "log") == points(tmp_path / "whole" / "log")


def scalars(writer, tag, *steps):
    for step in steps:
        writer.add_scalar(tag, step, step)


def test_what_a_user_has_written_before_a_checkpoint_stays(tmp_path):
    """Whatever its steps are; and so does what was written since the new process began."""
    writer = EventWriter(str(tmp_path))
    metrics = MetricsWriter([Tensorboard(writer)])
    scalars(writer, "mine", 0, 700)
    metrics.mark(2, 4)
    scalars(writer, "mine", 3, 800)
    metrics.close()
    writer.close()
    writer = EventWriter(str(tmp_path))
    scalars(writer, "new", 1, 900)
    writer.close()  # and opened anew
    writer = EventWriter(str(tmp_path))
    scalars(writer, "newer", 5)
    metrics = MetricsWriter([Tensorboard(writer)])
    metrics.go_on("gs2", 4, {"scalar/total_loss"})
    metrics.close()
    writer.close()
    assert {tag: list(curve) for tag, curve in read_scalars(tmp_path).items()} == {
        "mine": [0, 700],
        "newer": [5],
    }


def test_without_a_mark_steps_decide(tmp_path):
    """As in what was written by an older version."""
    writer = EventWriter(str(tmp_path))
    scalars(writer, "scalar/total_loss", 0, 1, 2, 3, 4, 5)
    scalars(writer, "mine", 1, 6)
    writer.close()
    writer = EventWriter(str(tmp_path))
    metrics = MetricsWriter([Tensorboard(writer)])
    metrics.go_on("gs2", 4, {"scalar/total_loss"})
    metrics.close()
    writer.close()
    read = read_scalars(tmp_path)
    assert {tag: list(c) for tag, c in read.items()} == {
        "scalar/total_loss": [0, 1, 2, 3],
        "mine": [1],
    }
