"""ModernBERT: positions by rotation, gated perceptrons, norms first, attention mostly local.

Warner et al., 2024, https://arxiv.org/abs/2412.13663. What it has of its own:

- A layer's attention sees the whole sequence, or only ``local_attention // 2`` tokens on either
  side. Queries and keys are turned by their positions (Su et al., 2021,
  https://arxiv.org/abs/2104.09864) at frequencies of a base of its own for either kind. There is no
  table of positions and there are no token types.
- A norm comes before attention and before the perceptron, none before the first layer's attention
  (the embeddings have one), and one after the last layer. The last of the hidden states is the one
  after that norm, as ``output_hidden_states`` gives it in transformers; it is ``last_hidden_state``.
- A head is a dense layer, an activation and a norm, before the classifier; of the first token's
  output, of the mean of all tokens' (``classifier_pooling``), or of every token's.

A query whose window holds no token, as deep in padding, attends to all positions alike, as in
transformers' attention written out (``attn_implementation="eager"``); its kernels differ there.
What goes in and comes out: `jaxbrewer.zoo.untyped`.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar, Self, Unpack

import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, Num

from jaxbrewer.configurations import checks
from jaxbrewer.zoo.activations import ACTIVATIONS
from jaxbrewer.zoo.attention import (
    NOTHING,
    Reported,
    attend,
    if_asked,
    visible_keys,
    visible_tokens,
)
from jaxbrewer.zoo.blocks import Attended, Build, Stacked, Table, layer_norm, linear, run_layers
from jaxbrewer.zoo.configuration import (
    BOOKKEEPING_KEYS,
    FIXED_VALUES,
    ModelConfig,
    StackConfig,
    TransformerConfig,
    activation_name,
)
from jaxbrewer.zoo.dropout import Dropout
from jaxbrewer.zoo.encoder import EncoderModel
from jaxbrewer.zoo.hf import TensorNames
from jaxbrewer.zoo.masked_lm import Words, masked_lm_names
from jaxbrewer.zoo.outputs import BaseModelOutput
from jaxbrewer.zoo.tasks import TaskModel, check_span_labels
from jaxbrewer.zoo.untyped import (
    UntypedMaskedLM,
    UntypedModel,
    UntypedSequenceClassifier,
    UntypedSpanClassifier,
    UntypedTokenClassifier,
)

GLOBAL, LOCAL = "full_attention", "sliding_attention"
# Our fields for the bases of the rotations, by the kind of attention.
_THETAS = {GLOBAL: "global_rope_theta", LOCAL: "local_rope_theta"}

MODERNBERT_TENSORS = TensorNames(
    prefix="model",
    modules=(
        (r"embeddings\.word_embeddings", r"embeddings.tok_embeddings"),
        (r"encoder\.layer\.(\d+)\.attention\.qkv", r"layers.\1.attn.Wqkv"),
        (r"encoder\.layer\.(\d+)\.attention\.output", r"layers.\1.attn.Wo"),
        (r"encoder\.layer\.(\d+)\.attention_norm", r"layers.\1.attn_norm"),
        (r"encoder\.layer\.(\d+)\.intermediate", r"layers.\1.mlp.Wi"),
        (r"encoder\.layer\.(\d+)\.output", r"layers.\1.mlp.Wo"),
        (r"encoder\.layer\.(\d+)\.intermediate_norm", r"layers.\1.mlp_norm"),
        (r"encoder\.final_norm", r"final_norm"),
    ),
    extras=(r"decoder\..*",),
    heads=(r"head\..*", r"classifier\..*"),
    head=masked_lm_names("head.dense", "head.norm", "decoder"),
)


def _layer_types(value: Any) -> tuple[str, ...]:
    """Accepts a list of the two kinds of attention; keeps a tuple."""
    if not isinstance(value, list | tuple) or any(kind not in (GLOBAL, LOCAL) for kind in value):
        raise ValueError(f"expected a list of {GLOBAL!r} and {LOCAL!r}, one for each layer")
    return tuple(value)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModernBertConfig(TransformerConfig):
    """ModernBERT's config, with transformers' defaults, which are ModernBERT-base's.

    Files are read in both spellings: transformers 5's ``layer_types`` and ``rope_parameters``, and
    the published models' ``global_attn_every_n_layers``, ``global_rope_theta`` and
    ``local_rope_theta``; where both are there, the new one counts. It is what is written. Here
    ``layer_types`` is ``None`` where the other field says the same: every n-th layer, from the
    first, is global. So ``replace(num_hidden_layers=…)`` keeps the rhythm.

    ``max_position_embeddings`` is how long a sequence may be; the rotations know no end, and a
    greater number may be set.
    """

    model_type: ClassVar[str] = "modernbert"
    bookkeeping_keys: ClassVar[Collection[str]] = BOOKKEEPING_KEYS | {
        # Of how it is computed elsewhere, of pretraining, and what transformers does not read.
        "deterministic_flash_attn",
        "layer_norm_eps",
        "reference_compile",
        "repad_logits_with_grad",
        "sparse_pred_ignore_index",
        "sparse_prediction",
    }
    fixed_values: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        **FIXED_VALUES,
        "rope_scaling": (None,),
        "tie_last_hidden_states": (True, None),
    }

    vocab_size: int = 50368
    hidden_size: int = 768
    intermediate_size: int = 1152
    num_hidden_layers: int = 22
    num_attention_heads: int = 12
    hidden_activation: str = "gelu"
    max_position_embeddings: int = 8192
    initializer_cutoff_factor: float = 2.0
    norm_eps: float = 1e-5
    norm_bias: bool = False
    pad_token_id: int | None = 50283
    attention_bias: bool = False
    attention_dropout: float = 0.0
    layer_types: tuple[str, ...] | None = None
    global_attn_every_n_layers: int = 3
    global_rope_theta: float = 160000.0
    local_rope_theta: float = 10000.0
    local_attention: int = 128
    embedding_dropout: float = 0.0
    mlp_bias: bool = False
    mlp_dropout: float = 0.0
    classifier_pooling: str = "cls"
    classifier_dropout: float = 0.0
    classifier_bias: bool = False
    classifier_activation: str = "gelu"
    decoder_bias: bool = True

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        **TransformerConfig._checks,
        "hidden_size": checks.integer(1),
        "intermediate_size": checks.integer(1),
        "num_hidden_layers": checks.integer(1),
        "num_attention_heads": checks.integer(1),
        "hidden_activation": activation_name,
        "initializer_cutoff_factor": checks.positive,
        "norm_eps": checks.not_negative,
        "norm_bias": checks.boolean,
        "attention_bias": checks.boolean,
        "attention_dropout": checks.rate,
        "layer_types": checks.optional(_layer_types),
        "global_attn_every_n_layers": checks.integer(1),
        "global_rope_theta": checks.positive,
        "local_rope_theta": checks.positive,
        "local_attention": checks.integer(0),
        "embedding_dropout": checks.rate,
        "mlp_bias": checks.boolean,
        "mlp_dropout": checks.rate,
        "classifier_pooling": checks.one_of(("cls", "mean")),
        "classifier_dropout": checks.rate,
        "classifier_bias": checks.boolean,
        "classifier_activation": activation_name,
        "decoder_bias": checks.boolean,
    }

    def __post_init__(self):
        super().__post_init__()
        if self.layer_types is None:
            return
        for rhythm in (self.global_attn_every_n_layers, *range(1, self.num_hidden_layers + 1)):
            if self.layer_types == _every(rhythm, self.num_hidden_layers):
                object.__setattr__(self, "global_attn_every_n_layers", rhythm)
                object.__setattr__(self, "layer_types", None)
                return

    def _problems(self) -> Iterable[str]:
        yield from super()._problems()
        heads = self.num_attention_heads
        if self.hidden_size % (2 * heads):
            yield (
                f"hidden_size={self.hidden_size} is not a multiple of twice "
                f"num_attention_heads={heads}, and positions turn pairs of a head's numbers"
            )
        if self.layer_types is not None and len(self.layer_types) != self.num_hidden_layers:
            yield (
                f"layer_types names {len(self.layer_types)} layers, but "
                f"num_hidden_layers={self.num_hidden_layers}"
            )

    @property
    def kinds(self) -> tuple[str, ...]:
        """The kind of attention of each layer, as ``layer_types`` spells it."""
        return self.layer_types or _every(self.global_attn_every_n_layers, self.num_hidden_layers)

    @property
    def sizes(self) -> StackConfig:
        """The config under the names that `jaxbrewer.zoo.blocks` reads."""
        return StackConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            intermediate_size=self.intermediate_size,
            hidden_act=self.hidden_activation,
            hidden_dropout_prob=self.classifier_dropout,
            attention_probs_dropout_prob=self.attention_dropout,
            layer_norm_eps=self.norm_eps,
            max_position_embeddings=self.max_position_embeddings,
            initializer_range=self.initializer_range,
            pad_token_id=self.pad_token_id,
            num_labels=self.num_labels,
            gradient_checkpointing=self.gradient_checkpointing,
        )

    @classmethod
    def from_dict(
        cls, values: Mapping[str, Any], *, ignore: Collection[str] = (), **changes: Any
    ) -> Self:
        """Builds a config from either spelling; see `ModelConfig.from_dict`.

        Raises ``ValueError`` besides for ``rope_parameters`` other than a base for either kind of
        attention.
        """
        if isinstance(values, Mapping) and "rope_parameters" not in ignore:
            rotations = values.get("rope_parameters")
            values = {key: value for key, value in values.items() if key != "rope_parameters"}
            values |= _thetas(rotations)
        return super().from_dict(values, ignore=ignore, **changes)

    def to_dict(self) -> dict[str, Any]:
        """The config in transformers 5's spelling, which `from_dict` and transformers read back."""
        values = super().to_dict()
        del values["global_attn_every_n_layers"]
        thetas = {kind: values.pop(field) for kind, field in _THETAS.items()}
        values["layer_types"] = list(self.kinds)
        values["rope_parameters"] = {
            kind: {"rope_theta": theta, "rope_type": "default"} for kind, theta in thetas.items()
        }
        return dict(sorted(values.items()))


