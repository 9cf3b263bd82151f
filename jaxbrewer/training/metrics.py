"""Where the numbers go: tensorboard files, written off the training thread."""

import os
import secrets
import struct
import time
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

TOGETHER = 32  # points are written so many at a time,
LATEST = 1.0  # or after so many seconds,
FLUSH_EVERY = 10.0  # and are on disk after so many
SETTLED_WITHIN = 10.0  # seconds that a writer's queue may take


def read_scalars(folder: str | os.PathLike[str]) -> dict[str, dict[int, float]]:
    """Reads the scalars of a ``log_dir``: tag → step → value; of a step written twice, the later.

    For plots and tests, without tensorboard itself. As there, a run that has started anew at a step
    purges what was written before of that step and later ones. An unfinished last record is left
    out.
    """
    points: dict[str, dict[int, float]] = {}
    for _, event in _standing(folder):
        for value in event.summary.value:
            points.setdefault(value.tag, {})[event.step] = value.simple_value
    return points


def _standing(folder: str | os.PathLike[str]) -> list[tuple[str, Event]]:
    """The events in a folder that no later start purges, in tensorboard's order, with their files."""
    standing: list[tuple[str, Event]] = []
    for path in sorted(Path(folder).glob("events.*")):
        for event in _read(path):
            if event.session_log.status == SessionLog.START:
                standing = [earlier for earlier in standing if earlier[1].step < event.step]
            elif event.WhichOneof("what") in ("summary", "session_log"):
                standing.append((path.name, event))
    return standing


def _read(path: Path) -> Iterator[Event]:
    data = path.read_bytes()
    start = 0
    while start + 12 <= len(data):
        (length,) = struct.unpack("<Q", data[start : start + 8])
        record = data[start + 12 : start + 12 + length]
        start += 12 + length + 4  # two checksums of four bytes
        if len(record) < length:
            return
        yield Event.FromString(record)


def _parted(
    events: list[tuple[str, Event]], checkpoint: str, step: int, tags: Set[str], current: str
) -> tuple[list[Event], list[Event]]:
    """What stands of the events once a run goes on from a checkpoint, and what does not.

    Args:
        events: those of `_standing`.
        checkpoint: its name.
        step: the micro-step at which it stands.
        tags: ours. Others count steps as they like: of those, what lies behind the checkpoint's
            mark goes.
        current: the file that is being written; what others have in it is of this run.
    """
    marks = [i for i, (_, e) in enumerate(events) if e.session_log.checkpoint_path == checkpoint]
    stands: list[Event] = []
    goes: list[Event] = []
    for i, (file, event) in enumerate(events):
        if any(value.tag in tags for value in event.summary.value):
            is_after = event.step >= step
        else:
            is_after = file != current and (i > marks[-1] if marks else event.step >= step)
        (goes if is_after else stands).append(event)
    return stands, goes


class EventWriter(SummaryWriter):
    """A `SummaryWriter` that writes over no other's file, its queue at work as soon as one is open.

    TensorboardX names files by the second, and one that was closed opens another when written to;
    a number makes their names differ. `MetricsWriter` passes the queue over, and a writer that is
    left open closes at exit by a last word through it: too late to start the queue's thread, for
    since Python 3.12 none is started then.
    """

    def _get_file_writer(self) -> Any:
        if self.file_writer is not None:
            return self.file_writer
        earlier = sum(1 for _ in Path(self.logdir).glob("events.*"))
        self._filename_suffix = f".{earlier:04}"
        writer = super()._get_file_writer()
        writer.add_event(Event())  # says nothing, and starts the thread
        return writer


class MetricsWriter:
    """Writes one point of every tag a micro-batch.

    The training thread only notes the points; some at a time, another thread writes them, straight
    into the writer's file: its own queue would pickle every point for one more thread.

    Args:
        writer: the writer, or None to write nothing.
    """

    def __init__(self, writer: SummaryWriter | None):
        self._writer: Any = writer
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
            log = SessionLog(status=SessionLog.CHECKPOINT, checkpoint_path=f"gs{checkpoint}")
            # Through the writer's queue, so that it stays behind the points that the user gave it.
            self._writer._get_file_writer().add_event(Event(session_log=log), step)

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
        events, current = _standing(self._writer.logdir), Path(file._file_name).name
        stands, goes = _parted(events, checkpoint, step, tags, current)
        if not goes:
            return
        first = min(event.step for event in goes)
        log = SessionLog(status=SessionLog.START)  # by which tensorboard purges all from there on
        file.write_event(Event(wall_time=time.time(), step=first, session_log=log))
        for event in stands:
            if event.step >= first:
                file.write_event(event)
        self._writer.flush()

    def _settle(self, path: Path) -> None:
        """Waits until what the user has given the writer's queue is in its file."""
        last = secrets.token_hex(16)
        log = SessionLog(msg=last)
        self._writer._get_file_writer().add_event(Event(session_log=log), 0)
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
            summary = Summary(
                value=[
                    Summary.Value(tag=tag, simple_value=value)
                    for tag, value in zip(tags, values.tolist(), strict=True)
                ]
            )
            file.write_event(Event(wall_time=wall_time, step=step, summary=summary))
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
