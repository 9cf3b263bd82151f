"""Temperature schedules beside TextBrewer's."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from textbrewer import presets as reference

from jaxbrewer import presets

pytestmark = pytest.mark.torch

KEYS = [
    ["flsw", 1, 2],
    ["flsw", {"beta": -0.5, "gamma": 0.5}],
    ["flsw", 2, 1, 1e-2],
    ["flsw", 2, 0],
    ["cwsm", 1],
    ["cwsm", {"beta": -2.5}],
]
SHAPES = [(5, 3), (1, 2), (4, 6, 9), (2, 1, 2)]


def draw(shape, seed, scale):
    rng = np.random.default_rng(seed)
    return scale * rng.normal(size=shape), scale * rng.normal(size=shape)


@pytest.mark.parametrize("key", KEYS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_temperatures_in_double_precision(key, shape, x64):
    ours, theirs = presets.TEMPERATURE_SCHEDULER[key], reference.TEMPERATURE_SCHEDULER[key]
    for seed, (scale, base) in enumerate([(1, 4), (10, 1.5), (1e-3, 8)]):
        S, T = draw(shape, seed, scale)
        tau = ours(jnp.asarray(S), jnp.asarray(T), base)
        assert tau.dtype == jnp.float64
        expected = theirs(torch.tensor(S), torch.tensor(T), base).numpy()
        np.testing.assert_allclose(tau, expected, rtol=1e-9)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_temperatures_in_single_precision(key):
    ours, theirs = presets.TEMPERATURE_SCHEDULER[key], reference.TEMPERATURE_SCHEDULER[key]
    S, T = (x.astype(np.float32) for x in draw((4, 6, 9), 0, 3))
    expected = theirs(torch.tensor(S), torch.tensor(T), 4).numpy()
    np.testing.assert_allclose(ours(jnp.asarray(S), jnp.asarray(T), 4), expected, rtol=1e-5)


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_masked_temperatures_are_textbrewers_of_the_selected(key, x64):
    ours, theirs = presets.TEMPERATURE_SCHEDULER[key], reference.TEMPERATURE_SCHEDULER[key]
    S, T = draw((4, 6, 9), 1, 3)
    mask = np.random.default_rng(2).random((4, 6)) < 0.6
    tau = ours(jnp.asarray(S), jnp.asarray(T), 4, mask=jnp.asarray(mask, jnp.int32))
    expected = theirs(torch.tensor(S[mask]), torch.tensor(T[mask]), 4).numpy()
    np.testing.assert_allclose(np.asarray(tau)[mask], expected, rtol=1e-9)


def test_the_constant_temperature():
    S, T = draw((4, 3), 0, 1)
    expected = reference.TEMPERATURE_SCHEDULER["constant"](torch.tensor(S), torch.tensor(T), 4)
    assert presets.TEMPERATURE_SCHEDULER["constant"](S, T, 4) == expected


@pytest.mark.parametrize("name", reference.WEIGHT_SCHEDULER)
def test_weight_schedules(name):
    for x in np.linspace(0, 1, 11).tolist():
        assert presets.WEIGHT_SCHEDULER[name](x) == reference.WEIGHT_SCHEDULER[name](x)
