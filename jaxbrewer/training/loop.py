"""The loop: feeds the step, looks at its numbers a little later, saves, and calls back.

The only place of training with side effects. The host never waits for a step it has just
started: metrics are read `LOOK_BACK` micro-batches later, and all of them before a checkpoint.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from ..data.states import LoaderState, as_json, host_random
from ..data.streams import EpochEnd, Event, Micro, Position
from ..errors import BatchError, afterwards, despite
from ..machine.placement import Placement
from ..machine.processes import Processes
from ..objective.counted import with_shares
from ..step import guard, loss_scale
from ..step.program import TrainState, by_name, forget_window, rewound
from .checkpoints import Checkpoints
from .diagnosis import Examine, culprits, in_batch, shown
from .metrics import MetricsWriter
from .timeline import Timeline

logger = logging.getLogger(__name__)

LOOK_BACK = 8


_which_are_finite = jax.jit(partial(by_name, guard.is_finite))


def _in_place(change: Callable[[TrainState], TrainState], state: TrainState) -> TrainState:
    """The state, changed; the old one is donated.

    Every array stays where it lies: zeros depend on nothing, so XLA would put them on every device.
    """
    places = jax.tree.map(lambda x: x.sharding, state)
    return jax.jit(change, donate_argnums=0, out_shardings=places)(state)


@dataclass(frozen=True)
class CallbackResult:
    """What a callback may return to steer the run; any other value is not looked at.

    Attributes:
        stop: end training here.
        score: how good this checkpoint is, higher is better: with ``max_to_keep`` the best are
            kept, and ``distiller.best_checkpoint`` names the best one.
    """

    stop: bool = False
    score: float | None = None


@dataclass(frozen=True)
class CompiledTask:
    """What differs between tasks; a run of one task has one, named ''.

    Attributes:
        step: the compiled step: ``(state, teacher_variables, batch, row, frozen) -> (state,
            metrics)``.
        teacher_variables: the teacher's arrays, placed.
        tags: tensorboard names of the metrics: the total first, then the terms.
        names: the terms of the loss.
        examine: term or None → a function of what `step` takes; see `step.Program.examine`.
        is_scaled: whether the last two metrics are the loss scale and the windows dropped.
        counter: see `Placement.counter`; None where means are accumulated.
    """

    step: Callable
    teacher_variables: Any
    tags: tuple[str, ...]
    names: tuple[str, ...]
    examine: Examine
    is_scaled: bool = False
    counter: Callable | None = None


class Due(NamedTuple):
    """A micro-batch that is to be trained on.

    Attributes:
        event: the batch, as it came.
        batch: as it is placed.
        row: what the schedule gives it.
    """

    event: Micro
    batch: Any
    row: Any


class Begun(NamedTuple):
    """A micro-batch that was trained on, and whose numbers were not looked at yet.

    Attributes:
        event: the batch, as it came.
        position: before it.
        opens: where its accumulation window starts, with the host's random state there.
        row: what the schedule gave.
        metrics: of the step.
    """

    event: Micro
    position: Position
    opens: Position
    row: Any
    metrics: jax.Array


@dataclass
class Loop:
    """One run of training.

    Attributes:
        tasks: name → task.
        state: the state, replaced after every step.
        rows: ``[total_steps + 1, 3]``: what the schedule gives a batch by the updates before it; see
            `step.Program`.
        timeline: when to save.
        checkpoints: where to save.
        metrics: where numbers go.
        position: where the run starts; kept up to date.
        after_save: called after each checkpoint with the saved state and the global step; true:
            stop.
        evaluate: called with the state where `evaluates_at` says so and there is no checkpoint.
        evaluates_at: the global step → whether to evaluate after it.
        about: optimizer steps done → what is written into a checkpoint beside the position.
        batches_per_epoch: for the progress bar, where it is known.
        placement: where arrays lie; `state` is as the step takes it.
        frozen: the student's frozen leaves, as the step takes them.
        leave: `state` → the state as checkpoints hold it.
        processes: this process and the others.
        is_asked: whether this process has been asked to stop; of several, batches tell it.
        print_freq: log lines in an epoch, or between two checkpoints of a run by steps.
        checkpoint_bytes: what the arrays of a checkpoint take.
        data_draw: whether taking a batch may draw on the host's random generators.
    """

    tasks: Mapping[str, CompiledTask]
    state: TrainState
    rows: np.ndarray
    timeline: Timeline
    checkpoints: Checkpoints
    metrics: MetricsWriter
    position: Position
    after_save: Callable[["Loop", TrainState, int], bool]
    about: Callable[[int], Mapping[str, Any]]
    batches_per_epoch: int | None
    placement: Placement
    frozen: Any
    leave: Callable[[TrainState], TrainState]
    processes: Processes
    is_asked: Callable[[], bool] = lambda: False
    evaluate: Callable[["Loop", TrainState], None] = lambda loop, state: None
    evaluates_at: Callable[[int], bool] = lambda step: False
    print_freq: int = 20
    checkpoint_bytes: int = 0
    data_draw: bool = True
    _pending: deque[Begun] = field(default_factory=deque)
    _opened: int = 0  # micro-batches in the current accumulation window
    _stops: bool = False  # one of several processes has been asked to stop
    _opens: Position = field(default_factory=Position)  # see `Begun`
    _shown: Any = None  # the progress bar
    _drawn: Any = None  # the host's random state after the last batch, if later ones are drawn
    _loaders: dict[str, LoaderState] = field(
        default_factory=dict
    )  # after the last batch trained on
    _started: Mapping[str, Any] = field(default_factory=dict)  # weight → whether it was finite

    def run(self, events: Iterator[Event], after_step: Callable[[], None]) -> None:
        """Trains until the stream or the timeline ends, or a callback or a signal stops it.

        Args:
            events: batches and the ends of epochs.
            after_step: called after each micro-step has been started.

        Raises:
            FloatingPointError: the loss or its gradient is not finite, see `step.guard`; names the
                step, the batch, the terms and the parameters. The state of before is saved.
            BatchError: a batch the models cannot take.
        """
        self._log_start()
        self._opens = self.position
        self._loaders = dict(self.position.loaders)
        self._started = jax.device_get(_which_are_finite(self.state.params))
        with (  # ended from the last to the first: the checkpoint is on disk whatever else fails
            afterwards("writing the metrics", self.metrics.flush),
            afterwards("writing the checkpoint", self.checkpoints.wait),
            self._bar() as bar,
        ):
            self._shown = bar
            for due in self._scheduled(events):
                if isinstance(due, EpochEnd):
                    self._end_epoch(due)
                    continue
                self._micro_step(due)
                after_step()
                event = due.event
                self._drawn = event.host_random
                if event.loader is not None:
                    self._loaders[event.task] = event.loader
                bar.update(1)
                done = self._opened == self.timeline.accumulation
                self._move(event.epoch, event.batch + 1, done)
                self._stops |= event.stop != 0
                if done and self._after_update(event.epoch):
                    break
                if done:
                    self._open_window()
            self._look(0)
            self._check_weights()
            self._say("Training finished at step %d", self.position.global_step)

    def _bar(self) -> tqdm:
        return tqdm(
            total=self._expected_micro_steps(),
            initial=self.position.micro_step,
            desc="Training",
            unit="batch",
            disable=None if self.is_chief else True,
        )

    def _scheduled(self, events: Iterator[Event]) -> Iterator[Due | EpochEnd]:
        """The stream with what the schedule gives; by windows, where accumulation is to be exact."""
        if all(task.counter is None for task in self.tasks.values()):
            for event in events:
                yield event if isinstance(event, EpochEnd) else self._due(event)
            return
        window: list[Micro] = []
        for event in events:
            if isinstance(event, EpochEnd):
                yield from self._shared(window)
                window = []
                yield event
                continue
            if len(window) + 1 < self.timeline.accumulation and self.data_draw:
                # The state is kept as it was before the next batch is drawn.
                event = event._replace(host_random=event.host_random or host_random())
            window.append(event)
            if len(window) == self.timeline.accumulation:
                yield from self._shared(window)
                window = []
        yield from self._shared(window)

    def _due(self, event: Micro) -> Due:
        row = self.rows[min(self.position.global_step, len(self.rows) - 1)]
        return Due(event, self.placement.batch(event.inputs), row)

    def _shared(self, window: Sequence[Micro]) -> list[Due]:
        """The micro-batches of a window, each with its shares: nothing is waited for."""
        dues = [self._due(event) for event in window]
        counts = []
        for due in dues:
            task = self.tasks[due.event.task]
            if task.counter is not None:
                arguments = self.state, task.teacher_variables, due.batch, self.frozen
                counts.append(task.counter(*arguments))
        if not counts:
            return dues
        rows = with_shares(dues[0].row, counts, tuple(event.task for event in window))
        return [due._replace(row=row) for due, row in zip(dues, rows, strict=True)]

    def _micro_step(self, due: Due) -> None:
        event, batch, row = due
        task = self.tasks[event.task]
        self.state, metrics = task.step(self.state, task.teacher_variables, batch, row, self.frozen)
        if self.placement.devices[0].platform != "cpu":  # there they are on the host already
            metrics.copy_to_host_async()
        self._pending.append(Begun(event, self.position, self._opens, row, metrics))
        self._opened += 1
        self._look(LOOK_BACK)

    def _move(self, epoch: int, batch: int, done: bool) -> None:
        p = self.position
        self.position = Position(epoch, batch, p.global_step + done, p.micro_step + 1)
        if done:
            self._opened = 0

    def _open_window(self) -> None:
        """Notes where an accumulation window starts, with the data's state before its batches."""
        drawn = None if self.data_draw else self._opens.host_random  # to read it takes 0.1 ms
        self._opens = self._here(drawn)

    def _here(self, drawn: Any = None) -> Position:
        """The position, with the random states (`drawn`, if given) and those of the loaders there."""
        drawn = self._drawn or drawn or host_random()
        return replace(self.position, host_random=drawn, loaders=dict(self._loaders))

    def _after_update(self, epoch: int) -> bool:
        """Logs and saves where it is due; returns whether training ends here."""
        step = self.position.global_step
        if step % self._print_every() == 0:
            self._say("Global step %d of %d", step, self.timeline.total_steps)
        ends = self.timeline.epochs is None and step >= self.timeline.total_steps
        is_due = self.timeline.saves_at(step, epoch)
        if is_due:
            saved = self._save(step, epoch)
            stop = self.after_save(self, saved, step)
            self.metrics.mark(
                step, self.position.micro_step
            )  # behind what the callback has written
            if self.processes.numbers(stop).any():
                self._say("The callback stopped training at step %d", step)
                return True
        elif self.evaluates_at(step):
            self._evaluate(step, epoch)
        if self._stops or (self.processes.count == 1 and self.is_asked()):
            if not is_due:
                self._save(step, epoch)
            self._say("A signal stopped training at step %d, which is saved", step)
            return True
        return ends

    def _save(self, step: int, epoch: int) -> TrainState:
        """Saves the state, and returns it as checkpoints hold it."""
        self._look(0)
        self._check_weights()
        self._say("Saving at global step %d, epoch %d", step, epoch + 1)
        saved = self.leave(self.state)
        save = partial(self.checkpoints.save, step, saved, self._described(self._here()))
        with afterwards("writing the checkpoint", save):
            self.metrics.mark(step, self.position.micro_step)
            self.metrics.flush()  # whoever goes on from the checkpoint has the points before it
        return saved

    def _evaluate(self, step: int, epoch: int) -> None:
        """Evaluates between two checkpoints; where that fails, the state is saved all the same."""
        self._look(0)
        self._check_weights()
        try:
            self.evaluate(self, self.leave(self.state))
        except Exception as error:
            despite(error, "writing the checkpoint", partial(self._save, step, epoch))
            raise

    def _described(self, p: Position) -> dict[str, Any]:
        """A position as checkpoints hold it, with those of the other processes."""
        mine = {"epoch": p.epoch, "batch": p.batch}
        state = {
            "host_random": as_json(p.host_random),
            "loaders": {task: loader.as_json() for task, loader in p.loaders.items()},
        }
        return {
            **mine,
            "global_step": p.global_step,
            "micro_step": p.micro_step,
            "processes": self.processes.objects(mine | state),
            **self.about(p.global_step),
        }

    def _end_epoch(self, event: EpochEnd) -> None:
        self._say("Epoch %d finished", event.epoch + 1)
        expected = self.timeline.steps_per_epoch
        if expected is not None and event.batches // self.timeline.accumulation != expected:
            logger.warning(
                "epoch %d had %d batches, which is not what len(loader) announced: schedules and "
                "checkpoints were laid out for %d optimizer steps an epoch",
                event.epoch + 1,
                event.batches,
                expected,
            )
        if self._opened:
            self._look(0)  # a state that has stopped must keep its window
            self.state = _in_place(forget_window, self.state)
            self._opened = 0
            self._open_window()

    def _look(self, leave: int) -> None:
        """Reads pending metrics but the last `leave`, and stops at numbers that cannot be."""
        while len(self._pending) > leave:
            begun = self._pending.popleft()
            values = np.asarray(begun.metrics)
            total, surplus, verdict, terms = values[0], values[1], values[2], values[3:]
            micro_step, task = begun.position.micro_step, self.tasks[begun.event.task]
            if surplus != 0:
                raise BatchError(_surplus_message(int(surplus), micro_step))
            if verdict in (guard.STOPPED, guard.EXHAUSTED):
                raise self._stopped(begun, task, values)
            if verdict == guard.BAD:
                self._warn_of_drop(begun, total)
            self.metrics.write(micro_step, task.tags, np.concatenate([values[:1], terms]))
            if not self._shown.disable:
                self._shown.set_postfix_str(f"loss {values[0]:.4g}", refresh=False)

    def _spoilt_weights(self) -> list[str]:
        """The weights that have ceased to be finite."""
        found = jax.device_get(_which_are_finite(self.state.params))
        return [name for name, fine in found.items() if self._started[name] and not fine]

    def _check_weights(self) -> None:
        """Stops before weights are saved or handed on that a finite gradient has spoilt."""
        if spoilt := self._spoilt_weights():
            error = FloatingPointError()
            despite(error, "writing the checkpoint", self.checkpoints.wait)
            error.args = (
                f"after global step {self.position.global_step} {shown(spoilt)} are not finite, though "
                "every loss and gradient was: the optimizer made them so (does it divide by a square "
                f"root of 0? is the learning rate a number?). {self._last_good()}",
            )
            raise error

    def _last_good(self) -> str:
        saved = self.checkpoints.latest()
        return (
            "Nothing was saved yet" if saved is None else f"The last good checkpoint is gs{saved}"
        )

    def _warn_of_drop(self, begun: Begun, total: Any) -> None:
        if self.is_chief:
            logger.warning(
                "the loss is %s%s at global step %d (micro-batch %d): its accumulation window is "
                "dropped, which changes no weight",
                total,
                ", but its gradient or update is not finite," if np.isfinite(total) else "",
                begun.position.global_step + 1,
                begun.position.micro_step,
            )

    def _stopped(self, begun: Begun, task: CompiledTask, values: np.ndarray) -> FloatingPointError:
        """What to raise of a micro-batch at which the state has stopped; saves what was before."""
        error = FloatingPointError()
        clauses: list[str] = []

        def look() -> None:
            batch = self.placement.batch(begun.event.inputs)
            arguments = self.state, task.teacher_variables, batch, begun.row, self.frozen
            found = in_batch(begun.event.inputs)
            found += culprits(task.examine, task.names, arguments, total=values[0])
            everywhere = self.processes.objects(found)  # each sees its own part of the batch
            clauses.extend(dict.fromkeys(clause for each in everywhere for clause in each))

        if values[2] != guard.EXHAUSTED:
            despite(error, "looking for the reason", look)
        message = _stop_message(begun, task, values, clauses)
        despite(error, "writing the checkpoint", partial(self._save_before, begun.opens))
        error.args = (f"{message}. {self._last_good()}",)
        return error

    def _save_before(self, opens: Position) -> None:
        """Goes back to the start of a window, and saves that state where it is not saved yet."""
        self.position = opens
        self.checkpoints.wait()  # one may be under way
        step = opens.global_step
        spoilt = self._spoilt_weights()  # every process takes part
        is_new = step > 0 and self.checkpoints.latest() != step and not spoilt
        if self.processes.numbers(is_new)[0, 0]:  # as the first process sees the disk
            change = partial(rewound, micro_step=opens.micro_step)
            self.state = _in_place(change, self.state)
            self.checkpoints.save(step, self.leave(self.state), self._described(opens))
            self.checkpoints.wait()

    def _print_every(self) -> int:
        span = (
            self.timeline.steps_per_epoch or self.timeline.every_steps or self.timeline.total_steps
        )
        return span // self.print_freq or span

    def _expected_micro_steps(self) -> int | None:
        if self.timeline.epochs is None:
            return self.timeline.total_steps * self.timeline.accumulation
        return self.batches_per_epoch and self.batches_per_epoch * self.timeline.epochs

    def _log_start(self) -> None:
        checkpoints = self.timeline.checkpoints()
        shown = ", ".join(map(str, checkpoints[:12])) + (" …" if len(checkpoints) > 12 else "")
        self._say("Training steps: %d; checkpoints at steps %s", self.timeline.total_steps, shown)
        self._say("%s", _room(len(checkpoints), self.checkpoint_bytes / 1e6, self.checkpoints))

    @property
    def is_chief(self) -> bool:
        """Whether this is the process that logs."""
        return self.processes.rank == 0

    def _say(self, message: str, *values: Any) -> None:
        if self.is_chief:
            logger.info(message, *values)


