"""The handle every model becomes: parameters, other state, and one pure ``apply``.

Three kinds of model are understood: an `nnx.Module` as it is, a Linen module through
`LinenModel`, any function through `FunctionModel`. Their parameters are flat dictionaries from a
dotted name to an array (a `FunctionModel` keeps the pytree it was given), so that optimizers,
checkpoints and tables can speak of ``encoder.layer.0.attention.query.kernel``.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from flax import nnx
from flax.traverse_util import flatten_dict, unflatten_dict

PyTree = Any


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
        """
        ...

    def write(self, params: PyTree, state: PyTree) -> None:
        """Puts trained arrays into the object the user passed."""
        ...

    def signature(self) -> inspect.Signature:
        """The call signature that inputs must fit."""
        ...


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

    def _nested(self, part: int, flat: Mapping[str, Any]) -> dict:
        return unflatten_dict({self._paths[part][name]: leaf for name, leaf in flat.items()})

    def apply(
        self, params: PyTree, state: PyTree, key: jax.Array, args: tuple, kwargs: dict, train: bool
    ) -> tuple[Any, PyTree]:
        """See `Model.apply`."""
        (outputs, _), state = self.apply_and_capture((), params, state, key, args, kwargs, train)
        return outputs, state

    def apply_and_capture(
        self,
        paths: Sequence[str],
        params: PyTree,
        state: PyTree,
        key: jax.Array,
        args: tuple,
        kwargs: dict,
        train: bool,
    ) -> tuple[tuple[Any, dict[str, Any]], PyTree]:
        """Runs the model and keeps what the submodules at `paths` returned.

        Returns:
            ``((outputs, {path: output}), new state)``; of a submodule that is called more than
            once, the last output.
        """
        module = nnx.merge(
            self._train_graph if train else self._eval_graph,
            self._nested(0, params),
            self._nested(1, _fold_keys(state["rngs"], key)),
            self._nested(2, state["other"]),
        )
        captured: dict[str, Any] = {}
        if paths:
            for path, submodule in nnx.iter_modules(module):
                name = ".".join(map(str, path))
                if name in paths:
                    _record_calls(submodule, name, captured)
        outputs = module(*args, **kwargs), captured
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

    def write(self, params: PyTree, state: PyTree) -> None:
        """See `Model.write`."""
        nnx.update(self.module, self._nested(0, params))
        if state["other"]:
            nnx.update(self.module, self._nested(2, state["other"]))

    def signature(self) -> inspect.Signature:
        """See `Model.signature`."""
        return inspect.signature(type(self.module).__call__.__get__(self.module))


def _record_calls(module: nnx.Module, name: str, captured: dict[str, Any]) -> None:
    """Lets a module, made for one call of the model, note what its ``__call__`` returns.

    `nnx.capture` does not see methods a class inherits, so the class itself is replaced.
    """
    base: Any = type(module)

    def recorded(self: Any, *args: Any, **kwargs: Any) -> Any:
        captured[name] = base.__call__(self, *args, **kwargs)
        return captured[name]

    object.__setattr__(module, "__class__", type(base.__name__, (base,), {"__call__": recorded}))


def _fold_keys(rngs: Mapping[str, jax.Array], key: jax.Array) -> dict[str, jax.Array]:
    salt = jax.random.bits(key)

    def fold(leaf: jax.Array) -> jax.Array:
        if not jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return leaf  # a counter
        keys = jax.vmap(lambda one: jax.random.fold_in(one, salt))(leaf.reshape(-1))
        return keys.reshape(leaf.shape)  # layers that are stacked hold one key each

    return {name: fold(leaf) for name, leaf in rngs.items()}


