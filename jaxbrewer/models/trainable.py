"""Which of a model's parameters are trained: from names, patterns and filters to leaves.

A parameter has a dotted name (``encoder.layer.0.attention.query.kernel``). What is to be trained is
said by

- a path: ``'encoder.layer.0'``, all below it too;
- a pattern of `fnmatch`, in which ``*`` also crosses dots: ``'encoder.layers.*.attention*'``, and all
  below what it fits too;
- in an NNX model a type of variable, such as ``nnx.LoRAParam``, or another filter of NNX;
- in any model a function ``(path, parameter) -> bool``, the path being the name's parts;
- a sequence of these, in which there may be others: whatever one of them finds is trained.

An array that is tied goes by all its names: it is trained if one of them is found, and frozen only if
none is. What a frozen submodule keeps beside its parameters (batch statistics) stands still: that is
what belongs to a module of which no parameter is trained; to a module without any, as the module
around it.
"""

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, TypeAlias

import jax
from flax import nnx

from ..errors import explained
from .handle import Model, Named, fits, leaf_names, near_paths
from .linen_model import LinenModel

Selection: TypeAlias = str | type[nnx.Variable] | Callable[[tuple, Any], Any] | Sequence[Any]

_SHOWN = 8


@dataclass(frozen=True)
class Parting:
    """A model's parameters in two parts, each a dictionary by name; and what stands still.

    Attributes:
        names: of all leaves, in their order in the tree.
        structure: of the tree.
        trained: the names of those that are trained.
        still: the names of the leaves of the model's state that training does not change.
    """

    names: tuple[str, ...]
    structure: Any
    trained: frozenset[str]
    still: frozenset[str] = frozenset()

    def part(self, tree: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """The trained leaves of a tree like the parameters, and the frozen ones."""
        named = dict(zip(self.names, self.structure.flatten_up_to(tree), strict=True))
        frozen = {name: leaf for name, leaf in named.items() if name not in self.trained}
        return {name: named[name] for name in self.names if name in self.trained}, frozen

    def join(self, trained: Mapping[str, Any], frozen: Mapping[str, Any]) -> Any:
        """The way back."""
        named = {**trained, **frozen}
        return jax.tree.unflatten(self.structure, [named[name] for name in self.names])

    def steady(self, old: Any, new: Any) -> Any:
        """The model's state after a step, what stands still as it was."""
        if not self.still:
            return new
        leaves = zip(leaf_names(old), jax.tree.leaves(old), jax.tree.leaves(new), strict=True)
        kept = [o if name in self.still else n for name, o, n in leaves]
        return jax.tree.unflatten(jax.tree.structure(old), kept)


def part(
    model: Model, trainable: Selection | None, name: str, problems: list[str]
) -> Parting | None:
    """Finds the parameters that are to be trained.

    Args:
        model: the model.
        trainable: which, see the module; None: all.
        name: what the model is called in errors.
        problems: gets what is wrong.

    Returns:
        The parts; None where all are trained, or something is wrong.
    """
    if trainable is None:
        return None
    before = len(problems)
    entries = _entries(model)
    names = leaf_names(model.params)
    if len(set(names)) < len(names):
        twice = sorted({x for x in names if names.count(x) > 1})
        problems.append(f"trainable: {name} has two parameters named {twice[0]!r}; rename one")
    found: set[str] = set()
    for item in _items(trainable):
        found |= _found(item, entries, model, name, problems)
    if len(problems) > before or found == set(names):
        return None
    structure = jax.tree.structure(model.params)
    trained = frozenset(found)
    return Parting(tuple(names), structure, trained, _still(model, entries, trained))


def _entries(model: Model) -> list[Named]:
    """All parameters by all their names."""
    handle: Any = model
    if _is_nnx(model):
        return handle.named_parameters()
    named = zip(leaf_names(model.params), jax.tree.leaves(model.params), strict=True)
    return [Named(name, tuple(name.split(".")), leaf, name) for name, leaf in named]


def _is_nnx(model: Model) -> bool:
    return hasattr(model, "named_parameters")


def _items(trainable: Any) -> list[Any]:
    """What is in a sequence, and in the sequences in it."""
    if isinstance(trainable, str | bytes) or not isinstance(trainable, Sequence | Set):
        return [trainable]
    return [item for several in trainable for item in _items(several)]


def _found(
    item: Any, entries: list[Named], model: Model, name: str, problems: list[str]
) -> set[str]:
    """The leaves that one item of ``trainable`` finds."""
    said = f"trainable={_shown(item)}"
    is_meant: Callable[[Named], bool]
    if isinstance(item, str):
        is_meant = lambda entry: fits(item, entry.name)  # noqa: E731
    elif isinstance(item, type) and issubclass(item, nnx.Variable):
        if not _is_nnx(model):
            example = next((x.name for x in entries if "lora" in x.name.lower()), entries[0].name)
            problems.append(
                f"{said} is a type of NNX's variables, and the parameters of {name}, a "
                f"{type(model).__name__}, are plain arrays: say it by names, such as "
                f"trainable={example!r}, or a pattern of them"
            )
            return set()
        is_meant = lambda entry: isinstance(entry.value, item)  # noqa: E731
    elif callable(item) and not isinstance(item, type):
        is_meant = lambda entry: bool(item(entry.path, entry.value))  # noqa: E731
    else:
        problems.append(
            f"{said} is a {type(item).__name__}; expected a path, a pattern, an NNX filter such as "
            "nnx.LoRAParam, a function (path, parameter) -> bool, or a sequence of these"
        )
        return set()
    try:
        found = {entry.leaf for entry in entries if is_meant(entry)}
    except Exception as error:  # noqa: BLE001  the user's function may raise anything
        problems.append(f"{said} failed: {explained(error)}. It is called as (path, parameter)")
        return set()
    if not found:
        problems.append(f"{said} finds no parameter of {name}; {_near(item, entries)}")
    return found


def _shown(item: Any) -> str:
    if isinstance(item, str):
        return repr(item)
    return getattr(item, "__qualname__", None) or repr(item)


def _near(item: Any, entries: list[Named]) -> str:
    """What there is, for one that finds nothing."""
    if isinstance(item, str):
        return near_paths(item, [entry.name for entry in entries])
    kinds = dict.fromkeys(type(x.value).__name__ for x in entries)
    names = ", ".join(entry.name for entry in entries[:_SHOWN])
    more = f" and {len(entries) - _SHOWN} more" if len(entries) > _SHOWN else ""
    return f"there are {names}{more}, of the types {', '.join(kinds)}"


def _still(model: Model, entries: list[Named], trained: frozenset[str]) -> frozenset[str]:
    """The names of the leaves of the model's state that belong to submodules without a trained leaf.

    The state of a function is its own affair.
    """
    if isinstance(model, LinenModel):
        owners = {name: name.split(".")[1:-1] for name in leaf_names(model.state)}
    elif _is_nnx(model):
        names = leaf_names({"other": model.state["other"]})
        owners = {name: name.split(".")[1:-1] for name in names}
    else:
        return frozenset()
    named = [(entry.name.split("."), entry.leaf in trained) for entry in entries]
    return frozenset(name for name, owner in owners.items() if not _moves(owner, named))


def _moves(owner: list[str], named: list[tuple[list[str], bool]]) -> bool:
    """Whether the nearest module around that has parameters has a trained one."""
    for length in range(len(owner), -1, -1):
        below = [is_trained for name, is_trained in named if name[:length] == owner[:length]]
        if below:
            return any(below)
    return True
