"""The evaluations of a run: made at checkpoints and between them, logged, scored, and kept.

They are kept in ``evaluations.json`` beside the checkpoints. That is written last: what was killed
before is no evaluation, and the run that goes on makes it anew.
"""

import logging
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..data.states import undisturbed
from ..data.streams import Position
from ..machine.processes import Processes
from . import folders
from .checkpoints import Checkpoints
from .metrics import MetricsWriter
from .outcome import OnCheckpoint, Progress
from .request import Evaluation, Request
from .resume import Resumed

logger = logging.getLogger(__name__)


class Evaluations:
    """The evaluations of one run.

    Args:
        request: says what to evaluate, if anything, and has the loaders that must not notice.
        progress: where they are noted.
        on_checkpoint: puts arrays into the student that is evaluated.
        checkpoints: which of them get scores.
        processes: each evaluates its own loader; the numbers of the first count.
        resumed: what the run goes on from.
    """

    def __init__(
        self,
        request: Request,
        progress: Progress,
        on_checkpoint: OnCheckpoint,
        checkpoints: Checkpoints,
        processes: Processes,
        resumed: Resumed | None,
    ):
        self.asked = request.evaluation
        self._loaders = request.loaders
        self._progress = progress
        self._on_checkpoint = on_checkpoint
        self._checkpoints = checkpoints
        self._processes = processes
        self._is_overruled = False
        self._take_over(resumed)

    def _take_over(self, resumed: Resumed | None) -> None:
        """Keeps those up to the checkpoint that the run goes on from, and forgets the others."""
        there: dict[int, dict[str, float]] = {}
        with self._processes.together("reading the evaluations"):
            if resumed is not None and self._processes.rank == 0:
                there = folders.evaluations_in(resumed.path.parent)
        there = {int(step): found for step, found in self._processes.objects(there)[0].items()}
        self._names = {name for found in there.values() for name in found}
        last = 0 if resumed is None else resumed.position.global_step
        self._found = {step: found for step, found in there.items() if step <= last}
        self._keep(self._found)

    def _keep(self, found: Mapping[int, Mapping[str, float]]) -> None:
        self._progress.note(evaluations=dict(found))
        if self._processes.rank != 0:
            return
        if found or (self._checkpoints.folder / folders.EVALUATIONS).exists():
            folders.write_beside(self._checkpoints.folder, folders.EVALUATIONS, found)

    def due_at(self, step: int) -> bool:
        """Whether ``eval_steps`` asks for an evaluation after this optimizer step."""
        return bool(self.asked and self.asked.steps and step % self.asked.steps == 0)

    def is_missing(self, step: int, saves: bool) -> bool:
        """Whether the evaluation of a step was due, and is not kept: the run was killed in it.

        Args:
            step: the step.
            saves: whether a checkpoint is due there.
        """
        is_due = self.asked is not None and (saves or self.due_at(step))
        return is_due and step not in self._found

    @property
    def tags(self) -> set[str]:
        """The names in the logs, of what was evaluated before a resume."""
        return {_tag(name) for name in self._names}

    def make(self, variables: Any, at: Position, metrics: MetricsWriter, *, is_saved: bool) -> None:
        """Evaluates.

        Args:
            variables: the trained arrays, see `Outcome.variables`.
            at: what is done; the numbers are logged at the last micro-batch of it.
            metrics: where they are logged.
            is_saved: whether there is a checkpoint, which then gets its score.

        Raises:
            ValueError: ``best_metric`` is none of the names that there are.
            BatchError: the evaluation failed in another process.
        """
        asked, step = self.asked, at.global_step
        if asked is None:
            return
        self._on_checkpoint(self._progress.note(steps=step, variables=variables))
        self._progress.note(variables=None)
        began = time.monotonic()
        with self._processes.together("evaluating"), undisturbed(self._loaders):
            mine = asked.compute()
        found = self._processes.objects(mine)[0]
        self._tell(step, found, time.monotonic() - began)
        metrics.write(at.micro_step - 1, [*map(_tag, found)], np.array([*found.values()]))
        metrics.flush()
        asked.check_names(found)
        if is_saved:
            self._score(step, asked, found)
        self._found[step] = found
        self._keep(self._found)

    def _tell(self, step: int, found: Mapping[str, float], seconds: float) -> None:
        if self._processes.rank == 0:
            shown = ", ".join(f"{name} {value:.4g}" for name, value in found.items())
            logger.info("Evaluated at step %d: %s (%.1f s)", step, shown, seconds)

    def _score(self, step: int, asked: Evaluation, found: Mapping[str, float]) -> None:
        score = asked.score(found)
        if score is None:
            return
        if np.isfinite(score):
            self._checkpoints.score(step, score)
        elif self._processes.rank == 0:
            logger.warning("gs%d has no score: %s is %s", step, asked.best_metric, score)

    def overrule(self, step: int, score: float) -> None:
        """Gives a checkpoint the score that a callback has returned, in place of `best_metric`'s."""
        best = None if self.asked is None else self.asked.best_metric
        if best is not None and not self._is_overruled and self._processes.rank == 0:
            self._is_overruled = True
            logger.warning(
                "the callback gave gs%d the score %g, which counts in place of best_metric=%r; let "
                "one of the two give the scores. This is said once",
                step,
                score,
                best,
            )
        self._checkpoints.score(step, score)


def _tag(name: str) -> str:
    return f"eval/{name}"
