"""Encoders and tasks of models without token types, with transformers' order of arguments.

The arguments are those of `jaxbrewer.zoo.encoder` and `jaxbrewer.zoo.tasks` but for
``token_type_ids``.
"""

from jaxtyping import Array, Float, Int, Num

from jaxbrewer.zoo.encoder import EncoderModel
from jaxbrewer.zoo.masked_lm import MaskedLM
from jaxbrewer.zoo.outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from jaxbrewer.zoo.tasks import SequenceClassifier, SpanClassifier, TokenClassifier


class UntypedModel(EncoderModel):
    """An encoder without token types; see `EncoderModel`."""

    def __call__(  # type: ignore[override]
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
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
        return super().__call__(
            input_ids,
            attention_mask,
            None,
            position_ids,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_attention_scores=output_attention_scores,
            output_qkv=output_qkv,
            return_dict=return_dict,
        )


class UntypedSequenceClassifier(SequenceClassifier):
    """A classifier of sequences without token types; see `SequenceClassifier`."""

    def __call__(  # type: ignore[override]
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
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
        return super().__call__(
            input_ids,
            attention_mask,
            None,
            position_ids,
            inputs_embeds,
            labels,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_attention_scores=output_attention_scores,
            output_qkv=output_qkv,
            return_dict=return_dict,
        )


class UntypedTokenClassifier(TokenClassifier):
    """A classifier of tokens without token types; see `TokenClassifier`."""

    def __call__(  # type: ignore[override]
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
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
        return super().__call__(
            input_ids,
            attention_mask,
            None,
            position_ids,
            inputs_embeds,
            labels,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_attention_scores=output_attention_scores,
            output_qkv=output_qkv,
            return_dict=return_dict,
        )


class UntypedMaskedLM(MaskedLM):
    """Scores of words without token types; see `MaskedLM`."""

    def __call__(  # type: ignore[override]
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        labels: Int[Array, "batch length"] | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_attention_scores: bool | None = None,
        output_qkv: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput:
        """``logits``, and with ``labels`` the ``loss``: `heads.token_classification_loss`."""
        return super().__call__(
            input_ids,
            attention_mask,
            None,
            position_ids,
            inputs_embeds,
            labels,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_attention_scores=output_attention_scores,
            output_qkv=output_qkv,
            return_dict=return_dict,
        )


class UntypedSpanClassifier(SpanClassifier):
    """Scores of an answer's ends without token types; see `SpanClassifier`."""

    def __call__(  # type: ignore[override]
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
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
        return super().__call__(
            input_ids,
            attention_mask,
            None,
            position_ids,
            inputs_embeds,
            start_positions,
            end_positions,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_attention_scores=output_attention_scores,
            output_qkv=output_qkv,
            return_dict=return_dict,
        )
