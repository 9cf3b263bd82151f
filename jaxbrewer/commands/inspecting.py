"""``jaxbrewer inspect``: what a model's folder or a checkpoint holds."""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxbrewer.commands import BY_HAND, FINE, CommandError, escaped, say, say_line
from jaxbrewer.commands.zoo_models import config_from
from jaxbrewer.configurations.checks import short
from jaxbrewer.errors import CheckpointError, DamagedCheckpointError
from jaxbrewer.files import UnreadableFileError, read_json_object
from jaxbrewer.training.folders import is_finished, scores_in, steps_in
from jaxbrewer.training.stored import examine
from jaxbrewer.utils import LayerNode, display_parameters
from jaxbrewer.zoo.folders import (
    CONFIG,
    INDEX,
    WEIGHTS,
    Stored,
    check_sizes,
    config_file,
    find_tensors,
)

_DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64",
    "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_CHECKPOINT = re.compile(r"gs\d+(\..*)?")
_MOST_LEVELS = 64  # a name of more parts than that is not taken apart
_UNFINISHED = "unfinished: its writing was cut off. It is never read and can be deleted"


def inspect_folder(name: str, max_level: int) -> int:
    """Inspects a folder; see the command's help.

    Raises:
        CommandError: it is no folder, holds nothing known, or cannot be read.
    """
    folder = Path(name)
    if not folder.is_dir():
        there = "a file" if folder.exists() else "not there"
        raise CommandError(f"{name} is {there}, expected a folder")
    if any(file.is_file() for file in (config_file(folder), folder / WEIGHTS, folder / INDEX)):
        return _inspect_model(folder, max_level)
    if is_finished(folder):
        return _inspect_checkpoint(folder.resolve(), max_level)
    inside = sorted(path for path in folder.iterdir() if _CHECKPOINT.fullmatch(path.name))
    if inside:
        return _inspect_output(folder, inside, max_level)
    if _CHECKPOINT.fullmatch(folder.resolve().name):
        say_line(f"{folder}: {_UNFINISHED}")
        return BY_HAND
    raise CommandError(
        f"{folder} is neither a model's folder ({CONFIG}, {WEIGHTS}) nor a checkpoint gs{{step}} nor "
        "an output_dir that holds some"
    )


# ------------------------------------------------------------------------------- a model's folder


def _inspect_model(folder: Path, max_level: int) -> int:
    say_line(f"{folder}: a model's folder")
    code, config = FINE, None
    if (file := config_file(folder)).exists():
        values = read_json_object(file)
        for key, value in values.items():
            say_line(f"  {key}: {short(value)}")
        try:
            config = config_from(values)
        except ValueError as error:
            say(f"  ! not for jaxbrewer.zoo: {error}")
            code = BY_HAND
    else:
        say_line(f"  ! there is no {CONFIG}")
        code = BY_HAND
    tensors = _tensors(folder)
    if not tensors:
        pickles = ", ".join(sorted(p.name for p in folder.glob("*.bin")))
        text = f"; {pickles} is torch's: jaxbrewer port-weights makes one" if pickles else ""
        say_line(f"  ! there is no {WEIGHTS}{text}")
        return BY_HAND
    try:
        if config is not None:
            check_sizes(config, tensors, folder)
    except ValueError as error:
        say(f"  ! {error}")
        code = BY_HAND
    shapes = {
        name: jax.ShapeDtypeStruct(tensor.shape, jnp.dtype(_DTYPES.get(tensor.dtype, "uint8")))
        for name, tensor in tensors.items()
    }
    say(display_parameters(_escaped_names(_nested(shapes)), max_level)[0])
    return code


def _tensors(folder: Path) -> Mapping[str, Stored]:
    """Every tensor in a folder's safetensors files; no values are read."""
    if not any((folder / file).is_file() for file in (WEIGHTS, INDEX)):
        return {}
    try:
        return find_tensors(folder)
    except UnreadableFileError:
        raise
    except ValueError as error:
        raise CommandError(f"{folder} is damaged: {error}", BY_HAND) from error


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    """``{'a.b': x}`` → ``{'a': {'b': x}}``, numbers in order; a prefix of others keeps its dots."""
    nested: dict[str, Any] = {}
    for name, value in sorted(flat.items(), key=lambda item: _in_order(item[0])):
        *path, leaf = name.split(".") if name.count(".") <= _MOST_LEVELS else [name]
        inside = nested
        for part in path:
            inside = inside.setdefault(part, {}) if isinstance(inside, dict) else inside
        if isinstance(inside, dict) and leaf not in inside:
            inside[leaf] = value
        else:
            nested[name] = value
    return nested


