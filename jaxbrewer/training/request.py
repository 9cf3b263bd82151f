"""The arguments of ``train``: checked before anything else happens."""

import inspect
import zlib
from collections.abc import Callable, Iterable, Mapping, Sized
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np

from .. import schedulers
from ..configurations.configs import TrainingConfig
from ..data.buckets import BucketedLoader
from ..errors import PreflightWarning, suggest, warn
from ..machine.processes import Processes
from ..objective.tables import looks_absolute
from ..step.optimizer import Optimizer
from .timeline import Timeline
from .writers import Given


@dataclass(frozen=True)
class Feed:
    """Where a task's batches come from.

    Attributes:
        loader: an iterable of batches.
        postprocess: applied to each batch, or None.
        length: batches in a pass, or None if the loader does not say.
    """

    loader: Iterable
    postprocess: Callable[[Any], Any] | None
    length: int | None

    @classmethod
    def of(cls, loader: Any, postprocess: Any) -> Self:
        """The feed of a loader."""
        try:
            length = len(loader) if isinstance(loader, Sized) else None
        except TypeError:  # torch's DataLoader over a dataset without a length
            length = None
        return cls(loader, postprocess, length)

    @property
    def may_draw(self) -> bool:
        """Whether taking a batch may draw on the host's random generators: a plain list does not."""
        return type(self.loader) not in (list, tuple) or self.postprocess is not None


@dataclass(frozen=True)
class Evaluation:
    """What a run evaluates while it trains, as the arguments of ``train`` say it.

    Attributes:
        loader: ``eval_loader``; with several tasks a dict by task.
        metrics: ``metrics``.
        best_metric: the name of a number that is the checkpoints' score; with ``-``, lower is better.
        steps: ``eval_steps``, optimizer steps between evaluations; None: at checkpoints only.
        compute: computes all numbers of the student as it is, by name.
        rehearse: what `compute` would give, by the first batch's shapes; None where that cannot be told.
    """

    loader: Any
    metrics: Any
    best_metric: Any
    steps: Any
    compute: Callable[[], dict[str, float]]
    rehearse: Callable[[], dict[str, float] | None]

    @property
    def loaders(self) -> tuple[Any, ...]:
        """The loaders of all tasks."""
        return tuple(self.loader.values()) if isinstance(self.loader, Mapping) else (self.loader,)

    def check(self, feeds: Mapping[str, Feed]) -> None:
        """Refuses arguments that do not go together, and loaders that would not last.

        Raises:
            TypeError, ValueError: what was given, and what was expected.
        """
        given = [
            f"{name}={value!r}"
            for name, value in (("eval_steps", self.steps), ("best_metric", self.best_metric))
            if value is not None
        ]
        if self.loader is None:
            given = given if self.metrics is None else [*given, "metrics"]
            raise ValueError(
                f"{' and '.join(given)} without eval_loader: say on what to evaluate, "
                "train(…, eval_loader=dev, metrics=[Accuracy()])"
            )
        if self.metrics is None:
            raise ValueError(
                "eval_loader without metrics: say what to compute, metrics=[Accuracy()]; see "
                "jaxbrewer.evaluation"
            )
        if self.steps is not None and not _is_count(self.steps):
            raise ValueError(f"eval_steps={self.steps!r}: expected a whole number of at least 1")
        if self.best_metric is not None and not isinstance(self.best_metric, str):
            raise TypeError(
                f"best_metric={self.best_metric!r}: expected the name of a number that the metrics "
                "give, 'accuracy', or '-kl' where lower is better"
            )
        for name, loader in self._named(feeds).items():
            _check_loader(name, loader)
            _check_lasting(name, loader, feeds)

    def _named(self, feeds: Mapping[str, Feed]) -> dict[str, Any]:
        """The loaders, by how messages call them."""
        if list(feeds) == [""]:
            return {"eval_loader": self.loader}
        if not isinstance(self.loader, Mapping) or not self.loader.keys() <= feeds.keys():
            kind = type(self.loader).__name__
            given = list(self.loader) if isinstance(self.loader, Mapping) else f"a {kind}"
            raise ValueError(
                f"eval_loader must be a dict of loaders by task, of the tasks {', '.join(feeds)}; it "
                f"is {given}"
            )
        if not self.loader:
            raise ValueError("eval_loader is an empty dict; leave it out, or give a task's loader")
        return {f"eval_loader[{task!r}]": loader for task, loader in self.loader.items()}

    def check_names(self, names: Iterable[str]) -> None:
        """Refuses a `best_metric` that is none of the names.

        Raises:
            ValueError: with the names that there are.
        """
        best = self.best_metric
        if best is not None and best.removeprefix("-") not in set(names):
            raise ValueError(
                f"best_metric={best!r} is none of what the metrics give: "
                f"{suggest(best.removeprefix('-'), names)}"
            )

    def score(self, found: Mapping[str, float]) -> float | None:
        """The score of a checkpoint, higher is better; None without a `best_metric`."""
        if self.best_metric is None:
            return None
        value = found[self.best_metric.removeprefix("-")]
        return -value if self.best_metric.startswith("-") else value


