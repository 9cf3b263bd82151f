"""The optimizer: groups with options and trees of their own, torch's clipping, means of windows."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxbrewer.step import optimizer
from jaxbrewer.step.optimizer import build, clip_by_norm, drop_window, make_optimizer

ADAMW = functools.partial(optax.adamw, learning_rate=0.1)
ONE = jnp.float32(1)


def tree(seed, projections=("0", "1")):
    rng = np.random.default_rng(seed)

    def draw(*shape):
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    return {
        "student": {"a": draw(3, 2), "b": {"c": draw(4)}},
        "projections": {name: {"kernel": draw(2, 5), "bias": draw(5)} for name in projections},
    }


def update(made, grads, params, state=None, factor=1.0):
    """One update, compiled: ``updates, new state``."""
    state = made.init(params) if state is None else state
    return jax.jit(made.update)(grads, state, params, factor=jnp.float32(factor))


def probe(seen):
    """An optimizer that notes the trees it is shown."""

    def note(*trees):
        seen.extend(jax.tree.structure(t) for t in trees)

    def init(params):
        note(params)
        return optax.EmptyState()

    def update(updates, state, params=None):
        note(updates, params)
        return updates, state

    return optax.GradientTransformation(init, update)


def test_each_group_sees_its_own_tree_only():
    seen = {}

    def factory(group="student"):
        return probe(seen.setdefault(group, []))

    projections = {"0": {"group": "first"}, "1": {"group": "second"}}
    made = build(factory, projections, max_grad_norm=1.0)
    params = tree(0)
    updates, _ = made.update(tree(1), made.init(params), params, factor=ONE)
    assert jax.tree.structure(updates) == jax.tree.structure(params)
    own = {
        "student": params["student"],
        "first": params["projections"]["0"],
        "second": params["projections"]["1"],
    }
    assert seen == {k: [jax.tree.structure(v)] * 3 for k, v in own.items()}


def test_a_projections_options_override_the_factorys_own():
    projections = {"0": {"lr": 0.01, "betas": (0.5, 0.6), "eps": 1e-3, "weight_decay": 0.0}}
    made = build(ADAMW, {**projections, "1": {}})
    params, grads = tree(0), tree(1)
    updates, _ = update(made, grads, params)

    def alone(opt, grads, params):
        return jax.jit(opt.update)(grads, opt.init(params), params)[0]

    expected = {
        "student": alone(optax.adamw(0.1), grads["student"], params["student"]),
        "projections": {
            "0": alone(
                optax.adamw(0.01, b1=0.5, b2=0.6, eps=1e-3, weight_decay=0.0),
                grads["projections"]["0"],
                params["projections"]["0"],
            ),
            "1": alone(optax.adamw(0.1), grads["projections"]["1"], params["projections"]["1"]),
        },
    }
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6), updates, expected)


@pytest.mark.parametrize(
    ("factory", "options", "expected"),
    [
        (functools.partial(optax.adamw, 0.1), {"lr": 0.5}, optax.adamw(0.5)),  # by position
        (functools.partial(optax.sgd, 0.1, 0.9), {"lr": 0.5}, optax.sgd(0.5, 0.9)),
        (functools.partial(optax.sgd, 0.1), {"momentum": 0.9}, optax.sgd(0.1, 0.9)),
        (
            functools.partial(optax.rmsprop, learning_rate=0.1),
            {"alpha": 0.7},
            optax.rmsprop(0.1, decay=0.7),
        ),
        (lambda **options: optax.adam(**{"learning_rate": 1.0} | options), {"lr": 0.5}, optax.adam(0.5)),
    ],
)  # fmt: skip
def test_factories_of_every_kind_take_options(factory, options, expected):
    params, grads = {"a": jnp.ones(3)}, {"a": jnp.arange(3.0)}
    made = make_optimizer(factory, options)
    (ours, theirs) = (
        opt.update(grads, opt.init(params), params)[0]["a"] for opt in (made, expected)
    )
    np.testing.assert_array_equal(ours, theirs)


def test_the_callers_options_are_not_changed():
    options = {"lr": 0.5, "betas": (0.1, 0.2)}
    make_optimizer(ADAMW, options)
    assert options == {"lr": 0.5, "betas": (0.1, 0.2)}


@pytest.mark.torch
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("max_norm", [1e-3, 0.5, 3.0, 1e6])
def test_clipping_is_torchs(dtype, max_norm, x64):
    import torch

    rng = np.random.default_rng(0)
    grads = [rng.normal(size=shape).astype(dtype) for shape in ((3, 2), (4,), ())]
    parameters = [torch.zeros(g.shape, dtype=getattr(torch, dtype)) for g in grads]
    for parameter, grad in zip(parameters, grads, strict=True):
        parameter.grad = torch.from_numpy(np.array(grad))
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    ours = jax.jit(clip_by_norm)([jnp.asarray(g) for g in grads], max_norm)
    for parameter, grad in zip(parameters, ours, strict=True):
        assert grad.dtype == dtype
        tolerance = 1e-6 if dtype == "float32" else 1e-14
        np.testing.assert_allclose(grad, parameter.grad.numpy(), rtol=tolerance)


def test_clipping_half_gradients_counts_in_full_precision():
    grads = [jnp.full(2**17, 100.0, jnp.float16)]  # a norm that float16 cannot hold
    (clipped,) = clip_by_norm(grads, 1000.0)
    assert clipped.dtype == jnp.float16
    np.testing.assert_allclose(clipped, 1000 / 2**8.5, rtol=2e-3)
    (zero,) = clip_by_norm([jnp.zeros(3)], 1.0)
    np.testing.assert_array_equal(zero, 0)


@pytest.mark.torch
@pytest.mark.parametrize("max_norm", [0.1, 3.0, 1e6])
def test_projections_are_clipped_with_the_student_where_asked(max_norm):
    """One norm of all, as torch clips Apex's master parameters."""

    import torch

    params, grads = tree(0), tree(1)
    parameters = [torch.zeros(g.shape) for g in jax.tree.leaves(grads)]
    for parameter, grad in zip(parameters, jax.tree.leaves(grads), strict=True):
        parameter.grad = torch.from_numpy(np.array(grad))
    torch.nn.utils.clip_grad_norm_(parameters, max_norm)
    made = build(
        optax.sgd(1.0), {"0": None, "1": None}, max_grad_norm=max_norm, clips_projections=True
    )
    updates, _ = update(made, grads, params)
    for parameter, u in zip(parameters, jax.tree.leaves(updates), strict=True):
        np.testing.assert_allclose(u, -parameter.grad.numpy(), rtol=1e-6)


