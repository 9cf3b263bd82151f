"""Checkpoints through Orbax: folders ``gs{step}`` under ``output_dir``, written in the background.

A checkpoint holds, as separate items, so that each can be read without the others:

=========== ====================================================================
student     ``{'params': …, 'state': …}``
projections likewise, by projection
training    optimizer state (with an open accumulation window), random key, counters, loss scale;
            by name, where there are any: the guard's counters, the objective's own state
position    JSON: step, epoch, batch, the same with its random state for each process, the
            configs, the format's version
=========== ====================================================================
"""

import contextlib
import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
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
from ..errors import CheckpointError, suggest  # noqa: E402
from ..files import read_json_object, write_json  # noqa: E402
from ..models.handle import Model  # noqa: E402
from ..models.wrap import as_model  # noqa: E402
from ..step import guard  # noqa: E402
from ..step.program import TrainState  # noqa: E402

Folder = str | os.PathLike[str]

logger = logging.getLogger(__name__)

FORMAT = 1
FINISHED = "_CHECKPOINT_METADATA"  # Orbax writes it last
SCORES = "scores.json"
_MOST_POSITION = 256 * 2**20  # bytes; each process takes some 12 thousand


def steps_in(folder: Folder) -> list[int]:
    """The steps of the finished checkpoints in a folder, in order."""
    return sorted(step for step, path in _step_folders(folder) if is_finished(path))


def _step_folders(folder: Folder) -> list[tuple[int, Path]]:
    """The folders ``gs{step}``, finished or not, with their steps."""
    named = [(re.fullmatch(r"gs(\d+)", path.name), path) for path in Path(folder).glob("gs*")]
    return [(int(match[1]), path) for match, path in named if match]


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


