"""A look at a model's parameters: how many, where, how much memory, and which decay."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

_INDENT = "  "
_MEBIBYTE = 1024 * 1024


def decay_mask(params: Any) -> Any:
    """Which parameters decay: all but biases and what norms scale by, as TextBrewer's scripts have it.

    For ``functools.partial(optax.adamw, weight_decay=0.01, mask=jaxbrewer.decay_mask)``: it is right
    for the student's parameters and for those of each projection.

    Args:
        params: a tree of parameters, with dotted names or nested; they are told by their names:
            ``bias``, ``scale``, and whatever lies in a module with ``norm`` in its name.

    Returns:
        A tree like it, True where a parameter decays.
    """

    def decays(path: Any, leaf: Any) -> bool:
        *modules, name = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        return name not in ("bias", "scale") and not any("norm" in x.lower() for x in modules)

    return jax.tree_util.tree_map_with_path(decays, params)


@dataclasses.dataclass
class LayerNode:
    """One line of `display_parameters`: a module, or an array where there are no children.

    ``value`` is the number of parameters in it and their memory in MB (2²⁰ bytes), children
    included; an array that was counted before is ``(0, 0.0)`` and ends in ``(shared)``.
    ``node["encoder"]["layer"]`` walks down, ``"encoder" in node`` asks.
    """

    name: str
    fullname: str
    own: tuple[int, float] = (0, 0.0)
    children: dict[str, "LayerNode"] = dataclasses.field(default_factory=dict)

    @property
    def value(self) -> tuple[int, float]:
        """The number of parameters and their MB, children included."""
        values = [self.own, *(child.value for child in self.children.values())]
        return sum(count for count, _ in values), sum(memory for _, memory in values)

    def __getitem__(self, key: str) -> "LayerNode":
        return self.children[key]

    def __contains__(self, key: object) -> bool:
        return key in self.children

    def format(self, max_level: int | None = None) -> str:
        """The table, down to ``max_level`` levels below this node (all when ``None``)."""
        lines = list(self._lines(0, max_level))
        width = max(len(label) for label, *_ in lines) + 1
        total = self.value[0]
        rows = [f"{'LAYER NAME':<{width}}\t{'#PARAMS':>15}\t{'RATIO':>10}\t{'MEM(MB)':>8}"]
        for label, node, has_numbers in lines:
            if has_numbers:
                count, memory = node.value
                ratio = count / total if total else 0.0
                rows.append(f"{label + ':':<{width}}\t{count:15,d}\t{ratio:>10.2%}\t{memory:>8.2f}")
            else:
                rows.append(f"{label:<{width}}")
        return "\n" + "\n".join(rows) + "\n"

    def _lines(self, level: int, max_level: int | None) -> Iterator[tuple[str, "LayerNode", bool]]:
        """Label, node and whether numbers are shown; those of an only child stand for both."""
        is_last = level == max_level
        yield f"{_INDENT * level}--{self.name}", self, is_last or len(self.children) != 1
        if not is_last:
            for child in self.children.values():
                yield from child._lines(level + 1, max_level)


def display_parameters(model: Any, max_level: int | None = None) -> tuple[str, LayerNode]:
    """The table of a model's parameters, and the tree it shows.

    ``model`` is an ``nnx.Module``; or any object with ``params`` or ``variables``, such as a
    wrapped Linen module or function; or a mapping, list or tuple of arrays, nested as it may be.
    Whatever the model keeps is counted, running statistics too, except random keys and their
    counters. An array that appears twice is counted where it comes first and marked ``(shared)``
    afterwards. A node with one child shows no numbers of its own.

    The layout is TextBrewer's; names come from the model's own structure, so that a torch
    ``weight`` may be a ``kernel`` here.

    Raises ``TypeError`` for anything else, ``ValueError`` for a ``max_level`` below 0.
    """
    if max_level is not None and max_level < 0:
        raise ValueError(f"max_level={max_level}, expected 0 or more, or None for all levels")
    root = LayerNode("model", "model")
    _grow(root, "", _structure_of(model), set())
    return root.format(max_level), root


def _structure_of(model: Any) -> Any:
    """What holds the arrays."""
    if isinstance(model, nnx.Module | Mapping | list | tuple):
        return model
    if isinstance(model, linen.Module):
        raise TypeError("a Linen module holds no parameters: give the variables of its init()")
    for attribute in ("variables", "params"):
        held = getattr(model, attribute, None)
        if held is not None and not callable(held):
            return held
    raise TypeError(
        f"cannot find parameters in a {type(model).__name__}: give an nnx.Module, an object with "
        "'params' or 'variables', or a mapping of arrays"
    )


def _grow(node: LayerNode, path: str, value: Any, seen: set[int]) -> None:
    """Adds what ``value`` holds below ``node``."""
    for name, child in _children_of(value):
        fullname = f"{path}.{name}" if path else name
        if (array := _array_in(child)) is not None:
            node.children[name] = _leaf(name, fullname, array, seen)
            continue
        below = LayerNode(name, fullname)
        _grow(below, fullname, child, seen)
        if below.children:
            node.children[name] = below


def _leaf(name: str, fullname: str, array: Any, seen: set[int]) -> LayerNode:
    """A node for an array, which ``seen`` tells whether it was counted before."""
    if id(array) in seen:
        return LayerNode(f"{name}(shared)", f"{fullname}(shared)")
    seen.add(id(array))
    count = int(np.prod(array.shape))
    return LayerNode(name, fullname, (count, count * array.dtype.itemsize / _MEBIBYTE))


def _array_in(value: Any) -> Any:
    """The array that a value is or wraps, or None."""
    if isinstance(value, nnx.RngState):
        return None
    if isinstance(value, nnx.Variable):
        value = value.get_value()
    if not isinstance(value, jax.Array | np.ndarray | np.generic | jax.ShapeDtypeStruct):
        return None
    return None if jax.dtypes.issubdtype(value.dtype, jax.dtypes.prng_key) else value


def _children_of(value: Any) -> Iterator[tuple[str, Any]]:
    """Names and values one level down, in the order the model defines them."""
    if isinstance(value, nnx.RngState | nnx.RngStream | nnx.Rngs):
        return
    if isinstance(value, nnx.Module):
        order = {name: index for index, name in enumerate(vars(value))}
        children = ((str(name), child) for name, child in nnx.iter_children(value))
        yield from sorted(children, key=lambda child: order.get(child[0], len(order)))
        return
    if isinstance(value, nnx.Variable):
        value = value.get_value()
    if isinstance(value, Mapping):
        yield from ((str(name), child) for name, child in value.items())
    elif isinstance(value, list | tuple):
        yield from ((str(index), child) for index, child in enumerate(value))
    elif not jax.tree_util.all_leaves([value]):
        paths = jax.tree_util.tree_leaves_with_path(value, is_leaf=lambda x: x is not value)
        yield from (
            (jax.tree_util.keystr(path, simple=True, separator="."), child) for path, child in paths
        )
