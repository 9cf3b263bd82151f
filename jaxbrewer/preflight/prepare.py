"""The preflight: every model, adaptor and the whole step run by shape, and each task's program built.

All that is wrong, in all tasks, is one error, before anything compiles.
"""

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from ..data.batches import Batch, sides
from ..errors import Findings, PrecisionError, PreflightError, PreflightWarning
from ..models.adaptors import Results, Side
from ..models.precision import Precision, at_level, resolve
from ..models.teachers import Teacher
from ..objective.loss import Loss, Weights
from ..step import optimizer as optimizers
from ..step.optimizer import Optimizer
from ..step.program import Program
from .sides import inspect as inspect_side

if TYPE_CHECKING:
    from ..distillers.base import Trainable


def prepare(
    distiller: "Trainable",
    batches: Mapping[str, Batch],
    optimizer: Optimizer,
    args: Mapping[str, Any],
    *,
    max_grad_norm: float = -1.0,
    accumulation: int | None = None,
    device: jax.Device | None = None,
) -> dict[str, Program]:
    """Runs the preflight and builds each task's program.

    Args:
        distiller: the distiller.
        batches: task → its first batch.
        optimizer: see `trainable.Trainable.train`.
        args: further keyword arguments for the models.
        max_grad_norm: see `optimizer.build`.
        accumulation: the same; the config's unless given.
        device: see `precision.resolve`.

    Raises:
        PrecisionError: the device lacks the half type.
        PreflightError: all that is wrong, in all tasks.
    """
    precision = resolve(distiller.t_config, device)
    found = Findings()
    found.problems.extend(distiller._resolve())
    traced = {}
    for task, batch in batches.items():
        mine = Findings()
        traced[task] = _trace(distiller, task, batch, args, precision, mine)
        prefix = f"task {task!r}: " if task else ""
        found.problems.extend(prefix + problem for problem in mine.problems)
        found.warnings.extend(prefix + warning for warning in mine.warnings)
    try:
        transformation = optimizers.build(
            optimizer,
            distiller._projection_options(),
            max_grad_norm=max_grad_norm,
            accumulation=accumulation or distiller.t_config.gradient_accumulation_steps,
            clips_projections=precision.level != "O0",  # as TextBrewer does under Apex
        )
    except TypeError as error:
        found.problems.append(str(error))
    for message in dict.fromkeys(found.warnings):
        warnings.warn(message, PreflightWarning, stacklevel=5)
    if found.problems:
        raise PreflightError(list(dict.fromkeys(found.problems)))

    def compute_loss(
        results_S: Results, results_T: Results, project: Any, weights: Weights
    ) -> Loss:
        loss = distiller.compute_loss(results_S, results_T, project, weights)
        if isinstance(loss, Loss):
            return loss
        if not (isinstance(loss, tuple) and len(loss) == 2 and isinstance(loss[1], Mapping)):
            raise TypeError(
                f"compute_loss returned a {type(loss).__name__}; return the pair (total, {{name: "
                "term}}) or a jaxbrewer.Loss"
            )
        return Loss(loss[0], dict(loss[1]), 0)

    projections = {k: at_level(p, precision) for k, p in distiller._projections().items()}
    programs = {
        task: _with_names(
            Program(
                one.student,
                one.teacher,
                projections,
                compute_loss,
                transformation,
                (),
                distiller._in_context,
                precision,
            ),
            one.results_S,
            one.results_T,
        )
        for task, one in traced.items()
    }
    for task, program in programs.items():
        _trace_step(program, batches[task])
    return programs


def _trace_step(program: Program, batch: Batch) -> None:
    """Traces a whole step by shape: what is left to go wrong is mostly the optimizer's."""
    row = np.ones(3, jnp.result_type(float))
    try:
        state = jax.eval_shape(lambda: program.init(0))
        program.compiled.eval_shape(state, program.teacher.variables, batch, row)
    except PrecisionError as error:
        raise PreflightError([str(error)]) from error
    except Exception as error:
        raise PreflightError(
            [
                f"the train step cannot be built: {type(error).__name__}: {error}. Does the optimizer "
                "need arguments of its own in update (value=…, as line searches do)? Those have none here"
            ]
        ) from error


@dataclass
class _Traced:
    """What tracing a task by shape gave."""

    student: Side
    teacher: Teacher
    results_S: Any
    results_T: Any


def _trace(
    distiller: "Trainable",
    task: str,
    batch: Batch,
    args: Mapping[str, Any],
    precision: Precision,
    found: Findings,
) -> _Traced:
    """Traces every model of a task by shape, then checks the objective on what they gave."""
    keywords = tuple(inspect.signature(type(distiller).train).parameters)[1:-1]
    train = distiller._in_context
    student, teacher = distiller._sides(task, args)
    student = replace(student, model=at_level(student.model, precision))
    teacher = teacher.with_sides(
        [replace(s, model=at_level(s.model, precision, frozen=True)) for s in teacher.sides]
    )
    teacher_batch, student_batch, cache = sides(batch)
    results_S = inspect_side(student, student_batch, train, found, keywords)
    results_T: Any = None
    before = len(found.problems)
    if cache is None:
        for side in teacher.sides:
            inspect_side(side, teacher_batch, False, found, keywords)
    if len(found.problems) == before and results_S is not None:
        student, teacher = distiller._resolve_modules(student, teacher, batch, found)
        if student.capture:
            results_S = inspect_side(student, student_batch, train, found, keywords)
        try:
            results_T = jax.eval_shape(teacher.__call__, teacher.variables, teacher_batch, cache)
        except Exception as error:  # noqa: BLE001  an adaptor of outputs computed before
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            what = "teacher_cache: " if cache is not None else ""
            found.problems.append(f"{what}{kind}{error}")
    if results_S is not None and results_T is not None:
        distiller._check(results_S, results_T, student_batch, found)
    return _Traced(student, teacher, results_S, results_T)


def _with_names(program: Program, results_S: Results, results_T: Results) -> Program:
    """Finds the names of the loss's terms, by tracing it once more as a whole."""
    names: list[str] = []

    def whole(results_S: Results, results_T: Results) -> Any:
        def project(name: str, feature: jax.Array) -> jax.Array:
            model = program.projections[name]
            return model.apply(model.params, model.state, jax.random.key(0), (feature,), {}, False)[
                0
            ]

        loss = program.compute_loss(
            results_S, results_T, project, Weights(jnp.ones(()), jnp.ones(()))
        )
        names.extend(loss.terms)
        return jnp.asarray(loss.total), {k: jnp.asarray(v) for k, v in loss.terms.items()}

    try:
        total, terms = jax.eval_shape(whole, results_S, results_T)
    except Exception as error:
        raise PreflightError([f"compute_loss failed: {type(error).__name__}: {error}"]) from error
    wrong = [
        f"compute_loss gives {name} as {value.dtype}{list(value.shape)}; it must be one number"
        for name, value in {"the total": total, **terms}.items()
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating)
    ]
    if wrong:
        raise PreflightError(wrong)
    return replace(program, names=tuple(names))
