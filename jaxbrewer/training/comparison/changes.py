"""Whether a run that is resumed is the job that was saved; what has changed is refused, or meant.

Compared are the configs, and the `record` that checkpoints keep of the job. Each difference has a
name, by which `TrainingConfig.resume_changes` allows it: a field of a config, or one of
`configs.PARTS`. Free to change is what changes no number of a run on sound data: folders, when to
save and how much to keep, devices, and how long to train, as long as the schedule has been the same
for the steps done.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np

from ...configurations.checks import short
from ...configurations.configs import ANY, FREE, DistillationConfig, TrainingConfig
from ...errors import CheckpointError
from ...machine.processes import Processes
from ..digests import kind_of, named
from .record import Ahead, axes, outline, rows_digest

logger = logging.getLogger(__name__)

_CLOSE = 1e-5  # numbers of one function across versions of the libraries
_SHOWN = 6
_HALVES = ("fp16", "fp16_opt_level", "half_dtype")
_OF_CACHE = ("is_caching_logits", "cache_dir", "cache_dtype")
_OF_LOSS = tuple(f.name for f in fields(DistillationConfig) if f.name not in _OF_CACHE)
_WEIGHTS = ("kd_loss", "hard_label")
_ALSO_SCHEDULED = ("temperature", "base_temperature_scheduler", "intermediate_matches")
_COLUMNS = ("weight of the KD loss", "weight of the hard labels", "learning-rate factor")
_TRACED = "its operations differ where the configs agree: another function, loss or library"


@dataclass(frozen=True)
class Change:
    """One difference between the job that was saved and this one.

    Attributes:
        name: by which it is allowed.
        was: as it was saved, in words.
        now: as it is.
        place: where in it.
        hint: what may be behind it.
    """

    name: str
    was: str
    now: str
    place: str = ""
    hint: str = ""

    def __str__(self) -> str:
        hint = f" ({self.hint})" if self.hint else ""
        return f"{self.name}{self.place}: was {self.was}, is {self.now}{hint}"


@dataclass
class Compared:
    """What a comparison has found.

    Attributes:
        changes: the differences.
        unknown: what could not be compared, in words.
    """

    changes: list[Change] = field(default_factory=list)
    unknown: list[str] = field(default_factory=list)

    def add(self, name: str, was: Any, now: Any, place: str = "") -> None:
        """Notes a difference between two values, if it is one."""
        if was != now:
            self.changes.append(Change(name, short(was), short(now), place))

    def has(self, names: Collection[str]) -> bool:
        """Whether one of these has changed."""
        return any(change.name in names for change in self.changes)


def check(path: Path, config: TrainingConfig, found: Compared, processes: Processes) -> None:
    """Refuses what has changed and is not allowed; says what is allowed, and what is not known.

    Args:
        path: the checkpoint that the run goes on from.
        config: of this run.
        found: what `compare` has found in this process.
        processes: all processes: what one of them finds is an error of all.

    Raises:
        CheckpointError: naming each change, with what was and what is.
    """
    told = processes.objects([[change.name, str(change)] for change in found.changes])
    changes = dict((line, name) for each in told for name, line in each)
    refused = {
        line: name for line, name in changes.items() if not {name, ANY} & {*config.resume_changes}
    }
    if refused:
        raise CheckpointError(_refusal(path, refused))
    if processes.rank == 0 and changes:
        logger.warning("resume_changes allows: %s", "; ".join(changes))
    if processes.rank == 0 and found.unknown:
        unknown = "; ".join(dict.fromkeys(found.unknown))
        logger.warning("%s: not compared with what it was trained by: %s", path.name, unknown)


def _refusal(path: Path, refused: Mapping[str, str]) -> str:
    listed = "\n".join(f"  - {line}" for line in refused)
    names = ", ".join(map(repr, dict.fromkeys(refused.values())))
    return (
        f"{path} was trained by another job:\n{listed}\nSet it back to what it was; or, if it is "
        f"meant, say so: TrainingConfig(resume_changes=[{names}]); or start anew with another "
        "output_dir"
    )


def compare_configs(
    saved: Mapping[str, Any], about: Mapping[str, Any], *, same_level: bool = False
) -> Compared:
    """Compares the configs alone.

    Args:
        saved: the JSON part of a checkpoint.
        about: `Job.about` of this run.
        same_level: whether the level of precision is known to be the same in the end.
    """
    found = Compared()
    found.add("class", saved.get("class"), about.get("class"))
    for name, cls in (("train_config", TrainingConfig), ("distill_config", DistillationConfig)):
        was, now = (_whole(x.get(name), cls) for x in (saved, about))
        for key in now if was else ():
            if key not in _free(was, now, same_level):
                for place, one, other in _differing(was[key], now[key]):
                    found.add(key, one, other, place)
    if record_in(saved) is None:
        found.unknown.append(
            "teacher, models, loss, optimizer, schedule and batches, of which it keeps no record (its "
            "configs are compared)"
        )
    return found


def compare(
    saved: Mapping[str, Any],
    about: Mapping[str, Any],
    record: Mapping[str, Any],
    ahead: Ahead,
    rows: np.ndarray,
) -> Compared:
    """Compares all that is known of a job.

    Args:
        saved: the JSON part of the checkpoint.
        about: `Job.about` of this run.
        record: of this run, see `record.make_record`, made with that of the checkpoint at hand.
        ahead: what it was made of.
        rows: the schedule, ``[steps, 3]``.
    """
    then = record_in(saved)
    if then is None:
        return compare_configs(saved, about)
    same_level = then["precision"] == record["precision"]
    found = compare_configs(saved, about, same_level=same_level)
    if not same_level and not found.has(_HALVES):
        found.add("half_dtype", then["precision"], record["precision"])
    for name in ("train_mode", "max_grad_norm", "tau"):
        found.add(name, then[name], record[name])
    if trains_others(saved, record):
        _tell_trainable(then.get("trainable"), record.get("trainable"), found)
    _compare_schedule(then["schedule"], rows, found)
    found.add("tasks", list(then["tasks"]), list(record["tasks"]))
    for name in _in_both(then["tasks"], record["tasks"]):
        where = f" of task {name!r}" if name else ""
        _compare_batch(then["tasks"][name], ahead, name, where, found)
        _compare_weights(then["tasks"][name], record["tasks"][name], where, found)
    _compare_functions(saved, record, ahead, found)
    return found


def _in_both(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [name for name in one if name in other]


def record_in(saved: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """The record of the job in the JSON part of a checkpoint, or None."""
    found = saved.get("job")
    return found if isinstance(found, Mapping) and "digest" in saved else None


# --------------------------------------------------------------------------------------- configs


def _free(was: Mapping[str, Any], now: Mapping[str, Any], same_level: bool) -> set[str]:
    """The fields of a config that make no difference."""
    free = set(FREE)
    if same_level or not (was.get("fp16") or now.get("fp16")):
        free.update(_HALVES)
    if not (was.get("is_caching_logits") and now.get("is_caching_logits")):
        free.add("cache_dtype")
    return free


def _whole(given: Any, cls: Any) -> dict[str, Any]:
    """All fields of a config, of which defaults may have been left out; {} where there is none."""
    if not isinstance(given, Mapping):
        return {}
    return {f.name: given.get(f.name, f.default) for f in fields(cls)}


def _differing(was: Any, now: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    """The places at which two values differ: ``[0].weight``, was, is. An empty list is None."""
    one, other = (None if x == [] else x for x in (was, now))
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in dict.fromkeys([*one, *other]):
            yield from _differing(one.get(key), other.get(key), f"{place}.{key}")
    elif pairs := _pairs(one, other):
        for i, pair in enumerate(pairs):
            yield from _differing(*pair, f"{place}[{i}]")
    elif one != other:
        yield place, one, other


def _pairs(one: Any, other: Any) -> list[tuple[Any, Any]]:
    """The pairs of two lists of as many objects; of anything else, none."""
    if not isinstance(one, list) or not isinstance(other, list) or len(one) != len(other):
        return []
    pairs = list(zip(one, other, strict=True))
    return pairs if all(isinstance(x, Mapping) for pair in pairs for x in pair) else []


def trains_others(saved: Mapping[str, Any], record: Mapping[str, Any]) -> bool:
    """Whether other parameters are trained than those of a checkpoint's JSON part."""
    return (record_in(saved) or {}).get("trainable") != record.get("trainable")


