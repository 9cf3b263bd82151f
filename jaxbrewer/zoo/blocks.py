"""The parts that BERT and its relatives are built of.

Every part takes a config and, by keyword, `Build`. Statistics of layer norms, attention scores and
the softmax are computed in float32 or wider, whatever the ``dtype`` is.
"""

from typing import Any, NotRequired, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from jaxbrewer.zoo.activations import ACTIVATIONS
from jaxbrewer.zoo.attention import Reported, attend
from jaxbrewer.zoo.configuration import EncoderConfig, ModelConfig
from jaxbrewer.zoo.dropout import Dropout


class Build(TypedDict):
    """How a part is built.

    ``dtype`` is what it computes in (``param_dtype`` unless given), ``param_dtype`` what its
    parameters are stored in (float32 unless given), ``rngs`` the source of initial values and of
    dropout.
    """

    dtype: NotRequired[Dtype | None]
    param_dtype: NotRequired[Dtype]
    rngs: nnx.Rngs


def resolved(build: Build) -> dict[str, Any]:
    """How a part is built, as flax takes it, with the defaults filled in."""
    param_dtype = build.get("param_dtype", jnp.float32)
    dtype = build.get("dtype")
    dtype = param_dtype if dtype is None else dtype
    return {"dtype": dtype, "param_dtype": param_dtype, "rngs": build["rngs"]}


def linear(
    config: ModelConfig,
    width_in: int,
    width_out: int,
    **build: Unpack[Build],
) -> nnx.Linear:
    """A dense layer as BERT initialises it: N(0, ``initializer_range``) weights and zero bias."""
    return nnx.Linear(
        width_in,
        width_out,
        kernel_init=nnx.initializers.normal(config.initializer_range),
        dot_general=rows_times_matrix,
        **resolved(build),
    )


def rows_times_matrix(
    inputs: Float[Array, "*rows width_in"],
    kernel: Float[Array, "width_in width_out"],
    dimension_numbers: Any,
    **options: Any,
) -> Float[Array, "*rows width_out"]:
    """A dense layer's `jax.lax.dot_general` with all rows on one axis.

    The kernel's gradient then sums over one axis. Where it sums over batch and length apart, XLA
    transposes the activations first, which on CPU costs a twentieth of a whole training step.
    """
    rows = inputs.reshape(-1, inputs.shape[-1])
    product = jax.lax.dot_general(rows, kernel, (((1,), (0,)), ((), ())), **options)
    return product.reshape(*inputs.shape[:-1], kernel.shape[1])


def layer_norm(
    config: EncoderConfig,
    width: int,
    **build: Unpack[Build],
) -> nnx.LayerNorm:
    """A layer norm with the config's epsilon and the exact two-pass variance."""
    return nnx.LayerNorm(
        width,
        epsilon=config.layer_norm_eps,
        use_fast_variance=False,
        **resolved(build),
    )


