"""DeBERTa v2 and v3: attention to what a token is and to how far it is, each by products of its own.

He et al., 2020, https://arxiv.org/abs/2006.03654; 2021, https://arxiv.org/abs/2111.09543. Beside the
product of query and key, a score has one of the query with what stands for the distance (``c2p``), and
one of the key with the same (``p2c``); a table of distances is shared by all layers. Padding is zero
from the embeddings on, and sees nothing. What goes in and comes out: `jaxbrewer.zoo.encoder` and
`jaxbrewer.zoo.tasks`.

The distances of a sequence are known when it is traced: which row of the table each one has is a
constant of its length (`DisentangledConfig.rows_of`), and products are laid out by a shift
(`jaxbrewer.zoo.relative`).
"""

import dataclasses
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Self, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, Num

from jaxbrewer.configurations import checks
from jaxbrewer.zoo import heads
from jaxbrewer.zoo.activations import ACTIVATIONS
from jaxbrewer.zoo.attention import (
    NOTHING,
    Reported,
    attend,
    if_asked,
    visible_keys,
    visible_tokens,
)
from jaxbrewer.zoo.bert import BERT_EXTRAS, BERT_HEADS, BERT_MODULES, BERT_WORDS
from jaxbrewer.zoo.blocks import (
    Attended,
    Build,
    Encoder,
    Stacked,
    Table,
    layer_norm,
    linear,
    resolved,
    run_layers,
)
from jaxbrewer.zoo.configuration import (
    BOOKKEEPING_KEYS,
    FIXED_VALUES,
    ModelConfig,
    StackConfig,
    activation_name,
)
from jaxbrewer.zoo.dropout import Dropout
from jaxbrewer.zoo.encoder import EncoderModel
from jaxbrewer.zoo.hf import TensorNames
from jaxbrewer.zoo.masked_lm import MaskedLM
from jaxbrewer.zoo.outputs import BaseModelOutput
from jaxbrewer.zoo.relative import distances, shifted
from jaxbrewer.zoo.tasks import SequenceClassifier, SpanClassifier, TokenClassifier

DEBERTA_EXTRAS = (
    *BERT_EXTRAS,
    # Of a model that has no use for it (``position_biased_input``), and of pretraining.
    r"embeddings\.position_embeddings\..*",
    r"cls\..*",
    r"lm_predictions\..*",
    r"mask_predictions\..*",
)
# The head for masked words: BERT's, which published files call by the names of the paper's code.
DEBERTA_WORDS: dict[str, Any] = BERT_WORDS | {
    "aliases": (
        *BERT_WORDS["aliases"],
        (r"lm_predictions\.lm_head\.bias", "cls.predictions.decoder.bias"),
        (
            r"lm_predictions\.lm_head\.(dense|LayerNorm)\.(weight|bias)",
            r"cls.predictions.transform.\1.\2",
        ),
    )
}
DEBERTA_V2_TENSORS = TensorNames(
    prefix="deberta",
    modules=(
        (
            r"encoder\.layer\.(\d+)\.attention\.(query|key|value)",
            r"encoder.layer.\1.attention.self.\2_proj",
        ),
        (
            r"encoder\.layer\.(\d+)\.attention\.position_(query|key)",
            r"encoder.layer.\1.attention.self.pos_\2_proj",
        ),
        (r"encoder\.position_norm", r"encoder.LayerNorm"),
        (r"encoder\.conv\.norm", r"encoder.conv.LayerNorm"),
        *BERT_MODULES,
    ),
    extras=DEBERTA_EXTRAS,
    heads=BERT_HEADS,
    **DEBERTA_WORDS,
)