def _tell_trainable(was: Any, now: Any, found: Compared) -> None:
    """Tells two lists of what is trained apart; None: all."""
    one, other = (_said_of_names(*pair) for pair in ((was, now), (now, was)))
    found.changes.append(Change("trainable", one, other))


def _said_of_names(names: Sequence[str] | None, others: Sequence[str] | None) -> str:
    """How many parameters are trained, and the first of those that are not among the others."""
    if names is None:
        return "all parameters"
    apart = [name for name in names if name not in (others or ())]
    more = f" and {len(apart) - _SHOWN} more" if len(apart) > _SHOWN else ""
    listed = f", among them {', '.join(apart[:_SHOWN])}{more}" if apart else ""
    return f"{len(names)} parameters{listed}"


# -------------------------------------------------------------------------------------- schedule


def _compare_schedule(then: Mapping[str, Any], rows: np.ndarray, found: Compared) -> None:
    """Compares the rows of the steps done: those that are kept, and a digest of all.

    The weights' columns begin with what the config says, and follow its schedulers: where that has
    changed, it is said already.
    """
    steps = min(then["steps"], len(rows))
    if steps == then["steps"] and rows_digest(rows[:steps]) == then["digest"]:
        return
    kept = {int(k): row for k, row in then["rows"].items() if int(k) <= steps}
    explained = [found.has((f"{k}_weight", f"{k}_weight_scheduler")) for k in _WEIGHTS]
    before = len(found.changes)
    columns = min([rows.shape[1], *map(len, kept.values())])
    for column in range(columns):
        name = _COLUMNS[column] if column < len(_COLUMNS) else f"scheduled number {column}"
        pairs = {k: (row[column], float(rows[k - 1][column])) for k, row in kept.items()}
        first = next((k for k, pair in pairs.items() if not np.isclose(*pair, 1e-6, 1e-7)), None)
        is_explained = (
            explained[column] if column < 2 else column > 2 and found.has(_ALSO_SCHEDULED)
        )
        if first is not None and not is_explained:
            found.add("schedule", *pairs[first], f", {name} at step {first}")
    if len(found.changes) == before and not any(explained):
        found.unknown.append(f"the schedule, beyond 6 digits at {len(kept)} of {steps} steps")


