"""Where the numbers go: tensorboard files, written off the training thread."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from tensorboardX import SummaryWriter
from tensorboardX.proto.summary_pb2 import Summary


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
