"""Tiny torch models with weights large enough to tell formulas apart, and batches for them."""

import numpy as np
import pytest
import torch
import transformers

torch.set_num_threads(1)
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

TINY = dict(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=20,
    type_vocab_size=3,
)


def make_torch(name, double=False, seed=0, **changes):
    """A transformers model called ``name``, in eval mode, with random weights everywhere."""
    config = transformers.BertConfig(**{**TINY, **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            value.copy_(0.3 * noise + (1.0 if key.endswith("LayerNorm.weight") else 0.0))
    return (model.double() if double else model).eval()


def make_batch(seed=0, batch=3, length=9, limits=TINY):
    """Ids with ragged padding, one mask with a hole, and token types."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, length), np.int64)
    mask[1, 5:] = 0
    mask[2, 2:4] = 0
    ids = rng.integers(1, limits["vocab_size"], (batch, length))
    return {
        "input_ids": np.where(mask == 1, ids, 0),
        "attention_mask": mask,
        "token_type_ids": rng.integers(0, limits["type_vocab_size"], (batch, length)),
    }


def to_torch(batch):
    return {key: torch.tensor(value) for key, value in batch.items()}


@pytest.fixture
def torch_model():
    return make_torch


@pytest.fixture
def batch():
    return make_batch()
