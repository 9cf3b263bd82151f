"""Checkpoints through Orbax: folders ``gs{step}`` under ``output_dir``, written in the background.

A checkpoint holds, as separate items, so that each can be read without the others:

=========== ====================================================================
student     ``{'params': …, 'state': …}``
projections likewise, by projection
training    optimizer state (with an open accumulation window), random key, counters, loss scale;
            by name, where there are any: the guard's counters, the objective's own state
position    JSON: step, epoch, batch, the same with its random state for each process, the
            configs, the format's version, the digest of every array, and one of all this
=========== ====================================================================

Format 2 has the digests, by which whatever is read is verified; format 1 has none.
"""

import contextlib
import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sized
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeGuard

import jax
import numpy as np

# Importing Orbax puts a handler on the root logger, after which a user's logging.basicConfig would
# do nothing, in silence.
_handlers = logging.root.handlers[:]
import orbax.checkpoint as ocp  # noqa: E402

logging.root.handlers[:] = _handlers

from ..configurations.checks import short  # noqa: E402
from ..data.streams import is_host_random  # noqa: E402
from ..errors import CheckpointError, DamagedCheckpointError, suggest  # noqa: E402
from ..machine.barrier import Barrier  # noqa: E402
from ..models.handle import Model  # noqa: E402
from ..models.wrap import as_model  # noqa: E402
from ..step import guard  # noqa: E402
from ..step.program import TrainState  # noqa: E402
from . import folders  # noqa: E402
from .digests import differing, digests, json_digest, kind_of, named  # noqa: E402
from .folders import FINISHED, Folder, is_finished, scores_in, step_folders, steps_in  # noqa: E402

logger = logging.getLogger(__name__)

FORMAT = 2
_MOST_POSITION = 256 * 2**20  # bytes; each process takes some 12 thousand


