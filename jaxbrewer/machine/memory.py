"""On a CPU, training and evaluation keep the memory that a step frees for the next step.

XLA allocates a program's scratch memory anew in every call: 0.5 GB for a step from BERT-base to
three layers with 8 sequences, 1.5 GB with 32. glibc returns blocks of that size to the kernel as
soon as they are freed, and the next step waits until it has been given every page again, zeroed.

Left alone are: a machine with a plugin for an accelerator, unless ``JAX_PLATFORMS`` begins with
``cpu``; a C library other than glibc; what ``GLIBC_TUNABLES`` (``glibc.malloc.…``) or a variable
named ``MALLOC_…`` sets. ``JAXBREWER_KEEP_MEMORY=off`` in the environment turns this off.
"""

import ctypes
import importlib.util
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata

import jax

SWITCH = "JAXBREWER_KEEP_MEMORY"
_PLATFORMS = "jax_platforms"

# How much a process may grow before it gives back what is free, and after how many steps it looks.
MOST_GROWTH = 2 * 2**30
LOOK_EVERY = 16

# Parameters of mallopt(3).
_ARENA_MAX, _MMAP_MAX, _MMAP_THRESHOLD, _TRIM_THRESHOLD = -8, -4, -3, -1
_KEEP = ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))  # large blocks come from the heap, which stays
# glibc's defaults, the thresholds as it raises them by itself once large blocks are freed.
_DEFAULT = ((_MMAP_MAX, 65536), (_MMAP_THRESHOLD, 2**25), (_TRIM_THRESHOLD, 2**26))

_lock = threading.Lock()
_keeping = 0  # how many `kept_memory` are open


def share_heap() -> bool:
    """Lets all threads of this process share one heap, the only one that may hold large blocks.

    A thread keeps the heap that it began with, so this must come before JAX computes anything;
    importing jaxbrewer calls it.

    Returns:
        Whether it was set; not where memory is to be left alone, see the module.

    Raises:
        ValueError: ``JAXBREWER_KEEP_MEMORY`` is neither ``on`` nor ``off``.
    """
    return _is_wanted() and _computes_on_cpu() and _set((_ARENA_MAX, 1))


@contextmanager
def kept_memory(platform: str) -> Iterator[Callable[[], None]]:
    """While it is open, freed memory stays with this process; afterwards what is free is returned.

    Where several are open, as of an evaluation while training, the last to close returns it.

    Args:
        platform: of the devices that compute; nothing is done unless it is ``cpu``.

    Yields:
        A function to call after each step. Free memory can come to lie in pieces that are too small
        for the next step; so when the process has grown by more than `MOST_GROWTH` bytes, it
        returns all that is free.
    """
    if platform != "cpu" or not _is_wanted():
        yield lambda: None
        return
    _keep(+1)
    try:
        yield _Bound()
    finally:
        _keep(-1)


def _keep(change: int) -> None:
    """One `kept_memory` more is open, or one less."""
    global _keeping
    with _lock:
        before, _keeping = _keeping, _keeping + change
        if not before:
            _set(*_KEEP)
        elif not _keeping:
            _set(*_DEFAULT)
            _return_free()


class _Bound:
    """Returns free memory when the process has grown too large."""

    def __init__(self) -> None:
        self._calls = 0
        self._size: int | None = None  # at the first look, and after the last return

    def __call__(self) -> None:
        self._calls += 1
        if self._calls % LOOK_EVERY:
            return
        size = _resident()
        if self._size is None:
            self._size = size
        elif size > self._size + MOST_GROWTH:
            _return_free()
            self._size = _resident()


def _set(*settings: tuple[int, int]) -> bool:
    mallopt = ctypes.CDLL(None).mallopt
    return all([mallopt(parameter, value) for parameter, value in settings])


def _return_free() -> None:
    ctypes.CDLL(None).malloc_trim(ctypes.c_size_t(0))


def _resident() -> int:
    """Bytes of memory that this process holds."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _is_wanted() -> bool:
    switch = os.environ.get(SWITCH, "on").strip().lower()
    if switch not in ("on", "off", ""):
        raise ValueError(f"{SWITCH}={switch!r}: expected 'on' or 'off'")
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    is_chosen = "glibc.malloc." in tunables or any(n.startswith("MALLOC_") for n in os.environ)
    return switch != "off" and not is_chosen and _has_glibc()


def _has_glibc() -> bool:
    try:
        found = str(os.confstr("CS_GNU_LIBC_VERSION")).startswith("glibc")
    except (AttributeError, ValueError, OSError):  # no confstr, no such name, no answer
        return False
    return found and os.path.exists("/proc/self/statm")


def _computes_on_cpu() -> bool:
    """Whether JAX will choose a CPU, as far as can be told before it has."""
    platforms = getattr(jax.config, _PLATFORMS)
    if platforms:
        return str(platforms).split(",")[0] == "cpu"
    plugins = metadata.entry_points(group="jax_plugins")
    return not plugins and importlib.util.find_spec("libtpu") is None
