"""Saves that fail, and two runs on one folder: what is told, and that nothing older is lost."""

import errno
import json
import logging
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxbrewer.data.batches import own
from jaxbrewer.errors import CacheError, CheckpointError
from jaxbrewer.preflight import prepare
from jaxbrewer.training.checkpoints import Checkpoints
from jaxbrewer.training.folders import steps_in
from jaxbrewer.training.lock import RunLock
from tests import fn_job

ROOT = Path(__file__).parents[2]


def run(folder, callback=None, epochs=3, **options):
    distiller = fn_job.distiller(folder, **options)
    with distiller:
        distiller.train(fn_job.SGD, fn_job.batches(2), num_epochs=epochs, callback=callback)
    return np.ravel(distiller.model_S.params["embed"])


@pytest.fixture(scope="module")
def wanted(tmp_path_factory):
    return run(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def full_disk():
    """Lets no file grow beyond some bytes, as a disk that has no more room."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("max_to_keep", [None, 1])
def test_a_full_disk_is_told_and_costs_nothing(tmp_path, full_disk, wanted, max_to_keep):
    """Path and room are named; with room again the run goes on to the same bits."""

    out = tmp_path / "out"

    def callback(model, step):
        while steps_in(out) != [2]:
            time.sleep(0.01)
        full_disk(50)

    with pytest.raises(
        CheckpointError, match=r"gs4 could not be written .* MB are free in"
    ) as told:
        run(tmp_path, callback, max_to_keep=max_to_keep)
    full_disk(resource.RLIM_INFINITY)
    assert "the newest is gs2" in str(told.value)
    assert steps_in(out) == [2]
    found = run(tmp_path, resume=True, max_to_keep=max_to_keep)
    np.testing.assert_array_equal(found, wanted)
    # What Orbax still wrote when all was cleared away is gone too.
    assert sorted(p.name for p in out.iterdir()) == (
        ["gs6"] if max_to_keep else ["gs2", "gs4", "gs6"]
    )


@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of 160 KB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=160k", "none", str(folder)]
    if not shutil.which("mount") or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("no right to mount a disk")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_full_indeed(tiny_disk, wanted):
    with pytest.raises(
        CheckpointError, match=r"gs\d could not be written .* MB are free in"
    ) as told:
        run(tiny_disk)
    assert "RESOURCE_EXHAUSTED" in str(told.value) or "No space left" in str(told.value)
    kept = steps_in(tiny_disk / "out")
    assert not list(tiny_disk.glob("out/*tmp*"))
    subprocess.run(["mount", "-o", "remount,size=4m", str(tiny_disk)], check=True)
    np.testing.assert_array_equal(run(tiny_disk, resume=True), wanted)
    assert steps_in(tiny_disk / "out") == [2, 4, 6]
    assert set(kept) < {2, 4, 6}


def fail_at(step, monkeypatch, error):
    """Lets the save of a step fail in the background."""
    finalize = ocp.CompositeCheckpointHandler.finalize

    def fails(self, directory):
        if f"gs{step}." in str(directory):
            raise error
        finalize(self, directory)

    monkeypatch.setattr(ocp.CompositeCheckpointHandler, "finalize", fails)


def test_a_save_that_fails_ends_the_run_at_a_step_soon(tmp_path, monkeypatch):
    """Not at the next save, nor at the end: many steps would be lost."""
    drawn = []

    class Slow(list):
        def __iter__(self):
            for batch in super().__iter__():
                drawn.append(1)
                time.sleep(0.02)
                yield batch

    fail_at(2, monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    distiller = fn_job.distiller(tmp_path, ckpt_steps=2)
    with distiller, pytest.raises(CheckpointError, match=r"gs2 could not .*No space left"):
        distiller.train(fn_job.SGD, Slow(fn_job.batches(3)), num_steps=400)
    assert len(drawn) < 200
    assert steps_in(tmp_path / "out") == []


def test_a_failure_stays(tmp_path, monkeypatch):
    """Orbax raises it once: whoever went on would wait in its next save for processes that left."""
    fail_at(2, monkeypatch, OSError(errno.ENOSPC, "No space left on device"))
    checkpoints = Checkpoints(tmp_path / "out", resume=False, max_to_keep=None)
    with fn_job.distiller(tmp_path / "job") as distiller:
        program = prepare(distiller.job(), {"": own(fn_job.batches(1)[0])}, fn_job.SGD).programs[""]
    state = program.init(0)
    checkpoints.save(2, state, {})
    told = []
    for act in (checkpoints.wait, checkpoints.check, lambda: checkpoints.save(4, state, {}),
                checkpoints.wait, checkpoints.close):  # fmt: skip
        with pytest.raises(CheckpointError, match="gs2 could not be written") as caught:
            act()
        told.append(caught.value)
    assert all(error is told[0] for error in told)
    assert not list((tmp_path / "out").iterdir())


def test_a_save_that_does_not_even_start(tmp_path, monkeypatch, wanted):
    def save(self, path, **args):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    with monkeypatch.context() as broken:
        broken.setattr(ocp.AsyncCheckpointer, "save", save)
        with pytest.raises(CheckpointError, match=r"gs2 could not .*quota.*there is none yet"):
            run(tmp_path)
    np.testing.assert_array_equal(run(tmp_path, resume=True), wanted)


def test_scores_and_caches_on_a_full_disk(tmp_path, monkeypatch):
    import jaxbrewer
    from jaxbrewer.training import folders, teacher_cache

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(folders, "write_json", full)
    with pytest.raises(CheckpointError, match=r"scores.json could not be written .* MB are free"):
        run(tmp_path, lambda model, step: jaxbrewer.CallbackResult(score=1.0))
    monkeypatch.setattr(teacher_cache, "save_file", full)
    config = {"is_caching_logits": True, "cache_dir": tmp_path / "cache"}
    with pytest.raises(CacheError, match=r"batch-000000.* could not be written .* MB are free"):
        run(tmp_path / "other", config=config)


def test_every_save_and_every_start_is_a_line(tmp_path, caplog):
    caplog.set_level(logging.INFO, "jaxbrewer")
    run(tmp_path, epochs=2)
    for step in (2, 4):
        assert f"gs{step} saved: 0.0 MB in " in caplog.text
    run(tmp_path, resume=True)
    assert "resuming at step 4 of 6, epoch 2, from gs4, verified" in caplog.text


TWO = """
import sys
rank = int(sys.argv[2])
import jax
jax.distributed.initialize(f"localhost:{sys.argv[1]}", 2, rank)
import pathlib
import orbax.checkpoint as ocp
from tests import fn_job

write = ocp.StandardCheckpointHandler.async_save

class Failing:
    def result(self, timeout=None):
        raise OSError(28, "No space left on device")

async def failing(self, directory, *args, **options):
    done = await write(self, directory, *args, **options)
    return [*done, Failing()] if rank == 1 and "gs2." in str(directory) else done

ocp.StandardCheckpointHandler.async_save = failing
distiller = fn_job.distiller(pathlib.Path(sys.argv[3]), local_rank=rank, ckpt_steps=2)
with distiller:
    distiller.train(fn_job.SGD, fn_job.batches(2, size=2), num_steps=int(sys.argv[4]))
"""


@pytest.mark.parametrize("steps", [2, 200])
def test_a_save_that_fails_in_one_process_ends_all(tmp_path, steps):
    """In the middle or at the end: none waits for the other."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "NPROC": "4", "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(port), str(rank), str(tmp_path), str(steps)],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment, cwd=ROOT,
        )
        for rank in range(2)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=150)[0] for process in started]
    finally:
        for process in started:
            process.kill()
            process.communicate()
    assert [process.returncode for process in started] == [1, 1], "\n\n".join(said)
    assert "gs2 could not be written (OSError: [Errno 28] No space left on device)" in said[1]
    assert "process 1 failed" in said[0]
    assert steps_in(tmp_path / "out") == []


