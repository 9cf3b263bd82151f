"""``jaxbrewer check``: the preflight of a distillation, from config files alone."""

import dataclasses
import functools
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxbrewer import zoo
from jaxbrewer.commands import BY_HAND, FINE, CommandError, say
from jaxbrewer.commands.port.verdicts import Run, describe_timeline
from jaxbrewer.commands.zoo_models import (
    by_shape,
    config_from,
    model_class,
    model_type_of,
    read_config,
    task_of,
)
from jaxbrewer.configurations.configs import DistillationConfig, TrainingConfig
from jaxbrewer.data.batches import own
from jaxbrewer.distillers.classes import GeneralDistiller
from jaxbrewer.errors import ConfigError, PreflightError, PreflightWarning
from jaxbrewer.files import read_json_object
from jaxbrewer.models.wrap import as_model
from jaxbrewer.preflight.prepare import prepare
from jaxbrewer.preflight.report import describe
from jaxbrewer.step.program import Program
from jaxbrewer.zoo.folders import INDEX, WEIGHTS, check_sizes, find_tensors

_LABELS = {
    "sequence-classification": ("labels",),
    "token-classification": ("labels",),
    "question-answering": ("start_positions", "end_positions"),
    "masked-lm": ("labels",),
    "none": (),
}


def check(
    train: str,
    distill: str,
    teacher: str,
    student: str,
    *,
    task: str | None,
    num_labels: int | None,
    batch_size: int,
    length: int,
    run: Run,
) -> int:
    """Checks a distillation; see the command's help.

    Raises:
        CommandError: a file cannot be read, or all that would go wrong in training.
    """
    train_config = _config(TrainingConfig, train)
    distill_config = _config(DistillationConfig, distill)
    timeline = _timeline(train_config, run)
    files = {"teacher": read_config(Path(teacher)), "student": read_config(Path(student))}
    if task is None:
        task = _task(files.values())
        say(f"--task was not given; checking for {task}")
    model_T, model_S = (
        _model(name, source, files[name], task, num_labels)
        for name, source in (("teacher", teacher), ("student", student))
    )
    adaptor = zoo.adaptor(None if task == "none" else task)
    # Caching changes when the teacher runs, not what is matched with what.
    distiller = GeneralDistiller(
        # On whatever device: nothing is put on one.
        dataclasses.replace(train_config, device="cpu"),
        dataclasses.replace(distill_config, is_caching_logits=False, cache_dir=None),
        model_T,
        model_S,
        adaptor,
        adaptor,
    )
    batch = own(_batch((model_T, model_S), task, batch_size, length))
    say(_report(distiller, batch))
    say(f"\ncheckpoints: {timeline}")
    if distill_config.is_caching_logits:
        say("is_caching_logits: the teacher's part of a step is paid once, before the first")
    return FINE


def _config(cls: Any, file: str) -> Any:
    values = read_json_object(Path(file))
    try:
        return cls.from_dict(values)
    except ConfigError as error:
        raise CommandError(f"{file}: {error}", BY_HAND) from error


def _timeline(config: TrainingConfig, run: Run) -> str:
    try:
        timeline = run.timeline(config)
    except ValueError as error:
        raise CommandError(str(error), BY_HAND) from error
    if timeline is None:
        return "give --batches and --epochs, or --num-steps, to see at which steps"
    return describe_timeline(timeline)


def _task(files: Any) -> str:
    """The task the config files speak of, the teacher's first.

    Masked words are what a model was pretrained on, and no task unless it is asked for.
    """
    for values in files:
        architectures = values.get("architectures")
        if isinstance(architectures, Sequence) and not isinstance(architectures, str):
            for name in architectures:
                task = task_of(str(name))
                if task not in (None, "masked-lm"):
                    return task
    return "sequence-classification"


def _model(
    name: str, source: str, values: Mapping[str, Any], task: str, num_labels: int | None
) -> Any:
    try:
        config = config_from(
            values, num_labels=num_labels, output_hidden_states=True, output_attentions=True
        )
        folder = Path(source)
        if any((folder / file).is_file() for file in (WEIGHTS, INDEX)):
            check_sizes(config, find_tensors(folder), folder)
        return by_shape(model_class(model_type_of(values), task), config)
    except ValueError as error:
        raise CommandError(f"--{name} {source}: {error}", BY_HAND) from error


def _batch(models: Sequence[Any], task: str, size: int, length: int) -> dict[str, np.ndarray]:
    """A batch of zeros that both models take."""
    labels = _LABELS[task]
    a_number = task == "sequence-classification" and models[1].config.num_labels == 1
    per_token = task in ("token-classification", "masked-lm")
    arrays = {
        "input_ids": np.zeros((size, length), np.int32),
        "attention_mask": np.ones((size, length), np.int32),
        "token_type_ids": np.zeros((size, length), np.int32),
        **{
            name: np.zeros(
                (size, length) if per_token else size, np.float32 if a_number else np.int32
            )
            for name in labels
        },
    }
    taken = [as_model(model).signature().parameters for model in models]
    return {k: v for k, v in arrays.items() if all(k in names for names in taken)}


def _report(distiller: GeneralDistiller, batch: Any) -> str:
    """The report of `distiller.check`, for models without weights."""
    optimizer = functools.partial(optax.adamw, learning_rate=1e-4)
    with warnings.catch_warnings(record=True) as caught, distiller:
        warnings.simplefilter("always", PreflightWarning)
        try:
            program = prepare(distiller.job(), {"": batch}, optimizer).programs[""]
        except PreflightError as error:
            raise CommandError(str(error), BY_HAND) from error
    for warning in caught:
        say(textwrap.fill(f"warning: {warning.message}", 100, subsequent_indent="  "))
    fields = {f.name: getattr(program, f.name) for f in dataclasses.fields(program)}
    report = describe(_Unpolished(**fields), batch, with_optimizer=True)
    return f"{report}\n  (the optimizer is AdamW)"


class _Unpolished(Program):
    """A program that is compiled for its cost alone: its machine code is never run."""

    @functools.cached_property
    def compiled(self) -> Any:
        """The step, jitted without LLVM's optimisations, which take most of the time on a CPU."""
        on_cpu = jax.default_backend() == "cpu"
        options = {"xla_backend_optimization_level": "0"} if on_cpu else None
        return jax.jit(self.step, donate_argnums=0, compiler_options=options)
