"""What a model returns: one object read by attribute, by key or by position.

Shapes, in every class: ``loss`` is a scalar; ``hidden_states`` holds the embedding output and then
each layer's output, ``(batch, length, width)`` each; ``attentions`` holds one
``(batch, heads, length, length)`` for each layer; ``query``, ``key`` and ``value`` hold one
``(batch, heads, length, width of a head)`` for each layer. A field that was not asked for is ``None``.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeAlias, TypeVar

import jax
from jaxtyping import Array, Float

Heads: TypeAlias = tuple[Float[Array, "batch heads length each"], ...] | None
_Output = TypeVar("_Output", bound=type["ModelOutput"])
# Fields that a model returns only when asked, and the argument that asks for them.
_ASKED_BY = {
    "hidden_states": "output_hidden_states",
    "attentions": "output_attentions",
    **dict.fromkeys(("query", "key", "value"), "output_qkv"),
}


def register_output(cls: _Output) -> _Output:
    """Makes a dataclass of outputs a JAX pytree, so that a jitted function may return it."""
    names = [field.name for field in dataclasses.fields(cls)]
    jax.tree_util.register_dataclass(cls, data_fields=names, meta_fields=[])
    return cls


@dataclasses.dataclass(frozen=True)
class ModelOutput:
    """The base of all outputs: ``out.logits``, ``out["logits"]`` and ``out[0]`` are the same array.

    Positions count the fields that are present, in order, as in transformers: with labels
    ``out[0]`` is the loss, without them the logits. Iterating gives the *values* in that order
    (transformers iterates over the keys, a known trap in ``loss, logits = model(...)``);
    ``dict(out)`` and ``**out`` give names and values.
    """

    def to_tuple(self) -> tuple[Any, ...]:
        """The fields that are present, in order."""
        return tuple(self.values())

    def keys(self) -> list[str]:
        """The names of the fields that are present, in order."""
        fields = dataclasses.fields(self)
        return [field.name for field in fields if getattr(self, field.name) is not None]

    def values(self) -> list[Any]:
        """The fields that are present, in order."""
        return [getattr(self, name) for name in self.keys()]

    def items(self) -> list[tuple[str, Any]]:
        """Pairs of name and value of the fields that are present, in order."""
        return [(name, getattr(self, name)) for name in self.keys()]

    def get(self, name: str, default: Any = None) -> Any:
        """The field called ``name``, or ``default`` where it is absent."""
        return dict(self.items()).get(name, default)

    def __getitem__(self, key: int | slice | str) -> Any:
        if isinstance(key, int) and not -len(self) <= key < len(self):
            raise IndexError(
                f"no item {key} in this output, which has {', '.join(self.keys())} in this order; "
                "hidden_states and attentions come with output_hidden_states=True and "
                "output_attentions=True in the model's config"
            )
        if not isinstance(key, str):
            return self.to_tuple()[key]
        if key not in self:
            hint = f"; pass {_ASKED_BY[key]}=True" if key in _ASKED_BY else ""
            raise KeyError(f"no {key!r} in this output, which has {self.keys()}{hint}")
        return getattr(self, key)

    def __contains__(self, name: object) -> bool:
        return name in self.keys()

    def __iter__(self) -> Iterator[Any]:
        return iter(self.to_tuple())

    def __len__(self) -> int:
        return len(self.keys())


@register_output
@dataclasses.dataclass(frozen=True)
class BaseModelOutput(ModelOutput):
    """What an encoder without a head returns."""

    last_hidden_state: Float[Array, "batch length width"]
    pooler_output: Float[Array, "batch width"] | None = None
    hidden_states: tuple[Float[Array, "batch length width"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads length length"], ...] | None = None
    query: Heads = None
    key: Heads = None
    value: Heads = None

    def of_layers(self) -> dict[str, Any]:
        """The fields that hold one array a layer, as every other output has them."""
        return {name: getattr(self, name) for name in _ASKED_BY}


@register_output
@dataclasses.dataclass(frozen=True)
class SentenceEncoderOutput(ModelOutput):
    """What a sentence encoder returns."""

    embedding: Float[Array, "batch width"]
    last_hidden_state: Float[Array, "batch length width"] | None = None
    hidden_states: tuple[Float[Array, "batch length width"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads length length"], ...] | None = None
    query: Heads = None
    key: Heads = None
    value: Heads = None


@register_output
@dataclasses.dataclass(frozen=True)
class SequenceClassifierOutput(ModelOutput):
    """What a classifier of whole sequences returns."""

    loss: Float[Array, ""] | None = None
    logits: Float[Array, "batch labels"] | None = None
    hidden_states: tuple[Float[Array, "batch length width"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads length length"], ...] | None = None
    query: Heads = None
    key: Heads = None
    value: Heads = None


@register_output
@dataclasses.dataclass(frozen=True)
class TokenClassifierOutput(ModelOutput):
    """What a classifier of tokens returns."""

    loss: Float[Array, ""] | None = None
    logits: Float[Array, "batch length labels"] | None = None
    hidden_states: tuple[Float[Array, "batch length width"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads length length"], ...] | None = None
    query: Heads = None
    key: Heads = None
    value: Heads = None


@register_output
@dataclasses.dataclass(frozen=True)
class MaskedLMOutput(ModelOutput):
    """What a model of masked words returns."""

    loss: Float[Array, ""] | None = None
    logits: Float[Array, "batch length words"] | None = None
    hidden_states: tuple[Float[Array, "batch length width"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads length length"], ...] | None = None
    query: Heads = None
    key: Heads = None
    value: Heads = None


@register_output
@dataclasses.dataclass(frozen=True)
class QuestionAnsweringModelOutput(ModelOutput):
    """What a model of answer spans returns."""

    loss: Float[Array, ""] | None = None
    start_logits: Float[Array, "batch length"] | None = None
    end_logits: Float[Array, "batch length"] | None = None
    hidden_states: tuple[Float[Array, "batch length width"], ...] | None = None
    attentions: tuple[Float[Array, "batch heads length length"], ...] | None = None
    query: Heads = None
    key: Heads = None
    value: Heads = None
