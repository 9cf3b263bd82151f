"""BERT: the encoder, and heads for classification, tagging and answer spans.

Devlin et al., 2019, https://arxiv.org/abs/1810.04805. Numbers are those of transformers' torch
models: post-norm layers, the exact GELU, probabilities of attention after dropout.

Arguments keep transformers' names and order, so that a tuple batch may be given as
``model(*batch)``. The shapes are the same in every model:

- ``input_ids``, ``token_type_ids``: integers ``(batch, length)``; token types default to 0;
- ``attention_mask``: ``(batch, length)``, or ``(batch, length, length)`` as query by key; not 0
  means visible; the default is all;
- ``position_ids``: integers ``(batch, length)`` or ``(1, length)``; the default counts from 0;
- ``inputs_embeds``: ``(batch, length, width)`` in place of ``input_ids``;
- ``output_hidden_states``, ``output_attentions``, ``output_attention_scores``, ``return_dict``:
  ``None`` leaves it to the config. Scores take the place of probabilities in ``attentions``, and
  asking for them is asking for ``attentions``; `jaxbrewer.zoo.blocks.attend` says what they are.
  ``return_dict=False`` returns a plain tuple of what is present.

``model.train()`` turns dropout on, ``model.eval()`` off; a model is built in train mode.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, TypeVar

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Num

from jaxbrewer.zoo import heads
from jaxbrewer.zoo.blocks import Build, Embeddings, Encoder, Pooler, linear, visible_keys
from jaxbrewer.zoo.configuration import BOOKKEEPING_KEYS, FIXED_VALUES, EncoderConfig
from jaxbrewer.zoo.hf import PretrainedModel, TensorNames
from jaxbrewer.zoo.outputs import (
    BaseModelOutput,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)

BERT_TENSORS = TensorNames(
    prefix="bert",
    modules=(
        (r"embeddings\.norm", r"embeddings.LayerNorm"),
        (
            r"encoder\.layer\.(\d+)\.attention\.(query|key|value)",
            r"encoder.layer.\1.attention.self.\2",
        ),
        (r"encoder\.layer\.(\d+)\.attention\.output", r"encoder.layer.\1.attention.output.dense"),
        (r"encoder\.layer\.(\d+)\.attention_norm", r"encoder.layer.\1.attention.output.LayerNorm"),
        (r"encoder\.layer\.(\d+)\.(intermediate|output)", r"encoder.layer.\1.\2.dense"),
        (r"encoder\.layer\.(\d+)\.output_norm", r"encoder.layer.\1.output.LayerNorm"),
    ),
    extras=(r"embeddings\.(position_ids|token_type_ids)", r"cls\..*"),
    heads=(r"pooler\..*", r"classifier\..*", r"qa_outputs\..*"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BertConfig(EncoderConfig):
    """BERT's config; reads Hugging Face's ``config.json`` and TextBrewer's ``bert_config*.json``.

    The fields, readers and errors are `EncoderConfig`'s; the defaults are BERT-base's.
    """

    model_type: ClassVar[str] = "bert"
    bookkeeping_keys: ClassVar[frozenset[str]] = BOOKKEEPING_KEYS | {
        # Sizes of a pooler that is not the one every BERT has (see ``pooler_type``).
        "pooler_fc_size",
        "pooler_num_attention_heads",
        "pooler_num_fc_layers",
        "pooler_size_per_head",
        # What TinyBERT's files carry and transformers does not read.
        "cell",
        "emb_size",
        "pre_trained",
        "structure",
        "training",
    }
    fixed_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **FIXED_VALUES,
        "directionality": ("bidi", None),
        "pooler_type": ("first_token_transform", None),
    }


_Output = TypeVar("_Output", bound=ModelOutput)


def _as_asked(output: _Output, config: EncoderConfig, return_dict: bool | None) -> Any:
    """The output, or its tuple where ``return_dict`` is off."""
    return output if _either(return_dict, config.return_dict) else output.to_tuple()


def _either(argument: bool | None, setting: bool) -> bool:
    return setting if argument is None else argument


class BertModel(PretrainedModel):
    """The encoder, with a pooler unless ``add_pooling_layer=False``.

    Computes in ``dtype`` (``param_dtype`` unless given); parameters are ``param_dtype``.

    Raises ``ValueError`` for a sequence longer than ``max_position_embeddings``, and for shapes
    other than the module's docstring gives.
    """

    architecture: ClassVar[str] = "BertModel"
    tensor_names: ClassVar[TensorNames] = BERT_TENSORS
    config_class: ClassVar[type[EncoderConfig]] = BertConfig

    def __init__(
        self,
        config: EncoderConfig,
        *,
        add_pooling_layer: bool = True,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.embeddings = Embeddings(config, **build)
        self.encoder = Encoder(config, **build)
        self.pooler = Pooler(config, **build) if add_pooling_layer else None

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
        config = self.config
        scores = _either(output_attention_scores, config.output_attention_scores)
        attentions = scores or _either(output_attentions, config.output_attentions)
        embedded = self._embed(input_ids, token_type_ids, position_ids, inputs_embeds)
        mask = None if attention_mask is None else jnp.asarray(attention_mask)
        all_hidden, all_weights = self.encoder(embedded, visible_keys(mask), scores)
        hidden = all_hidden[-1]
        output = BaseModelOutput(
            last_hidden_state=hidden,
            pooler_output=None if self.pooler is None else self.pooler(hidden),
            hidden_states=(
                all_hidden if _either(output_hidden_states, config.output_hidden_states) else None
            ),
            attentions=all_weights if attentions else None,
        )
        return _as_asked(output, config, return_dict)

    def _embed(
        self,
        input_ids: Int[Array, "batch length"] | None,
        token_type_ids: Int[Array, "batch length"] | None,
        position_ids: Int[Array, "#batch length"] | None,
        inputs_embeds: Float[Array, "batch length width"] | None,
    ) -> Float[Array, "batch length width"]:
        """The embedding output, after checking what shapes can tell."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is not None:
            input_ids = jnp.asarray(input_ids)
            if input_ids.ndim != 2 or not jnp.issubdtype(input_ids.dtype, jnp.integer):
                raise ValueError(
                    f"input_ids is {input_ids.dtype}{list(input_ids.shape)}, expected integers of "
                    "shape (batch, length)"
                )
            self._check_length(input_ids.shape[1])
            words = self.embeddings.words(input_ids)
        else:
            words = jnp.asarray(inputs_embeds)
            self._check_length(words.shape[1])
        batch, length = words.shape[:2]
        if token_type_ids is None:
            token_type_ids = jnp.zeros((batch, length), jnp.int32)
        if position_ids is None:
            position_ids = jnp.arange(length)[None]
        return self.embeddings(words, jnp.asarray(token_type_ids), jnp.asarray(position_ids))

    def _check_length(self, length: int) -> None:
        longest = self.config.max_position_embeddings
        if length > longest:
            raise ValueError(
                f"a sequence of {length} is longer than max_position_embeddings={longest}: "
                "truncate it when tokenizing"
            )


