"""TextBrewer's classes: they differ by teacher, objective and stream; all else is shared."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

import jax
import numpy as np

from .. import presets
from ..configurations.configs import DistillationConfig, TrainingConfig
from ..data.batches import Batch, as_call, own, plain, sides
from ..errors import Findings
from ..models.adaptors import Adaptor, Results, Side, check_adaptor
from ..models.nnx_model import refuse_shared_variables
from ..models.teachers import MeanTeacher, NoTeacher, OneTeacher, Teacher
from ..models.wrap import as_model
from ..objective.loss import Loss, Project, Weights, distillation_loss, hard_label_term
from ..objective.plan import Plan, make_projection, plan_terms, resolve
from ..objective.submodules import CustomMatch, resolve_custom
from ..objective.terms import check_plan
from ..step.optimizer import Optimizer
from ..training import run as training
from ..training.request import Feed, Request
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

    def _sides(self, task: str, args: Mapping[str, Any]) -> tuple[Side, Teacher]:
        return Side("", as_model(self.model_S, "model"), self.adaptor_S, args), NoTeacher()

    def _terms(self) -> list[str]:
        return ["the sum of the losses the adaptor returns"]

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
        self._plan: Plan | None = None

    def _check_teacher(self) -> None:
        as_model(self.model_T, "model_T")
        check_adaptor(self.adaptor_T, "adaptor_T")
        refuse_shared_variables(self.model_S, self.model_T)

    @property
    def kd_loss(self) -> Callable:
        """The KD loss the config names."""
        return presets.KD_LOSS_MAP[self.d_config.kd_loss_type]

    def _sides(self, task: str, args: Mapping[str, Any]) -> tuple[Side, Teacher]:
        student = Side("S", as_model(self.model_S, "model_S"), self.adaptor_S, args)
        teacher = Side("T", as_model(self.model_T, "model_T"), self.adaptor_T, args)
        return student, OneTeacher(teacher)

    def _resolve(self) -> list[str]:
        self._plan, problems = resolve(
            self.d_config,
            logits_required=self._logits_required,
            losses_required=self._losses_required,
        )
        return problems

    def _weights(self) -> tuple[Any, Any]:
        return (self._plan.kd_weight, self._plan.hard_label_weight) if self._plan else (None, None)

    def _check(self, results_S: Results, results_T: Results, batch: Batch, found: Findings) -> None:
        own_objective = type(self).compute_loss is BasicDistiller.compute_loss
        if self._plan is not None and own_objective:  # an overridden one is checked by running it
            check_plan(self._plan, results_S, results_T, batch, self._projections(), found)

    def _terms(self) -> list[str] | None:
        own_objective = type(self).compute_loss is BasicDistiller.compute_loss
        return plan_terms(self._plan) if self._plan is not None and own_objective else None

    def _cache(self) -> dict[str, Any] | None:
        if not self.d_config.is_caching_logits or self._plan is None:
            return None
        used: dict[str, set[Any]] = {}
        for match in self._plan.matches:
            layers = match.layer_T if isinstance(match.layer_T, Sequence) else (match.layer_T,)
            used.setdefault(match.feature, set()).update(layers)
        return {
            "used": used,
            "folder": self.d_config.cache_dir,
            "dtype": self.d_config.cache_dtype,
            "seed": self.t_config.seed,
        }

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
        self._custom: list[CustomMatch] = []
        for i, match in enumerate(custom_matches or ()):
            if isinstance(match, CustomMatch):
                self._custom.append(match)
            elif isinstance(match, Mapping):
                self._custom.append(CustomMatch.from_dict(match))
            else:
                raise TypeError(
                    f"custom_matches[{i}] is a {type(match).__name__}; give a CustomMatch, or a "
                    "dict of its fields"
                )
        for match in distill_config.intermediate_matches:
            proj = match.proj
            self._add_projection(proj, proj[3] if proj is not None else None)

    def _add_projection(self, proj: Any, options: Mapping[str, Any] | None) -> None:
        key = jax.random.fold_in(jax.random.key(self.t_config.seed), len(self.projs))
        module = make_projection(proj, key)
        self.projs.append(module)
        self.projs_group.append(options if module is not None else None)

    def _resolve_modules(
        self, student: Side, teacher: Teacher, batch: Batch, found: Findings
    ) -> tuple[Side, Teacher]:
        if not self._custom or self._plan is None:
            return student, teacher
        parts = sides(plain(batch))
        (side_T,) = teacher.sides
        first = len(self.d_config.intermediate_matches)
        matches, projections, options = resolve_custom(
            self._custom,
            (side_T.model, *as_call(parts[0], side_T.args)),
            (student.model, *as_call(parts[1], student.args)),
            first,
            found.problems,
        )
        if len(self.projs) == first:  # the first time; later trainings go on with the same ones
            for proj, group in zip(projections, options, strict=True):
                self._add_projection(proj, group)
        self._plan = replace(self._plan, matches=(*self._plan.matches, *matches))
        paths_T, paths_S = (
            tuple(dict.fromkeys(str(getattr(m, name)) for m in matches))
            for name in ("layer_T", "layer_S")
        )
        return replace(student, capture=paths_S), OneTeacher(replace(side_T, capture=paths_T))


class MultiTeacherDistiller(BasicDistiller):
    """Distils several teachers of one task: their logits are averaged, then compared.

    The teachers may be of different architectures. The first one's ``logits_mask`` is used.

    Args:
        train_config: how to train.
        distill_config: what to train on; no intermediate matches.
        model_T: the list of teachers.
        model_S: the student.
        adaptor_T: one adaptor for all teachers, or a list with one for each.
        adaptor_S: the student's adaptor.
    """

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

    def _sides(self, task: str, args: Mapping[str, Any]) -> tuple[Side, Teacher]:
        student = Side("S", as_model(self.model_S, "model_S"), self.adaptor_S, args)
        pairs = zip(self.model_T, self._adaptors(), strict=True)
        return student, MeanTeacher(
            [
                Side(f"T[{i}]", as_model(model, f"model_T[{i}]"), adaptor, args)
                for i, (model, adaptor) in enumerate(pairs)
            ]
        )


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
        self._adaptors_S = dict(adaptor_S)
        # The base class knows one student adaptor; _sides picks each task's own.
        super().__init__(
            train_config,
            distill_config,
            model_T,
            model_S,
            adaptor_T,
            next(iter(adaptor_S.values())),
        )
        self.adaptor_S: Any = self._adaptors_S

    def _check_teacher(self) -> None:
        for task, model in self.model_T.items():
            as_model(model, f"model_T[{task!r}]")
            check_adaptor(self.adaptor_T[task], f"adaptor_T[{task!r}]")
            check_adaptor(self._adaptors_S[task], f"adaptor_S[{task!r}]")
            refuse_shared_variables(self.model_S, model)

    def _sides(self, task: str, args: Mapping[str, Any]) -> tuple[Side, Teacher]:
        student = Side("S", as_model(self.model_S, "model_S"), self._adaptors_S[task], args)
        model = as_model(self.model_T[task], f"model_T[{task!r}]")
        return student, OneTeacher(Side(f"T[{task!r}]", model, self.adaptor_T[task], args))

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
        training.train(
            self,
            Request(
                optimizer, feeds, None, num_steps, *schedule, max_grad_norm, callback, args, tau
            ),
        )

    def check(
        self, batch: Mapping[str, Any], optimizer: Optimizer | None = None, **args: Any
    ) -> str:
        """As `Trainable.check`, with a dict of batches by task."""
        report = training.report(self, {t: own(b) for t, b in batch.items()}, optimizer, args)
        print(report)
        return report
