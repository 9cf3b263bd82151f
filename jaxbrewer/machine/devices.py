"""Devices: which one a config means."""

import warnings
from typing import Any

import jax

from ..configurations.checks import device_name, name_of


class DeviceWarning(UserWarning):
    """The device asked for is not there, and another is used."""


def resolve_device(device: Any) -> jax.Device:
    """Returns the device that a config's ``device`` means on this machine.

    ``'cuda'`` and ``'gpu'`` mean the accelerator the machine has, of whatever make; where it has
    none, the CPU, with a :class:`DeviceWarning`. ``'tpu'`` and ``'cpu'`` mean just that. An index
    counts the devices of this process.

    Args:
        device: as :func:`device_name` takes it.

    Raises:
        ValueError: the text is not known, or there is no such device here; the message lists those
            there are.
    """
    if isinstance(device, jax.Device):
        name_of(device)
        return device
    name, found, index = _candidates(device)
    if not found and name.startswith(("cuda", "gpu")):
        _warn_of_cpu(name)
        return _local_devices("cpu")[0]
    if (index or 0) >= len(found):
        raise ValueError(f"there is no device {name!r} here; there are: {_there_are(found)}")
    return found[index or 0]


def resolve_devices(device: Any, *, rank: int = -1) -> list[jax.Device]:
    """Returns all devices of the kind a config's ``device`` names: of this process, or of all.

    Args:
        device: as :func:`device_name` takes it. An index would single one out: only 0 and, as
            scripts of several processes write it, `rank` are taken.
        rank: this process's rank on its machine: the devices of all processes are returned, in the
            order of the processes; −1: this process's own.

    Raises:
        ValueError: as :func:`resolve_device`, and for another index.
    """
    name, found, index = _candidates(device)
    if index not in (None, 0, rank):
        raise ValueError(
            f"device={name!r} names one device, and data_parallel or local_rank use all there are; "
            f"write device={name.partition(':')[0]!r}"
        )
    if not found and name.startswith(("cuda", "gpu")):
        _warn_of_cpu(name)
        found = _local_devices("cpu")
    if not found:
        raise ValueError(f"there is no device {name!r} here; there are: {_there_are(found)}")
    if rank < 0:
        return found
    everywhere = jax.devices(found[0].platform)
    return sorted(everywhere, key=lambda d: (d.process_index, d.id))


def _candidates(device: Any) -> tuple[str, list[jax.Device], int | None]:
    """A device's name, this process's devices of that kind, and its index if it has one."""
    try:
        name = device_name(device)
    except ValueError as error:
        raise ValueError(f"unknown device {device!r}: {error}") from None
    platform, _, index = name.partition(":")
    if platform in ("cuda", "gpu"):
        found = _local_devices("gpu") or [d for d in jax.local_devices() if d.platform != "cpu"]
    else:
        found = _local_devices(platform)
    return name, found, int(index) if index else None


def _warn_of_cpu(name: str) -> None:
    warnings.warn(
        f"device {name!r} was asked for, but JAX sees no accelerator here; using the CPU",
        DeviceWarning,
        stacklevel=3,
    )


def _there_are(found: list[jax.Device]) -> str:
    return ", ".join(dict.fromkeys(map(name_of, [*found, *jax.local_devices()])))


def _local_devices(platform: str) -> list[jax.Device]:
    try:
        return jax.local_devices(backend=platform)
    except RuntimeError:  # how JAX says that it has no such platform
        return []
