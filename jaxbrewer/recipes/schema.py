"""What a recipe may say, checked whole before anything is read."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

import optax

from .. import schedulers
from ..configurations import checks
from ..configurations.configs import DistillationConfig, TrainingConfig
from ..configurations.schema import Config
from ..data.tables import FORMS
from ..errors import ConfigError, suggest
from ..zoo.students import STUDENTS
from .measures import GIVEN, PARAMETERS

TASKS = ("sequence-classification", "token-classification", "question-answering")
"""What a recipe can be of."""

COLUMNS: Mapping[str, tuple[tuple[str, ...] | None, str]] = {
    "sequence-classification": (None, "label"),
    "token-classification": (("tokens",), "tags"),
    "question-answering": (("question", "context"), "answers"),
}
"""Task → the columns of the text and of the labels, where the recipe names none."""

USUAL_METRICS: Mapping[str, str] = {
    "sequence-classification": "accuracy",
    "token-classification": "span_f1",
    "question-answering": "answers",
}
"""Task → what is measured where the recipe names nothing; of numbers it is ``pearson``."""

_REST = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def _texts(most: int | None = None, what: str = "names") -> checks.Check:
    """Accepts text, or a list of texts; keeps a tuple."""

    def check(value: Any) -> tuple[str, ...]:
        given = (value,) if isinstance(value, str) else value
        is_list = isinstance(given, list | tuple) and len(given) > 0
        if not is_list or not all(isinstance(item, str) and item for item in given):
            raise ValueError(f"expected text, or a list of {what}")
        if most is not None and len(given) > most:
            raise ValueError(f"expected at most {most}")
        return tuple(given)

    return check


def _unique_texts(value: Any) -> tuple[str, ...]:
    names = _texts()(value)
    if len(set(names)) < len(names):
        raise ValueError("expected each name once")
    return names


def _layers(value: Any) -> tuple[int, ...]:
    if not isinstance(value, list | tuple) or not value:
        raise ValueError("expected a list of the teacher's layers, counted from 0: [1, 3, 5]")
    return tuple(checks.integer(0)(layer) for layer in value)


def _options(value: Any) -> Any:
    if not isinstance(value, Mapping):
        raise ValueError("expected a table")
    return checks.frozen(value)


def _buckets(value: Any) -> int | tuple[int, ...]:
    if isinstance(value, list | tuple):
        return tuple(checks.integer(1)(length) for length in value)
    return checks.integer(1)(value)


@dataclass(frozen=True, kw_only=True)
class Student(Config):
    """Where the student comes from: one of `folder`, `layers` and `shape`.

    Args:
        folder: a folder in Hugging Face's format; a head that it lacks is begun anew.
        layers: the teacher's layers that it begins with, counted from 0, with its embeddings and head.
        shape: one of `zoo.STUDENTS`, such as ``T3``, with the teacher's vocabulary and random weights.
        config: fields of its config to set on top, such as ``{"hidden_dropout_prob": 0.0}``.
    """

    folder: str | None = None
    layers: Any = None
    shape: str | None = None
    config: Any = field(default_factory=checks.Options)

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        "folder": checks.optional(checks.folder),
        "layers": checks.optional(_layers),
        "shape": checks.optional(checks.one_of(STUDENTS)),
        "config": _options,
    }

    @classmethod
    def _check_together(cls, kept: Mapping[str, Any]) -> list[str]:
        given = [name for name in ("folder", "layers", "shape") if kept.get(name) is not None]
        if len(given) == 1 or not {"folder", "layers", "shape"} <= kept.keys():
            return []
        return [f"expected one of folder, layers and shape, not {', '.join(given) or 'none'}"]


@dataclass(frozen=True, kw_only=True)
class Data(Config):
    """What is trained and evaluated on.

    Args:
        train: a file, or several: csv, tsv, jsonl, json, CoNLL, SQuAD's JSON, lines of text, parquet;
            see `data.tables.read_rows`.
        eval: likewise, to evaluate on; without it nothing is evaluated.
        form: how they are read; by their suffix if left out.
        text: the column of the text, or two for pairs.
        label: the column of the label. Rows of `train` need none where nothing is learnt from it.
        labels: the names of the classes in order; those of the teacher, or of the data, if left out.
        max_length: tokens of an example; longer ones are cut, answers' contexts in several windows.
        stride: tokens that two windows of a context share.
        batch_size: examples of a batch; of each process, where several train together.
        buckets: lengths of batches, or how many to choose; see `data.bucket_by_length`.
        tokenizer: a folder with the tokenizer of the models whose folders have none.
    """

    train: Any
    eval: Any = None
    form: str | None = None
    text: Any = None
    label: str | None = None
    labels: Any = None
    max_length: int = 128
    stride: int = 64
    batch_size: int = 32
    buckets: Any = 8
    tokenizer: str | None = None

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        "train": _texts(what="files"),
        "eval": checks.optional(_texts(what="files")),
        "form": checks.optional(checks.one_of(FORMS)),
        "text": checks.optional(_texts(2, "two columns")),
        "label": checks.optional(checks.text),
        "labels": checks.optional(_unique_texts),
        "max_length": checks.integer(4),
        "stride": checks.integer(0),
        "batch_size": checks.integer(1),
        "buckets": _buckets,
        "tokenizer": checks.optional(checks.folder),
    }


@dataclass(frozen=True)
class Named:
    """A function by its name, with arguments."""

    name: str
    options: Mapping[str, Any] = field(default_factory=checks.Options)

    def to_dict(self) -> dict[str, Any]:
        """The table that says it."""
        return {"name": self.name, **self.options}


def _named(what: str, choices: Mapping[str, Callable | Sequence[str]], given: Sequence[str]) -> Any:
    """Accepts a name, or a table with ``name`` and the arguments of its function.

    Args:
        what: in words.
        choices: name → its function, or the names of its arguments.
        given: the arguments that are there without being said.
    """

    def check(value: Any) -> Named:
        if isinstance(value, Named):
            return value
        table = {"name": value} if isinstance(value, str) else value
        if not isinstance(table, Mapping) or not isinstance(table.get("name"), str):
            raise ValueError(f"expected the name of {what}, or a table with name and its arguments")
        name, options = table["name"], {k: v for k, v in table.items() if k != "name"}
        if name not in choices:
            raise ValueError(f"there is no {what} {name!r}: {suggest(name, choices)}")
        _check_arguments(name, choices[name], [*options, *given])
        return Named(name, checks.frozen(options))

    return check


def _check_arguments(name: str, taken: Callable | Sequence[str], given: Sequence[str]) -> None:
    """Raises ValueError for arguments that a function does not take, or needs and is not given."""
    if not callable(taken):
        names, needed = list(taken), []
    else:
        parameters = inspect.signature(taken).parameters
        plain = [p for p in parameters.values() if p.kind not in _REST]
        names = [p.name for p in plain]
        needed = [p.name for p in plain if p.default is p.empty]
    unknown = [argument for argument in given if argument not in names]
    if unknown:
        is_rate = unknown[0] == "lr" and "learning_rate" in names
        hint = "did you mean 'learning_rate'?" if is_rate else _place_of(unknown[0])
        hint = hint or suggest(unknown[0], names)
        raise ValueError(f"{name} takes no {unknown[0]!r}: {hint}")
    if missing := [argument for argument in needed if argument not in given]:
        raise ValueError(f"{name} needs {', '.join(missing)}")


def optimizers() -> dict[str, Callable]:
    """Optax's optimizers by name: the functions that take a ``learning_rate``."""
    return {
        name: value
        for name, value in vars(optax).items()
        if inspect.isfunction(value) and "learning_rate" in inspect.signature(value).parameters
    }


