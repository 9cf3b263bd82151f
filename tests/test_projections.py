"""Projections: their first weights as TextBrewer draws them, their activations, their errors."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbrewer import presets
from jaxbrewer.projections import ACTIVATIONS, linear_projection, projection_with_activation


def test_linear_is_a_linear_map():
    module = linear_projection(3, 5, rngs=nnx.Rngs(0))
    module.bias[...] = jnp.arange(5.0)
    x = jax.random.normal(jax.random.key(1), (2, 4, 3))
    np.testing.assert_allclose(module(x), x @ module.kernel[...] + jnp.arange(5.0), rtol=1e-5)


def quantiles(sample):
    return np.quantile(np.asarray(sample), np.linspace(0.01, 0.99, 25))


@pytest.mark.torch
@pytest.mark.parametrize("name", ["linear", "relu", "tanh"])
def test_first_weights_are_distributed_as_textbrewers(name):
    import torch
    from textbrewer import projections as reference

    ours = presets.PROJ_MAP[name](312, 768, rngs=nnx.Rngs(0))
    ours = ours if name == "linear" else ours.linear
    torch.manual_seed(0)
    make = {"linear": lambda: reference.linear_projection(312, 768)}
    for ours_name, theirs_name in (("relu", "ReLU"), ("tanh", "Tanh")):
        build = reference.projection_with_activation(theirs_name)
        make[ours_name] = lambda build=build: build(312, 768)[0]
    theirs = make[name]()
    kernel, weight = np.asarray(ours.kernel[...]), theirs.weight.detach().numpy()
    assert kernel.shape == weight.T.shape
    assert abs(kernel.mean()) < 2e-4  # five standard errors
    assert abs(kernel.std() - 0.02) < 2e-4
    np.testing.assert_allclose(quantiles(kernel), quantiles(weight), atol=4e-4)
    np.testing.assert_array_equal(ours.bias[...], 0)
    np.testing.assert_array_equal(theirs.bias.detach().numpy(), 0)


def test_first_weights_are_normal():
    kernel = linear_projection(300, 300, rngs=nnx.Rngs(1)).kernel[...].ravel() / 0.02
    ordered = np.sort(np.asarray(kernel, np.float64))
    normal = np.asarray(jax.scipy.stats.norm.cdf(ordered))
    distance = np.abs(normal - np.arange(1, ordered.size + 1) / ordered.size).max()
    assert distance < 1.63 / np.sqrt(ordered.size)  # Kolmogorov and Smirnov, at 1%


def test_the_key_decides_the_weights():
    same = [linear_projection(4, 4, rngs=nnx.Rngs(3)).kernel[...] for _ in range(2)]
    np.testing.assert_array_equal(*same)
    rngs = nnx.Rngs(3)
    first, second = (linear_projection(4, 4, rngs=rngs).kernel[...] for _ in range(2))
    assert not np.array_equal(first, second)


def test_parameters_are_float32():
    module = linear_projection(3, 5, rngs=nnx.Rngs(0))
    assert module.kernel[...].dtype == module.bias[...].dtype == jnp.float32


def test_parameters_are_float64_in_double_precision(x64):
    module = presets.PROJ_MAP["tanh"](3, 5, rngs=nnx.Rngs(0))
    assert module.linear.kernel[...].dtype == jnp.float64
    assert module(jnp.ones((2, 3))).dtype == jnp.float64


@pytest.mark.torch
@pytest.mark.parametrize("name", ["relu", "tanh"])
def test_activations_equal_textbrewers(name, x64):
    import torch
    from textbrewer import projections as reference

    ours = presets.PROJ_MAP[name](3, 5, rngs=nnx.Rngs(0))
    theirs = reference.projection_with_activation({"relu": "ReLU", "tanh": "Tanh"}[name])(3, 5)
    theirs = theirs.double()
    with torch.no_grad():
        theirs[0].weight.copy_(torch.tensor(np.asarray(ours.linear.kernel[...]).T))
    x = 40 * np.asarray(jax.random.normal(jax.random.key(1), (2, 4, 3)))
    expected = theirs(torch.tensor(x)).detach().numpy()
    np.testing.assert_allclose(ours(jnp.asarray(x)), expected, rtol=1e-9)


TORCH_NAMES = [
    "ReLU",
    "ReLU6",
    "Tanh",
    "Sigmoid",
    "Hardsigmoid",
    "Hardtanh",
    "GELU",
    "SiLU",
    "Hardswish",
    "ELU",
    "CELU",
    "SELU",
    "LeakyReLU",
    "Softplus",
    "Softsign",
    "LogSigmoid",
    "Mish",
]


@pytest.mark.torch
@pytest.mark.parametrize("name", TORCH_NAMES)
def test_activations_by_torchs_name_are_torchs(name, x64):
    import torch

    module = projection_with_activation(name)(1, 1, rngs=nnx.Rngs(0))
    x = np.linspace(-8, 8, 301)
    expected = getattr(torch.nn, name)()(torch.tensor(x)).numpy()
    np.testing.assert_allclose(module.activation(jnp.asarray(x)), expected, rtol=1e-7, atol=1e-9)


def test_every_named_activation_has_a_finite_gradient():
    x = jnp.array([-100.0, -1.0, 0.0, 1.0, 100.0])
    gradients = jax.jit(jax.grad(lambda x: sum(f(x).sum() for f in ACTIVATIONS.values())))(x)
    assert np.isfinite(gradients).all()


def test_any_function_is_an_activation():
    module = projection_with_activation(jnp.square)(3, 4, rngs=nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(1), (2, 3))
    np.testing.assert_allclose(module(x), module.linear(x) ** 2)


def test_an_unknown_activation_suggests_the_nearest():
    with pytest.raises(ValueError, match="unknown activation 'tahn'; did you mean 'tanh'"):
        projection_with_activation("tahn")
    with pytest.raises(ValueError, match="unknown activation 'xyz'; choose from 'relu'"):
        projection_with_activation("xyz")
    with pytest.raises(TypeError, match="a name or a function"):
        projection_with_activation(3)


@pytest.mark.parametrize("width", [0, -3, True])
def test_widths_are_positive(width):
    with pytest.raises(ValueError, match="dim_in must be at least 1"):
        linear_projection(width, 3, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="dim_out must be at least 1"):
        presets.PROJ_MAP["relu"](3, width, rngs=nnx.Rngs(0))


def test_widths_are_integers():
    with pytest.raises(TypeError, match=r"dim_in must be an integer, got 3\.0"):
        linear_projection(3.0, 3, rngs=nnx.Rngs(0))
    assert linear_projection(np.int64(3), 2, rngs=nnx.Rngs(0)).kernel.shape == (3, 2)
