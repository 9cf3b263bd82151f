"""One run: a job and the arguments of ``train`` go in, an outcome comes back."""

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from ..data.batches import Batch
from ..data.states import undisturbed
from ..data.streams import Event, Position
from ..errors import PreflightWarning, afterwards, warn
from ..machine.devices import resolve_device
from ..machine.memory import kept_memory
from ..machine.placement import Placement, placement_for, placement_to_cache
from ..machine.processes import Processes, joined
from ..machine.programs import keep_programs
from ..objective.monitor import PREFIX
from ..objective.plan import TEMPERATURE
from ..objective.tables import tabulate
from ..preflight.job import Job
from ..preflight.prepare import Prepared, prepare
from ..preflight.report import describe
from ..step.optimizer import Optimizer
from ..step.program import Program, TrainState
from . import signals
from .between import Between
from .checkpoints import Checkpoints
from .comparison import changes
from .comparison.record import weights_of, with_schedule
from .comparison.start import ahead_of, recorded
from .elsewhere import account_on
from .evaluations import Evaluations
from .feed import fed, watched
from .folders import make
from .json_lines import JsonLines
from .loop import CompiledTask, Loop
from .metrics import MetricsWriter
from .outcome import OnCheckpoint, Outcome, Progress
from .request import Request, make_factor, make_timeline
from .resume import Resumed, checkpoint_to_resume, open_streams
from .stored import read_variables
from .timeline import Timeline
from .writers import Sink

logger = logging.getLogger(__name__)

_TOTAL = "scalar/total_loss"


def train(job: Job, request: Request, on_checkpoint: OnCheckpoint) -> Outcome:
    """Runs one training.

    Args:
        job: what to train.
        request: how long, on what data, by which optimizer.
        on_checkpoint: given what the run has come to, before each of the user's callbacks; returns
            the student as callbacks get it.

    Returns:
        The outcome, with the error if one ended the run: nothing is raised.
    """
    progress = Progress(job)
    try:
        _run(progress, request, on_checkpoint)
    except BaseException as error:  # noqa: BLE001  the caller raises it, once it has the outcome
        return progress.note(variables=None, error=error)
    finally:
        progress.lock.release()
    return progress.outcome


@dataclass(frozen=True)
class _Setting:
    """What is known of a run before its job is looked at."""

    progress: Progress
    request: Request
    timeline: Timeline
    factor: Callable | None
    placement: Placement
    processes: Processes

    @property
    def job(self) -> Job:
        return self.progress.outcome.job


@dataclass(frozen=True)
class _Ready:
    """A job that was looked at, and its data from `start` on.

    Attributes:
        first: task → its first batch.
        rows: see `_rows`.
        teachers: task → the teacher's arrays, placed.
        record: what checkpoints keep of the job.
    """

    programs: Mapping[str, Program]
    events: Iterator[Event]
    first: Mapping[str, Batch]
    start: Position
    rows: np.ndarray
    teachers: Mapping[str, Any]
    record: Mapping[str, Any]


def _run(progress: Progress, request: Request, on_checkpoint: OnCheckpoint) -> None:
    keep_programs()
    setting = _setting(progress, request)
    job, processes = setting.job, setting.processes
    _warn_of_evaluation(job)
    if Path(job.config.output_dir).is_dir():
        _take_folder(progress, processes)
    resumed = checkpoint_to_resume(job.config, processes)
    if resumed is not None and resumed.position.global_step >= setting.timeline.total_steps:
        _bring_back(setting, resumed, on_checkpoint)
        return
    # Looking at the first batches comes before anything is touched on disk.
    ready = _looked_at(setting, resumed)
    with (
        signals.waiting() as asked,
        _checkpoints(progress, processes, resumed) as checkpoints,
        _metrics(setting, is_new=resumed is None) as metrics,
    ):
        evaluations = Evaluations(
            setting.request, progress, on_checkpoint, checkpoints, processes, resumed
        )
        between = Between(setting.request, setting.timeline, progress, on_checkpoint, evaluations)
        events = _events(setting, ready, checkpoints, asked)
        loop = _loop(setting, ready, resumed, checkpoints, metrics, between, partial(bool, asked))
        try:
            with kept_memory(setting.placement.devices[0].platform) as bound_memory:
                if resumed is not None:
                    between.catch_up(loop)
                loop.run(events, bound_memory)
        finally:
            progress.note(steps=loop.position.global_step)
        progress.note(variables=_copies(setting.placement, loop.leave(loop.state)))


