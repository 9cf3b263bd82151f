"""Going on from a checkpoint: where it stands, and the data from there on."""

import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from ..configurations.configs import TrainingConfig
from ..data.batches import Batch
from ..data.streams import (
    Event,
    Position,
    by_epochs,
    by_steps,
    by_tasks,
    peek,
    restore_host_random,
    taken,
    task_order,
)
from ..errors import CheckpointError, DamagedCheckpointError
from ..machine.processes import Processes
from .folders import is_finished, others_in, steps_in
from .request import Request
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
        mine = each[0] | {"host_random": None}
        logger.warning(
            "%s was saved by %d processes and goes on in %d: each starts %d batches into epoch %d of "
            "its own data, which is right only if a step still takes the same number of examples",
            name,
            len(each),
            processes.count,
            mine["batch"],
            mine["epoch"] + 1,
        )
    return Position(
        mine["epoch"], mine["batch"], step, saved["micro_step"], mine.get("host_random")
    )


def open_streams(
    request: Request, timeline: Timeline, start: Position, seed: int
) -> tuple[dict[str, Batch], Iterator[Event]]:
    """Opens the streams; returns each task's first batch, and the stream of all from `start` on.

    Looking at the first batches loses none of them. `seed` is of the tasks' order.
    """
    if list(request.feeds) == [""]:
        (feed,) = request.feeds.values()
        if timeline.epochs is not None:
            stream = by_epochs(feed.loader, timeline.epochs, start)
        else:
            stream = by_steps(feed.loader, start)
        first, events = peek(taken(stream, feed.postprocess))
        if first is None and start.micro_step:  # this process's last epoch is over already
            first, _ = peek(taken(by_epochs(feed.loader, 1, Position()), feed.postprocess))
            restore_host_random(start)
        if first is None:
            raise ValueError("the loader gave no batch: it is empty")
        return {"": first}, events
    sizes = {task: feed.length for task, feed in request.feeds.items()}
    order = task_order(sizes, request.tau, seed)
    done = list(islice(order, start.micro_step))  # the draws tell how far each loader had come
    firsts, streams = {}, {}
    for task, feed in request.feeds.items():
        stream = islice(by_steps(feed.loader, Position()), done.count(task), None)
        firsts[task], streams[task] = peek(taken(stream, feed.postprocess, task))
    restore_host_random(start)
    return firsts, by_tasks(streams, order)
