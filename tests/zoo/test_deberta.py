"""What the first DeBERTa has of its own: one product for three, and biases for two of them."""

import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo

from .conftest import FAMILIES, close, make_batch, make_torch, to_torch
from .test_parity import check_parity

SEQUENCE = "DebertaForSequenceClassification"


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes",
    [
        {"pos_att_type": ["c2p"], "num_attention_heads": 3, "max_relative_positions": -1},
        {"pos_att_type": ["p2c"], "num_attention_heads": 3, "type_vocab_size": 0},
        {"position_biased_input": False, "max_relative_positions": 9},
        {"relative_attention": False, "pos_att_type": None, "num_attention_heads": 6},
    ],
)
def test_other_settings_equal_transformers(changes, tmp_path, x64):
    check_parity(SEQUENCE, tmp_path, True, 1e-9, **changes)


@pytest.mark.torch
@pytest.mark.parametrize("length", [1, 70])
def test_lengths_equal_transformers(length, tmp_path):
    """Without a table of positions a sequence may be longer than ``max_position_embeddings``."""
    theirs = make_torch("DebertaModel", position_biased_input=False, num_hidden_layers=2)
    theirs.save_pretrained(tmp_path)
    ours = zoo.DebertaModel.from_pretrained(tmp_path)
    batch = make_batch(length=length, family="Deberta")
    batch["attention_mask"][:, 0] = 1
    close(ours(**batch).last_hidden_state, theirs(**to_torch(batch)).last_hidden_state, 1e-5)


def test_which_products_have_a_bias():
    model = zoo.DebertaModel(zoo.DebertaConfig(**FAMILIES["Deberta"]), rngs=nnx.Rngs(0))
    attention = model.encoder.layer[0].attention
    assert attention.in_proj.bias is None and attention.position_key.bias is None
    assert attention.position_query.bias is not None
    assert not np.asarray(attention.q_shift.bias[...]).any()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"talking_head": True}, "talking_head=True is not supported, only False is"),
        ({"position_buckets": 256}, "position_buckets=256 is not supported, only -1 is"),
        ({"share_att_key": True}, "share_att_key=True is not supported, only False is"),
        ({"norm_rel_ebd": "layer_norm"}, "norm_rel_ebd='layer_norm' is not supported"),
        ({"conv_kernel_size": 3}, "conv_kernel_size=3 is not supported, only 0 is"),
        ({"pooler_hidden_size": 12}, "pooler_hidden_size=12 is not supported, only 24 is"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        zoo.DebertaConfig.from_dict(FAMILIES["Deberta"] | changes)