def _position_products(value: Any) -> tuple[str, ...]:
    """Accepts ``'c2p|p2c'``, a list of the two, one of them, or None for neither; keeps a tuple."""
    given = value.lower().split("|") if isinstance(value, str) else value or ()
    if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
        raise ValueError("expected a list of 'c2p' and 'p2c'")
    names = tuple(name.strip() for name in given)
    if len(set(names)) < len(names) or not set(names) <= {"c2p", "p2c"}:
        raise ValueError("expected 'c2p', 'p2c', both or neither")
    return names


@dataclasses.dataclass(frozen=True, kw_only=True)
class DisentangledConfig(StackConfig):
    """The fields that both versions of DeBERTa have.

    ``max_relative_positions`` below 1 stands for ``max_position_embeddings``. Without
    ``position_biased_input`` there is no table of positions, and sequences may be of any length;
    with ``type_vocab_size=0`` there is none of token types, which are then of no account.
    """

    bookkeeping_keys: ClassVar[Collection[str]] = BOOKKEEPING_KEYS | {
        # Which of two spellings the head for masked words has in the file, both of which are read; and
        # what transformers does not read.
        "legacy",
        "padding_idx",
    }
    fixed_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **FIXED_VALUES,
        "talking_head": (False, None),
    }
    # Fields that transformers' config has not, and that are written only where they are set.
    _unwritten: ClassVar[tuple[str, ...]] = ("cls_dropout",)

    layer_norm_eps: float = 1e-7
    type_vocab_size: int = 0
    relative_attention: bool = False
    max_relative_positions: int = -1
    position_biased_input: bool = True
    pos_att_type: tuple[str, ...] = ()
    pooler_dropout: float = 0.0
    pooler_hidden_act: str = "gelu"
    cls_dropout: float | None = None

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        **StackConfig._checks,
        "type_vocab_size": checks.integer(0),
        "relative_attention": checks.boolean,
        "max_relative_positions": checks.integer(-1),
        "position_biased_input": checks.boolean,
        "pos_att_type": _position_products,
        "pooler_dropout": checks.rate,
        "pooler_hidden_act": activation_name,
        "cls_dropout": checks.optional(checks.rate),
    }

    @property
    def token_types(self) -> int:
        """The rows of the table of token types, 0 where there is none."""
        return self.type_vocab_size

    @property
    def positions(self) -> int:
        """The rows of the table of positions, 0 where there is none."""
        return self.max_position_embeddings if self.position_biased_input else 0

    @property
    def furthest(self) -> int:
        """The distance from which on all are alike."""
        given = self.max_relative_positions
        return given if given > 0 else self.max_position_embeddings

    @property
    def span(self) -> int:
        """Half of the rows of the table of distances: those of one direction."""
        return self.furthest

    def rows_of(self, distance: np.ndarray) -> np.ndarray:
        """The row of the table of each distance, from query to key."""
        return np.clip(distance + self.span, 0, 2 * self.span - 1)

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, ignore: Collection[str] = (), **changes: Any
    ) -> Self:
        """Builds a config from Hugging Face's keys; see `ModelConfig.from_dict`.

        Raises ``ValueError`` besides for a width of embeddings, pooler or heads of its own.
        """
        config = super().from_dict(values, ignore=[*ignore, *_WIDTHS])
        for key, meant in _WIDTHS.items():
            value = None if key in ignore else values.get(key)
            if value not in (None, meant(config)):
                raise ValueError(
                    f"{key}={value!r} is not supported, only {meant(config)} is, with "
                    f"hidden_size={config.hidden_size} and "
                    f"num_attention_heads={config.num_attention_heads}"
                )
        return config.replace(**changes)

    def to_dict(self) -> dict[str, Any]:
        """The config under Hugging Face's keys, which `from_dict` and transformers read back."""
        values = super().to_dict()
        values["pos_att_type"] = list(self.pos_att_type) or None
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in self._unwritten:
            if values[name] == defaults[name]:
                del values[name]
        return values


