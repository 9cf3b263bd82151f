"""A recipe, run from its file to the student's folder."""

import logging
import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..evaluation.evaluator import Evaluator
from ..files import write_json
from ..training.stored import load_student
from ..zoo.adaptors import adaptor
from . import jobs
from .models import save
from .predicting import USE, use_of
from .reading import Setting, read_recipe

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class RecipeRun:
    """What a recipe has come to.

    Attributes:
        folder: the student's, in Hugging Face's format, with the tokenizer.
        distiller: that trained it; ``distiller.best_checkpoint`` names the checkpoint it is from,
            where ``best_metric`` chose one.
        evaluations: optimizer step → name → number, of the run.
        student: name → number, of the student in the folder;
        teacher: of the teacher; empty without ``data.eval``.
        minutes: from the reading of the recipe on.
    """

    folder: Path
    distiller: Any
    evaluations: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    student: Mapping[str, float] = field(default_factory=dict)
    teacher: Mapping[str, float] = field(default_factory=dict)
    minutes: float = 0.0


def run_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any],
    settings: Mapping[str, Any] | Iterable[Setting] = (),
    *,
    max_examples: int | None = None,
) -> RecipeRun:
    """Trains what a recipe says, and writes the student's folder.

    Args:
        source: a TOML or JSON file (paths in it are relative to its folder), or a dict of the same;
            see `Recipe`.
        settings: fields to set on top: ``{"distillation.temperature": 4, "training.resume": True}``.
        max_examples: rows of training, and of evaluation, the first; None: all.

    Returns:
        The run, with the evaluations. The student lies in ``output_dir/student``.

    Raises:
        UnreadableFileError: a file that cannot be read, with its line.
        ConfigError: all that is wrong with the recipe, before anything is loaded.
        PreflightError: what its models and data do not fit in.
        FloatingPointError: a loss that is not finite.
    """
    began = time.time()
    settings = settings.items() if isinstance(settings, Mapping) else settings
    recipe = read_recipe(source, settings)
    job = jobs.prepared(recipe, max_examples)
    with job.distiller as distiller:
        distiller.train(
            jobs.optimizer_of(recipe),
            job.train,
            **jobs.length_of(recipe),
            **jobs.schedule_of(recipe, job.total_steps),
            **jobs.evaluation_of(job),
            max_grad_norm=recipe.max_grad_norm,
        )
    folder = jobs.folder_of(recipe)
    found = RecipeRun(folder, distiller, distiller.evaluations)
    if distiller.rank != 0:
        return found
    if recipe.best_metric is not None and distiller.best_checkpoint is not None:
        load_student(distiller.best_checkpoint, job.student)
    save(job.student, folder)
    write_json(folder / USE, use_of(recipe, may_lack=job.may_lack))
    measured = _measured(job)
    minutes = (time.time() - began) / 60
    return RecipeRun(folder, distiller, distiller.evaluations, *measured, minutes)


def _measured(job: jobs.Prepared) -> tuple[Mapping[str, float], Mapping[str, float]]:
    """What is measured of the student in the end, and of the teacher."""
    if job.eval is None:
        return {}, {}
    student = job.distiller.evaluate(job.eval, list(job.metrics))
    if len(job.teachers) != 1 or not job.metrics_teacher:
        return student, {}
    evaluate = Evaluator(job.teachers[0], adaptor(job.recipe.task))
    return student, evaluate(job.eval_teacher, list(job.metrics_teacher))  # type: ignore[arg-type]
