"""The largest arrays of a compiled program, by name: read off its text.

Compilers for accelerators do not tell which array lies where in scratch memory. Their program's text
names each argument and the operation that each result comes of.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

_SIZES: Mapping[str, float] = {
    "pred": 1, "s4": 0.5, "u4": 0.5, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "bf16": 2, "f16": 2,
    "s32": 4, "u32": 4, "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16,
    "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip
_ARRAY = re.compile(r"\b([a-z]+\d*(?:e\dm\d(?:fn)?)?)\[([\d,]*)\](\{[^}]*\})?")
_RESULT = re.compile(r"^\s*(ROOT )?%?([\w.-]+) = (.*?) ([a-z][\w-]*)\((.*)$", re.MULTILINE)
_OPERAND = re.compile(r"%([\w.-]+)")
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')

# What gives another name to what is there, or starts what ends elsewhere.
_NO_BUFFER = ("tuple", "get-tuple-element", "bitcast", "constant", "while", "optimization-barrier")
_PASSES_ON = ("get-tuple-element", "bitcast", "copy", "copy-start", "copy-done")


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


@dataclass(frozen=True)
class Buffer:
    """Arrays of one shape that have one name.

    Attributes:
        name: an argument's path, or the operation that results come of.
        array: its shape and size.
        count: how many there are.
    """

    name: str
    array: Array
    count: int


@dataclass
class _Result:
    operation: str
    arrays: list[Array]
    operands: list[str]
    name: str
    index: int = 0  # of an element of a tuple
    returned: set[int] = field(default_factory=set)


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


def largest(text: str, kind: Literal["arguments", "results"], count: int) -> tuple[Buffer, ...]:
    """The largest arrays of a program's main computation, by name.

    Args:
        text: the program.
        kind: what it is given, or what it computes and does not return. Not all results are held at
            the same time.
        count: of buffers.
    """
    results = _main(text)
    if kind == "arguments":
        made = [(each.name, each.arrays) for each in results if each.operation == "parameter"]
    else:
        made = [(each.name, _kept(each)) for each in results]
    found = Counter((name, array) for name, arrays in made for array in arrays)
    buffers = [Buffer(name, array, number) for (name, array), number in found.items()]
    return tuple(sorted(buffers, key=lambda each: (-each.array.size, -each.count))[:count])


def _main(text: str) -> list[_Result]:
    """What the main computation computes, with what it returns marked."""
    body = text.partition("\nENTRY ")[2].partition("\n}")[0]
    found: dict[str, _Result] = {}
    last = ""
    for root, name, shape, operation, rest in _RESULT.findall(body):
        operands, _, _ = rest.partition(")")
        index = re.search(r"index=(\d+)", rest) if operation == "get-tuple-element" else None
        found[name] = _Result(
            operation,
            arrays_in(shape),
            _OPERAND.findall(operands),
            _op_name(rest) or operation,
            int(index.group(1)) if index else 0,
        )
        last = name if root else last
    if last in found:
        is_tuple = found[last].operation == "tuple"
        _mark(found, found[last].operands if is_tuple else [last])
    return list(found.values())


def _mark(found: Mapping[str, _Result], names: Iterable[str]) -> None:
    """Marks what is returned where it is computed, through copies and other names of it."""
    for name in names:
        index = 0
        while name in found:
            result = found[name]
            result.returned.add(index)
            if result.operation not in _PASSES_ON or not result.operands:
                break
            index = result.index
            name = result.operands[0]


def _kept(result: _Result) -> list[Array]:
    is_other = result.operation in ("parameter", *_NO_BUFFER) or result.operation.endswith("-start")
    if is_other:
        return []
    return [
        array
        for index, array in enumerate(result.arrays)
        if index not in result.returned and not array.is_near
    ]


def _op_name(rest: str) -> str:
    found = _OP_NAME.search(rest)
    return found.group(1).replace("\\'", "'").removeprefix("jit(step)/") if found else ""
