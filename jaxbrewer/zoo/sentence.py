"""Sentence encoders: one vector for each sentence, from any encoder here.

Reimers & Gurevych, 2019, https://arxiv.org/abs/1908.10084. The hidden states of the last layer are
pooled, go through dense layers where there are some, and are made unit vectors if asked. Numbers are
those of sentence-transformers, whose folders are read and written.
"""

import inspect
import os
from pathlib import Path
from typing import Any, ClassVar, Self, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.typing import Dtype
from jaxtyping import Array, Float, Int, Num

from jaxbrewer.files import read_json_object
from jaxbrewer.zoo.activations import ACTIVATIONS
from jaxbrewer.zoo.bert import BertConfig
from jaxbrewer.zoo.blocks import Build, resolved, rows_times_matrix
from jaxbrewer.zoo.encoder import as_asked
from jaxbrewer.zoo.folders import CONFIG, WEIGHTS, WeightsMismatchError, find_tensors, write_tensors
from jaxbrewer.zoo.hf import PretrainedModel, existing_folder, model_class
from jaxbrewer.zoo.outputs import SentenceEncoderOutput
from jaxbrewer.zoo.sentence_files import (
    MODULES,
    DenseConfig,
    SentenceConfig,
    dense_folder,
    read_sentence_folder,
    write_sentence_folder,
)

_ACTIVATIONS = {**ACTIVATIONS, "identity": lambda x: x, "sigmoid": jax.nn.sigmoid}
# What torch divides by at least: the norm of a vector, the number of a sentence's tokens.
_LEAST_NORM = 1e-12
_LEAST_COUNT = 1e-9


def pooled(
    hidden: Float[Array, "batch length width"],
    attention_mask: Num[Array, "batch length"] | None,
    pooling: str,
) -> Float[Array, "batch width"]:
    """One vector for each sentence, from those of its tokens whose mask is not 0.

    ``'mean'`` is their mean, ``'cls'`` the first, ``'max'`` their maximum in each component. A
    sentence without tokens gives 0 for the first and the last, where sentence-transformers' maximum
    is −∞; gradients are finite, and 0 at the positions that are padding. Computed in float32 or
    wider.

    Raises ``ValueError`` for a mask of another shape.
    """
    batch, length = hidden.shape[:2]
    mask = jnp.ones((batch, length)) if attention_mask is None else jnp.asarray(attention_mask)
    if mask.shape != (batch, length):
        raise ValueError(
            f"attention_mask is {list(mask.shape)}, expected {[batch, length]}, (batch, length), to "
            "tell the tokens that are pooled"
        )
    seen = mask != 0
    if pooling == "cls":
        first = jnp.argmax(seen, axis=1)[:, None, None]
        return jnp.take_along_axis(hidden, first, axis=1)[:, 0]
    wide = hidden.astype(jnp.promote_types(hidden.dtype, jnp.float32))
    count = jnp.sum(seen, axis=1, keepdims=True, dtype=wide.dtype)
    if pooling == "mean":
        total = jnp.sum(jnp.where(seen[..., None], wide, 0), axis=1)
        return (total / jnp.maximum(count, _LEAST_COUNT)).astype(hidden.dtype)
    highest = jnp.max(jnp.where(seen[..., None], wide, -jnp.inf), axis=1)
    return jnp.where(count > 0, highest, 0).astype(hidden.dtype)


def normalized(x: Float[Array, "batch width"]) -> Float[Array, "batch width"]:
    """``x / max(|x|, 1e-12)`` in float32 or wider, as torch's ``normalize``; 0 stays 0."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.sum(jnp.square(wide), axis=-1, keepdims=True)
    # The root's gradient at 0 is infinite, so the root is not taken there.
    norm = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)
    return (wide / jnp.maximum(norm, _LEAST_NORM)).astype(x.dtype)


class Dense(nnx.Module):
    """A dense layer and its activation."""

    def __init__(
        self, config: DenseConfig, width_in: int, initializer_range: float, **build: Unpack[Build]
    ):
        self.activation = config.activation
        self.linear = nnx.Linear(
            width_in,
            config.width,
            use_bias=config.bias,
            kernel_init=nnx.initializers.normal(initializer_range),
            dot_general=rows_times_matrix,
            **resolved(build),
        )

    def __call__(self, x: Float[Array, "batch width_in"]) -> Float[Array, "batch width"]:
        """The layer's output."""
        return _ACTIVATIONS[self.activation](self.linear(x))


