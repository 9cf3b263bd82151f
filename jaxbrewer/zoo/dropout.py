"""Dropout with `nnx.Dropout`'s masks at a tenth of their cost on CPU.

JAX's default generator is Threefry-2x32 with 20 rounds (Salmon et al., 2011, Parallel random
numbers: as easy as 1, 2, 3, https://doi.org/10.1145/2063384.2063405). On CPU, JAX runs the rounds
as a loop that passes whole arrays through memory. Written out, they become one pass that the
compiler joins with what the mask is applied to. The numbers are the same, on any number of devices.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Key, UInt32

# Threefry-2x32: by how much each round rotates, in two sets of four, and the key's parity.
_ROTATIONS = ((13, 15, 26, 6), (17, 29, 16, 24))
_PARITY = 0x1BD11BDA
_ROUNDS = 20
# How many of its 32 random bits JAX makes a float32 of.
_MANTISSA = 23
# Masks of fewer numbers than this are left to JAX: there the compiler repeats the written-out rounds
# wherever the mask is used, which costs more to compile than is ever saved.
_SMALL = 2**14


class Dropout(nnx.Dropout):
    """Zeroes a share ``rate`` of what it is given and scales the rest by ``1 / (1 - rate)``.

    Built, switched and seeded as `nnx.Dropout`. What is kept is multiplied, as in torch, where
    `nnx.Dropout` divides.
    """

    @property
    def is_active(self) -> bool:
        """Whether it does anything now: in train mode, with a rate above 0."""
        return self.rate > 0 and not self.deterministic

    def __call__(  # type: ignore[override]
        self, inputs: Float[Array, "*shape"]
    ) -> Float[Array, "*shape"]:
        """The inputs, some of them zeroed in train mode."""
        if not self.is_active:
            return inputs
        kept = 1 - self.rate
        mask = drawn_once(keep_mask(self.rngs(), kept, inputs.shape))
        return jnp.where(mask, inputs * (1 / kept), 0)


def drawn_once(mask: Bool[Array, "*shape"]) -> Bool[Array, "*shape"]:
    """The mask, which on TPUs is held back from being drawn again wherever it is used.

    There the compiler joins the rounds with each use, of the backward pass too. Elsewhere it is
    best left alone: GPUs keep the mask by themselves, and CPUs are fastest when they draw it where it
    is used.
    """
    return jax.lax.platform_dependent(
        mask, tpu=jax.lax.optimization_barrier, default=lambda mask: mask
    )


def keep_mask(
    key: Key[Array, ""], probability: float, shape: tuple[int, ...]
) -> Bool[Array, "*shape"]:
    """``jax.random.bernoulli(key, probability, shape)``: true with that probability."""
    if jax.random.key_impl(key) != "threefry2x32" or not _SMALL <= math.prod(shape) <= 2**32:
        return jax.random.bernoulli(key, np.float32(probability), shape)
    places = jnp.zeros(shape, jnp.uint32)
    for axis in range(len(shape)):
        along = jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
        places += along * np.uint32(math.prod(shape[axis + 1 :]))
    first, second = threefry(jax.random.key_data(key), jnp.zeros_like(places), places)
    # The upper bits are the number k in u = k / 2²³; u < p where k is below p · 2²³, rounded up.
    bound = math.ceil(float(np.float32(probability)) * 2**_MANTISSA)
    return (first ^ second) >> (32 - _MANTISSA) < np.uint32(bound)


def threefry(
    key: UInt32[Array, "2"], high: UInt32[Array, "*shape"], low: UInt32[Array, "*shape"]
) -> tuple[UInt32[Array, "*shape"], UInt32[Array, "*shape"]]:
    """The two words that Threefry-2x32 makes of each 64-bit counter, given as its two words."""
    keys = (key[0], key[1], key[0] ^ key[1] ^ np.uint32(_PARITY))
    x, y = high + keys[0], low + keys[1]
    for done in range(_ROUNDS):
        group, turn = divmod(done, 4)
        rotation = _ROTATIONS[group % 2][turn]
        x = x + y
        y = (y << rotation | y >> (32 - rotation)) ^ x
        if turn == 3:
            x = x + keys[(group + 1) % 3]
            y = y + keys[(group + 2) % 3] + np.uint32(group + 1)
    return x, y
