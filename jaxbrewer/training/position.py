"""The JSON part of a checkpoint: where a run stands, and what can be known to be wrong with that."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypeGuard

from ..configurations.checks import short
from ..data.states import is_host_random, loader_state_problem
from ..errors import CheckpointError
from .backend import POSITION, read_json_item
from .digests import json_digest
from .folders import damaged

FORMAT = 2
_MOST_POSITION = 256 * 2**20  # bytes; each process takes some 12 thousand


def sealed(position: dict[str, Any]) -> dict[str, Any]:
    """A position with a digest of itself."""
    return position | {"digest": json_digest(position)}


def read_position(path: Path) -> dict[str, Any]:
    """Reads the JSON part of a checkpoint, and verifies it by its digest if it has one.

    Raises:
        CheckpointError: it cannot be read, or is of a later format.
        DamagedCheckpointError: it is not as it was written.
    """
    file = path / POSITION / "metadata"
    if file.is_file() and file.stat().st_size > _MOST_POSITION:
        raise damaged(
            path, f"is damaged: its position is longer than {_MOST_POSITION / 2**20:g} MiB"
        )
    position = read_json_item(path)
    if not isinstance(position, Mapping):
        raise damaged(
            path, f"is damaged: its position is a {type(position).__name__}, expected an object"
        )
    position = dict(position)
    found = position.get("format")
    sealed = {key: value for key, value in position.items() if key != "digest"}
    if len(sealed) < len(position) or found != 1:
        if position.get("digest") != json_digest(sealed):
            raise damaged(path, "is damaged: its position is not what was saved")
        if found not in range(1, FORMAT + 1):
            raise CheckpointError(
                f"{path} is of format {found}, and this version reads up to {FORMAT}: update "
                "jaxbrewer"
            )
    if problems := list(_position_problems(position, path.name)):
        raise damaged(path, f"is damaged: in its position {'; '.join(problems)}")
    return position


def _position_problems(position: Mapping[str, Any], folder: str) -> Iterator[str]:
    """What cannot be in the JSON part of a checkpoint in a folder of this name."""
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
        loaders = process.get("loaders", {})
        if not isinstance(loaders, Mapping):
            yield f"{where}.loaders is {short(loaders)}, expected an object"
            continue
        for task, loader in loaders.items():
            if problem := loader_state_problem(loader):
                yield f"{where}.loaders[{task!r}]: {problem}"


def _count_problems(values: Mapping[str, Any], names: tuple[str, ...], where: str) -> Iterator[str]:
    for name in names:
        if not _is_count(values.get(name)):
            found = short(values[name]) if name in values else "not there"
            yield f"{where}{name} is {found}, expected a whole number of 0 or more"


def _is_count(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
