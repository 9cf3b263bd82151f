"""Tensorboard files: what is written, when it can be seen, and what happens when it cannot be."""

import subprocess
import sys

import numpy as np
import pytest
from tensorboardX import SummaryWriter

from jaxbrewer import metrics
from jaxbrewer.metrics import MetricsWriter, read_scalars


@pytest.fixture
def writer(tmp_path):
    writer = SummaryWriter(str(tmp_path))
    yield writer
    writer.close()


def values(step):
    return np.array([step, step / 2], np.float32)


def test_every_point_is_in_the_file_after_a_flush(tmp_path, writer):
    points = MetricsWriter(writer)
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
    points = MetricsWriter(writer)
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
    points = MetricsWriter(writer)
    points.write(0, ("a",), values(1)[:1])
    points._writing.result()
    assert read_scalars(tmp_path) == {"a": {0: 1}}
    points.close()


@pytest.mark.parametrize("closes", [True, False])
def test_a_disk_that_fails_is_an_error(writer, monkeypatch, closes):
    def fail(event):
        raise OSError("no space left on the device")

    monkeypatch.setattr(writer.file_writer.event_writer._ev_writer, "write_event", fail)
    points = MetricsWriter(writer)
    with pytest.raises(OSError, match="no space left"):
        for step in range(1 if closes else 2 * metrics.TOGETHER):
            points.write(step, ("a",), values(step)[:1])
        points.close()
    if not closes:
        with pytest.raises(OSError, match="no space left"):
            points.close()
    assert points._thread._shutdown


def test_without_a_writer_nothing_happens():
    points = MetricsWriter(None)
    points.write(0, ("a",), values(0))
    points.close()


LEFT_OPEN = """
import sys, numpy as np
from jaxbrewer.metrics import MetricsWriter, open_writer
points = MetricsWriter(open_writer(sys.argv[1]))
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
