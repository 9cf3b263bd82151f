"""The encoder that all transformers here share: embeddings, layers, and what is reported of them.

Arguments keep transformers' names and order, so that a tuple batch may be given as
``model(*batch)``. The shapes are the same in every model:

- ``input_ids``, ``token_type_ids``: integers ``(batch, length)``; token types default to 0;
- ``attention_mask``: ``(batch, length)``, or ``(batch, length, length)`` as query by key; not 0
  means visible; the default is all;
- ``position_ids``: integers ``(batch, length)`` or ``(1, length)``; the default counts from 0,
  in RoBERTa from past the padding id;
- ``inputs_embeds``: ``(batch, length, width)`` in place of ``input_ids``;
- ``output_hidden_states``, ``output_attentions``, ``output_attention_scores``, ``return_dict``:
  ``None`` leaves it to the config. Scores take the place of probabilities in ``attentions``, and
  asking for them is asking for ``attentions``; `jaxbrewer.zoo.attention.attend` says what they are.
  ``return_dict=False`` returns a plain tuple of what is present.

``model.train()`` turns dropout on, ``model.eval()`` off; a model is built in train mode.
"""

from typing import Any, ClassVar, Self, TypeVar, Unpack, cast

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Num

from jaxbrewer.zoo.attention import Reported, visible_keys
from jaxbrewer.zoo.blocks import Build, Embeddings, Encoder, Pooler, Table
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

    ``token_types`` says whether token types are embedded, ``drop_attended`` whether dropout is
    applied to what attention adds. Computes in ``dtype`` (``param_dtype`` unless given);
    parameters are ``param_dtype``.

    Raises ``ValueError`` for a sequence longer than there are positions, and for shapes other than
    the module's docstring gives.
    """

    token_types: ClassVar[bool] = True
    drop_attended: ClassVar[bool] = True
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
        self.embeddings = Embeddings(
            config.sizes,
            token_types=self.token_types,
            position_pad_id=self._position_pad_id(),
            **build,
        )
        self.encoder = Encoder(config.sizes, drop_attended=self.drop_attended, **build)

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
    ) -> BaseModelOutput:
        """What a call computes, with the arguments in the same order in every model."""
        config = self.config
        scores = either(output_attention_scores, config.output_attention_scores)
        attentions = scores or either(output_attentions, config.output_attentions)
        embedded = self._embed(input_ids, token_type_ids, position_ids, inputs_embeds)
        mask = None if attention_mask is None else jnp.asarray(attention_mask)
        if mask is not None and mask.ndim == 2 and mask.shape != embedded.shape[:2]:
            raise ValueError(
                f"attention_mask is {list(mask.shape)}, expected {list(embedded.shape[:2])} as the "
                "inputs are: pad both to one length"
            )
        reported: Reported = "probabilities" if attentions else None
        reported = "scores" if scores else reported
        all_hidden, all_weights = self.encoder(embedded, visible_keys(mask), reported)
        hidden = all_hidden[-1]
        return BaseModelOutput(
            last_hidden_state=hidden,
            pooler_output=None if self.pooler is None else self.pooler(hidden),
            hidden_states=(
                all_hidden if either(output_hidden_states, config.output_hidden_states) else None
            ),
            attentions=cast(Any, all_weights) if attentions else None,
        )

    def _embed(
        self,
        input_ids: Int[Array, "batch length"] | None,
        token_type_ids: Int[Array, "batch length"] | None,
        position_ids: Int[Array, "#batch length"] | None,
        inputs_embeds: Float[Array, "batch length width"] | None,
    ) -> Float[Array, "batch length width"]:
        """The embedding output, after checking what shapes can tell."""
        words = embedded_words(self.embeddings.word_embeddings, input_ids, inputs_embeds)
        length, longest = words.shape[1], self._longest()
        if length > longest:
            raise ValueError(
                f"a sequence of {length} is longer than the {longest} positions there are "
                f"(max_position_embeddings={self.config.max_position_embeddings}): truncate it "
                "when tokenizing"
            )
        if position_ids is None:
            position_ids = self._positions(input_ids, length)
        if token_type_ids is not None:
            token_type_ids = jnp.asarray(token_type_ids)
        embedded = self.embeddings(words, token_type_ids, jnp.asarray(position_ids))
        return embedded if self.embeddings_project is None else self.embeddings_project(embedded)

    def _position_pad_id(self) -> int | None:
        """The position of padding, where it has one of its own."""
        return None

    def _longest(self) -> int:
        """How many positions there are."""
        return self.config.max_position_embeddings

    def _positions(
        self, input_ids: Int[Array, "batch length"] | None, length: int
    ) -> Int[Array, "#batch length"]:
        """The positions where none are given."""
        return jnp.arange(length)[None]


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
