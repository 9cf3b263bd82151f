"""``jaxbrewer train``, ``init`` and ``predict``: a job from a file, and what comes of it."""

import contextlib
import io
import json
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxbrewer.commands import BY_HAND, FINE, NOT_FINITE, CommandError, say, say_line
from jaxbrewer.commands.port.verdicts import Run, describe_timeline
from jaxbrewer.configurations.configs import TrainingConfig
from jaxbrewer.errors import told
from jaxbrewer.files import UnreadableFileError, replacing
from jaxbrewer.machine.devices import resolve_device
from jaxbrewer.recipes import RecipeRun, jobs, predict, run_recipe
from jaxbrewer.recipes.reading import Setting, read_recipe
from jaxbrewer.recipes.template import template


def train(
    recipe: str, settings: Sequence[Setting], *, resume: bool, max_examples: int | None
) -> int:
    """Trains what a recipe says; see the command's help.

    Raises:
        CommandError: what is wrong with it, or with its data or models.
    """
    if resume:
        settings = [*settings, ("training.resume", True)]
    with _shown(), _told(recipe):
        run = run_recipe(recipe, settings, max_examples=max_examples)
    _say_result(run)
    return FINE


def check(recipe: str, settings: Sequence[Setting], *, on: str | None) -> int:
    """Reads the models and the data of a recipe, and looks at its job without training it.

    Args:
        recipe: its file.
        settings: fields to set on top.
        on: devices to compile the step for, see `machine.described`; or None.

    Raises:
        CommandError: what is wrong with it, or with its data or models.
    """
    with _told(recipe):
        read = read_recipe(recipe, settings)
        job = jobs.prepared(read)
        with job.distiller as distiller, contextlib.redirect_stdout(io.StringIO()):
            report = distiller.check(max(job.train, key=_tokens), jobs.optimizer_of(read), on=on)
    say(report)
    say(f"\ntrain: {job.train!r}")
    if job.labels is not None and job.labels.names:
        named = ", ".join(f"{i} {name!r}" for i, name in enumerate(job.labels.names))
        say(f"  classes: {named}")
    shapes = ", ".join(f"{size} × {length}" for size, length in job.train.shapes)
    say(f"  compiled for {shapes}; the figures above are of the largest")
    if job.eval is not None:
        say(f"eval: {job.eval!r}")
    run = Run(len(job.train), read.num_epochs, read.num_steps)
    timeline = run.timeline(read.training)
    if timeline is not None:
        say(f"checkpoints: {describe_timeline(timeline)}")
    if on is None:
        for warning in _device_warnings(read.training):
            say(f"warning: {warning}")
    say(f"student: {jobs.folder_of(read)}")
    return FINE


def _device_warnings(config: TrainingConfig) -> list[str]:
    """What training would say of the device it gets, where it is another than was asked for."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            resolve_device(config.device)
        except ValueError as error:  # it may be trained elsewhere
            return [str(error)]
    return [str(one.message) for one in caught]


def _tokens(batch: Mapping[str, Any]) -> int:
    return batch.get("student", batch)["input_ids"].size


def init(task: str, out: str | None, *, teacher: bool) -> int:
    """Writes a recipe with comments; see the command's help.

    Raises:
        CommandError: the file is there already, or cannot be written.
    """
    out = out or ("teacher.toml" if teacher else "recipe.toml")
    path = Path(out)
    if path.exists():
        raise CommandError(f"{out} is there already; name another file by --out, or remove it")
    try:
        with replacing(path) as file:
            device = jax.default_backend()
            text = template(task, file=path.name, device=device, teacher=teacher)
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{out} cannot be written: {error}") from error
    say(f"{out}: fill in the folders and files, then: jaxbrewer train {out}")
    return FINE


def say_predictions(
    folder: str,
    file: str,
    *,
    out: str | None,
    text: Sequence[str] | None,
    task: str | None,
    max_length: int | None,
    batch_size: int,
    form: str | None,
) -> int:
    """Writes what a model says of a file's rows, a JSON object a line; see the command's help.

    Raises:
        CommandError: the folder or the file cannot be read, or `out` not be written.
    """
    with _told(folder):
        found = predict(
            folder,
            file,
            text=text,
            task=task,
            max_length=max_length,
            batch_size=batch_size,
            form=form,
        )
    lines = [json.dumps(row, ensure_ascii=False) for row in found]
    if out is None:
        for line in lines:
            say_line(line)
        return FINE
    try:
        with replacing(Path(out)) as path:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise CommandError(f"{out} cannot be written: {error}") from error
    say(f"{out}: {len(lines):,} rows")
    return FINE


@contextlib.contextmanager
def _told(name: str) -> Iterator[None]:
    """Errors of a job as those of a command."""
    try:
        yield
    except UnreadableFileError:
        raise
    except FloatingPointError as error:
        raise CommandError(_with_notes(error), NOT_FINITE) from error
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise CommandError(_with_notes(error), BY_HAND) from error


def _with_notes(error: BaseException) -> str:
    return "\n".join([str(error) or told(error), *getattr(error, "__notes__", ())])


@contextlib.contextmanager
def _shown() -> Iterator[None]:
    """Shows what jaxbrewer has to say while it trains."""
    logger, handler = logging.getLogger("jaxbrewer"), logging.StreamHandler(sys.stderr)
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    level, spreads = logger.level, logger.propagate
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False

    def show(
        message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None
    ) -> None:
        logger.warning("warning: %s", message)

    try:
        with warnings.catch_warnings():
            warnings.showwarning = show
            yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
        logger.propagate = spreads


def _say_result(run: RecipeRun) -> None:
    say(f"\n{run.folder}: the student, after {run.minutes:.1f} minutes")
    best = run.distiller.best_checkpoint
    if best is not None:
        say(f"  from {best.name}, the best checkpoint")
    rows: Mapping[str, Mapping[str, Any]] = {"teacher": run.teacher, "student": run.student}
    for name, scores in rows.items():
        if scores:
            said = "  ".join(f"{metric} {value:.4f}" for metric, value in scores.items())
            say(f"  {name:8} {said}")
