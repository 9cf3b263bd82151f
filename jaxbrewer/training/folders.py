"""The folders of an ``output_dir``: checkpoints ``gs{step}``, what is known of them, what is set aside."""

import logging
import os
import re
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, DamagedCheckpointError, told
from ..files import read_json_object, write_json

Folder = str | os.PathLike[str]

logger = logging.getLogger(__name__)

FINISHED = "_CHECKPOINT_METADATA"  # Orbax writes it last
SCORES = "scores.json"
EVALUATIONS = "evaluations.json"


def steps_in(folder: Folder) -> list[int]:
    """The steps of the finished checkpoints in a folder, in order."""
    return sorted(step for step, path in step_folders(folder) if is_finished(path))


def step_folders(folder: Folder) -> list[tuple[int, Path]]:
    """The folders ``gs{step}``, finished or not, with their steps."""
    named = [(step_of(path), path) for path in Path(folder).glob("gs*")]
    return sorted((step, path) for step, path in named if step is not None)


def step_of(path: Path) -> int | None:
    """The step in a name ``gs{step}``; None for other names."""
    match = re.fullmatch(r"gs(\d+)", path.name)
    return int(match[1]) if match else None


def is_finished(path: Path) -> bool:
    """Whether a folder is a checkpoint that was written to its end."""
    return (path / FINISHED).is_file()


def others_in(path: Path) -> str:
    """The finished checkpoints beside one, in words."""
    others = [f"gs{step}" for step in steps_in(path.parent) if f"gs{step}" != path.name]
    return ", ".join(others) or "there is none"


def make(folder: Folder) -> Path:
    """Makes an ``output_dir`` if it is not there.

    Raises:
        CheckpointError: it cannot be made.
    """
    path = Path(folder).absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"output_dir={str(folder)!r} cannot be made: {error}") from error
    return path


def scores_in(folder: Folder) -> dict[int, float]:
    """The scores noted in an ``output_dir``, by step.

    Raises:
        CheckpointError: their file is damaged.
    """
    path = Path(folder) / SCORES
    if not path.is_file():
        return {}
    try:
        return {int(step): float(score) for step, score in read_json_object(path).items()}
    except (TypeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}; delete it, and scores begin anew"
        ) from error


def evaluations_in(folder: Folder) -> dict[int, dict[str, float]]:
    """What was evaluated in the run of an ``output_dir``: step → name → number.

    Raises:
        CheckpointError: their file is damaged.
    """
    path = Path(folder) / EVALUATIONS
    if not path.is_file():
        return {}
    try:
        return {
            int(step): {str(name): float(value) for name, value in found.items()}
            for step, found in read_json_object(path).items()
        }
    except (TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(
            f"{path} is damaged: {error}; delete it, and evaluations begin anew"
        ) from error


def write_beside(folder: Folder, name: str, value: Any) -> None:
    """Writes what is known of the checkpoints of an ``output_dir``: `SCORES` or `EVALUATIONS`.

    Raises:
        CheckpointError: it cannot be written.
    """
    path = Path(folder) / name
    try:
        write_json(path, value)
    except OSError as error:
        raise CheckpointError(
            f"{path} could not be written ({told(error)}); {space_left(Path(folder))}"
        ) from error


def set_aside(folder: Path, paths: Collection[Path], why: str) -> None:
    """Moves folders to ``earlier-1`` (2, …) beside them, with a line that says why."""
    if not paths:
        return
    n = 1
    while (folder / f"earlier-{n}").exists():
        n += 1
    aside = folder / f"earlier-{n}"
    aside.mkdir()
    for path in paths:
        shutil.move(path, aside / path.name)
    logger.warning("%s: moved to %s", why, aside)


def remove_leftovers(folder: Path, name: str = "gs*") -> None:
    """Deletes what a save that was cut off has left; it is never read."""
    for path in folder.glob(f"{name}.orbax-checkpoint-tmp*"):
        logger.info("%s is left of a save that was cut off; deleted", path)
        shutil.rmtree(path, ignore_errors=True)


def try_to_make(path: Path, inside: Collection[str]) -> None:
    """Makes what a checkpoint's folder will hold under another name, and takes it away again.

    Raises:
        OSError: it cannot be made.
    """
    trial = path.with_name(f"{path.name}.orbax-checkpoint-tmp-trial")
    try:
        for name in inside:
            (trial / name).mkdir(parents=True)
    finally:
        shutil.rmtree(trial, ignore_errors=True)


def space_left(folder: Path) -> str:
    """The room on a folder's disk, in words."""
    try:
        return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB are free in {folder}"
    except OSError as error:
        return f"how much room there is in {folder} cannot be told ({error})"


def damaged(path: Path, problem: str) -> DamagedCheckpointError:
    """The error of a checkpoint that cannot be gone on from."""
    return DamagedCheckpointError(
        f"{path} {problem}. Others beside it: {others_in(path)}; resume=True takes the newest "
        "that is whole, and resume='gs…' or its path the one it names",
        problem,
    )
