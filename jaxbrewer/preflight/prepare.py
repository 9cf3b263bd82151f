"""The preflight: every model, adaptor and the whole step run by shape, and each task's program built.

All that is wrong, in all tasks, is one error, before anything compiles.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp

from ..data.batches import Batch, plain, sides, signature_of
from ..errors import (
    BatchError,
    Findings,
    PrecisionError,
    PreflightError,
    PreflightWarning,
    explained,
    warn,
)
from ..models.adaptors import Results, model_name
from ..models.precision import Precision, at_level, resolve
from ..models.trainable import Parting, part
from ..objective.loss import full_weights, project_by_shape
from ..objective.objectives import Objective
from ..objective.submodules import resolve_custom
from ..step import optimizer as optimizers
from ..step.optimizer import Optimizer
from ..step.program import Program
from .doubts import counts_padding, doubt
from .job import Job, Task
from .sides import check_trainable
from .sides import inspect as inspect_side


@dataclass(frozen=True)
class Prepared:
    """What preflight gives.

    Attributes:
        job: the job, resolved: submodules found, all projections made.
        programs: task → its program.
        padded: the tasks whose KD loss takes every position, padding or not.
    """

    job: Job
    programs: dict[str, Program]
    padded: frozenset[str] = frozenset()


def prepare(
    job: Job,
    batches: Mapping[str, Batch],
    optimizer: Optimizer,
    *,
    max_grad_norm: float = -1.0,
    accumulation: int | None = None,
    device: jax.Device | None = None,
) -> Prepared:
    """Runs the preflight and builds each task's program.

    Args:
        job: the job.
        batches: task → its first batch.
        optimizer: see `distillers.base.Trainable.train`.
        max_grad_norm: see `optimizer.build`.
        accumulation: the same; the config's unless given.
        device: see `precision.resolve`.

    Raises:
        PrecisionError: the device lacks the half type.
        PreflightError: all that is wrong, in all tasks.
    """
    precision = resolve(job.config, device)
    found = Findings(problems=list(job.objective.missing))
    traced = {}
    for name, batch in batches.items():
        mine = Findings()
        job, traced[name] = _trace(job, name, batch, precision, mine)
        found.extend(mine, f"task {name!r}: " if name else "")
    _check_something_trains(job, traced, found)
    transformation = _optimizer(job, optimizer, max_grad_norm, accumulation, precision, found)
    _tell(found)
    objectives = _counted(job, traced)
    programs = {
        name: _with_names(
            Program(
                one.task.student,
                one.task.teacher,
                {k: at_level(p, precision) for k, p in job.projections.models().items()},
                objectives[name],
                transformation,
                (),
                job.train_mode,
                precision,
                max_nonfinite_steps=job.config.max_nonfinite_steps,
                parting=one.parting,
            ),
            one,
        )
        for name, one in traced.items()
    }
    if jax.tree.leaves(job.objective.init()):
        observed = tuple(sorted({name for p in programs.values() for name in p.names}))
        if missing := [name for name in job.objective.needs if name not in observed]:
            raise PreflightError(
                [
                    f"compute_loss returns no {' and no '.join(map(repr, missing))} among its terms, "
                    "by which the state of the config's objective moves on: hand on what "
                    "super().compute_loss(…) gave, return total, {…, **loss.terms}"
                ]
            )
        programs = {name: replace(p, observed=observed) for name, p in programs.items()}
    for name, program in programs.items():
        _trace_step(program, batches[name])
    _check_loss_is_of_what_trains(job, programs, batches)
    padded = {k for k, one in traced.items() if counts_padding(job.objective, one.results_S)}
    return Prepared(job, programs, frozenset(padded))


def _optimizer(
    job: Job,
    optimizer: Optimizer,
    max_grad_norm: float,
    accumulation: int | None,
    precision: Precision,
    found: Findings,
) -> Any:
    try:
        return optimizers.build(
            optimizer,
            job.projections.groups(),
            max_grad_norm=max_grad_norm,
            accumulation=accumulation or job.config.gradient_accumulation_steps,
            clips_projections=precision.level != "O0",  # as TextBrewer does under Apex
        )
    except TypeError as error:
        found.problems.append(str(error))


def _tell(found: Findings) -> None:
    """Warns, and raises all problems at once."""
    for message in dict.fromkeys(found.warnings):
        warn(message, PreflightWarning)
    if found.problems:
        raise PreflightError(list(dict.fromkeys(found.problems)))


def _trace_step(program: Program, batch: Batch) -> None:
    """Traces a whole step by shape: what is left to go wrong is mostly the optimizer's."""
    try:
        _step_by_shape(program, batch)
    except PrecisionError as error:
        raise PreflightError([str(error)]) from error
    except Exception as error:
        doubt = (
            "Is one of the optimizer's numbers text (optax.adamw('1e-4'))? "
            if isinstance(error, TypeError)
            else ""
        ) + (
            "Does the optimizer need arguments of its own in update (value=…, as line searches do)? "
            "Those have none here"
        )
        if program.parting is not None:
            doubt += (
                ". Or has it a mask or labels for all parameters? With trainable= it gets a dictionary "
                "from dotted name to array of what is trained: make them by a function, as "
                "mask=jaxbrewer.decay_mask does"
            )
        said = f"{type(error).__name__}: {str(error).rstrip('.')}"
        raise PreflightError([f"the train step cannot be built: {said}. {doubt}"]) from error


