"""Digests of arrays: two sums of whole numbers, by which a single flipped bit is noticed.

A digest is of what an array *is*, type, shape and elements in their order, and not of how it lies:
whole numbers are added modulo 2^32, so that neither the order of summation nor devices, shardings
and processes make a difference. One compiled function reads each array once, where it is, and one
small vector comes to the host.

Against accidents, not against forgers.
"""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_WORD = jnp.uint32


def digests(tree: Any) -> dict[str, str]:
    """The digest of each array of a tree, by its name: ``{'params/kernel': 'float32[4,2] 1f…'}``.

    Across processes all must call it, with the same tree.
    """
    leaves = named(tree)
    if not leaves:
        return {}
    arrays = (x if isinstance(x, jax.Array) else np.asarray(x) for x in leaves.values())
    sums = _summed(tuple(arrays))
    return {
        name: f"{kind_of(leaf)} {high:08x}{low:08x}"
        for (name, leaf), (high, low) in zip(leaves.items(), sums, strict=True)
    }


def named(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by name."""
    leaves: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        while name in leaves:  # a key may hold a slash itself
            name += "'"
        leaves[name] = leaf
    return leaves


def digest(tree: Any) -> str:
    """One digest of all arrays of a tree and their names."""
    return json_digest(digests(tree))


def json_digest(value: Any) -> str:
    """The SHA-256 of a value as JSON has it: keys are text, in order, and tuples are lists."""
    text = json.dumps(json.loads(json.dumps(value)), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def differing(wanted: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """What differs between two tables of digests, a line for each name."""
    lines = []
    for name in sorted({*wanted, *found}):
        if name not in found:
            lines.append(f"{name}: is missing")
        elif name not in wanted:
            lines.append(f"{name}: was not saved")
        elif wanted[name] != found[name]:
            (what, before), (now, after) = wanted[name].split(" "), found[name].split(" ")
            lines.append(
                f"{name}: is {now}, was saved as {what}"
                if what != now
                else f"{name}: {what} has the digest {after}, was saved with {before}"
            )
    return lines


def kind_of(leaf: Any) -> str:
    """The type and shape of an array, with which its digest begins: ``'float32[4,2]'``."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _summed(arrays: tuple[Any, ...]) -> np.ndarray:
    """``[arrays, 2]``: the two sums of each."""
    meshes = {
        x.sharding.mesh
        for x in arrays
        if isinstance(x, jax.Array) and isinstance(x.sharding, jax.sharding.NamedSharding)
    }
    whole = None
    if meshes:
        whole = jax.sharding.NamedSharding(meshes.pop(), jax.sharding.PartitionSpec())
    # One program for each kind of array: one for all takes long to compile.
    summed = jax.jit(_sums, out_shardings=whole)
    return np.stack([np.asarray(x.addressable_data(0)) for x in [summed(x) for x in arrays]])


def _sums(x: jax.Array) -> jax.Array:
    return jnp.stack(_sums_of(x))


def _sums_of(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Two sums over the words of an array; one flipped bit changes both.

    In the first a word is multiplied by an odd number, in the second it goes through a bijection of
    32 bits; both depend on the word's place, so that words exchanged, moved or repeated show too.
    """
    words = _words(x)
    # The place is counted along each axis: a flattened view would gather a sharded array.
    place = jnp.zeros(words.shape, _WORD)
    stride = 1
    for axis in reversed(range(words.ndim)):
        counted = jax.lax.broadcasted_iota(_WORD, words.shape, axis)
        place = place + counted * _WORD(stride % 2**32)
        stride *= words.shape[axis]
    factor = place * _WORD(0x9E3779B2) + _WORD(0x85EBCA6B)  # even · place + odd: odd
    mixed = words ^ (place * _WORD(0xC2B2AE35))
    mixed = (mixed ^ (mixed >> 16)) * _WORD(0x7FEB352D)
    mixed = (mixed ^ (mixed >> 15)) * _WORD(0x846CA68B)
    mixed = mixed ^ (mixed >> 16)
    # One reduction for both: two would each be given their summands as an array.
    return jax.lax.reduce(
        (words * factor, mixed),
        (_WORD(0), _WORD(0)),
        lambda a, b: (a[0] + b[0], a[1] + b[1]),
        tuple(range(words.ndim)),
    )


def _words(x: jax.Array) -> jax.Array:
    """An array's bits as unsigned words, one or more an element along a last axis."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if jnp.issubdtype(x.dtype, jnp.complexfloating):
        x = jnp.stack([x.real, x.imag], axis=-1)
    if x.dtype == jnp.bool_:
        return x.astype(_WORD)
    if jnp.issubdtype(x.dtype, jnp.integer):
        bits = jnp.iinfo(x.dtype).bits
    else:
        bits = jnp.finfo(x.dtype).bits
    if bits >= 32:
        return jax.lax.bitcast_convert_type(x, _WORD)  # of 64 bits: two words along a new axis
    if not jnp.issubdtype(x.dtype, jnp.integer):
        x = jax.lax.bitcast_convert_type(x, jnp.dtype(f"uint{bits}"))
    return x.astype(_WORD)