@dataclass(frozen=True)
class Saved:
    """A checkpoint that was read through.

    Attributes:
        path: its folder.
        position: its JSON part.
        shapes: item → its arrays, by shape.
        is_verified: whether all arrays are known to be those that were saved.
    """

    path: Path
    position: dict[str, Any]
    shapes: dict[str, Any]
    is_verified: bool


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
        if is_chief:
            self._clear_the_way(resume, start)
        self._checkpointer = ocp.AsyncCheckpointer(
            _handler(), async_options=ocp.options.AsyncOptions(barrier_sync_fn=barrier)
        )

    def _clear_the_way(self, resume: bool, start: int | None) -> None:
        folders.remove_leftovers(self.folder)
        there = step_folders(self.folder)
        if not resume:
            scores = self.folder / folders.SCORES
            why = (
                f"{self.folder} held checkpoints of an earlier run (resume=True would have gone on "
                "from them)"
            )
            old = [path for _, path in there]
            folders.set_aside(
                self.folder, [*old, *([scores] if old and scores.exists() else [])], why
            )
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
            folders.write_scores(self.folder, kept)

    def save(self, step: int, state: TrainState, position: Mapping[str, Any]) -> None:
        """Saves a state as ``gs{step}``; returns once the arrays are copied, before they are written.

        Waits for the checkpoint before it, and then deletes those that need not be kept.

        Raises:
            CheckpointError: it, or the one before it, cannot be written.
        """
        self.wait()
        items = _items(state)
        position = _sealed({"format": FORMAT, **position, "digests": digests(items)})
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args["position"] = ocp.args.JsonSave(position)
        path = self.folder / f"gs{step}"
        self._saving = _Saving(path, time.time(), _megabytes(items))
        with self._saves():
            self._checkpointer.save(path, args=ocp.args.Composite(**args))

    def check(self) -> None:
        """Looks, without waiting, at the save under way.

        Raises:
            CheckpointError: it has failed.
        """
        if self._saving is not None:
            with self._saves():
                self._checkpointer.check_for_errors()
            self._tell()

    @contextlib.contextmanager
    def _saves(self) -> Iterator[None]:
        """Whatever goes wrong with a save, in it or behind it, is one kind of error."""
        try:
            yield
        except Exception as error:
            if self._barrier is not None:
                self._barrier.fail()
            saving, self._saving = self._saving, None
            if saving is None:
                raise
            if self._is_chief:  # room for what comes next
                folders.remove_leftovers(self.folder, saving.path.name)
            newest = self.latest()
            from_there = "there is none yet" if newest is None else f"the newest is gs{newest}"
            raise CheckpointError(
                f"{saving.path} could not be written ({_told(error)}). It has "
                f"{saving.megabytes:,.1f} MB of arrays; {folders.space_left(self.folder)}. The "
                f"checkpoints before it are as they were ({from_there}): make room, and go on with "
                "resume=True"
            ) from error

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
        if not self._is_chief:
            return
        try:
            folders.write_scores(self.folder, self.scores() | {step: float(score)})
        except OSError as error:
            raise CheckpointError(
                f"{self.folder / folders.SCORES} could not be written ({_told(error)}); "
                f"{folders.space_left(self.folder)}"
            ) from error

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

    def restore(self, path: Path, like: TrainState) -> TrainState:
        """Reads a state with the structure, shapes and placement of `like`.

        Raises:
            CheckpointError: if the checkpoint is of another model, optimizer or config.
            DamagedCheckpointError: what was placed is not what was saved.
        """
        position = read_position(path)
        targets = _items(like)
        training = {k: v for k, v in targets["training"].items() if k not in _additions(like)}
        targets["training"] = training | _additions_there(path, like)
        for name, target in targets.items():
            _check_fits(path, name, target, position, types=True)
        read = _read(path, **{k: ocp.args.StandardRestore(v) for k, v in targets.items()})
        _check_digests(path, position, {name: read[name] for name in targets})
        student, training = read["student"], read["training"]
        projections = (
            read["projections"] if "projections" in targets else _part(like, "projections")
        )
        model_state = {"student": student["state"], "projections": projections["state"]}
        return replace(
            like,
            params={"student": student["params"], "projections": projections["params"]},
            model_state=model_state,
            opt_state=training["opt_state"],
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
            self._checkpointer.wait_until_finished()
        self._tell()
        self._prune()

    def close(self) -> None:
        """As `wait`; then, whatever went wrong, ends the background threads."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()
            if self._is_chief:  # a save that failed may have written on while it was cleared away
                folders.remove_leftovers(self.folder)


def _handler() -> ocp.CompositeCheckpointHandler:
    return ocp.CompositeCheckpointHandler(
        student=ocp.StandardCheckpointHandler(),
        projections=ocp.StandardCheckpointHandler(),
        training=ocp.StandardCheckpointHandler(),
        position=ocp.JsonCheckpointHandler(),
    )


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
    with _reader(path) as checkpointer:
        saved = checkpointer.metadata(path).item_metadata["training"]
    there = saved.tree if saved is not None else {}
    found = {
        part: {name: leaf for name, leaf in leaves.items() if name in there.get(part, {})}
        for part, leaves in _additions(state).items()
    }
    return {part: leaves for part, leaves in found.items() if leaves}


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


def _told(error: BaseException) -> str:
    """An error in a line that is not too long."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= 300 else f"{text[:300]} …"
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def _part(state: TrainState, name: str) -> dict[str, Any]:
    return {"params": state.params[name], "state": state.model_state[name]}


def _damaged(path: Path, problem: str) -> DamagedCheckpointError:
    return DamagedCheckpointError(
        f"{path} {problem}. Others beside it: {folders.others_in(path)}; resume=True takes the newest "
        "that is whole, and resume='gs…' or its path the one it names",
        problem,
    )


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[ocp.Checkpointer]:
    """Opens a checkpoint; whatever goes wrong with the files is one kind of error."""
    checkpointer = ocp.Checkpointer(_handler())
    try:
        yield checkpointer
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # Orbax and what it reads with raise all kinds, bare ones too
        raise _damaged(path, f"cannot be read ({_told(error)})") from error
    finally:
        checkpointer.close()


def _read(path: Path, **items: Any) -> Any:
    with _reader(path) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.Composite(**items))


