"""An nnx.Module as a model."""

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
from flax import nnx
from flax.nnx.tracers import TraceState
from flax.traverse_util import flatten_dict, unflatten_dict

from .handle import EVERYTHING, Named, PyTree, holds_plain_values, native
from .lookups import bound_tables


class NNXModel:
    """An `nnx.Module`; training and evaluation are two graph definitions over the same arrays.

    Every random key the module holds (dropout's) is folded with the step's key, so the masks
    depend on the module's own seed, on `TrainingConfig.seed` and on the step, and on nothing else.
    The module given is left as it is until `write`.
    """

    def __init__(self, module: nnx.Module):
        self.module = module
        twin = nnx.merge(*nnx.split(module))
        nnx.pop(twin, nnx.Intermediate)  # what earlier calls sowed would grow with every step
        twin.train()
        train_graph, *states = nnx.split(twin, nnx.Param, nnx.RngState, ...)
        self._train_graph: Any = train_graph
        twin.eval()
        self._eval_graph: Any = nnx.split(twin, nnx.Param, nnx.RngState, ...)[0]
        parts = [flatten_dict(native(nnx.to_pure_dict(part))) for part in states]
        self._paths = [{".".join(map(str, path)): path for path in part} for part in parts]
        self.params, rng_state, other = (
            {name: part[path] for name, path in paths.items()}
            for part, paths in zip(parts, self._paths, strict=True)
        )
        self.state: PyTree = {"rngs": rng_state, "other": other}
        self.id_limits: Mapping[str, int] = getattr(module, "id_limits", {})

    @property
    def graph(self) -> Any:
        """What the module is in evaluation, beside its arrays; equal for equal modules."""
        return self._eval_graph

    def _nested(self, part: int, flat: Mapping[str, Any]) -> dict:
        return unflatten_dict({self._paths[part][name]: leaf for name, leaf in flat.items()})

    def apply(
        self,
        params: PyTree,
        state: PyTree,
        key: jax.Array,
        args: tuple,
        kwargs: dict,
        train: bool,
        capture: Sequence[str] = (),
    ) -> tuple[Any, PyTree]:
        """See `Model.apply`; of a submodule that is called more than once, the last output."""
        module = nnx.merge(
            self._train_graph if train else self._eval_graph,
            self._nested(0, params),
            self._nested(1, _fold_keys(state["rngs"], key)),
            self._nested(2, state["other"]),
        )
        bound_tables(module)
        captured = _Captured()
        takes_all = EVERYTHING in capture
        if capture:
            for path, submodule in nnx.iter_modules(module):
                name = ".".join(map(str, path))
                if name in capture or (takes_all and name):
                    change_outputs(submodule, functools.partial(_note, captured, name))
                if takes_all:
                    _keep_sown(submodule, captured, name)
        outputs = module(*args, **kwargs)
        if takes_all:
            outputs = outputs, {name: x for name, x in captured.items() if holds_plain_values(x)}
        elif capture:
            outputs = outputs, dict(captured)
        if not (train and state["other"]):
            return outputs, state
        after: Any = nnx.split(module, nnx.Param, nnx.RngState, ...)
        changed = flatten_dict(nnx.to_pure_dict(after[3]))  # values the call sowed are not kept
        other = {name: changed[path] for name, path in self._paths[2].items()}
        return outputs, {"rngs": state["rngs"], "other": other}

    def module_paths(self, args: tuple, kwargs: dict) -> list[str]:
        """The dotted paths of all submodules."""
        return [".".join(map(str, path)) for path, _ in nnx.iter_modules(self.module) if path]

    def path_of(self, module: Any) -> str | None:
        """The dotted path of a submodule given as an object, or None if it is none."""
        for path, submodule in nnx.iter_modules(self.module):
            if submodule is module:
                return ".".join(map(str, path))
        return None

    def named_parameters(self) -> list[Named]:
        """All parameters; those that are tied stand there by each of their names."""
        found = []
        for path, alias, variable in _variables(self.module):
            for leaf_path in self._paths[0].values():
                if leaf_path[: len(path)] == path:
                    name = (*alias, *leaf_path[len(path) :])
                    leaf = ".".join(map(str, leaf_path))
                    found.append(Named(".".join(map(str, name)), name, variable, leaf))
        return found

    def write(self, params: PyTree, state: PyTree) -> None:
        """See `Model.write`."""
        nnx.update(self.module, self._nested(0, params))
        if state["other"]:
            nnx.update(self.module, self._nested(2, state["other"]))

    def signature(self) -> inspect.Signature:
        """See `Model.signature`."""
        return inspect.signature(type(self.module).__call__.__get__(self.module))


