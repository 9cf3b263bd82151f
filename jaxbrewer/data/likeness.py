"""Every later batch against the first, which is the one that preflight has seen.

A compiled step that meets a batch of another kind fails deep inside, or broadcasts and trains on
something else. What may change from batch to batch: the number of rows, lengths, the width of a
type (uint8 for int64, float64 for float32), flags, a mask of bools for one of numbers, and whether
the teacher's outputs come along. Looking
costs some microseconds: a batch of shapes and types that were seen before is not looked at again.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from ..errors import BatchError
from .batches import Batch, Static, place

_CACHE = "teacher_cache"
_FIX = "mend it in the loader or with train(…, batch_postprocessor=…)"


class Likeness:
    """What later batches must have in common with the first.

    Args:
        first: the first batch, as `batches.own` gives it.
    """

    def __init__(self, first: Batch):
        self._first, self._cache = _parted(first)
        self._seen = {_outline(first)}
        leaves = jax.tree_util.tree_leaves_with_path(self._first)
        self._groups: dict[int, list[str]] = {}
        for path, leaf in leaves:
            if leaf.ndim:
                self._groups.setdefault(leaf.shape[0], []).append(_name(path))
        self._leaves = {_name(path): leaf for path, leaf in leaves}

    def check(self, batch: Batch) -> bool:
        """Compares a batch with the first.

        Returns:
            Whether its shapes and types are new, so that the step is traced and compiled for them.

        Raises:
            BatchError: naming the input, what was expected, what came, and the fix.
        """
        outline = _outline(batch)
        if outline in self._seen:
            return False
        inputs, cache = _parted(batch)
        _compare(self._first, inputs, ())
        if self._cache is None:
            self._cache = cache
        elif cache is not None:
            _compare(self._cache, cache, (_CACHE,))
        if self._check_rows(inputs):
            self._seen.add(outline)
        return True

    def _check_rows(self, batch: Batch) -> bool:
        """Inputs that had as many rows as each other must have so again.

        One that all rows share may have had as many by chance: it is let through if it has not
        changed. Returns whether there was none of these.
        """
        leaves = {_name(path): x for path, x in jax.tree_util.tree_leaves_with_path(batch)}
        certain = True
        for rows, names in self._groups.items():
            sizes = Counter(leaves[name].shape[0] for name in names)
            most = max(sizes.items(), key=lambda item: (item[1], item[0]))[0]
            for name in names if len(sizes) > 1 else ():
                if leaves[name].shape[0] == most or leaves[name].shape[0] == rows == 1:
                    continue
                if not _same(self._leaves[name], leaves[name]):
                    others = ", ".join(
                        f"{other} {list(leaves[other].shape)}"
                        for other in names
                        if leaves[other].shape[0] == most
                    )
                    raise BatchError(
                        f"{name} has {leaves[name].shape[0]} rows (shape "
                        f"{list(leaves[name].shape)}), expected {most} as in {others}; in the first "
                        f"batch all of them had {rows}. Were they put together from different "
                        f"examples, or is one transposed? {_FIX.capitalize()}"
                    )
                certain = False
        return certain


def _parted(batch: Batch) -> tuple[Batch, Any]:
    """The inputs, and the teacher's outputs computed before, which some batches may bring."""
    if not isinstance(batch, dict) or not {"teacher", "student"} <= batch.keys():
        return batch, None
    return {k: v for k, v in batch.items() if k != _CACHE}, batch.get(_CACHE)


def _outline(batch: Batch) -> Any:
    """Structure, shapes and types, to look up."""
    leaves, structure = jax.tree_util.tree_flatten(batch)
    return structure, *((leaf.shape, leaf.dtype) for leaf in leaves)


def _name(path: tuple) -> str:
    return "batch" + jax.tree_util.keystr(path)


def _same(first: Any, now: Any) -> bool:
    if first is now:
        return True
    if first.shape != now.shape or (isinstance(first, jax.Array) and first.is_deleted()):
        return False
    return bool(np.array_equal(np.asarray(first), np.asarray(now)))


