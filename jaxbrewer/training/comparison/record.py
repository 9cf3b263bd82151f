"""What a checkpoint keeps of the job it was trained by, beside the configs, as JSON.

=============  =========================================================================
versions       of the libraries that trace and compute
precision      the level that models and optimizer ran at, in words
train_mode     whether the student trained in train mode
max_grad_norm  0 where nothing is clipped
tau            of the order of several tasks
trainable      the names of the student's parameters that are trained; not there where all are
optimizer      the trace of its start and of an update, without clipping and accumulation
tasks          task → its `batch` by shape and the `rows` of all processes; its `plan` in words; the
               teacher's `weights`; the traces of `teacher`, `student` and `loss`
probes         here and in each task: numbers that optimizer and loss give on made-up arrays
schedule       rows for the steps done, see `with_schedule`
=============  =========================================================================
"""

import hashlib
import importlib.metadata
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ...data.batches import Batch, Static, sides
from ...machine.placement import rows_of
from ...preflight.prepare import Prepared
from ...step import optimizer as optimizers
from ...step.program import Program
from ..digests import digests, json_digest, kind_of
from ..request import Request
from . import parts

_LIBRARIES = ("jaxbrewer", "jax", "flax", "optax")
_MOST_ROWS = 256

_probed: dict[str, Any] = {}  # digest of a trace → what the probe of that function gave


@dataclass(frozen=True)
class Ahead:
    """A run that is about to begin, as far as a record is made of it.

    Attributes:
        prepared: the job and its programs.
        request: the arguments of ``train``.
        batches: task → its first batch.
        rows: task → rows of that batch, in all processes together.
        is_last: whether it is the last of an epoch, which may have fewer rows than others.
        weights: task → see `weights_of`.
    """

    prepared: Prepared
    request: Request
    batches: Mapping[str, Batch]
    rows: Mapping[str, int]
    is_last: bool
    weights: Mapping[str, Any]


