"""The loss scale: Apex's rules, windows dropped whole, and a run that ends as a simulation does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbrewer
from jaxbrewer.errors import CheckpointError
from jaxbrewer.preflight import prepare
from jaxbrewer.step import loss_scale
from jaxbrewer.training import read_scalars
from jaxbrewer.training.folders import steps_in

SLOPE = 4.0  # of the loss in the product: 65536 · 4 does not fit into float16, 8192 · 4 does


class Apex:
    """Apex's scaler and patched optimizer in numpy, around SGD with momentum."""

    def __init__(self, weight, accumulation, patience=2000, momentum=0.5, rate=2.0**-6):
        self.weight = np.float32(weight)
        self.trace = np.zeros_like(self.weight)
        self.scale, self.good, self.spoiled, self.skipped = 65536.0, 0, False, 0
        self.accumulation, self.patience = accumulation, patience
        self.momentum, self.rate = np.float32(momentum), np.float32(rate)
        self.window, self.scales, self.skips, self.step = [], [], [], 0

    def batch(self, grad, overflows, factor):
        self.scales.append(self.scale)
        if overflows:
            self.scale, self.good, self.spoiled = self.scale / 2, 0, True
        else:
            self.good += 1
            self.window.append(np.float32(grad))
        if self.good == self.patience:
            self.scale, self.good = min(2.0**24, self.scale * 2), 0
        self.open = getattr(self, "open", 0) + 1
        if self.open == self.accumulation:
            if self.spoiled:
                self.skipped += 1
            else:
                mean = sum(self.window) / np.float32(self.accumulation)
                self.trace = mean + self.momentum * self.trace
                self.weight = self.weight - self.rate * np.float32(factor(self.step)) * self.trace
            self.window, self.open, self.spoiled, self.step = [], 0, False, self.step + 1
        self.skips.append(self.skipped)


def linear(params, x, noise):
    """A loss whose gradient is exact in float16, and does not depend on the weights."""
    return SLOPE * jnp.sum(x @ params["w"]) + jnp.sum(noise)


def model():
    return jaxbrewer.FunctionModel(linear, {"w": jnp.zeros((2, 1), jnp.float32)})


def adaptor(batch, outputs):
    return {"losses": outputs}


def batches(count, bad=()):
    rng = np.random.default_rng(0)
    noise = [np.float32(np.inf if i in bad else 0) for i in range(count)]
    return [
        {"x": rng.integers(-8, 8, (3, 2)).astype(np.float32), "noise": np.full(1, n)} for n in noise
    ]


def trainer(folder, student=None, **config):
    config = {"fp16": True, "half_dtype": "float16", "device": "cpu", **config}
    return jaxbrewer.BasicTrainer(
        jaxbrewer.TrainingConfig(
            output_dir=str(folder / "out"), log_dir=str(folder / "log"), **config
        ),
        student or model(),
        adaptor,
    )


def overflows(x, scale):
    """Whether a good batch overflows: the product's cotangent is rounded to float16."""
    return scale * SLOPE > 65504


MOMENTUM = functools.partial(optax.sgd, 2.0**-6, momentum=0.5)


def halving(step):
    return 1 / (1 + step)


