"""Tasks with labels, whatever the encoder: classes of sequences, of tokens, and answer spans.

Arguments and shapes are those of `jaxbrewer.zoo.encoder`; with the labels of the task comes its
loss. A model holds its encoder under Hugging Face's name of it, such as ``bert``.
"""

from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Num

from jaxbrewer.zoo import heads
from jaxbrewer.zoo.blocks import Build, ClassificationHead, linear
from jaxbrewer.zoo.configuration import TransformerConfig
from jaxbrewer.zoo.dropout import Dropout
from jaxbrewer.zoo.encoder import EncoderModel, as_asked
from jaxbrewer.zoo.hf import PretrainedModel
from jaxbrewer.zoo.outputs import (
    BaseModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)


class TaskModel(PretrainedModel):
    """An encoder with a head.

    ``encoder_class`` is the class of the encoder, whose config and names of tensors are this
    class's too. Computes in ``dtype`` (``param_dtype`` unless given); parameters are
    ``param_dtype``. Errors are `EncoderModel`'s.
    """

    encoder_class: ClassVar[type[EncoderModel]]
    config: TransformerConfig

    def __init_subclass__(cls, **options: Any) -> None:
        own = vars(cls)
        for name in ("config_class", "tensor_names"):
            if "encoder_class" in own and name not in own:
                setattr(cls, name, getattr(cls.encoder_class, name))
        super().__init_subclass__(**options)

    def _set_encoder(self, encoder: EncoderModel) -> None:
        self.config = encoder.config
        setattr(self, self.tensor_names.prefix, encoder)


class SequenceClassifier(TaskModel):
    """A classifier of sequences, by default of the first token through two layers.

    ``head_activation`` names the activation between them; ``num_labels=1`` makes it a regression.
    """

    task: ClassVar[str | None] = "sequence-classification"
    head_activation: ClassVar[str] = "tanh"
    classifier: Any

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self._set_encoder(self.encoder_class.without_pooler(config, **build))
        self.classifier = ClassificationHead(config.sizes, self.head_activation, **build)

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
        output_qkv: bool | None = None,
        return_dict: bool | None = None,
    ) -> SequenceClassifierOutput:
        """``logits``, and with ``labels`` the ``loss``: `heads.sequence_classification_loss`."""
        encoded = self.base_model.encode(
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
        mask = None if attention_mask is None else jnp.asarray(attention_mask)
        logits = self._logits(encoded, mask)
        loss = None
        if labels is not None:
            loss = self._loss(logits, jnp.asarray(labels))
        output = SequenceClassifierOutput(loss, logits, **encoded.of_layers())
        return as_asked(output, self.config, return_dict)

    def _logits(
        self, encoded: BaseModelOutput, mask: Num[Array, "..."] | None
    ) -> Float[Array, "batch labels"]:
        return self.classifier(encoded.last_hidden_state)

    def _loss(
        self,
        logits: Float[Array, "batch labels"],
        labels: Num[Array, " batch"] | Num[Array, "batch labels"],
    ) -> Float[Array, ""]:
        return heads.sequence_classification_loss(logits, labels, self.config.problem_type)


class TokenClassifier(TaskModel):
    """A classifier of every token."""

    task: ClassVar[str | None] = "token-classification"

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        sizes = config.sizes
        self._set_encoder(self.encoder_class.without_pooler(config, **build))
        self.dropout = Dropout(sizes.head_dropout, rngs=rngs)
        self.classifier = linear(sizes, sizes.hidden_size, sizes.num_labels, **build)

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
        output_qkv: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput:
        """``logits``, and with ``labels`` the ``loss``: `heads.token_classification_loss`."""
        encoded = self.base_model.encode(
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
        logits = self._logits(encoded.last_hidden_state)
        loss = None
        if labels is not None:
            loss = heads.token_classification_loss(logits, jnp.asarray(labels))
        output = TokenClassifierOutput(loss, logits, **encoded.of_layers())
        return as_asked(output, self.config, return_dict)

    def _logits(
        self, hidden: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length labels"]:
        return self.classifier(self.dropout(hidden))


def check_span_labels(config: TransformerConfig) -> None:
    """Refuses, with a ``ValueError``, a number of labels other than 2."""
    if config.num_labels != 2:
        raise ValueError(
            f"num_labels={config.num_labels}, but answer spans need 2 (start and end): "
            "use config.replace(num_labels=2)"
        )


class SpanClassifier(TaskModel):
    """A score of every token as an answer's first and as its last.

    Raises ``ValueError`` besides for ``num_labels`` other than 2.
    """

    task: ClassVar[str | None] = "question-answering"

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_span_labels(config)
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self._set_encoder(self.encoder_class.without_pooler(config, **build))
        self.qa_outputs = linear(config.sizes, config.sizes.hidden_size, 2, **build)

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
        output_qkv: bool | None = None,
        return_dict: bool | None = None,
    ) -> QuestionAnsweringModelOutput:
        """``start_logits``, ``end_logits``; given both positions ``loss``: `heads.span_loss`."""
        encoded = self.base_model.encode(
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
        scores = self._scores(encoded.last_hidden_state)
        start, end = scores[..., 0], scores[..., 1]
        loss = None
        if start_positions is not None and end_positions is not None:
            positions = jnp.asarray(start_positions), jnp.asarray(end_positions)
            loss = heads.span_loss(start, end, *positions)
        output = QuestionAnsweringModelOutput(loss, start, end, **encoded.of_layers())
        return as_asked(output, self.config, return_dict)

    def _scores(self, hidden: Float[Array, "batch length width"]) -> Float[Array, "batch length 2"]:
        return self.qa_outputs(hidden)
