"""Checkpoints and caches that lie here since an earlier day are read as they were meant."""

import functools
import json
import os
import subprocess
import sys
import tarfile
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file

import jaxbrewer
from jaxbrewer.__main__ import main
from jaxbrewer.errors import CheckpointError
from jaxbrewer.training.comparison import record

from . import jobs

HERE = Path(__file__).parent
FORMATS = {"1": jobs.JOBS, "2": jobs.ALL}
KINDS = [f"{format}/{name}" for format, names in FORMATS.items() for name in names]
CACHES = [f"{format}/{name}" for format in FORMATS for name in jobs.CACHES]
BY_SEVERAL = ["pmap", "two_processes"]  # devices
ONE_DEVICE = {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
}


def job_of(kind):
    """The job of a file, ``'1/plain'``."""
    return jobs.ALL[kind.split("/")[1]]


def expected(name):
    """What is known of a file: ``(arrays by name, the rest)``."""
    known = json.loads((HERE / f"{name}.json").read_text())
    arrays = known.pop("arrays")
    return {key: jobs.from_json(value) for key, value in arrays.items()}, known


def part(arrays, prefix):
    """The arrays whose names begin so, without that beginning."""
    return {key.removeprefix(prefix): x for key, x in arrays.items() if key.startswith(prefix)}


def unpack(name, folder):
    """Unpacks a file into a folder of its own there; returns the folder it holds."""
    with tarfile.open(HERE / f"{name}.tar.xz") as archive:
        archive.extractall(folder / name, filter="data")
    (held,) = (folder / name).iterdir()
    return held


def assert_same_bits(found, wanted):
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        assert found[key].dtype == value.dtype, key
        np.testing.assert_array_equal(found[key], value, err_msg=key)


def assert_close(found, wanted):
    """Versions of JAX may round otherwise: not bit for bit."""
    assert found.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(found[key], value, rtol=0, atol=1e-6, err_msg=key)


def make_later(patch):
    """Lets this version be another than the one that wrote the files.

    Then numbers are compared, and not traces, which change with the code.
    """
    versions = record.versions() | {"jaxbrewer": "a later one"}
    patch.setattr(record, "versions", lambda: versions)


@pytest.fixture(scope="module", autouse=True)
def later_and_compiled_quickly():
    """What is compared here does not depend on how well programs are optimized."""
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        make_later(patch)
        yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """Unpacks a file, once, for those who only read it."""
    folder = tmp_path_factory.mktemp("unpacked")

    @functools.cache
    def get(name):
        return unpack(name, folder) / f"gs{job_of(name).stop}"

    return get


def check_student(name, checkpoint):
    model = job_of(name).make(jaxbrewer.TrainingConfig(device="cpu")).model_S
    before = jobs.arrays(model)
    assert jaxbrewer.load_student(checkpoint, model) is model
    saved = part(expected(name)[0], "saved/student/")
    assert_same_bits(jobs.arrays(model), saved)
    assert any((before[key] != value).any() for key, value in saved.items())


def check_resumed(name, folder, **options):
    """Goes on from a copy of its own, to where the run that was not stopped came."""
    out = unpack(name, folder)
    distiller = jobs.run(job_of(name), output_dir=out, resume=True, **options)
    assert_close(jobs.trained(distiller), part(expected(name)[0], "final/"))
    return out


def test_every_file_is_one_of_a_run():
    for format, kinds in FORMATS.items():
        names = {path.name.split(".")[0] for path in (HERE / format).iterdir()}
        assert names == kinds.keys() | jobs.CACHES.keys()


@pytest.mark.parametrize("name", KINDS)
def test_the_student_is_loaded_with_the_same_bits(name, unpacked):
    check_student(name, unpacked(name))


@pytest.mark.parametrize(
    "name", [kind for kind in KINDS if kind.split("/")[1] not in (*BY_SEVERAL, "loss_scale")]
)
def test_a_resumed_run_ends_where_the_whole_one_did(name, tmp_path):
    check_resumed(name, tmp_path)


@pytest.mark.parametrize("format", FORMATS)
def test_the_loss_scale_goes_on_from_where_it_was(format, tmp_path):
    """Another overflow halves what had been halved already."""
    arrays, _ = jobs.read(check_resumed(f"{format}/loss_scale", tmp_path) / "gs4")
    scaling = part(arrays, "training.scaling.")
    assert (scaling["scale"], scaling["skipped"]) == (2.0**14, 2)


@pytest.mark.parametrize("format", FORMATS)
def test_a_run_under_pmap_goes_on_under_pmap(format, tmp_path):
    check_resumed(f"{format}/pmap", tmp_path, **jobs.JOBS["pmap"].writing)


def test_what_several_devices_wrote_goes_on_where_there_is_one(tmp_path):
    code = f"from {__name__} import *\nassert len(jax.devices()) == 1\n"
    code += "make_later(pytest.MonkeyPatch())\n"
    for name in (kind for kind in KINDS if kind.split("/")[1] in BY_SEVERAL):
        code += f"check_student({name!r}, unpack({name!r}, Path({str(tmp_path / 'read')!r})))\n"
        code += f"check_resumed({name!r}, Path({str(tmp_path / name)!r}))\n"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE.parents[1],
        env=os.environ | ONE_DEVICE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "was saved by 2 processes and goes on in 1" in done.stdout


