"""Every benchmark runs, at sizes that say nothing of speed, and writes what it should."""

import json
import math
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script's ``main`` in this process; returns its rows, with all else it saved."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))

    def run(name, *arguments):
        given = [f"{name}.py", "--smoke", "--out", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", given)
        __import__(name).main()
        assert "|--" in capsys.readouterr().out
        return json.loads((tmp_path / f"{name}.json").read_text())

    return run


def test_overhead(run):
    rows = run("overhead")["rows"]
    assert [(row["work"], row["log_dir"]) for row in rows] == [
        ("tiny", "none"),
        ("tiny", "tensorboard"),
        ("BERT-base → T3", "none"),
    ]
    assert all(
        math.isclose(row["train ms"], row["bare ms"] + row["overhead µs"] / 1e3, rel_tol=2)
        for row in rows
    )


def test_cache(run):
    rows = run("cache")["rows"]
    assert [row["cache"] for row in rows] == ["none", "memory float16", "disk float32"]
    plain, memory, disk = rows
    assert plain["MiB a batch"] == 0
    positions = 2 * 8 * 16  # batch, length and width; one hidden layer is matched
    assert memory["MiB a batch"] * 2**20 == 2 * (positions + 2 * 2)
    assert disk["MiB a batch"] * 2**20 > 4 * positions


def test_buckets(run):
    found = run("buckets")
    assert [row["program"] for row in found["rows"]] == [
        "jaxbrewer, buckets", "jaxbrewer", "TextBrewer"
    ]  # fmt: skip
    assert 1 < len(found["shapes"]) <= 3


def test_compile(run):
    found = run("compile")
    assert [row["cache"] for row in found["rows"]] == ["cold", "warm"]
    assert found["same_losses"]
    assert found["ratios"][0] > 1


def test_scaling(run):
    rows = run("scaling", "--grow", "batch", "tasks", "pmap")["rows"]
    assert [(row["grows"], row["to"]) for row in rows] == [
        ("batch", 2), ("batch", 4), ("tasks", 1), ("tasks", 2), ("pmap", 1), ("pmap", 2)
    ]  # fmt: skip
    assert [row["compiled"] for row in rows] == [1, 1, 1, 2, 1, 1]
    assert rows[-1]["loss gap"] < 1e-5
