"""What a checkpoint on disk holds: read, verified by its digests, and put into models."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

from ..errors import CheckpointError, DamagedCheckpointError, suggest
from ..models.handle import Model
from ..models.wrap import as_model
from .backend import read_items, shapes_of
from .digests import differing, digests, kind_of, named
from .folders import Folder, damaged, is_finished, steps_in
from .position import read_position

logger = logging.getLogger(__name__)


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


def examine(path: Path) -> Saved:
    """Reads all of a checkpoint, on the CPU and wherever it was written, and verifies it.

    Raises:
        CheckpointError: it is of a later format.
        DamagedCheckpointError: something cannot be read, or is not what was saved.
    """
    position = read_position(path)
    shapes = shapes_of(path)
    missing = [name for name in ("student", "training") if name not in shapes]
    if missing:
        raise damaged(path, f"is damaged: it holds no {' and no '.join(missing)}")
    if position.get("digests") is not None:
        # A whole item may be gone, and nothing of it is left to be compared.
        gone = {name.split("/")[0] for name in position["digests"]} - shapes.keys()
        if gone:
            raise damaged(path, f"is damaged: it holds no {' and no '.join(sorted(gone))}")
    verified = [check_digests(path, position, {k: _as_saved(path, k)}) for k in shapes]
    return Saved(path, position, shapes, all(verified))


def check_digests(path: Path, position: Mapping[str, Any], items: Mapping[str, Any]) -> bool:
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
        raise damaged(path, f"is damaged: {'; '.join(wrong[:3])}{more}")
    return True


def _as_saved(path: Path, name: str) -> Any:
    """Reads an item onto the CPU, every array in the type it was saved in."""
    target = on_host(shapes_of(path)[name])
    with jax.enable_x64(True):
        return read_items(path, **{name: target})[name]


def on_host(tree: Any) -> Any:
    """A target to read onto the CPU."""
    sharding = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype, sharding=sharding), tree
    )


def check_fits(
    path: Path, item: str, target: Any, position: Mapping[str, Any], *, types: bool = False
) -> None:
    """Compares names and shapes of an item, and its types, with what is wanted; one error for all."""
    saved = shapes_of(path).get(item)
    if saved is None:
        raise CheckpointError(f"{path} holds no {item!r}; was it written by another program?")
    _check_kinds(path, item, saved, position)
    there, wanted = _described(saved, types), _described(target, types)
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
        raise damaged(path, f"is damaged: {'; '.join(wrong[:3])}")


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
    holds = "projections" in shapes_of(path)
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
    check_fits(path, name, target, position)
    read = read_items(path, **{name: target})[name]
    known = position.get("digests")
    if known is None:
        logger.warning("%s", unverified(path, position))
        return read
    # Arrays that were cast on the way are verified as they were saved.
    is_cast = any(_kind(known[k]) != kind_of(x) for k, x in named({name: read}).items())
    check_digests(path, position, {name: _as_saved(path, name) if is_cast else read})
    return read


def unverified(path: Path, position: Mapping[str, Any]) -> str:
    """What to say of a checkpoint without digests."""
    return (
        f"{path} is of format {position['format']}, which has no digests: whether its arrays are as "
        "they were saved cannot be verified"
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
