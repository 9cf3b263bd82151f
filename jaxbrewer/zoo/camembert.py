"""CamemBERT: RoBERTa's modules, trained on French.

Martin et al., 2020, https://arxiv.org/abs/1911.03894. What is RoBERTa's is told in
`jaxbrewer.zoo.roberta`, the names in its files (``roberta.…``) included.
"""

import dataclasses
from typing import ClassVar

from jaxbrewer.zoo.configuration import ModelConfig
from jaxbrewer.zoo.encoder import EncoderModel
from jaxbrewer.zoo.masked_lm import MaskedLM
from jaxbrewer.zoo.roberta import RobertaConfig, RobertaModel
from jaxbrewer.zoo.tasks import SequenceClassifier, SpanClassifier, TokenClassifier


@dataclasses.dataclass(frozen=True, kw_only=True)
class CamembertConfig(RobertaConfig):
    """CamemBERT's config, with transformers' defaults; see `RobertaConfig`.

    The published models have ``vocab_size=32005``,
    ``max_position_embeddings=514`` and ``type_vocab_size=1``, which are not the defaults.
    """

    model_type: ClassVar[str] = "camembert"

    vocab_size: int = 30522


class CamembertModel(RobertaModel):
    """CamemBERT's encoder, with a pooler unless ``add_pooling_layer=False``; see `RobertaModel`."""

    config_class: ClassVar[type[ModelConfig]] = CamembertConfig


class CamembertForSequenceClassification(SequenceClassifier):
    """CamemBERT with a classifier of the first token, dense and tanh; see `SequenceClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = CamembertModel


class CamembertForTokenClassification(TokenClassifier):
    """CamemBERT with a classifier of every token; see `TokenClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = CamembertModel


class CamembertForQuestionAnswering(SpanClassifier):
    """CamemBERT with scores of an answer's ends; see `SpanClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = CamembertModel


class CamembertForMaskedLM(MaskedLM):
    """CamemBERT with a score of every word at every position; see `MaskedLM`."""

    encoder_class: ClassVar[type[EncoderModel]] = CamembertModel
    head_activation: ClassVar[str | None] = "gelu"