class Table(nnx.Module):
    """An embedding table, N(0, ``initializer_range``) at first.

    The row of ``pad_id`` starts at zero and gets no gradient, as in torch. An id beyond the table
    gives NaN, and in training one below 0 too.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        initializer_range: float,
        pad_id: int | None = None,
        **build: Unpack[Build],
    ):
        how = resolved(build)
        init = nnx.initializers.normal(initializer_range)
        rows_at_first = init(how["rngs"].params(), (rows, width), how["param_dtype"])
        if pad_id is not None:
            rows_at_first = rows_at_first.at[pad_id].set(0)
        self.embedding = nnx.Param(rows_at_first)
        self.num_embeddings = rows
        self.pad_id = pad_id
        self.dtype = how["dtype"]

    def __call__(self, ids: Int[Array, "*shape"]) -> Float[Array, "*shape width"]:
        """The row of each id."""
        rows = jnp.take(self.embedding[...].astype(self.dtype), ids, axis=0)
        if self.pad_id is None:
            return rows
        is_pad = (ids == self.pad_id)[..., None]
        return jnp.where(is_pad, jax.lax.stop_gradient(rows), rows)


class Embeddings(nnx.Module):
    """Word, position and token-type embeddings, summed, normalised and dropped out.

    ``token_types=False`` builds it without the third, ``position_pad_id`` names a position that is
    padding's. The row of padding starts at zero and gets no gradient, as in torch.
    """

    def __init__(
        self,
        config: EncoderConfig,
        *,
        token_types: bool = True,
        position_pad_id: int | None = None,
        **build: Unpack[Build],
    ):
        width = config.embedding_width

        def table(rows: int, pad_id: int | None = None) -> Table:
            return Table(rows, width, config.initializer_range, pad_id, **build)

        self.word_embeddings = table(config.vocab_size, config.pad_token_id)
        self.position_embeddings = table(config.max_position_embeddings, position_pad_id)
        self.token_type_embeddings = table(config.type_vocab_size) if token_types else None
        self.norm = layer_norm(config, width, **build)
        self.dropout = Dropout(config.hidden_dropout_prob, rngs=build["rngs"])

    def words(self, input_ids: Int[Array, "batch length"]) -> Float[Array, "batch length width"]:
        """The word embeddings alone."""
        return self.word_embeddings(input_ids)

    def __call__(
        self,
        inputs_embeds: Float[Array, "batch length width"],
        token_type_ids: Int[Array, "batch length"] | None,
        position_ids: Int[Array, "#batch length"],
    ) -> Float[Array, "batch length width"]:
        """Adds the other embeddings to ``inputs_embeds``, which `words` gives."""
        summed = inputs_embeds
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                token_type_ids = jnp.zeros(inputs_embeds.shape[:2], jnp.int32)
            summed = summed + self.token_type_embeddings(token_type_ids)
        summed = summed + self.position_embeddings(position_ids)
        return self.dropout(self.norm(summed))


class SelfAttention(nnx.Module):
    """Multi-head attention of a sequence to itself, up to and with the output projection."""

    def __init__(self, config: EncoderConfig, **build: Unpack[Build]):
        width = config.hidden_size
        self.num_heads = config.num_attention_heads

        def dense() -> nnx.Linear:
            return linear(config, width, width, **build)

        self.query, self.key, self.value, self.output = dense(), dense(), dense(), dense()
        self.dropout = Dropout(config.attention_probs_dropout_prob, rngs=build["rngs"])

    def __call__(
        self,
        hidden: Float[Array, "batch length width"],
        visible: Bool[Array, "batch 1 #length length"] | None = None,
        reported: Reported = None,
    ) -> tuple[
        Float[Array, "batch length width"], Float[Array, "batch heads length length"] | None
    ]:
        """The attended sequence, and what `attend` reports."""
        batch, length, width = hidden.shape
        split = (batch, length, self.num_heads, width // self.num_heads)
        context, weights = attend(
            self.query(hidden).reshape(split),
            self.key(hidden).reshape(split),
            self.value(hidden).reshape(split),
            visible,
            self.dropout,
            reported,
        )
        return self.output(context.reshape(hidden.shape)), weights


class EncoderLayer(nnx.Module):
    """Attention and a two-layer perceptron, each with a residual and a layer norm after it.

    Dropout is applied to what either adds; ``drop_attended=False`` spares attention's.
    """

    def __init__(
        self, config: EncoderConfig, *, drop_attended: bool = True, **build: Unpack[Build]
    ):
        width, inner = config.hidden_size, config.intermediate_size
        self.hidden_act = config.hidden_act
        self.drop_attended = drop_attended
        self.attention = SelfAttention(config, **build)
        self.attention_norm = layer_norm(config, width, **build)
        self.intermediate = linear(config, width, inner, **build)
        self.output = linear(config, inner, width, **build)
        self.output_norm = layer_norm(config, width, **build)
        self.dropout = Dropout(config.hidden_dropout_prob, rngs=build["rngs"])

    def __call__(
        self,
        hidden: Float[Array, "batch length width"],
        visible: Bool[Array, "batch 1 #length length"] | None = None,
        reported: Reported = None,
    ) -> tuple[
        Float[Array, "batch length width"], Float[Array, "batch heads length length"] | None
    ]:
        """The layer's output, and what `attend` reports."""
        attended, weights = self.attention(hidden, visible, reported)
        if self.drop_attended:
            attended = self.dropout(attended)
        hidden = self.attention_norm(attended + hidden)
        inner = ACTIVATIONS[self.hidden_act](self.intermediate(hidden))
        return self.output_norm(self.dropout(self.output(inner)) + hidden), weights


class Encoder(nnx.Module):
    """A stack of layers; with the config's ``gradient_checkpointing`` backward computes each again."""

    def __init__(
        self, config: EncoderConfig, *, drop_attended: bool = True, **build: Unpack[Build]
    ):
        self.layer = nnx.List(
            EncoderLayer(config, drop_attended=drop_attended, **build)
            for _ in range(config.num_hidden_layers)
        )
        self.checkpoints = config.gradient_checkpointing

    def __call__(
        self,
        hidden: Float[Array, "batch length width"],
        visible: Bool[Array, "batch 1 #length length"] | None = None,
        reported: Reported = None,
    ) -> tuple[
        tuple[Float[Array, "batch length width"], ...],
        tuple[Float[Array, "batch heads length length"] | None, ...],
    ]:
        """The input and every layer's output, and what `attend` reports of every layer."""

        def run(layer: EncoderLayer, hidden: Array, visible: Array | None) -> Any:
            return layer(hidden, visible, reported)

        run = nnx.remat(run) if self.checkpoints else run
        all_hidden, all_weights = [hidden], []
        for layer in self.layer:
            hidden, weights = run(layer, hidden, visible)
            all_hidden.append(hidden)
            all_weights.append(weights)
        return tuple(all_hidden), tuple(all_weights)


class Pooler(nnx.Module):
    """The first token's output through a dense layer and tanh."""

    def __init__(self, config: EncoderConfig, **build: Unpack[Build]):
        width = config.hidden_size
        self.dense = linear(config, width, width, **build)

    def __call__(self, hidden: Float[Array, "batch length width"]) -> Float[Array, "batch width"]:
        """The summary of each sequence."""
        return jnp.tanh(self.dense(hidden[:, 0]))


class ClassificationHead(nnx.Module):
    """Logits from the first token's output: a dense layer, an activation, and a projection.

    Dropout is applied before each of the two layers.
    """

    def __init__(self, config: EncoderConfig, activation: str, **build: Unpack[Build]):
        width = config.hidden_size
        self.dense = linear(config, width, width, **build)
        self.out_proj = linear(config, width, config.num_labels, **build)
        self.activation = activation
        self.dropout = Dropout(config.head_dropout, rngs=build["rngs"])

    def __call__(self, hidden: Float[Array, "batch length width"]) -> Float[Array, "batch labels"]:
        """The logits of each sequence."""
        inner = ACTIVATIONS[self.activation](self.dense(self.dropout(hidden[:, 0])))
        return self.out_proj(self.dropout(inner))