def scheduler_factories() -> dict[str, Callable]:
    """The schedules of learning rates by name."""
    return {name: value for name, value in vars(schedulers).items() if name.startswith("get_")}


def _optimizer(value: Any) -> Named:
    named = _named("optimizer of optax", optimizers(), ())(value)
    rate = named.options.get("learning_rate")
    try:
        checks.positive(rate)
    except ValueError:
        raise ValueError(
            f"learning_rate is {checks.short(rate)}: expected a number above 0"
        ) from None
    mask = named.options.get("mask")
    if mask not in (None, "decay_mask"):
        raise ValueError(
            f"mask is {checks.short(mask)}: expected 'decay_mask', which leaves biases and norms "
            "undecayed"
        )
    return named


def _scheduler(value: Any) -> Named:
    factories = scheduler_factories()
    table = {"name": value} if isinstance(value, str) else value
    name = table.get("name") if isinstance(table, Mapping) else None
    takes = inspect.signature(factories[name]).parameters if name in factories else {}
    told = [p for p in ("num_training_steps",) if p in takes and p not in table]
    named = _named("schedule", factories, told)(value)
    warmup = named.options.get("num_warmup_steps", 0)
    try:
        checks.not_negative(warmup)
    except ValueError:
        raise ValueError(
            f"num_warmup_steps is {checks.short(warmup)}: expected steps, or a part of all below 1"
        ) from None
    return named


