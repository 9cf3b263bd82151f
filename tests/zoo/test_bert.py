"""BERT: its activations, losses and gradients, and what a model must do beside computing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo
from jaxbrewer.zoo import BertConfig

from .conftest import TINY, close, labels_for, make_batch, make_torch, to_torch
from .test_parity import check_parity

HEADS = (
    "BertModel",
    "BertForSequenceClassification",
    "BertForTokenClassification",
    "BertForQuestionAnswering",
)


@pytest.mark.torch
@pytest.mark.parametrize("hidden_act", ["gelu_new", "gelu_pytorch_tanh", "relu", "silu", "tanh"])
def test_activations_equal_transformers(hidden_act, tmp_path, x64):
    check_parity("BertModel", tmp_path, True, 1e-9, hidden_act=hidden_act)


@pytest.mark.torch
def test_gradients_equal_torchs_and_padding_gets_none(tmp_path, x64, batch):
    name = "BertForSequenceClassification"
    theirs = make_torch(name, double=True, num_labels=3, num_hidden_layers=1)
    theirs.save_pretrained(tmp_path)
    ours = getattr(zoo, name).from_pretrained(tmp_path, param_dtype=jnp.float64)
    batch |= {"labels": np.array([0, 2, 1])}
    batch["input_ids"][0, 3] = 0  # a padding id that the loss depends on
    theirs(**to_torch(batch)).loss.backward()

    grads = nnx.jit(nnx.grad(lambda model, batch: model(**batch).loss))(ours, batch)
    words = grads["bert"]["embeddings"]["word_embeddings"]["embedding"][...]
    wanted = theirs.bert.embeddings.word_embeddings.weight.grad
    close(words, wanted, 1e-9)
    assert not np.asarray(words[0]).any()
    close(grads["classifier"]["kernel"][...].T, theirs.classifier.weight.grad, 1e-9)
    query = grads["bert"]["encoder"]["layer"][0]["attention"]["query"]["kernel"][...]
    close(query.T, theirs.bert.encoder.layer[0].attention.self.query.weight.grad, 1e-9)


@pytest.mark.torch
def test_a_row_without_a_visible_key_equals_transformers(tmp_path, batch):
    theirs = make_torch("BertModel")
    theirs.save_pretrained(tmp_path)
    ours = zoo.BertModel.from_pretrained(tmp_path)
    batch["attention_mask"][1] = 0
    close(ours(**batch).last_hidden_state, theirs(**to_torch(batch)).last_hidden_state, 1e-5)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("num_labels", "problem_type", "labels"),
    [
        (1, None, np.array([0.5, -1.0, 2.0], np.float32)),
        (3, "regression", np.arange(9, dtype=np.float32).reshape(3, 3)),
        (
            3,
            "multi_label_classification",
            np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1.0]], np.float32),
        ),
        (3, None, np.array([[1, 0, 1], [0, 0, 0], [1, 1, 1.0]], np.float32)),
        (3, None, np.array([2, -100, 0])),
        (3, "single_label_classification", np.array([2, 1, 0])),
    ],
)
def test_losses_of_sequence_classification(num_labels, problem_type, labels, tmp_path, batch):
    name = "BertForSequenceClassification"
    theirs = make_torch(name, num_labels=num_labels, problem_type=problem_type)
    theirs.save_pretrained(tmp_path)
    ours = getattr(zoo, name).from_pretrained(tmp_path)
    batch["labels"] = labels
    close(ours(**batch).loss, theirs(**to_torch(batch)).loss, 1e-5)


@pytest.mark.torch
def test_positional_order_is_transformers(tmp_path, batch):
    import torch

    name = "BertForSequenceClassification"
    theirs = make_torch(name, num_labels=3)
    theirs.save_pretrained(tmp_path)
    ours = getattr(zoo, name).from_pretrained(tmp_path)
    positions = np.broadcast_to(np.arange(9)[::-1], (3, 9)).copy()
    values = [*batch.values(), positions, None, np.array([0, 1, 2])]
    as_torch = [value if value is None else torch.tensor(value) for value in values]
    got, wanted = ours(*values), theirs(*as_torch)
    close(got.loss, wanted.loss, 1e-5)
    embedded = ours.bert.embeddings.words(jnp.asarray(batch["input_ids"]))
    again = ours(None, *values[1:4], embedded, values[5])
    np.testing.assert_array_equal(again.logits, got.logits)


@pytest.fixture
def tiny():
    return BertConfig(**TINY, num_labels=3)


def test_scores_are_what_goes_into_the_softmax(tiny, batch):
    model = zoo.BertModel(tiny, rngs=nnx.Rngs(0))
    model.eval()
    scores = model(**batch, output_attention_scores=True).attentions
    probs = model(**batch, output_attentions=True).attentions
    hidden_key = batch["attention_mask"][:, None, None, :] == 0
    for score, prob in zip(scores, probs, strict=True):
        assert np.all(np.asarray(score)[np.broadcast_to(hidden_key, score.shape)] < -9000)
        np.testing.assert_allclose(jax.nn.softmax(score), prob, atol=1e-6)
    by_config = zoo.BertModel(tiny.replace(output_attention_scores=True), rngs=nnx.Rngs(0))
    by_config.eval()
    np.testing.assert_array_equal(by_config(**batch).attentions[0], scores[0])


def test_scores_of_visible_keys_are_exact(tiny, batch):
    model = zoo.BertModel(tiny, rngs=nnx.Rngs(0))
    model.eval()
    masked = model(**batch, output_attention_scores=True).attentions[0]
    del batch["attention_mask"]
    free = model(**batch, output_attention_scores=True).attentions[0]
    visible = np.broadcast_to(make_batch()["attention_mask"][:, None, None] == 1, free.shape)
    np.testing.assert_array_equal(np.asarray(masked)[visible], np.asarray(free)[visible])


def test_a_mask_by_query_hides_keys_from_some_queries(tiny, batch):
    model = zoo.BertModel(tiny, rngs=nnx.Rngs(0))
    model.eval()
    causal = np.tril(np.ones((9, 9), np.int32))[None].repeat(3, 0)
    probs = model(batch["input_ids"], causal, output_attentions=True).attentions[0]
    assert not np.asarray(probs)[:, :, 0, 1:].any()
    with pytest.raises(ValueError, match="attention_mask has shape"):
        model(batch["input_ids"], np.ones((9,)))


def test_dropout_is_on_in_train_mode_only(tiny, batch):
    model = zoo.BertForTokenClassification(tiny, rngs=nnx.Rngs(0))
    model.train()
    assert not np.array_equal(model(**batch).logits, model(**batch).logits)
    model.eval()
    np.testing.assert_array_equal(model(**batch).logits, model(**batch).logits)


def test_dropout_rates_come_from_the_config(tiny, batch):
    config = tiny.replace(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    model = zoo.BertForSequenceClassification(config, rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(model(**batch).logits, model(**batch).logits)
    model = zoo.BertForSequenceClassification(
        config.replace(classifier_dropout=0.5), rngs=nnx.Rngs(0)
    )
    assert not np.array_equal(model(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("name", HEADS)
def test_half_precision_computes_in_half_and_loses_in_float32(name, tiny, batch):
    config = tiny.replace(num_labels=2)
    model = getattr(zoo, name)(config, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
    model.eval()
    labels = labels_for(name, 3, 9, 2)
    out = model(**batch, **labels, output_hidden_states=True, output_attentions=True)
    for key, value in out.items():
        wanted = jnp.float32 if key == "loss" else jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(value)} == {jnp.dtype(wanted)}, key
    parameters = jax.tree.leaves(nnx.state(model, nnx.Param))
    assert {leaf.dtype for leaf in parameters} == {jnp.dtype(jnp.float32)}
    full = nnx.clone(model)
    full.set_attributes(dtype=jnp.float32)
    for mine, other in zip(
        jax.tree.leaves(out),
        jax.tree.leaves(full(**batch, **labels, output_hidden_states=True, output_attentions=True)),
        strict=True,
    ):
        np.testing.assert_allclose(np.asarray(mine, np.float32), other, atol=0.1)


def test_gradients_are_finite_in_train_mode(tiny, batch):
    model = zoo.BertForTokenClassification(tiny.replace(num_hidden_layers=1), rngs=nnx.Rngs(0))
    batch |= {"labels": np.full((3, 9), -100)}
    graded = nnx.jit(nnx.value_and_grad(lambda model, batch: model(**batch).loss))
    loss, grads = graded(model, batch)
    assert loss == 0
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


def test_a_label_that_names_no_class_gives_nan(tiny, batch):
    model = zoo.BertForSequenceClassification(tiny, rngs=nnx.Rngs(0))
    model.eval()
    for wrong in (3, -1):
        assert np.isnan(model(**batch, labels=np.array([0, 1, wrong])).loss)


def test_initial_weights_are_berts(tiny):
    config = tiny.replace(vocab_size=4000, initializer_range=0.05)
    model = zoo.BertForSequenceClassification(config, rngs=nnx.Rngs(0))
    words = np.asarray(model.bert.embeddings.word_embeddings.embedding[...])
    assert not words[0].any()
    assert abs(words[1:].std() - 0.05) < 1e-3
    assert abs(words[1:].mean()) < 1e-3
    layer = model.bert.encoder.layer[0]
    assert not np.asarray(layer.intermediate.bias[...]).any()
    np.testing.assert_array_equal(layer.output_norm.scale[...], 1)


def test_a_jitted_model_returns_the_output_class(tiny, batch):
    model = zoo.BertForSequenceClassification(tiny, rngs=nnx.Rngs(0))
    model.eval()
    out = nnx.jit(lambda model, batch: model(**batch))(model, batch)
    assert isinstance(out, zoo.SequenceClassifierOutput)
    np.testing.assert_allclose(out.logits, model(**batch).logits, atol=1e-6)


def test_id_limits(tiny):
    model = zoo.BertForTokenClassification(tiny, rngs=nnx.Rngs(0))
    assert model.id_limits == {"input_ids": 50, "token_type_ids": 3, "position_ids": 20}
    assert model.config is tiny


def test_bad_input_is_refused(tiny):
    model = zoo.BertModel(tiny, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="sequence of 21 is longer than the 20 positions"):
        model(np.ones((1, 21), np.int32))
    with pytest.raises(ValueError, match="float32"):
        model(np.ones((1, 5), np.float32))
    with pytest.raises(ValueError, match=r"shape \(batch, length\)"):
        model(np.ones(5, np.int32))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(ValueError, match="answer spans need 2"):
        zoo.BertForQuestionAnswering(tiny, rngs=nnx.Rngs(0))
    regression = zoo.BertForSequenceClassification(
        tiny.replace(problem_type="regression"), rngs=nnx.Rngs(0)
    )
    regression.eval()
    with pytest.raises(ValueError, match=r"labels of shape \(3,\) do not fit"):
        regression(np.ones((3, 9), np.int32), labels=np.ones(3, np.float32))
