"""The files of a model's folder, before anything is built from them.

Whoever made the folder may have meant harm or made a mistake: no path in it leaves it, nothing is
unpickled, headers and JSON are bounded, and sizes are compared before memory is taken for them.
"""

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from jaxbrewer.files import MOST_JSON, read_json_object, replacing

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
CONFIG = "config.json"

_OLD_CONFIG = "bert_config.json"  # as Google's and TextBrewer's files are called

MOST_LABELS = 2**20
"""A head of more classes is not built."""

_LARGEST = float(np.finfo(np.float32).max)

# What safetensors raises on a file that is not one, or that changes while it is read.
_UNREADABLE = (SafetensorError, OSError, ValueError, TypeError, OverflowError)


class WeightsMismatchError(ValueError):
    """The tensors of a folder are not those of the model.

    Attributes:
        lacks_head: whether the encoder fits, and the folder has no head of this model's kind.
    """

    lacks_head = False


@dataclasses.dataclass(frozen=True)
class Stored:
    """Where a tensor lives on disk: its file, its name there, its shape, its type (``'F32'``)."""

    file: Path
    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def is_float(self) -> bool:
        """Whether it holds floating-point numbers."""
        return self.dtype.startswith(("F", "BF"))

    def read(self, dtype: Any) -> np.ndarray:
        """Reads the values, in a type.

        Raises ``ValueError`` that names file and tensor for what is not finite, or not in that type.
        """
        try:
            with safe_open(self.file, "numpy") as tensors:
                array = tensors.get_tensor(self.name)
        except _UNREADABLE as error:
            raise ValueError(f"{self.file}: {self.name} cannot be read: {error}") from error
        with np.errstate(over="ignore"):
            value = array.astype(dtype, copy=False)
        if not np.isfinite(value).all():
            raise ValueError(f"{self.file}: {self.name} {_not_finite(array, dtype)}")
        return value


def _not_finite(array: np.ndarray, dtype: Any) -> str:
    bad = ~np.isfinite(array)
    if bad.any():
        index = [int(i) for i in np.argwhere(bad)[0]]
        return f"holds {int(bad.sum())} numbers that are not finite, the first at {index}"
    largest = float(np.abs(array).max())
    return f"holds {largest:g}, beyond the range of {np.dtype(dtype)}"


def _conversion(folder: Path) -> str:
    """What to do where the weights are a pickle: another folder, by the class that has the head."""
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    if not pickled:
        return ""
    config = config_file(folder)
    named = architectures_of(read_json_object(config), config) if config.is_file() else ()
    cls = named[0] if named and named[0].isidentifier() else "AutoModel"
    return (
        f"; {pickled[0]} is a pickle, which can run code when read: convert it once, into another "
        f"folder, with transformers.{cls}.from_pretrained({str(folder)!r}).save_pretrained("
        f"{str(folder) + '-safetensors'!r}), and copy the tokenizer's files there"
    )


def config_file(folder: str | os.PathLike[str]) -> Path:
    """Where a folder's config is: ``config.json``, or ``bert_config.json`` where only that is."""
    old = Path(folder) / _OLD_CONFIG
    new = Path(folder) / CONFIG
    return old if old.is_file() and not new.is_file() else new


def weight_files(folder: Path) -> dict[Path, dict[str, str] | None]:
    """The files of a folder's weights: the one file, or the shards.

    Returns each with what the index says of it: tensor → shard; None where there is no index.

    Raises ``ValueError`` for a folder without weights, and for an index that names what is not in
    the folder, or that is none.
    """
    if (folder / WEIGHTS).is_file():
        return {folder / WEIGHTS: None}
    index = folder / INDEX
    if not index.is_file():
        raise ValueError(f"{folder} has no {WEIGHTS} and no {INDEX}{_conversion(folder)}")
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ValueError(f"{index} has no 'weight_map' from tensors to files")
    if not weight_map:
        raise ValueError(f"{index}: 'weight_map' is empty")
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file:
            raise ValueError(
                f"{index}: weight_map[{_short(name)}] is {_short(file)}, expected a file's name"
            )
    return {inside(folder, file, index): weight_map for file in sorted(set(weight_map.values()))}


