"""An adaptor's dict → a checked one, whose entries have one form each.

An adaptor is the user's function ``(batch, model_outputs) -> dict``, which says what in a model's
outputs is what. It runs inside the compiled step, so it must be pure. Its keys, all optional:

============= ==========================================================================
logits        ``[batch, classes]`` or ``[batch, length, classes]``, one array or a list
logits_mask   ``[batch, length]``: the positions whose logits count; one array or a list
losses        the model's own losses, scalars or arrays (their means are summed)
losses_mask   ``[batch]`` or ``[batch, length]``, as `losses`: which of their entries count
labels        ``[batch]`` or ``[batch, length]`` int: for ``probability_shift``
inputs_mask   ``[batch, length]``: the positions whose features count
hidden        list of ``[batch, length, width]``, one a layer; the embeddings' output first
attention     list of ``[batch, heads, length, length]``, one a layer
query         list of ``[batch, heads, length, width of a head]``, one a layer; ``key`` and
              ``value`` likewise
embedding     ``[batch, width]``, one array or a list: a sentence encoder's vectors
sample_weight ``[batch]``, the student's: how much each example counts, in every term
============= ==========================================================================

A batch that is a dict may have a ``sample_weight`` for the adaptor alone: a model that does not name it
is not given it.

A name appended to `presets.FEATURES` is a further list of arrays, one a layer.

An adaptor with a third parameter named ``captured`` is called with what the submodules returned and
sowed in that forward pass, by path: ``captured["encoder.layers.1"]`` is what that submodule returned
(of several calls the last), ``captured["encoder.layers.1.scores"]`` what it sowed by that name, as Flax
keeps it: the tuple of all values.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from dataclasses import fields as fields_of
from typing import Any

import jax
import jax.numpy as jnp

from .. import presets
from ..data.batches import Batch, as_call, plain
from ..errors import AdaptorError, suggest
from .handle import EVERYTHING, Model, near_paths

Results = dict[str, Any]
Adaptor = Callable[..., Mapping[str, Any]]

_OUT_OF_REACH = (
    ", or only within nnx.scan, nnx.remat or the like, from where the model must return it itself"
)
WEIGHT = "sample_weight"
_LISTS = ("logits", "logits_mask", "losses", "losses_mask", "labels")
_ARRAYS = {"inputs_mask": "[batch, length]", WEIGHT: "[batch]"}
_SLIPS = {
    "loss": "losses",
    "attentions": "attention",
    "hidden_states": "hidden",
    "hiddens": "hidden",
    "mask": "inputs_mask",
    "attention_mask": "inputs_mask",
    "input_mask": "inputs_mask",
    "label": "labels",
    "loss_mask": "losses_mask",
    "sample_weights": "sample_weight",
    "weights": "sample_weight",
    "logit": "logits",
    "queries": "query",
    "keys": "key",
    "values": "value",
}


class Captured(dict[str, Any]):
    """What was captured in a forward pass of a side's model, by path."""

    def __init__(self, found: Mapping[str, Any], role: str):
        super().__init__(found)
        self._role = role

    def __missing__(self, path: str) -> Any:
        """Says what there is instead.

        Raises:
            AdaptorError: always.
        """
        near = near_paths(str(path), [*self])
        raise AdaptorError(
            f"{adaptor_name(self._role)}: nothing was captured at {path!r}; {near} (A submodule "
            f"that is there, and not captured, returns what is no array, number or text, is "
            f"not called{_OUT_OF_REACH})"
        )