# ------------------------------------------------------------------------ batches and the teacher


def _compare_batch(
    was: Mapping[str, Any], ahead: Ahead, task: str, where: str, found: Compared
) -> None:
    """Compares inputs, their axes and kinds of numbers, and the rows of a batch; lengths may differ."""
    one, other = _inputs(was["batch"]), _inputs(outline(ahead.batches[task]))
    if one.keys() != other.keys():
        was_of, now_of = (", ".join(sorted(x)) for x in (one, other))
        found.changes.append(Change("batch", was_of, now_of, f", inputs{where}"))
    for name in sorted(one.keys() & other.keys()):
        if not _are_alike(one[name], other[name]):
            found.add("batch", one[name], other[name], f", {name}{where}")
    rows = ahead.rows[task]
    if was["rows"] is None or (rows < was["rows"] and ahead.is_last):
        found.unknown.append(f"rows of a batch{where}: this one may be the last of its epoch")
    else:
        found.add("batch", was["rows"], rows, f", rows{where}")


def _inputs(outlined: Mapping[str, str]) -> dict[str, str]:
    """The inputs of a batch; the teacher's outputs may come along or not."""
    return {k: v for k, v in outlined.items() if k.split("/")[0] != "teacher_cache"}


def _are_alike(was: str, now: str) -> bool:
    kinds = {_kind_of_number(was), _kind_of_number(now)}
    return axes(was) == axes(now) and (len(kinds) == 1 or kinds == {"bool", "int"})


def _kind_of_number(kind: str) -> str:
    if axes(kind) < 0:
        return "flag"
    return next((name for name in ("bool", "int", "float") if name in kind.split("[")[0]), kind)


def _compare_weights(
    was: Mapping[str, Any], now: Mapping[str, Any], where: str, found: Compared
) -> None:
    one, other = (_said_of_weights(x["weights"]) for x in (was, now))
    if one != other:
        found.changes.append(Change("teacher", one, other, f", weights{where}"))


def _said_of_weights(weights: Mapping[str, Any]) -> str:
    types = ", ".join(f"{n} {kind}" for kind, n in weights["types"].items()) or "no"
    return f"{types} arrays with the digest {weights['digest'][:12]}"


# ------------------------------------------------------------------------------------- functions


