"""TextBrewer's classes: they differ by teacher, objective and stream; all else is shared."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import numpy as np

from .. import presets
from ..configurations import checks
from ..configurations.configs import DistillationConfig, TrainingConfig
from ..data.batches import own
from ..models.adaptors import Adaptor, Side, check_adaptor
from ..models.nnx_model import refuse_shared_variables
from ..models.teachers import Teacher
from ..models.trainable import Selection
from ..models.wrap import as_model
from ..objective.monitor import Monitored
from ..objective.objectives import HardLabels, Objective, PlanObjective
from ..objective.submodules import CustomMatch
from ..preflight.job import CacheOptions, Job, Projections, Task
from ..step.optimizer import Optimizer
from ..training.request import Feed, Request
from ..training.writers import ScalarWriter, given
from .base import Trainable


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

    def _tasks(self, args: Mapping[str, Any]) -> dict[str, Task]:
        model = as_model(self.model_S, "model")
        return {"": Task(Side("", model, self.adaptor_S, args), Teacher())}

    def _objective(self) -> Objective:
        return HardLabels()


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
    _losses_required: ClassVar[bool] = True

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Any,
        model_S: Any,
        adaptor_T: Any,
        adaptor_S: Any,
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
        self.d_config = distill_config
        self.model_T = model_T
        self.adaptor_T = adaptor_T
        self._check_teacher()

    def _check_teacher(self) -> None:
        as_model(self.model_T, "model_T")
        check_adaptor(self.adaptor_T, "adaptor_T")
        refuse_shared_variables(self.model_S, self.model_T)

    @property
    def kd_loss(self) -> Callable:
        """The KD loss the config names."""
        return presets.bound(presets.KD_LOSS_MAP, self.d_config.kd_loss_type)

    def _tasks(self, args: Mapping[str, Any]) -> dict[str, Task]:
        student = Side("S", as_model(self.model_S, "model_S"), self.adaptor_S, args)
        teacher = Side("T", as_model(self.model_T, "model_T"), self.adaptor_T, args)
        return {"": Task(student, Teacher((teacher,)))}

    def _objective(self) -> Objective:
        return PlanObjective.of(
            self.d_config,
            logits_required=self._logits_required,
            losses_required=self._losses_required,
        )

    def job(self, **args: Any) -> Job:
        """See `Trainable.job`."""
        job = super().job(**args)
        config, cache = self.d_config, None
        if config.is_caching_logits:
            cache = CacheOptions(config.cache_dir, config.cache_dtype)
        about = {**job.about, "distill_config": config.to_dict()}
        objective = Monitored(job.objective) if config.monitor else job.objective
        return replace(job, about=about, cache=cache, objective=objective)


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
        custom_matches: matches of submodules, as `CustomMatch` or dicts of its fields. Their
            projections follow those of the intermediate matches in ``projs``.
    """

    _logits_required = False
    _matches_allowed = True

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Any,
        model_S: Any,
        adaptor_T: Any,
        adaptor_S: Any,
        custom_matches: Sequence[CustomMatch | Mapping[str, Any]] | None = None,
    ):
        super().__init__(train_config, distill_config, model_T, model_S, adaptor_T, adaptor_S)
        self._custom_matches: list[CustomMatch] = []
        for i, match in enumerate(custom_matches or ()):
            if isinstance(match, CustomMatch):
                self._custom_matches.append(match)
            elif isinstance(match, Mapping):
                self._custom_matches.append(CustomMatch.from_dict(match))
            else:
                raise TypeError(
                    f"custom_matches[{i}] is a {type(match).__name__}; give a CustomMatch, or a "
                    "dict of its fields"
                )
        made = Projections()
        for match in distill_config.intermediate_matches:
            proj = match.proj
            made = made.plus(proj, proj[3] if proj is not None else None, self.t_config.seed)
        self.projs[:], self.projs_group[:] = made.modules, made.options

    def job(self, **args: Any) -> Job:
        """See `Trainable.job`."""
        first = len(self.d_config.intermediate_matches)
        matches = tuple(self._custom_matches)
        return replace(super().job(**args), custom_matches=matches, first_custom=first)


