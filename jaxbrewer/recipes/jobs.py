"""A recipe's models and data, put together for a distiller."""

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import optax

from ..configurations.configs import DistillationConfig, TrainingConfig
from ..data.buckets import BucketedLoader
from ..data.tables import Row
from ..distillers.classes import BasicTrainer, GeneralDistiller, MultiTeacherDistiller
from ..errors import ConfigError
from ..evaluation.answers import Answers, Window
from ..utils import decay_mask
from ..zoo.adaptors import adaptor
from . import examples
from .examples import Columns, Labels, Sided
from .folders import on_disk, tokenizer_problem
from .measures import metric
from .models import labels_of_config, student_of, teacher_of
from .reading import columns_of, needs_labels
from .schema import USUAL_METRICS, Named, Recipe, scheduler_factories
from .tokens import Tokens

STUDENT = "student"
"""The folder of the student, in the recipe's ``output_dir``."""


@dataclass(frozen=True)
class Side:
    """A model's inputs: its tokenizer, and how it takes them."""

    tokens: Tokens
    takes: Sided


@dataclass(frozen=True)
class Prepared:
    """A recipe, ready to train.

    Attributes:
        recipe: with the numbers that only the data tell.
        distiller: see `jaxbrewer.distillers`.
        teachers: none, one or several.
        student: the model.
        train: the loader to train on.
        eval: that to evaluate on, or None;
        eval_teacher: the same rows as the teacher's tokenizer has them.
        metrics: what is measured there, of the student;
        metrics_teacher: and of the teacher.
        labels: what the labels can be; None of questions.
        may_lack: whether questions were trained on that have no answer.
    """

    recipe: Recipe
    distiller: Any
    teachers: tuple[Any, ...]
    student: Any
    train: BucketedLoader
    eval: BucketedLoader | None
    eval_teacher: BucketedLoader | None
    metrics: tuple[Any, ...]
    metrics_teacher: tuple[Any, ...]
    labels: Labels | None
    may_lack: bool

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        if self.recipe.num_steps is not None:
            return self.recipe.num_steps
        window = self.recipe.training.gradient_accumulation_steps
        return len(self.train) // window * self.recipe.num_epochs


def prepared(recipe: Recipe, most: int | None = None) -> Prepared:
    """Reads the models and the data of a recipe.

    Args:
        recipe: see `read_recipe`.
        most: rows of training, and of evaluation, the first; None: all.

    Raises:
        ValueError: what cannot be read, or does not go together.
    """
    rows = examples.read_all(recipe.data.train, recipe.data.form, most)
    held_out = (
        examples.read_all(recipe.data.eval, recipe.data.form, most) if recipe.data.eval else []
    )
    folders = [on_disk(folder) for folder in recipe.teacher or ()]
    teachers = tuple(teacher_of(folder, recipe) for folder in folders)
    labels = _labels(recipe, rows, teachers)
    own = None if recipe.student.folder is None else on_disk(recipe.student.folder)
    student = student_of(recipe, teachers[0] if teachers else None, labels, own)
    tokens = _tokens(recipe, own or folders[0])
    of_student = Side(tokens, Sided.of(student.config))
    of_teacher = _of_teacher(recipe, folders, teachers, of_student)
    work = _Work(recipe, labels, of_student, of_teacher)
    train, _ = work.loader(rows, "train", seed=recipe.training.seed)
    evals, metrics = _evaluation(work, held_out)
    evals_T, metrics_T = _evaluation(work, held_out if teachers else [], of_teacher or of_student)
    return Prepared(
        recipe, _distiller(recipe, teachers, student), teachers, student, train, evals, evals_T,
        metrics, metrics_T, labels, _may_lack(recipe, rows),
    )  # fmt: skip


def _may_lack(recipe: Recipe, rows: Sequence[Row]) -> bool:
    if recipe.task != "question-answering":
        return False
    return any("answers" in row and not row["answers"]["text"] for row in rows)


