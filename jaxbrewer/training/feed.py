"""What the loop is fed with: batches, checked on the host, with the teacher's results if cached."""

import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax

from ..data.batches import Batch, check_ids, sides, signature_of
from ..data.likeness import Likeness
from ..data.states import put_back, random_state
from ..data.streams import Event, Micro, Position, by_epochs, checked, taken
from ..machine.placement import Placement, placement_to_cache
from ..machine.processes import Processes
from ..models.adaptors import model_name
from ..models.precision import FLOAT32
from ..models.teachers import Teacher
from ..preflight.doubts import padding_watch
from ..preflight.job import CacheOptions, Job
from ..preflight.prepare import Prepared, check_by_shape
from ..step.program import Program
from . import teacher_cache
from .checkpoints import Checkpoints
from .request import Request
from .resume import Opened
from .timeline import Timeline

logger = logging.getLogger(__name__)


def fed(
    prepared: Prepared,
    opened: Opened,
    request: Request,
    timeline: Timeline,
    start: Position,
    placement: Placement,
    processes: Processes,
    teachers: dict[str, Any],
) -> tuple[dict[str, Program], Iterator[Event]]:
    """The programs, and the stream of their batches: the teacher's results cached if asked for.

    `teachers` are their arrays, placed; that of a cached one is let go.
    """
    programs = prepared.programs
    checks = {
        name: batch_check(program, opened.first[name], warns_of_padding=name in prepared.padded)
        for name, program in programs.items()
    }
    if prepared.job.cache is None:
        return programs, checked(opened.events, checks)
    if timeline.epochs is None:
        raise ValueError(
            "is_caching_logits goes with num_epochs, not with num_steps: the cache is one pass over "
            "the loader"
        )
    (program,), (feed,) = programs.values(), request.feeds.values()
    if "" in start.loaders:
        put_back(start.loaders[""].begun, feed.loader)
    begun = random_state(feed.loader)
    stream = taken(by_epochs(feed.loader, 1, Position()), feed.postprocess)
    stream = checked(stream, checks)
    batches = [event.inputs for event in stream if isinstance(event, Micro)]
    loader = _cached(prepared.job, program, batches, placement, processes, teachers.pop(""))
    served = replace(program, teacher=Teacher())
    return {"": served}, by_epochs(loader, timeline.epochs, start, begun=begun)


def _cached(
    job: Job,
    program: Program,
    batches: list[Batch],
    placement: Placement,
    processes: Processes,
    variables: Any,
) -> teacher_cache.CachedLoader:
    """Runs the teacher once; returns the loader that serves its results with the batches."""
    cache = job.cache or CacheOptions(None, "float32")
    folder = cache.folder
    if processes.count > 1 and folder is not None:
        folder = str(Path(folder) / f"process-{processes.rank}")
    place = placement_to_cache(placement)
    return teacher_cache.build(
        program.teacher,
        variables,
        batches,
        program.reads,
        folder=folder,
        dtype=cache.dtype,
        seed=job.config.seed,
        place=place.batch,
        level="" if program.precision == FLOAT32 else str(program.precision),
    )


def watched(events: Iterator[Event], checkpoints: Checkpoints) -> Iterator[Event]:
    """The stream, which fails where a save has failed: in every process, as a batch's failure does."""
    checkpoints.check()
    for event in events:
        yield event
        checkpoints.check()


def _say_compiling(number: int, batch: Batch) -> None:
    if jax.process_index() == 0:
        logger.info("Compiling the step for shape %d: %s", number, signature_of(batch))


def batch_check(
    program: Program, first: Batch, *, warns_of_padding: bool = False
) -> Callable[[Batch], None]:
    """Checks a batch on the host: against the first, and the ids of every model that limits them.

    One of new shapes or types, for which the step is compiled anew, is run by shape before. Of each
    such compilation, the first included, a line tells.
    """
    look = padding_watch() if warns_of_padding else None
    student = program.student
    name = model_name(student.role)
    limited = [(student.model.signature(), student.model.id_limits, name, 1)]
    for side in program.teacher.sides:
        limited.append((side.model.signature(), side.model.id_limits, model_name(side.role), 0))
    likeness = Likeness(first)
    shapes = 0

    def check(batch: Batch) -> None:
        nonlocal shapes
        is_new = likeness.check(batch)
        parts = sides(batch)
        for signature, limits, role, part in limited:
            if part == 1 or parts[2] is None:
                check_ids(parts[part], signature, limits, role)
        if is_new:
            check_by_shape(program, batch)
        if is_new or not shapes:
            shapes += 1
            _say_compiling(shapes, parts[1])
        if look is not None:
            look(batch)

    return check