def _metrics(value: Any) -> tuple[Named, ...]:
    given = value if isinstance(value, list | tuple) else [value]
    return tuple(_named("metric", PARAMETERS, ())(item) for item in given)


def _section(cls: type[Config], of_text: str | None = None) -> checks.Check:
    """Accepts a table of a config's fields; or text, where that means one of them."""

    def check(value: Any) -> Any:
        if isinstance(value, cls):
            return value
        if of_text is not None and isinstance(value, str):
            value = {of_text: value}
        return from_table(cls, value)

    return check


def from_table(cls: type[Config], value: Any) -> Any:
    """A config of a table; of a field that has its place elsewhere in a recipe, that is told.

    Raises:
        ConfigError: all that is wrong.
    """
    if not isinstance(value, Mapping):
        raise ConfigError("", [f"expected a table, got {checks.short(value)}"])
    mine = {f.name for f in fields(cls)}  # type: ignore[arg-type]
    elsewhere = {k: place for k in value if k not in mine and (place := _place_of(k))}
    problems = [f"unknown key {key!r}: {place}" for key, place in elsewhere.items()]
    try:
        found = cls.from_dict({k: v for k, v in value.items() if k not in elsewhere})
    except ConfigError as error:
        raise ConfigError("", [*error.problems, *problems]) from None
    if problems:
        raise ConfigError("", problems)
    return found


def _place_of(key: Any) -> str | None:
    """Where a field belongs in a recipe, in words; None where it is none of them."""
    if key in ("learning_rate", "lr", "weight_decay"):
        return f"{'learning_rate' if key == 'lr' else key} belongs in the table optimizer"
    if key in {f.name for f in fields(Recipe)}:
        return "it stands beside the tables: in TOML above the first [table]"
    sections: dict[str, type] = {
        "data": Data,
        "distillation": DistillationConfig,
        "student": Student,
        "training": TrainingConfig,
    }
    for name, cls in sections.items():
        if key in {f.name for f in fields(cls)}:
            return f"it belongs in the table {name}"
    return None


def within(name: str, check: checks.Check) -> checks.Check:
    """A check whose problems are told with the section they are in."""

    def found(value: Any) -> Any:
        try:
            return check(value)
        except ConfigError as error:
            raise ConfigError("", [f"{name}: {problem}" for problem in error.problems]) from None

    return found


@dataclass(frozen=True, kw_only=True)
class Recipe(Config):
    """A training or a distillation, whole.

    Args:
        task: one of `TASKS`.
        student: a `Student`, a table of its fields, or the folder.
        data: a `Data`, or a table of its fields.
        optimizer: optax's name and arguments, ``learning_rate`` among them; ``mask = "decay_mask"``
            leaves biases and norms undecayed.
        training: a `TrainingConfig`, or a table of its fields.
        teacher: a folder in Hugging Face's format, with the head of the task; several are averaged.
            Without it the student learns from labels alone.
        teacher_weights: how much each of several teachers counts in that mean; all alike if left out.
        distillation: a `DistillationConfig`, or a table of its fields.
        scheduler: the name and arguments of a factor in `jaxbrewer.schedulers`. ``num_training_steps``
            is the run's; ``num_warmup_steps`` below 1 is a part of it.
        num_epochs: passes over the data;
        num_steps: or optimizer steps.
        max_grad_norm: clips the norm of the gradient; −1: does not.
        metrics: names, or tables with name and arguments; by the task if left out.
        best_metric: the metric by which the best checkpoint becomes the student, the highest, or of
            ``-kl`` the lowest; the last one if left out.
        eval_steps: optimizer steps between evaluations, beside those at checkpoints.

    Raises:
        ConfigError: a ValueError that lists everything wrong.
    """

    task: str
    student: Any
    data: Any
    optimizer: Any
    training: Any = field(default_factory=TrainingConfig)
    teacher: Any = None
    distillation: Any = None
    scheduler: Any = None
    num_epochs: int | None = None
    num_steps: int | None = None
    max_grad_norm: float = -1.0
    metrics: Any = None
    best_metric: str | None = None
    eval_steps: int | None = None
    teacher_weights: Any = None

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        "task": checks.one_of(TASKS),
        "student": within("student", _section(Student, "folder")),
        "data": within("data", _section(Data)),
        "optimizer": _optimizer,
        "training": within("training", _section(TrainingConfig)),
        "teacher": checks.optional(_texts(what="folders")),
        "distillation": checks.optional(within("distillation", _section(DistillationConfig))),
        "scheduler": checks.optional(_scheduler),
        "num_epochs": checks.optional(checks.integer(1)),
        "num_steps": checks.optional(checks.integer(1)),
        "max_grad_norm": checks.number,
        "metrics": checks.optional(_metrics),
        "best_metric": checks.optional(checks.text),
        "eval_steps": checks.optional(checks.integer(1)),
        "teacher_weights": checks.optional(checks.proportions),
    }

    @classmethod
    def _check_together(cls, kept: Mapping[str, Any]) -> list[str]:
        return [
            *_length_problems(kept),
            *_side_problems(kept),
            *_column_problems(kept),
            *_evaluation_problems(kept),
        ]