def _step_by_shape(program: Program, batch: Batch) -> None:
    state, frozen = program.parted(jax.eval_shape(lambda: program.init(0)))
    program.compiled.eval_shape(state, program.teacher.variables, batch, program.row, frozen)


def _check_loss_is_of_what_trains(
    job: Job, programs: Mapping[str, Program], batches: Mapping[str, Batch]
) -> None:
    """Refuses a `trainable` of which no loss depends: it would be trained on nothing, in silence."""
    partings = [p.parting for p in programs.values() if p.parting is not None]
    trained = sorted({name for parting in partings for name in parting.trained})
    if not trained or any(_depends_on_trained(p, batches[task]) for task, p in programs.items()):
        return
    raise PreflightError(
        [
            f"no loss depends on what trainable={job.trainable!r} finds: {', '.join(trained[:6])}. "
            "Nothing of the student would be trained: name parameters below what is compared, or "
            "compare what lies above them"
        ]
    )


def _depends_on_trained(program: Program, batch: Batch) -> bool:
    """Whether the loss depends on a trained parameter of the student, by its trace."""
    state, frozen = program.parted(jax.eval_shape(lambda: program.init(0)))

    def total(student: Any, state: Any, teacher: Any, batch: Batch, frozen: Any) -> Any:
        params = program.whole({**state.params, "student": student}, frozen)
        return program.loss(params, *program.inputs(state, teacher, batch, program.row))[0]

    arguments = state.params["student"], state, program.teacher.variables, batch, frozen
    jaxpr = jax.make_jaxpr(total)(*arguments).jaxpr
    needed = {id(x) for x in jaxpr.outvars}
    for equation in reversed(jaxpr.eqns):
        if any(id(x) in needed for x in equation.outvars):
            needed |= {id(x) for x in equation.invars}
    count = len(jax.tree.leaves(state.params["student"]))
    return any(id(x) in needed for x in jaxpr.invars[:count])


def check_by_shape(program: Program, batch: Batch) -> None:
    """Runs the step by shape on a later batch, of other shapes or types than those before it.

    On one device nothing is traced twice: the step finds its trace again.

    Raises:
        BatchError: it cannot be run, and which model or adaptor cannot.
    """
    try:
        _step_by_shape(program, batch)
        return
    except BatchError:
        raise
    except Exception as error:  # noqa: BLE001  the user's models and losses may raise anything
        cause = error
    found = Findings()
    teacher_batch, student_batch, cache = sides(batch)
    inspect_side(program.student, student_batch, program.train, found)
    for side in program.teacher.sides if cache is None else ():
        inspect_side(side, teacher_batch, False, found)
    first = str(cause).partition("\n")[0]
    problems = found.problems or [
        f"the step failed on the batch ({signature_of(batch)}): {type(cause).__name__}: {first}"
    ]
    raise BatchError(
        f"{'; '.join(dict.fromkeys(problems))}. The first batch was fine: these shapes or types are "
        "not. Mend them in the loader or with train(…, batch_postprocessor=…)"
    ) from cause


