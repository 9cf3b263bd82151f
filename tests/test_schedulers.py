"""Schedules: of weights, of the temperature under masks, of the learning rate, and their tables."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxbrewer import schedulers
from jaxbrewer.objective.tables import looks_absolute, tabulate
from jaxbrewer.schedulers import (
    cwsm_temperature_scheduler_builder,
    flsw_temperature_scheduler_builder,
    get_constant_schedule,
    get_constant_schedule_with_warmup,
    get_cosine_schedule_with_warmup,
    get_cosine_with_hard_restarts_schedule_with_warmup,
    get_linear_schedule_with_warmup,
    get_polynomial_decay_schedule_with_warmup,
)

BUILT = {
    "flsw": flsw_temperature_scheduler_builder(-0.7, 1.5, eps=1e-3),
    "cwsm": cwsm_temperature_scheduler_builder(2),
}


def logits(*shape, seed=0, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(seed))
    return [3 * jax.random.normal(key, shape, dtype) for key in keys]


# --------------------------------------------------------------------------------------- weights


def test_shapes_of_weight_schedules():
    points = np.linspace(0, 1, 11)
    cases = {
        (schedulers.step_weight_scheduler, ()): [0] * 5 + [1] * 6,
        (schedulers.step_weight_scheduler, (("at", 0.25), ("before", 3), ("after", 1))): [3] * 3 + [1] * 8,
        (schedulers.linear_weight_scheduler, ()): points,
        (schedulers.linear_weight_scheduler, (("start", 8), ("end", 3), ("begin", 0.2), ("until", 0.7))): [
            8, 8, 8, 7, 6, 5, 4, 3, 3, 3, 3,
        ],
        (schedulers.linear_weight_scheduler, (("start", 1), ("warmup", 0.2))): [0, 0.5] + [1] * 9,
        (schedulers.cosine_weight_scheduler, ()): (1 - np.cos(np.pi * points)) / 2,
        (schedulers.cosine_weight_scheduler, (("start", 2), ("end", 0), ("warmup", 0.5))): np.concatenate(
            [4 * points[:5], 1 + np.cos(np.pi * (points[5:] - 0.5) / 0.5)]
        ),
        (schedulers.linear_weight_scheduler, (("start", 1), ("begin", 0.5), ("warmup", 0.2))): [
            0, 0, 0, 0, 0, 0, 0.5, 1, 1, 1, 1,
        ],
    }  # fmt: skip
    for (schedule, options), expected in cases.items():
        found = tabulate(lambda x, s=schedule, o=options: s(x, **dict(o)), points)
        np.testing.assert_allclose(found, expected, atol=1e-12, err_msg=str(options))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"begin": 0.5, "until": 0.4}, "end after until=0.4"),
        ({"until": 2}, "until must be a fraction of the training, from 0 to 1, got 2"),
        ({"warmup": "1"}, "warmup"),
        ({"begin": math.nan}, "begin"),
    ],
)
def test_weight_schedules_refuse_what_is_no_fraction(options, said):
    with pytest.raises((TypeError, ValueError), match=said):
        schedulers.cosine_weight_scheduler(0.5, **options)


# ---------------------------------------------------------------------------------------- weights


def test_weight_schedules():
    for x in (0.0, 0.3, 1.0):
        assert schedulers.linear_growth_weight_scheduler(x) == x
        assert schedulers.linear_decay_weight_scheduler(x) == 1 - x


# ----------------------------------------------------------------------------------- temperatures


def test_constant_temperature_is_the_base():
    S, T = logits(2, 3)
    assert schedulers.constant_temperature_scheduler(S, T, 4) == 4


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("shape", [(4, 7), (3, 5, 7)])
def test_temperatures_under_a_mask_are_those_of_the_selection(name, shape, x64):
    S, T = logits(*shape, dtype=jnp.float64)
    mask = np.arange(math.prod(shape[:-1])).reshape(shape[:-1]) % 3 != 1
    selected = BUILT[name](S[mask], T[mask], 4.0)
    masked = BUILT[name](S, T, 4.0, mask=jnp.asarray(mask))
    assert masked.shape == shape[:-1]
    np.testing.assert_allclose(masked[mask], selected, rtol=1e-12)
    unmasked = BUILT[name](S, T, 4.0)
    assert not np.allclose(unmasked[mask], selected, rtol=1e-4)


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("dtype", [bool, np.int32, np.float32, np.float16])
def test_every_kind_of_mask_selects_what_is_not_zero(name, dtype):
    S, T = logits(3, 5, 7)
    mask = np.array([[1, 1, 1, 0, 0]] * 3).astype(dtype) * dtype(2)
    expected = BUILT[name](S[:, :3], T[:, :3], 4.0)
    np.testing.assert_allclose(BUILT[name](S, T, 4.0, mask=mask)[:, :3], expected, rtol=1e-6)


@pytest.mark.parametrize("name", BUILT)
def test_what_the_mask_leaves_out_does_not_count(name):
    S, T = logits(3, 5, 7)
    mask = jnp.arange(5) < jnp.array([[5], [2], [3]])
    S_bad, T_bad = (jnp.where(mask[..., None], x, jnp.nan) for x in (S, T))
    good, bad = BUILT[name](S, T, 4.0, mask=mask), BUILT[name](S_bad, T_bad, 4.0, mask=mask)
    np.testing.assert_array_equal(good[mask], bad[mask])


@pytest.mark.parametrize("name", BUILT)
def test_an_empty_mask_gives_finite_temperatures(name):
    S, T = logits(3, 5, 7)
    assert np.isfinite(BUILT[name](S, T, 4.0, mask=jnp.zeros((3, 5)))).all()


@pytest.mark.parametrize("name", BUILT)
def test_extreme_logits_give_finite_temperatures(name):
    zero, large = jnp.zeros((3, 5, 7)), 1e5 * logits(3, 5, 7)[0]
    for S, T in [(zero, zero), (zero, large), (large, zero), (large, large), (large, -large)]:
        assert np.isfinite(BUILT[name](S, T, 4.0)).all()


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_halves_are_computed_in_float32(name, dtype):
    S, T = (x.astype(dtype) for x in logits(3, 5, 7))
    tau = BUILT[name](S, T, 4.0)
    assert tau.dtype == jnp.float32
    wide = BUILT[name](S.astype(jnp.float32), T.astype(jnp.float32), 4.0)
    np.testing.assert_array_equal(tau, wide)


@pytest.mark.parametrize("name", BUILT)
def test_temperatures_carry_no_gradient(name):
    S, T = logits(3, 5, 7)
    for i in range(2):
        gradient = jax.grad(lambda *x: jnp.sum(BUILT[name](*x, 4.0)), argnums=i)(S, T)
        np.testing.assert_array_equal(gradient, 0)


def test_a_mask_of_another_shape_is_refused():
    S, T = logits(3, 5, 7)
    with pytest.raises(ValueError, match="one mask value for each position"):
        BUILT["flsw"](S, T, 4.0, mask=jnp.ones((3, 5, 1)))


@pytest.mark.parametrize(
    ("arguments", "error", "match"),
    [
        (("1", 2), TypeError, "beta must be a number"),
        ((True, 2), TypeError, "beta must be a number"),
        ((1, None), TypeError, "gamma must be a number"),
        ((1, math.inf), ValueError, "gamma must be finite"),
        ((1, -1), ValueError, "gamma must be at least 0"),
        ((1, 1, 0), ValueError, "eps must be above 0"),
    ],
)
def test_wrong_arguments_of_flsw(arguments, error, match):
    with pytest.raises(error, match=match):
        flsw_temperature_scheduler_builder(*arguments)


def test_wrong_arguments_of_cwsm():
    with pytest.raises(TypeError, match="beta must be a number"):
        cwsm_temperature_scheduler_builder([1])
    with pytest.raises(ValueError, match="beta must be finite"):
        cwsm_temperature_scheduler_builder(math.nan)


# ---------------------------------------------------------------------------------- learning rate

POLYNOMIAL = {"lr_end": 1e-6, "power": 2.0, "lr_init": 5e-5}
FACTORS = [
    ("constant_schedule_with_warmup", {"num_warmup_steps": 7}),
    ("constant_schedule_with_warmup", {"num_warmup_steps": 0}),
    ("linear_schedule_with_warmup", {"num_warmup_steps": 7, "num_training_steps": 50}),
    ("linear_schedule_with_warmup", {"num_warmup_steps": 0, "num_training_steps": 1}),
    ("linear_schedule_with_warmup", {"num_warmup_steps": 5, "num_training_steps": 5}),
    ("linear_schedule_with_warmup", {"num_warmup_steps": 2.5, "num_training_steps": 25.5}),
    (
        "cosine_schedule_with_warmup",
        {"num_warmup_steps": 7, "num_training_steps": 50, "num_cycles": 0.5},
    ),
    (
        "cosine_schedule_with_warmup",
        {"num_warmup_steps": 0, "num_training_steps": 50, "num_cycles": 1.7},
    ),
    (
        "cosine_with_hard_restarts_schedule_with_warmup",
        {"num_warmup_steps": 7, "num_training_steps": 50, "num_cycles": 3},
    ),
    (
        "polynomial_decay_schedule_with_warmup",
        {"num_warmup_steps": 7, "num_training_steps": 50, **POLYNOMIAL},
    ),
]


@pytest.mark.torch
@pytest.mark.parametrize(("name", "kwargs"), FACTORS)
def test_factors_equal_transformers(name, kwargs):
    from transformers import optimization as reference

    factor = getattr(schedulers, f"get_{name}")(**kwargs)
    steps = np.arange(80)
    expected = [getattr(reference, f"_get_{name}_lr_lambda")(int(s), **kwargs) for s in steps]
    np.testing.assert_allclose([factor(int(s)) for s in steps], expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(factor(steps), expected, rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(factor(jnp.asarray(steps)), expected, rtol=2e-6, atol=2e-6)
    traced = jax.jit(jax.vmap(factor))(jnp.asarray(steps))
    np.testing.assert_allclose(traced, expected, rtol=2e-6, atol=2e-6)


@pytest.mark.torch
def test_defaults_are_transformers():
    import torch
    from transformers import optimization as reference

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.5)
    for name, kwargs in [
        ("cosine_schedule_with_warmup", {}),
        ("cosine_with_hard_restarts_schedule_with_warmup", {}),
        ("polynomial_decay_schedule_with_warmup", {"lr_init": 0.5}),
    ]:
        theirs = getattr(reference, f"get_{name}")(optimizer, 3, 20).lr_lambdas[0]
        ours = getattr(schedulers, f"get_{name}")(3, 20, **kwargs)
        steps = range(30)
        np.testing.assert_allclose([ours(s) for s in steps], [theirs(s) for s in steps], rtol=1e-9)


def test_the_constant_schedule_is_one():
    assert get_constant_schedule()(3) == 1
    np.testing.assert_array_equal(get_constant_schedule()(np.arange(3)), np.ones(3))
    np.testing.assert_array_equal(jax.jit(get_constant_schedule())(jnp.arange(3)), np.ones(3))


def test_python_steps_give_double_precision_numbers():
    value = get_linear_schedule_with_warmup(0, 3)(2)
    assert float(value) == 1 / 3
    assert isinstance(value, float)


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: get_constant_schedule_with_warmup(-1), ValueError, "num_warmup_steps must be at"),
        (lambda: get_constant_schedule_with_warmup("3"), TypeError, "num_warmup_steps must be a"),
        (lambda: get_linear_schedule_with_warmup(0, 0), ValueError, "num_training_steps must be"),
        (lambda: get_linear_schedule_with_warmup(0, math.nan), ValueError, "must be finite"),
        (lambda: get_cosine_schedule_with_warmup(0, 5, -1), ValueError, "num_cycles must be at"),
        (lambda: get_cosine_schedule_with_warmup(0, True), TypeError, "must be a number"),
        (
            lambda: get_cosine_with_hard_restarts_schedule_with_warmup(0, 5, None),
            TypeError,
            "num_cycles must be a number",
        ),
        (
            lambda: get_polynomial_decay_schedule_with_warmup(0, 5, lr_end=1, lr_init=0.1),
            ValueError,
            "lr_end .* must be below lr_init",
        ),
        (
            lambda: get_polynomial_decay_schedule_with_warmup(0, 5, power=0, lr_init=0.1),
            ValueError,
            "power must be above 0",
        ),
    ],
)
def test_wrong_arguments_of_factors(make, error, match):
    with pytest.raises(error, match=match):
        make()


# ----------------------------------------------------------------------------------------- tables


def test_a_table_of_python_numbers_is_exact():
    points = np.arange(1, 50) / 49
    np.testing.assert_array_equal(tabulate(lambda x: 1 - x**3, points), [1 - x**3 for x in points])
    kinds = set()
    tabulate(lambda x: kinds.add(type(x)) or 1, np.arange(3))
    tabulate(lambda x: kinds.add(type(x)) or 1.0, np.linspace(0, 1, 3))
    assert kinds == {int, float}


def test_a_table_of_a_jax_function_is_compiled_once_a_shape():
    calls = []

    def cosine(x):
        calls.append(x)
        return jnp.cos(x)

    points = np.linspace(0, 1, 200_000)
    table = tabulate(cosine, points)
    assert table.dtype == np.float64
    np.testing.assert_allclose(table, np.cos(points), rtol=1e-6)
    assert len(calls) <= 3  # the probe, whole chunks, the last chunk


def test_integer_points_stay_integers_for_jax():
    points = np.array([2**24, 2**24 + 1])
    np.testing.assert_array_equal(tabulate(lambda x: jnp.asarray(x) % 2, points), [0, 1])


def test_a_jax_function_that_branches_is_called_point_by_point():
    table = tabulate(lambda x: jnp.float32(1) if x < 2 else jnp.float32(0), np.arange(4))
    np.testing.assert_array_equal(table, [1, 1, 0, 0])


def test_a_table_of_a_million_points():
    table = tabulate(schedulers.linear_decay_weight_scheduler, np.arange(1_000_000) / 1_000_000)
    assert table[0] == 1
    assert table[-1] == 1 - 999_999 / 1_000_000


def test_an_optax_schedule_can_be_tabulated():
    table = tabulate(optax.linear_schedule(1.0, 0.0, 10), np.arange(12))
    np.testing.assert_allclose(table, np.maximum(1 - np.arange(12) / 10, 0), atol=1e-6)


def test_no_points_give_an_empty_table():
    assert tabulate(lambda x: x, np.zeros(0)).shape == (0,)


def decay(x):
    return math.inf if x > 1 else x


@pytest.mark.parametrize(
    ("function", "match"),
    [
        (decay, r"decay\(2\) gave inf: a schedule must return one finite number"),
        (lambda x: None, "gave None"),
        (lambda x: [1.0], r"gave \[1.0\]"),
        (lambda x: np.ones(1), "gave array"),
        (lambda x: "fast", "gave 'fast'"),
        (lambda x: 1j, "gave 1j"),
        (lambda x: jnp.ones(2), "gave Array"),
        (lambda x: jnp.log(jnp.asarray(x, jnp.float32) - 1), r"\(0\) gave .*nan"),
    ],
)
def test_a_value_that_is_no_finite_number_names_function_and_point(function, match):
    with pytest.raises(ValueError, match=match):
        tabulate(function, np.arange(3))


def test_points_are_one_dimensional():
    with pytest.raises(ValueError, match="one-dimensional"):
        tabulate(lambda x: x, np.zeros((2, 2)))


@pytest.mark.parametrize(
    "schedule",
    [
        lambda step: 1e-4,
        optax.constant_schedule(5e-5),
        optax.warmup_cosine_decay_schedule(0.0, 3e-4, 10, 100),
        optax.linear_schedule(1e-3, 0.0, 50),
        lambda step: [1e-3, 1e-4][step // 60],  # made for the run's steps only
        lambda step: 0.0,
    ],
)
def test_absolute_rates_are_seen(schedule):
    assert looks_absolute(schedule, 100)


@pytest.mark.parametrize(
    "schedule",
    [
        get_constant_schedule(),
        get_linear_schedule_with_warmup(1000, 2000),  # the run ends early in the warm-up
        get_linear_schedule_with_warmup(10, 100),
        get_cosine_schedule_with_warmup(500_000, 600_000),
        optax.exponential_decay(1.0, 1, 0.5),
        lambda step: 2.0,
        lambda step: 0.11,
    ],
)
def test_factors_are_not_taken_for_rates(schedule):
    assert not looks_absolute(schedule, 20)


def test_a_schedule_that_fails_within_the_run_says_so():
    with pytest.raises(ValueError, match="one finite number"):
        looks_absolute(lambda step: math.nan, 20)