def _check_fits(
    path: Path, item: str, target: Any, position: Mapping[str, Any], *, types: bool = False
) -> None:
    """Compares names and shapes of an item, and its types, with what is wanted; one error for all."""
    with _reader(path) as checkpointer:
        saved = checkpointer.metadata(path).item_metadata[item]
    if saved is None:
        raise CheckpointError(f"{path} holds no {item!r}; was it written by another program?")
    _check_kinds(path, item, saved.tree, position)
    there, wanted = _described(saved.tree, types), _described(target, types)
    wrong = [
        f"{name}: saved as {there[name]}, wanted {wanted[name]}"
        for name in wanted
        if name in there and there[name] != wanted[name]
    ]
    wrong += [
        f"{name}: not in the checkpoint; {suggest(name, there)}"
        for name in wanted
        if name not in there
    ]
    wrong += [f"{name}: in the checkpoint only" for name in there if name not in wanted]
    if wrong:
        shown = "\n".join(f"  - {line}" for line in wrong[:20])
        more = f"\n  … and {len(wrong) - 20} more" if len(wrong) > 20 else ""
        raise CheckpointError(
            f"{path} does not fit the {item} at hand (another model, optimizer or config?):\n{shown}{more}"
        )


def _check_kinds(path: Path, item: str, tree: Any, position: Mapping[str, Any]) -> None:
    """Compares what an item's files say they hold with what was saved."""
    known = position.get("digests")
    if known is None:
        return
    wanted = {name: _kind(text) for name, text in known.items() if name.split("/")[0] == item}
    found = {name: kind_of(leaf) for name, leaf in named({item: tree}).items()}
    wrong = [
        f"{name} is {found.get(name, 'missing')}, was saved as {wanted.get(name, 'nothing')}"
        for name in sorted({*wanted, *found})
        # Random keys lie in the files as the numbers behind them.
        if wanted.get(name) != found.get(name) and not wanted.get(name, "").startswith("key<")
    ]
    if wrong:
        raise _damaged(path, f"is damaged: {'; '.join(wrong[:3])}")


def _kind(digest: str) -> str:
    return digest.split(" ")[0]


def _described(tree: Any, types: bool) -> dict[str, str]:
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): (
            f"{_float_type(leaf) if types else ''}{list(_stored_shape(leaf))}"
        )
        for path, leaf in leaves
        if hasattr(leaf, "shape")
    }


def _float_type(leaf: Any) -> str:
    """The name of a floating type; integers and random keys may be stored as others."""
    dtype = getattr(leaf, "dtype", None)
    return str(dtype) if dtype is not None and jax.numpy.issubdtype(dtype, np.floating) else ""


def _stored_shape(leaf: Any) -> tuple[int, ...]:
    """The shape in the file, where a typed random key is the array behind it."""
    if hasattr(leaf, "dtype") and jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.eval_shape(jax.random.key_data, leaf).shape
    return tuple(leaf.shape)


def _sealed(position: dict[str, Any]) -> dict[str, Any]:
    """A position with a digest of itself."""
    return position | {"digest": json_digest(position)}


def read_position(path: Path) -> dict[str, Any]:
    """Reads the JSON part of a checkpoint, and verifies it by its digest if it has one.

    Raises:
        CheckpointError: it cannot be read, or is of a later format.
        DamagedCheckpointError: it is not as it was written.
    """
    file = path / "position" / "metadata"
    if file.is_file() and file.stat().st_size > _MOST_POSITION:
        raise _damaged(
            path, f"is damaged: its position is longer than {_MOST_POSITION / 2**20:g} MiB"
        )
    try:
        position = _read(path, position=ocp.args.JsonRestore())["position"]
    except RecursionError as error:
        raise _damaged(path, "is damaged: its position is nested without end") from error
    if not isinstance(position, Mapping):
        raise _damaged(
            path, f"is damaged: its position is a {type(position).__name__}, expected an object"
        )
    position = dict(position)
    found = position.get("format")
    sealed = {key: value for key, value in position.items() if key != "digest"}
    if len(sealed) < len(position) or found != 1:
        if position.get("digest") != json_digest(sealed):
            raise _damaged(path, "is damaged: its position is not what was saved")
        if found not in range(1, FORMAT + 1):
            raise CheckpointError(
                f"{path} is of format {found}, and this version reads up to {FORMAT}: update "
                "jaxbrewer"
            )
    if problems := list(_position_problems(position, path.name)):
        raise _damaged(path, f"is damaged: in its position {'; '.join(problems)}")
    return position


