"""What a loader yields → what the step takes: a dict or tuple of arrays this program owns."""

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from ..errors import BatchError

Batch = Any

_KEPT = {"i": (-(2**31), 2**31 - 1), "u": (0, 2**32 - 1)}  # what 32 bits hold


@jax.tree_util.register_static
class Static:
    """A flag or None in a batch: part of the compiled program, not one of its inputs."""

    def __init__(self, value: bool | None):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Static) and self.value is other.value

    def __hash__(self) -> int:
        return hash(self.value)


class Served(NamedTuple):
    """A batch that brings the teacher's results along; see `caching`.

    Attributes:
        student: the student's batch.
        results: the teacher's results, as `adaptors.freeze` gives them.
    """

    student: Any
    results: Any


class Whole(NamedTuple):
    """A batch that every process holds whole, where it would hold its own part; see `processes`."""

    batch: Any


def own(batch: Any) -> Batch:
    """Copies a batch into arrays nobody else writes to.

    A loader may reuse its buffers while the step still reads, since arguments of a compiled
    function can share memory with numpy arrays; so numpy and torch arrays are copied, into this
    machine's byte order. JAX arrays are immutable and pass as they are.

    Args:
        batch: a mapping (any kind, `BatchEncoding` too), a tuple or a list, nested at will, of
            numpy, JAX or torch arrays, numbers, flags or None. Other classes that JAX knows as
            pytrees, such as a model's outputs, may stand inside and are kept.

    Raises:
        BatchError: for anything else, naming the place in the batch.
    """
    if not isinstance(batch, dict | tuple | list | Mapping):
        raise BatchError(
            f"a batch must be a dict (model(**batch)) or a tuple (model(*batch)); the loader gave "
            f"{_describe(batch)}. For a single array, yield the tuple (array,)"
        )
    if not batch:
        raise BatchError("the loader gave an empty batch, with no inputs for the model")
    if isinstance(batch, Mapping) and any(not isinstance(key, str) for key in batch):
        raise BatchError(
            f"a batch that is a dict names the model's inputs, but has the keys {list(batch)}"
        )
    try:
        return _own(batch, ())
    except RecursionError as error:
        raise BatchError("the batch is nested without end: does a list hold itself?") from error


def _own(value: Any, path: tuple) -> Any:
    kind = type(value)  # the usual kinds first: this runs for every array of every batch
    if kind is np.ndarray and value.dtype.kind in "biuf":
        _check_range(value, path)
        return _native(value)
    if kind is dict or isinstance(value, Mapping):
        return {k: _own(v, (*path, k)) for k, v in value.items()}
    if isinstance(value, tuple | list):
        if isinstance(value, list) and path:
            _check_no_numbers(value, path)
        items = [_own(v, (*path, i)) for i, v in enumerate(value)]
        return kind(*items) if hasattr(value, "_fields") else tuple(items)
    if value is None or isinstance(value, bool):
        return Static(value)
    if isinstance(value, jax.Array):
        return _checked(value, path)
    if hasattr(value, "detach") and hasattr(value, "cpu"):  # a torch tensor, torch not imported
        return _from_torch(value, path)
    if isinstance(value, np.ndarray | np.generic | int | float):
        array = np.asarray(value)
        _check_range(array, path)
        if array.dtype.kind in "biufV" and array.dtype.type is not np.void:  # V: bfloat16
            return _native(array)
    if not jax.tree_util.all_leaves([value]):
        parts, structure = jax.tree_util.tree_flatten(value, is_leaf=lambda x: x is not value)
        parts = [_own(v, (*path, i)) for i, v in enumerate(parts)]
        return jax.tree_util.tree_unflatten(structure, parts)
    raise BatchError(_cannot_go(value, path))


def _check_no_numbers(value: list, path: tuple) -> None:
    """Refuses a list of numbers, or of lists of them: each number would be an input of its own."""
    rows = [x for x in value if type(x) is list] or [value]
    if not all(type(x) in (int, float) for row in rows for x in row[:2]) or not any(rows):
        return
    lengths = sorted({len(row) for row in rows})
    if rows[0] is value or len(lengths) == 1:
        raise BatchError(
            f"{place(path)} is a list of numbers, expected one array: np.asarray({place(path)}), in the "
            "loader or with train(…, batch_postprocessor=…)"
        )
    raise BatchError(
        f"{place(path)} is a list of {len(rows)} lists of {lengths[0]} to {lengths[-1]} numbers, expected "
        "one array [batch, length]: pad them to one length in the loader (tokenizer(…, padding=True, "
        "return_tensors='np'), or jaxbrewer.data.bucket_by_length for whole data sets) or with "
        "train(…, batch_postprocessor=…)"
    )


def _cannot_go(value: Any, path: tuple, why: str = "") -> str:
    return (
        f"{place(path)} is {_describe(value)}, which cannot go to the device{why}. Batches hold "
        "numbers; drop or convert it in the loader or with train(…, batch_postprocessor=…)"
    )


def _checked(value: jax.Array, path: tuple) -> jax.Array:
    """A JAX array, if a step can read it."""
    if value.is_deleted():
        raise BatchError(
            f"{place(path)} is {_describe(value)} that was deleted: a function it was donated to "
            "owns it now. Give a copy, or do not donate it"
        )
    if jax.numpy.issubdtype(value.dtype, np.complexfloating):
        raise BatchError(_cannot_go(value, path))
    return value


