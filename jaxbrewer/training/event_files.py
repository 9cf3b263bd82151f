"""Tensorboard's files. Whoever imports this imports tensorboardX, and with it torch where that is."""

import os
import secrets
import struct
import time
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.summary_pb2 import Summary

from .writers import Point, Sink

SETTLED_WITHIN = 10.0  # seconds that a writer's queue may take


def read_scalars(folder: str | os.PathLike[str]) -> dict[str, dict[int, float]]:
    """Reads the scalars of a ``log_dir``: tag → step → value; of a step written twice, the later.

    For plots and tests, without tensorboard itself. As there, a run that has started anew at a step
    purges what was written before of that step and later ones. An unfinished last record is left
    out.
    """
    points: dict[str, dict[int, float]] = {}
    for _, event in standing(folder):
        for value in event.summary.value:
            points.setdefault(value.tag, {})[event.step] = value.simple_value
    return points


def standing(folder: str | os.PathLike[str]) -> list[tuple[str, Event]]:
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


def parted(
    events: list[tuple[str, Event]], checkpoint: str, step: int, tags: Set[str], current: str
) -> tuple[list[Event], list[Event]]:
    """What stands of the events once a run goes on from a checkpoint, and what does not.

    Args:
        events: those of `standing`.
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
    a number makes their names differ. `Tensorboard` passes the queue over, and a writer that is
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


class Tensorboard(Sink):
    """Writes into a writer's file, beside what its user writes.

    Straight into it: the writer's public methods would write every tag for itself, pickle it for one
    more thread, and could neither purge nor say what is on disk before a checkpoint is.

    Args:
        writer: stays its user's to close.
    """

    def __init__(self, writer: SummaryWriter):
        self._writer = writer

    @property
    def _file(self) -> Any:
        """The file; where the user's callback has closed the writer, this opens it again."""
        return self._writer._get_file_writer().event_writer._ev_writer

    def write(self, points: Sequence[Point]) -> None:
        """See `Sink.write`."""
        file = self._file
        for time_, step, tags, values in points:
            file.write_event(point(time_, step, tags, values.tolist()))

    def flush(self) -> None:
        """See `Sink.flush`."""
        self._writer.flush()

    def mark(self, checkpoint: str, step: int) -> None:
        """See `Sink.mark`."""
        # Through the writer's queue, so that it stays behind the points that the user gave it.
        self._writer._get_file_writer().add_event(mark(checkpoint), step)

    def go_on(self, checkpoint: str, step: int, tags: Set[str]) -> None:
        """See `Sink.go_on`. By the record that tensorboard has for that."""
        file = self._file
        self._settle(Path(file._file_name))
        events, current = standing(self._writer.logdir), Path(file._file_name).name
        stands, goes = parted(events, checkpoint, step, tags, current)
        if not goes:
            return
        first = min(event.step for event in goes)
        file.write_event(start(time.time(), first))
        for event in stands:
            if event.step >= first:
                file.write_event(event)
        self._writer.flush()

    def _settle(self, path: Path) -> None:
        """Waits until what the user has given the writer's queue is in its file."""
        last = secrets.token_hex(16)
        self._writer._get_file_writer().add_event(word(last), 0)
        deadline = time.time() + SETTLED_WITHIN
        while last.encode() not in path.read_bytes() and time.time() < deadline:
            time.sleep(0.002)
            self._writer.flush()


def point(wall_time: float, step: int, tags: Sequence[str], values: Sequence[float]) -> Event:
    """A point of every tag."""
    pairs = zip(tags, values, strict=True)
    summary = Summary(value=[Summary.Value(tag=tag, simple_value=value) for tag, value in pairs])
    return Event(wall_time=wall_time, step=step, summary=summary)


def mark(checkpoint: str) -> Event:
    """What stands between the points before a checkpoint and those after it."""
    return Event(session_log=SessionLog(status=SessionLog.CHECKPOINT, checkpoint_path=checkpoint))


def start(wall_time: float, step: int) -> Event:
    """By which tensorboard purges all that was written of this step and later ones."""
    return Event(wall_time=wall_time, step=step, session_log=SessionLog(status=SessionLog.START))


def word(text: str) -> Event:
    """A word that no reader shows."""
    return Event(session_log=SessionLog(msg=text))
