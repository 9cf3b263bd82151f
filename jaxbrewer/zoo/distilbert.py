"""DistilBERT: BERT's layers without token types and without a pooler.

Sanh et al., 2019, https://arxiv.org/abs/1910.01108. Arguments are those of
`jaxbrewer.zoo.encoder` and `jaxbrewer.zoo.tasks` but for ``token_type_ids``, in transformers' order,
which differs from BERT's. Dropout is applied to the attention's probabilities and after each
perceptron, but not to what attention adds.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Num

from jaxbrewer.configurations import checks
from jaxbrewer.zoo.bert import BERT_EXTRAS
from jaxbrewer.zoo.blocks import Build, linear
from jaxbrewer.zoo.configuration import (
    BOOKKEEPING_KEYS,
    ModelConfig,
    StackConfig,
    TransformerConfig,
    activation_name,
)
from jaxbrewer.zoo.dropout import Dropout
from jaxbrewer.zoo.encoder import EncoderModel
from jaxbrewer.zoo.hf import TensorNames
from jaxbrewer.zoo.masked_lm import MaskedLM, masked_lm_names
from jaxbrewer.zoo.outputs import (
    BaseModelOutput,
    MaskedLMOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from jaxbrewer.zoo.tasks import SequenceClassifier, SpanClassifier, TokenClassifier

DISTILBERT_TENSORS = TensorNames(
    prefix="distilbert",
    modules=(
        (r"embeddings\.norm", r"embeddings.LayerNorm"),
        (r"encoder\.layer\.(\d+)\.attention\.query", r"transformer.layer.\1.attention.q_lin"),
        (r"encoder\.layer\.(\d+)\.attention\.key", r"transformer.layer.\1.attention.k_lin"),
        (r"encoder\.layer\.(\d+)\.attention\.value", r"transformer.layer.\1.attention.v_lin"),
        (r"encoder\.layer\.(\d+)\.attention\.output", r"transformer.layer.\1.attention.out_lin"),
        (r"encoder\.layer\.(\d+)\.attention_norm", r"transformer.layer.\1.sa_layer_norm"),
        (r"encoder\.layer\.(\d+)\.intermediate", r"transformer.layer.\1.ffn.lin1"),
        (r"encoder\.layer\.(\d+)\.output", r"transformer.layer.\1.ffn.lin2"),
        (r"encoder\.layer\.(\d+)\.output_norm", r"transformer.layer.\1.output_layer_norm"),
    ),
    extras=(*BERT_EXTRAS, r"vocab_(transform|layer_norm|projector)\..*"),
    heads=(r"pre_classifier\..*", r"classifier\..*", r"qa_outputs\..*"),
    head=masked_lm_names("vocab_transform", "vocab_layer_norm", "vocab_projector"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DistilBertConfig(TransformerConfig):
    """DistilBERT's config, under its own names: ``dim``, ``n_layers``, ``n_heads``, ``hidden_dim``.

    As in transformers ``hidden_size``, ``num_hidden_layers`` and ``num_attention_heads`` can be
    read too. ``sinusoidal_pos_embds`` starts the positions of a new model from sines and cosines.
    """

    model_type: ClassVar[str] = "distilbert"
    bookkeeping_keys: ClassVar[frozenset[str]] = BOOKKEEPING_KEYS | {"tie_weights_"}

    dim: int = 768
    n_layers: int = 6
    n_heads: int = 12
    hidden_dim: int = 3072
    activation: str = "gelu"
    dropout: float = 0.1
    attention_dropout: float = 0.1
    qa_dropout: float = 0.1
    seq_classif_dropout: float = 0.2
    sinusoidal_pos_embds: bool = False

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        **TransformerConfig._checks,
        "dim": checks.integer(1),
        "n_layers": checks.integer(1),
        "n_heads": checks.integer(1),
        "hidden_dim": checks.integer(1),
        "activation": activation_name,
        "dropout": checks.rate,
        "attention_dropout": checks.rate,
        "qa_dropout": checks.rate,
        "seq_classif_dropout": checks.rate,
        "sinusoidal_pos_embds": checks.boolean,
    }

    def _problems(self) -> Iterable[str]:
        yield from super()._problems()
        if self.dim % self.n_heads:
            yield f"dim={self.dim} is not a multiple of n_heads={self.n_heads}"

    @property
    def hidden_size(self) -> int:
        """``dim``, the width of the layers."""
        return self.dim

    @property
    def num_hidden_layers(self) -> int:
        """``n_layers``."""
        return self.n_layers

    @property
    def num_attention_heads(self) -> int:
        """``n_heads``."""
        return self.n_heads

    @property
    def sizes(self) -> StackConfig:
        """The config under the names that `jaxbrewer.zoo.blocks` reads."""
        return StackConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.dim,
            num_hidden_layers=self.n_layers,
            num_attention_heads=self.n_heads,
            intermediate_size=self.hidden_dim,
            hidden_act=self.activation,
            hidden_dropout_prob=self.dropout,
            attention_probs_dropout_prob=self.attention_dropout,
            max_position_embeddings=self.max_position_embeddings,
            initializer_range=self.initializer_range,
            pad_token_id=self.pad_token_id,
            num_labels=self.num_labels,
            gradient_checkpointing=self.gradient_checkpointing,
        )


class DistilBertModel(EncoderModel):
    """DistilBERT's encoder; see `EncoderModel`."""

    tensor_names: ClassVar[TensorNames] = DISTILBERT_TENSORS
    config_class: ClassVar[type[ModelConfig]] = DistilBertConfig
    drop_attended: ClassVar[bool] = False

    def __init__(
        self,
        config: DistilBertConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(config, **build)
        if config.sinusoidal_pos_embds:
            table = self.embeddings.position_embeddings.embedding
            table[...] = jnp.asarray(sinusoids(*table.shape), param_dtype)

    def __call__(  # type: ignore[override]
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_attention_scores: bool | None = None,
        output_qkv: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput:
        """Encodes a batch: ``last_hidden_state``."""
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


class DistilBertForSequenceClassification(SequenceClassifier):
    """DistilBERT with a classifier of the first token, dense and ReLU; see `SequenceClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = DistilBertModel

    def __init__(
        self,
        config: DistilBertConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self._set_encoder(self.encoder_class(config, **build))
        self.pre_classifier = linear(config.sizes, config.dim, config.dim, **build)
        self.classifier = linear(config.sizes, config.dim, config.num_labels, **build)
        self.dropout = Dropout(config.seq_classif_dropout, rngs=rngs)

    def __call__(  # type: ignore[override]
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        labels: Num[Array, " batch"] | Num[Array, "batch labels"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
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

    def _logits(
        self, encoded: BaseModelOutput, mask: Num[Array, "..."] | None
    ) -> Float[Array, "batch labels"]:
        inner = jax.nn.relu(self.pre_classifier(encoded.last_hidden_state[:, 0]))
        return self.classifier(self.dropout(inner))


class DistilBertForTokenClassification(TokenClassifier):
    """DistilBERT with a classifier of every token; see `TokenClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = DistilBertModel

    def __call__(  # type: ignore[override]
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        labels: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
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


class DistilBertForQuestionAnswering(SpanClassifier):
    """DistilBERT with scores of an answer's ends, after dropout; see `SpanClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = DistilBertModel

    def __init__(
        self,
        config: DistilBertConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.dropout = Dropout(config.qa_dropout, rngs=rngs)

    def __call__(  # type: ignore[override]
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        start_positions: Int[Array, " batch"] | Int[Array, "batch 1"] | None = None,
        end_positions: Int[Array, " batch"] | Int[Array, "batch 1"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
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

    def _scores(self, hidden: Float[Array, "batch length width"]) -> Float[Array, "batch length 2"]:
        return super()._scores(self.dropout(hidden))


class DistilBertForMaskedLM(MaskedLM):
    """DistilBERT with a score of every word at every position; see `MaskedLM`."""

    encoder_class: ClassVar[type[EncoderModel]] = DistilBertModel

    def __call__(  # type: ignore[override]
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        labels: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
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


def sinusoids(positions: int, width: int) -> np.ndarray:
    """Sines and cosines of geometric wavelengths: ``[positions, width]`` float64.

    Column ``2i`` is ``sin(p / 10000^(2i / width))``, column ``2i + 1`` the cosine of the same;
    Vaswani et al., 2017, https://arxiv.org/abs/1706.03762.
    """
    column = np.arange(width)
    angle = np.arange(positions)[:, None] / 10000.0 ** (2 * (column // 2) / width)
    return np.where(column % 2 == 0, np.sin(angle), np.cos(angle))
