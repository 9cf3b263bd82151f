"""Scores by distance, laid out for every pair of positions."""

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbrewer.zoo.relative import distances, shifted


@pytest.mark.parametrize("length", [1, 2, 3, 7])
def test_every_pair_gets_what_its_distance_has(length):
    by_distance = np.random.default_rng(0).normal(size=(2, length, 2 * length))
    place = {int(distance): index for index, distance in enumerate(distances(length))}
    wanted = np.empty((2, length, length))
    for i in range(length):
        for j in range(length):
            wanted[:, i, j] = by_distance[:, i, place[i - j]]
    np.testing.assert_array_equal(shifted(jnp.asarray(by_distance)), wanted.astype(np.float32))
