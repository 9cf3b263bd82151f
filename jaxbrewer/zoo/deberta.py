"""DeBERTa, the first version: the second's attention, with queries, keys and values in one product.

He et al., 2020, https://arxiv.org/abs/2006.03654. What both have is told in
`jaxbrewer.zoo.deberta_v2`. This one has no buckets of distances and no convolution; keys and the
products for ``c2p`` have no bias.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar, Unpack

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbrewer.zoo.bert import BERT_HEADS, BERT_MODULES
from jaxbrewer.zoo.blocks import Build, linear, resolved
from jaxbrewer.zoo.configuration import ModelConfig
from jaxbrewer.zoo.deberta_v2 import (
    DEBERTA_EXTRAS,
    DEBERTA_WORDS,
    DisentangledAttention,
    DisentangledConfig,
    DisentangledEncoder,
    DisentangledModel,
    PooledClassifier,
)
from jaxbrewer.zoo.encoder import EncoderModel
from jaxbrewer.zoo.hf import TensorNames
from jaxbrewer.zoo.masked_lm import MaskedLM
from jaxbrewer.zoo.tasks import SpanClassifier, TokenClassifier

DEBERTA_TENSORS = TensorNames(
    prefix="deberta",
    modules=(
        (
            r"encoder\.layer\.(\d+)\.attention\.in_proj",
            r"encoder.layer.\1.attention.self.in_proj",
        ),
        (
            r"encoder\.layer\.(\d+)\.attention\.position_key",
            r"encoder.layer.\1.attention.self.pos_proj",
        ),
        (
            r"encoder\.layer\.(\d+)\.attention\.position_query",
            r"encoder.layer.\1.attention.self.pos_q_proj",
        ),
        *BERT_MODULES,
    ),
    tensors=(
        (
            r"encoder\.layer\.(\d+)\.attention\.(q|v)_shift\.bias",
            r"encoder.layer.\1.attention.self.\2_bias",
        ),
    ),
    extras=DEBERTA_EXTRAS,
    heads=BERT_HEADS,
    **DEBERTA_WORDS,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaConfig(DisentangledConfig):
    """DeBERTa's config, with transformers' defaults; see `DisentangledConfig`."""

    model_type: ClassVar[str] = "deberta"
    fixed_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **DisentangledConfig.fixed_values,
        # The second version's, which the first does not have.
        "conv_kernel_size": (0, None),
        "norm_rel_ebd": ("none", None),
        "position_buckets": (-1, 0, None),
        "share_att_key": (False, None),
    }

    vocab_size: int = 50265


class Shift(nnx.Module):
    """Numbers to add to a dense layer's output, zero at first."""

    def __init__(self, width: int, **build: Unpack[Build]):
        how = resolved(build)
        self.bias = nnx.Param(jnp.zeros(width, how["param_dtype"]))
        self.dtype = how["dtype"]

    def __call__(self, inputs: Float[Array, "*shape width"]) -> Float[Array, "*shape width"]:
        """The sum."""
        return inputs + self.bias[...].astype(self.dtype)


class DebertaAttention(DisentangledAttention):
    """`DisentangledAttention` with one product for queries, keys and values, head by head."""

    def _set_products(self, config: Any, **build: Unpack[Build]) -> None:
        width = config.hidden_size
        self.in_proj = linear(config, width, 3 * width, use_bias=False, **build)
        self.q_shift, self.v_shift = Shift(width, **build), Shift(width, **build)
        if config.relative_attention and self.c2p:
            self.position_key = linear(config, width, width, use_bias=False, **build)
        if config.relative_attention and self.p2c:
            self.position_query = linear(config, width, width, **build)

    def _content(self, hidden: Float[Array, "batch length width"]) -> tuple[Array, Array, Array]:
        query, key, value = jnp.split(self._split(self.in_proj(hidden)), 3, axis=-1)

        def moved(heads: Array, shift: Shift) -> Array:
            return self._split(shift(heads.reshape(hidden.shape)))

        return moved(query, self.q_shift), key, moved(value, self.v_shift)


class DebertaEncoder(DisentangledEncoder):
    """A stack of layers that share a table of distances."""

    attention_class: ClassVar[type[nnx.Module]] = DebertaAttention


class DebertaModel(DisentangledModel):
    """DeBERTa's encoder; see `DisentangledModel`."""

    tensor_names: ClassVar[TensorNames] = DEBERTA_TENSORS
    config_class: ClassVar[type[ModelConfig]] = DebertaConfig
    stack_class: ClassVar[type[DisentangledEncoder]] = DebertaEncoder


class DebertaForSequenceClassification(PooledClassifier):
    """DeBERTa with a classifier of the first token; see `PooledClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = DebertaModel


class DebertaForTokenClassification(TokenClassifier):
    """DeBERTa with a classifier of every token; see `TokenClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = DebertaModel


class DebertaForQuestionAnswering(SpanClassifier):
    """DeBERTa with scores of an answer's ends; see `SpanClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = DebertaModel


class DebertaForMaskedLM(MaskedLM):
    """DeBERTa with a score of every word at every position; see `MaskedLM`."""

    encoder_class: ClassVar[type[EncoderModel]] = DebertaModel
