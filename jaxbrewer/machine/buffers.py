"""The arrays of a compiled program, read off its text."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

_SIZES: Mapping[str, float] = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d(?:fn)?)?)\[([\d,]*)\](\{[^}]*\})?")


@dataclass(frozen=True)
class Array:
    """An array of a program's text.

    Attributes:
        shape: such as ``f32[8,128]``.
        size: bytes, without what a device pads it with.
        is_near: whether it lies in a TPU core's own memory, and takes none of the device's.
    """

    shape: str
    size: float
    is_near: bool = False


def arrays_in(shape: str) -> list[Array]:
    """The arrays of a shape, which may be a tuple's."""
    return [
        Array(
            f"{kind}[{sizes}]",
            _SIZES.get(kind, 0) * float(np.prod([int(n) for n in sizes.split(",") if n] or [1])),
            is_near="S(1)" in layout,
        )
        for kind, sizes, layout in _ARRAY.findall(shape)
    ]
