"""The comparison at a run's start."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ...data.batches import Batch
from ...data.streams import Position
from ...machine.placement import rows_of
from ...machine.processes import Processes
from ...preflight.prepare import Prepared
from ..request import Request
from ..resume import Resumed
from . import changes
from .record import Ahead, make_record


def ahead_of(
    prepared: Prepared,
    request: Request,
    first: Mapping[str, Batch],
    weights: Mapping[str, Any],
    start: Position,
    processes: Processes,
) -> Ahead:
    """The run as it begins; across processes all must call it."""
    rows = {name: int(processes.numbers(rows_of(x)).sum()) for name, x in first.items()}
    lengths = [feed.length for feed in request.feeds.values()]
    is_known = len(lengths) == 1 and lengths[0] is not None
    is_last = not is_known or start.batch + 1 == lengths[0]
    return Ahead(prepared, request, first, rows, start.micro_step > 0 and is_last, weights)


def recorded(
    ahead: Ahead, rows: np.ndarray, resumed: Resumed | None, processes: Processes
) -> dict[str, Any]:
    """The record of a run, which is refused where it is not the job that it goes on with."""
    job = ahead.prepared.job
    with processes.together("comparing the job"):
        saved = None if resumed is None else changes.record_in(resumed.saved)
        record = make_record(ahead, saved)
    if resumed is not None:
        found = changes.compare(resumed.saved, job.about, record, ahead, rows)
        changes.check(resumed.path, job.config, found, processes)
    return record
