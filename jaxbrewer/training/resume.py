"""Going on from a checkpoint: where it stands, and the data from there on."""

import logging
from collections.abc import Iterator
from itertools import islice

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
from ..errors import CheckpointError
from ..machine.processes import Processes
from .checkpoints import latest_position
from .request import Request
from .timeline import Timeline

logger = logging.getLogger(__name__)


def position_to_resume(config: TrainingConfig, processes: Processes) -> Position | None:
    """Where the newest checkpoint stands; None where there is none, or none is asked for."""
    saved = latest_position(config.output_dir) if config.resume else None
    if saved is None:
        return None
    step = saved["global_step"]
    accumulation = saved["train_config"]["gradient_accumulation_steps"]
    if accumulation != config.gradient_accumulation_steps:
        raise CheckpointError(
            f"gs{step} was trained with gradient_accumulation_steps={accumulation}, not "
            f"{config.gradient_accumulation_steps}; its position in the data would be wrong. Use the "
            "same, or start anew with another output_dir"
        )
    each = saved["processes"]
    if len(each) == processes.count:
        mine = each[processes.rank]
    else:
        mine = each[0] | {"host_random": None}
        logger.warning(
            "gs%d was saved by %d processes and goes on in %d: each starts %d batches into epoch %d of "
            "its own data, which is right only if a step still takes the same number of examples",
            step,
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