def _compare(first: Any, now: Any, path: tuple) -> None:
    """Goes through both, and raises at the first place where they differ in kind."""
    where = place(path)
    if isinstance(first, dict) and isinstance(now, dict):
        _compare_keys(first, now, where)
        for key, value in first.items():
            _compare(value, now[key], (*path, key))
    elif isinstance(first, tuple) and isinstance(now, tuple):
        if len(first) != len(now) or type(first) is not type(now):
            raise BatchError(
                f"{where} is {_described(now)}, expected {_described(first)} as in the first "
                f"batch; {_FIX}"
            )
        for i, (one, other) in enumerate(zip(first, now, strict=True)):
            _compare(one, other, (*path, i))
    elif isinstance(first, Static) and isinstance(now, Static):
        if (first.value is None) != (now.value is None):
            raise BatchError(_another(where, first, now))
    elif _is_array(first) and _is_array(now):
        _compare_arrays(first, now, where)
    elif _is_plain(first) or _is_plain(now) or type(first) is not type(now):
        raise BatchError(_another(where, first, now))
    else:  # another class that JAX knows, such as a model's outputs
        one, structure = _opened(first)
        other, other_structure = _opened(now)
        if structure != other_structure:
            raise BatchError(_another(where, first, now))
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            _compare(a, b, (*path, i))


def _opened(value: Any) -> tuple[list[Any], Any]:
    """What is right below a node, and its structure."""
    return jax.tree_util.tree_flatten(value, is_leaf=lambda x: x is not value)


def _compare_keys(first: Mapping[str, Any], now: Mapping[str, Any], where: str) -> None:
    missing = [repr(key) for key in first if key not in now]
    extra = [repr(key) for key in now if key not in first]
    if missing:
        has = ", ".join(map(repr, now))
        raise BatchError(
            f"{where} has no {', '.join(missing)}, which the first batch had (it has {has}). Every "
            f"batch brings the same inputs; {_FIX}"
        )
    if extra:
        raise BatchError(
            f"{where} has {', '.join(extra)}, expected only {', '.join(map(repr, first))} as in "
            f"the first batch; {_FIX}"
        )


def _compare_arrays(first: Any, now: Any, where: str) -> None:
    if first.ndim != now.ndim:
        raise BatchError(
            f"{where} has {now.ndim} axes (shape {list(now.shape)}), expected {first.ndim} as in "
            f"the first batch (shape {list(first.shape)}); {_FIX}"
        )
    if now.size == 0 and first.size != 0:
        what = "no rows" if now.shape[0] == 0 else "nothing in it"
        raise BatchError(
            f"{where} has {what} (shape {list(now.shape)}), expected one or more of each, as in the "
            f"first batch (shape {list(first.shape)}); leave empty batches out in the loader"
        )
    wanted, came = _kind(first.dtype), _kind(now.dtype)
    # Bools stand for 0 and 1 wherever numbers do; the other way round, ~mask would be wrong.
    if wanted != came and came != "bool":
        raise BatchError(
            f"{where} is of type {now.dtype}, a {came}, expected a {wanted} as in the first batch "
            f"({first.dtype}); {_FIX}, say by .astype('{first.dtype}')"
        )


def _kind(dtype: Any) -> str:
    if dtype == np.bool_:
        return "bool"
    for name, kind in (("whole number", np.integer), ("floating-point number", np.floating)):
        if jax.numpy.issubdtype(dtype, kind):
            return name
    return str(dtype)  # a random key


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray | jax.Array)


def _is_plain(value: Any) -> bool:
    return _is_array(value) or isinstance(value, dict | tuple | Static)


def _another(where: str, first: Any, now: Any) -> str:
    """The message about something that is of another class altogether."""
    hint = ""
    if _is_array(first) and isinstance(now, tuple):
        hint = ". Pad lists to one length, and make them one array with np.asarray(…)"
    return (
        f"{where} is {_described(now)}, expected {_described(first)} as in the first batch; "
        f"{_FIX}{hint}"
    )


def _described(value: Any) -> str:
    if _is_array(value):
        return f"an array of shape {list(value.shape)} and type {value.dtype}"
    if isinstance(value, Static):
        return "None" if value.value is None else f"the flag {value.value}"
    if isinstance(value, dict):
        return f"a dict with {', '.join(map(repr, value)) or 'no keys'}"
    if isinstance(value, tuple):
        kind = "tuple or list" if type(value) is tuple else type(value).__name__
        return f"a {kind} of {len(value)}"
    return f"a {type(value).__name__}"
