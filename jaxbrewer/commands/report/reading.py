"""What an ``output_dir`` and its ``log_dir`` say of a run, and what of it is missing."""

import datetime
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxbrewer.commands import CommandError
from jaxbrewer.commands.inspecting import parameters_of
from jaxbrewer.errors import CheckpointError, DamagedCheckpointError
from jaxbrewer.training.backend import shapes_of
from jaxbrewer.training.folders import FINISHED, is_finished, scores_in, step_folders
from jaxbrewer.training.position import read_position
from jaxbrewer.utils import LayerNode

MOST_POINTS = 500
"""A curve of more is drawn by the means of so many intervals."""

_RATES = 50  # intervals that the speed is told from


@dataclass(frozen=True)
class Curve:
    """The points of a tag, of intervals where there are many.

    Attributes:
        steps: ``[points]``, in order: the means of each interval's steps.
        values: ``[points]``, the means of each interval's finite values.
        each: how many points an interval has.
        left_out: points that are not finite.
    """

    steps: np.ndarray
    values: np.ndarray
    each: int = 1
    left_out: int = 0


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint; what cannot be told is None.

    Attributes:
        name: of its folder.
        position: its JSON part; empty where it cannot be read.
        megabytes: of all its files.
        score: what the callback gave it.
        written: when it was finished.
        problem: what is wrong with it; empty where nothing is.
    """

    name: str
    position: Mapping[str, Any] = field(default_factory=dict)
    megabytes: float | None = None
    score: float | None = None
    written: datetime.datetime | None = None
    problem: str = ""


@dataclass(frozen=True)
class Run:
    """A run.

    Attributes:
        name: its folder, as it was given.
        checkpoints: in order of their steps.
        position: the JSON part of the newest checkpoint whose one can be read; empty without one.
        parameters: the student's, where they can be told.
        curves: by tag.
        speed: micro-steps a second over the micro-steps; None where no points tell it.
        missing: what is not there, or not as it should be, a sentence each.
    """

    name: str
    checkpoints: tuple[Checkpoint, ...]
    position: Mapping[str, Any]
    parameters: LayerNode | None
    curves: Mapping[str, Curve]
    speed: Curve | None
    missing: tuple[str, ...]


def read_run(name: str) -> Run:
    """Reads a run.

    Raises:
        CommandError: the folder is not there, or holds no checkpoint.
    """
    folder = Path(name).absolute()
    if not folder.is_dir():
        there = "a file" if folder.exists() else "not there"
        raise CommandError(f"{name} is {there}, expected an output_dir")
    if is_finished(folder):
        raise CommandError(
            f"{name} is one checkpoint, expected the output_dir that it lies in: {folder.resolve().parent}"
        )
    found = step_folders(folder)
    if not found:
        raise CommandError(f"{name} holds no checkpoint gs{{step}}, expected an output_dir")
    missing: list[str] = []
    scores = _scores(folder, missing)
    checkpoints = tuple(_checkpoint(path, scores.get(step)) for step, path in found)
    missing += [f"{c.name} {c.problem}" for c in checkpoints if c.problem]
    newest = max((i for i, c in enumerate(checkpoints) if c.position), default=None)
    position = {} if newest is None else checkpoints[newest].position
    if newest is None:
        missing.append("no checkpoint can be read: there are no configs, matches and curves")
    parameters = None if newest is None else _parameters(found[newest][1], missing)
    curves, speed = _logged(_log_dir(folder, position, missing), missing)
    return Run(name, checkpoints, position, parameters, curves, speed, tuple(missing))


# ----------------------------------------------------------------------------------- checkpoints


def _scores(folder: Path, missing: list[str]) -> dict[int, float]:
    try:
        return scores_in(folder)
    except CheckpointError as error:
        missing.append(str(error))
        return {}


def _checkpoint(path: Path, score: float | None) -> Checkpoint:
    """A checkpoint, by its JSON part alone: its arrays are not read."""
    if not is_finished(path):
        return Checkpoint(path.name, problem="is unfinished: its writing was cut off")
    written = datetime.datetime.fromtimestamp((path / FINISHED).stat().st_mtime, tz=datetime.UTC)
    size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file()) / 1e6
    try:
        return Checkpoint(path.name, read_position(path), size, score, written)
    except DamagedCheckpointError as error:
        return Checkpoint(path.name, {}, size, score, written, error.problem)
    except CheckpointError as error:
        return Checkpoint(path.name, {}, size, score, written, f"cannot be read: {error}")


def _parameters(path: Path, missing: list[str]) -> LayerNode | None:
    try:
        return parameters_of(shapes_of(path)["student"]["params"])[1]
    except DamagedCheckpointError as error:
        missing.append(f"{path.name} {error.problem}")
    except KeyError:
        missing.append(f"{path.name} holds no student")
    return None


# ---------------------------------------------------------------------------------------- curves


def _log_dir(folder: Path, position: Mapping[str, Any], missing: list[str]) -> Path | None:
    """Where the run's tensorboard files are; a relative path is tried from here and from the run's."""
    if not position:
        return None
    config = position["train_config"]
    named = config.get("log_dir")
    if not isinstance(named, str):
        missing.append("the run had no log_dir: there are no curves")
        return None
    tried = [Path(named), _where_it_ran(folder, config.get("output_dir")) / named]
    for path in tried:
        if path.is_dir():
            return path
    missing.append(f"log_dir={named!r} is not there, seen from here: there are no curves")
    return None


def _where_it_ran(folder: Path, output_dir: Any) -> Path:
    """The folder that a relative ``output_dir`` was given in, where `folder` ends with it."""
    parts = Path(output_dir).parts if isinstance(output_dir, str) else ()
    there = folder.resolve()
    if parts and there.parts[-len(parts) :] == parts:
        return Path(*there.parts[: -len(parts)])
    return Path()


def _logged(log_dir: Path | None, missing: list[str]) -> tuple[dict[str, Curve], Curve | None]:
    """The curves of a ``log_dir`` by tag, and the speed."""
    if log_dir is None:
        return {}, None
    from jaxbrewer.training import event_files  # only who reads waits for its imports

    points: dict[str, dict[int, float]] = {}
    times: dict[int, float] = {}
    for _, event in event_files.standing(log_dir):
        for value in event.summary.value:
            points.setdefault(value.tag, {})[event.step] = value.simple_value
            if value.tag == "scalar/total_loss":
                times[event.step] = event.wall_time
    if not points:
        missing.append(f"{log_dir} holds no points: there are no curves")
    return {tag: thinned(points[tag]) for tag in points}, _speed(times)


def thinned(points: Mapping[int, float], most: int = MOST_POINTS) -> Curve:
    """A curve of step → value, with at most so many points."""
    steps = np.array(sorted(points), np.float64)
    values = np.array([points[step] for step in sorted(points)], np.float64)
    finite = np.isfinite(values)
    left_out = int((~finite).sum())
    steps, values = steps[finite], values[finite]
    each = max(1, math.ceil(len(steps) / most))
    starts = np.arange(0, len(steps), each)
    if each == 1 or not len(steps):
        return Curve(steps, values, each, left_out)
    counts = np.diff([*starts, len(steps)])
    steps, values = (np.add.reduceat(x, starts) / counts for x in (steps, values))
    return Curve(steps, values, each, left_out)


def _speed(times: Mapping[int, float]) -> Curve | None:
    """Micro-steps a second in each of some intervals; those in which the clock stood are left out."""
    steps = sorted(times)
    if not steps:
        return None
    ends = np.unique(np.linspace(0, len(steps) - 1, _RATES + 1).astype(int))
    pairs = [(steps[a], steps[b]) for a, b in itertools.pairwise(ends)]
    pairs = [(a, b) for a, b in pairs if times[b] > times[a]]
    if not pairs:
        return None
    rates = [(b - a) / (times[b] - times[a]) for a, b in pairs]
    return Curve(np.array([(a + b) / 2 for a, b in pairs]), np.array(rates))