@dataclass(frozen=True)
class Request:
    """The arguments of one call of ``train``.

    Attributes:
        feeds: task → where its batches come from; a run of one task has one, named ''.
        tau: with several tasks, see `streams.task_order`.
        evaluation: what is evaluated meanwhile, or None.
        writers: the user's own, which are given the numbers.
    """

    optimizer: Optimizer
    feeds: Mapping[str, Feed]
    num_epochs: int | None
    num_steps: int | None
    scheduler_class: Callable[..., Any] | None
    scheduler_args: Mapping[str, Any] | None
    scheduler: None
    max_grad_norm: float
    callback: Callable[..., Any] | None
    tau: float = 1.0
    evaluation: Evaluation | None = None
    writers: tuple[Given, ...] = ()

    @property
    def loaders(self) -> list[Any]:
        """All loaders, those of the evaluation too."""
        evaluated = self.evaluation.loaders if self.evaluation is not None else ()
        return [*(feed.loader for feed in self.feeds.values()), *evaluated]

    def of_all(self, processes: Processes) -> Self:
        """With the loaders' lengths that all processes agree on: the longest of each.

        Raises:
            ValueError: processes evaluate at other steps, or by another number.
        """
        asked = self.evaluation
        said = -1 if asked is None else zlib.crc32(f"{asked.best_metric} {asked.steps}".encode())
        if len(set(processes.numbers(said)[:, 0])) > 1:
            raise ValueError(
                "eval_loader, best_metric and eval_steps must be given alike in all processes"
            )
        feeds = {}
        for task, feed in self.feeds.items():
            lengths = processes.numbers(-1 if feed.length is None else feed.length)
            feeds[task] = replace(feed, length=int(lengths.max()) if lengths.min() >= 0 else None)
        return replace(self, feeds=feeds)


def make_timeline(config: TrainingConfig, request: Request) -> Timeline:
    """Lays out a run; refuses lengths and loaders that cannot be meant."""
    epochs, steps = request.num_epochs, request.num_steps
    if epochs is None and steps is None:
        raise ValueError("say how long to train: train(…, num_epochs=…) or train(…, num_steps=…)")
    for name, value in (("num_epochs", epochs), ("num_steps", steps)):
        if value is not None and not _is_count(value):
            raise ValueError(f"{name}={value!r}: expected a whole number of at least 1")
    _check_callback(request.callback)
    if request.evaluation is not None:
        request.evaluation.check(request.feeds)
    for task, feed in request.feeds.items():
        name = f"dataloaders[{task!r}]" if task else "dataloader"
        _check_loader(name, feed.loader)
        if feed.postprocess is not None and not callable(feed.postprocess):
            kind = type(feed.postprocess).__name__
            raise TypeError(f"the batch_postprocessor of {name} is a {kind}, not a function")
        if feed.length == 0:
            raise ValueError(f"{name} is empty: its length is 0")
    if epochs is not None and steps is not None:
        warn(
            f"num_epochs={epochs} counts for nothing beside num_steps={steps}, which says how long to "
            "train: leave one of them out",
            PreflightWarning,
        )
    if steps is not None:
        return Timeline.by_steps(config, int(steps))
    (feed,) = request.feeds.values()
    length = feed.length
    if length is None:
        raise ValueError(
            "num_epochs needs a loader with a length, from which schedules and checkpoints are laid "
            "out; this one has none. Pass num_steps instead"
        )
    if length < config.gradient_accumulation_steps:
        raise ValueError(
            f"an epoch of {length} batches is shorter than one accumulation window of "
            f"{config.gradient_accumulation_steps}, so nothing would be trained. Lower "
            "gradient_accumulation_steps, or train by num_steps, where windows run across epochs"
        )
    return Timeline.by_epochs(config, int(epochs), length)  # type: ignore[arg-type]


