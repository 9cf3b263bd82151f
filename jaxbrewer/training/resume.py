"""Going on from a checkpoint: where it stands, and the data from there on."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from ..configurations.configs import TrainingConfig
from ..data.batches import Batch
from ..data.states import LoaderState, restore_host_random
from ..data.streams import (
    Event,
    Micro,
    Position,
    by_epochs,
    by_steps,
    by_tasks,
    peek,
    taken,
    task_order,
)
from ..errors import CheckpointError, DamagedCheckpointError
from ..machine.processes import Processes
from .folders import is_finished, others_in, steps_in
from .request import Feed, Request
from .stored import Saved, examine, none_is_whole, unverified
from .timeline import Timeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resumed:
    """What a run goes on from.

    Attributes:
        path: the checkpoint.
        position: where it stands, for this process.
        is_verified: whether all of it is known to be what was saved.
        saved: its JSON part.
    """

    path: Path
    position: Position
    is_verified: bool
    saved: Mapping[str, Any]

    def said(self, total_steps: int) -> str:
        """A line for the log."""
        return (
            f"resuming at step {self.position.global_step} of {total_steps}, epoch "
            f"{self.position.epoch + 1}, from {self.path.name}, "
            + ("verified" if self.is_verified else "not verified")
        )


def checkpoint_to_resume(config: TrainingConfig, processes: Processes) -> Resumed | None:
    """What to go on from; None where there is no checkpoint, or none is asked for.

    Raises:
        CheckpointError: the checkpoint that is named is not there or not whole, none of those in
            `output_dir` is whole, or it was trained otherwise.
    """
    saved = _saved(config, processes)
    if saved is None:
        return None
    if not saved.is_verified and processes.rank == 0:
        logger.warning("%s", unverified(saved.path, saved.position))
    position = _position(saved.path.name, saved.position, config, processes)
    return Resumed(saved.path, position, saved.is_verified, saved.position)


def _saved(config: TrainingConfig, processes: Processes) -> Saved | None:
    """The checkpoint that is named, or the newest that is whole."""
    output = Path(config.output_dir).absolute()
    if config.resume is False:
        return None
    if config.resume is not True:
        named = _named(config.resume, output)
        found = _examined(named, processes)
        if isinstance(found, str):
            raise CheckpointError(f"resume={config.resume!r}: {named} {found}")
        return found
    problems = []
    # Process 0 says which there are: a shared disk may show others an older state.
    for step in reversed(processes.objects(steps_in(output))[0]):
        found = _examined(output / f"gs{step}", processes)
        if not isinstance(found, str):
            return found
        problems.append(f"gs{step} {found}")
        if processes.rank == 0:
            logger.warning("gs%d is passed over: it %s", step, found)
    if problems:
        raise none_is_whole(output, problems)
    return None


def _named(name: str, output: Path) -> Path:
    """The folder that ``resume='gs1200'`` or a path means."""
    path = output / name if re.fullmatch(r"gs\d+", name) else Path(name).absolute()
    if not is_finished(path):
        what = "is no finished checkpoint" if path.is_dir() else "is not there"
        raise CheckpointError(f"resume={name!r}: {path} {what}. Finished ones: {others_in(path)}")
    return path


def _examined(path: Path, processes: Processes) -> Saved | str:
    """A checkpoint, if all processes find it whole; else what is wrong with it."""
    found: Saved | str
    try:
        found = examine(path)
    except DamagedCheckpointError as error:
        found = error.problem
    said = [text for text in processes.objects(found if isinstance(found, str) else "") if text]
    return said[0] if said else found


def _position(
    name: str, saved: Mapping[str, Any], config: TrainingConfig, processes: Processes
) -> Position:
    """Where a checkpoint stands, for this process."""
    step = saved["global_step"]
    accumulation = saved["train_config"]["gradient_accumulation_steps"]
    if accumulation != config.gradient_accumulation_steps:
        raise CheckpointError(
            f"{name} was trained with gradient_accumulation_steps={accumulation}, not "
            f"{config.gradient_accumulation_steps}; its position in the data would be wrong. Use the "
            "same, or start anew with another output_dir"
        )
    each = saved["processes"]
    if len(each) == processes.count:
        mine = each[processes.rank]
    else:
        mine = each[0] | {"host_random": None, "loaders": {}}
        logger.warning(
            "%s was saved by %d processes and goes on in %d: each starts %d batches into epoch %d of "
            "its own data, which is right only if a step still takes the same number of examples",
            name,
            len(each),
            processes.count,
            mine["batch"],
            mine["epoch"] + 1,
        )
    loaders = {task: LoaderState(**state) for task, state in mine.get("loaders", {}).items()}
    if not loaders and processes.rank == 0:
        logger.warning(
            "%s says nothing of its data that fits this run: whether the batches before it were the "
            "same cannot be compared",
            name,
        )
    return Position(
        mine["epoch"],
        mine["batch"],
        step,
        saved["micro_step"],
        mine.get("host_random"),
        loaders,
        may_differ=data_may_differ(config),
    )


def data_may_differ(config: TrainingConfig) -> bool:
    """Whether a resume with other data is meant."""
    return not {"data", "any"}.isdisjoint(config.resume_changes)


class Opened(NamedTuple):
    """The data of a run, looked at.

    Attributes:
        first: task → a batch of it: its first one, or one before it.
        events: the stream of all, from the start on.
        loaders: task → the state of its loader before the first of these.
    """

    first: dict[str, Batch]
    events: Iterator[Event]
    loaders: dict[str, LoaderState]


def open_streams(request: Request, timeline: Timeline, start: Position, seed: int) -> Opened:
    """Opens the streams. Looking at the first batches loses none of them.

    Args:
        request: has the loaders.
        timeline: of the run.
        start: where to begin.
        seed: of the tasks' order.

    Raises:
        CheckpointError: the data before `start` are not those that were taken there.
    """
    if list(request.feeds) == [""]:
        return _open_one(request, timeline, start)
    sizes = {task: feed.length for task, feed in request.feeds.items()}
    order = task_order(sizes, request.tau, seed)
    done = list(islice(order, start.micro_step))  # the draws tell how far each loader had come
    firsts, streams, loaders = {}, {}, {}
    for task, feed in request.feeds.items():
        stream = _task_stream(task, feed, start, done.count(task))
        first, streams[task] = peek(taken(stream, feed.postprocess, task))
        if first is None:  # by_steps gives one, or says why not
            raise ValueError(f"the loader of task {task!r} gave no batch")
        firsts[task] = first.inputs
        loaders[task] = start.loaders.get(task) or _before(first)
    restore_host_random(start.host_random)
    return Opened(firsts, by_tasks(streams, order), loaders)


def _open_one(request: Request, timeline: Timeline, start: Position) -> Opened:
    (feed,) = request.feeds.values()
    if timeline.epochs is not None:
        stream = by_epochs(feed.loader, timeline.epochs, start)
    else:
        stream = by_steps(feed.loader, start)
    first, events = peek(taken(stream, feed.postprocess))
    if first is None and start.micro_step:  # this process's last epoch is over already
        first, _ = peek(taken(by_epochs(feed.loader, 1, Position()), feed.postprocess))
        restore_host_random(start.host_random)
    if first is None:
        raise ValueError("the loader gave no batch: it is empty")
    return Opened({"": first.inputs}, events, dict(start.loaders))


def _task_stream(task: str, feed: Feed, start: Position, done: int) -> Iterator[Event]:
    """One of several tasks' own stream, which has given `done` batches before the start."""
    kept = start.loaders.get(task)
    if kept is None:
        return islice(by_steps(feed.loader, Position()), done, None)
    if kept.taken != done and not start.may_differ:
        raise CheckpointError(
            f"task {task!r} had {kept.taken} batches before the checkpoint, and would have had {done} "
            "now: the order of the tasks follows from the sizes of their loaders, tau and the seed. "
            "Give those it was trained with; if others are meant, say resume_changes=['data']"
        )
    loaders = {task: replace(kept, taken=done)}
    here = replace(start, epoch=kept.epoch, batch=kept.batch, host_random=None, loaders=loaders)
    return by_steps(feed.loader, here, task, is_sampled=True)


def _before(first: Micro) -> LoaderState:
    """The state of a loader before its first batch."""
    after: Any = first.loader
    return replace(after, batch=0, taken=0, checksum=0, shown={})
