"""An adaptor's dict → a checked one, whose entries have one form each.

An adaptor is the user's function ``(batch, model_outputs) -> dict``, which says what in a model's
outputs is what. It runs inside the compiled step, so it must be pure. Its keys, all optional:

========== ==========================================================================
logits      ``[batch, classes]`` or ``[batch, length, classes]``, one array or a list
logits_mask ``[batch, length]``: the positions whose logits count; one array or a list
losses      the model's own losses, scalars or arrays (their means are summed)
labels      ``[batch]`` or ``[batch, length]`` int: for ``probability_shift``
inputs_mask ``[batch, length]``: the positions whose features count
hidden      list of ``[batch, length, width]``, one a layer; the embeddings' output first
attention   list of ``[batch, heads, length, length]``, one a layer
query       list of ``[batch, heads, length, width of a head]``, one a layer; ``key`` and
            ``value`` likewise
embedding   ``[batch, width]``, one array or a list: a sentence encoder's vectors
========== ==========================================================================

A name appended to `presets.FEATURES` is a further list of arrays, one a layer.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from .. import presets
from ..data.batches import Batch, as_call, plain
from ..errors import AdaptorError, suggest
from .handle import Model

Results = dict[str, Any]
Adaptor = Callable[[Any, Any], Mapping[str, Any]]

_LISTS = ("logits", "logits_mask", "losses", "labels")
_SLIPS = {
    "loss": "losses",
    "attentions": "attention",
    "hidden_states": "hidden",
    "hiddens": "hidden",
    "mask": "inputs_mask",
    "attention_mask": "inputs_mask",
    "input_mask": "inputs_mask",
    "label": "labels",
    "logit": "logits",
    "queries": "query",
    "keys": "key",
    "values": "value",
}


@dataclass(frozen=True)
class Side:
    """A model with its adaptor: the teacher's side of a distillation, or the student's.

    Attributes:
        role: ``'T'``, ``'S'``, for several teachers ``'T[0]'``…, and '' for a model that is
            trained alone: names the side in errors.
        model: the model.
        adaptor: its adaptor.
        args: further keyword arguments for the model, from ``train(…, **args)``.
        capture: paths of submodules whose outputs are wanted too, under ``'captured'``.
    """

    role: str
    model: Model
    adaptor: Adaptor
    args: Mapping[str, Any]
    capture: tuple[str, ...] = ()

    def __call__(
        self, params: Any, state: Any, key: jax.Array, batch: Batch, train: bool
    ) -> tuple[Results, Any]:
        """Runs the model on a batch; returns the adaptor's results and the model's new state."""
        outputs, captured, state = self.forward(params, state, key, batch, train)
        return self.adapt(batch, outputs) | captured, state

    def forward(
        self, params: Any, state: Any, key: jax.Array, batch: Batch, train: bool
    ) -> tuple[Any, Results, Any]:
        """Runs the model alone; returns its outputs, what was captured, and its new state."""
        args, kwargs = as_call(plain(batch), self.args)
        inputs = params, state, key, args, kwargs, train
        if not self.capture:
            outputs, state = self.model.apply(*inputs)
            return outputs, {}, state
        model: Any = self.model
        (outputs, captured), state = model.apply(*inputs, capture=self.capture)
        arrays = {path: self._array(path, captured.get(path)) for path in self.capture}
        return outputs, {"captured": arrays}, state

    def adapt(self, batch: Batch, outputs: Any) -> Results:
        """Runs and checks the adaptor alone: for outputs that were computed before."""
        return freeze(self.adaptor(plain(batch), outputs), self.role)

    def _array(self, path: str, output: Any) -> Any:
        """A submodule's output as one array: of a tuple, its first item."""
        first = output[0] if isinstance(output, tuple | list) and output else output
        if not _is_array(first):
            raise AdaptorError(
                f"{model_name(self.role)}'s submodule {path!r} "
                + ("is not called" if output is None else f"returns a {type(output).__name__}")
                + "; custom_matches need one that returns an array, or a tuple that begins with one"
            )
        return first


def check_adaptor(adaptor: Any, name: str) -> None:
    """Refuses an adaptor that cannot be called."""
    if not callable(adaptor):
        raise TypeError(
            f"{name} is a {type(adaptor).__name__}; it must be a function "
            "(batch, model_outputs) -> dict"
        )


def model_name(role: str) -> str:
    """What a side's model is called in errors: ``model_S``, ``model_T[0]``, or a trainer's ``model``."""
    return f"model_{role}" if role else "model"


def adaptor_name(role: str) -> str:
    """What a side's adaptor is called in errors."""
    return f"adaptor_{role}" if role else "adaptor"


def adaptor_keys() -> list[str]:
    """The keys an adaptor may return, features appended to `presets.FEATURES` included."""
    return list(dict.fromkeys([*presets.ADAPTOR_KEYS, *presets.FEATURES]))


def freeze(results: Any, role: str) -> Results:
    """Checks an adaptor's dict and gives every entry its one form.

    ``logits``, ``logits_mask``, ``losses`` and ``labels`` become tuples; features become tuples of
    arrays or None; entries that are None are left out.

    Raises:
        AdaptorError: one, listing everything that is wrong.
    """
    if not isinstance(results, Mapping):
        raise AdaptorError(
            f"{adaptor_name(role)} returned a {type(results).__name__}; it must return a dict with some "
            f"of the keys {', '.join(adaptor_keys())}"
        )
    wrong: list[str] = []
    frozen: Results = {}
    known = adaptor_keys()
    for name, value in results.items():
        if name not in known:
            fix = f"did you mean {_SLIPS[name]!r}?" if name in _SLIPS else suggest(name, known)
            wrong.append(f"{adaptor_name(role)} returned an unknown key {name!r}: {fix}")
        elif value is not None:
            frozen[name] = _one_form(name, value, role, wrong)
    if wrong:
        raise AdaptorError("\n".join(wrong))
    return frozen


def _one_form(name: str, value: Any, role: str, wrong: list[str]) -> Any:
    what = f"{adaptor_name(role)}: {name!r}"
    if name == "inputs_mask":
        if not _is_array(value):
            wrong.append(f"{what} must be one array [batch, length], not a {type(value).__name__}")
            return None
        return value
    if name in _LISTS:
        items = tuple(value) if isinstance(value, list | tuple) else (value,)
        if not items:
            wrong.append(f"{what} is an empty list; leave the key out, or set it to None")
        for i, item in enumerate(items):
            if not (_is_array(item) or (name == "losses" and isinstance(item, int | float))):
                hint = " (did the model get the labels?)" if name == "losses" else ""
                wrong.append(f"{what}[{i}] is a {type(item).__name__}, not an array{hint}")
        return tuple(jnp.asarray(x) if isinstance(x, int | float) else x for x in items)
    if name == "embedding" and _is_array(value):
        return (value,)
    if not isinstance(value, list | tuple):
        shape = f" {list(value.shape)}" if _is_array(value) else f" {type(value).__name__}"
        wrong.append(
            f"{what} must be a list with one array a layer, not a single{shape}: indexing it by "
            "layer would take examples of the batch. Return [array], or the model's whole list"
        )
        return None
    for i, item in enumerate(value):
        if item is not None and not _is_array(item):
            wrong.append(f"{what}[{i}] is a {type(item).__name__}, not an array")
    return tuple(value)


def _is_array(value: Any) -> bool:
    return hasattr(value, "shape") and hasattr(value, "dtype")