def _variables(module: nnx.Module) -> list[tuple[tuple, tuple, nnx.Variable]]:
    """Every variable with its path, and with each path that leads to it: ``path, alias, variable``."""
    paths = {id(x): p for p, x in nnx.iter_graph(module) if isinstance(x, nnx.Variable)}
    found = [(p, p, x) for p, x in nnx.iter_graph(module) if isinstance(x, nnx.Variable)]
    others = ((paths[id(x)], alias, x) for alias, x in _walk(module) if id(x) in paths)
    return found + [entry for entry in others if entry[0] != entry[1]]


def _walk(node: Any, path: tuple = (), above: tuple = ()) -> Iterator[tuple[tuple, nnx.Variable]]:
    """The variables in a module or a container by every path; `above` are the nodes on the path."""
    if isinstance(node, nnx.Variable):
        yield path, node
        return
    children: dict[Any, Any] = {}
    if isinstance(node, nnx.Module):
        held = {k: x for k, x in vars(node).items() if isinstance(x, list | tuple | dict)}
        children = {**held, **dict(nnx.iter_children(node))}
    elif isinstance(node, Mapping):
        children = dict(node)
    elif isinstance(node, list | tuple):
        children = dict(enumerate(node))
    for name, child in children.items():
        if not any(child is x for x in (*above, node)):
            yield from _walk(child, (*path, name), (*above, node))


def change_outputs(module: nnx.Module, change: Callable[[Any], Any]) -> None:
    """Passes what a module's ``__call__`` returns through `change`, in this object alone.

    `nnx.capture` does not see methods a class inherits, so the class itself is replaced.
    """
    base: Any = type(module)

    def changed(self: Any, *args: Any, **kwargs: Any) -> Any:
        return change(base.__call__(self, *args, **kwargs))

    object.__setattr__(module, "__class__", type(base.__name__, (base,), {"__call__": changed}))


class _Captured(dict[str, Any]):
    """What was captured in a call, without what JAX transforms within it: that is gone afterwards."""

    def __init__(self) -> None:
        super().__init__()
        self._begun = TraceState()

    def keep(self, name: str, value: Any) -> None:
        """Notes a value, if it is one of the call itself."""
        if self._begun.is_valid():
            self[name] = value


def _keep_sown(module: nnx.Module, captured: _Captured, path: str) -> None:
    """Lets a module sow into `captured`, in this object alone; Flax's own way depends on its version."""
    base: Any = type(module)

    def append(before: tuple, value: Any) -> tuple:
        return (*before, value)

    def sow(
        self: Any,
        variable_type: Any,
        name: str,
        value: Any,
        reduce_fn: Callable[[Any, Any], Any] = append,
        init_fn: Callable[[], Any] = tuple,
        **how: Any,
    ) -> bool:
        where = f"{path}.{name}" if path else name
        captured.keep(where, reduce_fn(captured.get(where, init_fn()), value))
        return True

    object.__setattr__(module, "__class__", type(base.__name__, (base,), {"sow": sow}))


def _note(captured: _Captured, name: str, outputs: Any) -> Any:
    captured.keep(name, outputs)
    return outputs


def _fold_keys(rngs: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    salt = jax.random.bits(key)

    def fold(leaf: jax.Array) -> jax.Array:
        if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf  # a counter
        keys = jax.vmap(lambda one: jax.random.fold_in(one, salt))(leaf.reshape(-1))
        return keys.reshape(leaf.shape)  # layers that are stacked hold one key each

    return {name: fold(leaf) for name, leaf in rngs.items()}


def refuse_shared_variables(student: Any, teacher: Any) -> None:
    """Refuses NNX models that share variables, for training one would change the other.

    Sharing arrays is fine, since arrays do not change.

    Raises:
        ValueError: naming the variables, and how to part them.
    """
    if not (isinstance(student, nnx.Module) and isinstance(teacher, nnx.Module)):
        return
    named = {
        id(node): ".".join(map(str, path))
        for path, node in nnx.iter_graph(student)
        if isinstance(node, nnx.Variable)
    }
    shared = [named[id(node)] for _, node in nnx.iter_graph(teacher) if id(node) in named]
    if shared:
        raise ValueError(
            f"student and teacher share {', '.join(shared[:5])}{' …' if len(shared) > 5 else ''}: "
            "training the student would change the teacher. Give the student its own: "
            "student.part = nnx.clone(teacher.part)"
        )
