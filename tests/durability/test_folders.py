"""Hostile folders, checkpoints and files: every error names file and field, and none is raw."""

import json
import re
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

import jaxbrewer
from jaxbrewer import zoo
from jaxbrewer.errors import CheckpointError
from jaxbrewer.files import MOST_JSON, UnreadableFileError, read_json
from jaxbrewer.training.position import read_position
from jaxbrewer.zoo.folders import INDEX, WEIGHTS, find_tensors

from . import hostile
from .hostile import HOSTILE, SHOWN, exit_code, verdict

pytestmark = pytest.mark.torch

FORMATS = Path(__file__).parent.parent / "formats" / "1"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good") / "model"
    hostile.write_good(folder)
    return folder


def test_the_good_folder_is_read(good):
    assert verdict(good, ()) == ("silent", "")
    assert exit_code("inspect", good)[0] == 0


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_folder_is_refused_by_name(kind, seed, good, tmp_path):
    folder = tmp_path / "model"
    names = hostile.spoil(kind, seed, good, folder)
    result, message = verdict(folder, names)
    assert result == "named", message
    code, printed = exit_code("inspect", folder)
    assert code in ((0, 1, 2) if kind in SHOWN else (1, 2)), printed
    assert not (tmp_path / "harm").exists()


COMMANDED = [
    "layers without end",
    "layer_norm_eps that is none",
    "a config of another type",
    "id2label that is none",
    "an index that leaves the folder",
    "sizes far beyond the file",
]


@pytest.mark.parametrize("kind", COMMANDED)
def test_the_other_commands_refuse_it_too(kind, good, tmp_path):
    folder = tmp_path / "model"
    hostile.spoil(kind, 0, good, folder)
    for name in ("train", "distill"):
        (tmp_path / f"{name}.json").write_text("{}")
    torch.save({"a": torch.ones(2)}, tmp_path / "student.pkl")
    models = ("--teacher", folder, "--student", folder)
    code, printed = exit_code("check", tmp_path / "train.json", tmp_path / "distill.json", *models)
    assert code in (1, 2), printed
    config, out = folder / "config.json", tmp_path / "out"
    code, printed = exit_code(
        "port-weights", tmp_path / "student.pkl", "--config", config, "--out", out
    )
    assert code in (1, 2), printed


def test_the_sizes_of_a_config_alone_are_bounded(good, tmp_path):
    config = json.loads((good / "config.json").read_text())
    for name in ("train", "distill"):
        (tmp_path / f"{name}.json").write_text("{}")
    for field, value in (("num_hidden_layers", 10**7), ("hidden_size", 2**31 - 2)):
        (tmp_path / "large.json").write_text(json.dumps(config | {field: value}))
        code, printed = exit_code(
            "check", tmp_path / "train.json", tmp_path / "distill.json",
            "--teacher", tmp_path / "large.json", "--student", good,
        )  # fmt: skip
        assert code == 1
        assert "or fewer" in printed


# ------------------------------------------------------------------------------------- the folder


