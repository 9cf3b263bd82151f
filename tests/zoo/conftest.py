"""Tiny torch models with weights large enough to tell formulas apart, and batches for them."""

import contextlib
import functools
from unittest import mock

import numpy as np
import pytest

TINY = dict(
    vocab_size=50,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=40,
    max_position_embeddings=20,
    type_vocab_size=3,
)
UNTYPED = {name: value for name, value in TINY.items() if name != "type_vocab_size"}
DISENTANGLED = TINY | dict(
    num_attention_heads=2, relative_attention=True, pos_att_type=["p2c", "c2p"]
)
# The same sizes for each architecture, by how the names of its classes begin.
FAMILIES = {
    "Bert": TINY,
    "Roberta": TINY | {"pad_token_id": 3},
    "XLMRoberta": TINY | {"pad_token_id": 3},
    "Camembert": TINY | {"pad_token_id": 3},
    "Electra": TINY | {"embedding_size": 16},
    "DistilBert": dict(
        vocab_size=50, dim=24, n_layers=3, n_heads=4, hidden_dim=40, max_position_embeddings=20
    ),
    "MPNet": UNTYPED | {"pad_token_id": 1},
    # A window of three tokens on either side of nine.
    "ModernBert": UNTYPED | {"pad_token_id": 3, "local_attention": 6, "classifier_pooling": "mean"},
    # Before "Deberta", for `family_of`. The root of three times a head's width is 6: transformers
    # takes it in float32. Nine tokens are further apart than there are buckets, or distances.
    "DebertaV2": DISENTANGLED
    | dict(position_buckets=4, share_att_key=True, norm_rel_ebd="layer_norm", conv_kernel_size=3),
    "Deberta": DISENTANGLED | {"max_relative_positions": 6},
}
# Those without token types.
WITHOUT_TYPES = ("DistilBert", "MPNet", "ModernBert")
TASKS = (
    "Model", "ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
    "ForMaskedLM",
)  # fmt: skip


def family_of(name):
    """How a class's name begins: ``'Bert'`` of ``'BertModel'``."""
    return next(family for family in FAMILIES if name.startswith(family))


@functools.cache
def libraries():
    """torch and transformers, on one thread and quiet."""
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def make_torch(name, double=False, seed=0, **changes):
    """A transformers model called ``name``, in eval mode, with random weights everywhere."""
    torch, transformers = libraries()
    family = family_of(name)
    config = getattr(transformers, f"{family}Config")(**{**FAMILIES[family], **changes})
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, value in model.named_parameters():
            noise = torch.randn(value.shape, generator=generator)
            is_norm = key.lower().replace("_", "").endswith("norm.weight")
            value.copy_(0.3 * noise + (1.0 if is_norm else 0.0))
    return (model.double() if double else model).eval()


@contextlib.contextmanager
def nothing_narrowed(name):
    """Keeps transformers from computing parts of a double model in float32, as it does in two."""
    torch, transformers = libraries()

    def turned(query, key, cos, sin, unsqueeze_dim=1):
        cos, sin = cos.unsqueeze(unsqueeze_dim), sin.unsqueeze(unsqueeze_dim)
        half = transformers.models.modernbert.modeling_modernbert.rotate_half
        return [x * cos + half(x) * sin for x in (query, key)]

    def angles(self, x, position_ids, layer_type):
        width = self.config.hidden_size // self.config.num_attention_heads
        theta = self.config.rope_parameters[layer_type]["rope_theta"]
        powers = torch.arange(0, width, 2, dtype=torch.double) / width
        turns = (position_ids[..., None] / theta**powers).repeat(1, 1, 2)
        return turns.cos(), turns.sin()

    def attended(module, query, key, value, mask, scaling, **others):
        probs = torch.softmax(query @ key.transpose(2, 3) * scaling + mask, -1)
        return (probs @ value).transpose(1, 2).contiguous(), probs

    def of_words(self, logits, labels, vocab_size, **_):
        return torch.nn.functional.cross_entropy(logits.view(-1, vocab_size), labels.view(-1))

    def normed(self, x):
        centred = x - x.mean(-1, keepdim=True)
        variance = centred.pow(2).mean(-1, keepdim=True)
        return self.weight * centred / torch.sqrt(variance + self.variance_epsilon) + self.bias

    patches = {
        "ModernBert": {
            "modernbert.modeling_modernbert.apply_rotary_pos_emb": turned,
            "modernbert.modeling_modernbert.eager_attention_forward": attended,
            "modernbert.modeling_modernbert.ModernBertRotaryEmbedding.forward": angles,
            "modernbert.modeling_modernbert.ModernBertForMaskedLM.loss_function": of_words,
        },
        "Deberta": {"deberta.modeling_deberta.DebertaLayerNorm.forward": normed},
    }
    with contextlib.ExitStack() as stack:
        for path, function in patches.get(family_of(name), {}).items():
            stack.enter_context(mock.patch(f"transformers.models.{path}", function))
        yield


def make_batch(seed=0, batch=3, length=9, family="Bert"):
    """Ids with ragged padding, one mask with a hole, and token types."""
    rng = np.random.default_rng(seed)
    mask = np.ones((batch, length), np.int64)
    mask[1, 5:] = 0
    mask[2, 2:4] = 0
    pad = FAMILIES[family].get("pad_token_id", 0)
    ids = rng.integers(pad + 1, 50, (batch, length))
    types = rng.integers(0, 3, (batch, length))
    return {
        "input_ids": np.where(mask == 1, ids, pad),
        "attention_mask": mask,
    } | ({} if family in WITHOUT_TYPES else {"token_type_ids": types})


def labels_for(name, batch, length, num_labels):
    """The labels that a class of that name takes, some of them to be ignored."""
    rng = np.random.default_rng(5)
    if name.endswith("ForSequenceClassification"):
        return {"labels": rng.integers(0, num_labels, batch)}
    if name.endswith("ForTokenClassification"):
        labels = rng.integers(0, num_labels, (batch, length))
        return {"labels": np.where(rng.random((batch, length)) < 0.3, -100, labels)}
    if name.endswith("ForMaskedLM"):
        words = rng.integers(0, 50, (batch, length))
        return {"labels": np.where(rng.random((batch, length)) < 0.6, -100, words)}
    if name.endswith("ForQuestionAnswering"):
        # Below 0 and far past the end, which transformers clips, and one to be ignored.
        return {
            "start_positions": np.array([1, -3, length + 7]),
            "end_positions": np.array([4, 2, 3]),
        }
    return {}


def to_torch(batch):
    torch, _ = libraries()
    return {key: torch.tensor(value) for key, value in batch.items()}


def close(ours, theirs, tolerance):
    """Asserts one shape, and no difference above ``tolerance`` of the largest value."""
    theirs = theirs.detach().numpy()
    assert ours.shape == theirs.shape
    scale = max(1.0, float(np.abs(theirs).max()))
    assert np.abs(np.asarray(ours) - theirs).max() <= tolerance * scale


@pytest.fixture
def torch_model():
    return make_torch


@pytest.fixture
def batch():
    return make_batch()
