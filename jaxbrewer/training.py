"""From a distiller and the arguments of ``train`` to a running loop: each thing is built once."""

import inspect
import itertools
import logging
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sized
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np

from . import optimizer as optimizers
from .adaptors import Results, Side
from .batches import Batch, check_ids, sides
from .checkpoints import Checkpoints
from .configurations import TrainingConfig
from .devices import resolve_device
from .errors import CheckpointError, PreflightError, PreflightWarning
from .loop import CallbackResult, Loop
from .metrics import MetricsWriter
from .objective import Loss, Weights
from .optimizer import Optimizer
from .plan import Schedule, Weight
from .preflight import Findings
from .preflight import inspect as inspect_side
from .schedulers import looks_absolute, tabulate
from .step import Program, TrainState
from .streams import Event, Micro, Position, by_epochs, by_steps, prepared
from .teachers import Teacher

if TYPE_CHECKING:
    from .distillers import Trainable

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """The arguments of one call of ``train``."""

    optimizer: Optimizer
    dataloader: Iterable
    num_epochs: int | None
    scheduler_class: Callable[..., Any] | None
    scheduler_args: Mapping[str, Any] | None
    scheduler: None
    max_grad_norm: float
    num_steps: int | None
    callback: Callable[..., Any] | None
    batch_postprocessor: Callable[[Any], Any] | None
    args: Mapping[str, Any]


def train(distiller: "Trainable", request: Request) -> None:
    """Runs one training. See `distillers.Trainable.train`."""
    config = distiller.t_config
    _refuse_unbuilt(config)
    schedule = _schedule(config, request)
    factor = _factor_schedule(request, schedule.total_steps)
    device = resolve_device(config.device)
    if not distiller._in_context:
        warnings.warn(
            "train() outside `with distiller:` runs the student in evaluation mode: dropout is off "
            "and batch statistics stand still. Write `with distiller: distiller.train(…)`",
            PreflightWarning,
            stacklevel=3,
        )

    # Looking at the first batch must come before anything is touched on disk, and not lose it. A
    # resumed run skips to its position, which only its checkpoint knows.
    latest = _latest_position(config) if config.resume else None
    start = latest or Position()
    if start.global_step >= schedule.total_steps and latest:
        logger.info("gs%d is the end of this run; nothing is left to train", start.global_step)
    events = prepared(_stream(request, schedule, start), request.batch_postprocessor)
    first, events = _peek(events)
    if first is None:
        _load_finished(distiller, config)
        return
    program = prepare(
        distiller,
        first.inputs,
        request.optimizer,
        request.args,
        max_grad_norm=request.max_grad_norm,
    )

    checkpoints = Checkpoints(
        config.output_dir, resume=config.resume, max_to_keep=config.max_to_keep
    )
    state = jax.device_put(program.init(config.seed), device)
    if latest is not None:
        state = checkpoints.restore(latest.global_step, state)
        logger.info("Resuming from gs%d", latest.global_step)
    metrics = MetricsWriter(distiller.tb_writer)
    loop = Loop(
        step=program.compile(),
        state=state,
        teacher_variables=jax.device_put(program.teacher.variables, device),
        rows=_rows(distiller, factor, schedule.total_steps),
        schedule=schedule,
        tags=("scalar/total_loss", *(f"scalar/{name}" for name in program.names)),
        check_batch=_batch_check(program),
        checkpoints=checkpoints,
        metrics=metrics,
        position=start,
        after_save=_after_save(distiller, program, request),
        describe=distiller._describe() | {"batches_per_epoch": _length(request.dataloader)},
        print_freq=distiller.print_freq,
    )
    try:
        loop.run(events)
        hand_over(distiller, program, loop.state)
        distiller.best_checkpoint = checkpoints.best()
    finally:
        metrics.close()
        checkpoints.close()


def prepare(
    distiller: "Trainable",
    batch: Batch,
    optimizer: Optimizer,
    args: Mapping[str, Any],
    *,
    max_grad_norm: float = -1.0,
) -> Program:
    """Runs the preflight and builds the program.

    Raises:
        PreflightError: all that is wrong.
    """
    found = Findings()
    found.problems.extend(distiller._resolve())
    student, teacher = distiller._student(args), distiller._teacher(args)
    projections = distiller._projections()
    try:
        transformation = optimizers.build(
            optimizer,
            distiller._projection_options(),
            max_grad_norm=max_grad_norm,
            accumulation=distiller.t_config.gradient_accumulation_steps,
        )
    except TypeError as error:
        found.problems.append(str(error))
    results_S, results_T = trace_sides(student, teacher, batch, distiller._in_context, found)
    if results_S is not None and results_T is not None:
        distiller._check(results_S, results_T, sides(batch)[1], found)
    for message in dict.fromkeys(found.warnings):
        warnings.warn(message, PreflightWarning, stacklevel=5)
    if found.problems or results_S is None or results_T is None:
        raise PreflightError(list(dict.fromkeys(found.problems)))

    def compute_loss(
        results_S: Results, results_T: Results, project: Any, weights: Weights
    ) -> Loss:
        loss = distiller.compute_loss(results_S, results_T, project, weights)
        return loss if isinstance(loss, Loss) else Loss(*loss, surplus=0)

    program = Program(
        student, teacher, projections, compute_loss, transformation, (), distiller._in_context
    )
    return _with_names(program, results_S, results_T)