def test_the_hubs_cache_of_links_is_read(good, tmp_path):
    """There ``snapshots/REVISION`` holds links to ``blobs``, beside it."""
    snapshot, blobs = tmp_path / "snapshots" / "abc", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    tensors = load_file(good / WEIGHTS)
    shutil.copy(good / "config.json", blobs / "0")
    (snapshot / "config.json").symlink_to("../../blobs/0")
    halves = [dict(list(tensors.items())[i::2]) for i in range(2)]
    for i, half in enumerate(halves):
        save_file(half, blobs / f"weights{i}")
        (snapshot / f"model-{i}.safetensors").symlink_to(f"../../blobs/weights{i}")
    weight_map = {name: f"model-{i}.safetensors" for i, half in enumerate(halves) for name in half}
    (snapshot / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    ours, theirs = find_tensors(snapshot), find_tensors(good)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    zoo.from_pretrained(snapshot)


def test_a_tensor_in_two_shards_or_in_another_one_is_refused(good, tmp_path):
    tensors = load_file(good / WEIGHTS)
    name = next(iter(tensors))
    save_file(tensors, tmp_path / "a.safetensors")
    save_file({name: tensors[name]}, tmp_path / "b.safetensors")
    names = dict.fromkeys(tensors, "a.safetensors")
    for weight_map, problem in (
        (names | {"more": "b.safetensors"}, f"{name} is in a.safetensors and b.safetensors"),
        (names | {name: "b.safetensors"}, f"says that {name} is in b.safetensors, but it is in a"),
    ):
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(ValueError, match=problem):
            find_tensors(tmp_path)


def test_a_name_too_long_is_told_shortly(good, tmp_path):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": "x" * 5000}}))
    with pytest.raises(ValueError, match="which is no file's name: File name too long") as caught:
        find_tensors(tmp_path)
    assert len(str(caught.value)) < 500


def test_wide_and_half_weights_are_read(good, tmp_path):
    """What is in range is as welcome as before."""
    shutil.copytree(good, tmp_path / "model")
    tensors = load_file(good / WEIGHTS)
    kinds = (np.float64, np.float16, np.float32)
    save_file({k: v.astype(kinds[i % 3]) for i, (k, v) in enumerate(tensors.items())},
              tmp_path / "model" / WEIGHTS)  # fmt: skip
    zoo.from_pretrained(tmp_path / "model")


def test_a_value_beyond_a_narrower_type_is_refused(good, tmp_path):
    shutil.copytree(good, tmp_path / "model")
    hostile.tensors(lambda rng, x: x + np.float32(1e6))(None, tmp_path / "model")
    zoo.from_pretrained(tmp_path / "model")
    with pytest.raises(
        ValueError, match=f"{hostile.TENSOR} holds 1e.06, beyond the range of float16"
    ):
        zoo.from_pretrained(tmp_path / "model", param_dtype=np.float16)


def test_json_is_bounded(tmp_path):
    path = tmp_path / "long.json"
    path.write_text(json.dumps("x" * (MOST_JSON - 2)))
    assert len(read_json(path)) == MOST_JSON - 2
    path.write_text(json.dumps("x" * (MOST_JSON - 1)))
    with pytest.raises(UnreadableFileError, match="longer than 16 MiB"):
        read_json(path)
    assert len(read_json(path, most=2 * MOST_JSON)) == MOST_JSON - 1


def test_nothing_is_unpickled():
    """Only ``port-weights`` reads torch's pickles, by the reader that runs no code."""
    package = Path(jaxbrewer.__file__).parent
    text = {str(p.relative_to(package)): p.read_text() for p in package.rglob("*.py")}
    word = re.compile(
        r"import pickle|from pickle|\bpickle\.load|np\.load\(|torch\.load\(|allow_pickle"
    )
    found = {name: word.findall(source) for name, source in text.items() if word.search(source)}
    assert found == {"commands/weights.py": ["import pickle", "torch.load(", "torch.load("]}
    assert 'torch.load(path, map_location="cpu", weights_only=True)' in text["commands/weights.py"]


# --------------------------------------------------------------------------- a checkpoint's position


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """The newest checkpoint of a run with accumulation."""
    folder = tmp_path_factory.mktemp("formats")
    with tarfile.open(FORMATS / "accumulation.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    found = sorted(folder.rglob("gs*"), key=lambda path: int(path.name[2:]))
    return found[-1]


def spoilt(checkpoint, folder, change):
    """The checkpoint with its position changed, and the change of the text."""
    path = folder / checkpoint.name
    shutil.copytree(checkpoint, path)
    file = path / "position" / "metadata"
    position = json.loads(file.read_text())
    made = change(position)
    file.write_bytes(made if isinstance(made, bytes) else json.dumps(made or position).encode())
    return path


def put(value, *path):
    def change(position):
        inside = position
        for step in path[:-1]:
            inside = inside[step]
        inside[path[-1]] = value

    return change


def without(name):
    return lambda position: {k: v for k, v in position.items() if k != name}


ABSURD = {
    "a step of another folder": (
        put(10**9, "global_step"),
        "global_step is 1000000000 in a folder",
    ),
    "a float": (put(1e9, "global_step"), "global_step is 1000000000.0, expected a whole number"),
    "a negative epoch": (put(-1, "epoch"), "epoch is -1, expected a whole number of 0 or more"),
    "text": (put("3", "batch"), "batch is '3', expected"),
    "a bool": (put(True, "micro_step"), "micro_step is True, expected"),
    "huge": (put(10**30, "micro_step"), "micro_step is 1000.*, expected"),
    "too few micro-batches": (put(1, "micro_step"), "too few"),
    "no step": (without("global_step"), "global_step is not there"),
    "no config": (without("train_config"), "train_config is a NoneType"),
    "a config of another type": (put([], "distill_config"), r"distill_config is \[\]"),
    "accumulation of 0": (put(0, "train_config", "gradient_accumulation_steps"), "steps is 0"),
    "no processes": (put([], "processes"), r"processes is \[\], expected a list"),
    "a process of another type": (put(3, "processes", 0), r"processes\[0\] is 3"),
    "a process's batch": (put(1.5, "processes", 0, "batch"), r"processes\[0\].batch is 1.5"),
    "random numbers": (put([1], "processes", 0, "host_random", "python"), "no state of Python's"),
    "random numbers too": (
        put(9, "processes", 0, "host_random", "numpy", 1),
        "no state of Python's",
    ),
    "loaders": (put([], "processes", 0, "loaders"), r"loaders is \[\], expected an object"),
    "a loader": (put({"": {}}, "processes", 0, "loaders"), r"loaders\[''\]: expected an object"),
    "a list": (lambda position: b"[1]", "its position is a list"),
    "a number": (lambda position: b"1e9", "its position is a float"),
    "not JSON": (lambda position: b"{", "cannot be read"),
    "not UTF-8": (lambda position: b"\xff\xfe", "cannot be read"),
    "nested without end": (lambda position: b"[" * 10**5, "nested without end|cannot be read"),
}


@pytest.mark.parametrize("kind", ABSURD)
def test_an_absurd_position_is_refused(kind, checkpoint, tmp_path):
    change, message = ABSURD[kind]
    path = spoilt(checkpoint, tmp_path, change)
    with pytest.raises(CheckpointError, match=message) as caught:
        read_position(path)
    assert str(path) in str(caught.value)


def test_a_position_is_read_wherever_the_checkpoint_was_copied_to(checkpoint, tmp_path):
    shutil.copytree(checkpoint, tmp_path / "best")
    assert read_position(tmp_path / "best") == read_position(checkpoint)
    code, printed = exit_code("inspect", spoilt(checkpoint, tmp_path, put(10**9, "global_step")))
    assert code == 1
    assert "damaged" in printed
