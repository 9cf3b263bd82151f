"""TAID: its value against its formula, its state against its recurrence."""

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from jaxbrewer.losses.stateful import Taid


def formula(S, T, t, temperature):
    log_r = log_softmax((1 - t) * S / temperature + t * T / temperature, -1)
    log_q = log_softmax(S / temperature, -1)
    return (np.exp(log_r) * (log_r - log_q)).sum(-1).mean()


def recurrence(values, t_start=0.4, t_end=1.0, alpha=5e-4, beta=0.99):
    """In Python's numbers: t after each of these losses."""
    t, m, before, found = t_start, 0.0, None, []
    for step, loss in enumerate(values):
        if before is not None:
            m = beta * m + (1 - beta) * (before - loss) / (before + 1e-15)
            grown = t + alpha / (1 + np.exp(-m)) * (1 - t)
            wanted = t_start + (t_end - t_start) * (step / len(values))
            t = min(t_end, max(wanted, grown))
        before = loss
        found.append(t)
    return found


@pytest.mark.parametrize("t", [0.0, 0.4, 1.0])
def test_the_loss_is_its_formula(t, x64):
    S, T = np.random.default_rng(0).normal(0, 2, (2, 6, 5))
    state = Taid().init() | {"t": np.float64(t)}
    value, gradient = jax.value_and_grad(Taid())(S, T, 2.0, state=state)
    np.testing.assert_allclose(value, formula(S, T, t, 2.0), rtol=1e-9, atol=1e-12)
    # The interpolated target has no gradient: only −log q has one.
    r = np.exp(log_softmax(((1 - t) * S + t * T) / 2, -1))
    q = np.exp(log_softmax(S / 2, -1))
    np.testing.assert_allclose(gradient, (q - r) / 2 / 6, rtol=1e-9, atol=1e-12)
    scaled = Taid(scale_by_t2=True)(S, T, 2.0, state=state)
    np.testing.assert_allclose(scaled, 4 * value, rtol=1e-12)


def test_only_selected_positions_count():
    S, T = np.random.default_rng(1).normal(0, 2, (2, 6, 5)).astype(np.float32)
    mask = np.array([1, 0, 1, 1, 0, 1])
    T_junk = np.where(mask[:, None] == 1, T, np.nan)
    state = Taid().init()
    value, gradient = jax.value_and_grad(Taid())(S, T_junk, 2.0, mask, state=state)
    expected = Taid()(S[mask == 1], T[mask == 1], 2.0, state=state)
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    assert np.isfinite(gradient).all() and not gradient[mask == 0].any()


def test_excluded_classes():
    S, T = np.random.default_rng(2).normal(0, 2, (2, 6, 5)).astype(np.float32)
    low = np.full((6, 1), -np.inf, np.float32)
    more = [np.concatenate([x, low], -1) for x in (S, T)]
    value, gradient = jax.value_and_grad(Taid())(*more, state=Taid().init())
    np.testing.assert_allclose(value, Taid()(S, T, state=Taid().init()), rtol=1e-6)
    assert np.isfinite(gradient).all()


@pytest.mark.parametrize("options", [{}, {"t_start": 0.1, "t_end": 0.9, "alpha": 0.3, "beta": 0.8}])
def test_the_interpolation_follows_its_recurrence(options):
    rng = np.random.default_rng(0)
    values = np.exp(-np.arange(50) / 20) * rng.uniform(0.5, 1.5, 50)
    taid = Taid(**options)
    advance = jax.jit(taid.advance)
    state, found = taid.init(), []
    for step, loss in enumerate(values):
        state = advance(state, np.float32(loss), np.float32(step / 50))
        found.append(float(state["t"]))
    expected = recurrence(values, **options)
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert found[-1] > found[0]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"t_start": 1.2}, "taid: t_start is 1.2; expected a number from 0 to 1"),
        ({"t_start": 0.8, "t_end": 0.5}, "expected t_start up to t_end"),
        ({"alpha": "a"}, "alpha is 'a'"),
    ],
)
def test_options_out_of_range(options, said):
    with pytest.raises(ValueError, match=said):
        Taid(**options)
