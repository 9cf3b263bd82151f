"""What a compiled program holds, reads and sends: read off the compiler's own account."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .buffers import Buffer, arrays_in, largest

_COLLECTIVES = (
    "all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter",
)  # fmt: skip
_SENDING = re.compile(
    rf"^.* = (.*?) ({'|'.join(_COLLECTIVES)})(-start)?\(.*?(?:channel_id=(\d+)|$)", re.MULTILINE
)
# A TPU scatters sums in a computation of this name, which adds up whole arrays and cuts them.
_SCATTERING = re.compile(
    r"^%all-reduce-scatter[\w.-]* .*? -> (.*?) \{$.*?^\}$", re.MULTILINE | re.DOTALL
)
_LARGEST = 5  # buffers of each kind that an account names


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
        held: the largest arguments.
        made: the largest results on the way, not all of them held at the same time.
    """

    arguments: int
    outputs: int
    donated: int
    temporaries: int
    flops: float | None
    cycles: int | None
    collectives: Mapping[str, tuple[int, float]]
    held: tuple[Buffer, ...]
    made: tuple[Buffer, ...]

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
        held=largest(text, "arguments", _LARGEST),
        made=largest(text, "results", _LARGEST),
    )


def collectives_in(text: str) -> dict[str, tuple[int, float]]:
    """Kind → how many there are in a program's text, and the bytes of their results."""
    found: list[tuple[str, float]] = []
    found += [("reduce-scatter", _bytes(given)) for given in _SCATTERING.findall(text)]
    channels: set[tuple[str, str]] = set()
    for shape, kind, start, channel in _SENDING.findall(_SCATTERING.sub("", text)):
        if (kind, channel) in channels:
            continue  # what a TPU sends while it computes stands in each part of that
        channels |= {(kind, channel)} if channel else set()
        # A start names what it takes, too; that of a sum does in some versions.
        names_both = bool(start) and (kind != "all-reduce" or shape.startswith("(("))
        found.append((kind, _bytes(shape, half=names_both)))
    kinds = sorted({kind for kind, _ in found})
    sizes = {kind: [size for each, size in found if each == kind] for kind in kinds}
    return {kind: (len(each), sum(each)) for kind, each in sizes.items()}


def _bytes(shape: str, half: bool = False) -> float:
    arrays = arrays_in(shape)
    return sum(array.size for array in arrays[len(arrays) // 2 if half else 0 :])
