"""Products in half from outside: every way a product can hide, forward and backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbrewer.errors import PrecisionError
from jaxbrewer.models.half_products import in_half, wide_products

RNG = np.random.default_rng(0)
W, X = (jnp.asarray(RNG.normal(size=s), jnp.float32) for s in ((4, 4), (3, 4)))
HALVES = [jnp.bfloat16, jnp.float16]


@jax.custom_vjp
def own_vjp(w, x):
    return jnp.tanh(x @ w)


def own_vjp_forward(w, x):
    y = own_vjp(w, x)
    return y, (w, x, y)


def own_vjp_backward(residuals, ct):
    w, x, y = residuals
    ct = ct * (1 - y**2)
    return x.T @ ct, ct @ w.T


own_vjp.defvjp(own_vjp_forward, own_vjp_backward)


@jax.custom_jvp
def own_jvp(w, x):
    return x @ w


own_jvp.defjvp(lambda p, t: (own_jvp(*p), p[1] @ t[0] + t[1] @ p[0]))


def attention(w, x):
    q, k, v = jnp.split((x @ w)[None, :, None].repeat(3, -1), 3, -1)
    return jax.nn.dot_product_attention(q, k, v)


FUNCTIONS = {
    "plain": lambda w, x: jnp.tanh(x @ w),
    "jit": lambda w, x: jax.jit(lambda a, b: jax.nn.relu(a @ b))(x, w),
    "custom vjp": own_vjp,
    "custom jvp": own_jvp,
    "checkpoint": lambda w, x: jax.checkpoint(lambda a, b: jnp.tanh(jnp.tanh(a @ b) @ b))(x, w),
    "checkpoint with a policy": lambda w, x: jax.checkpoint(
        lambda a, b: jnp.tanh(jnp.tanh(a @ b) @ b) + np.arange(4.0, dtype=np.float32),
        policy=jax.checkpoint_policies.dots_saveable,
    )(x, w),
    "scan": lambda w, x: jax.lax.scan(lambda c, r: (jnp.tanh(c @ w + r), c.sum()), x, x[:, None]),
    "scan backwards": lambda w, x: jax.lax.scan(
        lambda c, r: (c @ w, r @ w), x[0], x, reverse=True, unroll=2
    ),
    "scan without a carry": lambda w, x: jax.lax.map(lambda r: jnp.tanh(r @ w) @ w, x),
    "scan of trees": lambda w, x: jax.lax.scan(
        lambda c, r: ({"a": c["b"] @ w, "b": jnp.tanh(c["a"] + r[0])}, (r[1] @ w, c["a"])),
        {"a": x[0], "b": x[1]},
        (x, 2 * x),
    ),
    "scan of nothing but its carry": lambda w, x: jax.lax.scan(
        lambda c, _: (jnp.tanh(c @ w), None), x, length=3
    )[0],
    "cond": lambda w, x: jax.lax.cond(x[0, 0] > 0, lambda: x @ w, lambda: x @ w * 2),
    "switch": lambda w, x: jax.lax.switch(2, [lambda: x, lambda: x @ w, lambda: x @ w @ w]),
    "platforms": lambda w, x: jax.lax.platform_dependent(
        w, x, cpu=lambda w, x: x @ w, default=lambda w, x: 2 * (x @ w)
    ),
    "fori": lambda w, x: jax.lax.fori_loop(0, 2, lambda i, c: jnp.tanh(c @ w), x),
    "while, of what does not move": lambda w, x: (
        jax.lax.while_loop(lambda c: (c @ c)[0, 0] > 9, lambda c: c @ c / 2, X @ X.T) @ x @ w
    ),
    "vmap": lambda w, x: jax.vmap(lambda row: row @ w)(x),
    "convolution": lambda w, x: jax.lax.conv(x[None, None], w[None, None, :2, :2], (1, 1), "SAME"),
    "attention": attention,
    "einsum of three": lambda w, x: jnp.einsum("ij,jk,kl->il", x, w, w),
    "ragged": lambda w, x: jax.lax.ragged_dot(x, jnp.stack([w, 2 * w]), jnp.array([1, 2])),
    "high precision": lambda w, x: jnp.matmul(x, w, precision="highest"),
    "mixed": lambda w, x: jax.lax.dot(
        x.astype(jnp.bfloat16), w, preferred_element_type=jnp.float32
    ),
    "gradient inside": lambda w, x: jax.grad(lambda x: jnp.sum(jnp.sin(x @ w)))(x) * x,
    "half attention": lambda w, x: jnp.einsum(
        "ij,kj->ik",
        (x @ w).astype(jnp.float16),
        x.astype(jnp.float16),
        preferred_element_type=jnp.float32,
    ),
}


def total(function):
    def sums(w, x):
        return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(function(w, x)))

    return sums


@pytest.mark.parametrize("name", FUNCTIONS)
def test_no_product_is_left_wide_forward_or_backward(name):
    function = FUNCTIONS[name]
    assert wide_products(jax.make_jaxpr(jax.grad(total(function), (0, 1)))(W, X))
    half = jnp.bfloat16
    for emulated in (False, True):
        halved = in_half(function, half, emulated=emulated)
        assert wide_products(jax.make_jaxpr(halved)(W, X)) == []
        assert wide_products(jax.make_jaxpr(jax.grad(total(halved), (0, 1)))(W, X)) == []
        assert jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(halved, W, X)) == (
            jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(function, W, X))
        )


@pytest.mark.parametrize("name", FUNCTIONS)
def test_values_and_gradients_are_near_those_in_float32(name):
    function = FUNCTIONS[name]
    run = jax.jit(jax.value_and_grad(total(function), (0, 1)))
    halved = in_half(function, jnp.float16, emulated=True)
    near = jax.jit(jax.value_and_grad(total(halved), (0, 1)))
    (value, grads), (value_h, grads_h) = run(W, X), near(W, X)
    assert value != value_h or name in ("while, of what does not move", "switch")
    np.testing.assert_allclose(value_h, value, rtol=2e-2, atol=2e-2)
    for g, h in zip(grads, grads_h, strict=True):
        assert h.dtype == jnp.float32
        np.testing.assert_allclose(h, g, atol=2e-2 * np.abs(g).max())


@pytest.mark.parametrize("half", HALVES)
def test_inputs_are_rounded_and_nothing_else(half):
    """x · w with both rounded; the cotangent is rounded too; sums are float32."""

    def rounded(a):
        return a.astype(half).astype(jnp.float32)

    ct = jnp.asarray(RNG.normal(size=(3, 4)), jnp.float32)
    y, pull = jax.vjp(in_half(lambda w, x: x @ w + 1e-4, half, emulated=True), W, X)
    np.testing.assert_allclose(y, rounded(X) @ rounded(W) + 1e-4, rtol=1e-6)
    dw, dx = pull(ct)
    np.testing.assert_allclose(dw, rounded(X).T @ rounded(ct), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dx, rounded(ct) @ rounded(W).T, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("half", HALVES)
@pytest.mark.parametrize("name", ["plain", "scan", "custom vjp", "convolution", "attention"])
def test_emulated_products_are_the_same_numbers(name, half):
    """Not bit for bit, since sums may run in another order."""
    run = [in_half(FUNCTIONS[name], half, emulated=emulated) for emulated in (False, True)]
    native, emulated = (jax.tree.leaves(f(W, X)) for f in run)
    for a, b in zip(native, emulated, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


def test_half_sums_are_made_in_float32():
    """Rows of a table and a bias get thousands of small gradients, which would be lost in bfloat16."""
    ids, ones = jnp.zeros(5000, int), jnp.ones((5000, 2), jnp.bfloat16)

    def loss(table, bias):
        return jnp.sum((table[ids] * ones + bias).astype(jnp.float32))

    table, bias = jnp.ones((3, 2), jnp.bfloat16), jnp.zeros(2, jnp.bfloat16)
    grads = jax.jit(jax.grad(in_half(loss, jnp.bfloat16, emulated=True), (0, 1)))(table, bias)
    for grad, exact in zip(grads, (5000, 5000), strict=True):
        assert grad.dtype == jnp.bfloat16
        np.testing.assert_allclose(grad.ravel()[:2].astype(np.float32), exact, rtol=1 / 256)
    lost = jax.jit(jax.grad(loss))(table, bias)
    assert lost[0, 0] < 1000


def test_outputs_may_hold_flags_and_text_and_inputs_any_tree():
    def function(tree, key):
        y = tree["a"] @ tree["b"][0]
        noise = jax.random.normal(key, y.shape)
        return {"y": y + noise, "n": 3, "name": "x", "none": None, "ids": jnp.arange(2), "key": key}

    tree = {"a": X, "b": [W]}
    found = in_half(function, jnp.bfloat16)(tree, jax.random.key(0))
    assert (found["n"], found["name"], found["none"]) == (3, "x", None)
    assert jnp.issubdtype(found["key"].dtype, jax.dtypes.prng_key)
    np.testing.assert_array_equal(found["ids"], [0, 1])

    def loss(tree):
        return in_half(function, jnp.bfloat16)(tree, jax.random.key(0))["y"].sum()

    assert jax.grad(loss)(tree)["b"][0].shape == W.shape


def test_only_what_moves_is_differentiated():
    """A loop over an input has no derivative; it needs none where only the weights move."""

    def function(w, x):
        return jax.lax.while_loop(lambda c: c.sum() < 10, lambda c: c + jnp.abs(c) + 1, x) @ w

    grad = jax.grad(lambda w: in_half(function, jnp.bfloat16)(w, X).sum())(W)
    assert np.isfinite(grad).all()


def test_what_it_cannot_reach_or_look_into_is_refused():
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()

    @functools.partial(jax.shard_map, mesh=mesh, in_specs=spec, out_specs=spec)
    def sharded(w, x):
        return x @ w

    with pytest.raises(PrecisionError, match=r"product inside 'shard_map'.*fp16=False"):
        in_half(sharded, jnp.bfloat16)(W, X)

    class Opaque:
        pass

    with pytest.raises(PrecisionError, match=r"returns a Opaque.*register_dataclass"):
        in_half(lambda w, x: (x @ w, Opaque()), jnp.bfloat16)(W, X)


def test_double_precision(x64):
    w, x = W.astype(jnp.float64), X.astype(jnp.float64)
    for emulated in (False, True):
        halved = in_half(lambda w, x: jnp.tanh(x @ w), jnp.float16, emulated=emulated)
        grad = jax.grad(lambda w, x=x, f=halved: f(w, x).sum())(w)
        assert grad.dtype == jnp.float64 and halved(w, x).dtype == jnp.float64
        np.testing.assert_allclose(halved(w, x), jnp.tanh(x @ w), atol=1e-2)