@pytest.mark.parametrize("name", KINDS)
def test_every_array_and_the_position_are_there(name, unpacked):
    """Read by Orbax alone: optimizer, random keys, loss scale, counters."""
    arrays, known = expected(name)
    found, position = jobs.read(unpacked(name))
    assert_same_bits(found, part(arrays, "checkpoint/"))
    assert jobs.without_states(position) == known["position"]


@pytest.mark.parametrize("name", KINDS)
def test_inspect_shows_it(name, unpacked, capsys):
    position = expected(name)[1]["position"]
    assert main(["inspect", str(unpacked(name).parent)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    for text in (
        f"step: {position['global_step']} ",
        f"epoch: {position['epoch'] + 1}, after its batch {position['batch']}; "
        f"{position['micro_step']} batches in all",
        f"written by: {position['class']}, format {name[0]} ",
        "all of it can be read",
    ):
        assert text in said
    assert ("gs2 (score 0.5, the best, the newest)" in said) == name.endswith("/plain")
    assert ("and is what was saved" in said) == (name[0] > "1")


@pytest.mark.parametrize("format", FORMATS)
def test_the_files_hold_what_they_are_for(format):
    """Windows are closed in every checkpoint: what an epoch left open is dropped, or used up."""
    known = {name: expected(f"{format}/{name}") for name in FORMATS[format]}
    for name in ("accumulation", "steps", "loss_scale"):
        state = part(known[name][0], "checkpoint/training.opt_state.")
        assert state["mini_step"] == 0
        assert state["gradient_step"] == known[name][1]["position"]["global_step"]
        gradients = part(state, "acc_grads.")
        assert gradients
        assert not any(x.any() for x in gradients.values())
    position = known["accumulation"][1]["position"]
    assert position["micro_step"] == 2 * position["global_step"] + 1  # one batch was dropped
    position = known["steps"][1]["position"]
    assert (position["epoch"], position["batch"]) == (1, 1)  # 3 batches each, windows of 2
    scaling = part(known["loss_scale"][0], "checkpoint/training.scaling.")
    assert (scaling["scale"], scaling["skipped"]) == (2.0**15, 1)
    assert any(key.startswith("checkpoint/projections") for key in known["projections"][0])
    assert len(known["two_processes"][1]["position"]["processes"]) == 2


def test_format_2_holds_what_it_added(unpacked):
    """Digests of all, the job's record, the guard's counter, and the states of data."""
    for kind in (kind for kind in KINDS if kind[0] == "2"):
        arrays, position = jobs.read(unpacked(kind))
        names = {name.replace("/", ".") for name in position["digests"]}
        assert names == arrays.keys(), kind
        assert position["digest"]
        assert position["job"]["schedule"]["steps"] == position["global_step"]
        assert all(process["loaders"] for process in position["processes"]), kind
    arrays = expected("2/guard")[0]
    assert arrays["checkpoint/training.guard.in_a_row"] == 1
    loader = jobs.read(unpacked("2/loader_state"))[1]["processes"][0]["loaders"][""]
    assert loader["shown"]
    assert loader["batch"] == 2


@pytest.mark.parametrize(
    ("name", "change", "told"),
    [
        ("2/plain", {"optimizer": jobs.MOMENTUM}, "optimizer, .* of made-up arrays: was .*, is "),
        (
            "2/accumulation",
            {"data": lambda: jobs.batches(6)[1:]},
            "gives other batches than before",
        ),
        ("2/guard", {"config": {"seed": 1}}, "seed: was 0, is 1"),
    ],
)
def test_another_job_is_refused(name, change, told, tmp_path):
    job = replace(job_of(name), **change)
    with pytest.raises(CheckpointError, match=told):
        jobs.run(job, output_dir=unpack(name, tmp_path), resume=True, **job_of(name).config)


@pytest.mark.parametrize("name", CACHES)
def test_a_cache_is_served_and_the_teacher_rests(name, tmp_path):
    arrays, _ = expected(name)
    cache, dtype = unpack(name, tmp_path), jobs.CACHES[name.split("/")[1]]
    files = sorted(cache.glob("*.safetensors"))
    before = {path: path.stat().st_mtime_ns for path in cache.iterdir()}
    kept = {f"{path.name}/{key}": x for path in files for key, x in load_file(path).items()}
    assert {str(x.dtype) for x in kept.values()} == {dtype}
    kept = {key: x.astype(np.float32) for key, x in kept.items()}
    assert_same_bits(kept, part(arrays, "cache/"))

    jobs.ran.clear()
    distiller = jobs.run_cached(cache, dtype, tmp_path / "out")
    jax.effects_barrier()
    assert not jobs.ran
    assert {path: path.stat().st_mtime_ns for path in cache.iterdir()} == before
    assert_close(jobs.trained(distiller), part(arrays, "final/"))


@pytest.mark.parametrize("format", FORMATS)
def test_a_batch_that_a_cache_lacks_is_computed_again(format, tmp_path):
    """So the test above would notice if the teacher ran."""
    name = f"{format}/cache_float32"
    cache = unpack(name, tmp_path)
    missing = cache / "batch-000001.safetensors"
    missing.unlink()
    jobs.ran.clear()
    jobs.run_cached(cache, "float32", tmp_path / "out")
    jax.effects_barrier()
    assert len(jobs.ran) == 1
    wanted = part(expected(name)[0], f"cache/{missing.name}/")
    assert_close(load_file(missing), wanted)
