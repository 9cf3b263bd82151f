"""Batches by length: short examples are not padded to the longest, in a bounded number of shapes."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

import jax
import numpy as np

from ..errors import BatchError, suggest

_MULTIPLE = 8  # chosen lengths are multiples of it


def bucket_by_length(
    examples: Iterable[Any] | Mapping[str, Any],
    batch_size: int,
    buckets: int | Sequence[int] = 8,
    *,
    padding: Mapping[str, float] | None = None,
    mask: str | None = None,
    shuffle: bool = True,
    seed: int = 0,
    drop_last: bool = False,
    num_replicas: int = 1,
    rank: int = 0,
) -> "BucketedLoader":
    """A loader whose batches hold examples of similar length, padded to the length of their bucket.

    Which fields are padded is found from the data: those whose length differs between examples, or,
    if there is none, the longest. An example's length is that of its longest padded field, and all
    its padded fields are padded to its bucket's length, along their first axis. Other fields are
    stacked as they are, numbers too.

    What does not fill a batch moves up to the next bucket, which it also fits, so that an epoch has
    one ragged batch at most, its last, of the longest bucket: one shape a bucket, and one more.

    Args:
        examples: dicts or tuples (nested at will) of lists, arrays and numbers, one an example; or
            a mapping of columns, as tokenizers return it. Read once, and kept in host memory.
        batch_size: examples a batch.
        buckets: the lengths, such as ``(16, 32, 64, 128)``; or how many, at most, to choose: those
            multiples of 8 that pad these examples least.
        padding: field → what it is padded with, 0 where it is not named: ``{'labels': -100}``.
            Fields inside others are named with a dot, those of a tuple by number: ``teacher.ids``.
        mask: adds a field of this name to the batches, dicts then: ``[batch, length]`` of int32, 1
            where the example is and 0 where its padding is. For examples without a mask.
        shuffle: draws an order of examples and of batches for each epoch; otherwise batches
            come shortest bucket first, examples in their order.
        seed: of the order, which depends on the seed and the epoch alone.
        drop_last: leaves the ragged batch out.
        num_replicas: processes that train together. All give the same examples and seed, and take
            their shares of the same batches, of ``num_replicas * batch_size`` examples in all.
        rank: which of them this is, from 0.

    Raises:
        BatchError: examples that cannot be batched together, named with their place; examples
            longer than the longest bucket.
        ValueError: an argument that cannot be meant.
    """
    for name, value in (("batch_size", batch_size), ("num_replicas", num_replicas)):
        if not _is_count(value):
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
    if rank not in range(num_replicas):
        raise ValueError(f"rank={rank!r}: expected a whole number from 0 to {num_replicas - 1}")
    columns, structure = _read(examples)
    lengths = _lengths(columns)
    chosen = _choose(lengths, buckets) if _is_count(buckets) else _given(buckets)
    _check_longest(lengths, chosen)
    _set_padding(columns, padding or {})
    if mask is not None:
        columns, structure = _add_mask(columns, structure, mask, lengths)
    if drop_last and len(lengths) < batch_size * num_replicas:
        raise ValueError(
            f"{len(lengths)} examples do not fill one batch of {batch_size * num_replicas}, and "
            "drop_last=True drops the rest: nothing is left. Lower batch_size, or set drop_last=False"
        )
    plan = _Plan(lengths, chosen, batch_size * num_replicas, seed if shuffle else None, drop_last)
    return BucketedLoader(columns, structure, plan, num_replicas, rank)


@dataclass
class _Column:
    """One field of all examples, end to end.

    Attributes:
        name: of the field.
        values: ``[sum of lengths, …]``; of single numbers, ``[examples]``.
        starts: ``[examples]``: where each example begins in `values`.
        sizes: ``[examples]``: each example's length; -1 for single numbers.
        padded: whether it is padded.
        fill: what with.
    """

    name: str
    values: np.ndarray
    starts: np.ndarray
    sizes: np.ndarray
    padded: bool = False
    fill: Any = 0

    def take(self, rows: np.ndarray, length: int) -> np.ndarray:
        """These examples, stacked; padded to `length` if the field is."""
        size = length if self.padded else int(self.sizes[0])
        if size < 0:
            return self.values[rows]
        places = np.arange(size)
        out = self.values.take(self.starts[rows, None] + places, axis=0, mode="clip")
        out[places >= self.sizes[rows, None]] = self.fill
        return out


class _Plan:
    """Which examples come together, in which order."""

    def __init__(
        self,
        lengths: np.ndarray,
        buckets: tuple[int, ...],
        batch_size: int,
        seed: int | None,
        drop_last: bool,
    ):
        self.lengths = lengths
        self.buckets = buckets
        self.batch_size = batch_size
        self.members = [
            np.flatnonzero((lengths > below) & (lengths <= length))
            for below, length in itertools.pairwise((-1, *buckets))
        ]
        self._seed = seed
        self._drop_last = drop_last

    def epoch(self, epoch: int) -> list[tuple[np.ndarray, int]]:
        """The batches: whose rows, and how long."""
        rng = None if self._seed is None else np.random.default_rng((self._seed, epoch))
        batches: list[tuple[np.ndarray, int]] = []
        rest = np.zeros(0, np.int64)
        for members, length in zip(self.members, self.buckets, strict=True):
            members = np.concatenate([rest, members])
            if rng is not None:
                members = rng.permutation(members)
            whole = len(members) // self.batch_size * self.batch_size
            batches += [(rows, length) for rows in members[:whole].reshape(-1, self.batch_size)]
            rest = members[whole:]
        if rng is not None:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        if len(rest) and not self._drop_last:
            longest = self.lengths.max()  # of all, or the shape would change between epochs
            batches.append((rest, next(b for b in self.buckets if b >= longest)))
        return batches


class BucketedLoader:
    """The batches of `bucket_by_length`; iterate it, or give it to ``train`` as the loader.

    Every pass is an epoch: the order is that of the epoch set last, the first if none was.
    ``train`` sets it, and a resumed run goes on at the batch where the checkpoint was saved.

    Attributes:
        buckets: the lengths.
        counts: examples of each bucket's own.
    """

    def __init__(
        self, columns: list[_Column], structure: Any, plan: _Plan, num_replicas: int, rank: int
    ):
        self.buckets = plan.buckets
        self.counts = tuple(len(members) for members in plan.members)
        self._columns = columns
        self._structure = structure
        self._plan = plan
        self._num_replicas = num_replicas
        self._rank = rank
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next pass."""
        self._epoch = epoch

    def __len__(self) -> int:
        """Batches in an epoch: the same in all."""
        return len(self._batches())

    def __iter__(self) -> Iterator[Any]:
        for rows, length in self._batches():
            fields = [column.take(rows, length) for column in self._columns]
            yield jax.tree.unflatten(self._structure, fields)

    @property
    def order(self) -> np.ndarray:
        """The example number of each row of the next pass, batch after batch: ``[rows]``."""
        return np.concatenate([rows for rows, _ in self._batches()])

    def _batches(self) -> list[tuple[np.ndarray, int]]:
        """This process's share of each batch; of a small last one there may be none."""
        batches = self._plan.epoch(self._epoch)
        shares = [
            (np.array_split(rows, self._num_replicas)[self._rank], length)
            for rows, length in batches
        ]
        return [(rows, length) for rows, length in shares if len(rows)]

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """The ``(examples, length)`` of the batches there are: what a step is compiled for."""
        return tuple(sorted({(len(rows), length) for rows, length in self._batches()}))

    @property
    def fullness(self) -> float:
        """The share of the epoch's padded positions that hold an example."""
        batches = self._plan.epoch(self._epoch)
        real = sum(int(self._plan.lengths[rows].sum()) for rows, _ in batches)
        return real / max(sum(len(rows) * length for rows, length in batches), 1)

    def __repr__(self) -> str:
        lengths = ", ".join(map(str, self.buckets))
        return (
            f"<{sum(self.counts)} examples in {len(self)} batches of {self._plan.batch_size}, of "
            f"the lengths {lengths}; {self.fullness:.0%} of the positions are used>"
        )


