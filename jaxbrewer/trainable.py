"""What every trainer and distiller shares: ``train``, ``check``, and the ``with`` block."""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self

from flax import nnx
from tensorboardX import SummaryWriter

from . import training
from .adaptors import Adaptor, Results, Side, check_adaptor
from .arguments import Feed, Request
from .batches import Batch, own
from .configurations import TrainingConfig
from .inspection import Findings
from .metrics import open_writer
from .models import Model, as_model
from .objective import Loss, Project, Weights
from .optimizer import Optimizer
from .teachers import Teacher

logger = logging.getLogger(__name__)


class Trainable:
    """What every trainer and distiller shares: `train`, `check`, and the ``with`` block.

    Inside ``with`` the student runs in train mode (dropout on, batch statistics updated); outside
    it, in evaluation mode, with a warning. Teachers always run in evaluation mode.

    Attributes:
        t_config: the `TrainingConfig`.
        model_S: the student (or the model to train), as it was passed.
        projs: the projections' modules, one for each intermediate match, None where it has none.
        projs_group: their optimizer options, likewise.
        best_checkpoint: the folder of the best-scored checkpoint, see `loop.CallbackResult`.
        print_freq: log lines in an epoch.
        rank: this process; 0 is the one that logs.
    """

    _replaced: ClassVar[Mapping[str, str]] = {
        "train_on_batch": "override compute_loss (the pure part), or wrap the models",
        "save_and_callback": "pass train(…, callback=…); checkpoints are written before it runs",
        "initialize_training": "pass an optimizer factory; projections get their own groups",
        "write_loss": "terms returned by compute_loss are logged by their names",
        "train_with_num_steps": "pass train(…, num_steps=…)",
        "train_with_num_epochs": "pass train(…, num_epochs=…)",
        "cache_logits": "set is_caching_logits in DistillationConfig",
    }

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Refuses methods of TextBrewer's that would never be called here."""
        super().__init_subclass__(**kwargs)
        for name, instead in cls._replaced.items():
            if name in cls.__dict__:
                raise TypeError(
                    f"{cls.__name__} overrides {name}, which does not exist here and would never "
                    f"run. Instead: {instead}"
                )
        if "compute_loss" in cls.__dict__:
            try:
                inspect.signature(cls.compute_loss).bind(*range(5))
            except TypeError as error:
                raise TypeError(
                    f"{cls.__name__}.compute_loss must take (self, results_S, results_T, project, "
                    f"weights), not {inspect.signature(cls.compute_loss)}"
                ) from error

    def __init__(self, train_config: TrainingConfig, model_S: Any, adaptor_S: Adaptor):
        if not isinstance(train_config, TrainingConfig):
            raise TypeError(
                f"train_config is a {type(train_config).__name__}, not a TrainingConfig"
            )
        as_model(model_S, self._student_name)
        check_adaptor(adaptor_S, self._student_name.replace("model", "adaptor"))
        self.t_config = train_config
        self.model_S = model_S
        self.adaptor_S = adaptor_S
        self.projs: list[nnx.Module | None] = []
        self.projs_group: list[Mapping[str, Any] | None] = []
        self.best_checkpoint: Path | None = None
        self.print_freq = 20
        self.rank = 0
        self.local_rank = train_config.local_rank
        self._in_context = False
        self._tb_writer: SummaryWriter | None = None

    _student_name: ClassVar[str] = "model_S"

    def __enter__(self) -> Self:
        """Turns train mode on."""
        self._in_context = True
        return self

    def __exit__(self, *exception: Any) -> None:
        """Turns train mode off."""
        self._in_context = False

    @property
    def tb_writer(self) -> SummaryWriter | None:
        """The tensorboard writer, opened when first asked for; None without ``log_dir``."""
        if self._tb_writer is None and self.t_config.log_dir is not None:
            self._tb_writer = open_writer(self.t_config.log_dir)
        return self._tb_writer

    # What subclasses fill in ------------------------------------------------------------------

    def _sides(self, task: str, args: Mapping[str, Any]) -> tuple[Side, Teacher]:
        """The student's side and the teacher of a task, with `args` for their models."""
        raise TypeError(f"{type(self).__name__} is a base class; use one of the distillers")

    def _resolve(self) -> list[str]:
        """Looks up the config's names anew, since presets may have changed; returns problems."""
        return []

    def _resolve_modules(
        self, student: Side, teacher: Teacher, batch: Batch, found: Findings
    ) -> tuple[Side, Teacher]:
        """Finds submodules that are matched; returns the sides that capture them."""
        return student, teacher

    def _check(self, results_S: Results, results_T: Results, batch: Batch, found: Findings) -> None:
        """Checks the objective against results by shape."""

    def _weights(self) -> tuple[Any, Any]:
        """The scheduled weights of the KD loss and the hard labels, as `plan.Weight` or None."""
        return None, None

    def _cache(self) -> dict[str, Any] | None:
        """How the teacher's results are cached, as arguments of `caching.build`; None: not."""
        return None

    def _terms(self) -> list[str] | None:
        """The objective in words, a line a term; None if only the terms' names are known."""
        return None

    def compute_loss(
        self, results_S: Results, results_T: Results, project: Project, weights: Weights
    ) -> Loss:
        """The loss of a batch: override it for an objective of your own.

        Must be a pure function of its arguments, since it is compiled.

        Args:
            results_S: what adaptor_S returned, checked (`adaptors.freeze`): lists are tuples.
            results_T: what adaptor_T returned.
            project: ``project(str(i), feature)`` applies the projection of match i.
            weights: the scheduled ``kd`` and ``hard_label`` weights at this update.

        Returns:
            A `Loss`, or the pair ``(total, {name: term})``; the terms are logged.
        """
        raise TypeError(f"{type(self).__name__} has no objective; override compute_loss")

    # The surface ------------------------------------------------------------------------------

    def train(
        self,
        optimizer: Optimizer,
        dataloader: Iterable,
        num_epochs: int | None = None,
        scheduler_class: Callable[..., Any] | None = None,
        scheduler_args: Mapping[str, Any] | None = None,
        scheduler: None = None,
        max_grad_norm: float = -1.0,
        num_steps: int | None = None,
        callback: Callable[..., Any] | None = None,
        batch_postprocessor: Callable[[Any], Any] | None = None,
        **args: Any,
    ) -> None:
        """Trains the student; afterwards the object that was passed holds the trained weights.

        Args:
            optimizer: an `optax.GradientTransformation`, or a factory of one such as
                ``functools.partial(optax.adamw, learning_rate=1e-4)``. Torch's AdamW decays by
                0.01, Optax's by 1e-4, transformers' old one by 0: state it.
            dataloader: an iterable of batches, dicts or tuples of numpy, JAX or torch arrays.
            num_epochs: passes over it; it must have a length. An accumulation window that an
                epoch leaves incomplete is dropped.
            scheduler_class: called with `scheduler_args`, returns the learning-rate *factor* as a
                function of the optimizer step; see `jaxbrewer.schedulers`.
            scheduler_args: its arguments.
            scheduler: always None (TextBrewer's deprecated argument).
            max_grad_norm: clips the norm of the student's gradient, if positive.
            num_steps: optimizer steps to train for, instead of `num_epochs`; the loader is cycled
                and needs no length.
            callback: called as ``callback(model=student, step=step)`` after each checkpoint, with
                the weights of that step; may return a `CallbackResult`. What it does to the
                weights is not kept.
            batch_postprocessor: applied to each batch.
            **args: further keyword arguments for the models.

        Raises:
            PreflightError: all that is wrong, found on the first batch before compiling.
            FloatingPointError: a loss that is not finite, with the term and the step.
        """
        feeds = {"": Feed.of(dataloader, batch_postprocessor)}
        schedule = (scheduler_class, scheduler_args, scheduler)
        training.train(
            self,
            Request(
                optimizer, feeds, num_epochs, num_steps, *schedule, max_grad_norm, callback, args
            ),
        )

    def check(self, batch: Any, optimizer: Optimizer | None = None, **args: Any) -> str:
        """Checks everything by shape, and tells what would be trained and at what cost.

        Args:
            batch: as the loader would give it.
            optimizer: as for `train`; without it, its state is left out of the memory.
            **args: as for `train`.

        Returns:
            The report, which is also printed.

        The batch is taken as it is: what a ``batch_postprocessor`` would do to it must be done.

        Raises:
            PreflightError: all that is wrong.
        """
        report = training.report(self, {"": own(batch)}, optimizer, args)
        print(report)
        return report

    # For the training module --------------------------------------------------------------------

    def _projections(self) -> dict[str, Model]:
        return {str(i): as_model(p) for i, p in enumerate(self.projs) if p is not None}

    def _projection_options(self) -> dict[str, Mapping[str, Any] | None]:
        return {str(i): self.projs_group[i] for i, p in enumerate(self.projs) if p is not None}

    def _describe(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "train_config": self.t_config.to_dict()}