class MultiTeacherDistiller(BasicDistiller):
    """Distils several teachers of one task: the mean of their logits is compared.

    The teachers may be of different architectures. The first one's ``logits_mask`` is used.

    Args:
        train_config: how to train.
        distill_config: what to train on; no intermediate matches.
        model_T: the list of teachers.
        model_S: the student.
        adaptor_T: one adaptor for all teachers, or a list with one for each.
        adaptor_S: the student's adaptor.
        teacher_weights: how much each teacher counts in the mean, numbers of 0 or more; their sum makes
            no difference. None: all alike.
    """

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Sequence[Any],
        model_S: Any,
        adaptor_T: Adaptor | Sequence[Adaptor],
        adaptor_S: Adaptor,
        *,
        teacher_weights: Sequence[float] | None = None,
    ):
        super().__init__(train_config, distill_config, model_T, model_S, adaptor_T, adaptor_S)
        try:
            self.teacher_weights = checks.optional(checks.proportions)(teacher_weights)
        except ValueError as error:
            raise ValueError(
                f"teacher_weights is {checks.short(teacher_weights)}: {error}"
            ) from None
        if self.teacher_weights is not None and len(self.teacher_weights) != len(model_T):
            raise ValueError(
                f"there are {len(model_T)} teachers and {len(self.teacher_weights)} teacher_weights; give "
                "one each"
            )

    def _check_teacher(self) -> None:
        if not isinstance(self.model_T, list | tuple) or not self.model_T:
            raise TypeError(
                f"model_T is a {type(self.model_T).__name__}; MultiTeacherDistiller takes a list of "
                "teachers, of one at least"
            )
        adaptors = self._adaptors()
        if len(adaptors) != len(self.model_T):
            raise ValueError(
                f"there are {len(self.model_T)} teachers and {len(adaptors)} adaptors; give one "
                "adaptor for all, or one each"
            )
        for i, (model, adaptor) in enumerate(zip(self.model_T, adaptors, strict=True)):
            as_model(model, f"model_T[{i}]")
            check_adaptor(adaptor, f"adaptor_T[{i}]")
            refuse_shared_variables(self.model_S, model)

    def _adaptors(self) -> Sequence[Adaptor]:
        if isinstance(self.adaptor_T, list | tuple):
            return self.adaptor_T
        return [self.adaptor_T] * len(self.model_T)

    def _tasks(self, args: Mapping[str, Any]) -> dict[str, Task]:
        student = Side("S", as_model(self.model_S, "model_S"), self.adaptor_S, args)
        pairs = zip(self.model_T, self._adaptors(), strict=True)
        teachers = tuple(
            Side(f"T[{i}]", as_model(model, f"model_T[{i}]"), adaptor, args)
            for i, (model, adaptor) in enumerate(pairs)
        )
        return {"": Task(student, Teacher(teachers, True, self.teacher_weights))}


