"""Dense layers: the numbers of flax's own, and a gradient that XLA need not transpose for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.extend.core import jaxprs_in_params

from jaxbrewer.zoo import BertConfig, BertModel
from jaxbrewer.zoo.blocks import linear


@pytest.mark.parametrize("shape", [(5,), (3, 5), (2, 3, 5), (2, 1, 3, 5)])
def test_a_dense_layer_equals_flaxs(shape):
    ours = linear(BertConfig(), 5, 4, rngs=nnx.Rngs(0))
    theirs = nnx.Linear(5, 4, rngs=nnx.Rngs(0))
    theirs.kernel, theirs.bias = ours.kernel, ours.bias
    x = jnp.asarray(np.random.default_rng(0).normal(size=shape), jnp.float32)
    assert ours(x).shape == (*shape[:-1], 4)
    np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-6)


def products(jaxpr):
    """All products of a program."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def test_no_product_of_the_gradient_sums_over_two_axes():
    config = BertConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        vocab_size=11,
    )  # fmt: skip
    model = BertModel(config, rngs=nnx.Rngs(0))
    model.eval()
    graph, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params, ids):
        return nnx.merge(graph, params, rest)(ids).last_hidden_state.sum()

    found = list(products(jax.make_jaxpr(jax.grad(loss))(params, np.ones((2, 3), int)).jaxpr))
    assert len(found) >= 3 * (6 + 2)  # forward, and two backward, of each product in the layer
    for equation in found:
        (left, right), _ = equation.params["dimension_numbers"]
        assert len(left) == len(right) == 1