def _is_count(value: Any) -> TypeGuard[int]:
    is_whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
    return is_whole and int(value) >= 1


# ------------------------------------------------------------------------------- reading examples


def _read(examples: Any) -> tuple[list[_Column], Any]:
    """The examples by column, and how a batch is put together from its columns."""
    if isinstance(examples, Mapping):
        named, structure = _flatten(examples, dict)
        fields = {name: list(column) for name, column in named}
        sizes = {name: len(column) for name, column in fields.items()}
        if len(set(sizes.values())) > 1:
            raise BatchError(f"the columns hold different numbers of examples: {sizes}")
        count = next(iter(sizes.values()), 0)
    else:
        fields, structure, count = _by_field(examples)
    if not fields or not count:
        raise BatchError("there are no examples")
    return [_column(name, values) for name, values in fields.items()], structure


def _by_field(examples: Iterable[Any]) -> tuple[dict[str, list], Any, int]:
    fields: dict[str, list] = {}
    structure, count = None, 0
    for count, example in enumerate(examples, 1):
        if not isinstance(example, Mapping | tuple):
            raise BatchError(
                f"example {count - 1} is a {type(example).__name__}; expected a dict of fields, or "
                "a tuple of them"
            )
        named, mine = _flatten(example, dict | tuple)
        if structure is None:
            structure, fields = mine, {name: [] for name, _ in named}
        if mine != structure:
            raise BatchError(
                f"example {count - 1} has the fields {[name for name, _ in named]}, the first has "
                f"{list(fields)}; all must have the same"
            )
        for name, value in named:
            fields[name].append(value)
    return fields, structure, count


