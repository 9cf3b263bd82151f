"""ELECTRA: BERT whose embeddings may be narrower than its layers, and without a pooler.

Clark et al., 2020, https://arxiv.org/abs/2003.10555. These are the classes for the discriminator;
`ElectraForMaskedLM` is the
generator. Where ``embedding_size`` is not ``hidden_size`` a dense layer
brings the embeddings to the layers' width, and its output is the first of the hidden states. What
goes in and comes out: `jaxbrewer.zoo.encoder` and `jaxbrewer.zoo.tasks`.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar

import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype

from jaxbrewer.configurations import checks
from jaxbrewer.zoo.bert import BERT_EXTRAS, BERT_HEADS, BERT_MODULES
from jaxbrewer.zoo.blocks import Build, linear
from jaxbrewer.zoo.configuration import (
    BOOKKEEPING_KEYS,
    EncoderConfig,
    ModelConfig,
    TransformerConfig,
)
from jaxbrewer.zoo.encoder import EncoderModel
from jaxbrewer.zoo.hf import TensorNames
from jaxbrewer.zoo.masked_lm import MaskedLM, masked_lm_names
from jaxbrewer.zoo.tasks import SequenceClassifier, SpanClassifier, TokenClassifier

ELECTRA_TENSORS = TensorNames(
    prefix="electra",
    modules=BERT_MODULES,
    extras=(
        *BERT_EXTRAS,
        r"discriminator_predictions\..*",
        r"generator_predictions\..*",
        r"generator_lm_head\..*",
    ),
    heads=BERT_HEADS,
    head=masked_lm_names(
        "generator_predictions.dense", "generator_predictions.LayerNorm", "generator_lm_head"
    ),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ElectraConfig(EncoderConfig):
    """ELECTRA's config; the defaults are ELECTRA-small's, as in transformers."""

    model_type: ClassVar[str] = "electra"
    bookkeeping_keys: ClassVar[frozenset[str]] = BOOKKEEPING_KEYS | {
        # Of the multiple-choice head and of the generator that a discriminator was trained with.
        "generator_size",
        "summary_activation",
        "summary_last_dropout",
        "summary_type",
        "summary_use_proj",
    }

    embedding_size: int = 128
    hidden_size: int = 256
    num_attention_heads: int = 4
    intermediate_size: int = 1024

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        **EncoderConfig._checks,
        "embedding_size": checks.integer(1),
    }

    @property
    def embedding_width(self) -> int:
        """The width of the embedding tables, before the projection to ``hidden_size``."""
        return self.embedding_size


class ElectraModel(EncoderModel):
    """ELECTRA's encoder; see `EncoderModel`. ``inputs_embeds`` are ``embedding_size`` wide."""

    tensor_names: ClassVar[TensorNames] = ELECTRA_TENSORS
    config_class: ClassVar[type[ModelConfig]] = ElectraConfig

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        super().__init__(config, **build)
        sizes = config.sizes
        if sizes.embedding_width != sizes.hidden_size:
            self.embeddings_project = linear(
                sizes, sizes.embedding_width, sizes.hidden_size, **build
            )


class ElectraForSequenceClassification(SequenceClassifier):
    """ELECTRA with a classifier of the first token, dense and GELU; see `SequenceClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = ElectraModel
    head_activation: ClassVar[str] = "gelu"


class ElectraForTokenClassification(TokenClassifier):
    """ELECTRA with a classifier of every token; see `TokenClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = ElectraModel


class ElectraForQuestionAnswering(SpanClassifier):
    """ELECTRA with scores of an answer's ends; see `SpanClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = ElectraModel


class ElectraForMaskedLM(MaskedLM):
    """ELECTRA with a score of every word at every position; see `MaskedLM`."""

    encoder_class: ClassVar[type[EncoderModel]] = ElectraModel
    head_activation: ClassVar[str | None] = "gelu"
