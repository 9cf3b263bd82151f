"""Projections: the small trained layers that bring a student's features to the teacher's width.

A projection is a factory ``(dim_in, dim_out, *, rngs) -> nnx.Module``; the module maps
``[..., dim_in]`` to ``[..., dim_out]``. As in TextBrewer the weights start from a normal
distribution with standard deviation 0.02, the biases from 0.
"""

import operator
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from jaxbrewer.errors import suggest

Activation = Callable[[Array], Array]

ACTIVATIONS: dict[str, Activation] = {
    name: getattr(jax.nn, name)
    for name in (
        "relu", "relu6", "tanh", "sigmoid", "hard_sigmoid", "hard_tanh", "gelu", "silu", "swish",
        "hard_silu", "hard_swish", "elu", "celu", "selu", "leaky_relu", "softplus", "soft_sign",
        "log_sigmoid", "mish", "squareplus", "identity",
    )
}  # fmt: skip
"""The activations of ``jax.nn`` that :func:`projection_with_activation` knows by name."""
ACTIVATIONS["gelu"] = lambda x: jax.nn.gelu(x, approximate=False)


class ActivatedLinear(nnx.Module):
    """A linear layer followed by an activation."""

    def __init__(self, linear: nnx.Linear, activation: Activation):
        self.linear = linear
        self.activation = activation

    def __call__(self, x: Float[Array, "... dim_in"]) -> Float[Array, "... dim_out"]:
        """Returns ``activation(linear(x))``."""
        return self.activation(self.linear(x))


def linear_projection(dim_in: int, dim_out: int, *, rngs: nnx.Rngs) -> nnx.Linear:
    """Returns a linear layer with N(0, 0.02) weights and zero bias.

    Args:
        dim_in: width of the student's feature, at least 1.
        dim_out: width of the teacher's feature, at least 1.
        rngs: its ``params`` stream is drawn from.

    The parameters are float32, or float64 where JAX's double precision is on.

    Raises:
        TypeError, ValueError: a width is no integer, or below 1.
    """
    return nnx.Linear(
        _width("dim_in", dim_in),
        _width("dim_out", dim_out),
        kernel_init=nnx.initializers.normal(stddev=0.02),
        bias_init=nnx.initializers.zeros_init(),
        param_dtype=jnp.result_type(float),
        rngs=rngs,
    )


def projection_with_activation(activation: str | Activation) -> Callable[..., ActivatedLinear]:
    """Returns a projection: :func:`linear_projection`, then an activation.

    Args:
        activation: a function of one array, or a name in :data:`ACTIVATIONS`. Torch's spelling
            does as well (``'ReLU'``, ``'LeakyReLU'``), and as in torch ``'gelu'`` is the exact one,
            not the approximation ``jax.nn.gelu`` uses by default.

    Raises:
        ValueError: the name is not known.
        TypeError: neither a name nor a function.
    """
    function = _activation(activation)

    def projection(dim_in: int, dim_out: int, *, rngs: nnx.Rngs) -> ActivatedLinear:
        return ActivatedLinear(linear_projection(dim_in, dim_out, rngs=rngs), function)

    return projection


def _activation(activation: str | Activation) -> Activation:
    if callable(activation):
        return activation
    if not isinstance(activation, str):
        raise TypeError(f"an activation is a name or a function of one array, got {activation!r}")
    known = {name.replace("_", ""): function for name, function in ACTIVATIONS.items()}
    found = known.get(activation.replace("_", "").lower())
    if found is None:
        hint = suggest(activation, ACTIVATIONS)
        raise ValueError(f"unknown activation {activation!r}; {hint}")
    return found


def _width(name: str, value: int) -> int:
    try:
        width = operator.index(value)
    except TypeError:
        raise TypeError(f"{name} must be an integer, got {value!r}") from None
    if isinstance(value, bool) or width < 1:
        raise ValueError(f"{name} must be at least 1, got {value!r}")
    return width
