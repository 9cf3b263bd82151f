"""The parts that BERT and its relatives are built of.

Every part takes a config and, by keyword, `Build`. Statistics of layer norms, attention scores and
the softmax are computed in float32 or wider, whatever the ``dtype`` is.
"""

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple, NotRequired, TypeAlias, TypedDict, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int

from jaxbrewer.zoo.activations import ACTIVATIONS
from jaxbrewer.zoo.attention import NOTHING, QKV, Reported, attend, if_asked
from jaxbrewer.zoo.configuration import ModelConfig, StackConfig
from jaxbrewer.zoo.dropout import Dropout
from jaxbrewer.zoo.lookup import look_up

Attended: TypeAlias = tuple[
    Float[Array, "batch length width"],
    Float[Array, "batch heads length length"] | None,
    QKV | None,
]
"""What attention and a layer give: their output, and what is `Reported`."""


class Stacked(NamedTuple):
    """What a stack of layers gives: its input and every layer's output, and their `Reported`."""

    hidden: tuple[Float[Array, "batch length width"], ...]
    weights: tuple[Float[Array, "batch heads length length"] | None, ...]
    qkv: tuple[QKV | None, ...]


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
    *,
    use_bias: bool = True,
    kernel_init: nnx.Initializer | None = None,
    **build: Unpack[Build],
) -> nnx.Linear:
    """A dense layer as BERT initialises it: N(0, ``initializer_range``) weights and zero bias."""
    return nnx.Linear(
        width_in,
        width_out,
        use_bias=use_bias,
        kernel_init=kernel_init or nnx.initializers.normal(config.initializer_range),
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
    config: StackConfig,
    width: int,
    *,
    use_bias: bool = True,
    **build: Unpack[Build],
) -> nnx.LayerNorm:
    """A layer norm with the config's epsilon and the exact two-pass variance."""
    return nnx.LayerNorm(
        width,
        use_bias=use_bias,
        epsilon=config.layer_norm_eps,
        use_fast_variance=False,
        **resolved(build),
    )


class Table(nnx.Module):
    """An embedding table, drawn by ``init`` at first, or from N(0, ``init``) where it is a number.

    The row of ``pad_id`` starts at zero and gets no gradient, as in torch. An id beyond the table
    gives NaN, and in training one below 0 too.
    """

    # In half precision the table itself may stay float32; see `jaxbrewer.models.precision`.
    rounds_rows = True

    def __init__(
        self,
        rows: int,
        width: int,
        init: float | nnx.Initializer,
        pad_id: int | None = None,
        **build: Unpack[Build],
    ):
        how = resolved(build)
        init = init if callable(init) else nnx.initializers.normal(init)
        rows_at_first = init(how["rngs"].params(), (rows, width), how["param_dtype"])
        if pad_id is not None:
            rows_at_first = rows_at_first.at[pad_id].set(0)
        self.embedding = nnx.Param(rows_at_first)
        self.num_embeddings = rows
        self.pad_id = pad_id
        self.dtype = how["dtype"]

    def rows(self) -> Float[Array, "rows width"]:
        """The whole table, in the type it computes in."""
        return self.embedding[...].astype(self.dtype)

    def __call__(self, ids: Int[Array, "*shape"]) -> Float[Array, "*shape width"]:
        """The row of each id."""
        rows = look_up(self.embedding[...], ids, self.dtype)
        if self.pad_id is None:
            return rows
        is_pad = (ids == self.pad_id)[..., None]
        return jnp.where(is_pad, jax.lax.stop_gradient(rows), rows)


class Embeddings(nnx.Module):
    """Word, position and token-type embeddings, summed, normalised and dropped out.

    The config may do without the second or the third; ``position_pad_id`` names a position that is
    padding's. The row of padding starts at zero and gets no gradient, as in torch.
    """

    def __init__(
        self,
        config: StackConfig,
        *,
        position_pad_id: int | None = None,
        **build: Unpack[Build],
    ):
        width = config.embedding_width

        def table(rows: int, pad_id: int | None = None) -> Table:
            return Table(rows, width, config.initializer_range, pad_id, **build)

        positions, types = config.positions, config.token_types
        self.word_embeddings = table(config.vocab_size, config.pad_token_id)
        self.position_embeddings = table(positions, position_pad_id) if positions else None
        self.token_type_embeddings = table(types) if types else None
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
        """Adds the other embeddings to ``inputs_embeds``, which `words` gives.

        Token types and positions are of no account where there is no table of them.
        """
        summed = inputs_embeds
        if self.token_type_embeddings is not None:
            if token_type_ids is None:
                token_type_ids = jnp.zeros(inputs_embeds.shape[:2], jnp.int32)
            summed = summed + self.token_type_embeddings(token_type_ids)
        if self.position_embeddings is not None:
            summed = summed + self.position_embeddings(position_ids)
        return self.dropout(self.norm(summed))


