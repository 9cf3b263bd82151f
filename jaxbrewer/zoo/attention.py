"""Scaled dot-product attention, written out or, where nobody looks inside, as one kernel."""

import functools
import re
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import jax
import jax.numpy as jnp
from jax import export
from jaxtyping import Array, Bool, Float, Num

from jaxbrewer.models.half_products import is_half, products_half
from jaxbrewer.zoo.dropout import Dropout

# What the reported scores of hidden keys are lowered by; small enough for float16 to hold.
SCORE_PENALTY = 10000.0

Weights = Literal["probabilities", "scores"] | None
"""What `attend` returns beside the context."""

QKV: TypeAlias = tuple[Float[Array, "batch heads length each"], ...]
"""The queries, keys and values of a layer, as its dense layers give them."""


class Reported(NamedTuple):
    """What a layer is asked to return beside its output: what `attend` does, and `QKV`."""

    weights: Weights = None
    qkv: bool = False


NOTHING = Reported()


def visible_keys(attention_mask: Num[Array, "..."] | None) -> Bool[Array, "..."] | None:
    """Which keys each query may look at, with an axis for the heads; not 0 means visible.

    Takes ``(batch, length)``, the same keys for every query, or ``(batch, length, length)``, keys
    by query, and returns ``(batch, 1, 1, length)`` or ``(batch, 1, length, length)``.
    """
    if attention_mask is None:
        return None
    visible = attention_mask != 0
    if visible.ndim == 2:
        return visible[:, None, None, :]
    if visible.ndim == 3:
        return visible[:, None, :, :]
    raise ValueError(
        f"attention_mask has shape {attention_mask.shape}, expected (batch, length) or "
        "(batch, length, length)"
    )


def visible_tokens(attention_mask: Num[Array, "..."]) -> Bool[Array, "batch length"]:
    """Which tokens some query may look at; takes the shapes that `visible_keys` does."""
    visible: Any = visible_keys(attention_mask)
    return visible[:, 0].any(axis=1)


def attend(
    query: Float[Array, "batch length heads width"],
    key: Float[Array, "batch length heads width"],
    value: Float[Array, "batch length heads width"],
    visible: Bool[Array, "#batch 1 #length length"] | None,
    dropout: Dropout,
    reported: Weights = None,
    *,
    scale: float | None = None,
    bias: Float[Array, "#batch heads length length"] | None = None,
) -> tuple[
    Float[Array, "batch length heads width"], Float[Array, "batch heads length length"] | None
]:
    """Scaled dot-product attention: the context, and the probabilities or the scores if asked for.

    ``softmax(query · keyᵀ · scale + bias) · value``, over visible keys; a query with none attends to
    all alike, as in transformers. The scale is ``1 / √width`` unless given, the bias 0.
    Probabilities are those that weighed the values, after dropout.

    Scores are what goes into the softmax: ``query · keyᵀ · scale + bias``, exact at visible keys and
    lowered by 10000 at hidden ones. These are what the models in TextBrewer's examples return and
    what its attention losses are made for: the losses zero such entries, or a softmax does.

    Compiled for NVIDIA GPUs in half precision, or with products that will be (O1), and with neither
    dropout nor a report, cuDNN's kernel does it without keeping the scores, where neither scale nor
    bias is given (`cudnn_takes`).
    """
    plain = scale is None and bias is None and reported is None and not dropout.is_active
    if plain and cudnn_takes(query):
        return jax.lax.platform_dependent(
            query, key, value, visible, cuda=_by_cudnn, default=lambda *inputs: _plain(*inputs)[0]
        ), None
    context, probs, scores = _plain(query, key, value, visible, dropout, scale, bias)
    if reported != "scores":
        return context, probs if reported else None
    if visible is not None:
        scores = jnp.where(visible, scores, scores - SCORE_PENALTY)
    return context, scores.astype(value.dtype)


def if_asked(
    reported: Reported, query_key_value: Sequence[Float[Array, "batch length heads each"]]
) -> QKV | None:
    """The queries, keys and values with heads before positions, where they are asked for."""
    if not reported.qkv:
        return None
    return tuple(jnp.swapaxes(heads, 1, 2) for heads in query_key_value)


def _plain(
    query: Array,
    key: Array,
    value: Array,
    visible: Array | None,
    dropout: Dropout | None = None,
    scale: float | None = None,
    bias: Array | None = None,
) -> tuple[Array, Array, Array]:
    """The context, the probabilities after dropout, and the scores before any mask."""
    wide = jnp.promote_types(query.dtype, jnp.float32)
    # Heads before positions: XLA's products on CPU are slow in the other order.
    query, key, value = (jnp.swapaxes(x, 1, 2) for x in (query, key, value))
    scores = jnp.einsum("bhqd,bhkd->bhqk", query, key, preferred_element_type=wide)
    scores = scores * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if bias is None else scores + bias.astype(wide)
    penalty = 0 if visible is None else jnp.where(visible, 0, jnp.finfo(wide).min)
    probs = jax.nn.softmax(scores + penalty, axis=-1).astype(value.dtype)
    probs = probs if dropout is None else dropout(probs)
    context = jnp.einsum("bhqk,bhkd->bhqd", probs, value)
    return jnp.swapaxes(context, 1, 2), probs, scores


def cudnn_takes(query: Float[Array, "batch length heads width"]) -> bool:
    """Whether cuDNN attends in the products' type, width and length, where this is compiled for a GPU.

    It wants a half type (that of the query, or of products at O1), a compute capability of 8.0 or
    more, heads whose width is a multiple of 8 up to 128, and an even number of positions; and sizes
    that are known, which those of a program to be exported are not. A process without GPUs compiles
    for ones that are new enough.
    """
    if _half(query) is None or any(map(export.is_symbolic_dim, query.shape)):
        return False
    if query.shape[-1] % 8 or query.shape[-1] > 128 or query.shape[1] % 2:
        return False
    return _has_cudnn() and all(map(_is_new_enough, _gpus()))


def _half(query: Array) -> Any:
    """The half type that products of the query are in; None where they are in no half type."""
    return query.dtype if is_half(query) else products_half.value


@functools.cache
def _has_cudnn() -> bool:
    """Whether JAX finds a cuDNN to compile for: it comes with the plugin for GPUs."""
    heads = jax.ShapeDtypeStruct((1, 2, 1, 8), jnp.bfloat16)
    try:
        jax.eval_shape(_by_cudnn, heads, heads, heads, None)
    except RuntimeError:  # "cuDNN is not detected"
        return False
    return True


def _gpus() -> list[jax.Device]:
    """NVIDIA's GPUs of this process."""
    try:
        return jax.local_devices(backend="cuda")
    except RuntimeError:  # there is no such backend
        return []


def _is_new_enough(device: jax.Device) -> bool:
    capability = str(getattr(device, "compute_capability", ""))
    return bool(re.fullmatch(r"\d+\.\d+", capability)) and float(capability) >= 8


def _by_cudnn(
    query: Array, key: Array, value: Array, visible: Array | None
) -> Float[Array, "batch length heads width"]:
    if visible is not None:  # the kernel wants the lengths written out
        visible = jnp.broadcast_to(visible, (query.shape[0], 1, query.shape[1], key.shape[1]))
    queries, keys, values = (x.astype(_half(query)) for x in (query, key, value))
    attended = jax.nn.dot_product_attention(
        queries, keys, values, mask=visible, implementation="cudnn"
    )
    return attended.astype(query.dtype)