class LinenModel:
    """A Linen module and its variables.

    The module is called as ``module.apply(variables, *inputs, rngs={name: key, …})``. In train
    mode every collection but ``params`` (``batch_stats``, say) is mutable and carried along.

    Args:
        module: the module.
        variables: what ``module.init`` returned; holds the trained weights after training.
        train_argument: the keyword by which the module is told the mode: ``'train'`` or
            ``'training'`` (true while training), ``'deterministic'`` or
            ``'use_running_average'`` (true otherwise). Found in the signature of ``__call__`` if
            not given; ``None`` and none found: the module is called the same way in both modes.
        rngs: names of the random streams that get a key in train mode.
        id_limits: argument name → size of the table its ids look up; checked in each batch.
    """

    _INVERTED = ("deterministic", "use_running_average")
    _DIRECT = ("train", "training", "is_training")

    def __init__(
        self,
        module: Any,
        variables: Mapping,
        *,
        train_argument: str | None = None,
        rngs: Sequence[str] = ("dropout",),
        id_limits: Mapping[str, int] | None = None,
    ):
        if not isinstance(variables, Mapping) or "params" not in variables:
            given = list(variables) if isinstance(variables, Mapping) else type(variables).__name__
            raise ValueError(
                f"variables must be what module.init returned, a mapping with 'params'; got {given}"
            )
        self.module = module
        self.variables = native(dict(variables))
        names = inspect.signature(type(module).__call__).parameters
        if train_argument is None:
            known = (*self._DIRECT, *self._INVERTED)
            train_argument = next((name for name in known if name in names), None)
        elif train_argument not in names:
            raise ValueError(
                f"train_argument={train_argument!r} is not an argument of "
                f"{type(module).__name__}.__call__, which takes {', '.join(names)}"
            )
        self.train_argument = train_argument
        self._rngs = tuple(rngs)
        self.id_limits: Mapping[str, int] = dict(id_limits or {})
        self.params: PyTree = dotted(self.variables["params"])
        rest = dotted({k: v for k, v in self.variables.items() if k != "params"})
        # A tuple is what init sowed; it would grow with every step.
        self.state: PyTree = {k: v for k, v in rest.items() if not isinstance(v, tuple)}

    def _variables(self, params: PyTree, state: PyTree) -> dict:
        names = dotted_paths(self.variables)
        return unflatten_dict(
            {("params", *names["params"][name]): leaf for name, leaf in params.items()}
            | {names[None][name]: leaf for name, leaf in state.items()}
        )

    def apply(
        self, params: PyTree, state: PyTree, key: jax.Array, args: tuple, kwargs: dict, train: bool
    ) -> tuple[Any, PyTree]:
        """See `Model.apply`."""
        (outputs, _), state = self.apply_and_capture((), params, state, key, args, kwargs, train)
        return outputs, state

    def apply_and_capture(
        self,
        paths: Sequence[str] | None,
        params: PyTree,
        state: PyTree,
        key: jax.Array,
        args: tuple,
        kwargs: dict,
        train: bool,
    ) -> tuple[tuple[Any, dict[str, Any]], PyTree]:
        """As `NNXModel.apply_and_capture`; paths of None captures every submodule."""
        variables = self._variables(params, state)
        if self.train_argument is not None:
            mode = train ^ (self.train_argument in self._INVERTED)
            kwargs = {**kwargs, self.train_argument: mode}
        options: dict[str, Any] = {}
        mutable = [name for name in variables if name != "params"] if train else []
        if train:
            keys = jax.random.split(key, len(self._rngs))
            options["rngs"] = dict(zip(self._rngs, keys, strict=True))
        if paths is None or paths:
            options["capture_intermediates"] = lambda module, method: (
                method == "__call__" and (paths is None or ".".join(module.path) in paths)
            )
            mutable = [*mutable, "intermediates"]
        outputs, changed = self.module.apply(variables, *args, mutable=mutable, **options, **kwargs)
        calls = flatten_dict(dict(changed).pop("intermediates", {}))
        captured = {
            ".".join(path[:-1]): value[-1]
            for path, value in calls.items()
            if path[-1] == "__call__"
        }
        new = dotted({k: v for k, v in changed.items() if k != "intermediates"})
        return (outputs, captured), (
            {name: new.get(name, leaf) for name, leaf in state.items()} if train else state
        )

    def module_paths(self, args: tuple, kwargs: dict) -> list[str]:
        """The dotted paths of all submodules that a call with these inputs reaches."""

        def run(args: tuple, kwargs: dict) -> dict[str, Any]:
            key = jax.random.key(0)
            (_, captured), _ = self.apply_and_capture(
                None, self.params, self.state, key, args, kwargs, False
            )
            return captured

        return [path for path in jax.eval_shape(run, args, kwargs) if path]

    def path_of(self, module: Any) -> str | None:
        """None: Linen submodules are made anew in each call, so only paths name them."""
        return None

    def write(self, params: PyTree, state: PyTree) -> None:
        """See `Model.write`; the weights are then in ``variables`` (and in ``params``)."""
        self.params, self.state = params, state
        self.variables = self._variables(params, state)

    def signature(self) -> inspect.Signature:
        """See `Model.signature`."""
        signature = inspect.signature(type(self.module).__call__)
        skipped = {next(iter(signature.parameters)), self.train_argument}
        kept = [p for name, p in signature.parameters.items() if name not in skipped]
        return signature.replace(parameters=kept)


