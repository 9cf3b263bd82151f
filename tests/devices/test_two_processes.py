"""Two processes of two devices each against one process with one, on the same examples."""

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import jaxbrewer
from jaxbrewer.evaluation import Divergence, Evaluator
from jaxbrewer.training import read_scalars
from jaxbrewer.training.folders import steps_in

from .. import nnx_job
from ..durability import test_nonfinite as nonfinite
from . import every, two_processes

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where both processes, run to their end, left what they found."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"NPROC": "8", "PYTHONPATH": str(ROOT)}
    started = [
        subprocess.Popen(
            [sys.executable, "-m", two_processes.__name__, str(port), str(rank), str(folder)],
            cwd=ROOT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        said = [process.communicate(timeout=900)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], "\n\n".join(said)
    return folder


def weights(folder, name):
    """What both processes have; it must be the same."""
    found = []
    for rank in range(2):
        said = json.loads((folder / f"{name}-{rank}.json").read_text())
        assert said["error"] is None, said
        found.append(dict(np.load(folder / f"{name}-{rank}.npz")))
    for key, value in found[0].items():
        np.testing.assert_array_equal(value, found[1][key], err_msg=key)
    return found[0]


def errors(folder, name):
    return [json.loads((folder / f"{name}-{rank}.json").read_text())["error"] for rank in range(2)]


def assert_close(found, wanted, rtol=1e-5):
    for key, value in wanted.items():
        np.testing.assert_allclose(
            found[key], value, rtol=rtol, atol=rtol * np.abs(value).max(), err_msg=key
        )


def one_process(folder, loader, name="general", epochs=1, **options):
    distiller = every.JOBS[name](every.config(folder, **options))
    if epochs == 1:
        every.train(distiller, loader)
    else:
        with distiller:
            distiller.train(nnx_job.SGD, loader, num_epochs=epochs)
    return nnx_job.weights(distiller.model_S), read_scalars(folder / "log")


def assert_same_run(folder, name, wanted, curves):
    assert_close(weights(folder, name), wanted)
    found = read_scalars(folder / name / "log")
    assert found.keys() == curves.keys()
    for tag, points in curves.items():
        assert found[tag].keys() == points.keys()
        np.testing.assert_allclose(
            [found[tag][i] for i in points], list(points.values()), rtol=1e-5, err_msg=tag
        )
    loaded = jaxbrewer.load_student(folder / name / "out", every.student())
    assert_close(nnx_job.weights(loaded), weights(folder, name), rtol=0)


def test_the_numbers_and_the_checkpoint_are_those_of_one_process(folder, tmp_path):
    assert_same_run(folder, "even", *one_process(tmp_path, every.batches(4)))


def test_a_ragged_last_batch_is_exact(folder, tmp_path):
    loader = [*every.batches(2), *every.batches(1, size=13, seed=3)]
    assert_same_run(folder, "ragged", *one_process(tmp_path, loader))


def test_one_process_may_run_out_of_data_first(folder, tmp_path):
    loader = [*every.batches(3), *every.batches(2, size=8, seed=5)]
    assert_same_run(folder, "one_runs_out", *one_process(tmp_path, loader, epochs=2))


def test_only_one_process_logs(folder):
    assert len(list((folder / "even" / "log").glob("events*"))) == 1


@pytest.mark.parametrize("name", ["sharded", "tasks"])
def test_other_ways_of_training(name, folder, tmp_path):
    job = "tasks" if name == "tasks" else "general"
    wanted, _ = one_process(tmp_path, every.batches(4), job)
    assert_close(weights(folder, name), wanted)


def test_exact_accumulation_over_the_processes(folder, tmp_path):
    """Each process has half of each micro-batch, of other lengths than the other's."""
    config = every.config(tmp_path, **two_processes.EXACT)
    distiller = every.by_example(config)
    every.train(distiller, every.batches(4))
    assert_close(weights(folder, "exact"), nnx_job.weights(distiller.model_S))


def test_pmap_averages_over_the_processes(folder, tmp_path):
    loader = [*every.batches(2), *every.batches(1, size=13, seed=3)]
    distiller = two_processes.trainer(every.config(tmp_path))
    every.train(distiller, loader)
    assert_close(weights(folder, "pmapped"), nnx_job.weights(distiller.model_S))


def test_each_process_caches_its_part_of_the_teacher(folder, tmp_path):
    distiller = jaxbrewer.BasicDistiller(
        every.config(tmp_path),
        every.distillation(is_caching_logits=True),
        every.teacher(),
        every.student(),
        nnx_job.adaptor,
        nnx_job.adaptor,
    )
    every.train(distiller, every.batches(4))
    assert_close(weights(folder, "cached"), nnx_job.weights(distiller.model_S))


def test_a_resumed_run_has_the_same_bits(folder):
    wanted, found = weights(folder, "uninterrupted"), weights(folder, "resumed")
    weights(folder, "interrupted")
    assert steps_in(folder / "resumed" / "out") == [2, 4, 6, 8]
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_other_data_in_one_process_are_an_error_in_all(folder):
    other, own = errors(folder, "other_data")
    assert other.startswith("BatchError: process 1 failed while checking the models and the first")
    assert own.startswith("CheckpointError: the loader gives other batches than before")


def test_the_best_checkpoint_is_known_to_all(folder):
    for rank in range(2):
        said = json.loads((folder / f"best-{rank}.json").read_text())
        assert said == {"error": None, "best": "gs8"}


def test_the_first_processs_evaluation_counts_for_all(folder):
    """And the weights are those of a run without."""
    said = [json.loads((folder / f"numbers-{rank}.json").read_text()) for rank in range(2)]
    written = [each.pop("written") for each in said]  # the first one writes, for all
    assert written == [{"steps": [0, 1, 1, 2, 2, 3, 3], "closed": 1}, {"steps": [], "closed": 1}]
    assert said[0] == said[1]
    assert list(said[0]["evaluations"]) == ["2", "3", "4"]
    student = jaxbrewer.load_student(folder / "evaluated" / "out", every.student())
    evaluate = Evaluator(student, nnx_job.adaptor, teacher=every.teacher())
    mine = evaluate(every.batches(2, size=5, seed=8), [Divergence()])
    assert said[0]["evaluations"]["4"] == pytest.approx(mine, rel=1e-5)
    at = {step: said[0]["evaluations"][step]["kl"] for step in ("2", "4")}
    assert said[0]["best"] == f"gs{min(at, key=at.get)}"
    assert list(read_scalars(folder / "evaluated" / "log")["eval/kl"]) == [1, 2, 3]
    wanted, found = weights(folder, "even"), weights(folder, "evaluated")
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_an_evaluation_that_fails_in_one_process_ends_all(folder):
    other, own = errors(folder, "evaluates_badly")
    assert other.startswith("BatchError: process 1 failed while evaluating; its own error")
    assert own == "RuntimeError: no numbers"
    assert steps_in(folder / "evaluates_badly" / "out") == [1]
    for error in errors(folder, "evaluates_alone"):
        assert "eval_loader, best_metric and eval_steps must be given alike in all" in error


def test_a_checkpoint_of_two_processes_goes_on_in_one(folder, tmp_path, caplog):
    """From the end of an epoch on, when the order in which examples come is the same again."""
    shutil.copytree(folder / "even" / "out", tmp_path / "out")
    found, _ = one_process(tmp_path, every.batches(4), epochs=2, resume=True)
    assert "was saved by 2 processes and goes on in 1" in caplog.text
    wanted, _ = one_process(tmp_path / "one", every.batches(4), epochs=2)
    assert_close(found, wanted)


def test_a_job_that_has_changed_in_one_process_is_refused_in_all(folder):
    first, second = errors(folder, "changed")
    assert first == second
    assert first.startswith("CheckpointError")
    assert "teacher, weights: was" in first


def test_shapes_that_disagree_are_an_error_in_all(folder):
    for error in errors(folder, "disagree"):
        assert error.startswith("BatchError: the processes' batches do not fit together")
        assert "process 0 has attention_mask int32[8, 6]" in error
        assert "process 1 has attention_mask int32[8, 5]" in error
        assert "pad all to one length" in error


def test_the_error_of_one_process_is_one_of_all(folder):
    assert errors(folder, "fails") == [
        "BatchError: process 1 failed while preparing a batch; its own error is in its output. All "
        "processes stop",
        "RuntimeError: the disk is gone",
    ]
    other, own = errors(folder, "has_nothing")
    assert other.startswith("BatchError: process 1 failed while checking the models and the first")
    assert own.startswith("ValueError: the loader gave no batch")


def test_a_save_that_cannot_begin_in_one_process_ends_all(folder):
    """At once: the other does not wait for the folder, which is never made."""
    own, other = errors(folder, "cannot_begin")
    assert "gs4 could not be written (NotADirectoryError" in own
    assert "gs4 could not be written (RuntimeError: process 0 failed; its own error is in" in other
    assert steps_in(folder / "cannot_begin" / "moved") == [2]


def test_a_number_that_is_not_finite_in_one_process_stops_all(folder):
    """With the same error, and the state of before, from which clean data go on to the same bits."""
    first, second = errors(folder, "stopped")
    assert first == second
    for text in (
        "FloatingPointError: the loss is nan at global step 4 (micro-batch 3), batch 4 of epoch 1",
        "unweighted_hard_label_loss = nan",
        "the batch is not finite in student/label",
        "The last good checkpoint is gs3",
    ):
        assert text in first
    assert steps_in(folder / "gone_on" / "out") == [3, 6, 12]
    wanted, found = weights(folder, "sound"), weights(folder, "gone_on")
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def test_a_window_that_is_not_finite_in_one_process_is_dropped_in_all(folder, tmp_path):
    data = nonfinite.batches(6)
    data[nonfinite.ORDER[two_processes.NOT_FINITE]]["student"]["label"][-1] = np.nan
    options = {"gradient_accumulation_steps": 2, "max_nonfinite_steps": 2}
    distiller, error = nonfinite.train(tmp_path, data, **options)
    assert error is None
    assert_close(weights(folder, "dropped"), two_processes.weights(distiller.model_S))


def test_a_signal_to_one_process_stops_all(folder):
    """After the same step, which is saved; each ends by the signal, and the run goes on from there."""
    for rank in range(2):
        said = json.loads((folder / f"asked-{rank}.json").read_text())
        assert said == {"error": None, "code": 143, "heard": 1}
    assert steps_in(folder / "went_on" / "out") == [2, 4]
    wanted, found = weights(folder, "even"), weights(folder, "went_on")
    for key, value in wanted.items():
        np.testing.assert_array_equal(found[key], value, err_msg=key)
    curves = [read_scalars(folder / name / "log") for name in ("even", "went_on")]
    assert curves[0] == curves[1]


def test_a_batch_smaller_than_the_mesh(folder):
    for error in errors(folder, "too_small"):
        assert "the first batch has 1 rows for 2 devices" in error