def make_record(ahead: Ahead, saved: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The record of a run, but for its schedule.

    Args:
        ahead: the run.
        saved: the record that it is to be compared with, whose batches' shapes are used to trace
            with where this run's are alike.
    """
    job, programs = ahead.prepared.job, ahead.prepared.programs
    program = next(iter(programs.values()))
    params = program.trained(program.variables[0])
    optimizer = optimizers.build(ahead.request.optimizer, job.projections.groups())
    update = parts.trace_optimizer(optimizer, params)
    then = (saved or {}).get("tasks", {})
    return {
        "versions": versions(),
        "precision": str(program.precision),
        "train_mode": program.train,
        "max_grad_norm": max(float(ahead.request.max_grad_norm), 0.0),
        "tau": float(ahead.request.tau),
        "optimizer": update,
        "probes": {"optimizer": _probe(update, lambda: parts.probe_optimizer(optimizer, params))},
        "tasks": {name: _task(p, name, ahead, then.get(name)) for name, p in programs.items()},
        **({} if program.parting is None else {"trainable": sorted(program.parting.trained)}),
    }


def versions() -> dict[str, str]:
    """The versions of the libraries that trace and compute; of one that is not installed, ``''``."""
    return {name: _version(name) for name in _LIBRARIES}


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # jaxbrewer itself, run from its clone
        return ""


def _task(
    program: Program, name: str, ahead: Ahead, saved: Mapping[str, Any] | None
) -> dict[str, Any]:
    batch = ahead.batches[name]
    rows: int | None = None if ahead.is_last else ahead.rows[name]
    if saved is not None and (like := shaped_like(batch, saved["batch"])) is not None:
        batch, rows = like, rows or saved["rows"]
    traces, inputs = parts.traces(program, batch)
    probe = _probe(
        traces["loss"], lambda: parts.probe_loss(program, inputs, rows_of(sides(batch)[1]))
    )
    return {
        "batch": outline(batch),
        "rows": rows,
        "plan": program.objective.terms(program.names),
        "weights": ahead.weights[name],
        "probes": {"loss": probe},
        **traces,
    }


def _probe(trace: Mapping[str, Any], run: Callable[[], Any]) -> Any:
    """What a probe gives; of a function that was probed before, without running it again."""
    if trace["digest"] not in _probed:
        _probed[trace["digest"]] = run()
    return _probed[trace["digest"]]


def weights_of(variables: Any) -> dict[str, Any]:
    """A teacher's arrays: one digest of all, and how many there are of each type.

    Without random keys, for nothing random happens in it. Across processes all must call it.
    """
    each = {
        name: text
        for name, text in digests(variables).items()
        if not text.startswith("key<") and "rngs" not in name.split("/")
    }
    types = [text.partition("[")[0] for text in each.values()]
    return {"digest": json_digest(each), "types": {kind: types.count(kind) for kind in types}}


# --------------------------------------------------------------------------------------- batches


def outline(batch: Batch) -> dict[str, str]:
    """Name of an input → its type and shape, ``'int32[8,128]'``; of a flag, its value."""
    names, leaves, _ = _opened(batch)
    return dict(zip(names, map(_kind, leaves), strict=True))


def shaped_like(batch: Batch, saved: Mapping[str, str]) -> Batch | None:
    """A batch by shape, with the shapes of an `outline`; None if that is of other inputs or axes."""
    names, leaves, structure = _opened(batch)
    mine = dict(zip(names, map(_kind, leaves), strict=True))
    if mine.keys() != saved.keys() or any(axes(mine[k]) != axes(saved[k]) for k in mine):
        return None
    pairs = zip(names, leaves, strict=True)
    return jax.tree.unflatten(structure, [_as_said(leaf, saved[name]) for name, leaf in pairs])


def axes(kind: str) -> int:
    """How many axes an input has, by its `outline`; -1: it is a flag."""
    shape = re.search(r"\[(.*)\]", kind)
    return -1 if shape is None else len([n for n in shape[1].split(",") if n])


def _opened(batch: Batch) -> tuple[list[str], list[Any], Any]:
    """Names, leaves by shape, and structure of a batch; its flags are leaves."""
    pairs, structure = jax.tree_util.tree_flatten_with_path(
        batch, is_leaf=lambda x: isinstance(x, Static)
    )
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in pairs]
    return names, [_shape(leaf) for _, leaf in pairs], structure


def _shape(leaf: Any) -> Any:
    """An array by shape, in the type that JAX has it in; a flag as it is."""
    return leaf if isinstance(leaf, Static) else jax.eval_shape(lambda x: x, leaf)


def _kind(leaf: Any) -> str:
    return str(leaf.value) if isinstance(leaf, Static) else kind_of(leaf)


def _as_said(leaf: Any, kind: str) -> Any:
    """A leaf as an outline has it."""
    if isinstance(leaf, Static):
        return Static({"True": True, "False": False}.get(kind))
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return leaf
    dtype, _, sizes = kind.rstrip("]").partition("[")
    return jax.ShapeDtypeStruct(tuple(int(n) for n in sizes.split(",") if n), jnp.dtype(dtype))


# -------------------------------------------------------------------------------------- schedule


def with_schedule(record: Mapping[str, Any], rows: np.ndarray, step: int) -> dict[str, Any]:
    """A record with the rows of the schedule that the steps done have had.

    Args:
        record: see `make_record`.
        rows: ``[steps, 3]``, see `step.program.Program`.
        step: steps done.

    They are kept as a digest of all, and 256 of them, evenly spread, the last among them:
    ``{'steps': n, 'digest': …, 'rows': {step: [3 numbers]}}``. Step 1 is the first.
    """
    chosen = np.unique(np.linspace(0, step - 1, min(step, _MOST_ROWS)).astype(int))
    schedule = {
        "steps": step,
        "digest": rows_digest(rows[:step]),
        "rows": {str(i + 1): [float(x) for x in rows[i]] for i in chosen},
    }
    return {**record, "schedule": schedule}


def rows_digest(rows: np.ndarray) -> str:
    """The SHA-256 of rows of the schedule."""
    return hashlib.sha256(f"{rows.dtype}{rows.shape}".encode() + rows.tobytes()).hexdigest()
