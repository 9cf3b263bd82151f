"""The order in which batches reach the step: by epochs or by steps, from any position.

A stream yields `Micro` for every batch and `EpochEnd` after an epoch of a run by epochs, where
an incomplete accumulation window is dropped. Distillers differ by stream, not by loop.
"""

import itertools
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from ..errors import BatchError
from .batches import own


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        epoch: epochs finished.
        batch: batches taken in the current one.
        global_step: optimizer steps done.
        micro_step: micro-batches trained on, in dropped windows too.
        host_random: Python's and numpy's global random states, or None.
    """

    epoch: int = 0
    batch: int = 0
    global_step: int = 0
    micro_step: int = 0
    host_random: Any = None


class Micro(NamedTuple):
    """A batch: the `batch`-th (from 0) of `epoch` (from 0), of a task where there are several.

    `host_random` is the random state just after it was drawn, where more were drawn since. `stop` says
    that one of several processes has been asked to stop.
    """

    epoch: int
    batch: int
    inputs: Any
    task: str = ""
    host_random: Any = None
    stop: bool = False


class EpochEnd(NamedTuple):
    """The end of `epoch`, which had `batches` batches."""

    epoch: int
    batches: int


Event = Micro | EpochEnd


def by_epochs(loader: Iterable, epochs: int, start: Position) -> Iterator[Event]:
    """Passes over the loader `epochs` times, or what is left of that after `start`."""
    for epoch in range(start.epoch if _can_jump(loader) else 0, epochs):
        batches = yield from _one_epoch(loader, epoch, start)
        if epoch == start.epoch and batches < start.batch:
            raise BatchError(
                f"the checkpoint was saved after batch {start.batch} of an epoch, but the loader "
                f"has only {batches}; resume with the loader it was saved with"
            )
        if epoch >= start.epoch:
            yield EpochEnd(epoch, batches)


def by_steps(loader: Iterable, start: Position) -> Iterator[Event]:
    """Passes over the loader again and again, from `start` on; the loop decides when to stop."""
    for epoch in itertools.count(start.epoch if _can_jump(loader) else 0):
        batches = yield from _one_epoch(loader, epoch, start)
        if not batches:
            raise BatchError(
                "the loader is empty"
                if epoch == 0
                else f"the loader gave no batch in pass {epoch + 1}: it can be iterated only once, "
                "and training needs more. Pass a list, or an object whose __iter__ starts anew"
            )


def _one_epoch(loader: Iterable, epoch: int, start: Position) -> Generator[Micro, None, int]:
    """Yields an epoch's batches from `start` on; returns how many the epoch has in all.

    Batches before `start` are taken from the loader and let go, so that its own random state moves
    on; the host's is set just before the first batch that is new.
    """
    batches = 0
    iterator = iter(_passage(loader, epoch))
    while True:
        here = (epoch, batches)
        if here == (start.epoch, start.batch):
            restore_host_random(start)
        try:
            inputs = next(iterator)
        except StopIteration:
            return batches
        batches += 1
        if here >= (start.epoch, start.batch):
            yield Micro(*here, inputs)


def _passage(loader: Iterable, epoch: int) -> Iterable:
    """One pass; loaders that shuffle by epoch are told which."""
    for shuffler in (loader, getattr(loader, "sampler", None)):
        set_epoch = getattr(shuffler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
    return loader


def _can_jump(loader: Iterable) -> bool:
    """Whether an epoch's order does not depend on the epochs before it."""
    if isinstance(loader, Sequence):
        return True
    return any(hasattr(x, "set_epoch") for x in (loader, getattr(loader, "sampler", None)))


