"""Schedules as tables: what a function of progress gives each step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..schedulers import Schedule

_CHUNK = 65536


def tabulate(function: Schedule, points: np.ndarray) -> np.ndarray:
    """Returns ``function`` of every point, in float64.

    Args:
        function: a schedule of one number. It is called with Python numbers (ints if ``points`` are
            integers), so the table has their precision; one that answers with a JAX array is
            compiled and called with many points at once instead, if JAX can trace it.
        points: one-dimensional.

    Raises:
        ValueError: a value is not one finite number; the message names function and point.
    """
    points = np.asarray(points)
    if points.ndim != 1:
        raise ValueError(f"points must be one-dimensional, got shape {points.shape}")
    if points.size == 0:
        return np.zeros(0)
    first = function(points[0].item())
    if isinstance(first, jax.Array) and first.ndim == 0:
        try:
            values = _tabulate_compiled(function, points)
        except jax.errors.JAXTypeError:  # it branches on the value, or leaves JAX
            values = _tabulate_plain(function, points)
    else:
        values = _tabulate_plain(function, points)
    bad = np.flatnonzero(~np.isfinite(values))
    if bad.size:
        raise ValueError(_not_a_number(function, points[bad[0]].item(), values[bad[0]].item()))
    return values


def looks_absolute(schedule: Schedule, total_steps: int) -> bool:
    """Returns whether a learning-rate schedule gives rates where factors are wanted.

    That is taken to be so if it stays at or below 0.1 throughout the run and far beyond it (up to
    ten million steps): a factor is 1 where the optimizer's own rate is meant.

    Args:
        schedule: maps a step to a factor, or so it should.
        total_steps: length of the run in optimizer steps.

    Raises:
        ValueError: as :func:`tabulate`, for a step within the run.
    """
    within = np.unique(np.linspace(0, max(total_steps, 1), 2048).astype(np.int64))
    if np.max(tabulate(schedule, within)) > 0.1:
        return False
    beyond = np.unique(np.geomspace(1, 1e7, 1024).astype(np.int64))
    try:
        return bool(np.max(tabulate(schedule, beyond)) <= 0.1)
    except (ArithmeticError, LookupError, ValueError):  # not made for steps after the run
        return True


def _tabulate_compiled(function, points):
    compiled = jax.jit(jax.vmap(function))
    parts = []
    for start in range(0, len(points), _CHUNK):
        values = np.asarray(compiled(jnp.asarray(points[start : start + _CHUNK])))
        parts.append(values.astype(np.float64))
    return np.concatenate(parts)


def _tabulate_plain(function, points):
    values = np.empty(len(points))
    for i, point in enumerate(points.tolist()):
        value = function(point)
        number = value if isinstance(value, float) else _scalar(value)
        if number is None:
            raise ValueError(_not_a_number(function, point, value))
        values[i] = number
    return values


def _scalar(value):
    if isinstance(value, str) or np.ndim(value) != 0:
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _not_a_number(function: Schedule, point: Any, value: Any) -> str:
    name = getattr(function, "__name__", repr(function))
    return f"{name}({point!r}) gave {value!r}: a schedule must return one finite number"
