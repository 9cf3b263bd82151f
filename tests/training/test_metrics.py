"""Tensorboard files: what is written, when it can be seen, and what happens when it cannot be."""

import gc
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from tensorboardX import SummaryWriter

from jaxbrewer.training import metrics
from jaxbrewer.training.event_files import EventWriter, Tensorboard, read_scalars
from jaxbrewer.training.metrics import MetricsWriter

from .. import fn_job


@pytest.fixture
def writer(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    yield writer
    writer.close()


def values(step):
    return np.array([step, step / 2], np.float32)


def test_every_point_is_in_the_file_after_a_flush(tmp_path, writer):
    points = MetricsWriter([Tensorboard(writer)])
    count = 2 * metrics.TOGETHER + 3
    for step in range(count):
        points.write(step, ("a", "b"), values(step))
    points.flush()
    expected = {"a": dict(zip(range(count), np.arange(count), strict=True))}
    expected["b"] = {step: value / 2 for step, value in expected["a"].items()}
    assert read_scalars(tmp_path) == expected
    points.write(count, ("a",), values(7)[:1])
    points.close()
    assert read_scalars(tmp_path)["a"][count] == 7


def test_the_users_own_points_are_in_the_same_file(tmp_path, writer):
    points = MetricsWriter([Tensorboard(writer)])
    writer.add_scalar("mine", 3.0, 0)
    points.write(0, ("a", "b"), values(1))
    points.close()
    writer.add_scalar("mine", 4.0, 1)
    writer.close()
    assert read_scalars(tmp_path) == {"a": {0: 1}, "b": {0: 0.5}, "mine": {0: 3, 1: 4}}
    assert len(list(tmp_path.iterdir())) == 1


def test_a_slow_run_is_seen_while_it_runs(tmp_path, writer, monkeypatch):
    monkeypatch.setattr(metrics, "LATEST", -1.0)
    monkeypatch.setattr(metrics, "FLUSH_EVERY", -1.0)
    points = MetricsWriter([Tensorboard(writer)])
    points.write(0, ("a",), values(1)[:1])
    points._writing.result()
    assert read_scalars(tmp_path) == {"a": {0: 1}}
    points.close()


@pytest.mark.parametrize("closes", [True, False])
def test_a_disk_that_fails_is_an_error(writer, monkeypatch, closes):
    def fail(event):
        raise OSError("no space left on the device")

    monkeypatch.setattr(writer.file_writer.event_writer._ev_writer, "write_event", fail)
    points = MetricsWriter([Tensorboard(writer)])
    with pytest.raises(OSError, match="no space left"):
        for step in range(1 if closes else 2 * metrics.TOGETHER):
            points.write(step, ("a",), values(step)[:1])
        points.close()
    if not closes:
        with pytest.raises(OSError, match="no space left"):
            points.close()
    assert points._thread._shutdown


def test_without_a_writer_nothing_happens():
    points = MetricsWriter()
    points.write(0, ("a",), values(0))
    points.close()


def test_writers_of_one_second_do_not_write_over_each_other(tmp_path):
    for step in range(3):
        writer = EventWriter(str(tmp_path))
        writer.add_scalar("a", step, step)
        writer.close()
    writer.add_scalar("a", 3, 3)  # opens another file
    writer.close()
    assert read_scalars(tmp_path) == {"a": {step: step for step in range(4)}}
    assert len(list(tmp_path.iterdir())) == 4


def open_now():
    """The threads, and the number of open files."""
    gc.collect()
    return {t.name for t in threading.enumerate()}, len(os.listdir("/proc/self/fd"))


@pytest.mark.skipif(sys.platform != "linux", reason="open files are listed on Linux only")
def test_trainings_leave_no_thread_and_no_open_file(tmp_path):
    def train():
        distiller = fn_job.distiller(tmp_path, log_dir=tmp_path / "log")
        with distiller:
            distiller.train(fn_job.SGD, fn_job.batches(2), num_epochs=1)
        return distiller

    train()  # what JAX opens once
    threads, files = open_now()
    kept = [train() for _ in range(5)]  # distillers that are kept keep nothing open
    deadline = time.time() + 10  # a queue's own thread ends a moment after it was closed
    while time.time() < deadline and (open_now()[0] - threads or open_now()[1] > files):
        time.sleep(0.05)
    left, open_files = open_now()
    assert left <= threads
    assert open_files <= files
    assert len(kept) == 5


def test_the_distillers_writer_is_there_for_its_user_at_any_time(tmp_path):
    distiller = fn_job.distiller(tmp_path, log_dir=tmp_path / "log")
    seen = []

    def callback(model, step):
        seen.append(distiller.tb_writer)
        distiller.tb_writer.add_scalar("callback", step, step)
        if len(seen) == 2:
            distiller.tb_writer.close()  # the training goes on

    def train():
        with distiller:
            distiller.train(fn_job.SGD, fn_job.batches(2), num_epochs=2, callback=callback)

    train()
    assert len(set(seen)) == 1
    seen[0].add_scalar("kept", 1.0, 0)
    seen[0].close()
    own = distiller.tb_writer
    assert own is not seen[0]
    own.add_scalar("after", 2.0, 0)
    train()
    assert seen[-1] is own is distiller.tb_writer  # opened outside, so left open
    own.add_scalar("after", 3.0, 1)
    own.close()
    read = read_scalars(tmp_path / "log")
    assert read["callback"] == {2: 2, 4: 4}
    assert (read["kept"], read["after"]) == ({0: 1}, {0: 2, 1: 3})
    assert list(read["scalar/total_loss"]) == [0, 1, 2, 3]


LEFT_OPEN = """
import sys, numpy as np
from jaxbrewer.training.event_files import EventWriter, Tensorboard
from jaxbrewer.training.metrics import MetricsWriter
points = MetricsWriter([Tensorboard(EventWriter(sys.argv[1]))])
points.write(0, ("a",), np.float32([3]))
points.close()
"""


def test_a_writer_left_open_ends_in_silence(tmp_path):
    """Python 3.12 and later start no thread at exit, and said so in a traceback."""
    run = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN, tmp_path], capture_output=True, text=True, check=False
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    assert read_scalars(tmp_path) == {"a": {0: 3}}