def _flatten(example: Any, containers: Any) -> tuple[list[tuple[str, Any]], Any]:
    """Name and value of each field, and the structure they stand in."""
    leaves, structure = jax.tree_util.tree_flatten_with_path(
        _plain(example), is_leaf=lambda x: not isinstance(x, containers)
    )
    name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")
    return [(name(path), value) for path, value in leaves], structure


def _plain(value: Any) -> Any:
    """Any mapping as a dict, which JAX knows."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return tuple(map(_plain, value)) if isinstance(value, tuple) else value


def _column(name: str, values: list) -> _Column:
    arrays = [_array(name, i, value) for i, value in enumerate(values)]
    inner = {array.shape[1:] if array.ndim else None for array in arrays}
    if len(inner) > 1:
        raise BatchError(
            f"the field {name!r} has the shapes {sorted({a.shape for a in arrays}, key=str)[:4]}; "
            "examples may differ along the first axis only"
        )
    if inner == {None}:
        sizes = np.full(len(arrays), -1)
        return _Column(name, np.stack(arrays), np.arange(len(arrays)), sizes)
    sizes = np.array([len(array) for array in arrays])
    starts = np.cumsum(sizes) - sizes
    full = [array for array in arrays if array.size] or arrays[:1]  # [] would be float64
    return _Column(name, np.concatenate(full), starts, sizes)


def _array(name: str, i: int, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise BatchError(
            f"the field {name!r} of example {i} is a list of lists of different lengths; only the "
            "first axis may differ between examples"
        ) from error
    if array.dtype.kind in "biuf" or str(array.dtype) == "bfloat16":
        return array
    raise BatchError(
        f"the field {name!r} of example {i} holds {array.dtype} ({str(value)[:40]!r}); expected "
        "numbers. Tokenise it, or leave it out"
    )


# --------------------------------------------------------------------------- lengths and buckets


def _lengths(columns: list[_Column]) -> np.ndarray:
    """Each example's length; marks the columns that are padded."""
    varying = [column for column in columns if column.sizes.min() != column.sizes.max()]
    if not varying:
        longest = max(int(column.sizes[0]) for column in columns)
        varying = [column for column in columns if int(column.sizes[0]) == longest]
        if longest < 1:
            raise BatchError(
                f"no field of the examples has a length: {[c.name for c in columns]} hold single "
                "numbers or empty lists; expected at least one list or array"
            )
    for column in varying:
        column.padded = True
    return np.max([column.sizes for column in varying], axis=0)


