"""What DeBERTa v2 and v3 have of their own: buckets, products by distance, the convolution, losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo
from jaxbrewer.zoo.deberta_v2 import log_buckets

from .conftest import FAMILIES, close, make_batch, make_torch, to_torch
from .test_parity import check_parity

SEQUENCE = "DebertaV2ForSequenceClassification"


def config_of(**changes):
    return zoo.DebertaV2Config(**{**FAMILIES["DebertaV2"], **changes})


@pytest.mark.torch
@pytest.mark.parametrize(("buckets", "furthest"), [(256, 512), (4, 20), (32, 128), (2, 20), (7, 9)])
def test_buckets_are_transformers_at_any_distance(buckets, furthest):
    import torch
    from transformers.models.deberta_v2.modeling_deberta_v2 import make_log_bucket_position

    distance = np.arange(-1100, 1101)
    wanted = make_log_bucket_position(torch.tensor(distance), buckets, furthest).long()
    np.testing.assert_array_equal(log_buckets(distance, buckets, furthest), wanted.numpy())


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes",
    [
        {"share_att_key": False, "norm_rel_ebd": "none", "conv_kernel_size": 0},
        {"position_buckets": -1, "max_relative_positions": 5, "conv_groups": 2, "conv_act": "gelu"},
        # A head's width whose double has a whole root.
        {"pos_att_type": ["c2p"], "share_att_key": False, "num_attention_heads": 3},
        {"pos_att_type": ["p2c"], "num_attention_heads": 3},
        {"pos_att_type": ["p2c"], "relative_attention": False, "num_attention_heads": 3},
        {"pos_att_type": None, "num_attention_heads": 6},
        {"type_vocab_size": 0, "position_biased_input": False, "pooler_hidden_act": "tanh"},
        {"relative_attention": False, "pos_att_type": None, "num_attention_heads": 6},
    ],
)
def test_other_settings_equal_transformers(changes, tmp_path, x64):
    check_parity(SEQUENCE, tmp_path, True, 1e-9, **changes)


@pytest.mark.torch
@pytest.mark.parametrize("length", [1, 70])
def test_lengths_equal_transformers(length, tmp_path):
    """Without a table of positions a sequence may be longer than ``max_position_embeddings``."""
    changes = {"position_biased_input": False, "position_buckets": 16, "num_hidden_layers": 2}
    theirs = make_torch("DebertaV2Model", **changes)
    theirs.save_pretrained(tmp_path)
    ours = zoo.DebertaV2Model.from_pretrained(tmp_path)
    batch = make_batch(length=length, family="DebertaV2")
    batch["attention_mask"][:, 0] = 1
    close(ours(**batch).last_hidden_state, theirs(**to_torch(batch)).last_hidden_state, 1e-5)


@pytest.mark.torch
def test_gradients_equal_torchs(tmp_path, x64):
    theirs = make_torch(
        SEQUENCE, double=True, num_labels=3, num_hidden_layers=1,
        problem_type="single_label_classification",  # else the loss is in float32
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    ours = getattr(zoo, SEQUENCE).from_pretrained(tmp_path, param_dtype=jnp.float64)
    batch = make_batch(family="DebertaV2") | {"labels": np.array([0, 2, 1])}
    theirs(**to_torch(batch)).loss.backward()
    grads = nnx.jit(nnx.grad(lambda model, batch: model(**batch).loss))(ours, batch)
    encoder, wanted = grads["deberta"]["encoder"], theirs.deberta.encoder
    close(encoder["rel_embeddings"]["embedding"][...], wanted.rel_embeddings.weight.grad, 1e-9)
    close(encoder["conv"]["conv"]["kernel"][...].T, wanted.conv.conv.weight.grad, 1e-9)
    query = encoder["layer"][0]["attention"]["query"]["kernel"][...]
    close(query.T, wanted.layer[0].attention.self.query_proj.weight.grad, 1e-9)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels"),
    [
        (1, None, np.array([0.5, -1.0, 2.0], np.float32)),
        (3, None, np.array([2, -100, 0])),
        (3, None, np.array([[0.2, 0.3, 0.5], [0, 0, 1.0], [1, 1, 1.0]], np.float32)),
        (3, "multi_label_classification", np.eye(3, dtype=np.float32)),
    ],
)
def test_losses_equal_transformers(num_labels, problem_type, labels, tmp_path):
    theirs = make_torch(
        SEQUENCE, num_labels=num_labels, problem_type=problem_type, num_hidden_layers=1
    )
    theirs.save_pretrained(tmp_path)
    ours = getattr(zoo, SEQUENCE).from_pretrained(tmp_path)
    batch = make_batch(family="DebertaV2") | {"labels": labels}
    close(ours(**batch).loss, theirs(**to_torch(batch)).loss, 1e-5)


def test_targets_of_another_shape_are_named():
    model = getattr(zoo, SEQUENCE)(config_of(num_labels=3), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"labels of shape \(3, 2\) do not fit logits of shape"):
        model(**make_batch(family="DebertaV2"), labels=np.ones((3, 2), np.float32))


def test_which_row_a_distance_has_is_no_part_of_the_program():
    """Logarithms and comparisons of distances are done when it is traced."""
    model = zoo.DebertaV2Model(config_of(), rngs=nnx.Rngs(0))
    model.eval()
    ids = make_batch(family="DebertaV2")["input_ids"]
    text = str(jax.make_jaxpr(lambda ids: model(ids).last_hidden_state)(ids))
    for primitive in (" log ", " ceil", " sign ", "clamp"):
        assert primitive not in text, primitive


def test_a_mask_by_query_and_key(tmp_path):
    model = zoo.DebertaV2Model(config_of(), rngs=nnx.Rngs(0))
    model.eval()
    batch = make_batch(family="DebertaV2")
    mask = batch["attention_mask"]
    whole = batch | {"attention_mask": mask[:, :, None] * mask[:, None, :]}
    wanted = model(**batch).last_hidden_state
    np.testing.assert_allclose(model(**whole).last_hidden_state, wanted, atol=1e-6)


def test_tables_that_are_not_there():
    bare = config_of(type_vocab_size=0, position_biased_input=False)
    model = zoo.DebertaV2Model(bare, rngs=nnx.Rngs(0))
    model.eval()
    assert model.id_limits == {"input_ids": 50}
    batch = make_batch(family="DebertaV2")
    types = batch.pop("token_type_ids")
    got = model(**batch, token_type_ids=types).last_hidden_state
    np.testing.assert_array_equal(got, model(**batch).last_hidden_state)
    with pytest.raises(ValueError, match="position_ids are given, but with position_biased_input"):
        model(**batch, position_ids=np.arange(9)[None])
    full = zoo.DebertaV2Model(config_of(), rngs=nnx.Rngs(0))
    assert full.id_limits == {"input_ids": 50, "position_ids": 20, "token_type_ids": 3}
    with pytest.raises(ValueError, match="21 is longer than the 20 positions there are"):
        full(np.full((1, 21), 5))


def test_dropout_of_the_head():
    none = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    batch = make_batch(family="DebertaV2")
    still = getattr(zoo, SEQUENCE)(config_of(**none), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(still(**batch).logits, still(**batch).logits)
    for rate in ("cls_dropout", "pooler_dropout"):
        moving = getattr(zoo, SEQUENCE)(config_of(**none, **{rate: 0.5}), rngs=nnx.Rngs(0))
        assert not np.array_equal(moving(**batch).logits, moving(**batch).logits), rate


@pytest.mark.torch
def test_a_table_of_positions_that_nobody_needs_is_passed_over(tmp_path):
    from safetensors.numpy import load_file, save_file

    theirs = make_torch("DebertaV2Model", position_biased_input=False)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    extra = {"embeddings.position_embeddings.weight": np.ones((20, 24), np.float32)}
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    ours = zoo.DebertaV2Model.from_pretrained(tmp_path)
    batch = make_batch(family="DebertaV2")
    close(ours(**batch).last_hidden_state, theirs(**to_torch(batch)).last_hidden_state, 1e-5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pos_att_type": "c2p|p2p"}, "pos_att_type is 'c2p|p2p': expected 'c2p', 'p2c', both"),
        ({"pos_att_type": ["c2p", "c2p"]}, "expected 'c2p', 'p2c', both or neither"),
        ({"pos_att_type": 3}, "pos_att_type is 3: expected a list of 'c2p' and 'p2c'"),
        ({"talking_head": True}, "talking_head=True is not supported, only False is"),
        ({"norm_rel_ebd": "batch"}, "norm_rel_ebd is 'batch': choose from 'none'"),
        ({"position_buckets": 40}, "position_buckets=40, expected 2 or more and fewer than 38"),
        ({"position_buckets": 1}, "position_buckets=1, expected 2 or more"),
        ({"conv_kernel_size": 2}, "conv_kernel_size=2, expected an odd number"),
        ({"conv_groups": 5}, "hidden_size=24 is not a multiple of conv_groups=5"),
        ({"embedding_size": 12}, "embedding_size=12 is not supported, only 24 is"),
        ({"pooler_hidden_size": 12}, "pooler_hidden_size=12 is not supported, only 24 is"),
        ({"attention_head_size": 8}, "attention_head_size=8 is not supported, only 12 is"),
        ({"type_vocab_size": -1}, "type_vocab_size is -1: expected an integer from 0"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        zoo.DebertaV2Config.from_dict(FAMILIES["DebertaV2"] | changes)


def test_settings_survive_a_round_trip():
    config = config_of(cls_dropout=0.25, conv_act="gelu", num_labels=4)
    assert zoo.DebertaV2Config.from_dict(config.to_dict()) == config
    assert config.to_dict()["position_buckets"] == 4
    assert "position_buckets" not in zoo.DebertaV2Config().to_dict()
    spelled = zoo.DebertaV2Config.from_dict({"pos_att_type": "P2C | c2p"})
    assert spelled.pos_att_type == ("p2c", "c2p")
    wide = zoo.DebertaV2Config.from_dict({"pooler_hidden_size": 1536}, hidden_size=48)
    assert wide.hidden_size == 48
