"""XLM-R: RoBERTa's modules, trained on a hundred languages.

Conneau et al., 2020, https://arxiv.org/abs/1911.02116. What is RoBERTa's is told in
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
class XLMRobertaConfig(RobertaConfig):
    """XLM-R's config, with transformers' defaults; see `RobertaConfig`.

    The published models have ``vocab_size=250002``,
    ``max_position_embeddings=514`` and ``type_vocab_size=1``, which are not the defaults.
    """

    model_type: ClassVar[str] = "xlm-roberta"

    vocab_size: int = 30522


class XLMRobertaModel(RobertaModel):
    """XLM-R's encoder, with a pooler unless ``add_pooling_layer=False``; see `RobertaModel`."""

    config_class: ClassVar[type[ModelConfig]] = XLMRobertaConfig


class XLMRobertaForSequenceClassification(SequenceClassifier):
    """XLM-R with a classifier of the first token, dense and tanh; see `SequenceClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = XLMRobertaModel


class XLMRobertaForTokenClassification(TokenClassifier):
    """XLM-R with a classifier of every token; see `TokenClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = XLMRobertaModel


class XLMRobertaForQuestionAnswering(SpanClassifier):
    """XLM-R with scores of an answer's ends; see `SpanClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = XLMRobertaModel


class XLMRobertaForMaskedLM(MaskedLM):
    """XLM-RoBERTa with a score of every word at every position; see `MaskedLM`."""

    encoder_class: ClassVar[type[EncoderModel]] = XLMRobertaModel
    head_activation: ClassVar[str | None] = "gelu"
