"""From a distiller and the arguments of ``train`` to a running loop: each thing is built once."""

import contextlib
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
import optax

from . import caching
from .adaptors import model_name
from .allocation import kept_memory
from .arguments import Request, make_factor, make_schedule
from .batches import Batch, check_ids, sides
from .checkpoints import (
    Checkpoints,
    latest_position,
    load_projections,
    load_student,
    projections_in,
)
from .compilation import keep_programs
from .configurations import TrainingConfig
from .errors import CheckpointError, PreflightWarning, afterwards
from .loop import CallbackResult, Loop, Task
from .metrics import MetricsWriter
from .optimizer import Optimizer
from .placement import Placement, placement_for, placement_to_cache
from .plan import Schedule, Weight
from .precision import FLOAT32
from .preparation import prepare
from .processes import Processes, joined
from .report import describe
from .schedulers import tabulate
from .step import Program, TrainState
from .streams import (
    Event,
    Micro,
    Position,
    by_epochs,
    by_steps,
    by_tasks,
    checked,
    peek,
    prepared,
    restore_host_random,
    task_order,
)

if TYPE_CHECKING:
    from .trainable import Trainable

logger = logging.getLogger(__name__)


def train(distiller: "Trainable", request: Request) -> None:
    """Runs one training. See `trainable.Trainable.train`."""
    config = distiller.t_config
    keep_programs()
    placement = placement_for(config)
    processes = Processes(placement.devices)
    distiller.rank = processes.rank
    with processes.together("reading the arguments of train"):
        request = _of_all(request, processes)
        schedule = make_schedule(config, request)
        factor = make_factor(request, schedule.total_steps)
    if not distiller._in_context:
        warnings.warn(
            "train() outside `with distiller:` runs the student in evaluation mode: dropout is off "
            "and batch statistics stand still. Write `with distiller: distiller.train(…)`",
            PreflightWarning,
            stacklevel=3,
        )

    # Looking at the first batches comes before anything is touched on disk, and loses none of them.
    # A resumed run skips to its position, which only its checkpoint knows.
    latest = _latest_position(config, processes) if config.resume else None
    start = latest or Position()
    if latest is not None and start.global_step >= schedule.total_steps:
        logger.info("gs%d is the end of this run; nothing is left to train", start.global_step)
        _bring_back(distiller, request, schedule, latest, placement, processes)
        return
    with processes.together("checking the models and the first batch"):
        first, events = _open(distiller, request, schedule, start)
        programs = prepare(
            distiller,
            first,
            request.optimizer,
            request.args,
            max_grad_norm=request.max_grad_norm,
            device=placement.devices[0],
        )
        for batch in first.values():
            placement.check(batch)
        if config.sharding == "teacher" and not any(p.teacher.sides for p in programs.values()):
            raise ValueError(
                f"sharding='teacher', but {type(distiller).__name__} has no teacher; use sharding='all' "
                "to cut the model itself, or None"
            )
        checks = {name: _batch_check(program) for name, program in programs.items()}
        cache = distiller._cache()
        if cache is not None:
            programs, events = _cached(
                programs, cache, request, schedule, start, placement, processes
            )
            checks = {name: _nothing_to_check for name in programs}
    events = checked(events, checks)
    if processes.count > 1:
        like = next(iter(first.values()))
        share = len(placement.devices) // processes.count
        events = joined(events, processes, share=share, start=start, like=like)

    checkpoints = _checkpoints(config, processes)
    with (  # the loop itself has waited for the checkpoints before the metrics are closed
        afterwards("closing the checkpoints", partial(_close, checkpoints, distiller)),
        _metrics(distiller, processes) as metrics,
    ):
        any_program = next(iter(programs.values()))
        state = placement.start(any_program, config.seed)
        if latest is not None:
            state = checkpoints.restore(latest.global_step, state)
            logger.info("Resuming from gs%d", latest.global_step)
        lengths = [feed.length for feed in request.feeds.values()]
        loop = Loop(
            tasks={name: _task(program, placement) for name, program in programs.items()},
            state=placement.enter(state),
            rows=_rows(distiller, factor, schedule.total_steps),
            schedule=schedule,
            checkpoints=checkpoints,
            metrics=metrics,
            position=start,
            after_save=_after_save(distiller, any_program, request),
            describe=distiller._describe() | {"batches_per_epoch": lengths[0]},
            placement=placement,
            processes=processes,
            print_freq=distiller.print_freq,
        )
        del state  # the loop's steps own it
        with kept_memory(placement.devices[0].platform) as bound_memory:
            loop.run(events, bound_memory)
        hand_over(any_program, placement, placement.leave(loop.state))


