"""Encoders and a recurrent student, with Hugging Face import and export.

A family of models is one file, and its import here: that makes its classes known to `MODELS`, and
so to `from_pretrained`. ``X as X`` tells type checkers that the name is handed on.
"""

# One import for each file; isort would have one for each name.
# ruff: isort: skip_file

from jaxbrewer.zoo.adaptors import adaptor as adaptor
from jaxbrewer.zoo.auto import (
    from_config as from_config,
    from_pretrained as from_pretrained,
    read_config as read_config,
)
from jaxbrewer.zoo.bert import (
    BertConfig as BertConfig,
    BertForMaskedLM as BertForMaskedLM,
    BertForQuestionAnswering as BertForQuestionAnswering,
    BertForSequenceClassification as BertForSequenceClassification,
    BertForTokenClassification as BertForTokenClassification,
    BertModel as BertModel,
)
from jaxbrewer.zoo.bigru import (
    BiGRUConfig as BiGRUConfig,
    BiGRUForTokenClassification as BiGRUForTokenClassification,
    BiGRUModel as BiGRUModel,
)
from jaxbrewer.zoo.camembert import (
    CamembertConfig as CamembertConfig,
    CamembertForMaskedLM as CamembertForMaskedLM,
    CamembertForQuestionAnswering as CamembertForQuestionAnswering,
    CamembertForSequenceClassification as CamembertForSequenceClassification,
    CamembertForTokenClassification as CamembertForTokenClassification,
    CamembertModel as CamembertModel,
)
from jaxbrewer.zoo.configuration import (
    EncoderConfig as EncoderConfig,
    ModelConfig as ModelConfig,
    StackConfig as StackConfig,
    TransformerConfig as TransformerConfig,
)
from jaxbrewer.zoo.deberta import (
    DebertaConfig as DebertaConfig,
    DebertaForMaskedLM as DebertaForMaskedLM,
    DebertaForQuestionAnswering as DebertaForQuestionAnswering,
    DebertaForSequenceClassification as DebertaForSequenceClassification,
    DebertaForTokenClassification as DebertaForTokenClassification,
    DebertaModel as DebertaModel,
)
from jaxbrewer.zoo.deberta_v2 import (
    DebertaV2Config as DebertaV2Config,
    DebertaV2ForMaskedLM as DebertaV2ForMaskedLM,
    DebertaV2ForQuestionAnswering as DebertaV2ForQuestionAnswering,
    DebertaV2ForSequenceClassification as DebertaV2ForSequenceClassification,
    DebertaV2ForTokenClassification as DebertaV2ForTokenClassification,
    DebertaV2Model as DebertaV2Model,
)
from jaxbrewer.zoo.distilbert import (
    DistilBertConfig as DistilBertConfig,
    DistilBertForMaskedLM as DistilBertForMaskedLM,
    DistilBertForQuestionAnswering as DistilBertForQuestionAnswering,
    DistilBertForSequenceClassification as DistilBertForSequenceClassification,
    DistilBertForTokenClassification as DistilBertForTokenClassification,
    DistilBertModel as DistilBertModel,
)
from jaxbrewer.zoo.electra import (
    ElectraConfig as ElectraConfig,
    ElectraForMaskedLM as ElectraForMaskedLM,
    ElectraForQuestionAnswering as ElectraForQuestionAnswering,
    ElectraForSequenceClassification as ElectraForSequenceClassification,
    ElectraForTokenClassification as ElectraForTokenClassification,
    ElectraModel as ElectraModel,
)
from jaxbrewer.zoo.hf import (
    MODELS as MODELS,
    PretrainedModel as PretrainedModel,
    WeightsMismatchError as WeightsMismatchError,
    model_class as model_class,
)
from jaxbrewer.zoo.modernbert import (
    ModernBertConfig as ModernBertConfig,
    ModernBertForMaskedLM as ModernBertForMaskedLM,
    ModernBertForQuestionAnswering as ModernBertForQuestionAnswering,
    ModernBertForSequenceClassification as ModernBertForSequenceClassification,
    ModernBertForTokenClassification as ModernBertForTokenClassification,
    ModernBertModel as ModernBertModel,
)
from jaxbrewer.zoo.mpnet import (
    MPNetConfig as MPNetConfig,
    MPNetForMaskedLM as MPNetForMaskedLM,
    MPNetForQuestionAnswering as MPNetForQuestionAnswering,
    MPNetForSequenceClassification as MPNetForSequenceClassification,
    MPNetForTokenClassification as MPNetForTokenClassification,
    MPNetModel as MPNetModel,
)
from jaxbrewer.zoo.onnx import OnnxFile as OnnxFile, export_onnx as export_onnx
from jaxbrewer.zoo.outputs import (
    BaseModelOutput as BaseModelOutput,
    MaskedLMOutput as MaskedLMOutput,
    ModelOutput as ModelOutput,
    QuestionAnsweringModelOutput as QuestionAnsweringModelOutput,
    SentenceEncoderOutput as SentenceEncoderOutput,
    SequenceClassifierOutput as SequenceClassifierOutput,
    TokenClassifierOutput as TokenClassifierOutput,
)
from jaxbrewer.zoo.rankers import (
    BiEncoder as BiEncoder,
    CrossEncoder as CrossEncoder,
    RankingOutput as RankingOutput,
)
from jaxbrewer.zoo.roberta import (
    RobertaConfig as RobertaConfig,
    RobertaForMaskedLM as RobertaForMaskedLM,
    RobertaForQuestionAnswering as RobertaForQuestionAnswering,
    RobertaForSequenceClassification as RobertaForSequenceClassification,
    RobertaForTokenClassification as RobertaForTokenClassification,
    RobertaModel as RobertaModel,
)
from jaxbrewer.zoo.sentence import SentenceEncoder as SentenceEncoder
from jaxbrewer.zoo.sentence_files import (
    DenseConfig as DenseConfig,
    SentenceConfig as SentenceConfig,
)
from jaxbrewer.zoo.stablehlo import export_stablehlo as export_stablehlo
from jaxbrewer.zoo.students import (
    BASES as BASES,
    STUDENTS as STUDENTS,
    student_config as student_config,
)
from jaxbrewer.zoo.suggestions import (
    Similarity as Similarity,
    similarity as similarity,
    suggest_matches as suggest_matches,
)
from jaxbrewer.zoo.transfer import init_from_layers as init_from_layers
from jaxbrewer.zoo.xlm_roberta import (
    XLMRobertaConfig as XLMRobertaConfig,
    XLMRobertaForMaskedLM as XLMRobertaForMaskedLM,
    XLMRobertaForQuestionAnswering as XLMRobertaForQuestionAnswering,
    XLMRobertaForSequenceClassification as XLMRobertaForSequenceClassification,
    XLMRobertaForTokenClassification as XLMRobertaForTokenClassification,
    XLMRobertaModel as XLMRobertaModel,
)