def _room(count: int, size: float, checkpoints: Checkpoints) -> str:
    """What the checkpoints take on disk, in words; `size` is that of one in MB."""
    kept = checkpoints.max_to_keep
    each = (
        f"{count} checkpoint{'s' if count != 1 else ''} of {size:,.1f} MB in {checkpoints.folder}"
    )
    if kept is None or kept >= count:
        limit = "; max_to_keep would keep fewer" if count > 1 and kept is None else ""
        return f"{each}: {count * size:,.1f} MB at the end{limit}"
    return f"{each}, of which {kept} stay{'s' if kept == 1 else ''}: {(kept + 1) * size:,.1f} MB at the most"


def _stop_message(
    begun: Begun, task: CompiledTask, values: np.ndarray, clauses: Sequence[str]
) -> str:
    """What is not finite and where; `clauses` are what was found beside the loss and its terms."""
    event, at, total = begun.event, begun.position, values[0]
    if values[2] == guard.EXHAUSTED:
        return loss_scale.too_low(values[-2] / 2, total, at.global_step, at.micro_step)
    terms = zip(task.names, values[3:], strict=False)  # a loss scale's numbers follow them
    bad = [f"{name} = {value}" for name, value in terms if not np.isfinite(value)]
    if not np.isfinite(total):
        what = f"the loss is {total}"
        if task.names:
            bad = bad or ["none of its terms, so a weight or their sum"]
    else:
        what = f"the loss is {total:g}, but its gradient or update is not finite,"
    where = f"at global step {at.global_step + 1} (micro-batch {at.micro_step})"
    where += f", batch {event.batch + 1} of epoch {event.epoch + 1}"
    where += f", task {event.task!r}" if event.task else ""
    found = "; ".join([", ".join(bad), *clauses] if bad else clauses) or "the reason was not found"
    found += "" if found.endswith("?") else "."
    return (
        f"{what} {where}: {found} Look at that batch (labels in range? an empty mask?) and the learning "
        "rate"
    )


def _surplus_message(surplus: int, micro_step: int) -> str:
    more, fewer = ("student", "teacher") if surplus > 0 else ("teacher", "student")
    return (
        f"in micro-batch {micro_step} the {more}'s logits_mask selects {abs(surplus)} more positions "
        f"than the {fewer}'s. Positions are paired in order, so both must select as many: mark the "
        "same words on both sides (say, each word's first piece), and truncate both at the same word"
    )
