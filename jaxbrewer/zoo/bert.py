"""BERT: the encoder, and heads for classification, tagging and answer spans.

Devlin et al., 2019, https://arxiv.org/abs/1810.04805. Numbers are those of transformers' torch
models: post-norm layers, the exact GELU, probabilities of attention after dropout. What goes in and
comes out: `jaxbrewer.zoo.encoder` and `jaxbrewer.zoo.tasks`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Num

from jaxbrewer.zoo.blocks import Build, linear
from jaxbrewer.zoo.configuration import (
    BOOKKEEPING_KEYS,
    FIXED_VALUES,
    EncoderConfig,
    ModelConfig,
    TransformerConfig,
)
from jaxbrewer.zoo.dropout import Dropout
from jaxbrewer.zoo.encoder import EncoderModel, PooledModel
from jaxbrewer.zoo.hf import TensorNames
from jaxbrewer.zoo.masked_lm import MaskedLM, masked_lm_names
from jaxbrewer.zoo.outputs import BaseModelOutput
from jaxbrewer.zoo.tasks import SequenceClassifier, SpanClassifier, TokenClassifier

# Module paths, ours and Hugging Face's, of BERT and of the models built from it.
BERT_MODULES = (
    (r"embeddings\.norm", r"embeddings.LayerNorm"),
    (
        r"encoder\.layer\.(\d+)\.attention\.(query|key|value)",
        r"encoder.layer.\1.attention.self.\2",
    ),
    (r"encoder\.layer\.(\d+)\.attention\.output", r"encoder.layer.\1.attention.output.dense"),
    (r"encoder\.layer\.(\d+)\.attention_norm", r"encoder.layer.\1.attention.output.LayerNorm"),
    (r"encoder\.layer\.(\d+)\.(intermediate|output)", r"encoder.layer.\1.\2.dense"),
    (r"encoder\.layer\.(\d+)\.output_norm", r"encoder.layer.\1.output.LayerNorm"),
)
# Position tables that old files carry, and the heads of the tasks.
BERT_EXTRAS = (r"embeddings\.(position_ids|token_type_ids)",)
BERT_HEADS = (r"pooler\..*", r"classifier\..*", r"qa_outputs\..*")
# The head for masked words: its modules, and the bias beside the decoder's, which is the same.
_DECODER = "cls.predictions.decoder"
BERT_WORDS: dict[str, Any] = {
    "head": masked_lm_names(
        "cls.predictions.transform.dense", "cls.predictions.transform.LayerNorm", _DECODER
    ),
    "aliases": ((r"cls\.predictions\.bias", f"{_DECODER}.bias"),),
    "copies": ((f"{_DECODER}.bias", "cls.predictions.bias"),),
}
BERT_TENSORS = TensorNames(
    prefix="bert",
    modules=BERT_MODULES,
    extras=(*BERT_EXTRAS, r"cls\..*"),
    heads=BERT_HEADS,
    **BERT_WORDS,
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


class BertModel(PooledModel):
    """BERT's encoder, with a pooler unless ``add_pooling_layer=False``; see `EncoderModel`."""

    tensor_names: ClassVar[TensorNames] = BERT_TENSORS
    config_class: ClassVar[type[ModelConfig]] = BertConfig


class BertForSequenceClassification(SequenceClassifier):
    """BERT with a classifier of the pooled output; see `SequenceClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = BertModel

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
        self._set_encoder(self.encoder_class(config, **build))
        self.dropout = Dropout(sizes.head_dropout, rngs=rngs)
        self.classifier = linear(sizes, sizes.hidden_size, sizes.num_labels, **build)

    def _logits(
        self, encoded: BaseModelOutput, mask: Num[Array, "..."] | None
    ) -> Float[Array, "batch labels"]:
        pooled: Any = encoded.pooler_output
        return self.classifier(self.dropout(pooled))


class BertForTokenClassification(TokenClassifier):
    """BERT, without a pooler, with a classifier of every token; see `TokenClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = BertModel


class BertForQuestionAnswering(SpanClassifier):
    """BERT, without a pooler, with scores of an answer's ends; see `SpanClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = BertModel


class BertForMaskedLM(MaskedLM):
    """BERT with a score of every word at every position; see `MaskedLM`."""

    encoder_class: ClassVar[type[EncoderModel]] = BertModel