def _every(rhythm: int, layers: int) -> tuple[str, ...]:
    """The kinds of layers of which every so many-th, from the first, is global."""
    return tuple(LOCAL if layer % rhythm else GLOBAL for layer in range(layers))


def _thetas(rotations: Any) -> dict[str, float]:
    """Our fields out of ``rope_parameters``: by the kind of attention, ``{"rope_theta": base}``."""
    if rotations is None:
        return {}
    if not isinstance(rotations, Mapping) or not all(
        kind in _THETAS and isinstance(given, Mapping | None) for kind, given in rotations.items()
    ):
        raise ValueError(
            f"rope_parameters={checks.short(rotations)}, expected {GLOBAL!r} and {LOCAL!r}, each "
            "with its 'rope_theta'"
        )
    found = {}
    for kind, given in rotations.items():
        given = dict(given or {})
        how = given.pop("rope_type", given.pop("type", "default"))
        theta = given.pop("rope_theta", None)
        if how != "default" or given:
            rest = {"rope_type": how, **given} if how != "default" else given
            name, value = next(iter(rest.items()))
            raise ValueError(
                f"rope_parameters[{kind!r}]: {name}={value!r} is not supported, only a 'rope_theta' "
                "with the rope_type 'default' is"
            )
        if theta is not None:
            found[_THETAS[kind]] = theta
    return found