def _labels(recipe: Recipe, rows: Sequence[Row], teachers: Sequence[Any]) -> Labels | None:
    if recipe.task == "question-answering":
        return None
    _, label = columns_of(recipe)
    found = [row[label] for row in rows if row.get(label) is not None]
    values = found if recipe.task != "token-classification" else [t for tags in found for t in tags]
    of_teacher = [labels_of_config(teacher.config) for teacher in teachers]
    counts = {labels.count for labels in of_teacher}
    if len(counts) > 1:
        raise ConfigError(
            "the recipe", [f"the teachers have {sorted(counts)} classes, not the same"]
        )
    return examples.labels_of(
        recipe.data.labels, of_teacher[0] if of_teacher else None, values or None
    )


def _tokens(recipe: Recipe, folder: str) -> Tokens:
    """The tokenizer of a folder, or where it has none the one that the recipe names."""
    has_one = not tokenizer_problem(folder)
    return Tokens(folder if has_one else recipe.data.tokenizer or folder, recipe.data.max_length)


def _of_teacher(
    recipe: Recipe, folders: Sequence[str], teachers: Sequence[Any], student: Side
) -> Side | None:
    """The teacher's inputs, where they are not the student's."""
    if not teachers:
        return None
    takes = {Sided.of(teacher.config) for teacher in teachers}
    tokens = [_tokens(recipe, folder) for folder in folders]
    same = [each.rules == student.tokens.rules for each in tokens]
    if all(same):
        if takes == {student.takes}:
            return None
    elif recipe.task != "sequence-classification" or len(teachers) > 1:
        raise ConfigError(
            "the recipe",
            [
                f"the tokenizers of {folders[same.index(False)]} and of the student "
                f"({student.tokens.folder}) differ, and only one teacher of sequence-classification "
                "can be distilled so by a recipe: docs/porting.md tells how it is done in Python"
            ],
        )
    if len(takes) > 1:
        raise ConfigError("the recipe", ["the teachers take other inputs than one another"])
    return Side(tokens[0], takes.pop())


@dataclass(frozen=True)
class _Work:
    """What rows are made into."""

    recipe: Recipe
    labels: Labels | None
    student: Side
    teacher: Side | None

    def loader(
        self, rows: Sequence[Row], field: str, *, seed: int | None, side: Side | None = None
    ) -> tuple[BucketedLoader, list[Window]]:
        """The loader of rows, for one side or, without `side`, for all; of questions the windows too."""
        data = self.recipe.data
        pads: Mapping[str, int]
        if side is None and self.teacher is not None:
            mine, windows = self.columns(rows, field, self.student)
            theirs, _ = self.columns(rows, field, self.teacher)
            unlabelled = {k: v for k, v in theirs.items() if k in _INPUTS}
            columns: Any = {"teacher": unlabelled, "student": mine}
            pads = {
                "teacher.input_ids": self.teacher.takes.pad,
                "student.input_ids": self.student.takes.pad,
            }
        else:
            side = side or self.student
            columns, windows = self.columns(rows, field, side)
            pads = {"input_ids": side.takes.pad}
        together = field == "train" and self.recipe.training.local_rank >= 0
        share = (jax.process_count(), jax.process_index()) if together else (1, 0)
        made = examples.loader(columns, pads, data.batch_size, data.buckets, seed=seed, share=share)
        return made, windows

    def columns(self, rows: Sequence[Row], field: str, side: Side) -> tuple[Columns, list[Window]]:
        """The columns of rows for one side."""
        recipe = self.recipe
        path = ", ".join(getattr(recipe.data, field))
        texts, label = columns_of(recipe)
        labelled = needs_labels(recipe, field) or all(row.get(label) is not None for row in rows)
        windows: list[Window] = []
        if recipe.task == "question-answering":
            columns, windows = examples.asked(
                rows, path, side.tokens, recipe.data.stride, labelled=labelled
            )
        else:
            given = (label, self.labels) if labelled and self.labels is not None else None
            if recipe.task == "token-classification":
                columns, _ = examples.tagged(rows, texts[0], given, path, side.tokens)
            else:
                columns = examples.classified(rows, texts, given, path, side.tokens)
        return side.takes.own(columns), windows