def task_order(sizes: Mapping[str, int | None], tau: float, seed: int) -> Iterator[str]:
    """The task of each micro-batch, drawn with p ∝ size^tau, or evenly where a size is unknown.

    Args:
        sizes: task → batches in its loader, or None.
        tau: 1 draws in proportion to the sizes, 0 evenly.
        seed: of the draws.
    """
    names = list(sizes)
    shares = [1.0 if size is None else float(size) ** tau for size in sizes.values()]
    if any(size is None for size in sizes.values()):
        shares = [1.0] * len(names)
    rng = np.random.default_rng(seed)
    while True:
        yield names[rng.choice(len(names), p=np.divide(shares, sum(shares)))]


def by_tasks(streams: Mapping[str, Iterator[Event]], order: Iterator[str]) -> Iterator[Event]:
    """Takes each batch from the stream of the task whose turn it is."""
    for batch, task in enumerate(order):
        event = next(streams[task])
        if isinstance(event, Micro):
            yield Micro(0, batch, event.inputs, task)


def taken(
    events: Iterator[Event], postprocess: Callable[[Any], Any] | None, task: str = ""
) -> Iterator[Event]:
    """Applies the user's postprocessor and copies every batch; see `batches.own`.

    Args:
        events: the stream, of one loader.
        postprocess: the postprocessor, or None.
        task: whose loader it is, for messages.
    """
    for event in events:
        if isinstance(event, Micro):
            where = f"task {task!r}, {place_of(event)}" if task else place_of(event)
            inputs = event.inputs
            if postprocess is not None:
                try:
                    inputs = postprocess(inputs)
                except Exception as error:
                    error.add_note(f"raised by the batch_postprocessor, {where}")
                    raise
            try:
                inputs = own(inputs)
            except BatchError as error:
                raise BatchError(f"{where}: {error}") from error.__cause__
            event = event._replace(inputs=inputs)
        yield event


def place_of(event: Micro) -> str:
    """Which batch it is, in words."""
    if event.task:
        return f"task {event.task!r}, batch {event.batch + 1} of all tasks"
    return f"epoch {event.epoch + 1}, batch {event.batch + 1} (index {event.batch} of the loader)"


def checked(
    events: Iterator[Event], checks: Mapping[str, Callable[[Any], None]]
) -> Iterator[Event]:
    """Calls each task's check on its batches; an error says which batch it was."""
    for event in events:
        if isinstance(event, Micro):
            try:
                checks[event.task](event.inputs)
            except BatchError as error:
                raise BatchError(f"{place_of(event)}: {error}") from error.__cause__
        yield event


def peek(events: Iterator[Event]) -> tuple[Any, Iterator[Event]]:
    """The first batch (None if there is none), and a stream that still begins with it."""
    passed: list[Event] = []
    for event in events:
        passed.append(event)
        if isinstance(event, Micro):
            return event.inputs, itertools.chain(passed, events)
    return None, iter(passed)


def host_random() -> Any:
    """Python's and numpy's global random states: loaders and postprocessors draw on them."""
    return np.random.get_state(), random.getstate()


def as_json(state: Any) -> Any:
    """What `host_random` gave, as JSON."""
    (kind, keys, position, has_gauss, gauss), (version, internal, gauss_next) = state
    return {
        "numpy": [kind, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "python": [version, list(internal), gauss_next],
    }


def is_host_random(state: Any) -> bool:
    """Whether `restore_host_random` can take what a file holds: None, or what `as_json` gave."""
    if state is None:
        return True
    try:
        np.random.RandomState(0).set_state(tuple(state["numpy"]))
        version, internal, gauss_next = state["python"]
        random.Random(0).setstate((version, tuple(internal), gauss_next))
    except (TypeError, ValueError, KeyError, OverflowError, IndexError):
        return False
    return gauss_next is None or isinstance(gauss_next, float)


def restore_host_random(position: Position) -> None:
    """Sets the global random states to those of a position, if it has them."""
    if position.host_random is None:
        return
    np.random.set_state(tuple(position.host_random["numpy"]))
    version, internal, gauss_next = position.host_random["python"]
    random.setstate((version, tuple(internal), gauss_next))