class MultiTaskDistiller(GeneralDistiller):
    """Distils teachers of different tasks into one student.

    Args:
        train_config: how to train.
        distill_config: what to train on, in every task.
        model_T: task → teacher.
        model_S: the student.
        adaptor_T: task → the teacher's adaptor.
        adaptor_S: task → the student's adaptor.
    """

    _losses_required = False  # some tasks may have labels and others not

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Mapping[str, Any],
        model_S: Any,
        adaptor_T: Mapping[str, Adaptor],
        adaptor_S: Mapping[str, Adaptor],
    ):
        named = {"model_T": model_T, "adaptor_T": adaptor_T, "adaptor_S": adaptor_S}
        for name, value in named.items():
            if not isinstance(value, Mapping) or not value:
                kind = type(value).__name__
                raise TypeError(f"{name} is a {kind}; MultiTaskDistiller takes a dict by task")
            if value.keys() != model_T.keys():
                raise ValueError(
                    f"{name} has the tasks {', '.join(map(repr, value))}, and model_T "
                    f"{', '.join(map(repr, model_T))}; they must be the same"
                )
        if distill_config.is_caching_logits:
            raise ValueError(
                "is_caching_logits: MultiTaskDistiller trains by steps, and does not cache"
            )
        super().__init__(train_config, distill_config, model_T, model_S, adaptor_T, adaptor_S)

    def _check_adaptor(self) -> None:
        for task, adaptor in self.adaptor_S.items():
            check_adaptor(adaptor, f"adaptor_S[{task!r}]")

    def _check_teacher(self) -> None:
        for task, model in self.model_T.items():
            as_model(model, f"model_T[{task!r}]")
            check_adaptor(self.adaptor_T[task], f"adaptor_T[{task!r}]")
            refuse_shared_variables(self.model_S, model)

    def _tasks(self, args: Mapping[str, Any]) -> dict[str, Task]:
        return {task: self._task(task, args) for task in self.model_T}

    def _task(self, task: str, args: Mapping[str, Any]) -> Task:
        student = Side("S", as_model(self.model_S, "model_S"), self.adaptor_S[task], args)
        model = as_model(self.model_T[task], f"model_T[{task!r}]")
        teacher = Side(f"T[{task!r}]", model, self.adaptor_T[task], args)
        return Task(student, Teacher((teacher,)))

    def train(  # type: ignore[override]
        self,
        optimizer: Optimizer,
        dataloaders: Mapping[str, Iterable],
        num_steps: int,
        scheduler_class: Callable[..., Any] | None = None,
        scheduler_args: Mapping[str, Any] | None = None,
        scheduler: None = None,
        max_grad_norm: float = -1.0,
        tau: float = 1,
        callback: Callable[..., Any] | None = None,
        batch_postprocessors: Mapping[str, Callable[[Any], Any]] | None = None,
        *,
        trainable: Selection | None = None,
        eval_loader: Mapping[str, Any] | None = None,
        metrics: Any = None,
        best_metric: str | None = None,
        eval_steps: int | None = None,
        writers: Sequence[ScalarWriter] = (),
        **args: Any,
    ) -> None:
        """Trains the student on all tasks; see `Trainable.train` for what is not told here.

        For each micro-batch a task is drawn with p ∝ (batches in its loader)^tau, or evenly where
        a loader has no length. The draws come from `TrainingConfig.seed` (TextBrewer draws from
        numpy's global state).

        Args:
            optimizer: see `Trainable.train`.
            dataloaders: task → loader; each is cycled.
            num_steps: optimizer steps to train for.
            scheduler_class: see `Trainable.train`.
            scheduler_args: its arguments.
            scheduler: always None.
            max_grad_norm: clips the norm of the student's gradient, if positive.
            tau: see above.
            callback: see `Trainable.train`.
            batch_postprocessors: task → function applied to each of its batches.
            trainable: see `Trainable.train`.
            eval_loader: task → batches to evaluate on, of all tasks or some.
            metrics: a list for all tasks, or task → list; numbers are named ``task/accuracy``.
            best_metric: see `Trainable.train`; one of these names.
            eval_steps: see `Trainable.train`.
            writers: see `Trainable.train`.
            **args: further keyword arguments for the models.
        """
        posts = batch_postprocessors or {}
        for name, value in (("dataloaders", dataloaders), ("batch_postprocessors", posts)):
            if not isinstance(value, Mapping):
                raise TypeError(f"{name} is a {type(value).__name__}; give a dict by task")
            extra = [task for task in value if task not in self.model_T]
            if extra:
                raise ValueError(
                    f"{name} has tasks without a teacher: {', '.join(map(repr, extra))}"
                )
        missing = [task for task in self.model_T if task not in dataloaders]
        if missing:
            raise ValueError(f"dataloaders lacks the tasks {', '.join(map(repr, missing))}")
        if not np.isfinite(tau):
            raise ValueError(f"tau={tau!r}: expected a finite number")
        feeds = {task: Feed.of(loader, posts.get(task)) for task, loader in dataloaders.items()}
        schedule = (scheduler_class, scheduler_args, scheduler)
        evaluation = self._evaluation(eval_loader, metrics, best_metric, eval_steps, args)
        request = Request(
            optimizer,
            feeds,
            None,
            num_steps,
            *schedule,
            max_grad_norm,
            callback,
            tau,
            evaluation,
            given(writers),
        )
        self._train(request, {"trainable": trainable, **args})

    def check(
        self,
        batch: Mapping[str, Any],
        optimizer: Optimizer | None = None,
        *,
        on: str | None = None,
        trainable: Selection | None = None,
        **args: Any,
    ) -> str:
        """As `Trainable.check`, with a dict of batches by task."""
        batches = {task: own(one) for task, one in batch.items()}
        return self._report(batches, optimizer, {"trainable": trainable, **args}, on)