def _dense(
    config: ModernBertConfig,
    width_in: int,
    width_out: int,
    *,
    use_bias: bool,
    deviation: float | None = None,
    **build: Unpack[Build],
) -> nnx.Linear:
    """A dense layer; its weights deviate by ``initializer_range`` at first, unless it is given."""
    init = _cut_normal(config, config.initializer_range if deviation is None else deviation)
    return linear(config, width_in, width_out, use_bias=use_bias, kernel_init=init, **build)


def _cut_normal(config: ModernBertConfig, deviation: float) -> nnx.Initializer:
    """A normal distribution, cut off at ``initializer_cutoff_factor`` deviations."""
    cut = config.initializer_cutoff_factor
    return nnx.initializers.truncated_normal(deviation, lower=-cut, upper=cut)


def _narrow(config: ModernBertConfig) -> float:
    """The deviation of weights whose products are added to what layers hand on."""
    return config.initializer_range / (2 * config.num_hidden_layers) ** 0.5


def _norm(config: ModernBertConfig, **build: Unpack[Build]) -> nnx.LayerNorm:
    return layer_norm(config.sizes, config.hidden_size, use_bias=config.norm_bias, **build)


class ModernBertEmbeddings(nnx.Module):
    """Word embeddings, normalised and dropped out. The row of padding gets no gradient."""

    def __init__(self, config: ModernBertConfig, **build: Unpack[Build]):
        init = _cut_normal(config, config.initializer_range)
        rows, width, pad = config.vocab_size, config.hidden_size, config.pad_token_id
        self.word_embeddings = Table(rows, width, init, pad, **build)
        self.norm = _norm(config, **build)
        self.dropout = Dropout(config.embedding_dropout, rngs=build["rngs"])

    def words(self, input_ids: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """The word embeddings alone."""
        return self.word_embeddings(input_ids)

    def __call__(
        self,
        inputs_embeds: Float[Array, "batch length width"],
        token_type_ids: None,
        position_ids: Int[Array, "#batch length"],
    ) -> Float[Array, "batch length width"]:
        """Normalises ``inputs_embeds``, which `words` gives; positions are the layers'."""
        return self.dropout(self.norm(inputs_embeds))


class ModernBertAttention(nnx.Module):
    """Multi-head attention whose queries and keys are turned by their positions."""

    def __init__(self, config: ModernBertConfig, **build: Unpack[Build]):
        width, bias = config.hidden_size, config.attention_bias
        self.num_heads = config.num_attention_heads
        self.qkv = _dense(config, width, 3 * width, use_bias=bias, **build)
        self.output = _dense(
            config, width, width, use_bias=bias, deviation=_narrow(config), **build
        )
        self.dropout = Dropout(config.attention_dropout, rngs=build["rngs"])

    def __call__(
        self,
        hidden: Float[Array, "batch length width"],
        visible: Bool[Array, "#batch 1 #length length"] | None,
        turns: Float[Array, "2 #batch length 1 half"],
        reported: Reported = NOTHING,
    ) -> Attended:
        """The attended sequence, and what is reported; ``turns`` are from `rotations`.

        Queries and keys are reported as they are before they are turned.
        """
        heads = self.qkv(hidden).reshape(*hidden.shape[:2], 3, self.num_heads, -1)
        query, key, value = heads[:, :, 0], heads[:, :, 1], heads[:, :, 2]
        context, weights = attend(
            turned(query, turns), turned(key, turns), value, visible, self.dropout, reported.weights
        )
        qkv = if_asked(reported, (query, key, value))
        return self.dropout(self.output(context.reshape(hidden.shape))), weights, qkv


class ModernBertLayer(nnx.Module):
    """Attention and a gated perceptron, each added to what went into the norm before it.

    The first layer has no norm before its attention.
    """

    def __init__(self, config: ModernBertConfig, *, is_first: bool, **build: Unpack[Build]):
        width, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.hidden_act = config.hidden_activation
        self.attention_norm = None if is_first else _norm(config, **build)
        self.attention = ModernBertAttention(config, **build)
        self.intermediate_norm = _norm(config, **build)
        self.intermediate = _dense(config, width, 2 * inner, use_bias=bias, **build)
        self.output = _dense(
            config, inner, width, use_bias=bias, deviation=_narrow(config), **build
        )
        self.dropout = Dropout(config.mlp_dropout, rngs=build["rngs"])

    def __call__(
        self,
        hidden: Float[Array, "batch length width"],
        visible: Bool[Array, "#batch 1 #length length"] | None,
        turns: Float[Array, "2 #batch length 1 half"],
        reported: Reported = NOTHING,
    ) -> Attended:
        """The layer's output, and what is reported."""
        normed = hidden if self.attention_norm is None else self.attention_norm(hidden)
        attended, weights, qkv = self.attention(normed, visible, turns, reported)
        hidden = hidden + attended
        inner = self.intermediate(self.intermediate_norm(hidden))
        inner, gate = jnp.split(inner, 2, axis=-1)
        gated = ACTIVATIONS[self.hidden_act](inner) * gate
        return hidden + self.output(self.dropout(gated)), weights, qkv


class ModernBertEncoder(nnx.Module):
    """A stack of layers of either kind of attention, and a norm."""

    def __init__(self, config: ModernBertConfig, **build: Unpack[Build]):
        self.config = config
        self.layer = nnx.List(
            ModernBertLayer(config, is_first=index == 0, **build)
            for index in range(config.num_hidden_layers)
        )
        self.final_norm = _norm(config, **build)

    def __call__(
        self,
        hidden: Float[Array, "batch length width"],
        visible: Bool[Array, "batch 1 #length length"] | None,
        positions: Int[Array, "#batch length"],
        reported: Reported = NOTHING,
    ) -> Stacked:
        """The input, every layer's output, the last one's normed, and what is reported."""
        config = self.config
        near = near_keys(visible, hidden.shape[1], config.local_attention // 2)
        keys = {GLOBAL: visible, LOCAL: near}
        turn = functools.partial(
            rotations,
            positions,
            config.hidden_size // config.num_attention_heads,
            dtype=jnp.promote_types(hidden.dtype, jnp.float32),
        )
        thetas = {kind: getattr(config, _THETAS[kind]) for kind in set(config.kinds)}
        turns = {kind: turn(theta) for kind, theta in thetas.items()}

        def call(layer: Any, hidden: Array, visible: Array | None, turns: Array) -> Any:
            return layer(hidden, visible, turns, reported)

        inputs = [(keys[kind], turns[kind]) for kind in config.kinds]
        stacked = run_layers(
            self.layer, hidden, inputs, call, checkpoints=config.gradient_checkpointing
        )
        *before, last = stacked.hidden
        return stacked._replace(hidden=(*before, self.final_norm(last)))


def near_keys(
    visible: Bool[Array, "batch 1 #length length"] | None, length: int, reach: int
) -> Bool[Array, "#batch 1 #length length"] | None:
    """The visible keys that are at most ``reach`` places from a query."""
    if reach >= length - 1:
        return visible
    place = np.arange(length)
    near = jnp.asarray(np.abs(place[:, None] - place) <= reach)[None, None]
    return near if visible is None else near & visible


def rotations(
    positions: Int[Array, "#batch length"], width: int, theta: float, dtype: Dtype
) -> Float[Array, "2 #batch length 1 half"]:
    """Cosine and sine of ``position / theta^(2i / width)``, for i below half of a head's width."""
    frequencies = jnp.asarray(theta ** -(np.arange(0, width, 2) / width), dtype)
    angles = positions.astype(dtype)[..., None, None] * frequencies
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def turned(
    heads: Float[Array, "batch length heads width"],
    turns: Float[Array, "2 #batch length 1 half"],
) -> Float[Array, "batch length heads width"]:
    """Numbers i and ``i + width / 2`` of each head as a point, turned by its angle from `rotations`."""
    x, y = jnp.split(heads.astype(turns.dtype), 2, axis=-1)
    cos, sin = turns
    return jnp.concatenate([x * cos - y * sin, y * cos + x * sin], axis=-1).astype(heads.dtype)


class ModernBertModel(UntypedModel):
    """ModernBERT's encoder; see `UntypedModel`.

    A sequence longer than ``max_position_embeddings`` is refused, as in the other models.
    Transformers takes it.
    """

    tensor_names: ClassVar[TensorNames] = MODERNBERT_TENSORS
    config_class: ClassVar[type[ModelConfig]] = ModernBertConfig
    config: ModernBertConfig

    def _new_embeddings(self, **build: Unpack[Build]) -> nnx.Module:
        return ModernBertEmbeddings(self.config, **build)

    def _new_encoder(self, **build: Unpack[Build]) -> nnx.Module:
        return ModernBertEncoder(self.config, **build)

    def _run(
        self,
        embedded: Float[Array, "batch length width"],
        mask: Num[Array, "..."] | None,
        positions: Int[Array, "#batch length"],
        reported: Reported,
    ) -> Stacked:
        return self.encoder(embedded, visible_keys(mask), positions, reported)


class ModernBertPredictionHead(nnx.Module):
    """A dense layer, an activation and a norm."""

    def __init__(self, config: ModernBertConfig, **build: Unpack[Build]):
        width = config.hidden_size
        bias, narrow = config.classifier_bias, _narrow(config)
        self.dense = _dense(config, width, width, use_bias=bias, deviation=narrow, **build)
        self.activation = config.classifier_activation
        self.norm = _norm(config, **build)

    def __call__(self, hidden: Float[Array, "*shape width"]) -> Float[Array, "*shape width"]:
        """What the classifier sees."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(hidden)))


class _Classifier(TaskModel):
    """An encoder, a prediction head, dropout and a classifier."""

    config: ModernBertConfig

    def __init__(
        self,
        config: ModernBertConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        width, labels = config.hidden_size, config.num_labels
        self._set_encoder(self.encoder_class(config, **build))
        self.head = ModernBertPredictionHead(config, **build)
        self.dropout = Dropout(config.classifier_dropout, rngs=rngs)
        self.classifier = _dense(
            config, width, labels, use_bias=True, deviation=width**-0.5, **build
        )

    def _classified(self, hidden: Float[Array, "*shape width"]) -> Float[Array, "*shape labels"]:
        return self.classifier(self.dropout(self.head(hidden)))


class ModernBertForSequenceClassification(_Classifier, UntypedSequenceClassifier):
    """ModernBERT with a classifier of the first token or of all tokens' mean.

    The mean is over the tokens that are not masked; of none it is 0, where transformers gives NaN.
    See `SequenceClassifier`.
    """

    encoder_class: ClassVar[type[EncoderModel]] = ModernBertModel

    def _logits(
        self, encoded: BaseModelOutput, mask: Num[Array, "..."] | None
    ) -> Float[Array, "batch labels"]:
        hidden = encoded.last_hidden_state
        if self.config.classifier_pooling == "cls":
            return self._classified(hidden[:, 0])
        return self._classified(mean_of_tokens(hidden, mask))


class ModernBertForTokenClassification(_Classifier, UntypedTokenClassifier):
    """ModernBERT with a classifier of every token; see `TokenClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = ModernBertModel

    def _logits(
        self, hidden: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length labels"]:
        return self._classified(hidden)


class ModernBertForQuestionAnswering(_Classifier, UntypedSpanClassifier):
    """ModernBERT with scores of an answer's ends; see `SpanClassifier`."""

    encoder_class: ClassVar[type[EncoderModel]] = ModernBertModel

    def __init__(
        self,
        config: ModernBertConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        check_span_labels(config)
        super().__init__(config, dtype=dtype, param_dtype=param_dtype, rngs=rngs)

    def _scores(self, hidden: Float[Array, "batch length width"]) -> Float[Array, "batch length 2"]:
        return self._classified(hidden)


class ModernBertForMaskedLM(UntypedMaskedLM):
    """ModernBERT with a score of every word at every position; see `MaskedLM`.

    The scores are of all positions, whatever ``sparse_prediction`` says in the file: that leaves
    out, in training, what has no label. ``decoder_bias=False`` leaves the words' bias out.
    """

    encoder_class: ClassVar[type[EncoderModel]] = ModernBertModel

    def _new_transform(self, config: Any, **build: Unpack[Build]) -> nnx.Module:
        return ModernBertPredictionHead(config, **build)

    def _new_words(self, config: Any, **build: Unpack[Build]) -> Words:
        return Words(config, use_bias=config.decoder_bias, **build)


def mean_of_tokens(
    hidden: Float[Array, "batch length width"], mask: Num[Array, "..."] | None
) -> Float[Array, "batch width"]:
    """The mean over the tokens that are not masked, in float32 or wider; 0 where all are."""
    if mask is None:
        return hidden.mean(axis=1)
    seen = visible_tokens(mask)[:, :, None]
    wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    mean = jnp.where(seen, wide, 0).sum(axis=1) / jnp.maximum(seen.sum(axis=1), 1)
    return mean.astype(hidden.dtype)
