"""Queries, keys and values that a model returns when asked, against those inside transformers' models."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo

from .conftest import FAMILIES, TINY, close, make_batch, make_torch, to_torch

LAYER = "encoder.layer.{}.attention"
# Where a dense layer of each sort lies in transformers' model, by the first letters of our families.
INSIDE = {
    "DistilBert": "transformer.layer.{}.attention.{:.1}_lin",
    "MPNet": LAYER + ".attn.{:.1}",
    "ModernBert": "layers.{}.attn.Wqkv",
    "DebertaV2": LAYER + ".self.{}_proj",
    "Deberta": LAYER + ".self.in_proj",
}
SORTS = ("query", "key", "value")


def model_of(family, task="Model", **changes):
    config = getattr(zoo, f"{family}Config")(**{**FAMILIES[family], **changes})
    model = getattr(zoo, family + task)(config, rngs=nnx.Rngs(0))
    model.eval()
    return model


def inside(model, family, batch):
    """What transformers' dense layers give for each layer and sort, ``[batch, length, width]``."""
    seen, hooks = {}, []
    place = INSIDE.get(family, LAYER + ".self.{}")
    for layer in range(TINY["num_hidden_layers"]):
        for sort in SORTS:
            module = model.base_model.get_submodule(place.format(layer, sort))

            def keep(_, inputs, output, where=(layer, sort)):
                if output.shape[:2] == batch["input_ids"].shape:  # not the table of distances
                    seen[where] = output.detach().numpy()

            hooks.append(module.register_forward_hook(keep))
    model(**to_torch(batch))
    for hook in hooks:
        hook.remove()
    return seen


def by_head(family, theirs, torch_model, layer, sort):
    """The output of a dense layer as ``[batch, heads, length, width of a head]``."""
    batch, length, _ = theirs.shape
    heads, which = FAMILIES[family].get("num_attention_heads", 4), SORTS.index(sort)
    if family == "ModernBert":
        theirs = theirs.reshape(batch, length, 3, -1)[:, :, which]
    if family == "Deberta":  # queries, keys and values of one head beside each other
        theirs = theirs.reshape(batch, length, heads, 3, -1)[..., which, :].reshape(
            batch, length, -1
        )
        own = torch_model.encoder.layer[layer].attention.self
        bias = {"query": own.q_bias, "value": own.v_bias}.get(sort)
        theirs = theirs if bias is None else theirs + bias.detach().numpy()
    return theirs.reshape(batch, length, heads, -1).swapaxes(1, 2)


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_inside_transformers(family, tmp_path):
    import torch

    theirs = make_torch(f"{family}Model")
    theirs.save_pretrained(tmp_path)
    ours = getattr(zoo, f"{family}Model").from_pretrained(tmp_path, output_qkv=True)
    batch = make_batch(family=family)
    out = ours(**batch)
    seen = inside(theirs, family, batch)
    assert len(seen) == 3 * TINY["num_hidden_layers"]
    for (layer, sort), wanted in seen.items():
        got = out[sort][layer]
        close(got, torch.tensor(by_head(family, wanted, theirs, layer, sort)), 1e-5)
    plain = ours(**batch, output_qkv=False)
    assert plain.query is None and "key" not in plain
    np.testing.assert_array_equal(plain.last_hidden_state, out.last_hidden_state)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_head_hands_them_on(family):
    batch = make_batch(family=family)
    for task in ("ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering",
                 "ForMaskedLM"):  # fmt: skip
        out = nnx.eval_shape(
            lambda batch, task=task: model_of(family, task)(**batch, output_qkv=True), batch
        )
        heads = FAMILIES[family].get("num_attention_heads", 4)
        for sort in SORTS:
            assert [x.shape for x in out[sort]] == [(3, heads, 9, 24 // heads)] * 3, (task, sort)
        assert out.keys()[-3:] == list(SORTS)


def test_scores_are_made_of_them():
    model = model_of("Bert")
    out = model(**make_batch(), output_qkv=True, output_attention_scores=True)
    scores = jnp.einsum("bhid,bhjd->bhij", out.query[1], out.key[1]) / np.sqrt(6)
    seen = np.broadcast_to(make_batch()["attention_mask"][:, None, None] != 0, scores.shape)
    np.testing.assert_allclose(scores[seen], out.attentions[1][seen], rtol=1e-5, atol=1e-7)


def test_a_sentence_encoder_and_a_checkpointed_model_hand_them_on():
    encoder = model_of("Bert", gradient_checkpointing=True, output_qkv=True)
    model = zoo.SentenceEncoder(encoder)
    batch = make_batch()
    value = model(**batch).value
    wanted = model_of("Bert", output_qkv=True)(**batch).value
    for one, other in zip(value, wanted, strict=True):
        np.testing.assert_array_equal(one, other)
    grads = nnx.grad(lambda model: model(**batch).key[2].sum())(encoder)
    assert np.asarray(grads["embeddings"]["word_embeddings"]["embedding"][...]).any()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_they_are_asked_for_and_no_files_matter(tmp_path):
    config = zoo.BertConfig(**TINY, output_qkv=True)
    assert "output_qkv" not in config.to_dict()
    out = zoo.BertModel(config.replace(output_qkv=False), rngs=nnx.Rngs(0))(**make_batch())
    with pytest.raises(KeyError, match="pass output_qkv=True"):
        out["query"]
    with pytest.raises(ValueError, match="output_qkv is 1: expected True or False"):
        zoo.BertConfig(output_qkv=1)


def test_the_adaptor_hands_them_on():
    model = model_of("Bert", "ForMaskedLM", output_qkv=True)
    batch = make_batch()
    found = zoo.adaptor("masked-lm")(batch, model(**batch))
    assert [len(found[sort]) for sort in SORTS] == [3, 3, 3]