class SelfAttention(nnx.Module):
    """Multi-head attention of a sequence to itself, up to and with the output projection."""

    def __init__(self, config: StackConfig, **build: Unpack[Build]):
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
        reported: Reported = NOTHING,
        relative: Float[Array, "1 heads length length"] | None = None,
    ) -> Attended:
        """The attended sequence, and what is reported; ``relative`` is the bias of `attend`."""
        batch, length, width = hidden.shape
        split = (batch, length, self.num_heads, width // self.num_heads)
        query, key, value = (
            dense(hidden).reshape(split) for dense in (self.query, self.key, self.value)
        )
        context, weights = attend(
            query, key, value, visible, self.dropout, reported.weights, bias=relative
        )
        qkv = if_asked(reported, (query, key, value))
        return self.output(context.reshape(hidden.shape)), weights, qkv


class EncoderLayer(nnx.Module):
    """Attention and a two-layer perceptron, each with a residual and a layer norm after it.

    Dropout is applied to what either adds; ``drop_attended=False`` spares attention's.
    ``attention_class`` is built and called as `SelfAttention` is.
    """

    def __init__(
        self,
        config: StackConfig,
        *,
        drop_attended: bool = True,
        attention_class: Any = SelfAttention,
        **build: Unpack[Build],
    ):
        width, inner = config.hidden_size, config.intermediate_size
        self.hidden_act = config.hidden_act
        self.drop_attended = drop_attended
        self.attention = attention_class(config, **build)
        self.attention_norm = layer_norm(config, width, **build)
        self.intermediate = linear(config, width, inner, **build)
        self.output = linear(config, inner, width, **build)
        self.output_norm = layer_norm(config, width, **build)
        self.dropout = Dropout(config.hidden_dropout_prob, rngs=build["rngs"])

    def __call__(
        self,
        hidden: Float[Array, "batch length width"],
        visible: Bool[Array, "batch 1 #length length"] | None = None,
        reported: Reported = NOTHING,
        relative: Float[Array, "..."] | None = None,
    ) -> Attended:
        """The layer's output, and what is reported; ``relative`` is for its attention."""
        attended, weights, qkv = self.attention(hidden, visible, reported, relative)
        if self.drop_attended:
            attended = self.dropout(attended)
        hidden = self.attention_norm(attended + hidden)
        inner = ACTIVATIONS[self.hidden_act](self.intermediate(hidden))
        return self.output_norm(self.dropout(self.output(inner)) + hidden), weights, qkv


class Encoder(nnx.Module):
    """A stack of layers; with the config's ``gradient_checkpointing`` backward computes each again."""

    def __init__(
        self,
        config: StackConfig,
        *,
        drop_attended: bool = True,
        attention_class: Any = SelfAttention,
        **build: Unpack[Build],
    ):
        how = {"drop_attended": drop_attended, "attention_class": attention_class}
        self.layer = nnx.List(
            EncoderLayer(config, **how, **build) for _ in range(config.num_hidden_layers)
        )
        self.checkpoints = config.gradient_checkpointing

    def __call__(
        self,
        hidden: Float[Array, "batch length width"],
        visible: Bool[Array, "batch 1 #length length"] | None = None,
        reported: Reported = NOTHING,
        relative: Float[Array, "..."] | None = None,
    ) -> Stacked:
        """The input and every layer's output, and what is reported of every layer.

        ``relative`` goes to every layer's attention.
        """

        def call(layer: Any, hidden: Array, visible: Any, relative: Any) -> Any:
            return layer(hidden, visible, reported, relative)

        inputs = [(visible, relative)] * len(self.layer)
        return run_layers(self.layer, hidden, inputs, call, checkpoints=self.checkpoints)


def run_layers(
    layers: Iterable[nnx.Module],
    hidden: Float[Array, "batch length width"],
    inputs: Iterable[tuple[Any, ...]],
    call: Callable[..., Any],
    *,
    checkpoints: bool,
) -> Stacked:
    """Runs layers in turn, by ``call(layer, hidden, *inputs)`` with the inputs of each.

    With ``checkpoints`` the backward pass computes each again.
    """
    call = nnx.remat(call) if checkpoints else call
    all_hidden, all_weights, all_qkv = [hidden], [], []
    for layer, given in zip(layers, inputs, strict=True):
        hidden, weights, qkv = call(layer, hidden, *given)
        all_hidden.append(hidden)
        all_weights.append(weights)
        all_qkv.append(qkv)
    return Stacked(tuple(all_hidden), tuple(all_weights), tuple(all_qkv))


class Pooler(nnx.Module):
    """The first token's output through a dense layer and tanh."""

    def __init__(self, config: StackConfig, **build: Unpack[Build]):
        width = config.hidden_size
        self.dense = linear(config, width, width, **build)

    def __call__(self, hidden: Float[Array, "batch length width"]) -> Float[Array, "batch width"]:
        """The summary of each sequence."""
        return jnp.tanh(self.dense(hidden[:, 0]))


class ClassificationHead(nnx.Module):
    """Logits from the first token's output: a dense layer, an activation, and a projection.

    Dropout is applied before each of the two layers.
    """

    def __init__(self, config: StackConfig, activation: str, **build: Unpack[Build]):
        width = config.hidden_size
        self.dense = linear(config, width, width, **build)
        self.out_proj = linear(config, width, config.num_labels, **build)
        self.activation = activation
        self.dropout = Dropout(config.head_dropout, rngs=build["rngs"])

    def __call__(self, hidden: Float[Array, "batch length width"]) -> Float[Array, "batch labels"]:
        """The logits of each sequence."""
        inner = ACTIVATIONS[self.activation](self.dense(self.dropout(hidden[:, 0])))
        return self.out_proj(self.dropout(inner))
