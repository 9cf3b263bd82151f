"""A checksum of batches as a loader gives them, each with those before it."""

import functools
import logging
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from .batches import Served

logger = logging.getLogger(__name__)


class Checksums:
    """Chains the checksums of one loader's batches: a CRC-32 of names, types, shapes and bytes.

    Arrays on an accelerator are not brought to the host: of them only types and shapes count, and
    a line in the log says so once. So it is with objects that are neither arrays nor numbers.
    """

    def __init__(self) -> None:
        self._has_said = False

    def of(self, batch: Any, before: int) -> int:
        """The checksum of a batch after those that have the checksum `before`, from 0."""
        try:
            return self._of(batch, before)
        except RecursionError:  # a list that holds itself; who takes the batch will say so
            return before

    def _of(self, value: Any, before: int) -> int:
        if isinstance(value, Served):  # the teacher's results are computed, not data
            return self._of(value.student, before)
        if isinstance(value, Mapping):
            for key in sorted(value, key=str):
                before = self._of(value[key], _word(f"key {key}", before))
            return before
        if isinstance(value, tuple | list):
            before = _word(f"items {len(value)}", before)
            for item in value:
                before = self._of(item, before)
            return before
        if hasattr(value, "shape") and hasattr(value, "dtype"):
            before = _word(f"{_name_of(value.dtype)} {tuple(value.shape)}", before)
            data = _host_bytes(value)
            if data is None:
                self._say(value)
                return before
            return zlib.crc32(data, before)
        if value is None or isinstance(value, bool | int | float | str | bytes):
            return _word(repr(value), before)
        return _word(type(value).__name__, before)

    def _say(self, value: Any) -> None:
        if not self._has_said and jax.process_index() == 0:
            logger.info(
                "batches hold arrays of %s that are not in host memory: at a resume only their types "
                "and shapes are compared",
                type(value).__name__,
            )
        self._has_said = True


def _word(text: str, before: int) -> int:
    return zlib.crc32(text.encode(errors="replace"), before)


@functools.cache
def _name_of(dtype: Any) -> str:
    """A type's name, which numpy takes ten times as long to make as to hash the type."""
    return str(dtype)


def _host_bytes(value: Any) -> Any:
    """An array's bytes, or None where they do not lie in host memory or mean nothing."""
    if not isinstance(value, np.ndarray) and isinstance(value, jax.Array):
        if value.is_deleted() or not value.is_fully_addressable:
            return None
        if any(device.platform != "cpu" for device in value.devices()):
            return None
        if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key):
            value = jax.random.key_data(value)
        value = np.asarray(value)
    elif hasattr(value, "detach"):
        value = _torch_bytes(value)
    if not isinstance(value, np.ndarray | np.generic) or value.dtype.hasobject:
        return None
    return np.ascontiguousarray(value).reshape(-1).view(np.uint8)


def _torch_bytes(tensor: Any) -> Any:
    if getattr(tensor.device, "type", None) != "cpu":
        return None
    try:
        return tensor.detach().contiguous().reshape(-1).view(sys.modules["torch"].uint8).numpy()
    except (RuntimeError, TypeError, NotImplementedError):  # sparse, quantized, without data
        return None