@pytest.mark.parametrize("accumulation", [1, 2, 3])
def test_a_run_with_overflows_ends_as_a_simulation_of_apex(tmp_path, monkeypatch, accumulation):
    monkeypatch.setattr(loss_scale, "PATIENCE", 4)
    bad = {7, 8, 15}
    data = batches(24, bad)
    apex = Apex(np.zeros((2, 1)), accumulation, patience=4)
    for i, batch in enumerate(data):
        grad = SLOPE * batch["x"].sum(0)[:, None]
        apex.batch(grad, i in bad or overflows(batch["x"], apex.scale), halving)

    mine, states = trainer(tmp_path, gradient_accumulation_steps=accumulation), []
    monkeypatch.setattr(
        jaxbrewer.training.checkpoints.Checkpoints,
        "save",
        lambda self, step, state, position: states.append(
            jax.tree.map(np.asarray, state.opt_state)
        ),
    )
    steps = []
    with mine:
        mine.train(
            MOMENTUM,
            data,
            num_steps=24 // accumulation,
            scheduler_class=lambda: halving,
            callback=lambda model, step: steps.append(step),
        )
    assert apex.skipped > 1 and apex.skipped < 24 // accumulation
    assert len(set(apex.scales)) > 4
    scalars = read_scalars(tmp_path / "log")
    assert list(scalars["scalar/loss_scale"].values()) == apex.scales
    assert list(scalars["scalar/skipped_windows"].values()) == apex.skips
    np.testing.assert_allclose(mine.model_S.params["w"], apex.weight, rtol=1e-6)
    (trace,) = (x for x in jax.tree.leaves(states[-1]) if x.shape == (2, 1) and x.any())
    np.testing.assert_allclose(trace, apex.trace, rtol=1e-6)
    assert steps == [24 // accumulation]  # windows that were dropped count as steps


def test_the_scale_follows_apex_over_a_long_run():
    """2000 good micro-batches double it, up to 2^24; an overflow halves it and starts anew."""
    rng = np.random.default_rng(0)
    finite = rng.random(30_000) > 2e-4
    apex = Apex(np.zeros(1), 4)
    for ok in finite:
        apex.batch(0, not ok, lambda step: 1)

    def one(scaling, given):
        ok, closes = given
        after, _ = loss_scale.advance(scaling, ok, closes)
        return after, (scaling.scale, after.skipped)

    closes = np.arange(1, len(finite) + 1) % 4 == 0
    _, (scales, skipped) = jax.jit(
        lambda: jax.lax.scan(one, loss_scale.start(), (jnp.array(finite), jnp.array(closes)))
    )()
    np.testing.assert_array_equal(scales, apex.scales)
    np.testing.assert_array_equal(skipped, apex.skips)
    assert max(apex.scales) > 2**18 and apex.skipped > 3
    top = loss_scale.Scaling(jnp.float32(2.0**24), jnp.int32(1999), jnp.bool_(False), jnp.int32(0))
    assert loss_scale.advance(top, jnp.bool_(True), jnp.bool_(True))[0].scale == 2.0**24


def test_a_dropped_window_leaves_adam_as_it_was(tmp_path):
    """Bit for bit, in the weights, the moments and the counters inside the optimizer."""
    state = {}

    def keep(mine, name, data):
        program = prepare(mine.job(), {"": data[0]}, optax.adam(0.1)).programs[""]
        step = jax.jit(program.step)
        at = program.init(0)
        for batch in data:
            at, _ = step(at, (), batch, jnp.ones(3))
        assert step._cache_size() == 1  # the state keeps its types
        state[name] = at

    good = batches(6)  # the first three overflow, until the scale is low enough
    bad = [{**good[0], "noise": np.full(1, np.nan, np.float32)}, good[1]]
    for accumulation in (1, 2):
        mine = trainer(tmp_path, gradient_accumulation_steps=accumulation)
        with mine:
            keep(mine, "without", good)
            keep(mine, "with", [*good, *(bad if accumulation == 2 else bad[:1])])
        without, dropped = state["without"], state["with"]
        for a, b in zip(
            jax.tree.leaves((without.params, inner(without))),
            jax.tree.leaves((dropped.params, inner(dropped))),
            strict=True,
        ):
            np.testing.assert_array_equal(a, b)
        assert dropped.scaling.scale == without.scaling.scale / 2
        assert dropped.scaling.skipped == without.scaling.skipped + 1
        assert dropped.params["student"]["w"].any()


def inner(state):
    opt_state = state.opt_state
    if not isinstance(opt_state, optax.MultiStepsState):
        return opt_state
    assert not any(np.asarray(x).any() for x in jax.tree.leaves(opt_state.acc_grads))
    return opt_state.inner_opt_state


def test_an_overflow_in_a_window_the_epoch_drops_does_not_cost_the_next(tmp_path):
    data = [{**b, "x": b["x"] / 64} for b in batches(3, bad={2})]
    mine = trainer(tmp_path, gradient_accumulation_steps=2)
    with mine:
        mine.train(optax.sgd(1.0), data, num_epochs=3)
    scalars = read_scalars(tmp_path / "log")
    grad = SLOPE * np.mean([b["x"].sum(0)[:, None] for b in data[:2]], 0)
    scales = list(scalars["scalar/loss_scale"].values())
    assert scales[:3] == [65536, 32768, 16384]  # the first two are too large
    assert max(scalars["scalar/skipped_windows"].values()) == 1
    np.testing.assert_allclose(mine.model_S.params["w"], -2 * grad, rtol=1e-6)


def test_an_overflow_leaves_batch_statistics_as_they_were(tmp_path):
    def apply(params, state, x, noise, train):
        mean = x.mean() + noise.sum()
        return jnp.sum(x * params["w"][:, 0]) * 1e-3 + noise.sum(), {"mean": mean}

    params, state = {"w": jnp.ones((2, 1))}, {"mean": jnp.zeros(())}
    mine = trainer(tmp_path, jaxbrewer.FunctionModel(apply, params, state))
    with mine:
        mine.train(optax.sgd(1.0), batches(2, bad={1}), num_epochs=1)
    np.testing.assert_allclose(mine.model_S.state["mean"], batches(1)[0]["x"].mean(), rtol=1e-6)


@pytest.mark.parametrize("half", ["float16", "bfloat16"])
def test_a_nan_that_no_scale_ends_stops_the_run(tmp_path, half):
    mine = trainer(tmp_path, half_dtype=half)
    data = batches(40, bad=range(3, 40))
    with mine, pytest.raises(FloatingPointError) as caught:
        mine.train(optax.sgd(2.0**-20), data, num_epochs=1)
    text = str(caught.value)
    if half == "float16":
        assert "the loss scale has fallen to 0.5" in text and "half_dtype='bfloat16'" in text
    else:
        assert "the loss is inf at global step 4" in text
    assert ("scalar/loss_scale" in read_scalars(tmp_path / "log")) == (half == "float16")


def test_a_resumed_run_has_the_same_bits(tmp_path):
    data = [{**b, "x": b["x"] / 64} for b in batches(8, bad={2, 7})]
    config = {"gradient_accumulation_steps": 2, "ckpt_frequency": 2, "max_to_keep": None}

    def run(folder, callback=None, **more):
        mine = trainer(folder, **config, **more)
        with mine:
            mine.train(MOMENTUM, data, num_epochs=2, callback=callback)
        return np.asarray(mine.model_S.params["w"])

    whole = run(tmp_path / "whole")
    stop = lambda model, step: jaxbrewer.CallbackResult(stop=step == 6)  # noqa: E731
    run(tmp_path / "cut", stop)
    assert steps_in(tmp_path / "cut" / "out")[-1] == 6
    resumed = run(tmp_path / "cut", resume=True)
    np.testing.assert_array_equal(resumed, whole)
    curves = [read_scalars(tmp_path / name / "log") for name in ("whole", "cut")]
    assert curves[0]["scalar/loss_scale"] == curves[1]["scalar/loss_scale"]
    assert curves[0]["scalar/skipped_windows"] == curves[1]["scalar/skipped_windows"]
    assert whole.any()
    for other, difference in (
        ({"half_dtype": "bfloat16"}, "scaling/scale: in the checkpoint only"),
        ({"fp16_opt_level": "O3"}, r"params/w: saved as float32\[2, 1\], wanted float16\[2, 1\]"),
    ):
        changed = {**config, **other, "resume": True}
        mine = trainer(tmp_path / "cut", **changed)
        with mine, pytest.raises(CheckpointError, match=next(iter(other))):
            mine.train(MOMENTUM, data, num_epochs=3)
        mine = trainer(tmp_path / "cut", **changed, resume_changes=list(other))
        with mine, pytest.raises(CheckpointError, match=difference):
            mine.train(MOMENTUM, data, num_epochs=3)


def test_the_scale_reaches_what_float16_would_lose():
    """A gradient of 1e-9 is 0 in float16; scaled by 65536 it is there."""

    def loss(w, scale):
        return (w.astype(jnp.float16) * jnp.float16(1e-4)).astype(jnp.float32) * 1e-5 * scale

    w, scaling = jnp.float32(1), loss_scale.start()
    assert jax.grad(loss)(w, 1.0) == 0
    grad = jax.grad(loss)(w, scaling.scale)
    unscaled = loss_scale.unscale(scaling, grad, loss_scale.is_finite(grad))
    np.testing.assert_allclose(unscaled, 1e-9, rtol=1e-3)
    bad = loss_scale.unscale(scaling, {"a": jnp.float32(jnp.nan)}, jnp.bool_(False))
    assert bad["a"] == 0