def _setting(progress: Progress, request: Request) -> _Setting:
    config = progress.outcome.job.config
    placement = placement_for(config)
    processes = Processes(placement.devices)
    progress.note(rank=processes.rank)
    with processes.together("reading the arguments of train"):
        request = request.of_all(processes)
        timeline = make_timeline(config, request)
        factor = make_factor(request, timeline.total_steps)
    return _Setting(progress, request, timeline, factor, placement, processes)


def _looked_at(setting: _Setting, resumed: Resumed | None) -> _Ready:
    """Looks at the models and the first batches; a resumed run skips to its position."""
    job, request, processes = setting.job, setting.request, setting.processes
    start = Position() if resumed is None else resumed.position
    with processes.together("checking the models and the first batch"):
        # A cache is one pass over the loader, of which the batches are served in an order of its own.
        looked_at = start if job.cache is None else Position()
        opened = open_streams(request, setting.timeline, looked_at, job.config.seed)
        start = start if job.cache else replace(start, loaders=opened.loaders)
        prepared = _prepared(setting, opened.first)
        _rehearse(request)
        rows = _rows(prepared.job, setting.factor, setting.timeline.total_steps)
    teachers, weights = _teachers(prepared, setting.placement)
    ahead = ahead_of(prepared, request, opened.first, weights, start, processes)
    record = recorded(ahead, rows, resumed, processes)
    with processes.together("preparing the batches"):
        programs, events = fed(
            prepared,
            opened,
            request,
            setting.timeline,
            start,
            setting.placement,
            processes,
            teachers,
        )
    return _Ready(programs, events, opened.first, start, rows, teachers, record)


def _events(
    setting: _Setting, ready: _Ready, checkpoints: Checkpoints, asked: signals.Request
) -> Iterator[Event]:
    """The stream that the loop takes, joined with those of other processes."""
    events = watched(ready.events, checkpoints)
    processes = setting.processes
    if processes.count == 1:
        return events
    together = joined(
        events,
        processes,
        share=len(setting.placement.devices) // processes.count,
        start=ready.start,
        like=next(iter(ready.first.values())),
        asked=lambda: asked.signum or 0,
    )
    return signals.heard(together, asked)


def _loop(
    setting: _Setting,
    ready: _Ready,
    resumed: Resumed | None,
    checkpoints: Checkpoints,
    metrics: MetricsWriter,
    between: Between,
    is_asked: Callable[[], bool],
) -> Loop:
    """The loop, at the state that the run starts from."""
    job, placement = setting.job, setting.placement
    tasks = {
        name: _compiled(program, placement, ready.teachers.get(name, ()))
        for name, program in ready.programs.items()
    }
    program = next(iter(ready.programs.values()))
    state = placement.start(program, job.config.seed)
    if resumed is not None:
        trains_others = changes.trains_others(resumed.saved, ready.record)
        state = checkpoints.restore(resumed.path, state, trains_others=trains_others)
        if setting.processes.rank == 0:
            logger.info("%s", resumed.said(setting.timeline.total_steps))
        tags = {tag for task in tasks.values() for tag in task.tags}
        tags |= between.tags(ready.start)
        metrics.go_on(resumed.path.name, ready.start.micro_step, tags)
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    state, frozen = program.parted(placement.enter(state))
    return Loop(
        tasks=tasks,
        state=state,
        rows=ready.rows,
        timeline=setting.timeline,
        checkpoints=checkpoints,
        metrics=metrics,
        position=ready.start,
        after_save=between.after_save,
        evaluate=between.evaluate,
        evaluates_at=between.evaluations.due_at,
        about=lambda step: {**job.about, "job": with_schedule(ready.record, ready.rows, step)},
        batches_per_epoch=next(iter(setting.request.feeds.values())).length,
        placement=placement,
        frozen=frozen,
        leave=lambda state: placement.leave(program.joined(state, frozen)),
        processes=setting.processes,
        is_asked=is_asked,
        print_freq=job.print_freq,
        checkpoint_bytes=size,
        data_draw=any(feed.may_draw for feed in setting.request.feeds.values()),
    )


