"""Several processes: what they tell each other before each step, so that none waits for ever.

Each process feeds its own part of a batch. Ahead of a step all announce what they have: a batch of
so many rows and such shapes, the end of the epoch, or a failure. From that all draw the same
conclusion: parts that fit are trained as they are; uneven ones are gathered, so that every process
holds the whole batch; an epoch ends when all are at its end; an error of one is an error of all.
"""

import contextlib
import json
import math
import secrets
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax._src import distributed
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ..data.batches import Batch, Whole, signature_of
from ..data.states import host_random
from ..data.streams import EpochEnd, Event, Micro, Position
from ..errors import BatchError
from .barrier import Barrier
from .placement import has_rows, rows_of

# How many batches ahead of the step processes announce what they have.
AHEAD = 2

_BATCH, _END, _OVER, _FAILED = range(4)


class Processes:
    """The processes of a run, and the ways in which they talk.

    Every method must be called by all processes, in the same order.

    Args:
        devices: the run's devices, those of a process next to each other.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        first = {d.process_index: d for d in reversed(devices)}
        self.count = len(first)
        self.rank = jax.process_index() if self.count > 1 else 0
        mesh = Mesh(np.array([first[i] for i in sorted(first)]), ("process",))
        self._parted = NamedSharding(mesh, PartitionSpec("process"))
        self._share = jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))

    def send(self, data: np.ndarray) -> Callable[[], np.ndarray]:
        """Sends an array of bytes, of one size for all; returns what waits for those of all."""
        if self.count == 1:
            return lambda: data[None]
        shared = self._share(jax.make_array_from_process_local_data(self._parted, data[None]))
        return lambda: np.asarray(shared.addressable_data(0))

    def numbers(self, *values: int) -> np.ndarray:
        """Every process's whole numbers: ``[processes, values]``."""
        sent = np.array(values, np.int64).view(np.uint8)
        return self.send(sent)().view(np.int64)

    def gather(self, data: bytes) -> list[bytes]:
        """Every process's bytes, of any length."""
        sizes = self.numbers(len(data))[:, 0]
        padded = np.zeros(max(int(sizes.max()), 1), np.uint8)
        padded[: len(data)] = np.frombuffer(data, np.uint8)
        return [row[:size].tobytes() for row, size in zip(self.send(padded)(), sizes, strict=True)]

    def objects(self, value: Any) -> list[Any]:
        """Every process's value, of what JSON can hold."""
        return [json.loads(text) for text in self.gather(json.dumps(value).encode())]

    def barrier(self) -> Barrier | None:
        """A meeting point for background threads, which may wait there while steps run."""
        if self.count == 1:
            return None
        name = f"jaxbrewer-{self.numbers(secrets.randbits(62))[0, 0]}"
        # The store by which `jax.distributed` brought the processes together; there is no public name.
        client = distributed.global_state.client
        return None if client is None else Barrier(client, self.count, self.rank, name)

    @contextlib.contextmanager
    def together(self, doing: str) -> Iterator[None]:
        """Ends when all processes have done something; where one failed, it fails in all.

        Raises:
            BatchError: another process failed; its own error is shown there.
        """
        try:
            yield
        except BaseException:
            self.numbers(1)
            raise
        failed = np.flatnonzero(self.numbers(0)[:, 0])
        if failed.size:
            raise BatchError(_failed(failed, doing))


def joined(
    events: Iterator[Event],
    processes: Processes,
    *,
    share: int,
    start: Position,
    like: Batch,
    asked: Callable[[], int] = lambda: 0,
) -> Iterator[Event]:
    """Joins this process's stream with those of the others.

    Where a process has run out of data before others, it takes part in the steps left with no rows
    of its own; an epoch's end comes to all at once.

    Args:
        events: this process's batches.
        processes: all processes.
        share: devices of a process; rows that do not divide by it are gathered.
        start: where this process's stream starts.
        like: a batch, whose structure those of all processes have.
        asked: the signal by which this process has been asked to stop, or 0; all are told, with the
            same batch.

    Yields:
        The events, a batch as it is where it fits, and as `Whole` where it was gathered.

    Raises:
        BatchError: processes disagree on a batch's shapes, or one has failed.
    """
    source = _Source(events, start)
    ahead: deque[tuple[_Turn, Callable[[], np.ndarray]]] = deque()
    while True:
        while len(ahead) <= AHEAD:
            turn = source.next()
            ahead.append((turn, processes.send(turn.header(asked()))))
        turn, sent = ahead.popleft()
        kinds, rows, digests, stops = sent().view(np.int64).T
        if (kinds == _FAILED).any():
            if turn.error is not None:
                raise turn.error
            raise BatchError(_failed(np.flatnonzero(kinds == _FAILED), "preparing a batch"))
        if (kinds != _BATCH).all():  # all are at the same end, and have said so ahead
            if (kinds == _OVER).any():
                return
            ahead.clear()
            source.go_on()
            yield EpochEnd(turn.micro.epoch, int(rows.max()))
            continue
        has = kinds == _BATCH
        if len(set(digests[has])) > 1:
            raise BatchError(_disagreement(processes, turn))
        fits = has.all() and len(set(rows)) == 1 and rows[0] % share == 0
        inputs = turn.inputs if fits else _whole(processes, turn, like)
        yield turn.micro._replace(inputs=inputs, stop=int(stops.max()))


