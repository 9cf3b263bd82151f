"""The activation functions, under the names that config files use."""

from collections.abc import Callable, Mapping
from functools import partial

import jax
from jaxtyping import Array, Float

Activation = Callable[[Float[Array, "..."]], Float[Array, "..."]]

_gelu_tanh: Activation = partial(jax.nn.gelu, approximate=True)

# ``gelu`` is the exact one, x·Φ(x); the three others are its tanh approximation.
ACTIVATIONS: Mapping[str, Activation] = {
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_new": _gelu_tanh,
    "gelu_fast": _gelu_tanh,
    "gelu_pytorch_tanh": _gelu_tanh,
    "relu": jax.nn.relu,
    "silu": jax.nn.silu,
    "swish": jax.nn.silu,
    "tanh": jax.nn.tanh,
}
