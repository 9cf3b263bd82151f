"""Encoders with Hugging Face import and export."""

from jaxbrewer.zoo.bert import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from jaxbrewer.zoo.configuration import EncoderConfig
from jaxbrewer.zoo.hf import PretrainedModel, WeightsMismatchError
from jaxbrewer.zoo.outputs import (
    BaseModelOutput,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from jaxbrewer.zoo.transfer import init_from_layers

__all__ = [
    "BertConfig",
    "BertModel",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "EncoderConfig",
    "PretrainedModel",
    "WeightsMismatchError",
    "init_from_layers",
    "ModelOutput",
    "BaseModelOutput",
    "SequenceClassifierOutput",
    "TokenClassifierOutput",
    "QuestionAnsweringModelOutput",
]
