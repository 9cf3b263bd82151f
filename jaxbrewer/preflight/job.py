"""The job: all that a distiller hands down to be trained, frozen."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Self

import jax
from flax import nnx

from ..configurations.configs import TrainingConfig
from ..models.adaptors import Side
from ..models.handle import Model
from ..models.teachers import Teacher
from ..models.trainable import Selection
from ..models.wrap import as_model
from ..objective.objectives import Objective
from ..objective.plan import make_projection
from ..objective.submodules import CustomMatch


@dataclass(frozen=True)
class Task:
    """The two sides of a task.

    Attributes:
        student: the student with its adaptor.
        teacher: the teacher, or several, or none.
    """

    student: Side
    teacher: Teacher

    def capturing(self, paths_S: tuple[str, ...], paths_T: tuple[str, ...]) -> Self:
        """The same sides, whose results hold what these submodules return."""
        teacher_sides = tuple(replace(side, capture=paths_T) for side in self.teacher.sides)
        return replace(
            self,
            student=replace(self.student, capture=paths_S),
            teacher=replace(self.teacher, sides=teacher_sides),
        )


@dataclass(frozen=True)
class Projections:
    """The projections of the matches made so far, in their order.

    Attributes:
        modules: one for each match, None where it has none. Its index names a projection.
        options: their optimizer options, likewise.
    """

    modules: tuple[nnx.Module | None, ...] = ()
    options: tuple[Mapping[str, Any] | None, ...] = ()

    def __len__(self) -> int:
        return len(self.modules)

    def plus(self, proj: Any, options: Mapping[str, Any] | None, seed: int) -> Self:
        """With one more, made of `proj` (see `plan.make_projection`) by `seed` and its index."""
        key = jax.random.fold_in(jax.random.key(seed), len(self))
        module = make_projection(proj, key)
        options = options if module is not None else None
        return replace(self, modules=(*self.modules, module), options=(*self.options, options))

    def models(self) -> dict[str, Model]:
        """Name → projection."""
        return {str(i): as_model(p) for i, p in enumerate(self.modules) if p is not None}

    def groups(self) -> dict[str, Mapping[str, Any] | None]:
        """Name → optimizer options."""
        return {str(i): self.options[i] for i, p in enumerate(self.modules) if p is not None}


@dataclass(frozen=True)
class CacheOptions:
    """How the teacher's results are cached.

    Attributes:
        folder: where; None keeps them in host memory.
        dtype: the type floats are kept in.
    """

    folder: str | os.PathLike[str] | None
    dtype: str


@dataclass(frozen=True)
class Job:
    """What is to be trained. Nothing in it is ever filled in: preflight returns another, resolved.

    Attributes:
        config: how to train.
        tasks: name → its two sides; a job of one task has one, named ''.
        objective: what is minimised.
        projections: those made so far.
        custom_matches: matches of submodules, not yet resolved; the job has one task then.
        first_custom: the number of the first one's projection.
        train_mode: whether the student trains in train mode (dropout on).
        about: what the run says of itself in checkpoints: its class, its configs.
        cache: how the teacher is cached, or None.
        keywords: the keywords that ``train`` itself takes, to suggest for misspelt ones.
        open_writer: opens the tensorboard writer; returns None where nothing is logged.
        print_freq: log lines in an epoch.
        trainable: which of the student's parameters are trained, see `models.trainable`; None: all.
    """

    config: TrainingConfig
    tasks: Mapping[str, Task]
    objective: Objective
    projections: Projections = Projections()
    custom_matches: tuple[CustomMatch, ...] = ()
    first_custom: int = 0
    train_mode: bool = False
    about: Mapping[str, Any] = field(default_factory=dict)
    cache: CacheOptions | None = None
    keywords: tuple[str, ...] = ()
    open_writer: Callable[[], Any] = lambda: None
    print_freq: int = 20
    trainable: Selection | None = None

    @property
    def name(self) -> str:
        """The distiller's class."""
        return str(self.about.get("class", "this"))
