"""The activation functions, under the names that config files use."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Activation = Callable[[Float[Array, "..."]], Float[Array, "..."]]


def gelu(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``x · Φ(x)``, with Φ the normal distribution's, as torch computes it; in float32 or wider.

    `jax.nn.gelu` takes Φ from erfc, which costs more than twice as much on CPU; the two differ by
    rounding.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return (wide * (0.5 * (1 + jax.lax.erf(wide * 0.5**0.5)))).astype(x.dtype)


_gelu_tanh: Activation = partial(jax.nn.gelu, approximate=True)

# ``gelu`` is the exact one, x·Φ(x); the three others are its tanh approximation.
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": gelu,
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jax.nn.tanh,
}