class BertForSequenceClassification(PretrainedModel):
    """BERT with a classifier of the pooled output; ``num_labels=1`` makes it a regression.

    Computes in ``dtype`` (``param_dtype`` unless given); parameters are ``param_dtype``. Errors
    are `BertModel`'s.
    """

    architecture: ClassVar[str] = "BertForSequenceClassification"
    tensor_names: ClassVar[TensorNames] = BERT_TENSORS
    config_class: ClassVar[type[EncoderConfig]] = BertConfig

    def __init__(
        self,
        config: EncoderConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.bert = BertModel(config, **build)
        self.dropout = nnx.Dropout(config.head_dropout, rngs=rngs)
        self.classifier = linear(config, config.hidden_size, config.num_labels, **build)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        labels: Num[Array, " batch"] | Num[Array, "batch labels"] | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_attention_scores: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput:
        """``logits``, and with ``labels`` the ``loss``: `heads.sequence_classification_loss`."""
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_attention_scores=output_attention_scores,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(encoded.pooler_output))
        loss = None
        if labels is not None:
            problem_type = self.config.problem_type
            loss = heads.sequence_classification_loss(logits, jnp.asarray(labels), problem_type)
        output = SequenceClassifierOutput(loss, logits, encoded.hidden_states, encoded.attentions)
        return _as_asked(output, self.config, return_dict)


class BertForTokenClassification(PretrainedModel):
    """BERT, without a pooler, with a classifier of every token.

    Computes in ``dtype`` (``param_dtype`` unless given); parameters are ``param_dtype``. Errors
    are `BertModel`'s.
    """

    architecture: ClassVar[str] = "BertForTokenClassification"
    tensor_names: ClassVar[TensorNames] = BERT_TENSORS
    config_class: ClassVar[type[EncoderConfig]] = BertConfig

    def __init__(
        self,
        config: EncoderConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.bert = BertModel(config, add_pooling_layer=False, **build)
        self.dropout = nnx.Dropout(config.head_dropout, rngs=rngs)
        self.classifier = linear(config, config.hidden_size, config.num_labels, **build)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        labels: Int[Array, "batch length"] | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_attention_scores: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput:
        """``logits``, and with ``labels`` the ``loss``: `heads.token_classification_loss`."""
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_attention_scores=output_attention_scores,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None
        if labels is not None:
            loss = heads.token_classification_loss(logits, jnp.asarray(labels))
        output = TokenClassifierOutput(loss, logits, encoded.hidden_states, encoded.attentions)
        return _as_asked(output, self.config, return_dict)


class BertForQuestionAnswering(PretrainedModel):
    """BERT, without a pooler, with a score of every token as an answer's first and as its last.

    Computes in ``dtype`` (``param_dtype`` unless given); parameters are ``param_dtype``. Errors
    are `BertModel`'s, and ``ValueError`` for ``num_labels`` other than 2.
    """

    architecture: ClassVar[str] = "BertForQuestionAnswering"
    tensor_names: ClassVar[TensorNames] = BERT_TENSORS
    config_class: ClassVar[type[EncoderConfig]] = BertConfig

    def __init__(
        self,
        config: EncoderConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        if config.num_labels != 2:
            raise ValueError(
                f"num_labels={config.num_labels}, but answer spans need 2 (start and end): "
                "use config.replace(num_labels=2)"
            )
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.bert = BertModel(config, add_pooling_layer=False, **build)
        self.qa_outputs = linear(config, config.hidden_size, 2, **build)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        start_positions: Int[Array, " batch"] | Int[Array, "batch 1"] | None = None,
        end_positions: Int[Array, " batch"] | Int[Array, "batch 1"] | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_attention_scores: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput:
        """``start_logits``, ``end_logits``; given both positions ``loss``: `heads.span_loss`."""
        encoded = self.bert(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_attention_scores=output_attention_scores,
            return_dict=True,
        )
        logits = self.qa_outputs(encoded.last_hidden_state)
        start, end = logits[..., 0], logits[..., 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            positions = jnp.asarray(start_positions), jnp.asarray(end_positions)
            loss = heads.span_loss(start, end, *positions)
        output = QuestionAnsweringModelOutput(
            loss, start, end, encoded.hidden_states, encoded.attentions
        )
        return _as_asked(output, self.config, return_dict)
