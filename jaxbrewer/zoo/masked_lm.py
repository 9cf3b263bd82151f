"""The head for masked words, whatever the encoder: a score of every word, at every position.

A dense layer, an activation and a norm lead to the width of the word embeddings, whose table scores
the words; with ``tie_word_embeddings=False`` a matrix of its own does. Arguments and shapes are those
of `jaxbrewer.zoo.encoder`; ``labels`` are words, −100 where none is asked for.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Num

from jaxbrewer.zoo import heads
from jaxbrewer.zoo.activations import ACTIVATIONS
from jaxbrewer.zoo.blocks import Build, Table, layer_norm, linear, resolved
from jaxbrewer.zoo.configuration import TransformerConfig
from jaxbrewer.zoo.encoder import as_asked
from jaxbrewer.zoo.folders import Stored, WeightsMismatchError, find_tensors
from jaxbrewer.zoo.outputs import MaskedLMOutput
from jaxbrewer.zoo.tasks import TaskModel

TASK = "masked-lm"


def masked_lm_names(dense: str, norm: str, decoder: str) -> tuple[tuple[str, str], ...]:
    """The pairs of `TensorNames.head`, from Hugging Face's names of the head's three modules."""
    return (
        (r"transform\.dense\.(weight|bias)", rf"{dense}.\1"),
        (r"transform\.norm\.(weight|bias)", rf"{norm}.\1"),
        (r"words\.own\.weight", f"{decoder}.weight"),
        (r"words\.bias", f"{decoder}.bias"),
    )


class Words(nnx.Module):
    """Scores of all words by the table of their embeddings, or by a matrix of its own, and a bias.

    The table stays the embeddings' and is given with each call: it is one parameter.
    """

    def __init__(self, config: TransformerConfig, *, use_bias: bool = True, **build: Unpack[Build]):
        sizes, how = config.sizes, resolved(build)
        width, words = sizes.embedding_width, sizes.vocab_size
        self.dtype = how["dtype"]
        self.bias = nnx.Param(jnp.zeros(words, how["param_dtype"])) if use_bias else None
        tied = config.tie_word_embeddings
        self.own = None if tied else linear(config, width, words, use_bias=False, **build)

    def __call__(
        self, hidden: Float[Array, "batch length width"], table: Table
    ) -> Float[Array, "batch length words"]:
        """The scores."""
        scores = _by_rows(hidden, table.rows()) if self.own is None else self.own(hidden)
        return scores if self.bias is None else scores + self.bias[...].astype(self.dtype)


def _by_rows(
    hidden: Float[Array, "batch length width"], rows: Float[Array, "words width"]
) -> Float[Array, "batch length words"]:
    """The product with every row, all positions on one axis as in `blocks.rows_times_matrix`."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    product = jax.lax.dot_general(flat, rows, (((1,), (1,)), ((), ())))
    return product.reshape(*hidden.shape[:-1], rows.shape[0])


class Transform(nnx.Module):
    """A dense layer, an activation and a norm, which lead to the width of the word embeddings."""

    def __init__(self, config: TransformerConfig, activation: str, **build: Unpack[Build]):
        sizes = config.sizes
        width = sizes.embedding_width
        self.activation = activation
        self.dense = linear(config, sizes.hidden_size, width, **build)
        self.norm = layer_norm(sizes, width, **build)

    def __call__(
        self, hidden: Float[Array, "batch length width"]
    ) -> Float[Array, "batch length inner"]:
        """What the words are scored by."""
        return self.norm(ACTIVATIONS[self.activation](self.dense(hidden)))


class MaskedLM(TaskModel):
    """A score of every word at every position.

    ``head_activation`` names the activation before the norm, ``None`` the layers' own.

    In a file of a tied model the decoder's matrix may be there or not; one that is not the table of
    the embeddings is a ``WeightsMismatchError``.
    """

    task: ClassVar[str | None] = TASK
    head_activation: ClassVar[str | None] = None
    transform: nnx.Module
    words: Words

    def __init__(
        self,
        config: TransformerConfig,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs,
    ):
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs)
        self._set_encoder(self.encoder_class.without_pooler(config, **build))
        self.transform = self._new_transform(config, **build)
        self.words = self._new_words(config, **build)

    def _new_transform(self, config: Any, **build: Unpack[Build]) -> nnx.Module:
        """What stands before the scores, called as `Transform` is."""
        return Transform(config, self.head_activation or config.sizes.hidden_act, **build)

    def _new_words(self, config: Any, **build: Unpack[Build]) -> Words:
        """What scores the words."""
        return Words(config, **build)

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "..."] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        labels: Int[Array, "batch length"] | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_attention_scores: bool | None = None,
        output_qkv: bool | None = None,
        return_dict: bool | None = None,
    ) -> MaskedLMOutput:
        """``logits``, and with ``labels`` the ``loss``: `heads.token_classification_loss`."""
        encoded = self.base_model.encode(
            input_ids,
            attention_mask,
            token_type_ids,
            position_ids,
            inputs_embeds,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
            output_attention_scores=output_attention_scores,
            output_qkv=output_qkv,
        )
        table = self.base_model.embeddings.word_embeddings
        transform: Any = self.transform
        logits = self.words(transform(encoded.last_hidden_state), table)
        loss = None
        if labels is not None:
            loss = heads.token_classification_loss(logits, jnp.asarray(labels))
        output = MaskedLMOutput(loss, logits, **encoded.of_layers())
        return as_asked(output, self.config, return_dict)

    def check_stored(self, found: Mapping[str, Stored], folder: Path) -> None:
        """Refuses a decoder's matrix beside a tied table that it does not equal."""
        names = self.tensor_names
        decoder = names.of_head("words.own.weight")
        table = f"{names.prefix}.{names.theirs('embeddings.word_embeddings', 'weight')}"
        if not self.config.tie_word_embeddings or not {decoder, table} <= found.keys():
            return
        matrix, rows = (found[name].read(np.float32) for name in (decoder, table))
        if not np.array_equal(matrix, rows):
            raise WeightsMismatchError(
                f"{folder} does not fit {type(self).__name__}: the config says that the decoder's "
                f"matrix is the word embeddings', but {decoder} is not {table}: pass "
                "tie_word_embeddings=False"
            )


def holds_masked_lm(model: type[MaskedLM], folder: Path) -> bool:
    """Whether the weights have the head of this class, and not that of a task on the same modules."""
    dense = model.tensor_names.of_head("transform.dense.weight")
    stored = find_tensors(folder)
    names = {model.tensor_names.alias(name.removeprefix("module.")) for name in stored}
    return dense in names and not any(name.startswith("classifier.") for name in names)
