"""When what happens in a run, in optimizer steps."""

from dataclasses import dataclass

from ..configurations.configs import TrainingConfig


@dataclass(frozen=True)
class Timeline:
    """When what happens, in optimizer steps.

    Attributes:
        accumulation: micro-batches in one optimizer step.
        total_steps: optimizer steps of the whole run.
        epochs: epochs of the run, or None if it runs for a number of steps.
        steps_per_epoch: optimizer steps of an epoch, or None likewise.
        in_epoch: checkpoints, as optimizer steps into an epoch; 0 is its end.
        every_epochs: only epochs divisible by this (and the last) save.
        every_steps: a run by steps saves at multiples of this, and at its end.
    """

    accumulation: int
    total_steps: int
    epochs: int | None = None
    steps_per_epoch: int | None = None
    in_epoch: tuple[int, ...] = ()
    every_epochs: int = 1
    every_steps: int | None = None

    @classmethod
    def by_epochs(cls, config: TrainingConfig, epochs: int, batches: int) -> "Timeline":
        """The timeline of `epochs` passes over a loader of `batches` batches."""
        n = batches // config.gradient_accumulation_steps
        frequency = config.ckpt_frequency
        return cls(
            config.gradient_accumulation_steps,
            n * epochs,
            epochs,
            n,
            tuple(int(n * i / frequency) for i in range(frequency)),
            config.ckpt_epoch_frequency,
        )

    @classmethod
    def by_steps(cls, config: TrainingConfig, steps: int) -> "Timeline":
        """The timeline of a run of `steps` optimizer steps."""
        return cls(config.gradient_accumulation_steps, steps, every_steps=config.ckpt_steps)

    def saves_at(self, global_step: int, epoch: int) -> bool:
        """Whether a checkpoint is due after optimizer step `global_step` (from 1) in `epoch` (from 0)."""
        if self.epochs is None:
            every = self.every_steps
            return global_step == self.total_steps or (
                every is not None and global_step % every == 0
            )
        in_turn = (epoch + 1) % self.every_epochs == 0 or epoch + 1 == self.epochs
        return in_turn and global_step % (self.steps_per_epoch or 1) in self.in_epoch

    def checkpoints(self) -> list[int]:
        """Every step at which a checkpoint is due, if each epoch is as long as announced."""
        n = self.steps_per_epoch or self.total_steps
        return [s for s in range(1, self.total_steps + 1) if self.saves_at(s, (s - 1) // n)]