# ------------------------------------------------------------------------------ one run a folder


def test_a_second_run_is_refused_and_disturbs_nothing(tmp_path, wanted):
    told = []

    def callback(model, step):
        with pytest.raises(CheckpointError, match="is in use by another run: process") as refused:
            run(tmp_path)
        told.append(str(refused.value))

    np.testing.assert_array_equal(run(tmp_path, callback), wanted)
    assert len(told) == 3
    for text in (
        f"process {os.getpid()} on {socket.gethostname()}, started 2",
        "another output_dir",
    ):
        assert all(text in each for each in told)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["gs2", "gs4", "gs6"]


HOLDER = """
import os, sys, time
from jaxbrewer.training.lock import RunLock
lock = RunLock(sys.argv[1])
lock.take()
if len(sys.argv) > 2 and not os.fork():  # a worker that outlives its parent
    print("worker", os.getpid(), flush=True)
    time.sleep(60)
time.sleep(0.1)
print("holds", os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("with_worker", [False, True])
def test_a_lock_does_not_outlive_its_run(tmp_path, with_worker):
    """Killed, it leaves a file that says who it was, and no lock."""
    command = [sys.executable, "-c", HOLDER, str(tmp_path), *["worker"] * with_worker]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    holder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    said = dict(holder.stdout.readline().split() for _ in range(1 + with_worker))
    try:
        with pytest.raises(CheckpointError, match=f"process {holder.pid} on"):
            RunLock(tmp_path).take()
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == holder.pid
        lock = RunLock(tmp_path)
        lock.take()
        lock.release()
        assert not list(tmp_path.iterdir())
    finally:
        holder.stdout.close()
        for pid in said.values():
            if int(pid) != holder.pid:
                os.kill(int(pid), signal.SIGKILL)


def test_a_file_system_without_locks_is_a_warning(tmp_path, monkeypatch, caplog):
    from jaxbrewer.training import lock

    def flock(file, how):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", flock)
    run(tmp_path, epochs=1)
    assert caplog.text.count("cannot be locked ([Errno 95] Operation not supported)") == 1
    assert steps_in(tmp_path / "out") == [2]