def _warn_of_evaluation(job: Job) -> None:
    if not job.train_mode:
        warn(
            "train() outside `with distiller:` runs the student in evaluation mode: dropout is off "
            "and batch statistics stand still. Write `with distiller: distiller.train(…)`",
            PreflightWarning,
        )


def _prepared(setting: _Setting, first: Mapping[str, Batch]) -> Prepared:
    """Runs the preflight."""
    job, request, placement = setting.job, setting.request, setting.placement
    prepared = prepare(
        job,
        first,
        request.optimizer,
        max_grad_norm=request.max_grad_norm,
        device=placement.devices[0],
    )
    program = next(iter(prepared.programs.values()))
    setting.progress.note(
        job=prepared.job, student=program.student.model, projections=program.projections
    )
    for batch in first.values():
        placement.check(batch)
    if job.config.sharding == "teacher" and not any(
        p.teacher.sides for p in prepared.programs.values()
    ):
        raise ValueError(
            f"sharding='teacher', but {job.name} has no teacher; use sharding='all' to cut the model "
            "itself, or None"
        )
    return prepared


def _teachers(
    prepared: Prepared, placement: Placement
) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Each task's teacher: its arrays, placed, and what a record says of them."""
    place = placement if prepared.job.cache is None else placement_to_cache(placement)
    programs = prepared.programs.items()
    teachers = {name: place.teacher(program.teacher.variables) for name, program in programs}
    return teachers, {name: weights_of(place.leave(x)) for name, x in teachers.items()}


def _take_folder(progress: Progress, processes: Processes) -> None:
    """Sees to it that no other run has the same `output_dir`; made if it is not there."""
    with processes.together("taking output_dir for this run"):
        make(progress.outcome.job.config.output_dir)
        if processes.rank == 0:
            progress.lock.take()


@contextlib.contextmanager
def _checkpoints(
    progress: Progress, processes: Processes, resumed: Resumed | None
) -> Iterator[Checkpoints]:
    """The run's checkpoints; closed at the end, when it is known which of them is the best."""
    config = progress.outcome.job.config
    _take_folder(progress, processes)
    # What is resumed from elsewhere leaves no checkpoint here to go on from.
    is_here = resumed is not None and resumed.path.parent == Path(config.output_dir).absolute()
    checkpoints = Checkpoints(
        config.output_dir,
        resume=is_here or config.resume is True,
        max_to_keep=config.max_to_keep,
        start=resumed.position.global_step if resumed is not None and is_here else None,
        is_chief=processes.rank == 0,
        barrier=processes.barrier(),
    )

    def close() -> None:
        try:
            checkpoints.close()
        finally:
            progress.note(best_checkpoint=checkpoints.best())

    with afterwards("closing the checkpoints", close):
        yield checkpoints


@contextlib.contextmanager
def _metrics(setting: _Setting, *, is_new: bool) -> Iterator[MetricsWriter]:
    """Where the numbers go; closed at the end."""
    metrics = MetricsWriter(_sinks(setting, is_new=is_new) if setting.processes.rank == 0 else ())
    with afterwards("writing the metrics", metrics.close):
        yield metrics


def _sinks(setting: _Setting, *, is_new: bool) -> Iterator[Sink]:
    """Files first, then the user's own."""
    job, writer = setting.job, setting.job.open_writer()
    if writer is not None:
        from .event_files import Tensorboard  # only who writes waits for its imports

        yield Tensorboard(writer)
    if job.config.log_dir is not None:
        yield JsonLines(job.config.log_dir, is_new=is_new)
    yield from setting.request.writers


def _rehearse(request: Request) -> None:
    """Tells by shape, before anything is compiled, what would be wrong with an evaluation."""
    if request.evaluation is None:
        return
    with undisturbed(request.loaders):
        names = request.evaluation.rehearse()
    if names is not None:
        request.evaluation.check_names(names)


def _compiled(program: Program, placement: Placement, teacher: Any) -> CompiledTask:
    return CompiledTask(
        step=placement.compile(program),
        teacher_variables=teacher,
        tags=_tags(program),
        is_scaled=program.precision.is_scaled,
        names=program.names,
        examine=partial(placement.examine, program),
        counter=placement.counter(program) if program.objective.scheduled.parts else None,
    )


def _tags(program: Program) -> tuple[str, ...]:
    """The names of a step's numbers in the logs."""
    scaled = ("loss_scale", "skipped_windows") if program.precision.is_scaled else ()
    names = [
        name if name.startswith(PREFIX) else f"scalar/{name}" for name in (*program.names, *scaled)
    ]
    return _TOTAL, *names