def test_the_student_is_clipped_and_projections_are_not():
    params, grads = tree(0), tree(1)
    made = build(optax.sgd(1.0), {"0": None, "1": None}, max_grad_norm=0.1)
    updates, _ = update(made, grads, params)
    np.testing.assert_allclose(optax.tree.norm(updates["student"]), 0.1, rtol=1e-5)
    jax.tree.map(
        lambda u, g: np.testing.assert_array_equal(u, -g),
        updates["projections"],
        grads["projections"],
    )
    for off in (-1.0, 0.0):
        made = build(optax.sgd(1.0), {"0": None, "1": None}, max_grad_norm=off)
        updates, _ = update(made, grads, params)
        np.testing.assert_array_equal(updates["student"]["a"], -grads["student"]["a"])


def test_the_factor_scales_every_group():
    params, grads = tree(0), tree(1)
    made = build(ADAMW, {"0": {"lr": 0.3}, "1": None})
    whole, moments = update(made, grads, params)
    quarter, same = update(made, grads, params, factor=0.25)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-6),
                 quarter, jax.tree.map(lambda u: u / 4, whole))  # fmt: skip
    jax.tree.map(np.testing.assert_array_equal, moments, same)


def test_a_window_hands_on_the_mean_and_clips_that():
    params = tree(0)
    window = [tree(seed) for seed in (1, 2, 3)]
    made = build(optax.sgd(1.0), {"0": None, "1": None}, max_grad_norm=0.1, accumulation=3)
    state, step = made.init(params), jax.jit(made.update)
    for i, grads in enumerate(window):
        updates, state = step(grads, state, params, factor=jnp.float32(0.5 + i))
        if i < 2:
            assert not any(np.any(u) for u in jax.tree.leaves(updates))
    mean = jax.tree.map(lambda *g: sum(g) / 3, *window)
    single = build(optax.sgd(1.0), {"0": None, "1": None}, max_grad_norm=0.1)
    expected, _ = update(single, mean, params, factor=2.5)
    jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7), updates, expected
    )