def _escaped_names(tree: Any) -> Any:
    """A tree of dicts whose keys can be shown."""
    if not isinstance(tree, dict):
        return tree
    return {escaped(name): _escaped_names(value) for name, value in tree.items()}


def _in_order(name: str) -> list[tuple[int, int, str]]:
    """A key by which layer 2 comes before layer 10."""
    return [
        (0, int(p), "") if p.isdecimal() and len(p) < 20 else (1, 0, p) for p in name.split(".")
    ]


# ----------------------------------------------------------------------------------- checkpoints


def _inspect_output(folder: Path, inside: list[Path], max_level: int) -> int:
    say_line(f"{folder}: an output_dir")
    steps = steps_in(folder)
    scores = _scores(folder)
    best = max((s for s in steps if s in scores), key=lambda s: (scores[s], s), default=None)
    for step in steps:
        notes = [f"score {scores[step]:g}"] if step in scores else []
        notes += ["the best"] * (step == best) + ["the newest"] * (step == steps[-1])
        say_line(f"  gs{step}" + (f"  ({', '.join(notes)})" if notes else ""))
    code = FINE
    for path in inside:
        if not is_finished(path):
            say_line(f"  ! {path.name}: {_UNFINISHED}")
            code = BY_HAND
    for path in sorted(folder.glob("earlier-*")):
        say_line(f"  {path.name}: of an earlier run")
    if not steps:
        return code
    say()
    return max(code, _inspect_checkpoint((folder / f"gs{steps[-1]}").resolve(), max_level))


def _scores(folder: Path) -> dict[int, float]:
    try:
        return scores_in(folder)
    except CheckpointError as error:
        raise CommandError(str(error), BY_HAND) from error


def _inspect_checkpoint(path: Path, max_level: int) -> int:
    """Describes a finished checkpoint, and reads all of it to see that it can be read."""
    say_line(f"{path}: a checkpoint")
    score = _scores(path.parent).get(_step_of(path))
    try:
        saved = examine(path)
    except DamagedCheckpointError as error:
        say_line(f"  ! damaged: it {error.problem}")
        return BY_HAND
    except CheckpointError as error:
        say(f"  ! {error}")
        return BY_HAND
    trees = saved.shapes
    _print_position(saved.position, score)
    known = (
        " and is what was saved"
        if saved.is_verified
        else "; without digests, whether it is what was saved cannot be verified"
    )
    say_line(f"  holds: {', '.join([*sorted(trees), 'position'])}; all of it can be read{known}")
    for name in ("student", "projections"):
        if name in trees:
            say(f"  {name}:{parameters_of(trees[name]['params'], max_level)[0]}")
    leaves = jax.tree.leaves(jax.tree.map(_shape, trees["training"]))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves) / 2**20
    say_line(f"  training: {len(leaves)} arrays, {size:,.2f} MB: optimizer, random key, counters")
    return FINE


def parameters_of(tree: Any, max_level: int | None = None) -> tuple[str, LayerNode]:
    """`display_parameters` of a checkpoint's parameters by shape, dotted names taken apart."""
    params = jax.tree.map(_shape, tree)
    if not isinstance(params, dict | list | tuple):
        params = {"params": params}
    if isinstance(params, dict) and all(hasattr(p, "shape") for p in params.values()):
        params = _nested(params)
    return display_parameters(_escaped_names(params), max_level)


def _step_of(path: Path) -> int:
    digits = path.name.removeprefix("gs")
    return int(digits) if digits.isdecimal() else -1


def _print_position(position: Mapping[str, Any], score: float | None) -> None:
    here = {name: position.get(name) for name in ("global_step", "epoch", "batch", "micro_step")}
    epoch = here["epoch"] + 1 if isinstance(here["epoch"], int) else here["epoch"]
    say_line(f"  step: {here['global_step']}")
    say_line(
        f"  epoch: {epoch}, after its batch {here['batch']}; {here['micro_step']} batches in all"
    )
    if score is not None:
        say_line(f"  score: {score:g}")
    say_line(f"  written by: {position.get('class')}, format {position.get('format')}")
    for name in ("train_config", "distill_config"):
        for key, value in (position.get(name) or {}).items():
            say_line(f"  {name}.{key}: {short(value)}")


def _shape(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(tuple(leaf.shape), leaf.dtype)