@contextlib.contextmanager
def _metrics(distiller: "Trainable", processes: Processes) -> Iterator[MetricsWriter]:
    """Where the numbers go; closed at the end."""
    with distiller._own_writer():
        metrics = MetricsWriter(distiller.tb_writer if processes.rank == 0 else None)
        with afterwards("writing the metrics", metrics.close):
            yield metrics


def _close(checkpoints: Checkpoints, distiller: "Trainable") -> None:
    """Ends the checkpoints; the distiller learns which of those that are kept is the best."""
    try:
        checkpoints.close()
    finally:
        distiller.best_checkpoint = checkpoints.best()


def _bring_back(
    distiller: "Trainable",
    request: Request,
    schedule: Schedule,
    end: Position,
    placement: Placement,
    processes: Processes,
) -> None:
    """Puts what a finished run has left into the objects the user holds."""
    path = Path(distiller.t_config.output_dir) / f"gs{end.global_step}"
    if not projections_in(path) <= distiller._projections().keys():
        # Those of custom matches are made when the models are looked at.
        with processes.together("checking the models and the first batch"):
            first, _ = _open(distiller, request, schedule, Position())
            prepare(distiller, first, request.optimizer, request.args, device=placement.devices[0])
    checkpoints = _checkpoints(distiller.t_config, processes)
    with afterwards("closing the checkpoints", partial(_close, checkpoints, distiller)):
        load_projections(path, distiller._projections())
        load_student(path, distiller.model_S)


def _checkpoints(config: TrainingConfig, processes: Processes) -> Checkpoints:
    return Checkpoints(
        config.output_dir,
        resume=config.resume,
        max_to_keep=config.max_to_keep,
        is_chief=processes.rank == 0,
    )


def _of_all(request: Request, processes: Processes) -> Request:
    """The request with the loaders' lengths that all processes agree on: the longest of each."""
    feeds = {}
    for task, feed in request.feeds.items():
        lengths = processes.numbers(-1 if feed.length is None else feed.length)
        feeds[task] = replace(feed, length=int(lengths.max()) if lengths.min() >= 0 else None)
    return replace(request, feeds=feeds)


def _open(
    distiller: "Trainable", request: Request, schedule: Schedule, start: Position
) -> tuple[dict[str, Batch], Iterator[Event]]:
    """Opens the streams; returns each task's first batch, and the stream of all from `start` on."""
    if list(request.feeds) == [""]:
        (feed,) = request.feeds.values()
        if schedule.epochs is not None:
            stream = by_epochs(feed.loader, schedule.epochs, start)
        else:
            stream = by_steps(feed.loader, start)
        first, events = peek(prepared(stream, feed.postprocess))
        if first is None and start.micro_step:  # this process's last epoch is over already
            first, _ = peek(prepared(by_epochs(feed.loader, 1, Position()), feed.postprocess))
            restore_host_random(start)
        if first is None:
            raise ValueError("the loader gave no batch: it is empty")
        return {"": first}, events
    sizes = {task: feed.length for task, feed in request.feeds.items()}
    order = task_order(sizes, request.tau, distiller.t_config.seed)
    done = list(islice(order, start.micro_step))  # the draws tell how far each loader had come
    firsts, streams = {}, {}
    for task, feed in request.feeds.items():
        stream = islice(by_steps(feed.loader, Position()), done.count(task), None)
        firsts[task], streams[task] = peek(prepared(stream, feed.postprocess))
    restore_host_random(start)
    return firsts, by_tasks(streams, order)


