"""Where the numbers go: tensorboard files, written off the training thread."""

import os
import struct
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.summary_pb2 import Summary


def read_scalars(folder: str | os.PathLike[str]) -> dict[str, dict[int, float]]:
    """Reads the scalars of a ``log_dir``: tag → step → value; of a step written twice, the later.

    For plots and tests, without tensorboard itself. An unfinished last record is left out.
    """
    points: dict[str, dict[int, float]] = {}
    for path in sorted(Path(folder).glob("events.*")):
        data = path.read_bytes()
        start = 0
        while start + 12 <= len(data):
            (length,) = struct.unpack("<Q", data[start : start + 8])
            record = data[start + 12 : start + 12 + length]
            start += 12 + length + 4  # two checksums of four bytes
            if len(record) < length:
                break
            event = Event.FromString(record)
            for value in event.summary.value:
                points.setdefault(value.tag, {})[event.step] = value.simple_value
    return points


class MetricsWriter:
    """Writes one point of every tag a micro-batch.

    Args:
        writer: the writer, or None to write nothing.
    """

    def __init__(self, writer: SummaryWriter | None):
        self._writer: Any = writer
        self._thread = ThreadPoolExecutor(1) if writer is not None else None
        self._last: Any = None

    def write(self, step: int, tags: Sequence[str], values: np.ndarray) -> None:
        """Queues a point: `tags` and their `values` at `step`."""
        if self._thread is not None:
            self._last = self._thread.submit(self._write, step, tags, values)

    def _write(self, step: int, tags: Sequence[str], values: np.ndarray) -> None:
        points = [
            Summary.Value(tag=tag, simple_value=value)
            for tag, value in zip(tags, values.tolist(), strict=True)
        ]
        self._writer.file_writer.add_summary(Summary(value=points), step)

    def flush(self) -> None:
        """Waits until all that was queued is in the file."""
        if self._thread is not None and self._last is not None:
            self._last.result()
            self._writer.flush()

    def close(self) -> None:
        """Flushes and ends the thread; the writer stays open for the user."""
        self.flush()
        if self._thread is not None:
            self._thread.shutdown()
