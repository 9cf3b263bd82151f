"""Dropout's masks are JAX's own, whatever the shape, the rate and the mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxbrewer.models.nnx_model import NNXModel
from jaxbrewer.models.precision import Precision, at_level
from jaxbrewer.zoo import BertConfig, BertForSequenceClassification
from jaxbrewer.zoo.dropout import Dropout, keep_mask

from .conftest import FAMILIES, make_batch


@pytest.mark.parametrize(
    "shape", [(), (7,), (3, 5), (0, 4), (2**14,), (5, 7, 31, 17), (3, 2**13 + 1)], ids=str
)
@pytest.mark.parametrize("probability", [0.9, 0.5, 1 / 3, 1e-3])
def test_masks_are_those_of_jax(shape, probability):
    for seed in range(3):
        key = jax.random.key(seed)
        wanted = jax.random.bernoulli(key, np.float32(probability), shape)
        np.testing.assert_array_equal(keep_mask(key, probability, shape), wanted)


def test_masks_are_the_same_in_double_precision(x64):
    wanted = jax.random.bernoulli(jax.random.key(1), np.float32(0.9), (130, 129))
    np.testing.assert_array_equal(keep_mask(jax.random.key(1), 0.9, (130, 129)), wanted)


def test_other_generators_are_left_to_jax():
    key = jax.random.key(0, impl="rbg")
    wanted = jax.random.bernoulli(key, np.float32(0.9), (5, 6))
    np.testing.assert_array_equal(keep_mask(key, 0.9, (5, 6)), wanted)


def test_dropout_is_flax_dropout():
    ours, theirs = (kind(0.3, rngs=nnx.Rngs(4)) for kind in (Dropout, nnx.Dropout))
    x = jax.random.normal(jax.random.key(2), (60, 500))
    for _ in range(2):  # each call draws anew
        np.testing.assert_allclose(ours(x), theirs(x), rtol=1e-6)
    assert np.any(ours(x) != ours(x))
    ours.eval()
    assert ours(x) is x
    ours.train()
    assert np.any(ours(x) != x)
    no_rate = Dropout(0.0, rngs=nnx.Rngs(4))
    assert no_rate(x) is x


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dropout_keeps_the_dtype_and_the_mean(dtype):
    dropout = Dropout(0.1, rngs=nnx.Rngs(0))
    graph, state = nnx.split(dropout)
    dropped = jax.jit(lambda x, state: nnx.merge(graph, state)(x))(
        jnp.ones((300, 400), dtype), state
    )
    assert dropped.dtype == dtype
    assert abs(float(jnp.mean(dropped.astype(jnp.float32))) - 1) < 5e-3


def test_the_gradient_passes_where_the_input_did():
    model = NNXModel(Dropout(0.4, rngs=nnx.Rngs(0)))

    def total(x):
        kept, _ = model.apply({}, model.state, jax.random.key(1), (x,), {}, True)
        return jnp.sum(kept), kept

    grad, kept = jax.grad(total, has_aux=True)(jnp.ones((200, 300)))
    assert 0.5 < np.mean(np.asarray(kept) != 0) < 0.7
    np.testing.assert_array_equal(grad, kept)


@pytest.mark.parametrize("level", ["O0", "O2"])
def test_masks_are_drawn_once_on_tpus_and_where_they_are_used_elsewhere(level):
    config = BertConfig(**FAMILIES["Bert"] | {"num_hidden_layers": 1})
    model = NNXModel(BertForSequenceClassification(config, rngs=nnx.Rngs(0)))
    model = at_level(model, Precision(level, "" if level == "O0" else "bfloat16"))
    batch = make_batch() | {"labels": np.array([0, 1, 1])}

    def loss(params, state, key):
        return model.apply(params, state, key, (), batch, True)[0].loss

    traced = jax.jit(jax.value_and_grad(loss)).trace(model.params, model.state, jax.random.key(0))
    for platform, barriers in (("tpu", 1 + 3 + 1), ("cpu", 0), ("cuda", 0)):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert program.count("stablehlo.optimization_barrier") == barriers, platform


@pytest.mark.parametrize("length", [9, 128])
def test_the_program_stays_small(length):
    config = BertConfig(
        **FAMILIES["Bert"] | {"max_position_embeddings": 128, "num_hidden_layers": 1}
    )
    model = NNXModel(BertForSequenceClassification(config, rngs=nnx.Rngs(0)))
    batch = make_batch(batch=8, length=length) | {"labels": np.arange(8) % 2}

    def loss(params, state, key):
        return model.apply(params, state, key, (), batch, True)[0].loss

    step = jax.jit(jax.value_and_grad(loss))
    program = step.lower(model.params, model.state, jax.random.key(0)).compile().as_text()
    masks = 1 + 3 * config.num_hidden_layers + 1 if length == 128 else 0
    # A mask written out takes 20 rotations; keys take some more.
    assert program.count(" shift-left(") < 400 + 4 * 20 * masks
