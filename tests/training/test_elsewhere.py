"""What a job takes on devices that are not there, or are only virtual."""

import functools
import importlib.util
import os
from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxbrewer import BasicTrainer, FunctionModel, TrainingConfig
from jaxbrewer.errors import PreflightError
from jaxbrewer.machine import described
from jaxbrewer.machine.compiled import collectives_in

WIDTH, ROWS = 1024, 16  # a TPU keeps arrays in tiles, which such sizes fill
BATCH = {"x": np.ones((ROWS, WIDTH), np.float32)}
OPTIMIZER = functools.partial(optax.adam, learning_rate=1e-3)
STATE = 3 * WIDTH * WIDTH * 4  # the matrix and its two moments


def trainer(folder, **training):
    model = FunctionModel(lambda w, x: {"losses": jnp.mean(jnp.tanh(x @ w["w"]) ** 2)},
                          {"w": jnp.ones((WIDTH, WIDTH))})  # fmt: skip
    config = TrainingConfig(output_dir=folder, device="cpu", **training)
    return BasicTrainer(config, model, lambda batch, outputs: outputs)


def told(folder, on, **training):
    with trainer(folder, **training) as basic:
        return basic.check(BATCH, OPTIMIZER, on=on).split("\n\n")[-1]


def test_one_device_holds_the_state_and_updates_it_in_place(tmp_path, capsys):
    said = told(tmp_path, "cpu:1")
    assert said.startswith("on cpu:1: 1 × cpu\n  compiled in") and "sends nothing" in said
    assert f"({STATE / 2**20:.2f} MiB of them updated in place)" in said
    assert "GFLOP a device" in said and not list(tmp_path.iterdir())
    held, _, made = said.partition("the largest held:")[2].partition("the largest made on the way:")
    assert "1 × 4.00 MiB, f32[1024,1024], state.params['student']['w']" in held
    assert "f32[16,1024]" in made


def test_several_devices_send_gradients_or_parameters(tmp_path):
    whole = told(tmp_path, "cpu:4")
    assert f"all-reduce of {WIDTH * WIDTH * 4 / 2**20:.2f} MiB" in whole
    cut = told(tmp_path, "cpu:4", data_parallel=True, sharding="all")
    assert f"({STATE / 4 / 2**20:.2f} MiB of them updated in place)" in cut
    assert "all-gather of" in cut


def test_what_does_not_fit_is_told_with_ways_out(tmp_path, monkeypatch):
    small = described.Described("cpu:1", described.described("cpu:1").devices, memory=1000)
    monkeypatch.setattr("jaxbrewer.training.elsewhere.described", lambda name: small)
    with pytest.raises(
        PreflightError,
        match=r"does not fit on cpu:1: .*1 × 4.00 MiB, f32\[1024,1024\], .*gradient_accumulation_steps",
    ):
        told(tmp_path, "cpu:1")


def test_a_job_that_fits_only_when_cut_trains_with_the_numbers_of_one_device(tmp_path, monkeypatch):
    """On devices that have memory for the weights and their moments, and nothing else."""
    real = described.described
    monkeypatch.setattr(
        "jaxbrewer.training.elsewhere.described", lambda name: replace(real(name), memory=STATE)
    )
    for on in ("cpu:1", "cpu:8"):
        with pytest.raises(PreflightError, match="does not fit"):
            told(tmp_path, on)
    cut = {"data_parallel": True, "sharding": "all"}
    assert "at the peak, of 12.00 MiB" in told(tmp_path, "cpu:8", **cut)
    rng = np.random.default_rng(0)
    batches = [{"x": rng.normal(size=(ROWS, WIDTH)).astype(np.float32)} for _ in range(3)]
    trained = []
    for options in ({}, cut):
        with trainer(tmp_path / str(len(trained)), **options) as basic:
            basic.train(OPTIMIZER, batches, num_epochs=1)
        trained.append(np.asarray(basic.model_S.params["w"]))
    assert np.abs(trained[0] - 1).max() > 1e-3
    np.testing.assert_allclose(trained[1], trained[0], rtol=1e-5)


