"""The way of the numbers, from the training thread to those who take them (see `writers`)."""

import time
from collections.abc import Iterable, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from .writers import Point, Sink, close_all, for_each

TOGETHER = 32  # points are written so many at a time,
LATEST = 1.0  # or after so many seconds,
FLUSH_EVERY = 10.0  # and are on disk after so many


class MetricsWriter:
    """Writes one point of every tag a micro-batch.

    The training thread only notes the points; some at a time, another thread writes them. What one
    sink raises keeps no point from the others.

    Args:
        sinks: where the points go, in this order; none: nothing is written.
    """

    def __init__(self, sinks: Iterable[Sink] = ()):
        self._sinks = tuple(sinks)
        self._thread = ThreadPoolExecutor(1) if self._sinks else None
        self._points: list[Point] = []
        self._writing: Future | None = None
        self._flushed = 0.0

    def write(self, step: int, tags: Sequence[str], values: np.ndarray) -> None:
        """Notes a point: `tags` and their `values` at `step`.

        Raises:
            OSError: points before it could not be written.
            RuntimeError: a writer of the user's has failed at one of them.
        """
        if self._thread is None:
            return
        now = time.time()
        self._points.append(Point(now, step, tags, values))
        if len(self._points) >= TOGETHER or now > self._points[0].time + LATEST:
            self._send(self._thread)

    def mark(self, checkpoint: int, step: int) -> None:
        """Marks what lies before ``gs{checkpoint}``, which stands at micro-step `step`."""
        for_each(self._sinks, lambda sink: sink.mark(f"gs{checkpoint}", step))

    def go_on(self, checkpoint: str, step: int, tags: Set[str]) -> None:
        """Purges what was written after the checkpoint that a run goes on from; see `Sink.go_on`."""
        for_each(self._sinks, lambda sink: sink.go_on(checkpoint, step, tags))

    def _send(self, thread: ThreadPoolExecutor) -> Future:
        before, self._writing = self._writing, None
        if before is not None:
            before.result()  # raises what went wrong, once, and lets no backlog grow
        points, self._points = self._points, []
        self._writing = thread.submit(self._write, points)
        return self._writing

    def _write(self, points: list[Point]) -> None:
        for_each(self._sinks, lambda sink: sink.write(points))
        if time.time() > self._flushed + FLUSH_EVERY:
            self._flush()
            self._flushed = time.time()

    def _flush(self) -> None:
        for_each(self._sinks, lambda sink: sink.flush())

    def flush(self) -> None:
        """Waits until all that was noted is on disk."""
        if self._thread is not None:
            self._send(self._thread).result()
            self._thread.submit(self._flush).result()

    def close(self) -> None:
        """Flushes, closes the sinks, and ends the thread."""
        if self._thread is None:
            return
        try:
            self.flush()
        finally:
            closing = self._thread.submit(close_all, self._sinks)
            self._thread.shutdown()
            closing.result()
