"""Which programs are compiled to give the same bits each time."""

import types

import jax
import pytest

from jaxbrewer.machine.repeatable import compiler_options

GPU = types.SimpleNamespace(platform="gpu")


def test_those_of_gpus(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert compiler_options([GPU, GPU]) == {"xla_gpu_deterministic_ops": True}


def test_not_those_of_cpus(monkeypatch):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    assert compiler_options(jax.devices("cpu")) is None


@pytest.mark.parametrize("value", ["true", "false"])
def test_the_users_flag_holds(monkeypatch, value):
    monkeypatch.setenv("XLA_FLAGS", f"--xla_a=1 --xla_gpu_deterministic_ops={value}")
    assert compiler_options([GPU]) is None
