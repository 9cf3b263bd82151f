"""What a compiled program holds, reads and sends: read off the compiler's own account."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

_COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter",
)  # fmt: skip
_SIZES: Mapping[str, float] = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d(?:fn)?)?)\[([\d,]*)\]")
_RESULT = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\(", re.MULTILINE)


@dataclass(frozen=True)
class Account:
    """What one device's part of a program takes.

    Attributes:
        arguments: bytes of what it is given, of which `donated` are given back in place.
        outputs: bytes of what it returns.
        donated: bytes of arguments that the outputs lie in.
        temporaries: bytes of scratch memory.
        flops: or None where the compiler does not tell.
        cycles: the sum of what the compiler estimates, of TPUs; good to compare two programs with,
            and no time. None elsewhere.
        collectives: kind → how many, and the bytes that they give on a device.
    """

    arguments: int
    outputs: int
    donated: int
    temporaries: int
    flops: float | None
    cycles: int | None
    collectives: Mapping[str, tuple[int, float]]

    @property
    def peak(self) -> int:
        """Bytes at the peak."""
        return self.arguments + self.outputs - self.donated + self.temporaries


def account_of(compiled: Any) -> Account:
    """The account of a `jax.stages.Compiled`."""
    memory, costs = compiled.memory_analysis(), compiled.cost_analysis() or {}
    text = compiled.as_text()
    cycles = [int(number) for number in re.findall(r'"estimated_cycles":"(\d+)"', text)]
    return Account(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        donated=memory.alias_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        flops=costs.get("flops"),
        cycles=sum(cycles) or None,
        collectives=collectives_in(text),
    )


def collectives_in(text: str) -> dict[str, tuple[int, float]]:
    """Kind → how many there are in a program's text, and the bytes of their results."""
    found: dict[str, tuple[int, float]] = {}
    for _, shape, operation in _RESULT.findall(text):
        kind = operation.removesuffix("-start")
        if kind in _COLLECTIVES:
            arrays = _ARRAY.findall(shape)
            if operation.endswith("-start") and kind != "all-reduce":
                arrays = arrays[len(arrays) // 2 :]  # it names what it takes, too
            count, size = found.get(kind, (0, 0.0))
            found[kind] = (count + 1, size + sum(map(_bytes, arrays)))
    return found


def _bytes(array: tuple[str, str]) -> float:
    kind, shape = array
    return _SIZES.get(kind, 0) * float(np.prod([int(n) for n in shape.split(",") if n] or [1]))
