"""Where the numbers go: tensorboard files (see `event_files`), written off the training thread."""

import secrets
import time
from collections.abc import Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

TOGETHER = 32  # points are written so many at a time,
LATEST = 1.0  # or after so many seconds,
FLUSH_EVERY = 10.0  # and are on disk after so many
SETTLED_WITHIN = 10.0  # seconds that a writer's queue may take


class MetricsWriter:
    """Writes one point of every tag a micro-batch.

    The training thread only notes the points; some at a time, another thread writes them, straight
    into the writer's file: its own queue would pickle every point for one more thread.

    Args:
        writer: an `event_files.EventWriter`, or None to write nothing.
    """

    def __init__(self, writer: Any):
        self._writer = writer
        if writer is not None:
            from . import event_files  # only who writes waits for its imports

            self._files = event_files
        self._thread = ThreadPoolExecutor(1) if writer is not None else None
        self._points: list[tuple[float, int, Sequence[str], np.ndarray]] = []
        self._writing: Future | None = None
        self._flushed = 0.0

    def write(self, step: int, tags: Sequence[str], values: np.ndarray) -> None:
        """Notes a point: `tags` and their `values` at `step`.

        Raises:
            OSError: points before it could not be written.
        """
        if self._thread is None:
            return
        now = time.time()
        self._points.append((now, step, tags, values))
        if len(self._points) >= TOGETHER or now > self._points[0][0] + LATEST:
            self._send(self._thread)

    def mark(self, checkpoint: int, step: int) -> None:
        """Marks in the file what lies before ``gs{checkpoint}``, which stands at micro-step `step`."""
        if self._writer is not None:
            # Through the writer's queue, so that it stays behind the points that the user gave it.
            mark = self._files.mark(f"gs{checkpoint}")
            self._writer._get_file_writer().add_event(mark, step)

    def go_on(self, checkpoint: str, step: int, tags: Set[str]) -> None:
        """Purges what was written after the checkpoint that a run goes on from.

        Args:
            checkpoint: its name: ``gs12``.
            step: the micro-step at which it stands.
            tags: those that `write` will be given.
        """
        if self._writer is None:
            return
        file = self._writer._get_file_writer().event_writer._ev_writer
        self._settle(Path(file._file_name))
        events, current = self._files.standing(self._writer.logdir), Path(file._file_name).name
        stands, goes = self._files.parted(events, checkpoint, step, tags, current)
        if not goes:
            return
        first = min(event.step for event in goes)
        file.write_event(self._files.start(time.time(), first))
        for event in stands:
            if event.step >= first:
                file.write_event(event)
        self._writer.flush()

    def _settle(self, path: Path) -> None:
        """Waits until what the user has given the writer's queue is in its file."""
        last = secrets.token_hex(16)
        self._writer._get_file_writer().add_event(self._files.word(last), 0)
        deadline = time.time() + SETTLED_WITHIN
        while last.encode() not in path.read_bytes() and time.time() < deadline:
            time.sleep(0.002)
            self._writer.flush()

    def _send(self, thread: ThreadPoolExecutor) -> Future:
        if self._writing is not None:
            self._writing.result()  # raises what went wrong, and lets no backlog grow
        points, self._points = self._points, []
        self._writing = thread.submit(self._write, points)
        return self._writing

    def _write(self, points: list[tuple[float, int, Sequence[str], np.ndarray]]) -> None:
        # Where the user's callback has closed the writer, this opens it again.
        file = self._writer._get_file_writer().event_writer._ev_writer
        for wall_time, step, tags, values in points:
            file.write_event(self._files.point(wall_time, step, tags, values.tolist()))
        if time.time() > self._flushed + FLUSH_EVERY:
            self._writer.flush()
            self._flushed = time.time()

    def flush(self) -> None:
        """Waits until all that was noted is in the file."""
        if self._thread is not None:
            self._send(self._thread).result()
            self._writer.flush()

    def close(self) -> None:
        """Flushes and ends the thread; the writer stays open for the user."""
        try:
            self.flush()
        finally:
            if self._thread is not None:
                self._thread.shutdown()