def _compare_functions(
    saved: Mapping[str, Any], record: Mapping[str, Any], ahead: Ahead, found: Compared
) -> None:
    """Compares teacher, student, loss and optimizer, as far as what has changed already lets them."""
    then = saved["job"]
    before = list(found.changes)
    changed = {change.name for change in before}
    if reason := _incomparable(saved, ahead, changed):
        found.unknown.append(f"the functions of models, loss and optimizer ({reason})")
        return
    compare = _compare_traces
    if then["versions"] != record["versions"]:
        compare = _compare_probes
        libraries = _versions(then["versions"], record["versions"])
        found.unknown.append(f"the functions of teacher and student ({libraries})")
    for name in _in_both(then["tasks"], record["tasks"]):
        where = f" of task {name!r}" if name else ""
        was, now = then["tasks"][name], record["tasks"][name]
        if was["batch"] != now["batch"]:
            found.unknown.append(f"the functions of models and loss{where} (the inputs are others)")
            continue
        parts = ["teacher", "student", "loss"]
        if changed & {"train_mode", "trainable"}:
            parts.remove("student")
        if changed & {*_OF_LOSS}:
            parts.remove("loss")
            found.unknown.append(f"the functions of the loss{where} (its config has changed)")
        else:
            _compare_plans(was["plan"], now["plan"], where, found)
        compare(parts, was, now, where, found)
    if any(c.name == "intermediate_matches" and c.place[-5:] in ("", ".proj") for c in before):
        found.unknown.append("the function of the optimizer (its config has changed)")
    elif "trainable" in changed:
        found.unknown.append("the functions of student and optimizer (trainable has changed)")
    else:
        compare(["optimizer"], then, record, "", found)


def _incomparable(saved: Mapping[str, Any], ahead: Ahead, changed: Collection[str]) -> str:
    """Why no function can be compared, or ''."""
    if {*_HALVES} & {*changed}:
        return "the precision has changed"
    program = next(iter(ahead.prepared.programs.values()))
    mine = {
        f"{item}/{part}/{name}": kind_of(leaf)
        for part, tree in zip(("params", "state"), program.variables, strict=True)
        for item, items in tree.items()
        for name, leaf in named(items).items()
    }
    there = {
        name: text.split(" ")[0]
        for name, text in saved["digests"].items()
        if name.split("/")[0] in ("student", "projections")
    }
    return "" if there == mine else "they have other arrays"


def _versions(was: Mapping[str, str], now: Mapping[str, str]) -> str:
    return ", ".join(f"{k} {v} then, {now.get(k)} now" for k, v in was.items() if now.get(k) != v)


def _compare_plans(was: list[str], now: list[str], where: str, found: Compared) -> None:
    if was != now:
        one, other = (
            "; ".join(line for line in a if line not in b) or "without it"
            for a, b in ((was, now), (now, was))
        )
        found.changes.append(Change("loss", one, other, where))


def _compare_traces(
    parts: Sequence[str],
    was: Mapping[str, Any],
    now: Mapping[str, Any],
    where: str,
    found: Compared,
) -> None:
    for part in parts:
        one, other = was[part], now[part]
        if part == "loss" and one["inputs"] != other["inputs"]:
            found.unknown.append(f"the functions of the loss{where} (the models give it others)")
        elif one["digest"] != other["digest"]:
            change = Change(part, *_said_of_traces(one, other), where, _TRACED)
            found.changes.append(change)


def _said_of_traces(was: Mapping[str, Any], now: Mapping[str, Any]) -> tuple[str, str]:
    """What two traces have that the other has not: operations by number, constants, or only digests."""

    def said(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
        counts, there = one["counts"], other["counts"]
        found = [f"{k} ×{counts.get(k, 0)}" for k in _differing_keys(counts, there)]
        found += [f"{x:g}" for x in one["numbers"] if x not in other["numbers"]]
        more = [f"{len(found) - _SHOWN} more"] if len(found) > _SHOWN else []
        return ", ".join([*found[:_SHOWN], *more])

    one, other = said(was, now), said(now, was)
    if one and other:
        return one, other
    return f"{was['digest'][:12]} {one}".strip(), f"{now['digest'][:12]} {other}".strip()


def _differing_keys(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    return [key for key in sorted({*one, *other}) if one.get(key) != other.get(key)]


def _compare_probes(
    parts: Sequence[str],
    was: Mapping[str, Any],
    now: Mapping[str, Any],
    where: str,
    found: Compared,
) -> None:
    """Compares what the loss and the optimizer give on made-up arrays."""
    for part in ("loss", "optimizer"):
        if part not in parts:
            continue
        one, other = was["probes"].get(part), now["probes"].get(part)
        if not one or not other or one.keys() != other.keys():
            found.unknown.append(f"the functions of the {part}{where}, which cannot be tried")
            continue
        far = [k for k in one if not _are_close(one[k], other[k])]
        if far:
            found.add(part, one[far[0]], other[far[0]], f"{where}, {far[0]} of made-up arrays")


def _are_close(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return bool(np.isclose(one, other, _CLOSE, _CLOSE))