def _given(buckets: Any) -> tuple[int, ...]:
    wanted = "expected lengths in rising order, such as (16, 32, 64), or how many to choose"
    if isinstance(buckets, str) or not isinstance(buckets, Sequence | np.ndarray):
        raise ValueError(f"buckets={buckets!r}: {wanted}")
    chosen = tuple(buckets)
    rising = all(a < b for a, b in itertools.pairwise(chosen))
    if not (chosen and all(map(_is_count, chosen)) and rising):
        raise ValueError(f"buckets={buckets!r}: {wanted}")
    return tuple(int(length) for length in chosen)


def _choose(lengths: np.ndarray, most: int) -> tuple[int, ...]:
    """The multiples of 8, at most so many, that pad these lengths least.

    Exact: ``cost[k][j]``, the positions of all examples up to the j-th length in k buckets, is the
    least over i of ``cost[k - 1][i]`` and the examples between in one bucket of the j-th length.
    """
    rounded = np.maximum(-(-lengths // _MULTIPLE) * _MULTIPLE, _MULTIPLE)
    ends, counts = np.unique(rounded, return_counts=True)
    below = np.concatenate([[0], np.cumsum(counts)])
    cost = below[1:] * ends  # one bucket for all
    cuts: list[np.ndarray] = []
    for _ in range(min(most, len(ends)) - 1):
        # [j, i]: the last bucket holds the lengths i + 1 … j
        options = cost[None, :] + (below[1:, None] - below[None, 1:]) * ends[:, None]
        options = np.where(np.tri(len(ends), k=-1, dtype=bool), options, np.iinfo(np.int64).max)
        best = options.argmin(axis=1)
        fewer = np.minimum(options[np.arange(len(ends)), best], cost)
        cuts.append(np.where(fewer < cost, best, -1))
        cost = fewer
    chosen, last = [], len(ends) - 1
    for best in reversed(cuts):
        if best[last] >= 0:
            chosen.append(int(ends[last]))
            last = int(best[last])
    return tuple(sorted([*chosen, int(ends[last])]))


def _check_longest(lengths: np.ndarray, buckets: tuple[int, ...]) -> None:
    too_long = np.flatnonzero(lengths > buckets[-1])
    if len(too_long):
        first, longest = int(too_long[0]), int(lengths.max())
        others = f", and {len(too_long) - 1} more are too long" if len(too_long) > 1 else ""
        raise BatchError(
            f"example {first} has length {lengths[first]}, and the longest bucket is "
            f"{buckets[-1]}{others}. Truncate them when tokenising (max_length={buckets[-1]}), or "
            f"add a bucket of {longest}"
        )


def _set_padding(columns: list[_Column], padding: Mapping[str, float]) -> None:
    named = {column.name: column for column in columns}
    for name, fill in padding.items():
        if name not in named:
            raise ValueError(f"padding names no field {name!r}: {suggest(name, named)}")
        column = named[name]
        if not column.padded:
            raise ValueError(
                f"padding names the field {name!r}, which is not padded: it has the same length "
                f"in all examples. The padded ones are {[c.name for c in columns if c.padded]}"
            )
        if not _holds(column.values.dtype, fill):
            raise ValueError(
                f"padding={{{name!r}: {fill!r}}}: the field holds {column.values.dtype}, which "
                "has no such number"
            )
        column.fill = fill


def _holds(dtype: np.dtype, number: Any) -> bool:
    if not isinstance(number, bool | int | float | np.number):
        return False
    with np.errstate(invalid="ignore"):  # NaN as a whole number
        return dtype.kind in "fV" or bool(np.array(number).astype(dtype) == number)


def _add_mask(
    columns: list[_Column], structure: Any, name: str, lengths: np.ndarray
) -> tuple[list[_Column], Any]:
    example = jax.tree.unflatten(structure, columns)
    if not isinstance(example, dict) or name in example:
        have = list(example) if isinstance(example, dict) else "no names: they are tuples"
        raise ValueError(f"mask={name!r} would add that field, but the examples have {have}")
    ones, starts = np.ones(lengths.sum(), np.int32), np.cumsum(lengths) - lengths
    example[name] = _Column(name, ones, starts, lengths, padded=True)
    return jax.tree.flatten(example, is_leaf=lambda x: isinstance(x, _Column))
