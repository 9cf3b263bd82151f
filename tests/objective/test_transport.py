"""The transport plan against scipy's linear program, and how it behaves inside a compiled step."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment, linprog

from jaxbrewer.objective.transport import exact_transport

SHAPES = [(5, 12), (3, 12), (4, 12), (6, 12), (1, 12), (9, 1), (1, 1), (7, 7), (7, 11), (12, 5)]
KINDS = ["uniform", "ties", "layers", "signed", "large"]

solve = jax.jit(exact_transport)


def make_cost(kind, shape, rng):
    if kind == "ties":
        return rng.integers(0, 3, shape).astype(np.float32)
    if kind == "layers":  # as between layers: the nearer in depth, the cheaper
        depths = [np.linspace(0, 1, size) for size in shape]
        cost = np.abs(depths[0][:, None] - depths[1]) + 0.1 * rng.random(shape)
        return cost.astype(np.float32)
    cost = rng.random(shape).astype(np.float32)
    return {"uniform": cost, "signed": cost - 0.5, "large": 1e6 * cost}[kind]


def cheapest(cost):
    """The least cost, by a linear program."""
    n, m = cost.shape
    rows, columns = np.kron(np.eye(n), np.ones(m)), np.kron(np.ones(n), np.eye(m))
    sums = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    result = linprog(cost.ravel(), A_eq=np.concatenate([rows, columns]), b_eq=sums)
    assert result.success
    return result.fun


def check_plan(plan, tolerance=1e-6):
    n, m = plan.shape
    assert (plan >= 0).all()
    np.testing.assert_allclose(plan.sum(1), 1 / n, rtol=tolerance)
    np.testing.assert_allclose(plan.sum(0), 1 / m, rtol=tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_a_linear_program(shape, kind):
    rng = np.random.default_rng([SHAPES.index(shape), KINDS.index(kind)])
    for _ in range(4):
        cost = make_cost(kind, shape, rng)
        plan = np.asarray(solve(cost), np.float64)
        check_plan(plan)
        expected = cheapest(cost.astype(np.float64))
        assert abs((plan * cost).sum() - expected) <= 1e-5 * max(abs(expected), 1e-2)


@pytest.mark.parametrize("shape", [(5, 12), (7, 11), (7, 7)], ids=str)
def test_double_precision(shape, x64):
    rng = np.random.default_rng(0)
    for _ in range(4):
        cost = rng.random(shape)
        plan = solve(cost)
        assert plan.dtype == jnp.float64
        check_plan(np.asarray(plan), 1e-14)
        assert abs((plan * cost).sum() - cheapest(cost)) <= 1e-12


def test_equals_an_assignment():
    """Among as many columns as rows the plan is a permutation."""
    rng = np.random.default_rng(0)
    for _ in range(10):
        cost = rng.random((7, 7)).astype(np.float32)
        rows, columns = linear_sum_assignment(cost)
        expected = np.zeros((7, 7), np.float32)
        expected[rows, columns] = np.float32(1) / 7
        np.testing.assert_array_equal(solve(cost), expected)


def test_worst_case_of_one_cheap_row():
    """Every column starts in the same row, which must pass nearly everything on."""
    for shape in ((6, 12), (7, 11), (23, 24)):
        cost = np.random.default_rng(0).random(shape).astype(np.float32) + 1
        cost[0] -= 1
        plan = np.asarray(solve(cost), np.float64)
        check_plan(plan)
        assert abs((plan * cost).sum() - cheapest(cost.astype(np.float64))) <= 1e-5


def test_equal_costs_give_a_plan():
    for value in (0.0, 3.0):
        check_plan(np.asarray(solve(np.full((5, 12), value, np.float32)), np.float64))


def test_the_choice_among_ties_is_fixed():
    cost = np.random.default_rng(0).integers(0, 2, (5, 12)).astype(np.float32)
    plan = solve(cost)
    np.testing.assert_array_equal(plan, solve(cost))
    np.testing.assert_array_equal(plan, jax.jit(lambda c: exact_transport(c))(cost))
    np.testing.assert_array_equal(plan, exact_transport(cost))


def test_the_plan_is_a_constant_of_the_gradient():
    cost = np.random.default_rng(0).random((5, 12)).astype(np.float32)

    def transported(scale, cost):
        cost = scale * cost
        return jnp.sum(exact_transport(cost) * cost)

    value, (by_scale, by_cost) = jax.jit(jax.value_and_grad(transported, (0, 1)))(2.0, cost)
    np.testing.assert_allclose(by_cost, 2 * solve(cost), rtol=1e-6)
    np.testing.assert_allclose(by_scale, value / 2, rtol=1e-6)
    assert not jax.grad(lambda c: exact_transport(c).max())(cost).any()


@pytest.mark.parametrize("shape", [(5, 12), (12, 5)], ids=str)
def test_vmap(shape):
    cost = np.random.default_rng(0).random((6, *shape)).astype(np.float32)
    cost[2] = 1.0
    cost[4, 1, 2] = np.nan
    plans = jax.jit(jax.vmap(exact_transport))(cost)
    for plan, one in zip(plans, cost, strict=True):
        np.testing.assert_array_equal(plan, solve(one))


@pytest.mark.parametrize("shape", [(5, 12), (12, 5), (1, 3)], ids=str)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_a_cost_that_is_not_finite_gives_nan(value, shape):
    cost = np.random.default_rng(0).random(shape).astype(np.float32)
    cost[0, 1 % shape[1]] = value
    assert np.isnan(solve(cost)).all()
    assert np.isnan(solve(np.full(shape, value, np.float32))).all()


def test_costs_whose_differences_overflow_end():
    """Solved or given up (NaN), but never half solved."""
    signs = np.random.default_rng(0).choice([-1, 1], (5, 12))
    plan = np.asarray(solve((signs * 3e38).astype(np.float32)), np.float64)
    if not np.isnan(plan).all():
        check_plan(plan)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int32"])
def test_other_dtypes_are_solved_in_single_precision(dtype):
    cost = jnp.asarray(10 * np.random.default_rng(0).random((5, 12)), dtype)
    plan = solve(cost)
    assert plan.dtype == jnp.float32
    np.testing.assert_array_equal(plan, solve(cost.astype(jnp.float32)))


def test_one_compile():
    compiles = []

    def listen(event, duration, **more):
        if "backend_compile" in event:
            compiles.append(event)

    step = jax.jit(jax.value_and_grad(lambda cost: jnp.sum(exact_transport(cost) * cost)))
    rng = np.random.default_rng(0)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        step(rng.random((5, 12)).astype(np.float32))
        assert compiles
        compiles.clear()
        for _ in range(3):
            step(rng.random((5, 12)).astype(np.float32))
        assert not compiles
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_no_host_callback():
    text = jax.jit(exact_transport).lower(jax.ShapeDtypeStruct((5, 12), jnp.float32)).as_text()
    assert "callback" not in text


@pytest.mark.parametrize("shape", [(12,), (2, 5, 12), (0, 12), (5, 0)], ids=str)
def test_errors(shape):
    with pytest.raises(ValueError, match=r"cost has shape .* expected a matrix \(n, m\)") as error:
        exact_transport(np.zeros(shape, np.float32))
    assert str(shape) in str(error.value)
