"""A pure function and its parameters as a model."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import jax

from .handle import PyTree, native


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
        """See `Model.apply`; a function has no submodules to capture."""
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
