"""What depends on how far a key is from its query: made once for each distance, then laid out.

A sequence of length L has the distances L - 1 to 1 - L. A product with what stands for each of them
and a shift cost no look-up for each pair of positions, forward or backward.
"""

import jax
import numpy as np
from jaxtyping import Array, Float


def distances(length: int) -> np.ndarray:
    """The distances that `shifted` lays out: ``length - 1`` down to ``-length``, 2 · length of them.

    The last is one more than there is; it makes the rows even.
    """
    return np.arange(length - 1, -length - 1, -1)


def shifted(
    by_distance: Float[Array, "*shape length distances"],
) -> Float[Array, "*shape length length"]:
    """``out[…, i, j] = by_distance[…, i, d]``, with d the place of ``i - j`` in `distances`.

    Read as one line, row i begins ``2 · length · i`` numbers in, and its entry for j lies
    ``length - 1 - i + j`` further: cut into rows that are one number shorter, the entries of each j
    are below each other.
    """
    *shape, length, width = by_distance.shape
    line = by_distance.reshape(*shape, length * width)
    start = length - 1
    line = jax.lax.slice_in_dim(line, start, start + length * (width - 1), axis=-1)
    return line.reshape(*shape, length, width - 1)[..., :length]
