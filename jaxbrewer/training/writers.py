"""Who takes the numbers of a training: files in ``log_dir``, the user's own. `metrics` brings them."""

import contextlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple, Protocol

import numpy as np

from ..errors import told


class ScalarWriter(Protocol):
    """What ``train(…, writers=[…])`` takes: an object with these two methods.

    Both are called on a thread of their own, one call after the other, in the first of several
    processes. What `write` raises ends the run; it costs no checkpoint, and other writers nothing.
    """

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Takes the numbers of a micro-batch, or of the evaluation after it.

        Args:
            step: the micro-batch, from 0. It never falls within a run; one that goes on from a
                checkpoint begins there, and gives once more what was given after it.
            values: name → number: ``scalar/total_loss``, …; ``eval/accuracy``, …
        """

    def close(self) -> None:
        """Called once, when ``train`` ends, however it does; in every process.

        On the thread that called ``train``, where that ends before it has begun to train.
        """


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


def close_all(sinks: Iterable[Sink]) -> None:
    """Closes each sink."""
    for_each(sinks, lambda sink: sink.close())


class Given(Sink):
    """A writer of the user's. Once it has failed it is given nothing more, and closed."""

    def __init__(self, writer: ScalarWriter):
        self._writer = writer
        self._has_failed = self._is_closed = False

    def write(self, points: Sequence[Point]) -> None:
        """See `Sink.write`.

        Raises:
            RuntimeError: what the writer has raised.
        """
        for _, step, tags, values in points:
            if not self._has_failed:
                numbers = dict(zip(tags, values.tolist(), strict=True))
                self._call(f"at micro-batch {step}", self._writer.write, step, numbers)

    def close(self) -> None:
        """See `Sink.close`; may be called again."""
        if not self._is_closed:
            self._is_closed = True
            self._call("when it was closed", self._writer.close)

    def _call(self, when: str, method: Callable[..., object], *args: Any) -> None:
        try:
            method(*args)
        except Exception as error:
            self._has_failed = True
            name = type(self._writer).__name__
            raise RuntimeError(f"the writer {name} failed {when}: {told(error)}") from error


def given(writers: Sequence[ScalarWriter]) -> tuple[Given, ...]:
    """The sinks of the user's writers.

    Raises:
        TypeError: they are no list, or one of them cannot be called as a `ScalarWriter`.
    """
    if not isinstance(writers, list | tuple):
        kind = type(writers).__name__
        raise TypeError(f"writers is a {kind}; give a list of writers, writers=[MyWriter()]")
    for i, writer in enumerate(writers):
        _check(f"writers[{i}]", writer)
    return tuple(map(Given, writers))


def _check(name: str, writer: Any) -> None:
    if isinstance(writer, type):
        kind = writer.__name__
        raise TypeError(f"{name} is the class {kind}; give an object of it, {kind}(…)")
    kind = type(writer).__name__
    for method, arguments in (("write", ("step", "values")), ("close", ())):
        called, function = f"{method}({', '.join(arguments)})", getattr(writer, method, None)
        if not callable(function):
            raise TypeError(
                f"{name} is a {kind}, which has no method {called}; a writer has write(step, values) "
                "and close()"
            )
        try:
            signature = inspect.signature(function)
        except ValueError:  # of a function written in C, which does not tell
            continue
        try:
            signature.bind(*arguments)
        except TypeError as error:
            raise TypeError(
                f"{name} is a {kind}, whose {method}{signature} cannot be called as {called}: {error}"
            ) from error
