"""The order in which batches reach the step: by epochs or by steps, from any position.

A stream yields `Micro` for every batch and `EpochEnd` after an epoch of a run by epochs, where
an incomplete accumulation window is dropped. Distillers differ by stream, not by loop.
"""

import itertools
import logging
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import numpy as np

from ..errors import BatchError, CheckpointError, told
from .batches import own
from .checksums import Checksums
from .states import (
    LoaderState,
    iterator_from,
    put_back,
    random_state,
    restore_host_random,
    shown_state,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Position:
    """Where a run stands.

    Attributes:
        epoch: epochs finished.
        batch: batches taken in the current one.
        global_step: optimizer steps done.
        micro_step: micro-batches trained on, in dropped windows too.
        host_random: the global random states, or None.
        loaders: task → the state of its loader; none where it is not known.
        may_differ: whether it is meant that the data are not those the run was started with.
    """

    epoch: int = 0
    batch: int = 0
    global_step: int = 0
    micro_step: int = 0
    host_random: Any = None
    loaders: Mapping[str, LoaderState] = field(default_factory=dict)
    may_differ: bool = False


class Micro(NamedTuple):
    """A batch: the `batch`-th (from 0) of `epoch` (from 0), of a task where there are several.

    `host_random` is the random state just after it was drawn, where more were drawn since. `stop` is
    the signal by which one of several processes has been asked to stop, or 0. `loader` is the state
    of its loader just after it. A `sample` is not to be trained on: it was before, or comes once more.
    """

    epoch: int
    batch: int
    inputs: Any
    task: str = ""
    host_random: Any = None
    stop: int = 0
    loader: LoaderState | None = None
    sample: bool = False


class EpochEnd(NamedTuple):
    """The end of `epoch`, which had `batches` batches."""

    epoch: int
    batches: int


Event = Micro | EpochEnd


def by_epochs(
    loader: Iterable,
    epochs: int,
    start: Position,
    *,
    begun: Mapping[str, Any] | None = None,
) -> Iterator[Event]:
    """Passes over the loader `epochs` times, or what is left of that after `start`.

    Args:
        loader: gives the batches.
        epochs: how often in all.
        start: where to begin.
        begun: the random states to keep as those at every pass's beginning, where the loader only
            serves what was listed; see `states.LoaderState`.

    Raises:
        CheckpointError: the batches before `start` are not those that were taken there.
    """
    passes = _Passes(loader, start, begun=begun)
    for epoch in range(passes.first, epochs):
        batches = yield from passes.one(epoch)
        if epoch >= start.epoch:
            yield EpochEnd(epoch, batches)


def by_steps(
    loader: Iterable, start: Position, task: str = "", *, is_sampled: bool = False
) -> Iterator[Event]:
    """Passes over the loader again and again, from `start` on; the loop decides when to stop.

    Args:
        loader: gives the batches.
        start: where to begin.
        task: whose loader it is.
        is_sampled: whether to begin by a sample where the loader's state is known, so that a look
            at the stream need not draw the next batch before its turn.

    Raises:
        BatchError: a pass gave no batch.
        CheckpointError: as `by_epochs`.
    """
    passes = _Passes(loader, start, task, is_sampled=is_sampled)
    for epoch in itertools.count(passes.first):
        batches = yield from passes.one(epoch)
        if not batches:
            raise BatchError(
                "the loader is empty"
                if epoch == 0
                else f"the loader gave no batch in pass {epoch + 1}: it can be iterated only once, "
                "and training needs more. Pass a list, or an object whose __iter__ starts anew"
            )


class _Pass(NamedTuple):
    """A pass under way: its iterator, the batches taken, their checksum, one of them if at hand."""

    iterator: Iterator
    batch: int = 0
    checksum: int = 0
    sample: Any = None


class _Passes:
    """The passes over one loader, from a position on.

    Where the loader shows its state, that is put back at the position. Otherwise the batches before
    are taken and let go, so that the loader's own random state moves on, and compared by checksum.

    Attributes:
        first: the first epoch to pass over.
    """

    def __init__(
        self,
        loader: Iterable,
        start: Position,
        task: str = "",
        *,
        begun: Mapping[str, Any] | None = None,
        is_sampled: bool = False,
    ):
        self._loader = loader
        self._start = start
        self._task = task
        kept = start.loaders.get(task)
        is_here = kept is not None and (kept.epoch, kept.batch) == (start.epoch, start.batch)
        self._kept = kept if is_here else None  # another where an epoch of this process was empty
        self._begun = begun
        self._is_sampled = is_sampled
        self._checksums = Checksums()
        self._is_shown = True
        self._taken = 0
        is_shown = self._kept is not None and bool(self._kept.shown)
        self.first = start.epoch if is_shown or _can_jump(loader) else 0

    def one(self, epoch: int) -> Generator[Micro, None, int]:
        """Yields an epoch's batches from the start on; returns how many the epoch has in all."""
        if epoch < self._start.epoch:
            return self._let_go(epoch)
        begun, (iterator, batch, checksum, sample) = self._begin(epoch)
        length = _length_of(self._loader)
        if sample is not None and self._is_sampled:
            yield Micro(epoch, batch, sample, self._task, sample=True)
        while True:
            try:
                inputs = next(iterator)
            except StopIteration:
                return batch
            batch, self._taken = batch + 1, self._taken + 1
            checksum = self._checksums.of(inputs, checksum)
            shown = self._shown(iterator)
            state = LoaderState(epoch, batch, self._taken, checksum, length, begun, shown)
            yield Micro(epoch, batch - 1, inputs, loader=state)

    def _let_go(self, epoch: int) -> int:
        count = sum(1 for _ in _passage(self._loader, epoch))
        self._taken += count
        return count

    def _begin(self, epoch: int) -> tuple[Mapping[str, Any], _Pass]:
        """Begins a pass, at the start's batch if it is the start's; returns the states it began with."""
        if epoch > self._start.epoch:
            begun = self._begun or random_state(self._loader)
            return begun, _Pass(iter(_passage(self._loader, epoch)))
        if self._kept is not None and self._begun is None:
            put_back(self._kept.begun, self._loader)
        begun = self._begun or random_state(self._loader)
        passage = _passage(self._loader, epoch)
        self._compare_lengths()
        current = self._restored(passage) or self._replayed(passage)
        self._taken = self._taken + current.batch if self._kept is None else self._kept.taken
        restore_host_random(self._start.host_random)
        return begun, current

    def _shown(self, iterator: Iterator) -> Mapping[str, Any]:
        """The state that the loader shows; none, said once, where it cannot be kept."""
        if not self._is_shown:
            return {}
        try:
            return shown_state(self._loader, iterator)
        except Exception as error:  # noqa: BLE001  the state is a help, and its lack is told
            self._is_shown = False
            logger.warning(
                "%s shows a state that cannot be kept (%s): a resume will replay the epoch instead",
                self._named(),
                told(error),
            )
            return {}

    def _restored(self, passage: Iterable) -> _Pass | None:
        """The start's pass by the loader's own state; None if none was kept, or it takes none."""
        kept = self._kept
        if kept is None or not kept.shown:
            return None
        try:
            iterator = iterator_from(passage, kept.shown)
            sample = None
            if self._is_sampled and iterator is not None:
                sample = next(iterator, None)
                if sample is None:  # at a pass's end
                    sample = next(iter(passage), None)
                iterator = iterator_from(passage, kept.shown)
        except Exception as error:  # noqa: BLE001  the loader's own; it is told
            self._differs(
                f"does not take the state that the checkpoint keeps of it ({told(error)})"
            )
            return None
        if iterator is None:
            return None
        self._tell("goes on by its own state")
        return _Pass(iterator, kept.batch, kept.checksum, sample)

    def _replayed(self, passage: Iterable) -> _Pass:
        """The start's pass after the batches before it, which are compared and let go."""
        start, iterator = self._start, iter(passage)
        if start.epoch or start.batch:
            self._tell("is replayed: %s", self._length())
        checksum, sample = 0, None
        for batch in range(start.batch):
            try:
                sample = next(iterator)
            except StopIteration:
                self._differs(
                    f"has only {batch} batches in epoch {start.epoch + 1}, of which {start.batch} "
                    "were taken before the checkpoint"
                )
                return _Pass(iter(()), batch, checksum, sample)
            checksum = self._checksums.of(sample, checksum)
        if self._kept is not None and self._kept.checksum != checksum:
            self._differs(
                f"gives other batches than before the checkpoint: the first {start.batch} of epoch "
                f"{start.epoch + 1} are not the same (their contents, size or order)"
            )
        return _Pass(iterator, start.batch, checksum, sample)

    def _compare_lengths(self) -> None:
        now = _length_of(self._loader)
        before = now if self._kept is None else self._kept.length
        if before != now:
            self._differs(f"has {now} batches in a pass, and had {before} before the checkpoint")

    def _differs(self, how: str) -> None:
        if not self._start.may_differ:
            raise CheckpointError(f"{self._named()} {how}. {_CURE}")
        logger.warning("%s %s, as resume_changes allows", self._named(), how)

    def _tell(self, message: str, *values: Any) -> None:
        if jax.process_index() == 0:  # of several processes one speaks for all
            logger.info(f"%s {message}", self._named(), *values)

    def _length(self) -> str:
        here = f"{self._start.batch} batches of epoch {self._start.epoch + 1}"
        if not self._start.epoch or self.first:
            return here
        return f"{here}, and the {self._start.epoch} before it whole"

    def _named(self) -> str:
        return f"the loader of task {self._task!r}" if self._task else "the loader"


_CURE = (
    "Give the data and the batch size it was trained on. A loader that shuffles itself does so by a "
    "seed and the epoch (set_epoch), by a torch generator in its attribute generator, or shows its "
    "state (state_dict and load_state_dict; get_state and set_state on its iterator). If other data "
    "are meant, say resume_changes=['data']"
)


def _length_of(loader: Any) -> int | None:
    """Batches in a pass, if the loader says it."""
    try:
        return len(loader)
    except TypeError:  # torch's DataLoader over a dataset without a length has a ``__len__`` too
        return None


def _passage(loader: Iterable, epoch: int) -> Iterable:
    """One pass; loaders that shuffle by epoch are told which."""
    for shuffler in (loader, getattr(loader, "sampler", None)):
        set_epoch = getattr(shuffler, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(epoch)
    return loader


def _can_jump(loader: Iterable) -> bool:
    """Whether an epoch's order does not depend on the epochs before it."""
    if type(loader) in (list, tuple):
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
            yield Micro(0, batch, event.inputs, task, loader=event.loader)


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


def peek(events: Iterator[Event]) -> tuple[Micro | None, Iterator[Event]]:
    """The first batch (None if there is none), and a stream that still begins with it.

    A sample is the first batch too, and is not in the stream.
    """
    passed: list[Event] = []
    for event in events:
        if isinstance(event, Micro) and event.sample:
            return event, events
        passed.append(event)
        if isinstance(event, Micro):
            return event, itertools.chain(passed, events)
    return None, iter(passed)