@dataclass(frozen=True)
class _Traced:
    """What tracing a task by shape gave: its sides at their level, their results, what is trained."""

    task: Task
    results_S: Any
    results_T: Any
    parting: Parting | None


def _counted(job: Job, traced: Mapping[str, _Traced]) -> dict[str, Objective]:
    """Task → its objective, which knows over what its parts are means where that is needed."""
    config, found = job.config, Findings()
    is_exact = config.gradient_accumulation == "exact" and config.gradient_accumulation_steps > 1
    objectives: dict[str, Objective] = {}
    for name, one in traced.items():
        objectives[name], mine = job.objective, Findings()
        if is_exact or "sample_weight" in one.results_S:
            projections = job.projections.models()
            objectives[name] = job.objective.counted(
                one.results_S, one.results_T, projections, mine.problems, is_exact=is_exact
            )
        found.extend(mine, f"task {name!r}: " if name else "")
    _tell(found)
    return objectives


def _trace(
    job: Job, name: str, batch: Batch, precision: Precision, found: Findings
) -> tuple[Job, _Traced]:
    """Traces every model of a task by shape, then checks the objective on what they gave."""
    parting = _parting(job, name, found)
    task = _at_level(job.tasks[name], precision, parting)
    teacher_batch, student_batch, cache = sides(batch)
    results_S = inspect_side(task.student, student_batch, job.train_mode, found, job.keywords)
    results_T: Any = None
    before = len(found.problems)
    if cache is None:
        for side in task.teacher.sides:
            inspect_side(side, teacher_batch, False, found, job.keywords)
    if results_S is None and len(found.problems) > before and _run_exchanged(job, task, batch):
        found.problems.append(
            "with adaptor_S and adaptor_T exchanged both would run: are they, or the models, swapped?"
        )
    if len(found.problems) == before and results_S is not None:
        if job.custom_matches:
            job, task = _with_submodules(job, name, task, batch, found)
            results_S = inspect_side(
                task.student, student_batch, job.train_mode, found, job.keywords
            )
        results_T = _teacher_results(task, teacher_batch, cache, found)
    if results_S is not None and results_T is not None:
        projections = job.projections.models()
        job.objective.check(results_S, results_T, student_batch, projections, found)
        doubt(job.tasks[name], job.objective, job.config, results_S, batch, found)
    return job, _Traced(task, results_S, results_T, parting)


def _parting(job: Job, name: str, found: Findings) -> Parting | None:
    """Finds what is trained of a task's student."""
    side = job.tasks[name].student
    role = model_name(side.role)
    parting = part(side.model, job.trainable, role, found.problems)
    params = side.model.params
    check_trainable(params if parting is None else parting.part(params)[0], role, found)
    if not jax.tree.leaves(params):
        found.problems.append(f"{role} has no parameters to train")
    return parting


def _check_something_trains(job: Job, traced: Mapping[str, _Traced], found: Findings) -> None:
    """Refuses a job of which all is frozen."""
    partings = [one.parting for one in traced.values()]
    is_frozen = all(parting is not None and not parting.trained for parting in partings)
    if is_frozen and not job.projections.models() and not found.problems:
        found.problems.append(
            f"trainable={job.trainable!r} leaves nothing of the student to train, and there is no "
            "projection: name what is to be trained"
        )


def _run_exchanged(job: Job, task: Task, batch: Batch) -> bool:
    """Whether a task of one teacher would run with the two adaptors exchanged."""
    teacher_batch, student_batch, cache = sides(batch)
    if len(task.teacher.sides) != 1 or cache is not None:
        return False
    (teacher,), student, found = task.teacher.sides, task.student, Findings()
    inspect_side(replace(student, adaptor=teacher.adaptor), student_batch, job.train_mode, found)
    inspect_side(replace(teacher, adaptor=student.adaptor), teacher_batch, False, found)
    return not found.problems


