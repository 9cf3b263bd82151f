"""The encoder that all transformers here share: embeddings, layers, and what is reported of them.

Arguments keep transformers' names and order, so that a tuple batch may be given as
``model(*batch)``. The shapes are the same in every model:

- ``input_ids``, ``token_type_ids``: integers ``(batch, length)``; token types default to 0;
- ``attention_mask``: ``(batch, length)``, or ``(batch, length, length)`` as query by key; not 0
  means visible; the default is all;
- ``position_ids``: integers ``(batch, length)`` or ``(1, length)``; the default counts from 0,
  in RoBERTa from past the padding id;
- ``inputs_embeds``: ``(batch, length, width)`` in place of ``input_ids``;
- ``output_hidden_states``, ``output_attentions``, ``output_attention_scores``, ``output_qkv``,
  ``return_dict``:
  ``None`` leaves it to the config. Scores take the place of probabilities in ``attentions``, and
  asking for them is asking for ``attentions``; `jaxbrewer.zoo.attention.attend` says what they are.
  ``output_qkv`` asks for ``query``, ``key`` and ``value``, as the dense layers of each layer's
  attention give them: before a rotation (ModernBERT), without what distances add (DeBERTa, MPNet).
  ``return_dict=False`` returns a plain tuple of what is present.

``model.train()`` turns dropout on, ``model.eval()`` off; a model is built in train mode.
"""

from typing import Any, ClassVar, Self, TypeVar, Unpack, cast

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Num

from jaxbrewer.zoo.attention import Reported, Weights, visible_keys
from jaxbrewer.zoo.blocks import Build, Embeddings, Encoder, Pooler, Stacked, Table
from jaxbrewer.zoo.configuration import ModelConfig, TransformerConfig
from jaxbrewer.zoo.hf import PretrainedModel
from jaxbrewer.zoo.outputs import BaseModelOutput, ModelOutput

_Output = TypeVar("_Output", bound=ModelOutput)


def as_asked(output: _Output, config: ModelConfig, return_dict: bool | None) -> Any:
    """The output, or its tuple where ``return_dict`` is off."""
    return output if either(return_dict, config.return_dict) else output.to_tuple()


def either(argument: bool | None, setting: bool) -> bool:
    """The argument, or the config's setting where it is ``None``."""
    return setting if argument is None else argument


def embedded_words(
    words: Table,
    input_ids: Int[Array, "batch length"] | None,
    inputs_embeds: Float[Array, "batch length width"] | None,
) -> Float[Array, "batch length width"]:
    """The words' embeddings, from ids or as given.

    Raises ``ValueError`` for neither or both, and for ids that are not integers of two axes.
    """
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    if input_ids is None:
        return jnp.asarray(inputs_embeds)
    input_ids = jnp.asarray(input_ids)
    if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
        raise ValueError(
            f"input_ids is {input_ids.dtype}{list(input_ids.shape)}, expected integers of "
            "shape (batch, length)"
        )
    return words(input_ids)


