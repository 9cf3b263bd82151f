"""Digests of functions: of what they compute, as JAX traces it, and not of their names or places.

Two functions have one digest if their traces are the same graph of operations on inputs and to
outputs of the same names. Names of functions, source lines, the order in which independent operations
were traced, operations whose results nobody uses, devices, shardings and donation make no
difference; captured arrays count by their values. Traces depend on shapes, and on the versions of
the libraries.

What is not in a trace is not seen: the code behind host callbacks, of which only the name counts.
"""

import dataclasses
import enum
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

from ..digests import digest, named

# Parameters of operations that change no number.
_APART = {
    "backend", "compiler_options_kvs", "ctx_mesh", "debug", "debug_info", "device", "devices",
    "donated_invars", "in_layouts", "in_shardings", "inline", "keep_unused", "layout", "mesh", "name",
    "name_and_src_info", "out_layouts", "out_sharding", "out_shardings", "resource_env", "sharding",
}  # fmt: skip
_MOST_NUMBERS = 64
_DEEPEST = 12


def trace(function: Callable[..., Any], **inputs: Any) -> tuple[dict[str, Any], Any]:
    """Traces a function.

    Args:
        function: of named arguments; returns a tree of arrays.
        inputs: its arguments, as arrays or by shape.

    Returns:
        What the trace is, as JSON: ``digest``, a SHA-256; ``counts``: operation → how many;
        ``numbers``: the floats in it, at most 64. And the shapes of what the function returns.
    """
    make = jax.make_jaxpr(lambda inputs: function(**inputs), return_shape=True)
    closed, shapes = make(inputs)
    walk = _Walk()
    digest = walk.closed(closed, list(named(inputs)), list(named(shapes)))
    numbers = sorted(walk.numbers)[:_MOST_NUMBERS]
    return {
        "digest": digest,
        "counts": dict(sorted(walk.counts.items())),
        "numbers": numbers,
    }, shapes


class _Walk:
    """One walk through a trace; every value has a digest made of those it is computed from.

    Attributes:
        counts: operation → how many there are.
        numbers: the floats among the constants.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()
        self.numbers: set[float] = set()
        self._known: dict[int, tuple[str, Counter[str]]] = {}

    def closed(
        self, closed: ClosedJaxpr, inputs: Sequence[str] = (), outputs: Sequence[str] = ()
    ) -> str:
        """The digest of a trace with the values it has captured; without names, places count."""
        return self._graph(closed.jaxpr, [self._array(x) for x in closed.consts], inputs, outputs)

    def _inner(self, jaxpr: Jaxpr, constants: Sequence[Any] = ()) -> str:
        """The digest of a trace inside another; of one that stands there often, taken once."""
        known = self._known.get(id(jaxpr))
        if known is None:
            before, self.counts = self.counts, Counter()
            digest = self._graph(jaxpr, [self._array(x) for x in constants])
            known = self._known[id(jaxpr)] = digest, self.counts
            self.counts = before
        self.counts += known[1]
        return known[0]

    def _graph(
        self,
        jaxpr: Jaxpr,
        constants: Sequence[str],
        inputs: Sequence[str] = (),
        outputs: Sequence[str] = (),
    ) -> str:
        values = dict(zip(jaxpr.constvars, constants, strict=True))
        names = inputs or range(len(jaxpr.invars))
        for name, variable in zip(names, jaxpr.invars, strict=True):
            values[variable] = f"input {name} {_type(variable.aval)}"
        order = ""  # of what has effects: references in kernels are read and written in turn
        for equation in jaxpr.eqns:
            operation = equation.primitive.name
            if operation.startswith("debug_"):
                continue
            self.counts[operation] += 1
            read = [self._read(values, x) for x in equation.invars]
            said = [
                f"{k}={self._said(v)}"
                for k, v in sorted(equation.params.items())
                if k not in _APART
            ]
            found = _hash(operation, *said, *read, *([order] if equation.effects else []))
            order = found if equation.effects else order
            for i, variable in enumerate(equation.outvars):
                values[variable] = f"{found} {i}"
        ends = [self._read(values, x) for x in jaxpr.outvars]
        places = outputs or range(len(ends))
        named_ends = zip(places, ends, strict=True)
        return _hash(order, *(f"{place} {end}" for place, end in named_ends))

    def _read(self, values: Mapping[Any, str], variable: Any) -> str:
        if not isinstance(variable, Literal):
            return values[variable]
        return f"{_type(variable.aval)} {self._array(variable.val)}"

    def _array(self, value: Any) -> str:
        """A constant by its type, shape and bits."""
        if isinstance(value, jax.Array) and not value.is_fully_addressable:
            return digest([value])
        if jax.numpy.issubdtype(getattr(value, "dtype", np.float32), jax.dtypes.prng_key):
            return f"key {self._array(jax.random.key_data(value))}"
        array = np.asarray(value)
        is_number = array.ndim == 0 and jax.numpy.issubdtype(array.dtype, np.floating)
        if is_number and np.isfinite(array):
            self.numbers.add(float(str(array)))
        bits = hashlib.sha256(np.ascontiguousarray(array).tobytes()).hexdigest()
        return f"{array.dtype}{list(array.shape)} {bits}"

    def _said(self, value: Any, depth: int = 0) -> str:
        """A parameter of an operation, without what differs from process to process."""
        if isinstance(value, ClosedJaxpr):
            return self._inner(value.jaxpr, value.consts)
        if isinstance(value, Jaxpr):
            return self._inner(value, [0] * len(value.constvars))
        if isinstance(value, np.ndarray | jax.Array):
            return self._array(value)
        if isinstance(value, enum.Enum):
            return f"{type(value).__name__}.{value.name}"
        if value is None or isinstance(value, bool | int | float | complex | bytes | np.generic):
            return repr(value)
        if isinstance(value, str):
            return re.sub(r"0x[0-9a-f]+", "", value)
        if isinstance(value, np.dtype):
            return str(value)
        return self._of_parts(value, depth + 1) if depth < _DEEPEST else type(value).__name__

    def _of_parts(self, value: Any, depth: int) -> str:
        kind = type(value).__name__
        if isinstance(value, Mapping):
            items = [f"{self._said(k, depth)}:{self._said(v, depth)}" for k, v in value.items()]
            return f"{kind}{sorted(items)}"
        if isinstance(value, set | frozenset):
            return f"{kind}{sorted(self._said(x, depth) for x in value)}"
        if isinstance(value, tuple | list):
            return f"{kind}{[self._said(x, depth) for x in value]}"
        if isinstance(value, jax.sharding.Sharding | jax.sharding.Mesh):
            return ""
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = [f.name for f in dataclasses.fields(value) if f.name not in _APART]
            return f"{kind}{[(k, self._said(getattr(value, k, None), depth)) for k in fields]}"
        # Of functions and other objects only the kind counts: their text may hold addresses.
        return str(getattr(value, "__qualname__", kind))


def _type(aval: Any) -> str:
    """The type and shape of a value; of something else than an array, its text."""
    if not hasattr(aval, "dtype") or not hasattr(aval, "shape"):
        return str(aval)
    weak = "~" if getattr(aval, "weak_type", False) else ""
    return f"{type(aval).__name__} {weak}{aval.dtype}{list(aval.shape)}"


def _hash(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
