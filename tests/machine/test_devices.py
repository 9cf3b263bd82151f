"""Which device a config means."""

import warnings
from types import SimpleNamespace

import jax
import pytest

from jaxbrewer.configurations.checks import device_name
from jaxbrewer.machine import devices
from jaxbrewer.machine.devices import DeviceWarning, resolve_device


def fake_machine(monkeypatch, **counts):
    """Pretends that the machine has other devices: ``fake_machine(patch, tpu=4, cpu=1)``."""
    platforms = {
        name: [SimpleNamespace(platform=name, id=i) for i in range(count)]
        for name, count in counts.items()
    }

    def local_devices(backend=None):
        if backend is None:
            return next(iter(platforms.values()))
        if backend not in platforms:
            raise RuntimeError(f"Unknown backend {backend}")
        return platforms[backend]

    monkeypatch.setattr(devices.jax, "local_devices", local_devices)
    return platforms


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "gpu", "gpu:12", "tpu", "cpu", "cpu:0"])
def test_names_stay(name):
    assert device_name(name) == name


@pytest.mark.torch
def test_a_torch_device_is_its_text():
    import torch

    assert device_name(torch.device("cuda:1")) == "cuda:1"
    assert device_name(torch.device("cpu")) == "cpu"


def test_a_jax_device_becomes_text_that_finds_it_again():
    device = jax.devices("cpu")[0]
    assert device_name(device) == "cpu:0"
    assert resolve_device(device_name(device)) is device
    assert resolve_device(device) is device


def test_case_and_blanks_do_not_matter():
    assert device_name(" CUDA:0 ") == "cuda:0"


@pytest.mark.parametrize("bad", ["", "cuda:", "cuda:-1", "cuda:x", "metal", None, 0, "cpu:0:0", []])
def test_an_unknown_text_lists_what_is_accepted(bad):
    with pytest.raises(ValueError, match=r"'cuda', 'gpu', 'tpu' or 'cpu'.*jax.Device"):
        device_name(bad)
    with pytest.raises(ValueError, match=r"unknown device.*'cuda', 'gpu', 'tpu' or 'cpu'"):
        resolve_device(bad)


def test_cpu_is_the_cpu_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_device("cpu") is jax.devices("cpu")[0]
        assert resolve_device("cpu:0") is jax.devices("cpu")[0]


@pytest.mark.parametrize("name", ["cuda", "cuda:1", "gpu"])
def test_without_an_accelerator_cuda_is_the_cpu_with_one_warning(monkeypatch, name):
    machine = fake_machine(monkeypatch, cpu=1)
    with pytest.warns(DeviceWarning, match="no accelerator here; using the CPU") as caught:
        assert resolve_device(name) is machine["cpu"][0]
    assert len(caught) == 1


def test_cuda_means_the_accelerator_there_is(monkeypatch):
    machine = fake_machine(monkeypatch, tpu=4, cpu=1)
    assert resolve_device("cuda") is machine["tpu"][0]
    assert resolve_device("gpu:3") is machine["tpu"][3]
    assert resolve_device("tpu:1") is machine["tpu"][1]
    assert resolve_device("cpu") is machine["cpu"][0]
    machine = fake_machine(monkeypatch, gpu=2, cpu=1)
    assert resolve_device("cuda:1") is machine["gpu"][1]


def test_an_index_out_of_range_lists_the_devices(monkeypatch):
    fake_machine(monkeypatch, tpu=2, cpu=1)
    with pytest.raises(ValueError, match=r"no device 'cuda:2' here; there are: tpu:0, tpu:1$"):
        resolve_device("cuda:2")
    with pytest.raises(
        ValueError, match=r"no device 'cpu:1' here; there are: cpu:0, tpu:0, tpu:1$"
    ):
        resolve_device("cpu:1")


def test_a_tpu_that_is_not_there_is_an_error(monkeypatch):
    fake_machine(monkeypatch, cpu=1)
    with pytest.raises(ValueError, match="no device 'tpu' here; there are: cpu:0"):
        resolve_device("tpu")


def test_a_device_of_another_process_is_refused(monkeypatch):
    device = jax.devices("cpu")[0]
    fake_machine(monkeypatch, cpu=1)
    with pytest.raises(ValueError, match="belongs to another process"):
        resolve_device(device)