def dotted_paths(variables: Mapping) -> dict[str | None, dict[str, tuple]]:
    """Maps dotted names back to the paths they stand for: of ``params``, and of the rest."""
    paths = flatten_dict(variables)
    return {
        "params": {".".join(map(str, p[1:])): p[1:] for p in paths if p[0] == "params"},
        None: {".".join(map(str, p)): p for p in paths if p[0] != "params"},
    }


class FunctionModel:
    """A pure function and its parameters.

    ``apply(params, *inputs, **inputs)`` returns the outputs. If its signature names ``key``, it
    gets the step's random key; if it names ``train``, whether this is a training call. With
    `state`, it is called ``apply(params, state, …)`` and returns ``(outputs, new_state)``.

    Args:
        apply: the function.
        params: any pytree of arrays; holds the trained weights after training.
        state: a pytree of arrays that are carried along but not trained.
        id_limits: argument name → size of the table its ids look up; checked in each batch.
    """

    def __init__(
        self,
        apply: Callable[..., Any],
        params: PyTree,
        state: PyTree = None,
        *,
        id_limits: Mapping[str, int] | None = None,
    ):
        self.function = apply
        self.params = native(params)
        self.state = native(state)
        self.id_limits: Mapping[str, int] = dict(id_limits or {})
        self._takes = {"key", "train"} & set(inspect.signature(apply).parameters)

    def apply(
        self, params: PyTree, state: PyTree, key: jax.Array, args: tuple, kwargs: dict, train: bool
    ) -> tuple[Any, PyTree]:
        """See `Model.apply`."""
        extra = {"key": key, "train": train}
        kwargs = kwargs | {name: extra[name] for name in self._takes}
        if state is None:
            return self.function(params, *args, **kwargs), None
        outputs, new_state = self.function(params, state, *args, **kwargs)
        return outputs, new_state if train else state

    def write(self, params: PyTree, state: PyTree) -> None:
        """See `Model.write`."""
        self.params, self.state = params, state

    def signature(self) -> inspect.Signature:
        """See `Model.signature`."""
        signature = inspect.signature(self.function)
        given = 1 if self.state is None else 2
        kept = [p for p in list(signature.parameters.values())[given:] if p.name not in self._takes]
        return signature.replace(parameters=kept)


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


def as_model(model: Any, role: str = "model") -> Model:
    """Wraps what a user passes as a model.

    Args:
        model: an `nnx.Module`, or anything with the attributes of `Model`.
        role: what the argument is called in errors: ``'model_S'``.

    Raises:
        TypeError: for anything else, with the wrapper to use.
    """
    if isinstance(model, nnx.Module):
        return NNXModel(model)
    if isinstance(model, Model):
        return model
    kind = f"{type(model).__module__}.{type(model).__qualname__}"
    if isinstance(model, type):
        fix = f"{model.__name__} is the class itself: make an instance of it"
    elif hasattr(model, "init") and hasattr(model, "apply"):
        fix = "a Linen module comes with its variables: LinenModel(module, variables)"
    elif hasattr(model, "state_dict"):
        fix = "a torch module does not run here: load its weights into a model of jaxbrewer.zoo"
    elif callable(model):
        fix = "a function comes with its parameters: FunctionModel(apply, params)"
    else:
        fix = "give an nnx.Module, a LinenModel or a FunctionModel"
    raise TypeError(f"{role} is a {kind}; {fix}")
