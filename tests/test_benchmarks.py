"""The benchmarks of whole steps, losses, FLOPs and memory run, and their figures hang together."""

import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script's ``main`` in this process; returns the rows it saved."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def run(name, *arguments):
        given = [f"{name}.py", "--smoke", "--out", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", given)
        __import__(name).main()
        assert "|--" in capsys.readouterr().out
        found = json.loads((tmp_path / f"{name}.json").read_text())
        assert found["machine"]["jax"] and str(tmp_path) not in found["machine"]["command"]
        return found["rows"]

    return run


def counter(folder, broken=False):
    """A program that notes how many steps each turn had; made in another process."""
    if broken:
        raise KeyError("no such program")
    notes = Path(folder) / "notes"

    def run(steps):
        notes.write_text((notes.read_text() if notes.exists() else "") + f"{steps} ")

    return run


def test_programs_in_processes_of_their_own_take_turns(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import harness

    program = harness.Elsewhere(counter, tmp_path)
    timings = harness.take_turns({"it": program}, rounds=2, steps=3, warmup=1, lead=2)
    assert (tmp_path / "notes").read_text() == "1 2 3 2 3 "
    assert len(timings["it"].seconds) == 2
    program.close()
    with pytest.raises(RuntimeError, match=r"(?s)Traceback.*KeyError: 'no such program'"):
        harness.Elsewhere(counter, tmp_path, True).ready()


@pytest.mark.torch
def test_against_textbrewer(run):
    (row,) = run("against_textbrewer", "--students", "T4-tiny", "--rounds", "2")
    for program in ("jaxbrewer", "textbrewer", "torch"):
        assert 0 < row[f"{program} ms_q1"] <= row[f"{program} ms"] <= row[f"{program} ms_q3"]
    assert row["× textbrewer"] > 0


def test_real_tokens(run):
    rows = run("against_textbrewer", "--lengths", "--students", "T3", "--programs", "jaxbrewer")
    assert [row["padded to"] for row in rows] == ["16", "16"]
    for row in rows:
        assert row["real tokens/s"] / row["sentences/s"] == pytest.approx(10.5, abs=1)


def test_the_formula_counts_the_products_of_the_program(run):
    rows = run("roofline", "--students", "T4-tiny")
    assert [row["program / formula"] for row in rows] == pytest.approx([1], rel=0.01)


@pytest.mark.torch
def test_products(run):
    (row,) = run("products")
    assert all(row[f"{name} ms"] > 0 for name in ("jaxbrewer", "torch", "XLA's products"))


@pytest.mark.torch
def test_losses(run):
    rows = run("losses", "--losses", "ce", "nst", "attention_ce")
    assert [(row["loss"], row["length"]) for row in rows] == [
        ("ce", 4), ("ce", 8), ("nst", 4), ("nst", 8), ("attention_ce", 4), ("attention_ce", 8)
    ]  # fmt: skip
    assert all(row["jaxbrewer MB"] > 0 and row["textbrewer MB"] > 0 for row in rows)


def test_memory(run):
    rows = run("memory")
    plain, checkpointed, accumulating, _ = rows
    assert not plain["gradient checkpointing"] and checkpointed["gradient checkpointing"]
    assert accumulating["given MB"] > plain["given MB"]  # a copy of the gradients
    assert all(row["peak MB"] >= row["given MB"] + row["scratch MB"] for row in rows)
