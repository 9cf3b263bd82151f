"""Matches of any two submodules, by path or by object, without the models returning them."""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from typing import Any

from .. import presets
from ..configurations import checks
from ..errors import ConfigError, suggest
from ..models.handle import Model
from .plan import Match, Weight, named_loss, weight_of


@dataclass(frozen=True)
class CustomMatch:
    """Draws what a submodule of the student returns towards what one of the teacher returns.

    Of a submodule that returns a tuple, the first item is matched, or the one that stands behind a
    colon: ``'decoder.layers.1:1'`` is the second item of what it returns (a decoder's layer may return
    ``(cache, x)``), ``'decoder.layers.1:x'`` the value of that key of a dict. Of one that is called
    more than once, it is the last output.

    Args:
        module_T: the teacher's submodule: its path (``'bert.encoder.layer.3.attention'``), a
            pattern (``'bert.encoder.layer.*.attention'``: ``*`` stands for one part of a path,
            ``**`` for any number), with or without an item (``'bert.encoder.layer.*:1'``); or, in an
            NNX model, the module object itself.
        module_S: the student's. Patterns must find as many on both sides; they are matched in
            order.
        weight: of each of the losses in the total.
        loss: a name in `presets.MATCH_LOSS_MAP`, a list of a name and its options, or a function
            ``loss(S, T, mask=None)``; `mask` is the student's ``inputs_mask``.
        proj_func: a projection of the student's side: ``[name, dim_S, dim_T]``, made anew for
            each pair, or an `nnx.Module`; None for none.
        proj_group: optimizer options of the projection, such as ``{'lr': 1e-3}``.
        weight_scheduler: as of an `IntermediateMatch`.
    """

    module_T: Any
    module_S: Any
    weight: float
    loss: str | Sequence[Any] | Callable
    proj_func: Any = None
    proj_group: Mapping[str, Any] | None = None
    weight_scheduler: str | Sequence[Any] | None = "none"

    @classmethod
    def from_dict(cls, dict_object: Mapping[str, Any]) -> "CustomMatch":
        """Makes one from a dict of its fields.

        Raises:
            ConfigError: a ValueError that names every unknown or missing key.
        """
        names = [field.name for field in fields(cls)]
        required = [field.name for field in fields(cls) if field.default is MISSING]
        if problems := checks.keys(dict_object, names, required):
            raise ConfigError("custom match", problems)
        return cls(**dict_object)


def resolve_custom(
    matches: Sequence[CustomMatch],
    model_T: tuple[Model, tuple, dict],
    model_S: tuple[Model, tuple, dict],
    first: int,
    problems: list[str],
) -> tuple[list[Match], list[Any], list[Any]]:
    """Finds the submodules of custom matches.

    Args:
        matches: the matches.
        model_T: the teacher and a batch's positional and keyword arguments for it.
        model_S: the student, likewise.
        first: the number the first match's projection gets.
        problems: gets what is wrong.

    Returns:
        The resolved matches, and for each the projection asked for and its optimizer options.
    """
    found: list[Match] = []
    projections: list[Any] = []
    options: list[Any] = []
    for i, match in enumerate(matches):
        where = f"custom_matches[{i}]"
        paths_T = _find(f"{where}.module_T", match.module_T, *model_T, problems)
        paths_S = _find(f"{where}.module_S", match.module_S, *model_S, problems)
        loss, name = _loss(where, match.loss, problems)
        weight = _weight(where, match, problems)
        if not (paths_T and paths_S and loss and weight):
            continue
        if len(paths_T) != len(paths_S):
            problems.append(
                f"{where}: {match.module_T!r} finds {len(paths_T)} submodules of the teacher "
                f"({', '.join(paths_T[:4])}, …) and {match.module_S!r} {len(paths_S)} of the student "
                f"({', '.join(paths_S[:4])}, …); they are matched in order, so find as many"
            )
            continue
        for path_T, path_S in zip(paths_T, paths_S, strict=True):
            proj = match.proj_func
            shape = tuple(proj[:3]) if isinstance(proj, list | tuple) else None
            projection = None if proj is None else str(first + len(projections))
            tag = f"unweighted_custom_{name}_{path_S}_{path_T}"
            found.append(
                Match("captured", path_S, path_T, loss, name, weight, projection, shape, {}, tag)
            )
            projections.append(proj)
            options.append(match.proj_group or {})
    return found, projections, options


def _loss(where: str, loss: Any, problems: list[str]) -> tuple[Callable | None, str]:
    if callable(loss):
        return loss, getattr(loss, "__name__", type(loss).__name__)
    try:
        loss = checks.named(loss)
    except ValueError as error:
        problems.append(f"{where}.loss is {loss!r}: {error}, or a function")
        return None, str(loss)
    name = loss if isinstance(loss, str) else loss[0]
    return named_loss(presets.MATCH_LOSS_MAP, loss, f"{where}.loss", problems), name


def _weight(where: str, match: CustomMatch, problems: list[str]) -> Weight | None:
    try:
        return weight_of(match.weight, checks.weight_scheduler(match.weight_scheduler))
    except ValueError as error:
        problems.append(f"{where}.weight_scheduler is {match.weight_scheduler!r}: {error}")
        return None


def _find(
    where: str, module: Any, model: Model, args: tuple, kwargs: dict, problems: list[str]
) -> list[str]:
    """The paths a path, pattern or module object stands for."""
    handle: Any = model
    if not hasattr(handle, "module_paths"):
        problems.append(
            f"{where}: submodules of a {type(model).__name__} cannot be reached; let it return the "
            "feature, and use intermediate_matches"
        )
        return []
    if not isinstance(module, str):
        path = handle.path_of(module)
        if path is None:
            problems.append(
                f"{where} is a {type(module).__name__} that is not part of the model; give a path, or "
                "(in an NNX model) one of its own submodules"
            )
            return []
        return [path]
    paths = sorted(handle.module_paths(args, kwargs), key=_natural)
    wanted, colon, items = module.partition(":")
    pattern = _regex(wanted)
    hits = [path for path in paths if pattern.fullmatch(path)]
    if not hits:
        near = suggest(wanted, paths) if len(paths) < 12 else _near(wanted, paths)
        problems.append(f"{where}={module!r} finds no submodule; {near}")
    return [f"{path}{colon}{items}" for path in hits]


def _regex(pattern: str) -> re.Pattern:
    parts = []
    for part in pattern.split("."):
        parts.append(".+" if part == "**" else fnmatch.translate(part)[4:-3].replace(".*", "[^.]*"))
    return re.compile(r"\.".join(parts))


def _near(name: str, paths: Sequence[str]) -> str:
    """The paths nearest to a wrong one: first those that share its beginning."""
    parts = name.split(".")
    for length in range(len(parts) - 1, 0, -1):
        start = ".".join(parts[:length])
        inside = [p for p in paths if p.startswith(start + ".") and p.count(".") == length]
        if inside:
            return (
                f"below {start!r} there are {', '.join(p.rsplit('.', 1)[1] for p in inside[:12])}"
            )
    top = list(dict.fromkeys(path.split(".")[0] for path in paths))
    return f"{suggest(name, paths)} (at the top there are {', '.join(top[:12])})"


def _natural(path: str) -> list[tuple[int, int | str]]:
    return [(0, int(p)) if p.isdigit() else (1, p) for p in path.split(".")]