_INPUTS = ("input_ids", "attention_mask", "token_type_ids")


def _evaluation(
    work: _Work, rows: Sequence[Row], of_teacher: Side | None = None
) -> tuple[BucketedLoader | None, tuple[Any, ...]]:
    """A loader to evaluate on, and what is measured there: of the student, or of the teacher."""
    recipe = work.recipe
    if not rows:
        return None, ()
    chosen = recipe.metrics or (Named(_usual_metric(recipe, work.labels)),)
    comparing = [m for m in chosen if m.name in _COMPARING]
    if of_teacher is not None:
        chosen = tuple(m for m in chosen if m not in comparing)
    side = of_teacher or (None if comparing else work.student)  # None: both
    loader, windows = work.loader(rows, "eval", seed=None, side=side)
    answers = None
    if recipe.task == "question-answering":
        answers = Answers(
            [windows[i] for i in loader.order],
            [row["context"] for row in rows],
            [row["answers"]["text"] for row in rows],
        )
    names = _names(work.labels)
    return loader, tuple(metric(m.name, m.options, names, answers) for m in chosen)


_COMPARING = ("agreement", "kl")


def _names(labels: Labels | None) -> Sequence[str]:
    if labels is None:
        return ()
    return labels.names or [str(i) for i in range(labels.count)]


def _usual_metric(recipe: Recipe, labels: Labels | None) -> str:
    if recipe.task == "sequence-classification" and labels is not None and labels.count == 1:
        return "pearson"
    return USUAL_METRICS[recipe.task]


def _distiller(recipe: Recipe, teachers: Sequence[Any], student: Any) -> Any:
    training: TrainingConfig = recipe.training
    adapt = adaptor(
        recipe.task,
        each=training.gradient_accumulation == "exact",
        problem_type=getattr(student.config, "problem_type", None),
    )
    if not teachers:
        return BasicTrainer(training, student, adapt)
    how = recipe.distillation or DistillationConfig()
    if len(teachers) > 1:
        weights = recipe.teacher_weights
        return MultiTeacherDistiller(
            training, how, list(teachers), student, adapt, adapt, teacher_weights=weights
        )
    return GeneralDistiller(training, how, teachers[0], student, adapt, adapt)


def optimizer_of(recipe: Recipe) -> Callable[..., Any]:
    """The optimizer that a recipe names, as ``train`` takes it."""
    options = dict(recipe.optimizer.options)
    if options.get("mask") == "decay_mask":
        options["mask"] = decay_mask
    return functools.partial(getattr(optax, recipe.optimizer.name), **options)


def schedule_of(recipe: Recipe, total: int) -> dict[str, Any]:
    """The schedule that a recipe names, as arguments of ``train``."""
    if recipe.scheduler is None:
        return {}
    make = scheduler_factories()[recipe.scheduler.name]
    options = dict(recipe.scheduler.options)
    warmup = options.get("num_warmup_steps")
    if warmup is not None and 0 < warmup < 1:
        options["num_warmup_steps"] = round(total * warmup)
    if "num_training_steps" in make.__code__.co_varnames[: make.__code__.co_argcount]:
        options.setdefault("num_training_steps", total)
    return {"scheduler_class": make, "scheduler_args": options}


def length_of(recipe: Recipe) -> dict[str, int]:
    """How long a recipe trains, as arguments of ``train``."""
    if recipe.num_steps is not None:
        return {"num_steps": recipe.num_steps}
    return {"num_epochs": recipe.num_epochs}  # type: ignore[dict-item]


def folder_of(recipe: Recipe) -> Path:
    """Where the student's folder is written."""
    return Path(recipe.training.output_dir) / STUDENT


def evaluation_of(job: Prepared) -> dict[str, Any]:
    """What is evaluated while it trains, as arguments of ``train``."""
    if job.eval is None:
        return {}
    return {
        "eval_loader": job.eval,
        "metrics": list(job.metrics),
        "best_metric": job.recipe.best_metric,
        "eval_steps": job.recipe.eval_steps,
    }
