"""The handle every model becomes: parameters, other state, and one pure ``apply``.

Three kinds of model are understood: an `nnx.Module` as it is, a Linen module through
`LinenModel`, any function through `FunctionModel`. Their parameters are flat dictionaries from a
dotted name to an array (a `FunctionModel` keeps the pytree it was given), so that optimizers,
checkpoints and tables can speak of ``encoder.layer.0.attention.query.kernel``.
"""

import fnmatch
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from flax.traverse_util import flatten_dict

from ..errors import suggest

PyTree = Any

EVERYTHING = "**"
"""See `Model.apply`."""


@runtime_checkable
class Model(Protocol):
    """What the train step needs of a model.

    Attributes:
        params: the trained arrays.
        state: arrays that are not trained: batch statistics, dropout's random keys.
        id_limits: argument name → number of rows in the table its integers look up.
    """

    params: PyTree
    state: PyTree
    id_limits: Mapping[str, int]

    def apply(
        self, params: PyTree, state: PyTree, key: jax.Array, args: tuple, kwargs: dict, train: bool
    ) -> tuple[Any, PyTree]:
        """Runs the model and returns its outputs and its new state.

        Args:
            params: as the attribute.
            state: as the attribute.
            key: a typed random key, a fresh one each call.
            args: positional inputs, from a batch that is a tuple.
            kwargs: keyword inputs, from a batch that is a dict, and `train`'s ``**args``.
            train: dropout on and batch statistics updated, or neither.

        A model whose submodules can be reached has a further argument ``capture=()``, paths of
        submodules; if there are some, the outputs are the pair ``(outputs, {path: what it
        returned})``. `EVERYTHING` among them stands for all submodules, and for what they sow, by the
        path of the submodule and the name: tuples of all values sown, as Flax has them. It then has
        ``module_paths`` and ``path_of`` too; see `NNXModel`. One whose parameters go by several names,
        or are of several types, has ``named_parameters``.
        """
        ...

    def write(self, params: PyTree, state: PyTree) -> None:
        """Puts trained arrays into the object the user passed."""
        ...

    def signature(self) -> inspect.Signature:
        """The call signature that inputs must fit."""
        ...


class Named(NamedTuple):
    """A parameter by one of its names.

    Attributes:
        name: the name.
        path: its parts.
        value: the array; in an NNX model the variable that holds it.
        leaf: its name among the model's parameters, which is another one where it is tied.
    """

    name: str
    path: tuple
    value: Any
    leaf: str


def leaf_names(tree: PyTree) -> list[str]:
    """The dotted names of a tree's leaves, in their order."""
    return [
        jax.tree_util.keystr(path, simple=True, separator=".")
        for path, _ in jax.tree_util.tree_leaves_with_path(tree)
    ]


def fits(pattern: str, name: str) -> bool:
    """Whether a dotted name, or what it lies below, fits a pattern of `fnmatch`."""
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(name, f"{pattern}.*")


def near_paths(pattern: str, names: Sequence[str]) -> str:
    """What there is near a dotted path or pattern that is none of the names, for an error.

    First what goes on where it begins well, then what it looks like, then the beginnings.
    """
    parts = [name.split(".") for name in names]
    wanted = pattern.split(".")
    for length in range(len(wanted) - 1, 0, -1):
        start = ".".join(wanted[:length])
        below = [x[length] for x in parts if len(x) > length and fits(start, ".".join(x[:length]))]
        if below:
            return f"below {start!r}: {suggest(wanted[length], dict.fromkeys(below))}"
    paths = dict.fromkeys(".".join(x[:length]) for x in parts for length in range(1, len(x) + 1))
    near = suggest(pattern, paths)
    if near.startswith("did you mean") or not names:
        return near
    return f"at the top there are {', '.join(dict.fromkeys(x[0] for x in parts))}"


def holds_plain_values(value: PyTree) -> bool:
    """Whether something that a submodule returned is made of arrays, numbers and text alone."""

    def is_plain(x: Any) -> bool:
        return isinstance(x, int | float | complex | str | bytes) or hasattr(x, "dtype")

    return all(map(is_plain, jax.tree.leaves(value)))


def dotted(tree: Mapping) -> dict[str, Any]:
    """Flattens a nested mapping to one level: ``{'a': {0: x}}`` → ``{'a.0': x}``."""
    return {".".join(map(str, path)): leaf for path, leaf in flatten_dict(dict(tree)).items()}


def native(tree: PyTree) -> PyTree:
    """A pytree with its numpy arrays in this machine's byte order, since JAX takes no other.

    One that has them so already is handed back itself, its dictionaries in the order they have.
    """

    def is_foreign(x: Any) -> bool:
        return isinstance(x, np.ndarray) and not x.dtype.isnative

    if not any(map(is_foreign, jax.tree.leaves(tree))):
        return tree
    return jax.tree.map(lambda x: x.astype(x.dtype.newbyteorder("=")) if is_foreign(x) else x, tree)
