"""The guard's parts; what it does for a run is in tests/durability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbrewer.step import guard


def update(old):
    return jax.tree.map(lambda x: x + 1, old)


@pytest.mark.parametrize("held", [False, True])
def test_an_update_is_made_unless_it_is_held(held):
    old = {"a": jnp.arange(3.0), "b": (jnp.int32(1),)}
    got = jax.jit(lambda held, old: guard.unless(held, update, old))(jnp.bool_(held), old)
    for mine, theirs in zip(
        jax.tree.leaves(got), jax.tree.leaves(old if held else update(old)), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


@pytest.mark.parametrize("platform", ["cuda", "tpu", "cpu"])
def test_on_accelerators_the_host_waits_for_no_condition(platform):
    """A loop on a GPU makes the host wait for the device in the middle of a step."""
    shapes = jnp.bool_(False), jnp.ones(5)
    traced = jax.jit(lambda held, old: guard.unless(held, update, old)).trace(*shapes)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert ("stablehlo.while" in text) is (platform == "cpu")
    assert ("stablehlo.select" in text) is (platform != "cpu")
