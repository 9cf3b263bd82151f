"""Attention: what is reported, the kernel where there is one, and layers computed again."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo
from jaxbrewer.models.half_products import in_half
from jaxbrewer.models.nnx_model import NNXModel
from jaxbrewer.zoo import attention
from jaxbrewer.zoo.attention import attend, cudnn_takes
from jaxbrewer.zoo.dropout import Dropout

from .conftest import FAMILIES, make_batch

OFF = Dropout(0.0)


@pytest.fixture
def qkv():
    query, key, value = jax.random.normal(jax.random.key(0), (3, 2, 6, 3, 8))
    visible = jnp.array([[1, 1, 1, 1, 0, 0], [1, 0, 1, 1, 1, 1]], bool)[:, None, None]
    return query, key, value, visible


def test_the_context_does_not_depend_on_what_is_reported(qkv):
    context, nothing = attend(*qkv, OFF)
    assert nothing is None
    with_probs, probs = attend(*qkv, OFF, "probabilities")
    with_scores, scores = attend(*qkv, OFF, "scores")
    np.testing.assert_array_equal(context, with_probs)
    np.testing.assert_array_equal(context, with_scores)
    np.testing.assert_allclose(jax.nn.softmax(scores), probs, atol=1e-6)
    np.testing.assert_allclose(probs.sum(-1), 1, rtol=1e-6)
    assert not np.asarray(probs[0, ..., 4:]).any()


def test_it_is_jax_attention(qkv):
    query, key, value, visible = qkv
    wanted = jax.nn.dot_product_attention(query, key, value, mask=visible)
    np.testing.assert_allclose(attend(*qkv, OFF)[0], wanted, rtol=1e-5, atol=1e-6)


def test_the_kernel_is_for_gpus_alone(qkv, monkeypatch):
    wanted = jax.jit(lambda *inputs: attend(*inputs, OFF)[0])(*qkv)
    monkeypatch.setattr(attention, "cudnn_takes", lambda query: True)
    monkeypatch.setattr(attention, "_by_cudnn", lambda query, *others: query)
    step = jax.jit(lambda *inputs: attend(*inputs, OFF)[0])
    np.testing.assert_allclose(step(*qkv), wanted, rtol=1e-6)
    on_gpu = step.trace(*qkv).lower(lowering_platforms=("cuda",)).as_text()
    here = step.trace(*qkv).lower(lowering_platforms=("cpu",)).as_text()
    assert "dot_general" not in on_gpu and "dot_general" in here
    for reported in ("probabilities", "scores"):
        step = jax.jit(lambda *inputs: attend(*inputs, OFF, reported))  # noqa: B023
        assert "dot_general" in step.trace(*qkv).lower(lowering_platforms=("cuda",)).as_text()


def test_a_scale_and_a_bias_are_part_of_the_scores(qkv, monkeypatch):
    query, key, value, visible = qkv
    bias = jax.random.normal(jax.random.key(1), (1, 3, 6, 6))
    monkeypatch.setattr(attention, "cudnn_takes", lambda query: True)
    monkeypatch.setattr(attention, "_by_cudnn", lambda query, *others: query)
    got, nothing = attend(*qkv, OFF, scale=0.5, bias=bias)
    wanted = jax.nn.dot_product_attention(query, key, value, bias, visible, scale=0.5)
    assert nothing is None
    np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    _, scores = attend(*qkv, OFF, "scores", scale=0.5, bias=bias)
    plain = jnp.einsum("bqhd,bkhd->bhqk", query, key) * 0.5 + bias
    np.testing.assert_allclose(jnp.where(visible, scores, 0), jnp.where(visible, plain, 0),
                               rtol=1e-5, atol=1e-6)  # fmt: skip


@pytest.mark.parametrize(
    ("capability", "dtype", "length", "width", "takes"),
    [
        ("9.0", "bfloat16", 6, 64, True),
        ("8.0", "float16", 6, 128, True),
        ("9.0", "float32", 6, 64, False),
        ("7.5", "float16", 6, 64, False),
        ("9.0", "bfloat16", 5, 64, False),
        ("9.0", "bfloat16", 6, 26, False),
        ("9.0", "bfloat16", 6, 256, False),
        ("gfx90a", "bfloat16", 6, 64, False),
        (None, "bfloat16", 6, 64, False),
    ],
)
def test_when_the_kernel_fits(capability, dtype, length, width, takes, monkeypatch):
    class Device:
        compute_capability = capability

    monkeypatch.setattr(attention, "_has_cudnn", lambda: True)
    monkeypatch.setattr(attention, "_gpus", lambda: [Device()])
    assert cudnn_takes(jax.ShapeDtypeStruct((2, length, 3, width), dtype)) is takes


HEADS = jax.ShapeDtypeStruct((2, 6, 3, 64), jnp.bfloat16)


def test_the_kernel_does_not_depend_on_the_default_device(monkeypatch):
    class Old:
        compute_capability = "7.5"

    class New:
        compute_capability = "9.0"

    monkeypatch.setattr(attention, "_has_cudnn", lambda: True)
    assert cudnn_takes(HEADS)  # no GPU is here: it is lowered for one, if at all
    monkeypatch.setattr(attention, "_gpus", lambda: [New(), Old()])
    assert not cudnn_takes(HEADS)
    monkeypatch.setattr(attention, "_gpus", lambda: [New()])
    assert cudnn_takes(HEADS)
    monkeypatch.setattr(attention, "_has_cudnn", lambda: False)
    assert not cudnn_takes(HEADS)


def test_the_kernel_fits_where_products_will_be_in_half(monkeypatch):
    """At O1, where the heads are float32; what JAX has traced elsewhere does not count."""
    monkeypatch.setattr(attention, "_has_cudnn", lambda: True)
    monkeypatch.setattr(attention, "_by_cudnn", lambda query, *others: query)
    wide = jnp.ones((2, 6, 3, 64))
    took = []

    @jax.jit
    def attended(heads):
        took.append(cudnn_takes(heads))
        return attend(heads, heads, heads, None, OFF)[0]

    attended(wide)
    at_o1 = in_half(attended, jnp.bfloat16, emulated=True)
    attended(wide)
    np.testing.assert_allclose(at_o1(wide), 1, rtol=2**-8)
    assert took == [False, True]


def test_there_is_no_kernel_without_cudnn(monkeypatch):
    def not_there(*inputs):
        raise RuntimeError("cuDNN is not detected.")

    monkeypatch.setattr(attention, "_by_cudnn", not_there)
    attention._has_cudnn.cache_clear()
    try:
        assert not cudnn_takes(HEADS)
    finally:
        attention._has_cudnn.cache_clear()


@pytest.mark.parametrize("sizes", ["2, length, 3, 64", "batch, 6, 3, 64"])
def test_what_is_exported_is_written_out_where_a_size_is_not_known(sizes, monkeypatch):
    monkeypatch.setattr(attention, "_has_cudnn", lambda: True)
    shape = jax.export.symbolic_shape(sizes)
    heads = jax.ShapeDtypeStruct(shape, jnp.bfloat16)
    assert not cudnn_takes(heads)
    run = jax.jit(lambda *qkv: attend(*qkv, None, OFF)[0])
    exported = jax.export.export(run, platforms=("cpu", "cuda"))(heads, heads, heads)
    assert "cudnn" not in exported.mlir_module()
    assert exported.serialize()


@pytest.mark.skipif(not attention._has_cudnn(), reason="JAX's CUDA plugin is not installed")
@pytest.mark.parametrize("differentiated", [False, True])
@pytest.mark.parametrize("at_o1", [False, True])
def test_it_is_lowered_for_gpus_without_one(differentiated, at_o1):
    def attended(*qkv):
        return attend(*qkv, None, OFF)[0]

    def total(*qkv):
        return jnp.sum(attended(*qkv), dtype=jnp.float32)

    run = jax.grad(in_half(total, jnp.bfloat16) if at_o1 else total) if differentiated else attended
    run = in_half(run, jnp.bfloat16) if at_o1 and not differentiated else run
    heads = jax.ShapeDtypeStruct(HEADS.shape, jnp.float32) if at_o1 else HEADS
    traced = jax.jit(run).trace(heads, heads, heads)
    for platform, kernels in (("cpu", 0), ("tpu", 0), ("cuda", 1 + differentiated)):
        program = traced.lower(lowering_platforms=(platform,)).as_text()
        assert program.count("@__cudnn$fmha") == kernels, platform


@pytest.mark.parametrize("family", ["Bert", "DistilBert", "ModernBert", "DebertaV2"])
def test_gradient_checkpointing_changes_memory_alone(family):
    layers = "n_layers" if family == "DistilBert" else "num_hidden_layers"
    config = getattr(zoo, f"{family}Config")(**FAMILIES[family] | {layers: 1})
    batch = make_batch(family=family) | {"labels": np.array([0, 1, 1])}
    found, computed = [], []
    for checkpointing in (False, True):
        changed = config.replace(gradient_checkpointing=checkpointing)
        network = getattr(zoo, f"{family}ForSequenceClassification")(changed, rngs=nnx.Rngs(0))
        model = NNXModel(network)

        def loss(params, state, key, model=model):
            return model.apply(params, state, key, (), batch, True)[0].loss

        step = jax.jit(jax.value_and_grad(loss))
        traced = step.trace(model.params, model.state, jax.random.key(3))
        computed.append(str(traced.jaxpr))
        found.append(step(model.params, model.state, jax.random.key(3)))
    (loss, grads), (again, grads_again) = found
    np.testing.assert_allclose(loss, again, rtol=1e-6)
    largest = max(float(jnp.abs(grad).max()) for grad in grads.values())
    for name, grad in grads.items():
        np.testing.assert_allclose(grad, grads_again[name], rtol=1e-4, atol=1e-6 * largest)
    assert "remat" not in computed[0] and "remat" in computed[1]


def test_gradient_checkpointing_is_read_and_written():
    config = zoo.BertConfig.from_dict({"gradient_checkpointing": True})
    assert config.gradient_checkpointing
    assert config.to_dict()["gradient_checkpointing"] is True
    assert "gradient_checkpointing" not in zoo.BertConfig().to_dict()
    assert zoo.DistilBertConfig(gradient_checkpointing=True).sizes.gradient_checkpointing