def _from_torch(value: Any, path: tuple) -> np.ndarray:
    try:
        tensor = value.detach().cpu()
        half = str(tensor.dtype) == "torch.bfloat16"  # numpy has no such type of its own
        array = (tensor.float() if half else tensor).numpy()
    except (TypeError, RuntimeError) as error:  # sparse, quantized, without data
        first = str(error).partition("\n")[0]
        raise BatchError(_cannot_go(value, path, f" ({first})")) from error
    if array.dtype.kind not in "biuf":
        raise BatchError(_cannot_go(value, path))
    _check_range(array, path)
    return array.astype(jax.numpy.bfloat16) if half else array.copy()


def _native(array: np.ndarray) -> np.ndarray:
    """A copy in this machine's byte order: a compiled function reads every array as if in it."""
    return (
        array.copy() if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="), "C")
    )


def place(path: tuple) -> str:
    """A place in a batch, in words: ``batch['labels'][0]``."""
    return "batch" + "".join(f"[{step!r}]" for step in path)


def _check_range(array: np.ndarray, path: tuple) -> None:
    """Refuses integers that would lose their upper half where JAX has no 64 bits."""
    if array.dtype.itemsize < 8 or array.dtype.kind not in "iu":
        return
    if not array.size or getattr(jax.config, "jax_enable_x64"):  # noqa: B009  not in its stub
        return
    low, high = int(array.min()), int(array.max())
    least, most = _KEPT[array.dtype.kind]
    if low < least or high > most:
        raise BatchError(
            f"{place(path)} holds {low if low < least else high}, which does not fit the 32 bits "
            "JAX keeps of an integer. Drop it in the loader or with train(…, batch_postprocessor=…), "
            "or turn jax_enable_x64 on"
        )


def _describe(value: Any) -> str:
    if isinstance(value, np.ndarray | jax.Array) or hasattr(value, "detach"):
        return f"an array of shape {tuple(value.shape)} and type {value.dtype}"
    text = repr(value)
    return f"a {type(value).__name__} ({text if len(text) <= 40 else text[:37] + '…'})"


def plain(batch: Batch) -> Batch:
    """Opens the `Static` flags, for use inside the step."""
    return jax.tree.map(
        lambda x: x.value if isinstance(x, Static) else x,
        batch,
        is_leaf=lambda x: isinstance(x, Static),
    )


def sides(batch: Batch) -> tuple[Batch, Batch, Any]:
    """Splits a batch into the teacher's part, the student's, and cached teacher outputs if any.

    A dict with both ``'teacher'`` and ``'student'`` feeds each side its own part, and may carry
    the teacher's outputs as ``'teacher_cache'``; any other batch feeds both.
    """
    if isinstance(batch, Served):
        return None, batch.student, batch.results
    if isinstance(batch, dict) and "teacher" in batch and "student" in batch:
        return batch["teacher"], batch["student"], batch.get("teacher_cache")
    return batch, batch, None


def as_call(batch: Batch, args: Mapping[str, Any]) -> tuple[tuple, dict]:
    """Turns a batch into positional and keyword arguments of the model."""
    if isinstance(batch, dict):
        return (), {**batch, **args}
    if isinstance(batch, tuple):
        return tuple(batch), dict(args)
    return (batch,), dict(args)


def check_ids(
    batch: Batch, signature: inspect.Signature, limits: Mapping[str, int], role: str
) -> None:
    """Checks, on the host, that ids lie inside the tables they look up.

    An id outside does not raise on a device: it gives NaN or another row. JAX arrays in host memory
    are looked at as they lie; those on another device are not, which would wait for it.

    Raises:
        BatchError: naming the input, the id and the limit.
    """
    if not limits:
        return
    if isinstance(batch, dict):
        named = batch
    else:
        named = dict(zip(signature.parameters, as_call(batch, {})[0], strict=False))
    for name, limit in limits.items():
        for part in jax.tree.leaves(named.get(name)):  # one array, or a tuple of them
            _check_ids(name, _on_host(part), limit, role)


def _check_ids(name: str, ids: np.ndarray | None, limit: int, role: str) -> None:
    if ids is None or not ids.size:
        return
    if ids.dtype.kind == "b":
        raise BatchError(
            f"{name} is {_describe(ids)}, but {role} looks whole numbers up by it; is it a mask?"
        )
    if ids.dtype.kind in "iu" and not _all_below(ids, limit):
        low, high = int(ids.min()), int(ids.max())
        raise BatchError(
            f"{name} holds {low if low < 0 else high}, but {role} knows ids 0 to {limit - 1}. "
            "Is the batch tokenised with this model's vocabulary? Padding must be a real id too"
        )


def _all_below(ids: np.ndarray, limit: int) -> bool:
    """Whether whole numbers are all from 0 to below a limit; seen without a sign, -1 is large."""
    if ids.dtype.kind == "u":
        return bool(ids.max() < limit)
    size = ids.dtype.itemsize
    return bool(ids.view(f"u{size}").max() < min(limit, 1 << (8 * size - 1)))


def _on_host(value: Any) -> np.ndarray | None:
    """An array of numbers that can be looked at without waiting for an accelerator, or None."""
    if isinstance(value, np.ndarray):
        return value
    if not isinstance(value, jax.Array) or not value.is_fully_addressable:
        return None
    if any(device.platform != "cpu" for device in value.devices()):
        return None
    return np.asarray(value) if getattr(value.dtype, "kind", "") in "biu" else None


def signature_of(batch: Batch) -> str:
    """Describes a batch by shapes, for messages: ``input_ids int32[8,128], …``."""
    leaves = jax.tree_util.tree_flatten_with_path(batch)[0]
    return ", ".join(
        f"{jax.tree_util.keystr(path, simple=True, separator='.')} {leaf.dtype}{list(leaf.shape)}"
        for path, leaf in leaves
    )
