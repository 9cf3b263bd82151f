"""What a run has come to: handed to the distiller at checkpoints and at the end."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from ..models.handle import Model
from ..preflight.job import Job
from .lock import RunLock


@dataclass(frozen=True)
class Outcome:
    """What a run has come to, at a checkpoint or at its end, however it ended.

    Attributes:
        job: the job, resolved once preflight has passed.
        rank: this process; 0 is the one that logs.
        steps: optimizer steps done.
        best_checkpoint: the folder of the best-scored checkpoint, or None.
        variables: the trained arrays as `step.Program.variables` has them, copies for this process
            alone; None where nothing was trained or the run failed.
        student: the handle of the student that they are written to.
        projections: those of the projections.
        evaluations: step → name → number: what was evaluated, before a resume too.
        error: what ended the run, or None.
    """

    job: Job
    rank: int = 0
    steps: int = 0
    best_checkpoint: Path | None = None
    variables: Any = None
    student: Model | None = None
    projections: Mapping[str, Model] = field(default_factory=dict)
    evaluations: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    error: BaseException | None = None

    def write(self) -> None:
        """Puts the trained arrays, if there are some, into the objects the user holds."""
        if self.variables is None or self.student is None:
            return
        params, state = self.variables
        self.student.write(params["student"], state["student"])
        for name, projection in self.projections.items():
            projection.write(params["projections"][name], state["projections"][name])


OnCheckpoint = Callable[[Outcome], Any]


class Progress:
    """What a run has come to so far, and the lock that keeps its folder to itself."""

    def __init__(self, job: Job):
        self.outcome = Outcome(job)
        self.lock = RunLock(job.config.output_dir)

    def note(self, **changes: Any) -> Outcome:
        """Exchanges fields of the outcome, and returns it."""
        self.outcome = replace(self.outcome, **changes)
        return self.outcome
