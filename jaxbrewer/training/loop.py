"""The loop: feeds the step, looks at its numbers a little later, saves, and calls back.

The only place of training with side effects. The host never waits for a step it has just
started: metrics are read `LOOK_BACK` micro-batches later, and all of them before a checkpoint.
"""

import logging
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import numpy as np
from tqdm.auto import tqdm

from ..data.batches import Batch
from ..data.streams import EpochEnd, Event, Position, as_json, host_random
from ..errors import BatchError, afterwards, despite
from ..machine.placement import Placement
from ..machine.processes import Processes
from ..step import loss_scale
from ..step.optimizer import drop_window
from ..step.program import TrainState
from .checkpoints import Checkpoints
from .metrics import MetricsWriter
from .timeline import Timeline

logger = logging.getLogger(__name__)

LOOK_BACK = 8


def _forget(opt_state: Any, scaling: Any) -> tuple[Any, Any]:
    return drop_window(opt_state), loss_scale.forget_window(scaling)


def _without_window(state: TrainState) -> TrainState:
    """The state without its open accumulation window; the old one is donated.

    Every array stays where it lies: zeros depend on nothing, so XLA would put them on every device.
    """
    window = state.opt_state, state.scaling
    places = jax.tree.map(lambda x: x.sharding, window)
    forget = jax.jit(_forget, donate_argnums=(0, 1), out_shardings=places)
    opt_state, scaling = forget(*window)
    return replace(state, opt_state=opt_state, scaling=scaling)


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
        step: the compiled step: ``(state, teacher_variables, batch, row) -> (state, metrics)``.
        teacher_variables: the teacher's arrays, placed.
        tags: tensorboard names of the metrics: the total first, then the terms.
        is_scaled: whether the last two metrics are the loss scale and the windows dropped.
    """

    step: Callable
    teacher_variables: Any
    tags: tuple[str, ...]
    is_scaled: bool = False


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
        about: what is written into a checkpoint beside the position.
        batches_per_epoch: for the progress bar, where it is known.
        placement: where arrays lie; `state` is as the step takes it.
        processes: this process and the others.
        is_asked: whether this process has been asked to stop; of several, batches tell it.
        print_freq: log lines in an epoch, or between two checkpoints of a run by steps.
    """

    tasks: Mapping[str, CompiledTask]
    state: TrainState
    rows: np.ndarray
    timeline: Timeline
    checkpoints: Checkpoints
    metrics: MetricsWriter
    position: Position
    after_save: Callable[["Loop", TrainState, int], bool]
    about: dict[str, Any]
    batches_per_epoch: int | None
    placement: Placement
    processes: Processes
    is_asked: Callable[[], bool] = lambda: False
    print_freq: int = 20
    _pending: deque[tuple[CompiledTask, int, int, jax.Array]] = field(default_factory=deque)
    _opened: int = 0  # micro-batches in the current accumulation window
    _stops: bool = False  # one of several processes has been asked to stop
    _drawn: Any = None  # the host's random state after the last batch, if later ones are drawn

    def run(self, events: Iterator[Event], after_step: Callable[[], None]) -> None:
        """Trains until the stream or the timeline ends, or a callback or a signal stops it.

        Args:
            events: batches and the ends of epochs.
            after_step: called after each micro-step has been started.

        Raises:
            FloatingPointError: the loss is not finite; names the terms and the step.
            BatchError: a batch the models cannot take.
        """
        self._log_start()
        with (  # ended from the last to the first: the checkpoint is on disk whatever else fails
            afterwards("writing the metrics", self.metrics.flush),
            afterwards("writing the checkpoint", self.checkpoints.wait),
            self._bar() as bar,
        ):
            for event in events:
                if isinstance(event, EpochEnd):
                    self._end_epoch(event)
                    continue
                self._micro_step(self.tasks[event.task], self.placement.batch(event.inputs))
                after_step()
                self._drawn = event.host_random
                bar.update(1)
                done = self._opened == self.timeline.accumulation
                self._move(event.epoch, event.batch + 1, done)
                self._stops |= event.stop
                if done and self._after_update(event.epoch):
                    break
            self._look(0)
            self._say("Training finished at step %d", self.position.global_step)

    def _bar(self) -> tqdm:
        return tqdm(
            total=self._expected_micro_steps(),
            initial=self.position.micro_step,
            desc="Training",
            unit="batch",
            disable=None if self.is_chief else True,
        )

    def _micro_step(self, task: CompiledTask, batch: Batch) -> None:
        row = self.rows[min(self.position.global_step, len(self.rows) - 1)]
        self.state, metrics = task.step(self.state, task.teacher_variables, batch, row)
        if self.placement.devices[0].platform != "cpu":  # there they are on the host already
            metrics.copy_to_host_async()
        position = self.position
        self._pending.append((task, position.micro_step, position.global_step, metrics))
        self._opened += 1
        self._look(LOOK_BACK)

    def _move(self, epoch: int, batch: int, done: bool) -> None:
        p = self.position
        self.position = Position(epoch, batch, p.global_step + done, p.micro_step + 1)
        if done:
            self._opened = 0

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
            if self.processes.numbers(stop).any():
                self._say("The callback stopped training at step %d", step)
                return True
        if self._stops or (self.processes.count == 1 and self.is_asked()):
            if not is_due:
                self._save(step, epoch)
            self._say("A signal stopped training at step %d, which is saved", step)
            return True
        return ends

    def _save(self, step: int, epoch: int) -> TrainState:
        """Saves the state, and returns it as checkpoints hold it."""
        self._look(0)
        self._say("Saving at global step %d, epoch %d", step, epoch + 1)
        saved = self.placement.leave(self.state)
        self.checkpoints.save(step, saved, self._saved_position())
        return saved

    def _saved_position(self) -> dict[str, Any]:
        p = self.position
        mine = {"epoch": p.epoch, "batch": p.batch}
        random = as_json(self._drawn or host_random())
        return {
            **mine,
            "global_step": p.global_step,
            "micro_step": p.micro_step,
            "processes": self.processes.objects(mine | {"host_random": random}),
            **self.about,
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
            self.state = _without_window(self.state)
            self._opened = 0

    def _look(self, leave: int) -> None:
        """Reads pending metrics but the last `leave`, and stops at numbers that cannot be."""
        while len(self._pending) > leave:
            task, micro_step, global_step, metrics = self._pending.popleft()
            values = np.asarray(metrics)
            total, surplus, terms = values[0], values[1], values[2:]
            if surplus != 0:
                raise BatchError(_surplus_message(int(surplus), micro_step))
            named = dict(zip(task.tags[1:], terms, strict=True))
            if task.is_scaled:
                loss_scale.check(values[-2], total, global_step, micro_step)
            elif not np.isfinite(total):
                raise self._not_finite(total, named, global_step, micro_step)
            self.metrics.write(micro_step, task.tags, np.concatenate([values[:1], terms]))

    def _not_finite(
        self, total: Any, terms: Mapping[str, Any], global_step: int, micro_step: int
    ) -> FloatingPointError:
        bad = [f"{tag.split('/', 1)[1]} = {v}" for tag, v in terms.items() if not np.isfinite(v)]
        what = ", ".join(bad) if bad else "none of its terms, so a weight or their sum"
        error = FloatingPointError()
        despite(error, "writing the checkpoint", self.checkpoints.wait)  # one may be under way
        saved = self.checkpoints.latest()
        message = (
            f"the loss is {total} at global step {global_step + 1} (micro-batch {micro_step}): "
            f"{what}. Look at that batch (labels in range? an empty mask?) and the learning rate. "
            + (
                f"The last good checkpoint is gs{saved}"
                if saved is not None
                else "Nothing was saved yet"
            )
        )
        error.args = (message,)
        return error

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

    @property
    def is_chief(self) -> bool:
        """Whether this is the process that logs."""
        return self.processes.rank == 0

    def _say(self, message: str, *values: Any) -> None:
        if self.is_chief:
            logger.info(message, *values)


def _surplus_message(surplus: int, micro_step: int) -> str:
    more, fewer = ("student", "teacher") if surplus > 0 else ("teacher", "student")
    return (
        f"in micro-batch {micro_step} the {more}'s logits_mask selects {abs(surplus)} more positions "
        f"than the {fewer}'s. Positions are paired in order, so both must select as many: mark the "
        "same words on both sides (say, each word's first piece), and truncate both at the same word"
    )
