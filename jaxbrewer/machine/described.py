"""Accelerators that are described and not there: what a step compiles to on them.

XLA compiles for a TPU where libtpu is installed, and for an H100 where the CUDA plugin is, without one
in the machine. Nothing can be run so, and how long it would take is not known.
"""

import importlib.util
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import topologies

GIB = 2**30

# GiB that a device has for programs.
_TPU_MEMORY: Mapping[str, float] = {"v5e": 16, "v5p": 95, "v6e": 32}
_H100_MEMORY = 80

# An H100 as XLA wants it described (its GpuTargetConfigProto): figures of NVIDIA's data sheet and of
# what CUDA tells of such a device.
_H100 = """\
gpu_device_info {
  threads_per_block_limit: 1024
  threads_per_warp: 32
  shared_memory_per_block: 49152
  shared_memory_per_core: 233472
  threads_per_core_limit: 2048
  core_count: 132
  fpus_per_core: 128
  block_dim_limit_x: 2147483647
  block_dim_limit_y: 65535
  block_dim_limit_z: 65535
  memory_bandwidth: 3352320000000
  l2_cache_size: 52428800
  clock_rate_ghz: 1.98
  device_memory_size: 84942979072
  shared_memory_per_block_optin: 232448
  cuda_compute_capability { major: 9 }
  registers_per_core_limit: 65536
  registers_per_block_limit: 65536
  thread_dim_limit_x: 1024
  thread_dim_limit_y: 1024
  thread_dim_limit_z: 64
  device_vendor: "NVIDIA Corporation"
  device_address_bits: 64
  name: "NVIDIA H100 80GB HBM3"
  driver_version: "13.0.0"
  runtime_version: "12.8.0"
  compile_time_toolkit_version: "12.8.0"
  dnn_version: "9.10.0"
}
platform_name: "CUDA"
dnn_version_info { major: 9 minor: 10 patch: 0 }
device_description_str: "NVIDIA H100 80GB HBM3"
"""

EXAMPLES = "tpu:v5e:2x4, tpu:v5e:1x1, tpu:v5p:2x2x1, gpu:h100:8 or cpu:8"
_MOST = 256  # devices


class BusyError(ValueError):
    """Another process is compiling for TPUs."""


@dataclass(frozen=True)
class Described:
    """Devices to compile for.

    Attributes:
        name: as it was asked for.
        devices: the devices.
        memory: bytes that each has, or None.
        options: what the compiler must be told, there being no device to try on.
    """

    name: str
    devices: tuple[jax.Device, ...]
    memory: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def described(name: str) -> Described:
    """The devices of a name: `EXAMPLES`.

    A TPU is named by its generation and the shape of its chips (``2x4``: eight), a GPU and a CPU by
    how many there are. CPUs are those of this process (``jax_num_cpu_devices``).

    Raises:
        ValueError: the name is none of these, what compiles for it is not installed, or there are
            not so many CPU devices.
        BusyError: it is a TPU, and another process uses libtpu.
    """
    kind, *rest = name.lower().split(":") if isinstance(name, str) else [str(name)]
    if kind == "tpu" and len(rest) == 2 and rest[0] in _TPU_MEMORY:
        return _tpu(name, *rest)
    if kind == "gpu" and rest[:1] == ["h100"] and len(rest) <= 2:
        return _gpus(name, _count(name, rest[1] if rest[1:] else "1"))
    if kind == "cpu" and len(rest) <= 1:
        return _cpus(name, _count(name, rest[0] if rest else "1"))
    raise ValueError(f"on={name!r}: expected devices such as {EXAMPLES}")


def _count(name: str, text: str) -> int:
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        raise ValueError(f"on={name!r}: expected from 1 to {_MOST} devices, not {text!r}")
    return int(text)


def _tpu(name: str, generation: str, shape: str) -> Described:
    if not re.fullmatch(r"[1-9]\d?(x[1-9]\d?){1,2}", shape):
        raise ValueError(f"on={name!r}: expected a shape of chips such as 2x4, not {shape!r}")
    if importlib.util.find_spec("libtpu") is None:
        raise ValueError(
            f"on={name!r}: compiling for TPUs needs libtpu: pip install 'jaxbrewer[tpu]'"
        )
    sizes = [*map(int, shape.split("x")), 1][:3]
    options = {}
    if sizes == [1, 1, 1]:  # one chip is no whole host
        options["chips_per_host_bounds"] = (1, 1, 1)
        shape = "1x1x1"
    try:
        topology = topologies.get_topology_desc(f"{generation}:{shape}", "tpu", **options)
    except Exception as error:  # what libtpu raises is of no narrower class
        if "lockfile" in str(error):
            raise BusyError(
                f"on={name!r}: libtpu serves one process at a time, and another one uses it: wait for "
                f"that to end. (libtpu: {error})"
            ) from error
        raise ValueError(f"on={name!r}: libtpu knows no such devices: {error}") from error
    return Described(name, tuple(topology.devices), _TPU_MEMORY[generation] * GIB)


def _gpus(name: str, count: int) -> Described:
    if importlib.util.find_spec("jax_cuda12_plugin") is None:
        raise ValueError(
            f"on={name!r}: compiling for GPUs needs JAX's CUDA plugin: pip install 'jaxbrewer[cuda12]'"
        )
    topology = topologies.get_topology_desc(
        "", "cuda", target_config=_H100, topology=f"1x1x{count}"
    )
    # There is no device on which kernels could be tried.
    options = {"xla_gpu_autotune_level": 0, "xla_gpu_enable_triton_gemm": False}
    return Described(name, tuple(topology.devices), _H100_MEMORY * GIB, options)


def _cpus(name: str, count: int) -> Described:
    devices = jax.local_devices(backend="cpu")
    if len(devices) < count:
        raise ValueError(
            f"on={name!r}: this process has {len(devices)} CPU device(s): set "
            f"jax.config.update('jax_num_cpu_devices', {count}) before anything else of JAX"
        )
    return Described(name, tuple(devices[:count]))