def _position_problems(position: Any, folder: str) -> Iterator[str]:
    """What cannot be in the JSON part of a checkpoint in a folder of this name."""
    if not isinstance(position, Mapping):
        yield f"it holds a {type(position).__name__}, expected an object"
        return
    yield from _count_problems(position, ("global_step", "micro_step", "epoch", "batch"), "")
    step, micro_step = position.get("global_step"), position.get("micro_step")
    named = re.fullmatch(r"gs(\d+)", folder)
    if named and _is_count(step) and step != int(named[1]):
        yield f"global_step is {step} in a folder named {folder}"
    config = position.get("train_config")
    if not isinstance(config, Mapping):
        yield f"train_config is a {type(config).__name__}, expected an object"
    else:
        accumulation = config.get("gradient_accumulation_steps")
        if not _is_count(accumulation) or accumulation < 1:
            yield f"train_config.gradient_accumulation_steps is {short(accumulation)}, expected 1 or more"
        elif _is_count(step) and _is_count(micro_step) and step * accumulation > micro_step:
            yield f"global_step is {step}, for which {micro_step} micro-batches (micro_step) are too few"
    if not isinstance(position.get("distill_config", {}), Mapping | type(None)):
        yield f"distill_config is {short(position['distill_config'])}, expected an object"
    each = position.get("processes")
    if not isinstance(each, list) or not each:
        yield f"processes is {short(each)}, expected a list with one object for each process"
        return
    for rank, process in enumerate(each):
        where = f"processes[{rank}]"
        if not isinstance(process, Mapping):
            yield f"{where} is {short(process)}, expected an object"
            continue
        yield from _count_problems(process, ("epoch", "batch"), f"{where}.")
        if not is_host_random(process.get("host_random")):
            yield f"{where}.host_random is no state of Python's and numpy's generators"


def _count_problems(values: Mapping[str, Any], names: tuple[str, ...], where: str) -> Iterator[str]:
    for name in names:
        if not _is_count(values.get(name)):
            found = short(values[name]) if name in values else "not there"
            yield f"{where}{name} is {found}, expected a whole number of 0 or more"


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _check_digests(path: Path, position: Mapping[str, Any], items: Mapping[str, Any]) -> bool:
    """Compares arrays that were read, by item, with what was saved; false where no digest is known.

    Raises:
        DamagedCheckpointError: they are not the same.
    """
    known = position.get("digests")
    if known is None:
        return False
    wanted = {name: text for name, text in known.items() if name.split("/")[0] in items}
    wrong = differing(wanted, digests(dict(items)))
    if wrong:
        more = f" (and {len(wrong) - 3} more)" if len(wrong) > 3 else ""
        raise _damaged(path, f"is damaged: {'; '.join(wrong[:3])}{more}")
    return True


def examine(path: Path) -> Saved:
    """Reads all of a checkpoint, on the CPU and wherever it was written, and verifies it.

    Raises:
        CheckpointError: it is of a later format.
        DamagedCheckpointError: something cannot be read, or is not what was saved.
    """
    position = read_position(path)
    with _reader(path) as reader:
        items = reader.metadata(path).item_metadata
        shapes = {name: item.tree for name, item in items.items() if item is not None}
    missing = [name for name in ("student", "training") if name not in shapes]
    if missing:
        raise _damaged(path, f"is damaged: it holds no {' and no '.join(missing)}")
    if position.get("digests") is not None:
        # A whole item may be gone, and nothing of it is left to be compared.
        gone = {name.split("/")[0] for name in position["digests"]} - shapes.keys()
        if gone:
            raise _damaged(path, f"is damaged: it holds no {' and no '.join(sorted(gone))}")
    verified = [_check_digests(path, position, {k: _as_saved(path, k)}) for k in shapes]
    return Saved(path, position, shapes, all(verified))


def _as_saved(path: Path, name: str) -> Any:
    """Reads an item onto the CPU, every array in the type it was saved in."""
    with _reader(path) as reader:
        target = _on_host(reader.metadata(path).item_metadata[name].tree)
    with jax.enable_x64(True):
        return _read(path, **{name: ocp.args.StandardRestore(target)})[name]


