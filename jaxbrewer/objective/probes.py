"""Whether a user's function heeds a mask, found by trying it on a few numbers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .loss import position_by_position, takes_labels

_LABELS = np.arange(6) % 5


def is_position_mean(loss: Callable) -> bool:
    """Tries whether a KD loss of ``[positions, classes]`` is the mean of its positions' losses."""
    more = {"labels": jnp.asarray(_LABELS)} if takes_labels(loss) else {}
    return _agree(
        lambda S, T: jnp.mean(position_by_position(loss, S, T, 2.0, **more)),
        lambda S, T: loss(S, T, 2.0, **more),
    )


def is_positionwise(scheduler: Callable) -> bool:
    """Tries whether a temperature scheduler gives each position what it would get alone."""
    return _agree(
        lambda S, T: scheduler(S[::2], T[::2], 2.0),
        lambda S, T: _every_other(scheduler(S, T, 2.0)),
    )


def heeds_mask(function: Callable) -> bool:
    """Tries whether a function that takes ``mask=`` looks at selected positions only.

    It may be a KD loss or a temperature scheduler. One that swallows the mask with ``**kwargs``
    does not.
    """
    some, all_ = {}, {}
    if takes_labels(function):
        some, all_ = {"labels": jnp.asarray(_LABELS[::2])}, {"labels": jnp.asarray(_LABELS)}
    return _agree(
        lambda S, T: function(S[::2], T[::2], 2.0, mask=jnp.ones(3, bool), **some),
        lambda S, T: _every_other(function(S, T, 2.0, mask=jnp.arange(6) % 2 == 0, **all_)),
    )


def _every_other(x: Any) -> Any:
    return x[::2] if jnp.ndim(x) else x


def _agree(one: Callable, other: Callable) -> bool:
    """Whether two functions of logits agree on fixed random ones, six positions of five classes."""
    logits_S, logits_T = 3 * np.random.default_rng(0).normal(size=(2, 6, 5)).astype(np.float32)
    first, second = jax.jit(lambda S, T: (one(S, T), other(S, T)))(logits_S, logits_T)
    return first.shape == second.shape and np.allclose(first, second, rtol=1e-4, atol=1e-6)
