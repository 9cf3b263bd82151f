"""TextBrewer's classes: they differ by teacher and objective; plan, step and loop are shared."""

import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import jax
import numpy as np
from flax import nnx
from tensorboardX import SummaryWriter

from . import presets, training
from .adaptors import Adaptor, Results, Side
from .batches import Batch, own
from .configurations import DistillationConfig, TrainingConfig
from .models import Model, as_model, refuse_shared_variables
from .objective import Loss, Project, Weights, distillation_loss, hard_label_term
from .optimizer import Optimizer
from .plan import Plan, resolve
from .preflight import Findings, check_plan
from .teachers import NoTeacher, OneTeacher, Teacher

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

    def __init__(self, train_config: TrainingConfig, model_S: Any, adaptor_S: Adaptor):
        if not isinstance(train_config, TrainingConfig):
            raise TypeError(
                f"train_config is a {type(train_config).__name__}, not a TrainingConfig"
            )
        as_model(model_S, self._student_name)
        _check_callable(adaptor_S, "adaptor_S")
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
            self._tb_writer = SummaryWriter(str(self.t_config.log_dir))
        return self._tb_writer

    # What subclasses fill in ------------------------------------------------------------------

    def _teacher(self, args: Mapping[str, Any]) -> Teacher:
        """The teacher, with `args` for its models."""
        raise TypeError(f"{type(self).__name__} is a base class; use one of the distillers")

    def _check(self, results_S: Results, results_T: Results, batch: Batch, found: Findings) -> None:
        """Checks the objective against results by shape."""

    def _resolve(self) -> list[str]:
        """Looks up the config's names anew, since presets may have changed; returns problems."""
        return []

    def _weights(self) -> tuple[Any, Any]:
        """The scheduled weights of the KD loss and the hard labels, as `plan.Weight` or None."""
        return None, None

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
        training.train(
            self,
            training.Request(
                optimizer,
                dataloader,
                num_epochs,
                scheduler_class,
                scheduler_args,
                scheduler,
                max_grad_norm,
                num_steps,
                callback,
                batch_postprocessor,
                args,
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

        Raises:
            PreflightError: all that is wrong.
        """
        report = training.report(self, own(batch), optimizer, args)
        print(report)
        return report

    # For the training module --------------------------------------------------------------------

    def _student(self, args: Mapping[str, Any]) -> Side:
        return Side("S", as_model(self.model_S, self._student_name), self.adaptor_S, args)

    def _projections(self) -> dict[str, Model]:
        return {str(i): as_model(p) for i, p in enumerate(self.projs) if p is not None}

    def _projection_options(self) -> dict[str, Mapping[str, Any] | None]:
        return {str(i): self.projs_group[i] for i, p in enumerate(self.projs) if p is not None}

    def _describe(self) -> dict[str, Any]:
        return {"class": type(self).__name__, "train_config": self.t_config.to_dict()}


class BasicTrainer(Trainable):
    """Supervised training, of a teacher for instance: minimises the adaptor's ``losses``.

    Args:
        train_config: how to train.
        model: the model.
        adaptor: its adaptor, which must return ``losses``.
    """

    _student_name = "model"

    def __init__(self, train_config: TrainingConfig, model: Any, adaptor: Adaptor):
        super().__init__(train_config, model, adaptor)

    @property
    def model(self) -> Any:
        """The model, as it was passed."""
        return self.model_S

    @property
    def adaptor(self) -> Adaptor:
        """Its adaptor."""
        return self.adaptor_S

    def _teacher(self, args: Mapping[str, Any]) -> Teacher:
        return NoTeacher()

    def _check(self, results_S: Results, results_T: Results, batch: Batch, found: Findings) -> None:
        if "losses" not in results_S:
            returned = ", ".join(map(repr, results_S)) or "nothing"
            found.problems.append(
                f"the adaptor returns {returned}, but no 'losses' to minimise. Return the model's "
                "loss under 'losses' (does the batch hold the labels?)"
            )

    def compute_loss(
        self, results_S: Results, results_T: Results, project: Project, weights: Weights
    ) -> Loss:
        """The sum of the means of the model's losses."""
        return Loss(hard_label_term(results_S), {}, 0)


class BasicDistiller(Trainable):
    """Distils one teacher's logits into a student.

    Args:
        train_config: how to train.
        distill_config: what to train on. Intermediate matches need `GeneralDistiller`.
        model_T: the teacher.
        model_S: the student.
        adaptor_T: the teacher's adaptor, which must return ``logits``.
        adaptor_S: the student's.

    Attributes:
        d_config: the `DistillationConfig`.
        model_T: the teacher, as it was passed.
    """

    _logits_required: ClassVar[bool] = True
    _matches_allowed: ClassVar[bool] = False

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Any,
        model_S: Any,
        adaptor_T: Adaptor,
        adaptor_S: Adaptor,
    ):
        super().__init__(train_config, model_S, adaptor_S)
        if not isinstance(distill_config, DistillationConfig):
            kind = type(distill_config).__name__
            raise TypeError(f"distill_config is a {kind}, not a DistillationConfig")
        if distill_config.intermediate_matches and not self._matches_allowed:
            raise ValueError(
                f"{type(self).__name__} matches logits only; for intermediate_matches use "
                "GeneralDistiller"
            )
        if distill_config.is_caching_logits:
            raise ValueError(
                "is_caching_logits=True is not built yet; without it the result is the same, at "
                "the price of one teacher pass a batch"
            )
        self.d_config = distill_config
        self.model_T = model_T
        self.adaptor_T = adaptor_T
        self._check_teacher()
        self._plan: Plan | None = None

    def _check_teacher(self) -> None:
        as_model(self.model_T, "model_T")
        _check_callable(self.adaptor_T, "adaptor_T")
        refuse_shared_variables(self.model_S, self.model_T)

    @property
    def kd_loss(self) -> Callable:
        """The KD loss the config names."""
        return presets.KD_LOSS_MAP[self.d_config.kd_loss_type]

    def _teacher(self, args: Mapping[str, Any]) -> Teacher:
        return OneTeacher(Side("T", as_model(self.model_T, "model_T"), self.adaptor_T, args))

    def _resolve(self) -> list[str]:
        self._plan, problems = resolve(self.d_config, logits_required=self._logits_required)
        return problems

    def _weights(self) -> tuple[Any, Any]:
        return (self._plan.kd_weight, self._plan.hard_label_weight) if self._plan else (None, None)

    def _check(self, results_S: Results, results_T: Results, batch: Batch, found: Findings) -> None:
        if self._plan is not None:
            check_plan(self._plan, results_S, results_T, batch, self._projections(), found)

    def compute_loss(
        self, results_S: Results, results_T: Results, project: Project, weights: Weights
    ) -> Loss:
        """See `Trainable.compute_loss`; this one is the config's objective."""
        if self._plan is None:
            raise ValueError("compute_loss runs inside train() or check(), which read the config")
        return distillation_loss(self._plan, results_S, results_T, project, weights)

    def _describe(self) -> dict[str, Any]:
        return super()._describe() | {"distill_config": self.d_config.to_dict()}


class GeneralDistiller(BasicDistiller):
    """Distils one teacher's logits and intermediate features into a student.

    Logits are compared if both adaptors return them. Recommended for one teacher and one task.

    Args:
        train_config: how to train.
        distill_config: what to train on.
        model_T: the teacher.
        model_S: the student.
        adaptor_T: the teacher's adaptor.
        adaptor_S: the student's.
        custom_matches: not built yet; must be None.
    """

    _logits_required = False
    _matches_allowed = True

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Any,
        model_S: Any,
        adaptor_T: Adaptor,
        adaptor_S: Adaptor,
        custom_matches: Sequence[Any] | None = None,
    ):
        super().__init__(train_config, distill_config, model_T, model_S, adaptor_T, adaptor_S)
        if custom_matches:
            raise ValueError(
                "custom_matches are not built yet; let the models return the features and match "
                "them with intermediate_matches"
            )
        keys = jax.random.split(
            jax.random.key(train_config.seed), len(distill_config.intermediate_matches)
        )
        for key, match in zip(keys, distill_config.intermediate_matches, strict=True):
            self._add_projection(key, match.proj)

    def _add_projection(self, key: jax.Array, proj: Sequence[Any] | None) -> None:
        if proj is None:
            self.projs.append(None)
            self.projs_group.append(None)
            return
        name, dim_S, dim_T, options = proj
        module = presets.PROJ_MAP[name](dim_S, dim_T, rngs=nnx.Rngs(key))
        if not isinstance(module, nnx.Module):
            raise TypeError(
                f"the projection {name!r} made a {type(module).__name__}; PROJ_MAP holds functions "
                "(dim_in, dim_out, *, rngs) -> nnx.Module"
            )
        self.projs.append(module)
        self.projs_group.append(options)


def _check_callable(adaptor: Any, name: str) -> None:
    if not callable(adaptor):
        raise TypeError(
            f"{name} is a {type(adaptor).__name__}; it must be a function "
            "(batch, model_outputs) -> dict"
        )


def parameter_count(params: Any) -> int:
    """The number of trained scalars in a pytree of parameters."""
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))


TRAIN_KEYWORDS = tuple(inspect.signature(Trainable.train).parameters)[1:-1]
