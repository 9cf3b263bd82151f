"""Who takes the numbers of a training: the files in ``log_dir``. `metrics` brings them."""

import contextlib
from collections.abc import Callable, Iterable, Sequence, Set
from typing import NamedTuple

import numpy as np


class Point(NamedTuple):
    """Numbers of one micro-batch.

    Attributes:
        time: when they were noted, in seconds since 1970.
        step: the micro-batch, from 0.
        tags: their names.
        values: a number for each name.
    """

    time: float
    step: int
    tags: Sequence[str]
    values: np.ndarray


class Sink:
    """A place where points go. All but `write` may be left out."""

    def write(self, points: Sequence[Point]) -> None:
        """Takes points, in the order in which they were noted."""
        raise NotImplementedError

    def flush(self) -> None:
        """Sees to it that what was written is on disk."""

    def mark(self, checkpoint: str, step: int) -> None:
        """Notes what lies before a checkpoint of this name, which stands at micro-step `step`."""

    def go_on(self, checkpoint: str, step: int, tags: Set[str]) -> None:
        """Purges what was written after the checkpoint that a run goes on from.

        Args:
            checkpoint: its name: ``gs12``.
            step: the micro-step at which it stands.
            tags: those of ours of which nothing before it is written anew.
        """

    def close(self) -> None:
        """Ends; nothing is written afterwards."""


def for_each(sinks: Iterable[Sink], do: Callable[[Sink], None]) -> None:
    """Does something with each sink in turn; what one raises is raised once all had their turn."""
    with contextlib.ExitStack() as stack:
        for sink in reversed(tuple(sinks)):
            stack.callback(do, sink)