class _Turn:
    """What this process has for one step: a batch, an end, or an error.

    Of an end, `micro` is the last batch taken.
    """

    def __init__(self, kind: int, micro: Micro, error: Exception | None = None):
        self.kind = kind
        self.micro = micro
        self.error = error
        self.inputs = jax.tree.map(np.asarray, micro.inputs) if kind == _BATCH else None
        self.rows = rows_of(self.inputs) if kind == _BATCH else 0

    def header(self, asked: int) -> np.ndarray:
        """The kind, the rows (at an end: batches in this epoch), a digest, and a signal, as bytes.

        The digest is of what must be the same in all processes.
        """
        count, digest = self.micro.batch + 1, 0
        if self.kind == _BATCH:
            count = self.rows
            structure = jax.tree.structure(self.inputs)
            digest = zlib.crc32(repr((structure, self.shapes())).encode())
            for leaf in jax.tree.leaves(self.inputs):
                if not has_rows(leaf, self.rows):
                    digest = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), digest)
        return np.array([self.kind, count, digest, asked], np.int64).view(np.uint8)

    def shapes(self) -> list:
        """Of every array: its type, whether it has rows, and its shape or that of a row."""
        shapes = []
        for leaf in jax.tree.leaves(self.inputs):
            rowed = has_rows(leaf, self.rows)
            shapes.append([str(leaf.dtype), rowed, list(leaf.shape[1:] if rowed else leaf.shape)])
        return shapes


class _Source:
    """This process's stream, which stands still at an end, or an error, until all know of it."""

    def __init__(self, events: Iterator[Event], start: Position):
        self._events = events
        self._still: _Turn | None = None
        self._last = Micro(start.epoch, start.batch - 1, None, host_random=host_random())

    def next(self) -> _Turn:
        """The next turn."""
        if self._still is not None:
            return self._still
        try:
            event = next(self._events, None)
            if isinstance(event, Micro):
                self._last = event._replace(host_random=host_random())
                return _Turn(_BATCH, self._last)
            if event is not None and event.epoch != self._last.epoch:
                self._last = self._last._replace(epoch=event.epoch, batch=-1)
            self._still = _Turn(_OVER if event is None else _END, self._last)
        except Exception as error:  # noqa: BLE001  whatever it is, it is raised when all know of it
            self._still = _Turn(_FAILED, self._last, error)
        return self._still

    def go_on(self) -> None:
        """Leaves an epoch's end."""
        self._still = None


def _whole(processes: Processes, turn: _Turn, like: Batch) -> Whole:
    """The rows of all processes, in their order, in every process."""
    batch = turn.inputs if turn.kind == _BATCH else like
    said = processes.objects([turn.rows, turn.shapes()])
    data = processes.gather(
        b"".join(np.ascontiguousarray(x).tobytes() for x in jax.tree.leaves(turn.inputs))
    )
    parts: list[list[np.ndarray]] = []
    rowed: list[bool] = []
    for (rows, shapes), buffer in zip(said, data, strict=True):
        if not rows:
            continue
        start, arrays = 0, []
        for dtype, has, shape in shapes:
            full = [rows, *shape] if has else shape
            count = math.prod(full)
            arrays.append(np.frombuffer(buffer, dtype, count, start).reshape(full))
            start += count * np.dtype(dtype).itemsize
        parts.append(arrays)
        rowed = [has for _, has, _ in shapes]
    leaves = [
        np.concatenate(each) if has else each[0]
        for each, has in zip(zip(*parts, strict=True), rowed, strict=True)
    ]
    return Whole(jax.tree.unflatten(jax.tree.structure(batch), leaves))


def _failed(ranks: np.ndarray, doing: str) -> str:
    names = ", ".join(map(str, ranks))
    return (
        f"process {names} failed while {doing}; its own error is in its output. All processes stop"
    )


def _disagreement(processes: Processes, turn: _Turn) -> str:
    mine = signature_of(turn.inputs) if turn.kind == _BATCH else "no batch"
    said = [text.decode() for text in processes.gather(mine.encode())]
    listed = "; ".join(f"process {i} has {text}" for i, text in enumerate(said))
    return (
        "the processes' batches do not fit together: "
        f"{listed}. Only the number of rows may differ (and arrays that all rows share must be the "
        "same everywhere): pad all to one length, or choose lengths by what all processes know"
    )
