"""The recurrent tagger against torch's GRU with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo
from jaxbrewer.zoo import BiGRUConfig, WeightsMismatchError

from .conftest import close

TINY = dict(vocab_size=30, embedding_size=8, hidden_size=6, num_labels=4)


def make_torch():
    """The same tagger in torch, over packed sequences."""
    import torch

    class Torch(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.bigru = torch.nn.Module()
            self.bigru.embeddings = torch.nn.Embedding(30, 8, padding_idx=0)
            self.bigru.gru = torch.nn.GRU(8, 6, batch_first=True, bidirectional=True)
            self.classifier = torch.nn.Linear(12, 4)

        def forward(self, ids, mask):
            embedded = self.bigru.embeddings(ids)
            packed = torch.nn.utils.rnn.pack_padded_sequence(
                embedded, mask.sum(1), batch_first=True, enforce_sorted=False
            )
            hidden, _ = torch.nn.utils.rnn.pad_packed_sequence(
                self.bigru.gru(packed)[0], batch_first=True, total_length=ids.shape[1]
            )
            return embedded, hidden, self.classifier(hidden)

    return Torch()


@nnx.jit(static_argnames="hidden")
def run(model, batch, hidden=None):
    """The outputs, compiled once for each kind of batch."""
    return model(**batch, output_hidden_states=hidden)


def make_batch():
    rng = np.random.default_rng(0)
    mask = np.ones((3, 7), np.int64)
    mask[1, 4:] = 0
    mask[2, 1:] = 0
    ids = np.where(mask == 1, rng.integers(1, 30, (3, 7)), 0)
    return {"input_ids": ids, "attention_mask": mask}


def make_pair(folder, dtype):
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    theirs = make_torch().to(dtype)
    folder.mkdir(exist_ok=True)
    save_file(theirs.state_dict(), folder / "model.safetensors")
    BiGRUConfig(**TINY).to_json_file(folder / "config.json")
    wanted = jnp.float64 if dtype is torch.float64 else jnp.float32
    return zoo.from_pretrained(folder, "token-classification", param_dtype=wanted), theirs


def check_against_torch(folder, dtype, tolerance):
    import torch

    ours, theirs = make_pair(folder, dtype)
    batch = make_batch()
    rows = theirs(*map(torch.tensor, batch.values()))
    out = run(ours, batch, True)
    assert out.attentions is None and out.keys() == ["logits", "hidden_states"]
    for got, wanted in zip((*out.hidden_states, out.logits), rows, strict=True):
        close(got, wanted, tolerance)
    return ours, theirs, batch, rows


@pytest.mark.torch
def test_equals_torch(tmp_path):
    import torch

    check_against_torch(tmp_path, torch.float32, 1e-5)


@pytest.mark.torch
def test_equals_torch_in_double_precision_with_gradients(tmp_path, x64):
    import torch

    ours, theirs, batch, rows = check_against_torch(tmp_path, torch.float64, 1e-9)
    labels = np.where(batch["attention_mask"] == 1, np.arange(21).reshape(3, 7) % 4, -100)
    loss = torch.nn.functional.cross_entropy(rows[2].reshape(-1, 4), torch.tensor(labels.ravel()))
    loss.backward()
    batch["labels"] = labels
    graded = nnx.jit(nnx.value_and_grad(lambda model, batch: model(**batch).loss))
    got, grads = graded(ours, batch)
    close(got, loss, 1e-9)
    close(grads["bigru"]["embeddings"]["embedding"][...], theirs.bigru.embeddings.weight.grad, 1e-9)
    gru, wanted = grads["bigru"]["gru"], theirs.bigru.gru
    close(gru["backward"]["recurrent"]["kernel"][...].T, wanted.weight_hh_l0_reverse.grad, 1e-9)
    close(gru["forward"]["input"]["bias"][...], wanted.bias_ih_l0.grad, 1e-9)


@pytest.mark.torch
def test_saved_names_are_torchs(tmp_path):
    import torch
    from safetensors.torch import load_file

    ours, theirs = make_pair(tmp_path / "torch", torch.float32)
    ours.save_pretrained(tmp_path / "ours")
    written, wanted = load_file(tmp_path / "ours" / "model.safetensors"), theirs.state_dict()
    assert written.keys() == wanted.keys()
    assert all(torch.equal(written[name], value) for name, value in wanted.items())
    again = zoo.from_pretrained(tmp_path / "ours")
    assert type(again) is zoo.BiGRUForTokenClassification and again.config == ours.config
    batch = make_batch()
    np.testing.assert_array_equal(run(again, batch).logits, run(ours, batch).logits)
    encoder = zoo.BiGRUModel.from_pretrained(tmp_path / "ours")
    hidden = run(ours, batch, True).hidden_states[1]
    np.testing.assert_array_equal(run(encoder, batch).last_hidden_state, hidden)
    with pytest.raises(WeightsMismatchError, match=r"classifier\.weight: \(4, 12\) in the file"):
        zoo.from_pretrained(tmp_path / "ours", num_labels=2)
    fresh = zoo.from_pretrained(tmp_path / "ours", num_labels=2, new_head=True)
    assert run(fresh, batch).logits.shape == (3, 7, 2)


@pytest.fixture
def model():
    model = zoo.BiGRUForTokenClassification(BiGRUConfig(**TINY), rngs=nnx.Rngs(0))
    model.eval()
    return model


def test_hidden_tokens_are_passed_over(model):
    ids = np.array([[5, 6, 7, 8]])
    mask = np.array([[0, 1, 0, 1]])
    got = run(model.bigru, {"input_ids": ids, "attention_mask": mask}).last_hidden_state
    wanted = run(model.bigru, {"input_ids": np.array([[6, 8]])}).last_hidden_state
    np.testing.assert_allclose(got[:, [1, 3]], wanted, atol=1e-6)
    assert not np.asarray(got[:, [0, 2]]).any()


def test_embeddings_may_be_given(model):
    batch = make_batch()
    embedded = model.bigru.embeddings(batch["input_ids"])
    got = run(model, batch | {"input_ids": None, "inputs_embeds": embedded}).logits
    np.testing.assert_array_equal(got, run(model, batch).logits)


def test_initial_weights(model):
    config = BiGRUConfig(vocab_size=4000, embedding_size=16, hidden_size=64)
    big = zoo.BiGRUModel(config, rngs=nnx.Rngs(0))
    words = np.asarray(big.embeddings.embedding[...])
    assert not words[0].any() and abs(words.std() - 0.02) < 1e-3
    kernel = np.asarray(big.gru.forward.recurrent.kernel[...])
    assert 0.12 < kernel.max() <= 0.125 and -0.125 <= kernel.min() < -0.12
    assert not np.array_equal(kernel, big.gru.backward.recurrent.kernel[...])


def test_dropout_is_on_in_train_mode_only(model):
    batch = make_batch()
    np.testing.assert_array_equal(run(model, batch).logits, run(model, batch).logits)
    model.train()
    assert not np.array_equal(run(model, batch).logits, run(model, batch).logits)


def test_half_precision(model):
    batch = make_batch()
    half = nnx.clone(model)
    half.set_attributes(dtype=jnp.bfloat16)
    out = run(half, batch | {"labels": np.zeros((3, 7), np.int32)}, True)
    assert out.loss.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves((out.logits, out.hidden_states))} == {
        jnp.dtype(jnp.bfloat16)
    }
    np.testing.assert_allclose(
        np.asarray(out.logits, np.float32), run(model, batch).logits, atol=0.02
    )


def test_refusals(model):
    with pytest.raises(ValueError, match=r"attention_mask has shape \(1, 3\), expected \(1, 4\)"):
        model(np.ones((1, 4), np.int32), np.ones((1, 3)))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        model()
    with pytest.raises(TypeError, match="output_attentions"):
        model(np.ones((1, 4), np.int32), output_attentions=True)
    with pytest.raises(ValueError, match="embedding_size is 0: expected an integer"):
        BiGRUConfig(embedding_size=0)
    assert model.id_limits == {"input_ids": 30}
    with pytest.raises(ValueError, match="only within one architecture of transformer"):
        zoo.init_from_layers(model, model, [])