def _on_host(tree: Any) -> Any:
    """A target to read onto the CPU."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype, sharding=sharding), tree
    )


def checkpoint_path(path: Folder) -> Path:
    """A checkpoint's own folder: `path` itself, or the newest one in it.

    Raises:
        CheckpointError: if there is none.
    """
    return _candidates(path)[0]


def _candidates(path: Folder) -> list[Path]:
    """The checkpoint that a path is, or those that it holds, the newest first."""
    path = Path(path).absolute()
    if is_finished(path):
        return [path]
    steps = steps_in(path)
    if not steps:
        what = "is not there" if not path.exists() else "holds no finished checkpoint gs{step}"
        raise CheckpointError(f"{path} {what}; give a checkpoint, or an output_dir with some")
    return [path / f"gs{step}" for step in reversed(steps)]


def none_is_whole(folder: Path, problems: list[str]) -> CheckpointError:
    """The error where every checkpoint in a folder is damaged."""
    listed = "\n".join(f"  - {problem}" for problem in problems)
    return CheckpointError(
        f"no checkpoint in {folder} is whole:\n{listed}\nBring one back from a copy, or start anew "
        "with resume=False, which moves them aside"
    )


def read_variables(
    path: Path, student: Model, projections: Mapping[str, Model]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Reads the trained arrays of a checkpoint, as `step.Program.variables` has them.

    Args:
        path: the checkpoint.
        student: the student, of the shape that was trained.
        projections: name → projection: all that the checkpoint holds.

    Raises:
        CheckpointError: it holds another student or other projections; every name that differs is
            listed.
    """
    with _reader(path) as checkpointer:
        holds = checkpointer.metadata(path).item_metadata["projections"] is not None
    read = {
        "student": _read_item(path, "student", {"params": student.params, "state": student.state}),
        "projections": {"params": {}, "state": {}},
    }
    if projections or holds:
        target = {
            "params": {name: model.params for name, model in projections.items()},
            "state": {name: model.state for name, model in projections.items()},
        }
        read["projections"] = _read_item(path, "projections", target)
    params, state = (
        {name: item[part] for name, item in read.items()} for part in ("params", "state")
    )
    return params, state


def _read_item(path: Path, name: str, target: Any) -> Any:
    """Reads an item into arrays as `target` has them, and verifies them."""
    position = read_position(path)
    _check_fits(path, name, target, position)
    read = _read(path, **{name: ocp.args.StandardRestore(target)})[name]
    known = position.get("digests")
    if known is None:
        logger.warning("%s", unverified(path, position))
        return read
    # Arrays that were cast on the way are verified as they were saved.
    is_cast = any(_kind(known[k]) != kind_of(x) for k, x in named({name: read}).items())
    _check_digests(path, position, {name: _as_saved(path, name) if is_cast else read})
    return read


def unverified(path: Path, position: Mapping[str, Any]) -> str:
    """What to say of a checkpoint without digests."""
    return (
        f"{path} is of format {position['format']}, which has no digests: whether its arrays are as "
        "they were saved cannot be verified"
    )


def load_student(path: Folder, model: Any) -> Any:
    """Loads a checkpoint's student weights into a model, once they are verified.

    Args:
        path: a checkpoint (``saved_models/gs500``), or an ``output_dir``: of its checkpoints the
            newest whose student is whole is taken, with a warning in the log for each that is not.
        model: the student: an `nnx.Module`, a `LinenModel` or a `FunctionModel`, of the shape that
            was trained. Its weights are replaced.

    Returns:
        `model`.

    Raises:
        CheckpointError: if there is no checkpoint, or it holds another model's weights; every
            name that differs is listed.
        DamagedCheckpointError: the checkpoint is not what was saved.
    """
    handle: Model = as_model(model)
    target = {"params": handle.params, "state": handle.state}
    candidates = _candidates(path)
    problems = []
    for folder in candidates:
        try:
            student = _read_item(folder, "student", target)
        except DamagedCheckpointError as error:
            if folder == Path(path).absolute():
                raise
            logger.warning("%s is passed over: it %s", folder, error.problem)
            problems.append(f"{folder.name} {error.problem}")
            continue
        handle.write(student["params"], student["state"])
        return model
    raise none_is_whole(Path(path), problems)


def export_hf(path: Folder, model: Any, folder: Folder) -> None:
    """Writes a checkpoint's student as a Hugging Face folder (safetensors and config.json).

    Args:
        path: as for `load_student`.
        model: a model of `jaxbrewer.zoo` of the student's shape; its weights are replaced.
        folder: where to write.

    Raises:
        CheckpointError: as `load_student`.
        TypeError: if the model has no ``save_pretrained``.
    """
    if not hasattr(model, "save_pretrained"):
        raise TypeError(
            f"{type(model).__name__} has no save_pretrained; models of jaxbrewer.zoo can be exported"
        )
    load_student(path, model).save_pretrained(folder)