def _at_level(task: Task, precision: Precision, parting: Parting | None) -> Task:
    trained = None if parting is None else parting.trained
    model = at_level(task.student.model, precision, trained=trained)
    student = replace(task.student, model=model)
    teacher_sides = tuple(
        replace(side, model=at_level(side.model, precision, frozen=True))
        for side in task.teacher.sides
    )
    return Task(student, replace(task.teacher, sides=teacher_sides))


def _with_submodules(
    job: Job, name: str, task: Task, batch: Batch, found: Findings
) -> tuple[Job, Task]:
    """Finds the submodules that are matched, and makes their projections.

    Projections that an earlier training made are kept: later ones go on with the same.
    """
    parts = sides(plain(batch))
    (side_T,) = task.teacher.sides
    matches, asked, options = resolve_custom(
        job.custom_matches,
        (side_T.model, *side_T.call(parts[0])),
        (task.student.model, *task.student.call(parts[1])),
        job.first_custom,
        found.problems,
    )
    projections = job.projections
    if len(projections) == job.first_custom:
        for proj, group in zip(asked, options, strict=True):
            projections = projections.plus(proj, group, job.config.seed)
    paths_T, paths_S = (
        tuple(dict.fromkeys(str(getattr(m, layer)) for m in matches))
        for layer in ("layer_T", "layer_S")
    )
    job = replace(
        job,
        tasks={**job.tasks, name: job.tasks[name].capturing(paths_S, paths_T)},
        objective=job.objective.with_matches(matches),
        projections=projections,
    )
    return job, task.capturing(paths_S, paths_T)


def _teacher_results(task: Task, batch: Batch, cache: Any, found: Findings) -> Any:
    teacher = task.teacher
    try:
        return jax.eval_shape(teacher.__call__, teacher.variables, batch, cache)
    except Exception as error:  # noqa: BLE001  an adaptor of outputs computed before
        what = "teacher_cache: " if cache is not None else ""
        said = str(error) if isinstance(error, ValueError) else explained(error)
        found.problems.append(f"{what}{said}")
    return None


def _with_names(program: Program, traced: _Traced) -> Program:
    """Traces the loss as a whole: finds the names of its terms, and what it reads of the teacher."""
    names: list[str] = []
    project = project_by_shape(program.projections)

    def whole(results_T: Results, results_S: Results) -> Any:
        weights = full_weights(program.objective.init())
        loss = program.objective(results_S, results_T, project, weights)
        names.extend(loss.terms)
        return jnp.asarray(loss.total), {k: jnp.asarray(v) for k, v in loss.terms.items()}

    try:
        trace = jax.make_jaxpr(whole, return_shape=True)
        closed, (total, terms) = trace(traced.results_T, traced.results_S)
    except Exception as error:
        raise PreflightError([f"compute_loss failed: {explained(error)}"]) from error
    wrong = [
        f"compute_loss gives {name} as {value.dtype}{list(value.shape)}; it must be one number"
        for name, value in {"the total": total, **terms}.items()
        if value.shape != () or not jnp.issubdtype(value.dtype, jnp.floating)
    ]
    read_T, read_S = _read_leaves(closed.jaxpr, traced.results_T, traced.results_S)
    if not read_S:
        wrong.append(
            "compute_loss makes nothing of what adaptor_S returns, so nothing would be trained: it "
            f"returns {', '.join(map(repr, traced.results_S)) or 'nothing'}"
        )
    if wrong:
        raise PreflightError(wrong)
    return replace(program, names=tuple(names), reads=read_T)


def _read_leaves(jaxpr: Any, *results: Results) -> list[frozenset[str]]:
    """The names of the leaves of each argument that a trace does anything with."""
    used = {id(x) for equation in jaxpr.eqns for x in equation.invars}
    used |= {id(x) for x in jaxpr.outvars}
    variables = iter(jaxpr.invars)
    return [
        frozenset(
            jax.tree_util.keystr(path, simple=True, separator="/")
            for path, _ in jax.tree_util.tree_leaves_with_path(one)
            if id(next(variables)) in used
        )
        for one in results
    ]