class EncoderModel(PretrainedModel):
    """An encoder: embeddings, a projection of them and a pooler where there is one, and layers.

    ``drop_attended`` says whether dropout is applied to what attention adds. Computes in ``dtype``
    (``param_dtype`` unless given); parameters are ``param_dtype``.

    Raises ``ValueError`` for a sequence longer than there are positions, and for shapes other than
    the module's docstring gives.
    """

    drop_attended: ClassVar[bool] = True
    embeddings: Any
    encoder: Any
    config: TransformerConfig
    embeddings_project: nnx.Linear | None = None
    pooler: Pooler | None = None

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.embeddings = self._new_embeddings(**build)
        self.encoder = self._new_encoder(**build)

    def _new_embeddings(self, **build: Unpack[Build]) -> nnx.Module:
        """The embeddings, which are called as `blocks.Embeddings` are."""
        sizes = self.config.sizes
        return Embeddings(sizes, position_pad_id=self._position_pad_id(), **build)

    def _new_encoder(self, **build: Unpack[Build]) -> nnx.Module:
        """The layers, which `_run` calls."""
        return Encoder(self.config.sizes, drop_attended=self.drop_attended, **build)

    @classmethod
    def without_pooler(cls, config: TransformerConfig, **build: Unpack[Build]) -> Self:
        """The model as a task head takes it that looks at the last layer."""
        return cls(config, **build)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_attention_scores: bool | None = None,
        output_qkv: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput:
        """Encodes a batch: ``last_hidden_state``, and ``pooler_output`` where there is a pooler."""
        output = self.encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_attention_scores=output_attention_scores,
            output_qkv=output_qkv,
        )
        return as_asked(output, self.config, return_dict)

    def encode(
        self,
        input_ids: Int[Array, "batch length"] | None,
        attention_mask: Num[Array, "..."] | None,
        token_type_ids: Int[Array, "batch length"] | None,
        position_ids: Int[Array, "#batch length"] | None,
        inputs_embeds: Float[Array, "batch length width"] | None,
        *,
        output_hidden_states: bool | None,
        output_attentions: bool | None,
        output_attention_scores: bool | None,
        output_qkv: bool | None,
    ) -> BaseModelOutput:
        """What a call computes, with the arguments in the same order in every model."""
        config = self.config
        scores = either(output_attention_scores, config.output_attention_scores)
        attentions = scores or either(output_attentions, config.output_attentions)
        words = self._words(input_ids, inputs_embeds)
        if position_ids is None:
            positions = self._positions(input_ids, words.shape[1])
        else:
            positions = self._given_positions(position_ids)
        embedded = self._embed(words, token_type_ids, positions)
        mask = None if attention_mask is None else jnp.asarray(attention_mask)
        if mask is not None and mask.ndim == 2 and mask.shape != embedded.shape[:2]:
            raise ValueError(
                f"attention_mask is {list(mask.shape)}, expected {list(embedded.shape[:2])} as the "
                "inputs are: pad both to one length"
            )
        weights: Weights = "probabilities" if attentions else None
        reported = Reported("scores" if scores else weights, either(output_qkv, config.output_qkv))
        stacked = self._run(embedded, mask, positions, reported)
        hidden = stacked.hidden[-1]
        by_layer = cast(Any, stacked.qkv if reported.qkv else ())
        query, key, value = zip(*by_layer, strict=True) if by_layer else (None, None, None)
        return BaseModelOutput(
            last_hidden_state=hidden,
            pooler_output=None if self.pooler is None else self.pooler(hidden),
            hidden_states=(
                stacked.hidden
                if either(output_hidden_states, config.output_hidden_states)
                else None
            ),
            attentions=cast(Any, stacked.weights) if attentions else None,
            query=query,
            key=key,
            value=value,
        )

    def _words(
        self,
        input_ids: Int[Array, "batch length"] | None,
        inputs_embeds: Float[Array, "batch length width"] | None,
    ) -> Float[Array, "batch length width"]:
        """The words' embeddings, after checking what shapes can tell."""
        words = embedded_words(self.embeddings.word_embeddings, input_ids, inputs_embeds)
        length, longest = words.shape[1], self.longest()
        if longest is not None and length > longest:
            raise ValueError(
                f"a sequence of {length} is longer than the {longest} positions there are "
                f"(max_position_embeddings={self.config.max_position_embeddings}): truncate it "
                "when tokenizing"
            )
        return words

    def _embed(
        self,
        words: Float[Array, "batch length width"],
        token_type_ids: Int[Array, "batch length"] | None,
        positions: Int[Array, "#batch length"],
    ) -> Float[Array, "batch length width"]:
        """The embedding output."""
        types = None if token_type_ids is None else jnp.asarray(token_type_ids)
        embedded = self.embeddings(words, types, positions)
        return embedded if self.embeddings_project is None else self.embeddings_project(embedded)

    def _run(
        self,
        embedded: Float[Array, "batch length width"],
        mask: Num[Array, "..."] | None,
        positions: Int[Array, "#batch length"],
        reported: Reported,
    ) -> Stacked:
        """What the layers make of the embeddings; positions count only where the model turns by them."""
        return self.encoder(embedded, visible_keys(mask), reported)

    def _position_pad_id(self) -> int | None:
        """The position of padding, where it has one of its own."""
        return None

    def longest(self) -> int | None:
        """How long a sequence may be, None where there is no end."""
        return self.config.max_position_embeddings

    def _positions(
        self, input_ids: Int[Array, "batch length"] | None, length: int
    ) -> Int[Array, "#batch length"]:
        """The positions where none are given."""
        return jnp.arange(length)[None]

    def _given_positions(
        self, position_ids: Int[Array, "#batch length"]
    ) -> Int[Array, "#batch length"]:
        """The positions where some are given."""
        return jnp.asarray(position_ids)


class PooledModel(EncoderModel):
    """An encoder with a pooler unless ``add_pooling_layer=False``; see `EncoderModel`."""

    def __init__(
        self,
        config: TransformerConfig,
        *,
        add_pooling_layer: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(config, **build)
        self.pooler = Pooler(config.sizes, **build) if add_pooling_layer else None

    @classmethod
    def without_pooler(cls, config: TransformerConfig, **build: Unpack[Build]) -> Self:
        """The model as a task head takes it that looks at the last layer."""
        return cls(config, add_pooling_layer=False, **build)