def trace_sides(
    student: Side, teacher: Teacher, batch: Batch, train: bool, found: Findings
) -> tuple[Results | None, Results | None]:
    """Traces every model of a step by shape; the results are None where something is wrong."""
    from .distillers import TRAIN_KEYWORDS

    teacher_batch, student_batch, cache = sides(batch)
    results_S = inspect_side(student, student_batch, train, found, TRAIN_KEYWORDS)
    before = len(found.problems)
    if cache is None:
        for side in teacher.sides:
            inspect_side(side, teacher_batch, False, found, TRAIN_KEYWORDS)
    if len(found.problems) > before:
        return results_S, None
    try:
        results_T = jax.eval_shape(teacher.__call__, teacher.variables, teacher_batch, cache)
    except ValueError as error:
        found.problems.append(str(error))
        return results_S, None
    return results_S, results_T


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
        return loss.total

    total = jax.eval_shape(whole, results_S, results_T)
    if total.shape != () or not jnp.issubdtype(total.dtype, jnp.floating):
        raise PreflightError(
            [f"compute_loss gives a total of {total.dtype}{list(total.shape)}; it must be a scalar"]
        )
    return Program(
        program.student,
        program.teacher,
        program.projections,
        program.compute_loss,
        program.optimizer,
        tuple(names),
        program.train,
    )


def hand_over(distiller: "Trainable", program: Program, state: TrainState) -> None:
    """Puts copies of the trained arrays into the objects the user holds."""
    params, model_state = jax.tree.map(
        lambda x: jnp.array(x, copy=True), (state.params, state.model_state)
    )
    program.student.model.write(params["student"], model_state["student"])
    for name, projection in program.projections.items():
        projection.write(params["projections"][name], model_state["projections"][name])


def _after_save(
    distiller: "Trainable", program: Program, request: Request
) -> Callable[[Loop, int], bool]:
    def after_save(loop: Loop, step: int) -> bool:
        if request.callback is None:
            return False
        hand_over(distiller, program, loop.state)
        logger.info("Running the callback at step %d", step)
        result = request.callback(model=distiller.model_S, step=step)
        if not isinstance(result, CallbackResult):
            return False
        if result.score is not None:
            loop.checkpoints.score(step, result.score)
            distiller.best_checkpoint = loop.checkpoints.best()
        return result.stop

    return after_save


def _refuse_unbuilt(config: TrainingConfig) -> None:
    """Options that are accepted in a config but not built yet are refused, never ignored."""
    asked = {
        f"fp16=True with fp16_opt_level={config.fp16_opt_level!r}": config.fp16
        and config.fp16_opt_level != "O0",
        "data_parallel=True": config.data_parallel,
        f"local_rank={config.local_rank}": config.local_rank >= 0,
    }
    unbuilt = [name for name, is_asked in asked.items() if is_asked]
    if unbuilt:
        raise ValueError(
            f"{', '.join(unbuilt)}: training in half precision or on several devices is not built "
            "yet. Set fp16=False, data_parallel=False and local_rank=-1 to train in float32 on one "
            "device"
        )


def _schedule(config: TrainingConfig, request: Request) -> Schedule:
    epochs, steps = request.num_epochs, request.num_steps
    if epochs is None and steps is None:
        raise ValueError("say how long to train: train(…, num_epochs=…) or train(…, num_steps=…)")
    for name, value in (("num_epochs", epochs), ("num_steps", steps)):
        if value is not None and (isinstance(value, bool) or int(value) != value or value < 1):
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
    if not hasattr(request.dataloader, "__iter__"):
        raise TypeError(
            f"dataloader is a {type(request.dataloader).__name__}, which cannot be iterated; give "
            "a list of batches, a DataLoader, or any iterable of batches"
        )
    length = _length(request.dataloader)
    if length == 0:
        raise ValueError("the loader is empty: len(dataloader) is 0")
    if steps is not None:
        return Schedule.by_steps(config, int(steps))
    if length is None:
        raise ValueError(
            "num_epochs needs a loader with a length, from which schedules and checkpoints are laid "
            "out; this one has none. Pass num_steps instead"
        )
    if length < config.gradient_accumulation_steps:
        raise ValueError(
            f"an epoch of {length} batches is shorter than one accumulation window of "
            f"{config.gradient_accumulation_steps}, so nothing would be trained. Lower "
            "gradient_accumulation_steps, or train by num_steps, where windows run across epochs"
        )
    return Schedule.by_epochs(config, int(epochs), length)  # type: ignore[arg-type]


def _length(loader: Any) -> int | None:
    if not isinstance(loader, Sized):
        return None
    try:
        return len(loader)
    except TypeError:  # torch's DataLoader over a dataset without a length
        return None


