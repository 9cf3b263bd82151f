"""Checkpoints through Orbax: folders ``gs{step}`` under ``output_dir``, written in the background.

A checkpoint holds, as separate items, so that each can be read without the others:

=========== ====================================================================
student     ``{'params': …, 'state': …}``
projections likewise, by projection
training    optimizer state (with an open accumulation window), random key, counters, loss scale;
            by name, where there are any: the guard's counters, the objective's own state
position    JSON: step, epoch, batch, the same with its random and loaders' states for each process,
            the configs, the record of the job (`comparison.record`), the format's version, the
            digest of every array, and one of all this
=========== ====================================================================

Format 2 has the digests, by which whatever is read is verified; format 1 has none.
"""

import contextlib
import logging
import shutil
import time
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..errors import CheckpointError, afterwards, told
from ..machine.barrier import Barrier
from ..step import guard
from ..step.program import TrainState
from . import folders
from .backend import POSITION, Writer, read_items, shapes_of
from .digests import digests
from .folders import FINISHED, Folder, is_finished, scores_in, step_folders, steps_in
from .position import FORMAT, read_position, sealed
from .stored import check_digests, check_fits, on_host

logger = logging.getLogger(__name__)

_BEGIN_MS = (
    300_000  # for which several processes wait for the first to try whether a save can begin
)