@dataclass(frozen=True)
class Side:
    """A model with its adaptor: the teacher's side of a distillation, or the student's.

    Attributes:
        role: ``'T'``, ``'S'``, for several teachers ``'T[0]'``…, and '' for a model that is
            trained alone: names the side in errors.
        model: the model.
        adaptor: its adaptor.
        args: further keyword arguments for the model, from ``train(…, **args)``.
        capture: what submodules return that is wanted too, under ``'captured'``: their paths, and
            behind colons which item of it: ``'layers.1'``, ``'layers.1:1'``, ``'layers.1:x'``.
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
        return self.adapt(batch, outputs, captured) | self.matched(captured), state

    def forward(
        self, params: Any, state: Any, key: jax.Array, batch: Batch, train: bool
    ) -> tuple[Any, Captured | None, Any]:
        """Runs the model alone; returns its outputs, what was captured of it, and its new state."""
        args, kwargs = self.call(batch)
        inputs = params, state, key, args, kwargs, train
        paths = [name.partition(":")[0] for name in self.capture]
        if self.takes_captured:
            self._check_reachable()
            paths.append(EVERYTHING)
        if not paths:
            outputs, state = self.model.apply(*inputs)
            return outputs, None, state
        model: Any = self.model
        (outputs, captured), state = model.apply(*inputs, capture=tuple(dict.fromkeys(paths)))
        return outputs, Captured(captured, self.role), state

    def call(self, batch: Batch) -> tuple[tuple, dict]:
        """The model's arguments: the batch, without a ``sample_weight`` that the model does not name."""
        args, kwargs = as_call(plain(batch), self.args)
        if WEIGHT in kwargs and WEIGHT not in self.model.signature().parameters:
            del kwargs[WEIGHT]
        return args, kwargs

    @property
    def takes_captured(self) -> bool:
        """Whether the adaptor is given what was captured."""
        try:
            return "captured" in inspect.signature(self.adaptor).parameters
        except ValueError:  # of a function written in C, which does not tell
            return False

    def _check_parameters(self) -> None:
        try:
            signature = inspect.signature(self.adaptor)
        except ValueError:  # of a function written in C, which does not tell
            return
        try:
            signature.bind(None, None, **({"captured": None} if self.takes_captured else {}))
        except TypeError as error:
            raise AdaptorError(
                f"{adaptor_name(self.role)} takes {signature}: {error}. It is called as (batch, "
                "outputs), and with captured=… where it has a third parameter of that name"
            ) from error

    def _check_reachable(self) -> None:
        if not hasattr(self.model, "module_paths"):
            raise AdaptorError(
                f"{adaptor_name(self.role)} takes 'captured', and of a {type(self.model).__name__} "
                "nothing can be captured: let it return the feature, and read it from the outputs"
            )

    def adapt(self, batch: Batch, outputs: Any, captured: Captured | None = None) -> Results:
        """Runs and checks the adaptor alone; without `captured`, for outputs that were computed before."""
        self._check_parameters()
        if not self.takes_captured:
            return freeze(self.adaptor(plain(batch), outputs), self.role)
        if captured is None:
            raise AdaptorError(
                f"{adaptor_name(self.role)} takes 'captured', which is not there beside outputs that "
                "were computed before (teacher_cache): let the model return what it needs"
            )
        return freeze(self.adaptor(plain(batch), outputs, captured=captured), self.role)

    def matched(self, captured: Captured | None) -> Results:
        """The array that each name of `capture` stands for, under ``'captured'``; {} without any.

        Raises:
            AdaptorError: one, listing every name that stands for none.
        """
        if captured is None or not self.capture:
            return {}
        arrays, wrong = {}, []
        for name in self.capture:
            path, *items = name.split(":")
            try:
                if path not in captured:
                    raise ValueError(f"is not called{_OUT_OF_REACH}")
                arrays[name] = _array(path, captured[path], items)
            except ValueError as error:
                wrong.append(f"{model_name(self.role)}'s submodule {path!r} {error}")
        if wrong:
            raise AdaptorError("\n".join(wrong))
        return {"captured": arrays}