def _copies(placement: Placement, state: TrainState) -> Any:
    """The arrays of a state as checkpoints hold it, for `Outcome.variables`."""
    return placement.local((state.params, state.model_state))


def _rows(job: Job, factor: Callable | None, total: int) -> np.ndarray:
    """What the schedule gives after each number of updates, from 0 to all: ``[total + 1, columns]``.

    The last row is for batches that no update follows. Their losses are weighted all the same; a
    learning rate is not asked for there, where the schedule may have no value.
    """
    scheduled = job.objective.scheduled
    rows = np.ones((total + 1, len(scheduled.columns)), np.float64)
    for column, weight in enumerate(scheduled.columns):
        if weight is not None:
            rows[:, column] = weight.table(total)
    if scheduled.temperature is not None and np.min(rows[:, TEMPERATURE]) <= 0:
        step = int(np.argmin(rows[:, TEMPERATURE]))
        raise ValueError(
            f"base_temperature_scheduler gives {rows[step, TEMPERATURE]:g} after {step} of {total} updates: "
            "a temperature is a number above 0"
        )
    if factor is not None:
        rows[:total, 2] = tabulate(factor, np.arange(total))
        rows[total, 2] = rows[total - 1, 2]
    return rows.astype(jnp.result_type(float))


def _bring_back(setting: _Setting, end: Resumed, on_checkpoint: OnCheckpoint) -> None:
    """Takes from its last checkpoint what a finished run has left."""
    logger.info("%s is the end of this run; nothing is left to train", end.path.name)
    job, request, processes = setting.job, setting.request, setting.processes
    if changes.record_in(end.saved) is None:
        found = changes.compare_configs(end.saved, job.about)
        changes.check(end.path, job.config, found, processes)
    tags = {_TOTAL}
    # Projections of custom matches are made when the models are looked at.
    if job.custom_matches or changes.record_in(end.saved) is not None:
        start = Position()
        with processes.together("checking the models and the first batch"):
            first = open_streams(request, setting.timeline, start, job.config.seed).first
            prepared = _prepared(setting, first)
            rows = _rows(prepared.job, setting.factor, setting.timeline.total_steps)
        job = prepared.job
        tags = {tag for program in prepared.programs.values() for tag in _tags(program)}
        _, weights = _teachers(prepared, setting.placement)
        recorded(
            ahead_of(prepared, request, first, weights, start, processes), rows, end, processes
        )
    student = next(iter(job.tasks.values())).student.model
    projections = job.projections.models()
    progress = setting.progress
    with _checkpoints(progress, processes, end) as checkpoints:
        variables = read_variables(end.path, student, projections)
        progress.note(job=job, student=student, projections=projections)
        evaluations = Evaluations(request, progress, on_checkpoint, checkpoints, processes, end)
        if evaluations.is_missing(end.position.global_step, saves=True):
            with _metrics(setting, is_new=False) as metrics:
                metrics.go_on(end.path.name, end.position.micro_step, tags)
                evaluations.make(variables, end.position, metrics, is_saved=True)
    progress.note(steps=end.position.global_step, variables=variables)


def report(
    job: Job, batches: Mapping[str, Batch], optimizer: Optimizer | None, on: str | None = None
) -> str:
    """Checks as `train` would, and describes what would be trained and at what cost.

    Args:
        job: what to train.
        batches: a batch of each task.
        optimizer: as for ``train``, or None.
        on: devices that need not be there, see `machine.described`; needs the optimizer.
    """
    if on is not None and optimizer is None:
        raise ValueError(f"check(…, on={on!r}) needs the optimizer, whose state takes memory too")
    halves = job.config.fp16 and job.config.fp16_opt_level != "O0"
    prepared = prepare(
        job,
        batches,
        optimizer or (lambda **options: optax.sgd(1.0)),
        device=resolve_device(job.config.device) if halves else None,
    )
    lines = [f"{job.name}: nothing wrong was found"]
    for task, program in prepared.programs.items():
        lines += ["", f"task {task!r}"] if task else [""]
        lines.append(describe(program, batches[task], with_optimizer=optimizer is not None))
    if on is not None and optimizer is not None:
        lines += ["", *account_on(on, job, batches, optimizer)]
    return "\n".join(lines)