def _cached(
    programs: Mapping[str, Program],
    cache: dict[str, Any],
    request: Request,
    schedule: Schedule,
    start: Position,
    placement: Placement,
    processes: Processes,
) -> tuple[dict[str, Program], Iterator[Event]]:
    """Runs the teacher once; returns the program that is served its results, and their stream."""
    if schedule.epochs is None:
        raise ValueError(
            "is_caching_logits goes with num_epochs, not with num_steps: the cache is one pass over "
            "the loader"
        )
    (program,), (feed,) = programs.values(), request.feeds.values()
    stream = prepared(by_epochs(feed.loader, 1, Position()), feed.postprocess)
    check = _batch_check(program)
    batches = [event.inputs for event in stream if isinstance(event, Micro)]
    for batch in batches:
        check(batch)
    place = placement_to_cache(placement)
    if processes.count > 1 and cache["folder"] is not None:
        cache = cache | {"folder": Path(cache["folder"]) / f"process-{processes.rank}"}
    cache = cache | {"level": "" if program.precision == FLOAT32 else str(program.precision)}
    variables = place.teacher(program.teacher.variables)
    loader = caching.build(program.teacher, variables, batches, place=place.batch, **cache)
    served = replace(program, teacher=caching.ServedTeacher())
    return {"": served}, by_epochs(loader, schedule.epochs, start)


def _task(program: Program, placement: Placement) -> Task:
    scaled = program.precision.is_scaled
    names = (*program.names, *(("loss_scale", "skipped_windows") if scaled else ()))
    return Task(
        step=placement.compile(program),
        teacher_variables=placement.teacher(program.teacher.variables),
        tags=("scalar/total_loss", *(f"scalar/{name}" for name in names)),
        is_scaled=scaled,
    )


def hand_over(program: Program, placement: Placement, state: TrainState) -> None:
    """Puts copies of the trained arrays into the objects the user holds."""
    params, model_state = placement.local((state.params, state.model_state))
    program.student.model.write(params["student"], model_state["student"])
    for name, projection in program.projections.items():
        projection.write(params["projections"][name], model_state["projections"][name])


def _after_save(
    distiller: "Trainable", program: Program, request: Request
) -> Callable[[Loop, TrainState, int], bool]:
    def after_save(loop: Loop, saved: TrainState, step: int) -> bool:
        if request.callback is None:
            return False
        hand_over(program, loop.placement, saved)
        if loop.is_chief:
            logger.info("Running the callback at step %d", step)
        result = request.callback(model=distiller.model_S, step=step)
        if not isinstance(result, CallbackResult):
            return False
        if result.score is not None:
            loop.checkpoints.score(step, result.score)
            distiller.best_checkpoint = loop.checkpoints.best()
        return result.stop

    return after_save


def _rows(distiller: "Trainable", factor: Callable | None, total: int) -> np.ndarray:
    """What the schedule gives after each number of updates, from 0 to all: ``[total + 1, 3]``.

    The last row is for batches that no update follows. Their losses are weighted all the same; a
    learning rate is not asked for there, where the schedule may have no value.
    """
    rows = np.ones((total + 1, 3), np.float64)
    for column, weight in enumerate(distiller._weights()):
        if isinstance(weight, Weight):
            rows[:, column] = weight.table(total)
    if factor is not None:
        rows[:total, 2] = tabulate(factor, np.arange(total))
        rows[total, 2] = rows[total - 1, 2]
    return rows.astype(jnp.result_type(float))


def _latest_position(config: TrainingConfig, processes: Processes) -> Position | None:
    saved = latest_position(config.output_dir)
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
    return Position(global_step=step, micro_step=saved["micro_step"], **mine)


def _nothing_to_check(batch: Batch) -> None:
    """For batches that were checked when the cache was built."""


def _batch_check(program: Program) -> Callable[[Batch], None]:
    """Checks ids on the host, for every model that says how many it knows."""
    student = program.student
    name = model_name(student.role)
    checked = [(student.model.signature(), student.model.id_limits, name, 1)]
    for side in program.teacher.sides:
        checked.append((side.model.signature(), side.model.id_limits, model_name(side.role), 0))

    def check(batch: Batch) -> None:
        parts = sides(batch)
        for signature, limits, role, part in checked:
            if part == 1 or parts[2] is None:
                check_ids(parts[part], signature, limits, role)

    return check


def report(
    distiller: "Trainable",
    batches: Mapping[str, Batch],
    optimizer: Optimizer | None,
    args: Mapping[str, Any],
) -> str:
    """Checks as `train` would, and describes what would be trained and at what cost."""
    programs = prepare(distiller, batches, optimizer or (lambda **options: optax.sgd(1.0)), args)
    lines = [f"{type(distiller).__name__}: nothing wrong was found"]
    for task, program in programs.items():
        lines += ["", f"task {task!r}"] if task else [""]
        with_optimizer = optimizer is not None
        lines.append(describe(distiller, program, batches[task], with_optimizer=with_optimizer))
    return "\n".join(lines)
