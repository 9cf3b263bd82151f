"""Between two steps: the evaluations and the user's callback, which training does not notice."""

import logging
from dataclasses import dataclass

from ..data.states import undisturbed
from ..data.streams import Position
from ..step.program import TrainState
from .evaluations import Evaluations
from .loop import CallbackResult, Loop
from .outcome import OnCheckpoint, Progress
from .request import Request
from .timeline import Timeline

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Between:
    """What happens between two steps.

    Attributes:
        request: has the callback.
        timeline: when checkpoints are due.
        progress: what the run has come to.
        on_checkpoint: puts arrays into the user's student, and returns it.
        evaluations: those of the run.
    """

    request: Request
    timeline: Timeline
    progress: Progress
    on_checkpoint: OnCheckpoint
    evaluations: Evaluations

    def after_save(self, loop: Loop, saved: TrainState, step: int) -> bool:
        """Evaluates, then runs the user's callback; returns whether it stops training."""
        request, progress = self.request, self.progress
        self.evaluate(loop, saved, step, is_saved=True)
        if request.callback is None:
            return False
        if self.evaluations.asked and self.evaluations.asked.best_metric:
            loop.checkpoints.wait()  # only what is finished can be the best
        variables = loop.placement.local((saved.params, saved.model_state))
        best = loop.checkpoints.best()
        outcome = progress.note(steps=step, best_checkpoint=best, variables=variables)
        model = self.on_checkpoint(outcome)
        progress.note(variables=None)
        if loop.is_chief:
            logger.info("Running the callback at step %d", step)
        with undisturbed(request.loaders):
            result = request.callback(model=model, step=step)
        if not isinstance(result, CallbackResult):
            return False
        if result.score is not None:
            self.evaluations.overrule(step, result.score)
        return result.stop

    def evaluate(self, loop: Loop, state: TrainState, step: int, is_saved: bool = False) -> None:
        """Evaluates, where that is asked for; `state` as checkpoints hold it."""
        if self.evaluations.asked is None:
            return
        variables = loop.placement.local((state.params, state.model_state))
        self.evaluations.make(variables, loop.position, loop.metrics, is_saved=is_saved)

    def misses(self, at: Position) -> bool:
        """Whether the evaluation of the position that a run goes on from is not kept."""
        saves = self.timeline.saves_at(at.global_step, at.epoch)
        return self.evaluations.is_missing(at.global_step, saves)

    def tags(self, start: Position) -> set[str]:
        """The tags of ours of which nothing before the start is written anew."""
        return set() if self.misses(start) else self.evaluations.tags

    def catch_up(self, loop: Loop) -> None:
        """Evaluates the checkpoint that a run goes on from, if it was killed before it had."""
        if self.misses(loop.position):
            step = loop.position.global_step
            is_saved = loop.checkpoints.latest() == step
            self.evaluate(loop, loop.leave(loop.state), step, is_saved)
