"""Every benchmark runs, at sizes that say nothing of speed, and writes what it should."""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxbrewer.objective.loss import Weights
from jaxbrewer.preflight import prepare

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
    rows = run("overhead", "--only", "tiny")["rows"]
    assert [(row["work"], row["log_dir"]) for row in rows] == [
        ("tiny", "none"),
        ("tiny", "tensorboard"),
    ]
    assert rows[1]["loss gap"] < 1e-5
    assert rows[0]["loss gap"] is None


@pytest.mark.torch
def test_exported(run):
    rows = run("exported")["rows"]
    assert [row["by"] for row in rows] == [
        "transformers",
        "onnxruntime",
        "StableHLO",
        "jaxbrewer.predict",
    ]
    assert {row["same labels"] for row in rows} == {1.0}
    assert {row["rows"] for row in rows} == {20}


def test_the_bert_by_hand_has_the_same_objective(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import bare
    import turns
    import workloads

    work = workloads.without_dropout(turns.tiny_bert())
    job = turns.bert_job(work)
    batch = workloads.make_batch(job.vocab_size, 2, 8, np.array([3, 8]))
    by_hand = bare.bert(work, [batch])
    expected = jax.jit(by_hand.objective)(*by_hand.arguments, jax.random.key(0), batch)
    distiller = job.distiller(output_dir=tmp_path / "out", device="cpu")
    with distiller:
        programs = prepare(distiller.job(), {"": batch}, workloads.jax_optimizer()).programs

    def loss(program, params, state, teacher):
        results_T = program.teacher(teacher, batch, None)
        weights = Weights(kd=1.0, hard_label=workloads.HARD_LABEL_WEIGHT)
        return program.loss(params, state, jax.random.key(0), batch, results_T, weights)[0]

    program = programs[""]
    got = jax.jit(functools.partial(loss, program))(*program.variables, program.teacher.variables)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_cache(run):
    rows = run("cache")["rows"]
    assert [row["cache"] for row in rows] == ["none", "memory float16", "disk float32"]
    plain, memory, disk = rows
    assert plain["MiB a batch"] == 0
    positions = 2 * 8 * 8  # batch, length and width; one hidden layer is matched
    assert memory["MiB a batch"] * 2**20 == 2 * (positions + 2 * 2)
    assert disk["MiB a batch"] * 2**20 > 4 * positions


@pytest.mark.torch
def test_buckets(run):
    found = run("buckets")
    assert [row["program"] for row in found["rows"]] == [
        "jaxbrewer, buckets", "jaxbrewer", "TextBrewer"
    ]  # fmt: skip
    assert [rows for rows, _ in found["shapes"]] == [3, 4]


def test_compile(run):
    found = run("compile")
    assert [row["cache"] for row in found["rows"]] == ["cold", "warm"]
    assert found["same_losses"]
    assert found["ratios"][0] > 1


def test_scaling(run):
    rows = run("scaling", "--grow", "matches", "pmap")["rows"]
    assert [(row["grows"], row["to"]) for row in rows] == [
        ("matches", 0), ("matches", 1), ("pmap", 1), ("pmap", 2)
    ]  # fmt: skip
    assert [row["compiled"] for row in rows] == [1, 1, 1, 1]
    assert rows[-1]["loss gap"] < 1e-5


def test_loading(run):
    rows = run("loading")["rows"]
    assert [row["loader"] for row in rows] == [
        "ready", "waiting", "computing", "waiting, threaded"
    ]  # fmt: skip
    assert rows[2]["ms"] > 0.5  # what its loader computes for


def test_described(run):
    """Rows that are there are kept; of one device, no sharding is asked for."""
    asked = ["--works", "large", "--levels", "O2", "--shardings", "all"]
    (one,) = run("described", *asked, "--on", "cpu:1")["rows"]
    assert one["sharding"] == "none" and one["sends"] == {} and one["fits"]
    assert one["peak GiB"] > one["held GiB"] > one["updated in place GiB"] > 0
    kept, cut = run("described", *asked, "--on", "cpu:1", "cpu:2", "--add")["rows"]
    assert kept == one
    assert cut["sharding"] == "all" and cut["held GiB"] < 0.6 * one["held GiB"]
    assert cut["sends"]["all-gather"][1] > 0


def test_durability(run):
    """The guard is in one step and not in the other; both kinds of saves were made."""
    guard, digests = run("durability")["rows"]
    assert guard["bytes %"] > 0
    assert digests["digests ms"] > 0
    assert digests["state MB"] > 0


def test_attention(run):
    (row,) = run("attention")["rows"]
    assert row["loss gap"] == 0
    assert row["cudnn ms"] > 0


def test_same_bits(run):
    rows = run("same_bits")["rows"]
    assert [(row["what"], row["level"]) for row in rows] == [
        ("agree", "O0"), ("repeat", "O2"), ("resume", "O2")
    ]  # fmt: skip
    assert rows[0]["largest relative gap"] == 0
    assert [row["differ"] for row in rows[1:]] == [0, 0]
    assert all(row["arrays"] > 20 for row in rows[1:])


def test_all_of_a_gpu(tmp_path, monkeypatch, capsys):
    """A part that is done, one that fails, and one for which no time is left."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    parts = {
        "attention": gpu.PARTS["attention"],
        "broken": ["attention.py", "--no-such-flag"],
        "late": ["attention.py"],
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    left = iter([600.0, 600.0, 1.0])
    monkeypatch.setattr(gpu, "time_left", lambda args, start: next(left))
    given = [
        "gpu.py",
        "--smoke",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--wheels",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", given)
    assert gpu.main() == 1
    told = json.loads((tmp_path / "parts.json").read_text())
    assert [(part["part"], part["ended"]) for part in told] == [
        ("attention", "done"),
        ("broken", "failed with code 2, see broken.log"),
        ("late", "not started: no time left"),
    ]
    assert json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert "| student" in capsys.readouterr().out


def test_the_parts_of_a_gpu_name_scripts_and_flags_that_there_are(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    for script, *given in gpu.PARTS.values():
        monkeypatch.setattr(sys, "argv", [script, *given, "--help"])
        with pytest.raises(SystemExit) as ended:
            __import__(script.removesuffix(".py")).main()
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert all(flag in text for flag in given if flag.startswith("--"))
