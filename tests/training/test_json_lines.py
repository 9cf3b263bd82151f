"""`metrics.jsonl`: what is in it, and what stands in it once a run goes on."""

import json
import logging
import sys
import time

import numpy as np
import pytest

from jaxbrewer.training.json_lines import JsonLines
from jaxbrewer.training.metrics import MetricsWriter
from jaxbrewer.training.writers import Point

from .. import fn_job

LOSS = ("scalar/total_loss",)


def point(step, *values, tags=LOSS):
    return Point(1.5, step, tags, np.array(values or (step / 2,), np.float32))


def lines(folder, name="metrics.jsonl"):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def steps(folder, name="metrics.jsonl"):
    return [line["step"] for line in lines(folder, name)]


def write(folder, *points):
    written = JsonLines(folder, is_new=True)
    written.write(points)
    written.close()


def go_on(folder, step, *points, tags=LOSS):
    written = JsonLines(folder, is_new=False)
    written.go_on("gs1", step, set(tags))
    written.write(points)
    written.close()


def test_a_training_writes_a_line_for_every_micro_batch(tmp_path):
    began = time.time()
    distiller = fn_job.distiller(tmp_path, keys=("logits", "losses"), log_dir=tmp_path / "log")
    seen = []

    def callback(model, step):
        """What lies before a checkpoint is in the file when it is."""
        seen.append((step, steps(tmp_path / "log")))

    with distiller:
        distiller.train(fn_job.SGD, fn_job.batches(2), num_epochs=2, callback=callback)
    assert seen == [(2, [0, 1]), (4, [0, 1, 2, 3])]
    for line in lines(tmp_path / "log"):
        assert list(line)[:3] == ["step", "time", *LOSS]
        assert len(line) > 4  # terms
        assert all(np.isfinite(value) for value in line.values())
        assert began - 1 < line["time"] < time.time() + 1


def test_a_line_holds_all_of_a_point_and_null_for_what_is_not_finite(tmp_path):
    write(tmp_path, point(3, 0.1, np.nan, -np.inf, tags=("a", "b", "c")))
    text = (tmp_path / "metrics.jsonl").read_text()
    assert text == '{"step": 3, "time": 1.5, "a": 0.10000000149011612, "b": null, "c": null}\n'


def test_what_was_written_is_there_without_a_close(tmp_path):
    written = JsonLines(tmp_path / "new" / "folder", is_new=True)
    written.write([point(0), point(1)])
    assert steps(tmp_path / "new" / "folder") == [0, 1]
    written.close()


def test_a_new_run_moves_the_file_of_an_earlier_one(tmp_path):
    for first in (0, 10, 20):
        write(tmp_path, point(first), point(first + 1))
    assert steps(tmp_path) == [20, 21]
    assert steps(tmp_path, "metrics-1.jsonl") == [0, 1]
    assert steps(tmp_path, "metrics-2.jsonl") == [10, 11]
    assert len(list(tmp_path.iterdir())) == 3


def test_what_comes_after_the_checkpoint_goes(tmp_path):
    write(tmp_path, *map(point, range(6)))
    go_on(tmp_path, 4, point(4, 9.0), point(5, 9.5))
    assert [line[LOSS[0]] for line in lines(tmp_path)] == [0, 0.5, 1, 1.5, 9, 9.5]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_run_goes_on_without_a_file_of_before(tmp_path):
    go_on(tmp_path, 4, point(4))
    assert steps(tmp_path) == [4]


def test_an_evaluation_that_is_made_anew_goes(tmp_path):
    accuracy = ("eval/accuracy",)
    write(tmp_path, point(0), point(0, tags=accuracy), point(1), point(1, tags=accuracy))
    go_on(tmp_path, 2, tags=(*LOSS, *accuracy))
    assert steps(tmp_path) == [0, 0, 1, 1]
    go_on(tmp_path, 2)
    assert [(line["step"], *list(line)[2:]) for line in lines(tmp_path)] == [
        (0, *LOSS),
        (0, *accuracy),
        (1, *LOSS),
    ]


@pytest.mark.parametrize("cut", ['{"step": 2, "ti', "", "\0\0\0"])
def test_an_unfinished_last_line_is_no_obstacle(cut, tmp_path, caplog):
    write(tmp_path, point(0), point(1))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write(cut)
    go_on(tmp_path, 2, point(2))
    assert steps(tmp_path) == [0, 1, 2]
    assert not caplog.text


def test_damaged_lines_are_told(tmp_path, caplog):
    write(tmp_path, point(0), point(1))
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(
            b'\xff\n[1]\n{"stop": 3}\n{"step": 2, "scalar/total_loss": 1}'
        )  # all but its end
    with caplog.at_level(logging.WARNING, "jaxbrewer"):
        go_on(tmp_path, 3, point(3))
    assert steps(tmp_path) == [0, 1, 2, 3]
    assert "metrics.jsonl: 3 damaged lines are left out" in caplog.text


@pytest.mark.skipif(sys.platform != "linux", reason="/dev/full is there on Linux only")
def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    points = MetricsWriter([JsonLines(tmp_path, is_new=False)])
    points.write(0, LOSS, np.float32([1]))
    with pytest.raises(OSError, match=r"No space left on device: '.*metrics\.jsonl'"):
        points.flush()
    with pytest.raises(OSError, match="No space left on device"):
        points.close()
    assert points._thread._shutdown