def _length_problems(kept: Mapping[str, Any]) -> list[str]:
    given = [name for name in ("num_epochs", "num_steps") if kept.get(name) is not None]
    if len(given) == 1 or not {"num_epochs", "num_steps"} <= kept.keys():
        return []
    return [f"say how long to train: expected one of num_epochs and num_steps, not {_or(given)}"]


def _or(given: Sequence[str]) -> str:
    return "both" if len(given) > 1 else "none"


def _side_problems(kept: Mapping[str, Any]) -> list[str]:
    teacher, student, how = (kept.get(name) for name in ("teacher", "student", "distillation"))
    problems = []
    if "teacher" in kept and teacher is None:
        if how is not None:
            problems.append("distillation is there, but no teacher: name its folder")
        for name in ("layers", "shape"):
            if student is not None and getattr(student, name) is not None:
                problems.append(f"student.{name} is for a student of a teacher, and there is none")
    if teacher is not None and len(teacher) > 1 and how is not None and how.intermediate_matches:
        problems.append("several teachers are averaged, which no intermediate_matches go with")
    weights, teachers = kept.get("teacher_weights"), len(teacher or ())
    if weights is not None and "teacher" in kept and (teachers < 2 or len(weights) != teachers):
        problems.append(f"teacher_weights has {len(weights)} numbers for {teachers} teachers")
    return problems


def _column_problems(kept: Mapping[str, Any]) -> list[str]:
    task, data = kept.get("task"), kept.get("data")
    if task is None or data is None:
        return []
    if task == "question-answering":
        named = [n for n in ("text", "label", "labels") if getattr(data, n) is not None]
        return [
            f"data.{n}: questions have the columns question, context and answers" for n in named
        ]
    if task == "token-classification" and data.text is not None and len(data.text) > 1:
        return ["data.text: expected one column, of lists of words"]
    if task == "sequence-classification" and data.text is None:
        return ["data: missing key 'text', the column of the text, or two for pairs"]
    return []


def _evaluation_problems(kept: Mapping[str, Any]) -> list[str]:
    data, metrics, best = (kept.get(name) for name in ("data", "metrics", "best_metric"))
    problems = []
    if data is not None and data.eval is None:
        problems += [
            f"{name} is there, but no data.eval to evaluate on"
            for name in ("metrics", "best_metric", "eval_steps")
            if kept.get(name) is not None
        ]
    if kept.get("teacher", ()) is None and metrics is not None:
        problems += [
            f"metrics: {metric.name} compares with a teacher, and there is none"
            for metric in metrics
            if metric.name in ("agreement", "kl")
        ]
    if best is not None and "metrics" in kept and "task" in kept:
        names = [metric.name for metric in metrics or (Named(USUAL_METRICS[kept["task"]]),)]
        known = [given for name in names for given in GIVEN[name]]
        if metrics is None and kept["task"] == "sequence-classification":
            known.append("pearson")  # where labels are numbers
        if best.removeprefix("-") not in known:
            problems.append(f"best_metric is {best!r}: {suggest(best, known)}")
    return problems
