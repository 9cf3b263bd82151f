"""RoBERTa: BERT with positions that pass over padding, and a classifier of the first token.

Liu et al., 2019, https://arxiv.org/abs/1907.11692. Position ids count the tokens that are not
``pad_token_id`` and begin at ``pad_token_id + 1``; padding stays at ``pad_token_id``, whose row of
the table is zero at first and gets no gradient. What goes in and comes out:
`jaxbrewer.zoo.encoder` and `jaxbrewer.zoo.tasks`.
"""

import dataclasses
from collections.abc import Iterable
from typing import Any, ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Int

from jaxbrewer.zoo.bert import BERT_EXTRAS, BERT_HEADS, BERT_MODULES
from jaxbrewer.zoo.configuration import EncoderConfig, ModelConfig
from jaxbrewer.zoo.encoder import EncoderModel, PooledModel
from jaxbrewer.zoo.hf import TensorNames
from jaxbrewer.zoo.masked_lm import MaskedLM, masked_lm_names
from jaxbrewer.zoo.tasks import SequenceClassifier, SpanClassifier, TokenClassifier

# The head for masked words: its modules, and the bias beside the decoder's, which is the same.
ROBERTA_WORDS: dict[str, Any] = {
    "head": masked_lm_names("lm_head.dense", "lm_head.layer_norm", "lm_head.decoder"),
    "aliases": ((r"lm_head\.bias", "lm_head.decoder.bias"),),
    "copies": (("lm_head.decoder.bias", "lm_head.bias"),),
}
ROBERTA_TENSORS = TensorNames(
    prefix="roberta",
    modules=BERT_MODULES,
    extras=(*BERT_EXTRAS, r"lm_head\..*"),
    heads=BERT_HEADS,
    **ROBERTA_WORDS,
)


def positions_past_padding(
    input_ids: Int[Array, "batch length"] | None, length: int, pad: int
) -> Int[Array, "#batch length"]:
    """The positions of tokens, counted from past the padding id; padding's is that id.

    Without ids, as with embeddings given, every position is a token's.
    """
    if input_ids is None:
        return jnp.arange(pad + 1, pad + 1 + length)[None]
    is_token = (jnp.asarray(input_ids) != pad).astype(jnp.int32)
    return jnp.cumsum(is_token, axis=1) * is_token + pad


@dataclasses.dataclass(frozen=True, kw_only=True)
class RobertaConfig(EncoderConfig):
    """RoBERTa's config, with transformers' defaults.

    ``pad_token_id`` must be given, for positions count from it: sequences are at most
    ``max_position_embeddings - pad_token_id - 1`` long. The published models have
    ``max_position_embeddings=514`` and ``type_vocab_size=1``, which are not the defaults.
    """

    model_type: ClassVar[str] = "roberta"

    vocab_size: int = 50265
    pad_token_id: int | None = 1

    def _problems(self) -> Iterable[str]:
        yield from super()._problems()
        if self.pad_token_id is None:
            yield "pad_token_id is null, but RoBERTa's positions count from it"
        elif self.pad_token_id + 1 >= self.max_position_embeddings:
            yield (
                f"max_position_embeddings={self.max_position_embeddings} leaves no position after "
                f"pad_token_id={self.pad_token_id}"
            )


class RobertaModel(PooledModel):
    """RoBERTa's encoder, with a pooler unless ``add_pooling_layer=False``; see `EncoderModel`.

    A padded sequence must fit the positions as a whole. Transformers takes a longer one if its
    tokens without the padding fit.
    """

    tensor_names: ClassVar[TensorNames] = ROBERTA_TENSORS
    config_class: ClassVar[type[ModelConfig]] = RobertaConfig

    def _position_pad_id(self) -> int:
        return self.config.pad_token_id or 0

    def longest(self) -> int:
        """How long a sequence may be."""
        return self.config.max_position_embeddings - self._position_pad_id() - 1

    def _positions(
        self, input_ids: Int[Array, "batch length"] | None, length: int
    ) -> Int[Array, "#batch length"]:
        return positions_past_padding(input_ids, length, self._position_pad_id())


class RobertaForSequenceClassification(SequenceClassifier):
    """RoBERTa with a classifier of the first token, dense and tanh; see `SequenceClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = RobertaModel


class RobertaForTokenClassification(TokenClassifier):
    """RoBERTa with a classifier of every token; see `TokenClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = RobertaModel


class RobertaForQuestionAnswering(SpanClassifier):
    """RoBERTa with scores of an answer's ends; see `SpanClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = RobertaModel


class RobertaForMaskedLM(MaskedLM):
    """RoBERTa with a score of every word at every position; see `MaskedLM`."""

    encoder_class: ClassVar[type[EncoderModel]] = RobertaModel
    head_activation: ClassVar[str | None] = "gelu"
