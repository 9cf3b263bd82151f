"""One small encoder written twice, in torch and in NNX, and a way to give both the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

VOCABULARY, CLASSES, LENGTH = 30, 3, 6


class TorchToy(torch.nn.Module):
    """Embeddings, then layers of attention (raw scores returned) and a tanh; token or pooled logits."""

    def __init__(self, layers, width, heads=2, tokens=False, outputs=1):
        super().__init__()
        self.embed = torch.nn.Embedding(VOCABULARY, width)
        self.query = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.key = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.dense = torch.nn.ModuleList(torch.nn.Linear(width, width) for _ in range(layers))
        self.heads = torch.nn.ModuleList(torch.nn.Linear(width, CLASSES) for _ in range(outputs))
        self.count, self.tokens = heads, tokens

    def forward(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        hidden, attention = [x], []
        for query, key, dense in zip(self.query, self.key, self.dense, strict=True):
            batch, length, width = x.shape
            q = query(x).view(batch, length, self.count, -1)
            k = key(x).view(batch, length, self.count, -1)
            scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / width**0.5
            attention.append(scores)
            x = torch.tanh(dense(scores.softmax(-1).mean(1) @ x)) + x
            hidden.append(x)
        pooled = x if self.tokens else x[:, 0]
        logits = [head(pooled) for head in self.heads]
        loss = None
        if labels is not None:
            flat = logits[0].reshape(-1, CLASSES)
            loss = torch.nn.functional.cross_entropy(flat, labels.reshape(-1), ignore_index=-100)
        return {"logits": logits, "hidden": hidden, "attention": attention, "loss": loss}


class Toy(nnx.Module):
    """The same in NNX."""

    id_limits = {"input_ids": VOCABULARY}  # noqa: RUF012

    def __init__(self, layers, width, heads=2, tokens=False, outputs=1):
        rngs = nnx.Rngs(0)

        def linear(dim):
            return nnx.Linear(width, dim, rngs=rngs, param_dtype=jnp.result_type(float))

        self.embed = nnx.Embed(VOCABULARY, width, rngs=rngs, param_dtype=jnp.result_type(float))
        self.query = nnx.List([linear(width) for _ in range(layers)])
        self.key = nnx.List([linear(width) for _ in range(layers)])
        self.dense = nnx.List([linear(width) for _ in range(layers)])
        self.heads = nnx.List([linear(CLASSES) for _ in range(outputs)])
        self.count, self.tokens = heads, tokens

    def __call__(self, input_ids, attention_mask=None, labels=None):
        x = self.embed(input_ids)
        hidden, attention = [x], []
        for query, key, dense in zip(self.query, self.key, self.dense, strict=True):
            batch, length, width = x.shape
            q = query(x).reshape(batch, length, self.count, -1)
            k = key(x).reshape(batch, length, self.count, -1)
            scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / width**0.5
            attention.append(scores)
            x = jnp.tanh(dense(jax.nn.softmax(scores, -1).mean(1) @ x)) + x
            hidden.append(x)
        pooled = x if self.tokens else x[:, 0]
        logits = [head(pooled) for head in self.heads]
        loss = None
        if labels is not None:
            flat, target = logits[0].reshape(-1, CLASSES), labels.reshape(-1)
            picked = jnp.take_along_axis(jax.nn.log_softmax(flat), target.clip(0)[:, None], 1)[:, 0]
            keep = target != -100
            loss = -jnp.sum(jnp.where(keep, picked, 0)) / jnp.sum(keep)
        return {"logits": logits, "hidden": hidden, "attention": attention, "loss": loss}


def torch_name(name):
    return name.replace("kernel", "weight").replace("embedding", "weight")


def linear_names(module):
    """Dotted NNX parameter name → array."""
    flat = nnx.to_flat_state(nnx.state(module, nnx.Param))
    return {".".join(map(str, path)): value[...] for path, value in flat}


def copy_to_torch(module, twin):
    """Gives a torch module the weights of its NNX twin."""
    named = dict(twin.named_parameters())
    for name, value in linear_names(module).items():
        array = np.asarray(value)
        array = array.T if name.endswith("kernel") else array
        with torch.no_grad():
            named[torch_name(name)].copy_(torch.from_numpy(array.copy()))


def twins(seed, dtype, **shape):
    """An NNX toy and its torch twin, with the same random weights."""
    module, twin = Toy(**shape), TorchToy(**shape)
    rng = np.random.default_rng(seed)
    state = nnx.state(module, nnx.Param)
    draw = jax.tree.map(lambda x: jnp.asarray(rng.normal(0, 0.5, x.shape), dtype), state)
    nnx.update(module, draw)
    twin.to(torch.float64 if dtype == "float64" else torch.float32)
    copy_to_torch(module, twin)
    return module, twin


def batches(seed, count, size=4, tokens=False, ragged=True):
    """Batches of numpy arrays: ids, a mask with padding at the end, labels (-100 on padding)."""
    rng = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        lengths = rng.integers(2, LENGTH + 1, size) if ragged else np.full(size, LENGTH)
        mask = (np.arange(LENGTH) < lengths[:, None]).astype(np.int64)
        labels = rng.integers(0, CLASSES, (size, LENGTH) if tokens else size)
        if tokens:
            labels = np.where(mask == 1, labels, -100)
        ids = rng.integers(0, VOCABULARY, (size, LENGTH))
        made.append({"input_ids": ids, "attention_mask": mask, "labels": labels})
    return made