def _factor_schedule(request: Request, total_steps: int) -> Callable | None:
    """Builds the learning-rate factor as a function of the step, or None for a constant 1."""
    if request.scheduler is not None:
        raise TypeError(
            "scheduler= takes a scheduler that was built for a torch optimizer, and there is none "
            "here. Pass scheduler_class and scheduler_args, such as scheduler_class="
            "jaxbrewer.schedulers.get_linear_schedule_with_warmup"
        )
    make = request.scheduler_class
    if make is None:
        if request.scheduler_args:
            raise TypeError("scheduler_args without a scheduler_class: pass the class too")
        return None
    name = getattr(make, "__name__", type(make).__name__)
    if not callable(make):
        raise TypeError(
            f"scheduler_class is a {type(make).__name__}; pass the class or function itself"
        )
    if "optimizer" in inspect.signature(make).parameters:
        raise TypeError(
            f"scheduler_class {name} wants a torch optimizer. Use the one of the same name in "
            "jaxbrewer.schedulers, or a function of your own that returns step -> factor"
        )
    try:
        schedule = make(**(request.scheduler_args or {}))
    except TypeError as error:
        raise TypeError(
            f"scheduler_class {name} cannot be called with {dict(request.scheduler_args or {})}: "
            f"{error}. It is called with scheduler_args and returns a function of the step (is it "
            "a schedule already? then pass scheduler_class=lambda: schedule)"
        ) from error
    if not callable(schedule):
        raise TypeError(f"scheduler_class {name} returned {schedule!r}, not a function of the step")
    if looks_absolute(schedule, total_steps):
        raise ValueError(
            f"the schedule of {name} stays at or below 0.1, which looks like a learning rate. Here "
            "it is a factor by which the optimizer's own rate is multiplied, 1 at its peak. Build "
            "rates into the optimizer instead: optax.adamw(learning_rate=schedule)"
        )
    return schedule


def _rows(distiller: "Trainable", factor: Callable | None, total: int) -> np.ndarray:
    """What the schedule gives each optimizer step: ``[total, 3]``."""
    rows = np.ones((max(total, 1), 3), np.float64)
    for column, weight in enumerate(distiller._weights()):
        if isinstance(weight, Weight):
            rows[:, column] = weight.table(total)
    if factor is not None:
        rows[:, 2] = tabulate(factor, np.arange(total))
    return rows.astype(jnp.result_type(float))


def _stream(request: Request, schedule: Schedule, start: Position) -> Iterator[Event]:
    if schedule.epochs is not None:
        return by_epochs(request.dataloader, schedule.epochs, start)
    if start.global_step >= schedule.total_steps:
        return iter(())
    return by_steps(request.dataloader, start)


def _peek(events: Iterator[Event]) -> tuple[Micro | None, Iterator[Event]]:
    """The first batch, and a stream that still begins with it."""
    passed = []
    for event in events:
        passed.append(event)
        if isinstance(event, Micro):
            return event, itertools.chain(passed, events)
    return None, iter(())


def _latest_position(config: TrainingConfig) -> Position | None:
    checkpoints = Checkpoints(config.output_dir, resume=True, max_to_keep=None)
    try:
        step = checkpoints.latest()
        if step is None:
            return None
        saved = checkpoints.position(step)
    finally:
        checkpoints.close()
    accumulation = saved["train_config"]["gradient_accumulation_steps"]
    if accumulation != config.gradient_accumulation_steps:
        raise CheckpointError(
            f"gs{step} was trained with gradient_accumulation_steps={accumulation}, not "
            f"{config.gradient_accumulation_steps}; its position in the data would be wrong. Use the "
            "same, or start anew with another output_dir"
        )
    names = ("epoch", "batch", "global_step", "micro_step", "host_random")
    return Position(**{name: saved[name] for name in names})


def _load_finished(distiller: "Trainable", config: TrainingConfig) -> None:
    """A run that is resumed after its end: the student gets the final weights."""
    from .checkpoints import load_student, steps_in

    if not steps_in(config.output_dir):
        raise ValueError("the loader gave no batch: it is empty")
    load_student(config.output_dir, distiller.model_S)


def _batch_check(program: Program) -> Callable[[Batch], None]:
    """Checks ids on the host, for every model that says how many it knows."""
    student = program.student
    checked = [(student.model.signature(), student.model.id_limits, "model_S", 1)]
    for side in program.teacher.sides:
        checked.append((side.model.signature(), side.model.id_limits, f"model_{side.role}", 0))

    def check(batch: Batch) -> None:
        parts = sides(batch)
        for signature, limits, role, part in checked:
            if part == 1 or parts[2] is None:
                check_ids(parts[part], signature, limits, role)

    return check


def report(
    distiller: "Trainable", batch: Batch, optimizer: Optimizer | None, args: Mapping[str, Any]
) -> str:
    """Checks as `train` would, and describes what would be trained and at what cost."""
    import optax

    from .report import describe

    _refuse_unbuilt(distiller.t_config)
    program = prepare(distiller, batch, optimizer or optax.sgd(1.0), args)
    return describe(distiller, program, batch, with_optimizer=optimizer is not None)
