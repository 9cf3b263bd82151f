"""What MPNet has of its own: buckets of distances, positions, and the padding id it insists on."""

import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo
from jaxbrewer.zoo.mpnet import distance_buckets

from .conftest import FAMILIES, close, make_batch, make_torch, to_torch


def config_of(**changes):
    return zoo.MPNetConfig(**{**FAMILIES["MPNet"], **changes})


@pytest.mark.torch
def test_buckets_are_transformers_at_any_distance():
    import torch
    from transformers.models.mpnet.modeling_mpnet import MPNetEncoder

    distance = np.arange(-1100, 1101)
    wanted = MPNetEncoder.relative_position_bucket(torch.tensor(-distance))
    np.testing.assert_array_equal(distance_buckets(distance), wanted.numpy())


@pytest.mark.torch
def test_long_sequences_equal_transformers(tmp_path):
    longer = {"max_position_embeddings": 160, "num_hidden_layers": 1}
    theirs = make_torch("MPNetModel", **longer)
    theirs.save_pretrained(tmp_path)
    ours = zoo.MPNetModel.from_pretrained(tmp_path)
    batch = make_batch(length=150, family="MPNet")
    close(ours(**batch).last_hidden_state, theirs(**to_torch(batch)).last_hidden_state, 1e-5)


@pytest.mark.torch
def test_embeddings_given_equal_transformers(tmp_path):
    import torch

    theirs = make_torch("MPNetModel")
    theirs.save_pretrained(tmp_path)
    ours = zoo.MPNetModel.from_pretrained(tmp_path)
    embedded = np.random.default_rng(0).normal(size=(3, 9, 24)).astype(np.float32)
    got = ours(inputs_embeds=embedded).last_hidden_state
    close(got, theirs(inputs_embeds=torch.tensor(embedded)).last_hidden_state, 1e-5)


def test_one_table_serves_every_layer():
    model = zoo.MPNetModel(config_of(), rngs=nnx.Rngs(0))
    paths = [path for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    assert [path for path in paths if "relative" in path] == [("encoder", "relative", "bias")]
    assert model.encoder.relative.bias.shape == (32, 4)
    assert model.encoder.relative(5).shape == (1, 4, 5, 5)


def test_the_longest_sequence():
    model = zoo.MPNetModel(config_of(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="19 is longer than the 18 positions there are"):
        model(np.full((1, 19), 5))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token_id": 0}, "pad_token_id=0, but MPNet's padding is always 1"),
        ({"pad_token_id": None}, "pad_token_id=None, but MPNet's padding is always 1"),
        ({"max_position_embeddings": 2}, "leaves no position after padding's, 1"),
        ({"relative_attention_num_buckets": 64}, "num_buckets=64 is not supported, only 32 is"),
        ({"type_vocab_size": 2}, "unknown key 'type_vocab_size'"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        zoo.MPNetConfig.from_dict(FAMILIES["MPNet"] | changes)


def test_no_batch_with_token_types():
    model = zoo.MPNetForTokenClassification(config_of(), rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="token_type_ids"):
        model(**make_batch(family="Bert"))
    assert model.id_limits == {"input_ids": 50, "position_ids": 20}