# Keys of a width that must be what the other widths make it.
_WIDTHS: Mapping[str, Any] = {
    "embedding_size": lambda config: config.hidden_size,
    "pooler_hidden_size": lambda config: config.hidden_size,
    "attention_head_size": lambda config: config.hidden_size // config.num_attention_heads,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class DebertaV2Config(DisentangledConfig):
    """DeBERTa v2's and v3's config, with transformers' defaults; see `DisentangledConfig`.

    ``position_buckets`` above 0 brings far distances together, `log_buckets`;
    ``norm_rel_ebd="layer_norm"`` norms the table of distances; ``share_att_key`` makes the products
    with it by the weights of queries and keys; ``conv_kernel_size`` above 0 adds a convolution of
    the embeddings to the first layer's output. None of these is transformers' default; the published
    models have the first three, v2-xlarge and larger ones all four.
    """

    model_type: ClassVar[str] = "deberta-v2"
    _unwritten: ClassVar[tuple[str, ...]] = (
        *DisentangledConfig._unwritten,
        "conv_act",
        "conv_groups",
        "conv_kernel_size",
        "norm_rel_ebd",
        "position_buckets",
        "share_att_key",
    )

    vocab_size: int = 128100
    hidden_size: int = 1536
    num_hidden_layers: int = 24
    num_attention_heads: int = 24
    intermediate_size: int = 6144
    position_buckets: int = -1
    share_att_key: bool = False
    norm_rel_ebd: str = "none"
    conv_kernel_size: int = 0
    conv_groups: int = 1
    conv_act: str = "tanh"

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        **DisentangledConfig._checks,
        "position_buckets": checks.integer(-1),
        "share_att_key": checks.boolean,
        "norm_rel_ebd": checks.one_of(("none", "layer_norm")),
        "conv_kernel_size": checks.integer(0),
        "conv_groups": checks.integer(1),
        "conv_act": activation_name,
    }

    def _problems(self) -> Iterable[str]:
        yield from super()._problems()
        buckets = self.position_buckets
        if buckets > 0 and not 2 <= buckets < 2 * (self.furthest - 1):
            yield (
                f"position_buckets={buckets}, expected 2 or more and fewer than "
                f"{2 * (self.furthest - 1)}, twice the distances there are"
            )
        if self.conv_kernel_size and not self.conv_kernel_size % 2:
            yield f"conv_kernel_size={self.conv_kernel_size}, expected an odd number, or 0 for none"
        if self.hidden_size % self.conv_groups:
            yield (
                f"hidden_size={self.hidden_size} is not a multiple of "
                f"conv_groups={self.conv_groups}"
            )

    @property
    def span(self) -> int:
        """Half of the rows of the table of distances: those of one direction."""
        return self.position_buckets if self.position_buckets > 0 else self.furthest

    def rows_of(self, distance: np.ndarray) -> np.ndarray:
        """The row of the table of each distance, from query to key."""
        if self.position_buckets > 0:
            distance = log_buckets(distance, self.position_buckets, self.furthest)
        return super().rows_of(distance)


def log_buckets(distance: np.ndarray, buckets: int, furthest: int) -> np.ndarray:
    """Distances as they are up to half of the buckets, and by their logarithm beyond.

    ``m + ⌈ln(d / m) / ln((furthest - 1) / m) · (m - 1)⌉`` with m half of the buckets and the sign of
    the distance d; in float32, as transformers has it, for a rounding can move a bucket.
    """
    middle = buckets // 2
    far = np.maximum(np.abs(distance), 1)
    share = np.log((far / middle).astype(np.float32)) / np.log(np.float32((furthest - 1) / middle))
    wide = np.ceil(share * np.float32(middle - 1)).astype(int) + middle
    return np.where(far <= middle, distance, wide * np.sign(distance))


