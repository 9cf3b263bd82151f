"""Schedules: of loss weights, of the temperature, and of the learning rate.

* A weight schedule maps the finished fraction of the training, 0 to 1, to a weight.
* A temperature schedule maps both sides' logits and the base temperature to the temperature in use.
* A learning-rate schedule maps the number of finished optimizer steps to a *factor* of the
  optimizer's own rate: 1 leaves that rate as it is. (An optax schedule gives the rate itself.)
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Shaped

Schedule = Callable[[Any], Any]

# ---------------------------------------------------------------------------------------- weights


def linear_growth_weight_scheduler(x):
    """Returns the finished fraction itself: a weight that grows from 0 to 1."""
    return x


def linear_decay_weight_scheduler(x):
    """Returns 1 less the finished fraction: a weight that decays from 1 to 0."""
    return 1 - x


def step_weight_scheduler(x, *, at=0.5, before=0, after=1):
    """Returns ``before`` until the fraction ``at`` is finished, and ``after`` from then on.

    Raises:
        ValueError: ``at`` is not from 0 to 1.
    """
    _fraction("at", at)
    return before if x < at else after


def linear_weight_scheduler(x, *, start=0, end=1, begin=0, until=1, warmup=0):
    """Goes from ``start`` to ``end`` in a straight line, between the fractions ``begin`` and ``until``.

    Before ``begin`` it is 0 if there is a ``warmup``, over which fraction it first rises from 0 to
    ``start``; without one it is ``start``. After ``until`` it is ``end``. So a weight that starts
    late is ``["linear", {"begin": 0.3, "until": 0.4}]``, and one with a warm-up that then stays
    ``["linear", {"start": 1, "warmup": 0.1}]``.

    Raises:
        ValueError: the fractions are not in order, from 0 to 1.
    """
    return _ramp(x, start, end, begin, until, warmup, lambda part: part)


def cosine_weight_scheduler(x, *, start=0, end=1, begin=0, until=1, warmup=0):
    """As `linear_weight_scheduler`, along half a cosine: slowly at both ends.

    Raises:
        ValueError: the fractions are not in order, from 0 to 1.
    """
    return _ramp(
        x, start, end, begin, until, warmup, lambda part: (1 - math.cos(math.pi * part)) / 2
    )


def _ramp(x, start, end, begin, until, warmup, shape):
    for name, value in (("begin", begin), ("until", until), ("warmup", warmup)):
        _fraction(name, value)
    first = begin + warmup
    if first > until:
        raise ValueError(
            f"begin={begin} and warmup={warmup} end after until={until}: expected begin + warmup up to until"
        )
    if x < begin:
        return 0 if warmup else start
    if x < first:
        return start * (x - begin) / warmup
    if x >= until:
        return end
    return start + (end - start) * shape((x - first) / (until - first))


def _fraction(name, value):
    if not 0 <= _finite(name, value) <= 1:
        raise ValueError(f"{name} must be a fraction of the training, from 0 to 1, got {value}")


# ----------------------------------------------------------------------------------- temperatures


def constant_temperature_scheduler(logits_S, logits_T, base_temperature):
    """Returns the base temperature, whatever the logits."""
    return base_temperature


def flsw_temperature_scheduler_builder(
    beta: float, gamma: float, eps: float = 1e-4
) -> Callable[..., Float[Array, "..."]]:
    """Builds the focal temperature of "Preparing Lessons" (https://arxiv.org/abs/1911.07471).

    With s and t the logits of one position, each divided by its norm + eps, and
    w = (1 − s·t)^gamma, the position's temperature is ``base + beta · (mean(w) − w)``: where the
    student agrees least with the teacher the temperature is lowest.

    Args:
        beta: strength.
        gamma: focus, at least 0.
        eps: added to each norm, above 0.

    Returns:
        ``f(logits_S, logits_T, base_temperature, mask=None)``, which gives one temperature for each
        position (the logits' shape less the classes), in float32 or wider, without a gradient. The
        mean runs over the positions where ``mask`` is not 0; with none of them it is taken as 0.

    Raises:
        TypeError: an argument is no number.
        ValueError: a number is out of its range.

    TextBrewer raises negative rounding errors of 1 − s·t to the power too, which is NaN for a
    fractional gamma; here they count as 0.
    """
    beta, gamma, eps = _finite("beta", beta), _finite("gamma", gamma), _finite("eps", eps)
    if gamma < 0:
        raise ValueError(f"gamma must be at least 0, got {gamma}")
    if eps <= 0:
        raise ValueError(f"eps must be above 0, got {eps}")

    def flsw_temperature_scheduler(
        logits_S: Float[Array, "*positions classes"],
        logits_T: Float[Array, "*positions classes"],
        base_temperature: Any,
        mask: Shaped[Array, "*positions"] | None = None,
    ) -> Float[Array, "*positions"]:
        s, t = (_wide(jax.lax.stop_gradient(x)) for x in (logits_S, logits_T))
        s = s / (jnp.linalg.norm(s, axis=-1, keepdims=True) + eps)
        t = t / (jnp.linalg.norm(t, axis=-1, keepdims=True) + eps)
        w = jnp.maximum(1 - jnp.sum(s * t, axis=-1), 0) ** gamma
        return base_temperature + (_selected_mean(w, mask) - w) * beta

    return flsw_temperature_scheduler


def cwsm_temperature_scheduler_builder(beta: float) -> Callable[..., Float[Array, "..."]]:
    """Builds the confidence temperature of "Preparing Lessons" (https://arxiv.org/abs/1911.07471).

    With w = 1 / (largest probability of the student + 1e-3), a position's temperature is
    ``base + beta · (mean(w) − w)``: where the student is least sure the temperature is lowest.

    Args:
        beta: strength.

    Returns:
        A function as :func:`flsw_temperature_scheduler_builder` returns.

    Raises:
        TypeError: beta is no number.
        ValueError: beta is not finite.
    """
    beta = _finite("beta", beta)

    def cwsm_temperature_scheduler(
        logits_S: Float[Array, "*positions classes"],
        logits_T: Float[Array, "*positions classes_T"],
        base_temperature: Any,
        mask: Shaped[Array, "*positions"] | None = None,
    ) -> Float[Array, "*positions"]:
        probabilities = jax.nn.softmax(_wide(jax.lax.stop_gradient(logits_S)), axis=-1)
        w = 1 / (jnp.max(probabilities, axis=-1) + 1e-3)
        return base_temperature + (_selected_mean(w, mask) - w) * beta

    return cwsm_temperature_scheduler


TEMPERATURE_BUILDERS = (flsw_temperature_scheduler_builder, cwsm_temperature_scheduler_builder)
"""The functions here that make a temperature schedule, rather than being one."""


def _wide(x):
    x = jnp.asarray(x)
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _selected_mean(w, mask):
    if mask is None:
        return jnp.mean(w)
    if jnp.shape(mask) != w.shape:
        raise ValueError(
            f"the mask has shape {jnp.shape(mask)}, the logits have positions {w.shape}: "
            "give one mask value for each position"
        )
    selected = jnp.asarray(mask) != 0
    count = jnp.sum(selected, dtype=w.dtype)
    return jnp.sum(jnp.where(selected, w, 0)) / jnp.maximum(count, 1)


# ---------------------------------------------------------------------------------- learning rate


def get_constant_schedule() -> Schedule:
    """Returns the factor schedule that is 1 at every step."""

    def constant(step):
        xp, x = _steps(step)
        return xp.ones_like(x)[()]

    return constant


def get_constant_schedule_with_warmup(num_warmup_steps: float) -> Schedule:
    """Returns a factor schedule: from 0 to 1 over the warm-up, then 1.

    Args:
        num_warmup_steps: optimizer steps of the warm-up, at least 0.

    The formula is that of transformers' function of the same name, which takes the torch optimizer
    as a first argument; there is none here. The schedule takes a number, a NumPy array or a JAX
    array (traced or not) of steps. Errors: TypeError for what is no number, ValueError for a
    negative one; the same holds for the other schedules here.
    """
    return _with_warmup(num_warmup_steps, lambda xp, step: xp.ones_like(step))


def get_linear_schedule_with_warmup(num_warmup_steps: float, num_training_steps: float) -> Schedule:
    """Returns a factor schedule: from 0 to 1 over the warm-up, then linearly to 0 at the end.

    Args:
        num_warmup_steps: optimizer steps of the warm-up, at least 0.
        num_training_steps: optimizer steps of the whole training, above 0.

    See :func:`get_constant_schedule_with_warmup` for what all these schedules share.
    """
    left = _left(num_warmup_steps, num_training_steps)
    return _with_warmup(num_warmup_steps, lambda xp, step: xp.maximum(left(step), 0))


def get_cosine_schedule_with_warmup(
    num_warmup_steps: float, num_training_steps: float, num_cycles: float = 0.5
) -> Schedule:
    """Returns a factor schedule: from 0 to 1 over the warm-up, then along cosine waves.

    Args:
        num_warmup_steps: optimizer steps of the warm-up, at least 0.
        num_training_steps: optimizer steps of the whole training, above 0.
        num_cycles: waves after the warm-up; the default, half of one, falls from 1 to 0.

    See :func:`get_constant_schedule_with_warmup` for what all these schedules share.
    """
    done = _done(num_warmup_steps, num_training_steps)
    turns = 2 * math.pi * _not_negative("num_cycles", num_cycles)
    return _with_warmup(
        num_warmup_steps, lambda xp, step: xp.maximum(0.5 * (1 + xp.cos(turns * done(step))), 0)
    )


def get_cosine_with_hard_restarts_schedule_with_warmup(
    num_warmup_steps: float, num_training_steps: float, num_cycles: float = 1
) -> Schedule:
    """Returns a factor schedule: from 0 to 1 over the warm-up, then falling cosines from 1 to 0.

    Args:
        num_warmup_steps: optimizer steps of the warm-up, at least 0.
        num_training_steps: optimizer steps of the whole training, above 0; from there on it is 0.
        num_cycles: how often it falls from 1 to 0 after the warm-up.

    See :func:`get_constant_schedule_with_warmup` for what all these schedules share.
    """
    done = _done(num_warmup_steps, num_training_steps)
    cycles = _not_negative("num_cycles", num_cycles)

    def falling(xp, step):
        x = done(step)
        wave = 0.5 * (1 + xp.cos(math.pi * ((cycles * x) % 1.0)))
        return xp.where(x >= 1, 0, xp.maximum(wave, 0))

    return _with_warmup(num_warmup_steps, falling)


def get_polynomial_decay_schedule_with_warmup(
    num_warmup_steps: float,
    num_training_steps: float,
    lr_end: float = 1e-7,
    power: float = 1.0,
    *,
    lr_init: float,
) -> Schedule:
    """Returns a factor schedule: from 0 to 1 over the warm-up, then a power law to the end rate.

    Args:
        num_warmup_steps: optimizer steps of the warm-up, at least 0.
        num_training_steps: optimizer steps of the whole training, above 0.
        lr_end: learning rate at the end, below ``lr_init``.
        power: the exponent, above 0; 1 is linear.
        lr_init: the optimizer's learning rate (transformers reads it off the optimizer). With 1
            given here, ``lr_end`` is a factor itself.

    See :func:`get_constant_schedule_with_warmup` for what all these schedules share.
    """
    left = _left(num_warmup_steps, num_training_steps)
    end, init = _not_negative("lr_end", lr_end), _not_negative("lr_init", lr_init)
    power = _finite("power", power)
    if end >= init:
        raise ValueError(f"lr_end ({lr_end}) must be below lr_init ({lr_init})")
    if power <= 0:
        raise ValueError(f"power must be above 0, got {power}")

    def decay(xp, step):
        return ((init - end) * xp.maximum(left(step), 0) ** power + end) / init

    return _with_warmup(num_warmup_steps, decay)


def _with_warmup(num_warmup_steps: float, after: Callable[..., Any]) -> Schedule:
    warmup = _not_negative("num_warmup_steps", num_warmup_steps)

    def factor(step):
        xp, x = _steps(step)
        return xp.where(x < warmup, x / max(1.0, warmup), after(xp, x))[()]

    return factor


def _done(num_warmup_steps, num_training_steps):
    """The fraction done of what follows the warm-up; beyond 1 after the end."""
    warmup, total = _ends(num_warmup_steps, num_training_steps)
    return lambda step: (step - warmup) / max(1.0, total - warmup)


def _left(num_warmup_steps, num_training_steps):
    """The fraction left of what follows the warm-up; below 0 after the end."""
    warmup, total = _ends(num_warmup_steps, num_training_steps)
    return lambda step: (total - step) / max(1.0, total - warmup)


def _ends(num_warmup_steps, num_training_steps):
    warmup = _not_negative("num_warmup_steps", num_warmup_steps)
    total = _not_negative("num_training_steps", num_training_steps)
    if total == 0:
        raise ValueError("num_training_steps must be above 0, got 0")
    return warmup, total


def _steps(step):
    # NumPy in double precision for what is not on a device: a table for the host is then exact.
    if isinstance(step, jax.Array):
        return jnp, step.astype(jnp.result_type(float))
    return np, np.asarray(step, dtype=np.float64)


def _finite(name: str, value: Any) -> float:
    number = isinstance(value, int | float | np.integer | np.floating)
    if not number or isinstance(value, bool):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not math.isfinite(value):
        raise ValueError(f"{name} must be finite, got {value!r}")
    return float(value)


def _not_negative(name: str, value: Any) -> float:
    value = _finite(name, value)
    if value < 0:
        raise ValueError(f"{name} must be at least 0, got {value!r}")
    return value


# ----------------------------------------------------------------------------- tables of schedules