def _check_loader(name: str, loader: Any) -> None:
    """Refuses what is no iterable of batches."""
    if isinstance(loader, Mapping):
        raise TypeError(
            f"{name} is one batch, a {type(loader).__name__} with the keys "
            f"{', '.join(map(str, loader))}; give an iterable of batches, for this one [batch]"
        )
    if not hasattr(loader, "__iter__"):
        raise TypeError(
            f"{name} is a {type(loader).__name__}, which cannot be iterated; give a list "
            "of batches, a DataLoader, or any iterable of batches"
        )


def _check_lasting(name: str, loader: Any, feeds: Mapping[str, Feed]) -> None:
    """Refuses a loader that one evaluation would use up, or that the training reads from itself."""
    if hasattr(loader, "__next__"):
        raise TypeError(
            f"{name} is a {type(loader).__name__}, which the first evaluation would exhaust; give "
            "list(loader), or anything that can be iterated again"
        )
    is_shared = any(feed.loader is loader for feed in feeds.values())
    if is_shared and type(loader) not in (list, tuple, BucketedLoader):
        raise ValueError(
            f"{name} is the loader that is trained on: a pass over it would move the training's own "
            "on. Give another loader of the same data"
        )


def _check_callback(callback: Any) -> None:
    """Refuses what could not be called at the first checkpoint."""
    if callback is None:
        return
    if not callable(callback):
        raise TypeError(
            f"callback is a {type(callback).__name__}; it must be a function, called as "
            "callback(model=student, step=step)"
        )
    try:
        signature = inspect.signature(callback)
    except ValueError:  # of a function written in C, which does not tell
        return
    try:
        signature.bind(model=None, step=0)
    except TypeError as error:
        raise TypeError(
            f"callback{signature} cannot be called as callback(model=student, step=step): {error}. "
            "Name its parameters model and step; bind others with functools.partial"
        ) from error


def _is_count(value: Any) -> bool:
    is_number = isinstance(value, int | float | np.number) and not isinstance(value, bool)
    return bool(is_number and np.isfinite(value) and int(value) == value and value >= 1)


def make_factor(request: Request, total_steps: int) -> Callable | None:
    """Builds the learning-rate factor as a function of the step, or None for a constant 1."""
    if request.scheduler is not None:
        raise TypeError(
            "scheduler= takes a scheduler that was built for a torch optimizer, and there is none "
            "here. Pass scheduler_class and scheduler_args, such as scheduler_class="
            "jaxbrewer.schedulers.get_linear_schedule_with_warmup"
        )
    make = request.scheduler_class
    if make is None:
        if request.scheduler_args:
            raise TypeError("scheduler_args without a scheduler_class: pass the class too")
        return None
    name = getattr(make, "__name__", type(make).__name__)
    if not callable(make):
        raise TypeError(
            f"scheduler_class is a {type(make).__name__}; pass the class or function itself"
        )
    if "optimizer" in inspect.signature(make).parameters:
        raise TypeError(f"scheduler_class {name} wants a torch optimizer. {_instead_of(name)}")
    try:
        schedule = make(**(request.scheduler_args or {}))
    except TypeError as error:
        raise TypeError(
            f"scheduler_class {name} cannot be called with {dict(request.scheduler_args or {})}: "
            f"{error}. It is called with scheduler_args and returns a function of the step (is it "
            "a schedule already? then pass scheduler_class=lambda: schedule)"
        ) from error
    if not callable(schedule):
        raise TypeError(f"scheduler_class {name} returned {schedule!r}, not a function of the step")
    if looks_absolute(schedule, total_steps):
        raise ValueError(
            f"the schedule of {name} stays at or below 0.1, which looks like a learning rate. Here "
            "it is a factor by which the optimizer's own rate is multiplied, 1 at its peak. Build "
            "rates into the optimizer instead: optax.adamw(learning_rate=schedule)"
        )
    return schedule


def _instead_of(name: str) -> str:
    """What there is for a schedule of torch's or transformers'."""
    ours = [each for each in vars(schedulers) if each.startswith("get_")]
    if name in ours:
        return f"Use jaxbrewer.schedulers.{name}, without the optimizer among scheduler_args"
    if name == "ReduceLROnPlateau":
        return (
            "Rates that depend on scores have no counterpart: a schedule is a function of the step, "
            "such as those of jaxbrewer.schedulers"
        )
    return (
        f"jaxbrewer.schedulers has {', '.join(ours)}. Others are a function that returns step -> "
        "factor, for StepLR scheduler_class=lambda step_size, gamma=0.1: (lambda step: gamma ** "
        "(step // step_size)); the step counts optimizer steps, not epochs"
    )