def _array(path: str, output: Any, items: Sequence[str]) -> Any:
    """What a submodule returned as one array: by its items, or of a tuple the first item.

    Raises:
        ValueError: it is none, with the items that there are.
    """
    for i, item in enumerate(items):
        there = _items(output)
        if item not in there:
            inside = "".join(f":{x}" for x in items[:i])
            raise ValueError(f"has no item {item!r} in what it returns{inside}, {_outline(output)}")
        output = there[item]
    name = ":".join([path, *items])
    first = output[0] if not items and isinstance(output, tuple | list) and output else output
    if _is_array(first):
        return first
    there = _items(output)
    example = next((key for key, x in there.items() if _is_array(x)), next(iter(there), None))
    hint = f"; name one of its items, such as '{name}:{example}'" if there else ""
    inside = "".join(f":{x}" for x in items)
    raise ValueError(
        f"returns{inside} {_outline(output)}, and custom_matches need one array, or a tuple that "
        f"begins with one{hint}"
    )


def _items(value: Any) -> dict[str, Any]:
    """The items of a tuple by number, of a dict by key, of an object of fields by name."""
    if isinstance(value, Mapping):
        return {str(key): item for key, item in value.items()}
    if isinstance(value, tuple | list):
        fields = getattr(value, "_fields", ())
        numbered = {str(i): item for i, item in enumerate(value)}
        return numbered | dict(zip(fields, value, strict=True)) if fields else numbered
    if is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in fields_of(value)}
    return {}


def _outline(value: Any) -> str:
    """A value by its kind and its items: ``a tuple of 0 (a dict), 1 (float32[4, 5])``."""
    if _is_array(value):
        return f"{value.dtype}{list(value.shape)}"
    shown = [
        f"{key} ({_outline(item) if _is_array(item) else _kind(item)})"
        for key, item in _items(value).items()
    ]
    return f"{_kind(value)} of {', '.join(shown)}" if shown else _kind(value)


def _kind(value: Any) -> str:
    return "None" if value is None else f"a {type(value).__name__}"


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
        what = "one array" if _is_array(results) else f"a {type(results).__name__}"
        raise AdaptorError(
            f"{adaptor_name(role)} returned {what}; it must return a dict with some of the keys "
            f"{', '.join(adaptor_keys())}"
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
    wrong += (
        [f"{adaptor_name(role)}: {problem}" for problem in _misfits(frozen)] if not wrong else []
    )
    if wrong:
        raise AdaptorError("\n".join(wrong))
    return frozen


def _misfits(frozen: Results) -> Iterator[str]:
    """What is wrong with the shapes of the weights of examples, and of the losses' masks."""
    losses, masks = frozen.get("losses", ()), frozen.get("losses_mask", ())
    if len(masks) not in (0, 1, len(losses)):
        yield f"'losses_mask' has {len(masks)} arrays for {len(losses)} 'losses'; give one, or one each"
        masks = ()
    masks = masks * len(losses) if len(masks) == 1 else masks
    for i, (loss, mask) in enumerate(zip(losses, masks, strict=False)):
        if loss.shape != mask.shape:
            yield (
                f"'losses_mask'[{i}] is {list(mask.shape)}, expected {list(loss.shape)} as 'losses'[{i}]: "
                "each entry's own loss, and whether it counts"
            )
    weight = frozen.get(WEIGHT)
    if weight is None:
        return
    rows = next((len(x) for x in (*frozen.get("logits", ()), *losses) if x.ndim), None)
    if weight.ndim != 1 or (rows is not None and len(weight) != rows):
        wanted = "[batch]" if rows is None else f"[{rows}]"
        yield f"'sample_weight' is {list(weight.shape)}, expected {wanted}: a number for each example"


def _one_form(name: str, value: Any, role: str, wrong: list[str]) -> Any:
    what = f"{adaptor_name(role)}: {name!r}"
    if name in _ARRAYS:
        if not _is_array(value):
            wrong.append(f"{what} must be one array {_ARRAYS[name]}, not a {type(value).__name__}")
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