@dataclass(frozen=True)
class _Saving:
    """A save under way: its folder, when it began, and the size of its arrays."""

    path: Path
    began: float
    megabytes: float


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they go; made if it is not there.
        resume: whether to go on from what is there. If not, checkpoints of an earlier run are
            moved to a folder ``earlier-1`` (2, …) beside the new ones.
        start: the step it goes on from. What is newer is moved likewise, and so are folders that
            are no finished checkpoints: they would be in the way.
        max_to_keep: how many to keep: the newest, and of the others those with the best scores
            (see `score`) and then the newest. None keeps all. The others go only when the newest
            is finished on disk, so while it is written the disk holds one more.
        is_chief: of several processes, all of which write arrays, one does the rest.
        barrier: where several processes wait for each other while a save is written.
    """

    def __init__(
        self,
        folder: Folder,
        *,
        resume: bool,
        max_to_keep: int | None,
        start: int | None = None,
        is_chief: bool = True,
        barrier: Barrier | None = None,
    ):
        self.folder = folders.make(folder)
        self.max_to_keep = max_to_keep
        self._is_chief = is_chief
        self._barrier = barrier
        self._saving: _Saving | None = None
        self._failed: Exception | None = None
        if is_chief:
            self._clear_the_way(resume, start)
        self._writer = Writer(barrier)

    def _clear_the_way(self, resume: bool, start: int | None) -> None:
        folders.remove_leftovers(self.folder)
        there = step_folders(self.folder)
        if not resume:
            beside = [self.folder / name for name in (folders.SCORES, folders.EVALUATIONS)]
            why = (
                f"{self.folder} held checkpoints of an earlier run (resume=True would have gone on "
                "from them)"
            )
            old = [path for _, path in there]
            known = [path for path in beside if old and path.exists()]
            folders.set_aside(self.folder, [*old, *known], why)
            return
        newer = [(step, path) for step, path in there if start is not None and step > start]
        self._set_aside(
            [(step, path) for step, path in newer if is_finished(path)],
            f"newer than gs{start}, from which this run goes on",
        )
        self._prune()
        self._set_aside(
            [(step, path) for step, path in step_folders(self.folder) if not is_finished(path)],
            f"unfinished: without {FINISHED}, which is written last",
        )

    def _set_aside(self, there: list[tuple[int, Path]], why: str) -> None:
        names = ", ".join(path.name for _, path in there)
        folders.set_aside(self.folder, [path for _, path in there], f"{names} {_is(there)} {why}")
        scores, moved = self.scores(), {step for step, _ in there}
        if moved & scores.keys():
            kept = {step: score for step, score in scores.items() if step not in moved}
            folders.write_beside(self.folder, folders.SCORES, kept)

    def save(self, step: int, state: TrainState, position: Mapping[str, Any]) -> None:
        """Saves a state as ``gs{step}``; returns once the arrays are copied, before they are written.

        Waits for the checkpoint before it, and then deletes those that need not be kept.

        Raises:
            CheckpointError: it, or the one before it, cannot be written.
        """
        self.wait()
        items = _items(state)
        position = sealed({"format": FORMAT, **position, "digests": digests(items)})
        path = self.folder / f"gs{step}"
        self._saving = _Saving(path, time.time(), _megabytes(items))
        with self._saves():
            self._try_to_begin(path, [*items, POSITION])
            self._writer.write(path, items, position)

    def _try_to_begin(self, path: Path, parts: list[str]) -> None:
        """Sees whether the first of several processes can make a checkpoint's folders.

        If not, all fail here; in Orbax the others would wait for the folders for twenty minutes.
        """
        if self._barrier is None:
            return
        if self._is_chief:
            folders.try_to_make(path, parts)
        self._barrier(key="begin", timeout_ms=_BEGIN_MS)

    def check(self) -> None:
        """Looks, without waiting, at the save under way.

        Raises:
            CheckpointError: it has failed.
        """
        if self._saving is not None or self._failed is not None:
            with self._saves():
                self._writer.check()
            self._tell()

    @contextlib.contextmanager
    def _saves(self) -> Iterator[None]:
        """Whatever goes wrong with a save, in it or behind it, is one kind of error.

        It is raised every time from then on. Orbax raises it once; a process that went on would
        wait in its next save for others, which have left.
        """
        if self._failed is not None:
            raise self._failed
        try:
            yield
        except Exception as error:
            if self._barrier is not None:
                self._barrier.fail()
            saving, self._saving = self._saving, None
            self._failed = error
            if saving is None:
                raise
            self._failed = self._not_written(saving, error)
            if self._is_chief:  # room for what comes next
                folders.remove_leftovers(self.folder, saving.path.name)
            raise self._failed from error

    def _not_written(self, saving: _Saving, error: Exception) -> CheckpointError:
        newest = self.latest()
        from_there = "there is none yet" if newest is None else f"the newest is gs{newest}"
        return CheckpointError(
            f"{saving.path} could not be written ({told(error)}). It has "
            f"{saving.megabytes:,.1f} MB of arrays; {folders.space_left(self.folder)}. The "
            f"checkpoints before it are as they were ({from_there}): make room, and go on with "
            "resume=True"
        )

    def _tell(self) -> None:
        """Says once that a save has ended."""
        saving = self._saving
        if saving is None or not is_finished(saving.path):
            return
        self._saving = None
        if self._is_chief:
            seconds = max((saving.path / FINISHED).stat().st_mtime - saving.began, 0.0)
            logger.info("%s saved: %.1f MB in %.2f s", saving.path.name, saving.megabytes, seconds)

    def score(self, step: int, score: float) -> None:
        """Notes how good a checkpoint is (higher is better).

        Raises:
            CheckpointError: it cannot be written.
        """
        if self._is_chief:
            scores = self.scores() | {step: float(score)}
            folders.write_beside(self.folder, folders.SCORES, scores)

    def scores(self) -> dict[int, float]:
        """The scores noted so far, by step."""
        return scores_in(self.folder)

    def best(self) -> Path | None:
        """The checkpoint with the best score of those that are kept, the newest among equals."""
        scores = self.scores()
        there = [(scores[step], step) for step in self._kept() if step in scores]
        return self.folder / f"gs{max(there)[1]}" if there else None

    def _kept(self) -> list[int]:
        """The steps of the finished checkpoints that `max_to_keep` lets stay."""
        steps = steps_in(self.folder)
        if self.max_to_keep is None or not steps:
            return steps
        scores = self.scores()
        *others, newest = steps
        others.sort(key=lambda step: (scores.get(step, -np.inf), step), reverse=True)
        return [newest, *others[: self.max_to_keep - 1]]

    def _prune(self) -> None:
        """Deletes what need not be kept, leftovers of a deletion that was killed too."""
        kept = self._kept()
        if self.max_to_keep is None or not self._is_chief or not kept:
            return
        for step, path in step_folders(self.folder):
            if step < kept[0] and step not in kept:
                (path / FINISHED).unlink(missing_ok=True)  # killed after this, it is no checkpoint
                shutil.rmtree(path)

    def latest(self) -> int | None:
        """The step of the newest finished checkpoint."""
        return max(steps_in(self.folder), default=None)

    def restore(self, path: Path, like: TrainState, *, trains_others: bool = False) -> TrainState:
        """Reads a state with the structure, shapes and placement of `like`.

        Args:
            path: the checkpoint.
            like: a state, whole.
            trains_others: whether other parameters are trained than it was saved with; those that
                were not have the optimizer state of `like`.

        Raises:
            CheckpointError: if the checkpoint is of another model, optimizer or config.
            DamagedCheckpointError: what was placed is not what was saved.
        """
        position = read_position(path)
        targets = _items(like)
        training = {k: v for k, v in targets["training"].items() if k not in _additions(like)}
        targets["training"] = training | _additions_there(path, like)
        if trains_others:
            targets["training"]["opt_state"] = on_host(shapes_of(path)["training"]["opt_state"])
        for name, target in targets.items():
            check_fits(path, name, target, position, types=True)
        read = read_items(path, **targets)
        check_digests(path, position, {name: read[name] for name in targets})
        student, training = read["student"], read["training"]
        projections = (
            read["projections"] if "projections" in targets else _part(like, "projections")
        )
        model_state = {"student": student["state"], "projections": projections["state"]}
        return replace(
            like,
            params={"student": student["params"], "projections": projections["params"]},
            model_state=model_state,
            opt_state=(
                _carried_over(training["opt_state"], like.opt_state)
                if trains_others
                else training["opt_state"]
            ),
            key=training["key"],
            micro_step=training["micro_step"],
            scaling=training.get("scaling", ()),
            guard=guard.restored(like.guard, model_state, **training.get("guard", {})),
            objective=_with_names(like.objective, training.get("objective", {})),
        )

    def wait(self) -> None:
        """Waits until everything is written, and deletes what then need not be kept.

        Raises:
            CheckpointError: it could not be; then nothing is deleted.
        """
        with self._saves():
            self._writer.wait()
        self._tell()
        self._prune()

    def close(self) -> None:
        """As `wait`; then, whatever went wrong, ends the background threads."""
        with (
            afterwards("clearing away", self._clear_away),
            afterwards("ending the background threads", self._writer.close),
        ):
            self.wait()

    def _clear_away(self) -> None:
        """Removes what a save that failed wrote while it was being removed."""
        if self._is_chief:
            folders.remove_leftovers(self.folder)


def _items(state: TrainState) -> dict[str, Any]:
    """The arrays of a state, parted into items; without projections, there is no such item."""
    additions = _additions(state)
    items = {
        "student": _part(state, "student"),
        "projections": _part(state, "projections"),
        "training": {
            "opt_state": state.opt_state,
            "key": state.key,
            "micro_step": state.micro_step,
            **({"scaling": state.scaling} if state.scaling else {}),
            **({"guard": additions["guard"]} if state.guard.counts else {}),
            **({"objective": additions["objective"]} if additions["objective"] else {}),
        },
    }
    return items if state.params["projections"] else {k: items[k] for k in ("student", "training")}


def _additions(state: TrainState) -> dict[str, dict[str, Any]]:
    """What older checkpoints lack, which then starts as in a new run: part → name → array."""
    return {"guard": {"in_a_row": state.guard.in_a_row}, "objective": _names(state.objective)}


def _additions_there(path: Path, state: TrainState) -> dict[str, Any]:
    """Those of `_additions` that a checkpoint holds."""
    there = shapes_of(path).get("training", {})
    found = {
        part: {name: leaf for name, leaf in leaves.items() if name in there.get(part, {})}
        for part, leaves in _additions(state).items()
    }
    return {part: leaves for part, leaves in found.items() if leaves}


def _carried_over(saved: Any, like: Any) -> Any:
    """The optimizer state `like`, with the leaves that were saved for it."""
    there = _names(saved)

    def placed(leaf: jax.Array, saved: Any) -> jax.Array:
        host = np.asarray(saved).astype(leaf.dtype)
        return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: host[index])

    found = {
        name: placed(leaf, there[name])
        for name, leaf in _names(like).items()
        if name in there and there[name].shape == leaf.shape
    }
    return _with_names(like, found)


def _names(tree: Any) -> dict[str, Any]:
    """Dotted name → leaf."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}


def _with_names(tree: Any, named: Mapping[str, Any]) -> Any:
    """The tree with those of its leaves exchanged that have one of these names."""
    leaves = [named.get(name, leaf) for name, leaf in _names(tree).items()]
    return jax.tree.unflatten(jax.tree.structure(tree), leaves)


def _megabytes(tree: Any) -> float:
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree)) / 1e6


def _is(several: Sized) -> str:
    return "is" if len(several) == 1 else "are"


def _part(state: TrainState, name: str) -> dict[str, Any]:
    return {"params": state.params[name], "state": state.model_state[name]}
