"""``jaxbrewer init``, ``train``, ``check`` and ``predict`` at the command line."""

import json
import os
import signal
import subprocess
import sys

import pytest

from jaxbrewer.__main__ import main, split_settings
from jaxbrewer.commands import CommandError
from tests.recipes import files


@pytest.fixture
def path(tmp_path):
    recipe = files.recipe(tmp_path, "sequence-classification")
    (tmp_path / "r.json").write_text(json.dumps(recipe))
    return str(tmp_path / "r.json")


def test_fields_are_told_from_other_arguments():
    given, settings = split_settings(
        [
            "train",
            "r",
            "--resume",
            "--num_steps",
            "3",
            "--data.text=a b",
            "--training.resume",
            "true",
        ]
    )
    assert given == ["train", "r", "--resume"]
    assert settings == [("num_steps", 3), ("data.text", "a b"), ("training.resume", True)]
    assert split_settings(["check", "a", "b", "--task", "none"])[1] == []
    assert split_settings(["check", "r.toml", "--teacher", "t"])[1] == [("teacher", "t")]
    with pytest.raises(CommandError, match=r"--data\.text needs a value"):
        split_settings(["train", "r", "--data.text"])


def test_a_recipe_is_written_checked_trained_and_used(path, tmp_path, capsys, monkeypatch):
    assert main(["check", path, "--num_epochs", "2", "--training.device", "cuda"]) == 0
    told = capsys.readouterr().out
    assert "classes: 0 'bad', 1 'good'" in told and "\nwarning: device 'cuda'" in told
    assert main(["check", path]) == 0
    told = capsys.readouterr().out
    assert "nothing wrong was found" in told and "20 examples in 2 batches of 10" in told
    assert "1 in 2 optimizer steps: at step 2" in told and not (tmp_path / "out").exists()
    assert main(["train", path, "--max-examples", "20", "--num_epochs", "2"]) == 0
    told = capsys.readouterr()
    assert "teacher  accuracy" in told.out and "out/student: the student, after" in told.out
    assert "Saving at global step" in told.err and "Training steps: 4" in told.err
    student = str(tmp_path / "out" / "student")
    assert main(["predict", student, str(tmp_path / "dev.tsv")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10 and {json.loads(line)["label"] for line in lines} <= {"bad", "good"}
    out = str(tmp_path / "said.jsonl")
    assert (
        main(["predict", student, str(tmp_path / "dev.tsv"), "--out", out, "--text", "text"]) == 0
    )
    assert "said.jsonl: 10 rows" in capsys.readouterr().out
    assert len((tmp_path / "said.jsonl").read_text().splitlines()) == 10
    monkeypatch.chdir(tmp_path)
    assert main(["init", "token-classification"]) == 0
    assert "fill in the folders and files" in capsys.readouterr().out
    assert main(["init", "token-classification", "--teacher"]) == 0
    assert capsys.readouterr().out.startswith("teacher.toml: fill in")
    assert main(["init", "token-classification"]) == 2
    assert "recipe.toml is there already" in capsys.readouterr().err


def test_exit_codes_tell_what_went_wrong(path, tmp_path, capsys):
    expected = {
        ("train", path, "--num_steps", "1"): (1, "expected one of num_epochs and num_steps"),
        ("train", path, "--data.label", "text"): (1, "is no class"),
        ("train", str(tmp_path / "no.toml")): (2, "there is no such file"),
        ("train", path, "--optimizer.learning_rate", "1e30"): (3, "The last good checkpoint is"),
        ("check", path, "--batch-size", "3"): (2, "--data.batch_size 16"),
        ("check", path, "x", "--data.text", "y"): (2, "check takes a recipe"),
        ("check", path, "x"): (2, "two configs need --teacher and --student"),
        ("inspect", path, "--data.text", "y"): (2, "is of train and check"),
        ("predict", str(tmp_path), path): (1, "config.json"),
        ("predict", str(tmp_path / "teacher"), str(tmp_path / "no.tsv")): (2, "no such file"),
    }
    for command, (code, words) in expected.items():
        assert main(command) == code, command
        assert words in capsys.readouterr().err


def test_who_has_read_enough_is_not_shown_a_traceback(tmp_path):
    (tmp_path / "config.json").write_text('{"ckpt_frequency": 2}')
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-m", "jaxbrewer", "port", str(tmp_path / "config.json")]
    done = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, check=False)
    os.close(writes)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")