class DisentangledAttention(nnx.Module):
    """Multi-head attention by content and by distance, up to and with the output projection.

    A score is ``(q · k + q · k_d + k · q_d) / √(n · width)``, where k_d and q_d are made of the row of
    the distance, and n is 1 and one for each of the two that the config names.
    """

    position_key: nnx.Linear | None = None
    position_query: nnx.Linear | None = None

    def __init__(self, config: Any, **build: Unpack[Build]):
        width, self.num_heads = config.hidden_size, config.num_attention_heads
        self.scale = (width // self.num_heads * (1 + len(config.pos_att_type))) ** -0.5
        self.c2p = "c2p" in config.pos_att_type
        self.p2c = "p2c" in config.pos_att_type
        self.config = config
        self._set_products(config, **build)
        self.output = linear(config, width, width, **build)
        self.position_dropout = Dropout(config.hidden_dropout_prob, rngs=build["rngs"])
        self.dropout = Dropout(config.attention_probs_dropout_prob, rngs=build["rngs"])

    def _set_products(self, config: Any, **build: Unpack[Build]) -> None:
        """Makes the dense layers of queries, keys and values, and those of the distances."""
        width = config.hidden_size

        def dense() -> nnx.Linear:
            return linear(config, width, width, **build)

        self.query, self.key, self.value = dense(), dense(), dense()
        if config.relative_attention and config.share_att_key:
            return
        if config.relative_attention and self.c2p:
            self.position_key = dense()
        if config.relative_attention and self.p2c:
            self.position_query = dense()

    def _content(self, hidden: Float[Array, "batch length width"]) -> tuple[Array, Array, Array]:
        """Queries, keys and values by head."""
        projected = (self.query(hidden), self.key(hidden), self.value(hidden))
        query, key, value = map(self._split, projected)
        return query, key, value

    def _split(self, projected: Float[Array, "*shape width"]) -> Float[Array, "*shape heads each"]:
        return projected.reshape(*projected.shape[:-1], self.num_heads, -1)

    def __call__(
        self,
        hidden: Float[Array, "batch length width"],
        visible: Bool[Array, "batch 1 #length length"] | None = None,
        reported: Reported = NOTHING,
        relative: Float[Array, "rows width"] | None = None,
    ) -> Attended:
        """The attended sequence, and what is reported; ``relative`` is the table of distances.

        Queries, keys and values are reported of what the tokens are, without the distances.
        """
        query, key, value = self._content(hidden)
        bias = None if relative is None else self._bias(query, key, relative)
        context, weights = attend(
            query, key, value, visible, self.dropout, reported.weights, scale=self.scale, bias=bias
        )
        qkv = if_asked(reported, (query, key, value))
        return self.output(context.reshape(hidden.shape)), weights, qkv

    def _bias(
        self,
        query: Float[Array, "batch length heads each"],
        key: Float[Array, "batch length heads each"],
        relative: Float[Array, "rows width"],
    ) -> Float[Array, "batch heads length length"] | None:
        """What the distances add to the scores; None where the config has neither product."""
        relative = self.position_dropout(relative)
        distance = distances(query.shape[1])
        parts = []
        if self.c2p:
            dense = self.key if self.position_key is None else self.position_key
            keys = self._split(dense(relative))[self.config.rows_of(distance)]
            parts.append(shifted(_by_distance(query, keys)))
        if self.p2c:
            dense = self.query if self.position_query is None else self.position_query
            queries = self._split(dense(relative))[self.config.rows_of(-distance)]
            parts.append(jnp.swapaxes(shifted(_by_distance(key, queries)), -1, -2))
        return sum(parts) * self.scale if parts else None


def _by_distance(
    heads: Float[Array, "batch length heads each"], rows: Float[Array, "distances heads each"]
) -> Float[Array, "batch heads length distances"]:
    """The products of every position with what stands for every distance, in float32 or wider."""
    wide = jnp.promote_types(heads.dtype, jnp.float32)
    return jnp.einsum("bihd,chd->bhic", heads, rows, preferred_element_type=wide)


class FirstConvolution(nnx.Module):
    """A convolution over the embeddings, added to the first layer's output, and a norm."""

    def __init__(self, config: DebertaV2Config, **build: Unpack[Build]):
        width, kernel = config.hidden_size, config.conv_kernel_size
        self.conv = nnx.Conv(
            width,
            width,
            (kernel,),
            padding=(kernel - 1) // 2,
            feature_group_count=config.conv_groups,
            kernel_init=nnx.initializers.normal(config.initializer_range),
            **resolved(build),
        )
        self.norm = layer_norm(config, width, **build)
        self.activation = config.conv_act
        self.dropout = Dropout(config.hidden_dropout_prob, rngs=build["rngs"])

    def __call__(
        self,
        embedded: Float[Array, "batch length width"],
        hidden: Float[Array, "batch length width"],
        is_token: Bool[Array, "batch length"] | None,
    ) -> Float[Array, "batch length width"]:
        """The first layer's output as the second takes it; zero at padding."""
        seen = True if is_token is None else is_token[:, :, None]
        inner = self.dropout(jnp.where(seen, self.conv(embedded), 0))
        return jnp.where(seen, self.norm(hidden + ACTIVATIONS[self.activation](inner)), 0)


class DisentangledEncoder(Encoder):
    """A stack of layers that share a table of distances.

    ``attention_class`` is that of its layers, called as `DisentangledAttention` is.
    """

    attention_class: ClassVar[type[nnx.Module]] = DisentangledAttention
    rel_embeddings: Table | None = None
    position_norm: nnx.LayerNorm | None = None
    conv: FirstConvolution | None = None

    def __init__(self, config: Any, **build: Unpack[Build]):
        super().__init__(config, attention_class=self.attention_class, **build)
        if config.relative_attention:
            rows, width = 2 * config.span, config.hidden_size
            self.rel_embeddings = Table(rows, width, config.initializer_range, **build)

    def __call__(  # type: ignore[override]
        self,
        hidden: Float[Array, "batch length width"],
        visible: Bool[Array, "batch 1 #length length"] | None,
        is_token: Bool[Array, "batch length"] | None,
        reported: Reported = NOTHING,
    ) -> Stacked:
        """The input and every layer's output, and what is reported of every layer."""
        relative = None if self.rel_embeddings is None else self.rel_embeddings.rows()
        if relative is not None and self.position_norm is not None:
            relative = self.position_norm(relative)

        def call(
            layer: Any, hidden: Array, visible: Any, relative: Any, conv: Any, is_token: Any
        ) -> Any:
            output, *reports = layer(hidden, visible, reported, relative)
            return (output if conv is None else conv(hidden, output, is_token)), *reports

        inputs: list[tuple[Any, ...]] = [(visible, relative, None, None)] * len(self.layer)
        inputs[0] = (visible, relative, self.conv, is_token)
        return run_layers(self.layer, hidden, inputs, call, checkpoints=self.checkpoints)


class DebertaV2Encoder(DisentangledEncoder):
    """A stack of layers that share a table of distances, with a norm and a convolution of v2's."""

    def __init__(self, config: DebertaV2Config, **build: Unpack[Build]):
        super().__init__(config, **build)
        if config.norm_rel_ebd == "layer_norm":
            self.position_norm = layer_norm(config, config.hidden_size, **build)
        if config.conv_kernel_size:
            self.conv = FirstConvolution(config, **build)


class DisentangledModel(EncoderModel):
    """An encoder of either version; see `EncoderModel`.

    Raises ``ValueError`` besides for ``position_ids`` where there is no table of positions.
    """

    stack_class: ClassVar[type[DisentangledEncoder]]
    config: DisentangledConfig

    def _new_encoder(self, **build: Unpack[Build]) -> nnx.Module:
        return self.stack_class(self.config, **build)

    def longest(self) -> int | None:
        """How long a sequence may be, None where there is no end."""
        return self.config.positions or None

    def _given_positions(self, position_ids: Int[Array, "#batch length"]) -> Array:
        if not self.config.positions:
            raise ValueError(
                "position_ids are given, but with position_biased_input=False nothing depends on "
                "them: leave them out"
            )
        return super()._given_positions(position_ids)

    def _run(
        self,
        embedded: Float[Array, "batch length width"],
        mask: Num[Array, "..."] | None,
        positions: Int[Array, "#batch length"],
        reported: Reported,
    ) -> Stacked:
        if mask is None:
            return self.encoder(embedded, None, None, reported)
        is_token = visible_tokens(mask)
        visible: Any = visible_keys(mask)
        if mask.ndim == 2:
            visible = visible & is_token[:, None, :, None]
        embedded = jnp.where(is_token[:, :, None], embedded, 0)
        return self.encoder(embedded, visible, is_token, reported)


class DebertaV2Model(DisentangledModel):
    """DeBERTa v2's and v3's encoder; see `DisentangledModel`."""

    tensor_names: ClassVar[TensorNames] = DEBERTA_V2_TENSORS
    config_class: ClassVar[type[ModelConfig]] = DebertaV2Config
    stack_class: ClassVar[type[DisentangledEncoder]] = DebertaV2Encoder


class ContextPooler(nnx.Module):
    """The first token's output through a dense layer and an activation."""

    def __init__(self, config: DisentangledConfig, **build: Unpack[Build]):
        self.dense = linear(config, config.hidden_size, config.hidden_size, **build)
        self.activation = config.pooler_hidden_act
        self.dropout = Dropout(config.pooler_dropout, rngs=build["rngs"])

    def __call__(self, hidden: Float[Array, "batch length width"]) -> Float[Array, "batch width"]:
        """The summary of each sequence."""
        return ACTIVATIONS[self.activation](self.dense(self.dropout(hidden[:, 0])))


class PooledClassifier(SequenceClassifier):
    """A classifier of what a pooler of its own makes of the first token.

    Without a ``problem_type``, labels of two axes are targets of a softmax over the classes, as in
    transformers, where the other models take them for multi-labels. See `SequenceClassifier`.
    """

    config: DisentangledConfig

    def __init__(
        self,
        config: DisentangledConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self._set_encoder(self.encoder_class(config, **build))
        self.pooler = ContextPooler(config, **build)
        self.classifier = linear(config, config.hidden_size, config.num_labels, **build)
        rate = config.cls_dropout
        self.dropout = Dropout(config.hidden_dropout_prob if rate is None else rate, rngs=rngs)

    def _logits(
        self, encoded: BaseModelOutput, mask: Num[Array, "..."] | None
    ) -> Float[Array, "batch labels"]:
        return self.classifier(self.dropout(self.pooler(encoded.last_hidden_state)))

    def _loss(
        self,
        logits: Float[Array, "batch labels"],
        labels: Num[Array, " batch"] | Num[Array, "batch labels"],
    ) -> Float[Array, ""]:
        is_soft = labels.ndim == 2 and min(logits.shape[1], labels.shape[1]) > 1
        if self.config.problem_type is None and is_soft:
            return heads.soft_cross_entropy(logits, labels)
        return super()._loss(logits, labels)


class DebertaV2ForSequenceClassification(PooledClassifier):
    """DeBERTa v2 or v3 with a classifier of the first token; see `PooledClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = DebertaV2Model


class DebertaV2ForTokenClassification(TokenClassifier):
    """DeBERTa v2 or v3 with a classifier of every token; see `TokenClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = DebertaV2Model


class DebertaV2ForQuestionAnswering(SpanClassifier):
    """DeBERTa v2 or v3 with scores of an answer's ends; see `SpanClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = DebertaV2Model


class DebertaV2ForMaskedLM(MaskedLM):
    """DeBERTa v2 or v3 with a score of every word at every position; see `MaskedLM`."""

    encoder_class: ClassVar[type[EncoderModel]] = DebertaV2Model
