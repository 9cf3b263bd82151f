"""A tagger with one bidirectional GRU, the small student of TextBrewer's CoNLL-2003 results.

Cho et al., 2014, https://arxiv.org/abs/1406.1078, in the form of torch's ``nn.GRU``, whose names
its file keeps: a torch state dict of an embedding table, an ``nn.GRU`` and a linear layer reads as
it is under ``bigru.embeddings``, ``bigru.gru`` and ``classifier``.
"""

import dataclasses
from collections.abc import Mapping
from typing import ClassVar, Unpack

import jax
import jax.numpy as jnp
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Bool, Float, Int, Num

from jaxbrewer.configurations import checks
from jaxbrewer.zoo import heads
from jaxbrewer.zoo.blocks import Build, Table, linear, resolved
from jaxbrewer.zoo.configuration import ModelConfig
from jaxbrewer.zoo.dropout import Dropout
from jaxbrewer.zoo.encoder import as_asked, either, embedded_words
from jaxbrewer.zoo.hf import PretrainedModel, TensorNames
from jaxbrewer.zoo.outputs import BaseModelOutput, TokenClassifierOutput

BIGRU_TENSORS = TensorNames(
    prefix="bigru",
    modules=(),
    tensors=(
        (r"gru\.forward\.input\.(weight|bias)", r"gru.\1_ih_l0"),
        (r"gru\.forward\.recurrent\.(weight|bias)", r"gru.\1_hh_l0"),
        (r"gru\.backward\.input\.(weight|bias)", r"gru.\1_ih_l0_reverse"),
        (r"gru\.backward\.recurrent\.(weight|bias)", r"gru.\1_hh_l0_reverse"),
    ),
    extras=(),
    heads=(r"classifier\..*",),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class BiGRUConfig(ModelConfig):
    """The config of a bidirectional GRU.

    ``embedding_size`` is the width of the embeddings, ``hidden_size`` of each direction's state,
    ``hidden_dropout_prob`` the rate of dropout on the embeddings and before the classifier.
    """

    model_type: ClassVar[str] = "bigru"

    vocab_size: int = 28996
    embedding_size: int = 768
    hidden_size: int = 768
    hidden_dropout_prob: float = 0.1

    _checks: ClassVar[Mapping[str, checks.Check]] = {
        **ModelConfig._checks,
        "embedding_size": checks.integer(1),
        "hidden_size": checks.integer(1),
        "hidden_dropout_prob": checks.rate,
    }

    @property
    def output_width(self) -> int:
        """How wide the last hidden state is."""
        return 2 * self.hidden_size


class Direction(nnx.Module):
    """A GRU that reads in one direction.

    With the gates' parts in the order r, z, n as torch has them::

        r = σ(x_r + h_r),  z = σ(x_z + h_z),  n = tanh(x_n + r · h_n),  h' = (1 − z) n + z h

    where ``x`` is the input's dense layer and ``h`` the state's, each with a bias. All weights are
    at first uniform in ±1/√``hidden_size``, as in torch.
    """

    def __init__(self, width_in: int, width: int, *, reverse: bool, **build: Unpack[Build]):
        bound = width**-0.5

        def init(key, shape, dtype=jnp.float32, out_sharding=None):
            return jax.random.uniform(key, shape, dtype, -bound, bound)

        def gates(inputs: int) -> nnx.Linear:
            return nnx.Linear(
                inputs, 3 * width, kernel_init=init, bias_init=init, **resolved(build)
            )

        self.width = width
        self.reverse = reverse
        self.input, self.recurrent = gates(width_in), gates(width)

    def __call__(
        self,
        embedded: Float[Array, "batch length inputs"],
        visible: Bool[Array, "batch length"],
    ) -> Float[Array, "batch length width"]:
        """The state after each token; 0 at hidden ones, which leave the state as it is."""
        inputs = self.input(embedded)
        wide = jnp.promote_types(inputs.dtype, jnp.float32)

        def step(state, now):
            x, is_visible = now
            x_r, x_z, x_n = jnp.split(x.astype(wide), 3, axis=-1)
            h_r, h_z, h_n = jnp.split(self.recurrent(state).astype(wide), 3, axis=-1)
            new = jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n)
            kept = jax.nn.sigmoid(x_z + h_z)
            following = (1 - kept) * new + kept * state
            seen = is_visible[:, None]
            return jnp.where(seen, following, state), jnp.where(seen, following, 0)

        first = jnp.zeros((embedded.shape[0], self.width), wide)
        by_time = jnp.swapaxes(inputs, 0, 1), jnp.swapaxes(visible, 0, 1)
        _, states = jax.lax.scan(step, first, by_time, reverse=self.reverse)
        return jnp.swapaxes(states, 0, 1).astype(inputs.dtype)