def test_a_dropped_window_leaves_no_trace():
    params = tree(0)
    made = build(ADAMW, {"0": None, "1": None}, accumulation=2)
    fresh = made.init(params)
    _, opened = update(made, tree(1), params, fresh)
    assert opened.mini_step == 1
    jax.tree.map(np.testing.assert_array_equal, drop_window(opened), fresh)


# ----------------------------------------------------------------------------------- the refused


def test_a_built_optimizer_cannot_take_options():
    with pytest.raises(
        TypeError, match=r"options \{'lr': 0.1\}, but the optimizer is already built"
    ):
        build(optax.sgd(0.1), {"0": {"lr": 0.1}})
    build(optax.sgd(0.1), {"0": {}, "1": None})


@pytest.mark.parametrize(
    ("factory", "options", "message"),
    [
        (ADAMW, {"wieght_decay": 1}, "'wieght_decay', .* did you mean 'weight_decay'"),
        (ADAMW, {"lrr": 1}, "option 'lrr', which adamw does not take: choose from 'learning_rate'"),
        (ADAMW, {"momentum": 0.9}, "option 'momentum', which adamw does not take"),
        (lambda: optax.sgd(0.1), {"lr": 1}, "'learning_rate'.*nothing to choose from"),
        (ADAMW, {"betas": 0.9}, r"betas=0.9.*two numbers"),
        (ADAMW, {"betas": (0.9,)}, r"betas=\(0.9,\).*two numbers"),
        (ADAMW, {"amsgrad": True}, "'amsgrad', which adamw does not take"),
    ],
)
def test_options_that_are_not_taken(factory, options, message):
    with pytest.raises(TypeError, match=message):
        make_optimizer(factory, options)


WRONG = {
    "None": (lambda: None, "optimizer is a builtins.NoneType; pass an optax.Gradient"),
    "a rate": (lambda: 0.1, "optimizer is a builtins.float"),
    "no rate": (lambda: optax.adamw, "adamw cannot be called with .*learning_rate.*partial"),
    "another class": (lambda: dict, r"factory dict returned a dict, not an optax.Gradient"),
    "nnx": (
        lambda: nnx.Optimizer(nnx.Linear(1, 1, rngs=nnx.Rngs(0)), optax.sgd(1), wrt=nnx.Param),
        "Optimizer",
    ),
    "a schedule": (lambda: optax.linear_schedule(1, 0, 5), "cannot be called with"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_no_optimizer(name):
    make, message = WRONG[name]
    with pytest.raises(TypeError, match=message):
        build(make(), {})


@pytest.mark.torch
def test_what_is_an_optimizer_of_torch():
    import torch

    made = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(TypeError, match=r"optimizer is a torch.optim.sgd.SGD;"):
        build(made, {})
    with pytest.raises(TypeError, match=r"AdamW cannot be called with \{\}.*functools"):
        build(torch.optim.AdamW, {})


@pytest.mark.parametrize("norm", [None, "1", True])
def test_a_norm_that_is_no_number(norm):
    with pytest.raises(TypeError, match=f"max_grad_norm is {norm!r}; expected a number"):
        build(optax.sgd(1.0), {}, max_grad_norm=norm)


def test_names_in_messages():
    assert optimizer._name(ADAMW) == "adamw"
    assert "partial" not in optimizer._name(functools.partial(optax.sgd, 0.1))
