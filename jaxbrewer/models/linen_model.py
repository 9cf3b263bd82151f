"""A Linen module and its variables as a model."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import linen
from flax.traverse_util import flatten_dict, unflatten_dict

from .handle import EVERYTHING, PyTree, dotted, holds_plain_values, native
from .lookups import intercept


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
        sown = (name for name in rest if name not in self.state)
        self._sown_at_init = tuple(dict.fromkeys(name.partition(".")[0] for name in sown))

    def _variables(self, params: PyTree, state: PyTree) -> dict:
        names = dotted_paths(self.variables)
        return unflatten_dict(
            {("params", *names["params"][name]): leaf for name, leaf in params.items()}
            | {names[None][name]: leaf for name, leaf in state.items()}
        )

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
        takes_all = EVERYTHING in capture
        wanted: Any = {*capture}.__contains__ if capture else None
        if takes_all:
            wanted = bool  # all but the model itself, whose path is ''
        (outputs, captured), state = self._run(
            wanted, params, state, key, args, kwargs, train, sown=takes_all
        )
        if takes_all:
            captured = {name: x for name, x in captured.items() if holds_plain_values(x)}
        return ((outputs, captured) if capture else outputs), state

    def _run(
        self,
        wanted: Callable[[str], bool] | None,
        params: PyTree,
        state: PyTree,
        key: jax.Array,
        args: tuple,
        kwargs: dict,
        train: bool,
        *,
        sown: bool = False,
    ) -> tuple[tuple[Any, dict[str, Any]], PyTree]:
        """Runs the module and keeps what the submodules return whose paths are wanted, and what is sown."""
        variables = self._variables(params, state)
        if self.train_argument is not None:
            mode = train ^ (self.train_argument in self._INVERTED)
            kwargs = {**kwargs, self.train_argument: mode}
        options: dict[str, Any] = {}
        mutable = [name for name in variables if name != "params"] if train else []
        if train:
            keys = jax.random.split(key, len(self._rngs))
            options["rngs"] = dict(zip(self._rngs, keys, strict=True))
        if wanted is not None:
            options["capture_intermediates"] = lambda module, method: (
                method == "__call__" and wanted(".".join(module.path))
            )
            collections = self._sown_at_init if sown else ()
            mutable = [*dict.fromkeys([*mutable, *collections, "intermediates"])]
        with linen.intercept_methods(intercept):
            outputs, changed = self.module.apply(
                variables, *args, mutable=mutable, **options, **kwargs
            )
        after = flatten_dict(dict(changed)) if wanted is not None else {}
        captured = {
            ".".join(path[1:-1]): value[-1]
            for path, value in after.items()
            if path[0] == "intermediates" and path[-1] == "__call__"
        }
        if sown:
            captured |= {
                ".".join(path[1:]): value
                for path, value in after.items()
                if path[-1] != "__call__" and ".".join(path) not in state
            }
        new = dotted({k: v for k, v in changed.items() if k != "intermediates"})
        return (outputs, captured), (
            {name: new.get(name, leaf) for name, leaf in state.items()} if train else state
        )

    def module_paths(self, args: tuple, kwargs: dict) -> list[str]:
        """The dotted paths of all submodules that a call with these inputs reaches."""

        def run(args: tuple, kwargs: dict) -> dict[str, Any]:
            key = jax.random.key(0)
            (_, captured), _ = self._run(
                lambda path: True, self.params, self.state, key, args, kwargs, False
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