class GRU(nnx.Module):
    """Two directions side by side."""

    def __init__(self, width_in: int, width: int, **build: Unpack[Build]):
        self.forward = Direction(width_in, width, reverse=False, **build)
        self.backward = Direction(width_in, width, reverse=True, **build)

    def __call__(
        self,
        embedded: Float[Array, "batch length inputs"],
        visible: Bool[Array, "batch length"],
    ) -> Float[Array, "batch length twice_width"]:
        """The states of reading forward and of reading backward, joined."""
        return jnp.concatenate(
            [self.forward(embedded, visible), self.backward(embedded, visible)], -1
        )


class BiGRUModel(PretrainedModel):
    """Embeddings and a bidirectional GRU over them.

    Takes ``input_ids`` (or ``inputs_embeds``) and ``attention_mask``, ``(batch, length)`` each, not 0
    meaning visible; hidden tokens are passed over and their output is 0, as torch's packed
    sequences do for padding at the end. ``hidden_states`` are the embeddings,
    ``embedding_size`` wide, and the GRU's output, twice ``hidden_size`` wide. There are no
    attentions.

    Computes in ``dtype`` (``param_dtype`` unless given); parameters are ``param_dtype``.
    """

    tensor_names: ClassVar[TensorNames] = BIGRU_TENSORS
    config_class: ClassVar[type[ModelConfig]] = BiGRUConfig

    def __init__(
        self,
        config: BiGRUConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.embeddings = Table(
            config.vocab_size,
            config.embedding_size,
            config.initializer_range,
            config.pad_token_id,
            **build,
        )
        self.gru = GRU(config.embedding_size, config.hidden_size, **build)
        self.dropout = Dropout(config.hidden_dropout_prob, rngs=rngs)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "batch length"] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> BaseModelOutput:
        """Encodes a batch: ``last_hidden_state``, ``(batch, length, 2 · hidden_size)``."""
        words = embedded_words(self.embeddings, input_ids, inputs_embeds)
        embedded = self.dropout(words)
        hidden = self.gru(embedded, _visible(attention_mask, embedded.shape[:2]))
        reported = either(output_hidden_states, self.config.output_hidden_states)
        output = BaseModelOutput(hidden, hidden_states=(embedded, hidden) if reported else None)
        return as_asked(output, self.config, return_dict)


class BiGRUForTokenClassification(PretrainedModel):
    """A bidirectional GRU with a classifier of every token; inputs and outputs are `BiGRUModel`'s.

    Computes in ``dtype`` (``param_dtype`` unless given); parameters are ``param_dtype``.
    """

    task: ClassVar[str | None] = "token-classification"
    tensor_names: ClassVar[TensorNames] = BIGRU_TENSORS
    config_class: ClassVar[type[ModelConfig]] = BiGRUConfig

    def __init__(
        self,
        config: BiGRUConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self.config = config
        self.bigru = BiGRUModel(config, **build)
        self.dropout = Dropout(config.hidden_dropout_prob, rngs=rngs)
        self.classifier = linear(config, 2 * config.hidden_size, config.num_labels, **build)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "batch length"] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        labels: Int[Array, "batch length"] | None = None,
        *,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> TokenClassifierOutput:
        """``logits``, and with ``labels`` the ``loss``: `heads.token_classification_loss`."""
        encoded = self.bigru(
            input_ids,
            attention_mask,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            return_dict=True,
        )
        logits = self.classifier(self.dropout(encoded.last_hidden_state))
        loss = None
        if labels is not None:
            loss = heads.token_classification_loss(logits, jnp.asarray(labels))
        output = TokenClassifierOutput(loss, logits, encoded.hidden_states)
        return as_asked(output, self.config, return_dict)


def _visible(
    attention_mask: Num[Array, "batch length"] | None, shape: tuple[int, ...]
) -> Bool[Array, "batch length"]:
    """Which tokens are read."""
    if attention_mask is None:
        return jnp.ones(shape, bool)
    mask = jnp.asarray(attention_mask)
    if mask.shape != shape:
        raise ValueError(f"attention_mask has shape {mask.shape}, expected {shape}")
    return mask != 0