class SentenceEncoder(PretrainedModel):
    """An encoder whose last hidden states become one vector for each sentence.

    ``encoder`` is a model of this package without a head; ``sentence`` says how its hidden states
    are pooled and what follows, and is kept as ``model.sentence``. A student takes its teacher's::

        teacher = SentenceEncoder.from_pretrained(folder)
        config = teacher.config.replace(num_hidden_layers=3)
        student = SentenceEncoder(BertModel(config, rngs=nnx.Rngs(0)), teacher.sentence)
        init_from_layers(student, teacher, layers=[1, 3, 5])

    Dense layers compute in ``dtype`` (``param_dtype`` unless given), their parameters are
    ``param_dtype``; ``rngs`` gives them their first weights, the default is ``nnx.Rngs(0)``.

    Raises ``TypeError`` for an encoder that is none.
    """

    task: ClassVar[str | None] = "sentence-embedding"
    config: Any

    def __init__(
        self,
        encoder: PretrainedModel,
        sentence: SentenceConfig | None = None,
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs | None = None,
    ):
        if not isinstance(encoder, PretrainedModel) or encoder.base_model is not encoder:
            has_one = " its base_model," if isinstance(encoder, PretrainedModel) else ""
            raise TypeError(
                f"encoder is a {type(encoder).__name__}: give{has_one} a model of jaxbrewer.zoo without "
                "a head, such as BertModel"
            )
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs or nnx.Rngs(0))
        self.config = encoder.config
        self.sentence = SentenceConfig() if sentence is None else sentence
        self.encoder = encoder
        widths = [self.config.output_width, *(dense.width for dense in self.sentence.dense)]
        self.dense = nnx.List(
            Dense(dense, width, self.config.initializer_range, **build)
            for dense, width in zip(self.sentence.dense, widths, strict=False)
        )

    @property
    def base_model(self) -> Any:
        """The encoder."""
        return self.encoder

    def __call__(
        self,
        input_ids: Int[Array, "batch length"] | None = None,
        attention_mask: Num[Array, "batch length"] | None = None,
        token_type_ids: Int[Array, "batch length"] | None = None,
        position_ids: Int[Array, "#batch length"] | None = None,
        inputs_embeds: Float[Array, "batch length width"] | None = None,
        *,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        output_attention_scores: bool | None = None,
        output_qkv: bool | None = None,
        return_dict: bool | None = None,
    ) -> SentenceEncoderOutput:
        """``embedding``, ``(batch, width)``, and what the encoder gives.

        An argument that the encoder does not take, such as DistilBERT's token types, is a
        ``TypeError`` unless it is ``None``.
        """
        given = {
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "token_type_ids": token_type_ids,
            "position_ids": position_ids,
            "inputs_embeds": inputs_embeds,
            "output_hidden_states": output_hidden_states,
            "output_attentions": output_attentions,
            "output_attention_scores": output_attention_scores,
            "output_qkv": output_qkv,
        }
        given = {name: value for name, value in given.items() if value is not None}
        encoded = self.encoder(**given, return_dict=True)
        embedding = pooled(encoded.last_hidden_state, attention_mask, self.sentence.pooling)
        for dense in self.dense:
            embedding = dense(embedding)
        if self.sentence.normalize:
            embedding = normalized(embedding)
        last = encoded.last_hidden_state
        output = SentenceEncoderOutput(embedding, last, **encoded.of_layers())
        return as_asked(output, self.config, return_dict)

    @classmethod
    def from_pretrained(
        cls,
        folder: str | os.PathLike[str],
        *,
        dtype: Dtype | None = None,
        param_dtype: Dtype = jnp.float32,
        rngs: nnx.Rngs | None = None,
        **options: Any,
    ) -> Self:
        """Reads a folder of sentence-transformers; returns the model in eval mode.

        The encoder is of the class that its ``model_type`` asks for, with a pooler where the file
        has one; ``options`` are those of `PretrainedModel.from_pretrained` for it, such as
        ``output_hidden_states=True``. Prompts are in ``model.sentence.prompts``, and a line in the
        log says so where there are some: they are not added to anything here.

        Raises ``ValueError`` that names the file for a folder of another kind and for parts,
        poolings and settings that are not known here, and as `PretrainedModel.from_pretrained`.
        """
        folder = existing_folder(folder)
        if not (folder / MODULES).is_file():
            raise ValueError(
                f"{folder} has no {MODULES}: for an encoder alone, say how it is pooled: "
                f"SentenceEncoder(from_pretrained({str(folder)!r}).base_model, "
                "SentenceConfig(pooling='mean'))"
            )
        there = read_sentence_folder(folder)
        build = Build(dtype=dtype, param_dtype=param_dtype, rngs=rngs or nnx.Rngs(0))
        model = cls(_read_encoder(there.encoder, {**options, **build}), there.config, **build)
        if there.pooled_width != model.config.output_width:
            raise ValueError(
                f"{folder / MODULES}: the pooling is for a width of {there.pooled_width}, but the "
                f"encoder's hidden states are {model.config.output_width} wide"
            )
        for dense, weights in zip(model.dense, there.dense, strict=True):
            _load_dense(dense, weights)
        model.eval()
        return model

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Writes a folder that sentence-transformers reads, and transformers the encoder in it.

        Each file appears whole or not at all, the list of parts last; the encoder's files and the
        tokenizer's are those of `PretrainedModel.save_pretrained`.
        """
        self.encoder.save_pretrained(folder)
        for number, dense in enumerate(self.dense):
            write_tensors(dense_folder(Path(folder), number) / WEIGHTS, _tensors_of(dense))
        write_sentence_folder(Path(folder), self.sentence, self.config.output_width)


def _read_encoder(folder: Path, options: dict[str, Any]) -> PretrainedModel:
    """The encoder in a folder, without a pooler where the file has none."""
    try:
        cls = model_class(
            read_json_object(folder / CONFIG).get("model_type", BertConfig.model_type)
        )
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from error
    may_pool = "add_pooling_layer" in inspect.signature(cls.__init__).parameters
    if may_pool and not any("pooler." in name for name in find_tensors(folder)):
        options = {"add_pooling_layer": False, **options}
    return cls.from_pretrained(folder, **options)


def _tensors_of(dense: Dense) -> dict[str, np.ndarray]:
    """The layer's parameters under torch's names and in its layout."""
    tensors = {"linear.weight": np.ascontiguousarray(np.asarray(dense.linear.kernel[...]).T)}
    if dense.linear.bias is not None:
        tensors["linear.bias"] = np.asarray(dense.linear.bias[...])
    return tensors


def _load_dense(dense: Dense, folder: Path) -> None:
    """Sets the layer's parameters from its folder, after comparing names and shapes."""
    stored, wanted = find_tensors(folder), _tensors_of(dense)
    there = {name: tensor.shape for name, tensor in stored.items()}
    expected = {name: value.shape for name, value in wanted.items()}
    if there != expected or not all(tensor.is_float for tensor in stored.values()):
        raise WeightsMismatchError(
            f"{folder / WEIGHTS} does not fit its {CONFIG}: it holds {there}, expected {expected}, "
            "of floating-point numbers"
        )
    kernel, bias = dense.linear.kernel, dense.linear.bias
    kernel[...] = jnp.asarray(stored["linear.weight"].read(kernel[...].dtype).T)
    if bias is not None:
        bias[...] = jnp.asarray(stored["linear.bias"].read(bias[...].dtype))
