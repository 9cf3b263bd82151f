"""Encoders and a recurrent student, with Hugging Face import and export."""

from jaxbrewer.zoo.auto import MODELS, from_config, from_pretrained, model_class, read_config
from jaxbrewer.zoo.bert import (
    BertConfig,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertForTokenClassification,
    BertModel,
)
from jaxbrewer.zoo.bigru import BiGRUConfig, BiGRUForTokenClassification, BiGRUModel
from jaxbrewer.zoo.configuration import EncoderConfig, ModelConfig, TransformerConfig
from jaxbrewer.zoo.distilbert import (
    DistilBertConfig,
    DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification,
    DistilBertForTokenClassification,
    DistilBertModel,
)
from jaxbrewer.zoo.electra import (
    ElectraConfig,
    ElectraForQuestionAnswering,
    ElectraForSequenceClassification,
    ElectraForTokenClassification,
    ElectraModel,
)
from jaxbrewer.zoo.hf import PretrainedModel, WeightsMismatchError
from jaxbrewer.zoo.outputs import (
    BaseModelOutput,
    ModelOutput,
    QuestionAnsweringModelOutput,
    SequenceClassifierOutput,
    TokenClassifierOutput,
)
from jaxbrewer.zoo.roberta import (
    RobertaConfig,
    RobertaForQuestionAnswering,
    RobertaForSequenceClassification,
    RobertaForTokenClassification,
    RobertaModel,
)
from jaxbrewer.zoo.students import BASES, STUDENTS, student_config
from jaxbrewer.zoo.transfer import init_from_layers

__all__ = [
    "BertConfig",
    "BertModel",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
    "RobertaConfig",
    "RobertaModel",
    "RobertaForSequenceClassification",
    "RobertaForTokenClassification",
    "RobertaForQuestionAnswering",
    "ElectraConfig",
    "ElectraModel",
    "ElectraForSequenceClassification",
    "ElectraForTokenClassification",
    "ElectraForQuestionAnswering",
    "DistilBertConfig",
    "DistilBertModel",
    "DistilBertForSequenceClassification",
    "DistilBertForTokenClassification",
    "DistilBertForQuestionAnswering",
    "BiGRUConfig",
    "BiGRUModel",
    "BiGRUForTokenClassification",
    "ModelConfig",
    "TransformerConfig",
    "EncoderConfig",
    "PretrainedModel",
    "WeightsMismatchError",
    "MODELS",
    "model_class",
    "from_pretrained",
    "from_config",
    "read_config",
    "BASES",
    "STUDENTS",
    "student_config",
    "init_from_layers",
    "ModelOutput",
    "BaseModelOutput",
    "SequenceClassifierOutput",
    "TokenClassifierOutput",
    "QuestionAnsweringModelOutput",
]
