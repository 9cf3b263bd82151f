"""Checkpoints: what is saved when, what a resume brings back, and what is refused."""

import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

import jaxbrewer
from jaxbrewer.errors import CheckpointError
from jaxbrewer.training.checkpoints import Checkpoints
from jaxbrewer.training.folders import steps_in
from jaxbrewer.training.stored import checkpoint_path
from tests import fn_job, nnx_job
from tests.nnx_job import read_events
from tests.training import killed

ADAMW = optax.adamw(1e-2)
MATCHES = [{k: v for k, v in m.items() if k != "proj"} for m in nnx_job.MATCHES[1:]] + [
    nnx_job.MATCHES[0] | {"proj": ["linear", 4, 6]}
]


def make(folder, **training):
    training = {"gradient_accumulation_steps": 2, "ckpt_frequency": 2, **training}
    return nnx_job.distiller(folder, distillation={"intermediate_matches": MATCHES}, **training)


class Killed(Exception):
    pass


def train(distiller, *, loader=None, callback=None, **how):
    how = how or {"num_epochs": 3}
    with distiller:
        distiller.train(ADAMW, loader or nnx_job.loader(7), callback=callback, **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run from start to end: the folder, the curves, the weights."""
    folder = tmp_path_factory.mktemp("whole")
    distiller = make(folder)
    train(distiller)
    return folder, read_events(folder / "log"), nnx_job.weights(distiller.model_S)


def kill_at(when):
    def callback(model, step):
        if step == when:
            raise Killed

    return callback


@pytest.mark.parametrize("when", [1, 4, 6])
def test_resumed_run_ends_with_the_same_bits(tmp_path, whole, when):
    """Mid-epoch, with a leftover micro-batch after the last save, and at the end of an epoch."""
    _, curves, expected = whole
    with pytest.raises(Killed):
        train(make(tmp_path), callback=kill_at(when))
    assert steps_in(tmp_path / "out")[-1] == when
    resumed = make(tmp_path, resume=True)
    train(resumed)
    for name, value in nnx_job.weights(resumed.model_S).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    again = read_events(tmp_path / "log")
    for tag, curve in curves.items():
        np.testing.assert_array_equal(again[tag], curve, err_msg=tag)


def test_run_by_steps_resumes_with_the_same_bits(tmp_path):
    how = {"num_steps": 8}
    one = make(tmp_path / "a", ckpt_steps=3)
    train(one, **how)
    assert steps_in(tmp_path / "a" / "out") == [3, 6, 8]
    with pytest.raises(Killed):
        train(make(tmp_path / "b", ckpt_steps=3), callback=kill_at(6), **how)
    two = make(tmp_path / "b", ckpt_steps=3, resume=True)
    train(two, **how)
    for name, value in nnx_job.weights(two.model_S).items():
        np.testing.assert_array_equal(value, nnx_job.weights(one.model_S)[name])


def test_shuffling_loader_resumes_in_its_own_order(tmp_path):
    """A loader with a random state of its own, and a postprocessor on numpy's global one."""

    class Shuffled:
        def __init__(self):
            self.rng = np.random.default_rng(5)
            self.batches = nnx_job.loader(7)

        def __len__(self):
            return len(self.batches)

        def __iter__(self):
            return iter([self.batches[i] for i in self.rng.permutation(7)])

    def noisy(batch):
        return batch | {"input_ids": np.random.randint(0, nnx_job.VOCABULARY, (4, 5))}

    def run(folder, callback=None, **training):
        np.random.seed(0)
        distiller = make(folder, **training)
        with distiller:
            distiller.train(
                ADAMW, Shuffled(), num_epochs=2, callback=callback, batch_postprocessor=noisy
            )
        return nnx_job.weights(distiller.model_S)

    expected = run(tmp_path / "a")
    with pytest.raises(Killed):
        run(tmp_path / "b", kill_at(4))
    for name, value in run(tmp_path / "b", resume=True).items():
        np.testing.assert_array_equal(value, expected[name])


def test_resume_after_the_end_gives_the_trained_student(whole):
    folder, _, expected = whole
    finished = make(folder, resume=True)
    train(finished)
    for name, value in nnx_job.weights(finished.model_S).items():
        np.testing.assert_array_equal(value, expected[name])


CUSTOM = {"module_T": "layers.0", "module_S": "layers.0", "weight": 1.0, "loss": "hidden_mse"} | {
    "proj_func": ["linear", 4, 6]
}


@pytest.mark.parametrize("custom", [[], [CUSTOM]])
def test_resume_after_the_end_gives_all_the_run_would_have_left(tmp_path, custom):
    """The student, the projections, those of custom matches too, the best checkpoint and the rank."""

    def run(resume):
        made = make(tmp_path, resume=resume, max_to_keep=2)
        distiller = jaxbrewer.GeneralDistiller(
            made.t_config,
            made.d_config,
            made.model_T,
            made.model_S,
            nnx_job.adaptor,
            nnx_job.adaptor,
            custom_matches=custom,
        )
        train(
            distiller,
            callback=lambda model, step: jaxbrewer.CallbackResult(score=-step),
            num_epochs=1,
        )
        return distiller

    whole, resumed = run(False), run(True)
    assert len(whole.projs) == len(resumed.projs) == 2 + len(custom)
    held = [(whole.model_S, resumed.model_S), *zip(whole.projs, resumed.projs, strict=True)]
    for expected, found in held:
        if expected is None:
            assert found is None
            continue
        for name, value in nnx_job.weights(expected).items():
            np.testing.assert_array_equal(nnx_job.weights(found)[name], value, err_msg=name)
    assert resumed.best_checkpoint == whole.best_checkpoint == tmp_path / "out" / "gs1"
    assert resumed.rank == whole.rank == 0


def test_resume_with_nothing_saved_starts_anew(tmp_path, whole):
    fresh = make(tmp_path, resume=True)
    train(fresh)
    for name, value in nnx_job.weights(fresh.model_S).items():
        np.testing.assert_array_equal(value, whole[2][name])


@pytest.mark.filterwarnings("ignore:the hidden matches use")
def test_resume_is_refused_where_it_would_not_be_the_same_run(tmp_path, whole):
    folder, *_ = whole
    with pytest.raises(CheckpointError, match="gradient_accumulation_steps=2, not 1"):
        train(make(folder, resume=True, gradient_accumulation_steps=1))
    other = nnx_job.distiller(
        folder,
        resume=True,
        gradient_accumulation_steps=2,
        distillation={"intermediate_matches": MATCHES},
        student=nnx_job.Encoder(3, 4, seed=2),
    )
    with pytest.raises(CheckpointError, match=r"layers\.2\.kernel: not in the checkpoint"):
        train(other, num_epochs=4)
    with pytest.raises(
        CheckpointError, match="the loader has 2 batches in a pass, and had 7 before"
    ):
        train(make(folder, resume=True), loader=nnx_job.loader(2), num_epochs=40)


@pytest.mark.parametrize("asked", [False, True])
def test_orbax_gives_an_account_only_where_asked(tmp_path, caplog, asked):
    caplog.set_level(logging.INFO)
    if asked:
        caplog.set_level(logging.INFO, logger="orbax")
    with fn_job.distiller(tmp_path) as distiller:
        distiller.train(fn_job.SGD, fn_job.batches(2), num_epochs=1)
    assert any("gs2 saved" in message for message in caplog.messages)
    assert any("orbax" in record.pathname for record in caplog.records) == asked


def test_new_run_in_a_used_folder_loses_nothing(tmp_path, caplog):
    train(make(tmp_path), num_epochs=1)
    kept = sorted(p.name for p in (tmp_path / "out").iterdir())
    train(make(tmp_path), num_epochs=1)
    assert sorted(p.name for p in (tmp_path / "out" / "earlier-1").iterdir()) == kept
    assert "earlier-1" in caplog.text


def test_max_to_keep_keeps_the_best_and_the_newest(tmp_path):
    scores = {1: 0.1, 3: 0.9, 4: 0.3, 6: 0.2}

    def callback(model, step):
        return jaxbrewer.CallbackResult(score=scores[step])

    distiller = make(tmp_path, max_to_keep=2)
    train(distiller, callback=callback, num_epochs=2)
    assert steps_in(tmp_path / "out") == [3, 6]
    assert distiller.best_checkpoint == tmp_path / "out" / "gs3"


def fill_the_disk_at(step, monkeypatch):
    """Lets the checkpoint of a step fail in the background."""
    finalize = ocp.CompositeCheckpointHandler.finalize

    def fails(self, directory):
        if f"gs{step}." in str(directory):
            raise OSError("no space left on the device")
        finalize(self, directory)

    monkeypatch.setattr(ocp.CompositeCheckpointHandler, "finalize", fails)


def test_the_old_checkpoint_stays_until_the_new_one_is_finished(tmp_path, monkeypatch):
    """One that fails in the background costs none of those before it."""
    finished = []

    def callback(model, step):
        finished.append(steps_in(tmp_path / "out"))

    def train():
        distiller = fn_job.distiller(tmp_path, max_to_keep=1)
        with distiller:
            distiller.train(fn_job.SGD, fn_job.batches(2), num_epochs=3, callback=callback)

    train()
    assert all(finished[1:])
    assert [p.name for p in (tmp_path / "out").glob("gs*")] == ["gs6"]

    fill_the_disk_at(4, monkeypatch)
    with pytest.raises(CheckpointError, match=r"gs4 could not be written .*no space left"):
        train()
    assert steps_in(tmp_path / "out") == [2]


def test_a_deletion_that_was_killed_is_finished_by_the_next_run(tmp_path):
    (tmp_path / "gs2" / "student").mkdir(parents=True)
    for step in (4, 6):
        (tmp_path / f"gs{step}").mkdir()
        (tmp_path / f"gs{step}" / "_CHECKPOINT_METADATA").touch()
    (tmp_path / "gs8").mkdir()  # newer than all that are finished
    Checkpoints(tmp_path, resume=True, max_to_keep=1).close()
    assert sorted(p.name for p in tmp_path.glob("gs*")) == ["gs6"]
    assert [p.name for p in (tmp_path / "earlier-1").iterdir()] == ["gs8"]


def test_no_kill_in_a_save_costs_a_checkpoint(tmp_path):
    """With one checkpoint kept and with two, with scores and without; the run ends in the same bits."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.training.killed", tmp_path, "12", "0"],
        cwd=Path(__file__).parents[2],
        env={**os.environ, **killed.QUICKLY, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla")},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stderr
    said = re.search(
        r"kills, 12 inside a save, 0 lost; the last ended with 0 in the same bits; "
        r"left: \['gs(\d+)'\], after gs(\d+)",
        result.stdout,
    )
    assert said, result.stdout + result.stderr
    # A kill that comes before its save is finished costs two steps, which are then made again.
    assert int(said[1]) > int(said[2]) > 0


def test_load_student_by_checkpoint_and_by_folder(whole):
    folder, _, expected = whole
    student = nnx_job.Encoder(2, 4, seed=9)
    assert jaxbrewer.load_student(folder / "out", student) is student
    for name, value in nnx_job.weights(student).items():
        np.testing.assert_array_equal(value, expected[name])
    jaxbrewer.load_student(folder / "out" / "gs1", student)
    assert any((nnx_job.weights(student)[name] != expected[name]).any() for name in expected)


def test_load_student_refuses_what_does_not_fit(tmp_path, whole):
    folder, *_ = whole
    with pytest.raises(
        CheckpointError, match=r"embed\.embedding: saved as \[20, 4\], wanted \[20, 5\]"
    ):
        jaxbrewer.load_student(folder / "out", nnx_job.Encoder(2, 5))
    with pytest.raises(CheckpointError, match="is not there"):
        jaxbrewer.load_student(tmp_path / "nowhere", nnx_job.Encoder(2, 4))
    (tmp_path / "gs9").mkdir()
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        checkpoint_path(tmp_path)
    with pytest.raises(TypeError, match="save_pretrained"):
        jaxbrewer.export_hf(folder / "out", nnx_job.Encoder(2, 4), tmp_path / "hf")


def test_damaged_checkpoint_is_named(tmp_path):
    train(make(tmp_path), num_epochs=1)
    for path in (tmp_path / "out" / "gs3" / "student").rglob("*"):
        if path.is_file() and path.stat().st_size > 200 and "d" in path.parts[-2:]:
            path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"gs3 cannot be read .*beside it: gs1;"):
        jaxbrewer.load_student(tmp_path / "out" / "gs3", nnx_job.Encoder(2, 4))


def test_position_is_readable_json(whole):
    folder, *_ = whole
    saved = json.loads((folder / "out" / "gs4" / "position" / "metadata").read_text())
    assert (saved["format"], saved["epoch"], saved["batch"]) == (2, 1, 2)
    assert saved["distill_config"]["temperature"] == 4
    assert jaxbrewer.DistillationConfig.from_dict(saved["distill_config"])


def test_output_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be made"):
        Checkpoints(tmp_path / "file" / "out", resume=False, max_to_keep=None)


def test_checkpoint_holds_projections(whole):
    folder, *_ = whole
    distiller = make(folder, resume=True)
    before = nnx_job.weights(distiller.projs[1])
    train(distiller, num_epochs=4)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a != b).any()), before, nnx_job.weights(distiller.projs[1]))
    )