def test_what_cannot_be_compiled_for_is_named(tmp_path):
    wrong = {
        "h100": "expected devices such as tpu:v5e:2x4",
        "tpu:v5e:8": "needs libtpu|expected a shape of chips|no such devices",
        "cpu:0": "expected from 1 to 256 devices, not '0'",
        "cpu:99": "this process has 8 CPU device",
    }
    for name, words in wrong.items():
        with pytest.raises(ValueError, match=words):
            told(tmp_path, name)
    with trainer(tmp_path) as basic, pytest.raises(ValueError, match="needs the optimizer"):
        basic.check(BATCH, on="cpu:1")
    with pytest.raises(ValueError, match="mapping='pmap' cannot be looked at"):
        told(tmp_path, "cpu:4", data_parallel=True, mapping="pmap")


def test_collectives_are_read_off_a_programs_text():
    text = """
  %all-reduce.1 = (f32[8,4]{1,0}, bf16[2]{0}) all-reduce(%a, %b), replica_groups={}
  %ag = (f32[2,4]{1,0}, f32[8,4]{1,0}) all-gather-start(%c), dimensions={0}
  %agd = f32[8,4]{1,0} all-gather-done(%ag)
  %ar = f32[4]{0} all-reduce-start(%a), channel_id=5, replica_groups={}
  %arn = ((f32[2], f32[1]), (f32[2], f32[1])) all-reduce-start(%a, %b), channel_id=6
  ROOT %rs = f32[1,4]{1,0} reduce-scatter(%d), dimensions={0}
"""
    assert collectives_in(text) == {
        "all-reduce": (3, 132 + 16 + 12),
        "all-gather": (1, 128),
        "reduce-scatter": (1, 16),
    }


def test_a_tpu_sends_once_what_stands_in_its_program_more_than_once():
    """Gathering while it computes is in each part of that; a scatter is a sum within one that cuts."""
    text = """
%async_collective_fusion.1 (p: bf16[4,8]) -> bf16[32,8] {
  %g.1 = bf16[32,8]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=7, dimensions={0}
}

%async_collective_fusion.2 (p: bf16[4,8]) -> bf16[32,8] {
  %g.2 = bf16[32,8]{1,0:T(8,128)S(1)} all-gather(%p), channel_id=7, dimensions={0}
}

%all-reduce-scatter.2 (a: f32[64,8], b: f32[8]) -> (f32[8,8], f32[1]) {
  %sum = (f32[64,8]{1,0:T(8,128)}, f32[8]{0}) all-reduce(%a, %b), channel_id=1, to_apply=%add
  ROOT %cut = (f32[8,8]{1,0}, f32[1]{0}) tuple(%x, %y)
}

ENTRY %main (p: f32[4]) -> f32[] {
  %other = bf16[16,8]{1,0} all-gather(%p), channel_id=8, dimensions={0}
  ROOT %r = f32[] all-reduce(%p), channel_id=7, to_apply=%add
}
"""
    assert collectives_in(text) == {
        "all-gather": (2, 512 + 256),
        "all-reduce": (1, 4),
        "reduce-scatter": (1, 256 + 4),
    }


def test_a_libtpu_that_another_process_uses_is_told(monkeypatch):
    def held(*args, **options):
        raise RuntimeError("ABORTED: Internal error when accessing libtpu multi-process lockfile.")

    monkeypatch.setattr(described.topologies, "get_topology_desc", held)
    monkeypatch.setattr(described.importlib.util, "find_spec", lambda name: name)
    with pytest.raises(described.BusyError, match="serves one process at a time"):
        described.described("tpu:v5e:2x4")


@pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="libtpu is not installed")
@pytest.mark.skipif(
    "PYTEST_XDIST_WORKER" in os.environ, reason="libtpu serves one process: run this with -n 0"
)
@pytest.mark.parametrize("sharding", [None, "all"])
def test_a_step_compiles_for_tpus(sharding, tmp_path):
    parallel = {"data_parallel": True, "sharding": sharding} if sharding else {}
    said = told(tmp_path, "tpu:v5e:2x4", **parallel)
    assert "on tpu:v5e:2x4: 8 × TPU v5 lite, 16 GiB each" in said and "cycles" in said
    share = STATE if sharding is None else STATE / 8
    assert f"({share / 2**20:.2f} MiB of them updated in place)" in said
    assert "1 × TPU v5 lite" in told(tmp_path, "tpu:v5e:1x1")
