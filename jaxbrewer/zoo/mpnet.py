"""MPNet: BERT whose attention is biased by distance, and whose positions pass over padding.

Song et al., 2020, https://arxiv.org/abs/2004.09297. Every layer adds one learned number to a score,
by head and by how far the key is from the query; the distances share 32 buckets, made by
`distance_buckets`. Positions count as RoBERTa's do, always from the padding id 1. There are no token
types. What goes in and comes out: `jaxbrewer.zoo.untyped`.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxbrewer.zoo.attention import NOTHING, Reported
from jaxbrewer.zoo.bert import BERT_EXTRAS, BERT_HEADS
from jaxbrewer.zoo.blocks import Build, Encoder, Stacked, resolved
from jaxbrewer.zoo.configuration import FIXED_VALUES, ModelConfig, StackConfig
from jaxbrewer.zoo.encoder import EncoderModel, PooledModel
from jaxbrewer.zoo.hf import TensorNames
from jaxbrewer.zoo.relative import distances, shifted
from jaxbrewer.zoo.roberta import ROBERTA_WORDS, positions_past_padding
from jaxbrewer.zoo.untyped import (
    UntypedMaskedLM,
    UntypedModel,
    UntypedSequenceClassifier,
    UntypedSpanClassifier,
    UntypedTokenClassifier,
)

# Of the paper's code, and of transformers', which has no other whatever a config says.
_BUCKETS = 32
_FURTHEST = 128
_PADDING = 1

MPNET_TENSORS = TensorNames(
    prefix="mpnet",
    modules=(
        (r"embeddings\.norm", r"embeddings.LayerNorm"),
        (
            r"encoder\.layer\.(\d+)\.attention\.([qkvo])(uery|ey|alue|utput)",
            r"encoder.layer.\1.attention.attn.\2",
        ),
        (r"encoder\.layer\.(\d+)\.attention_norm", r"encoder.layer.\1.attention.LayerNorm"),
        (r"encoder\.layer\.(\d+)\.(intermediate|output)", r"encoder.layer.\1.\2.dense"),
        (r"encoder\.layer\.(\d+)\.output_norm", r"encoder.layer.\1.output.LayerNorm"),
    ),
    tensors=((r"encoder\.relative\.bias", r"encoder.relative_attention_bias.weight"),),
    extras=(*BERT_EXTRAS, r"lm_head\..*"),
    heads=BERT_HEADS,
    **ROBERTA_WORDS,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class MPNetConfig(StackConfig):
    """MPNet's config, with transformers' defaults.

    Sequences are at most ``max_position_embeddings - 2`` long. The published models have
    ``max_position_embeddings=514``, which is not the default.
    """

    model_type: ClassVar[str] = "mpnet"
    fixed_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **FIXED_VALUES,
        "relative_attention_num_buckets": (_BUCKETS,),
    }

    vocab_size: int = 30527
    pad_token_id: int | None = _PADDING

    def _problems(self) -> Iterable[str]:
        yield from super()._problems()
        if self.pad_token_id != _PADDING:
            yield f"pad_token_id={self.pad_token_id}, but MPNet's padding is always {_PADDING}"
        if self.max_position_embeddings <= _PADDING + 1:
            yield (
                f"max_position_embeddings={self.max_position_embeddings} leaves no position after "
                f"padding's, {_PADDING}"
            )


class RelativeBias(nnx.Module):
    """What is added to the scores of attention, by head and by the bucket of a distance."""

    def __init__(self, config: StackConfig, **build: Unpack[Build]):
        how = resolved(build)
        init = nnx.initializers.normal(config.initializer_range)
        shape = (_BUCKETS, config.num_attention_heads)
        self.bias = nnx.Param(init(how["rngs"].params(), shape, how["param_dtype"]))

    def __call__(self, length: int) -> Float[Array, "1 heads length length"]:
        """The bias of every query and key of a sequence."""
        by_distance = self.bias[...][distance_buckets(distances(length))].T
        rows = jnp.broadcast_to(by_distance[:, None], (by_distance.shape[0], length, 2 * length))
        return shifted(rows)[None]


class MPNetEncoder(Encoder):
    """A stack of layers that share what they add to the scores of attention."""

    def __init__(self, config: StackConfig, **build: Unpack[Build]):
        super().__init__(config, **build)
        self.relative = RelativeBias(config, **build)

    def __call__(  # type: ignore[override]
        self,
        hidden: Float[Array, "batch length width"],
        visible: Bool[Array, "batch 1 #length length"] | None = None,
        reported: Reported = NOTHING,
    ) -> Stacked:
        """The input and every layer's output, and what is reported of every layer."""
        return super().__call__(hidden, visible, reported, self.relative(hidden.shape[1]))


class MPNetModel(UntypedModel, PooledModel):
    """MPNet's encoder, with a pooler unless ``add_pooling_layer=False``; see `UntypedModel`.

    A padded sequence must fit the positions as a whole. Transformers takes a longer one if its
    tokens without the padding fit.
    """

    tensor_names: ClassVar[TensorNames] = MPNET_TENSORS
    config_class: ClassVar[type[ModelConfig]] = MPNetConfig

    def _new_encoder(self, **build: Unpack[Build]) -> nnx.Module:
        return MPNetEncoder(self.config.sizes, **build)

    def _position_pad_id(self) -> int:
        return _PADDING

    def longest(self) -> int:
        """How long a sequence may be."""
        return self.config.max_position_embeddings - _PADDING - 1

    def _positions(
        self, input_ids: Int[Array, "batch length"] | None, length: int
    ) -> Int[Array, "#batch length"]:
        return positions_past_padding(input_ids, length, _PADDING)


class MPNetForSequenceClassification(UntypedSequenceClassifier):
    """MPNet with a classifier of the first token, dense and tanh; see `SequenceClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = MPNetModel


class MPNetForTokenClassification(UntypedTokenClassifier):
    """MPNet with a classifier of every token; see `TokenClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = MPNetModel


class MPNetForQuestionAnswering(UntypedSpanClassifier):
    """MPNet with scores of an answer's ends; see `SpanClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = MPNetModel


class MPNetForMaskedLM(UntypedMaskedLM):
    """MPNet with a score of every word at every position; see `MaskedLM`."""

    encoder_class: ClassVar[type[EncoderModel]] = MPNetModel
    head_activation: ClassVar[str | None] = "gelu"


def distance_buckets(distance: np.ndarray) -> np.ndarray:
    """The bucket of each distance from query to key: 0 to 15 backwards, 16 to 31 forwards.

    Half of either are for one distance each, 0 to 7; the others widen by a factor of √2, and the
    last holds 128 and more, too.
    """
    half, exact = _BUCKETS // 2, _BUCKETS // 4
    far = np.abs(distance)
    share = np.log(np.maximum(far, 1).astype(np.float32) / exact) / math.log(_FURTHEST / exact)
    wide = np.minimum(exact + (share * (half - exact)).astype(int), half - 1)
    return np.where(distance < 0, half, 0) + np.where(far < exact, far, wide)
