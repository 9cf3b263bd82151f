"""Test doubles: decoders whose layers return ``(cache, x)``, and which need a cache to be called."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx

VOCABULARY, LENGTH = 12, 5


class Layer(nnx.Module):
    """Attention over what the cache holds; returns the cache, and then its hidden states."""

    def __init__(self, width, rngs):
        self.key_value = nnx.Linear(width, 2 * width, rngs=rngs)
        self.query = nnx.Linear(width, width, rngs=rngs)

    def __call__(self, x, cache, start):
        key, value = jnp.split(self.key_value(x), 2, axis=-1)
        place = (0, start, 0)
        cache = {
            "key": jax.lax.dynamic_update_slice(cache["key"], key, place),
            "value": jax.lax.dynamic_update_slice(cache["value"], value, place),
        }
        scores = jnp.einsum("bqd,bkd->bqk", self.query(x), cache["key"])
        self.sow(nnx.Intermediate, "scores", scores)
        seen = jnp.arange(x.shape[1])[:, None] + start >= jnp.arange(cache["key"].shape[1])
        weights = jax.nn.softmax(jnp.where(seen, scores, -1e9))
        return cache, x + jnp.tanh(weights @ cache["value"])


class Decoder(nnx.Module):
    """Called as ``decoder(input_ids, cache)``; returns ``{'logits': …, 'cache': …}``."""

    def __init__(self, layers, width, seed=0):
        rngs = nnx.Rngs(seed)
        self.width = width
        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs)
        self.layers = nnx.List([Layer(width, rngs) for _ in range(layers)])
        self.head = nnx.Linear(width, VOCABULARY, rngs=rngs)

    def make_cache(self, rows, length=LENGTH):
        """An empty cache: layer → keys and values, ``[rows, length, width]``."""
        empty = jnp.zeros((rows, length, self.width))
        return {f"layer{i}": {"key": empty, "value": empty} for i in range(len(self.layers))}

    def __call__(self, input_ids, cache):
        x, after = self.embed(input_ids), {}
        for i, layer in enumerate(self.layers):
            after[f"layer{i}"], x = layer(x, cache[f"layer{i}"], 0)
        return {"logits": self.head(x), "cache": after}


class WithCache(nnx.Module):
    """A wrapper that makes the cache that a decoder needs."""

    def __init__(self, decoder):
        self.decoder = decoder

    def __call__(self, input_ids):
        return self.decoder(input_ids, self.decoder.make_cache(input_ids.shape[0]))


class LinenLayer(linen.Module):
    """As `Layer`, returning a dict, and without a cache."""

    width: int

    @linen.compact
    def __call__(self, x):
        scores = jnp.einsum("bqd,bkd->bqk", linen.Dense(self.width)(x), x)
        self.sow("intermediates", "scores", scores)
        self.sow("losses", "size", jnp.mean(scores**2))
        return {"cache": None, "x": x + jnp.tanh(jax.nn.softmax(scores) @ x)}


class LinenDecoder(linen.Module):
    """Layers named ``layers_0`` …; returns logits alone."""

    layers: int
    width: int

    @linen.compact
    def __call__(self, input_ids):
        x = linen.Embed(VOCABULARY, self.width)(input_ids)
        for i in range(self.layers):
            x = LinenLayer(self.width, name=f"layers_{i}")(x)["x"]
        return linen.Dense(VOCABULARY)(x)


def loader(count=3, rows=4, seed=0):
    """Batches of ids alone."""
    rng = np.random.default_rng(seed)
    return [{"input_ids": rng.integers(0, VOCABULARY, (rows, LENGTH))} for _ in range(count)]


def logits(batch, outputs):
    """An adaptor of `Decoder`."""
    return {"logits": outputs["logits"]}