def inside(folder: Path, file: str, index: Path) -> Path:
    """The path of a file that ``index`` names, which must lie in the folder, links followed.

    Raises ``ValueError`` that names both for one that does not, or is not there.
    """
    path = folder / file
    if Path(file).is_absolute() or ".." in Path(file).parts:
        raise ValueError(f"{index} names {_short(file)}, which is outside of the folder")
    try:
        there, outside = path.is_file(), outside_of(folder, path)
    except (OSError, ValueError, RuntimeError) as error:  # a name too long, a circle of links
        why = getattr(error, "strerror", None) or str(error)[:200]
        raise ValueError(f"{index} names {_short(file)}, which is no file's name: {why}") from error
    if not there:
        raise ValueError(f"{index} names {file[:200]}, which is not in the folder")
    if outside:
        raise ValueError(f"{index} names {_short(file)}, {outside}: copy the file into it")
    return path


def outside_of(folder: Path, path: Path) -> str:
    """Where a path leads that leaves a folder, symbolic links followed; empty where it stays.

    The cache of Hugging Face's hub keeps files as links to ``blobs`` beside its ``snapshots``.
    """
    resolved, root = path.resolve(), folder.resolve()
    blobs = [up.parent / "blobs" for up in root.parents if up.name == "snapshots"]
    if any(resolved.is_relative_to(one) for one in (root, *blobs)):
        return ""
    return f"a link to {resolved}, which is outside of the folder"


def find_tensors(folder: Path) -> dict[str, Stored]:
    """Every tensor in a folder's weights, one file or shards, without reading the values."""
    found: dict[str, Stored] = {}
    weight_map: Mapping[str, str] | None = None
    for file, weight_map in weight_files(folder).items():
        for name, stored in _tensors_of(file).items():
            if name in found:
                raise ValueError(f"{folder}: {name} is in {found[name].file.name} and {file.name}")
            named = (weight_map or {}).get(name)
            if named is not None and folder / named != file:
                raise ValueError(
                    f"{folder / INDEX} says that {name} is in {named}, but it is in {file.name}"
                )
            found[name] = stored
    if absent := sorted(set(weight_map or ()) - set(found)):
        raise ValueError(f"{folder / INDEX} names tensors that no shard has: {_listed(absent)}")
    return found


def _tensors_of(file: Path) -> dict[str, Stored]:
    try:
        with open(file, "rb") as opened:
            header = int.from_bytes(opened.read(8), "little")
        if header > min(MOST_JSON, os.path.getsize(file)):
            raise ValueError(f"its header would be {header} bytes long")
        with safe_open(file, "numpy") as tensors:
            found = {}
            for name in tensors.keys():  # noqa: SIM118 – not a mapping
                part = tensors.get_slice(name)
                found[name] = Stored(file, name, tuple(part.get_shape()), str(part.get_dtype()))
            return found
    except _UNREADABLE as error:
        raise ValueError(
            f"{file} is not a whole safetensors file ({error}): fetch it again"
        ) from error


def write_tensors(file: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes tensors as a safetensors file that torch's readers take, whole or not at all."""
    with replacing(file) as path:
        save_file(dict(tensors), path, metadata={"format": "pt"})


def check_sizes(config: Any, stored: Mapping[str, Stored], folder: Path) -> None:
    """Refuses a config whose numbers are beyond what the weights can hold, before it is built from.

    Coarse, and at once: a model is only then compared tensor by tensor. A layer has a tensor at
    least, and no size is above the number of elements of all tensors.

    Raises ``WeightsMismatchError`` that names the fields.
    """
    tensors = len(stored)
    elements = sum(int(np.prod(tensor.shape, dtype=object)) for tensor in stored.values())
    problems = []
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if isinstance(value, float) and not abs(value) <= _LARGEST:
            problems.append(f"{field.name}={value}, expected a number within the range of float32")
        if isinstance(value, bool) or not isinstance(value, int):
            continue
        if field.name == "num_labels":  # a new head may have any, within reason
            if value > MOST_LABELS:
                problems.append(f"num_labels={value}, expected {MOST_LABELS} or fewer")
        elif "layers" in field.name and value > tensors:
            problems.append(f"{field.name}={value}, but the weights hold {tensors} tensors in all")
        elif value > max(elements, MOST_LABELS):
            problems.append(f"{field.name}={value}, but the weights hold {elements} numbers in all")
    if problems:
        raise WeightsMismatchError(
            f"{folder / CONFIG} does not fit the weights: {'; '.join(problems)}"
        )


def architectures_of(values: Mapping[str, Any], config: str | os.PathLike[str]) -> tuple[str, ...]:
    """The names under ``architectures`` in a config; raises ``ValueError`` if they are no names."""
    named = values.get("architectures")
    if named is None:
        return ()
    if not isinstance(named, list) or not all(isinstance(name, str) for name in named):
        raise ValueError(f"{config}: architectures={_short(named)}, expected a list of names")
    return tuple(named)


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - 20} more" if len(names) > 20 else ""
    return ", ".join(names[:20]) + more


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…"