class Checkpoints:
    """The checkpoints of one run.

    Args:
        folder: where they go; made if it is not there.
        resume: whether to go on from what is there. If not, checkpoints of an earlier run are
            moved to a folder ``earlier-1`` (2, …) beside the new ones.
        max_to_keep: how many to keep: the newest, and of the others those with the best scores
            (see `score`) and then the newest. None keeps all. The others go only when the newest
            is finished on disk, so while it is written the disk holds one more.
        is_chief: of several processes, all of which write arrays, one does the rest.
    """

    def __init__(
        self, folder: Folder, *, resume: bool, max_to_keep: int | None, is_chief: bool = True
    ):
        self.folder = Path(folder).absolute()
        self.max_to_keep = max_to_keep
        self._is_chief = is_chief
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise CheckpointError(f"output_dir={str(folder)!r} cannot be made: {error}") from error
        if not resume and is_chief:
            self._set_aside()
        self._checkpointer = ocp.AsyncCheckpointer(_handler())

    def _set_aside(self) -> None:
        old = [path for _, path in _step_folders(self.folder)]
        if not old:
            return
        n = 1
        while (self.folder / f"earlier-{n}").exists():
            n += 1
        aside = self.folder / f"earlier-{n}"
        aside.mkdir()
        scores = self.folder / SCORES
        for path in [*old, *([scores] if scores.exists() else [])]:
            shutil.move(path, aside / path.name)
        logger.warning(
            "%s held checkpoints of an earlier run; moved to %s (resume=True would have gone on "
            "from them)",
            self.folder,
            aside,
        )

    def save(self, step: int, state: TrainState, position: Mapping[str, Any]) -> None:
        """Saves a state as ``gs{step}``; returns once the arrays are copied, before they are written.

        Waits for the checkpoint before it, and then deletes those that need not be kept.
        """
        self.wait()
        items = {name: ocp.args.StandardSave(tree) for name, tree in _items(state).items()}
        items["position"] = ocp.args.JsonSave({"format": FORMAT, **position})
        self._checkpointer.save(self.folder / f"gs{step}", args=ocp.args.Composite(**items))

    def score(self, step: int, score: float) -> None:
        """Notes how good a checkpoint is (higher is better)."""
        if not self._is_chief:
            return
        write_json(self.folder / SCORES, self.scores() | {step: float(score)})

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
        for step, path in _step_folders(self.folder):
            if step < kept[0] and step not in kept:
                (path / FINISHED).unlink(missing_ok=True)  # killed after this, it is no checkpoint
                shutil.rmtree(path)

    def latest(self) -> int | None:
        """The step of the newest finished checkpoint."""
        return max(steps_in(self.folder), default=None)

    def restore(self, step: int, like: TrainState) -> TrainState:
        """Reads a state with the structure, shapes and placement of `like`.

        Raises:
            CheckpointError: if the checkpoint is of another model, optimizer or config.
        """
        path = self.folder / f"gs{step}"
        targets = _items(like)
        training = {k: v for k, v in targets["training"].items() if k not in _additions(like)}
        targets["training"] = training | _additions_there(path, like)
        for name, target in targets.items():
            _check_fits(path, name, target, types=True)
        read = _read(path, **{k: ocp.args.StandardRestore(v) for k, v in targets.items()})
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

        Raises what went wrong in the background, and deletes nothing then.
        """
        self._checkpointer.wait_until_finished()
        self._prune()

    def close(self) -> None:
        """As `wait`; then, whatever went wrong, ends the background threads."""
        try:
            self.wait()
        finally:
            self._checkpointer.close()


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


def _part(state: TrainState, name: str) -> dict[str, Any]:
    return {"params": state.params[name], "state": state.model_state[name]}


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[ocp.Checkpointer]:
    """Opens a checkpoint; whatever goes wrong with the files is one kind of error."""
    checkpointer = ocp.Checkpointer(_handler())
    try:
        yield checkpointer
    except (
        ValueError,
        KeyError,
        OSError,
        AttributeError,
        TypeError,
    ) as error:  # Orbax's, all of them
        raise CheckpointError(
            f"{path} cannot be read ({type(error).__name__}: {error}). If it is damaged, use an "
            f"earlier one: {', '.join(f'gs{s}' for s in steps_in(path.parent)) or 'there is none'}"
        ) from error
    finally:
        checkpointer.close()


def _read(path: Path, **items: Any) -> Any:
    with _reader(path) as checkpointer:
        return checkpointer.restore(path, args=ocp.args.Composite(**items))


def _check_fits(path: Path, item: str, target: Any, *, types: bool = False) -> None:
    """Compares names and shapes of an item, and its types, with what is wanted; one error for all."""
    with _reader(path) as checkpointer:
        saved = checkpointer.metadata(path).item_metadata[item]
    if saved is None:
        raise CheckpointError(f"{path} holds no {item!r}; was it written by another program?")
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


def is_finished(path: Path) -> bool:
    """Whether a folder is a checkpoint that was written to its end."""
    return (path / FINISHED).is_file()


def read_position(path: Path) -> dict[str, Any]:
    """Reads the JSON part of a checkpoint.

    Raises:
        CheckpointError: it cannot be read, or its numbers cannot be.
    """
    file = path / "position" / "metadata"
    if file.is_file() and file.stat().st_size > _MOST_POSITION:
        raise CheckpointError(
            f"{file} is longer than {_MOST_POSITION / 2**20:g} MiB: it is damaged"
        )
    try:
        position = _read(path, position=ocp.args.JsonRestore())["position"]
    except RecursionError as error:
        raise CheckpointError(f"{file} is nested without end: it is damaged") from error
    if problems := list(_position_problems(position, path.name)):
        raise CheckpointError(
            f"{file} is damaged: {'; '.join(problems)}. Use another checkpoint: "
            f"{', '.join(f'gs{s}' for s in steps_in(path.parent)) or 'there is none'}"
        )
    return dict(position)


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


def read_through(path: Path) -> dict[str, Any]:
    """Reads all arrays of a checkpoint, on the CPU and wherever it was written.

    Returns:
        Item → its arrays, by shape.

    Raises:
        CheckpointError: something cannot be read.
    """
    with _reader(path) as reader:
        items = reader.metadata(path).item_metadata
        trees = {name: item.tree for name, item in items.items() if item is not None}
    missing = [name for name in ("student", "training") if name not in trees]
    if missing:
        raise CheckpointError(f"it holds no {' and no '.join(missing)}")
    for name, tree in trees.items():
        _read(path, **{name: ocp.args.StandardRestore(_on_host(tree))})
    return trees


def _on_host(tree: Any) -> Any:
    """A target to read onto the CPU."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype, sharding=sharding), tree
    )


def latest_position(folder: Folder) -> dict[str, Any] | None:
    """The JSON part of the newest finished checkpoint in a folder, or None if there is none."""
    steps = steps_in(folder)
    if not steps:
        return None
    return read_position(Path(folder).absolute() / f"gs{steps[-1]}")


def checkpoint_path(path: Folder) -> Path:
    """A checkpoint's own folder: `path` itself, or the newest one in it.

    Raises:
        CheckpointError: if there is none.
    """
    path = Path(path).absolute()
    if is_finished(path):
        return path
    steps = steps_in(path)
    if not steps:
        what = "is not there" if not path.exists() else "holds no finished checkpoint gs{step}"
        raise CheckpointError(f"{path} {what}; give a checkpoint, or an output_dir with some")
    return path / f"gs{steps[-1]}"


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
    _check_fits(path, name, target)
    return _read(path, **{name: ocp.args.StandardRestore(target)})[name]


def load_student(path: Folder, model: Any) -> Any:
    """Loads a checkpoint's student weights into a model.

    Args:
        path: a checkpoint (``saved_models/gs500``), or an ``output_dir``, whose newest is taken.
        model: the student: an `nnx.Module`, a `LinenModel` or a `FunctionModel`, of the shape that
            was trained. Its weights are replaced.

    Returns:
        `model`.

    Raises:
        CheckpointError: if there is no checkpoint, or it holds another model's weights; every
            name that differs is listed.
    """
    folder = checkpoint_path(path)
    handle: Model = as_model(model)
    student = _read_item(folder, "student", {"params": handle.params, "state": handle.state})
    handle.write(student["params"], student["state"])
    return model


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
