"""Models of masked words: the table tied or not, names and biases in files, which class a folder is."""

import json
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxbrewer.zoo as zoo
from jaxbrewer.zoo import WeightsMismatchError, init_from_layers

from .conftest import FAMILIES, close, labels_for, make_batch, make_torch, to_torch

DECODERS = {
    "Bert": "cls.predictions.decoder",
    "Roberta": "lm_head.decoder",
    "Electra": "generator_lm_head",
    "DistilBert": "vocab_projector",
    "MPNet": "lm_head.decoder",
    "ModernBert": "decoder",
    "DebertaV2": "cls.predictions.decoder",
}


def model_of(family, **changes):
    config = getattr(zoo, f"{family}Config")(**{**FAMILIES[family], **changes})
    model = getattr(zoo, f"{family}ForMaskedLM")(config, rngs=nnx.Rngs(0))
    model.eval()
    return model


def edit(folder, change):
    """Rewrites the folder's weights as ``change`` makes them from a dict."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def batch_with_labels(family):
    batch = make_batch(family=family)
    return batch | labels_for("ForMaskedLM", *batch["input_ids"].shape, None)


def sizes(model):
    return sorted(leaf.size for leaf in jax.tree.leaves(nnx.state(model, nnx.Param)))


def test_a_tied_table_is_one_parameter():
    tied, own = model_of("Electra"), model_of("Electra", tie_word_embeddings=False)
    assert sizes(tied).count(50 * 16) == 1 and sizes(own).count(50 * 16) == 2
    assert tied.words.own is None
    graph, state = nnx.split(tied)
    text = jax.make_jaxpr(lambda state, ids: nnx.merge(graph, state)(ids).logits)(
        state, np.ones((2, 4), np.int32)
    )
    assert not [e for e in text.eqns if e.primitive.name == "transpose" and
                e.invars[0].aval.shape == (50, 16)]  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("family", DECODERS)
def test_a_matrix_of_its_own(family, tmp_path):
    import transformers

    name = f"{family}ForMaskedLM"
    theirs = make_torch(name, tie_word_embeddings=False)
    theirs.save_pretrained(tmp_path)
    ours = zoo.from_pretrained(tmp_path)
    assert type(ours).__name__ == name and not ours.config.tie_word_embeddings
    batch = batch_with_labels(family)
    wanted, got = theirs(**to_torch(batch)), ours(**batch)
    close(got.logits, wanted.logits, 1e-5)
    close(got.loss, wanted.loss, 1e-5)
    ours.save_pretrained(tmp_path)
    again, report = getattr(transformers, name).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    close(got.logits, again.eval()(**to_torch(batch)).logits, 1e-5)
    np.testing.assert_array_equal(zoo.from_pretrained(tmp_path)(**batch).logits, got.logits)


@pytest.mark.parametrize("family", DECODERS)
def test_the_matrix_of_a_tied_file(family, tmp_path):
    model = model_of(family)
    model.save_pretrained(tmp_path)
    batch = make_batch(family=family)
    decoder = f"{DECODERS[family]}.weight"
    table = model.base_model.embeddings.word_embeddings.embedding[...]
    assert decoder not in load_file(tmp_path / "model.safetensors")
    edit(tmp_path, lambda tensors: tensors | {decoder: np.asarray(table)})
    again = zoo.from_pretrained(tmp_path)
    np.testing.assert_array_equal(again(**batch).logits, model(**batch).logits)
    edit(tmp_path, lambda tensors: tensors | {decoder: np.asarray(table) + 1})
    with pytest.raises(WeightsMismatchError, match=rf"{decoder} is not .*_embeddings\.weight"):
        zoo.from_pretrained(tmp_path)
    fresh = type(model).from_pretrained(tmp_path, new_head=True)
    np.testing.assert_array_equal(fresh.base_model(**batch)[0], model.base_model(**batch)[0])
    untied = zoo.from_pretrained(tmp_path, tie_word_embeddings=False)
    assert not np.allclose(untied(**batch).logits, model(**batch).logits)


@pytest.mark.parametrize("family", ["Bert", "Roberta", "MPNet", "DebertaV2"])
def test_either_bias_is_read_and_the_decoders_counts(family, tmp_path):
    """Transformers keeps the same numbers under two names, and computes with the decoder's."""
    model = model_of(family)
    model.words.bias[...] = jnp.arange(50.0)
    model.save_pretrained(tmp_path)
    decoders = f"{DECODERS[family]}.bias"
    alone = decoders.replace("decoder.", "")

    def read():
        return np.asarray(zoo.from_pretrained(tmp_path).words.bias[...])

    written = load_file(tmp_path / "model.safetensors")
    np.testing.assert_array_equal(written[alone], written[decoders])
    for absent in (alone, decoders):
        edit(tmp_path, lambda _, absent=absent: {n: x for n, x in written.items() if n != absent})
        np.testing.assert_array_equal(read(), np.arange(50))
    edit(tmp_path, lambda _: written | {alone: np.zeros(50, np.float32)})
    np.testing.assert_array_equal(read(), np.arange(50))
    edit(tmp_path, lambda _: {n: x for n, x in written.items() if n not in (alone, decoders)})
    with pytest.raises(WeightsMismatchError, match=f"not in the file: {decoders}"):
        zoo.from_pretrained(tmp_path)


@pytest.mark.torch
@pytest.mark.parametrize("family", ["DebertaV2", "Deberta"])
def test_the_names_of_debertas_own_code(family, tmp_path):
    theirs = make_torch(f"{family}ForMaskedLM", legacy=False)
    theirs.save_pretrained(tmp_path)
    assert "lm_predictions.lm_head.dense.weight" in load_file(tmp_path / "model.safetensors")
    ours = zoo.from_pretrained(tmp_path)
    batch = make_batch(family=family)
    close(ours(**batch).logits, theirs(**to_torch(batch)).logits, 1e-5)


@pytest.mark.torch
def test_a_decoder_without_a_bias(tmp_path):
    theirs = make_torch("ModernBertForMaskedLM", decoder_bias=False)
    theirs.save_pretrained(tmp_path)
    ours = zoo.from_pretrained(tmp_path)
    assert ours.words.bias is None
    batch = make_batch(family="ModernBert")
    close(ours(**batch).logits, theirs(**to_torch(batch)).logits, 1e-5)


@pytest.mark.torch
def test_gradients_of_the_tied_table_equal_torchs(tmp_path, x64):
    """Scores reach every row, padding's too, which gets nothing as an embedding."""
    theirs = make_torch("BertForMaskedLM", double=True, num_hidden_layers=1)
    theirs.save_pretrained(tmp_path)
    ours = zoo.BertForMaskedLM.from_pretrained(tmp_path, param_dtype=jnp.float64)
    batch = batch_with_labels("Bert")
    theirs(**to_torch(batch)).loss.backward()
    grads = nnx.jit(nnx.grad(lambda model, batch: model(**batch).loss))(ours, batch)
    got = grads["bert"]["embeddings"]["word_embeddings"]["embedding"][...]
    close(got, theirs.bert.embeddings.word_embeddings.weight.grad, 1e-9)
    assert np.asarray(got[0]).any()
    close(grads["words"]["bias"][...], theirs.cls.predictions.bias.grad, 1e-9)


def test_the_name_of_pretraining_without_its_head_is_the_encoder(tmp_path, caplog):
    zoo.MPNetModel(zoo.MPNetConfig(**FAMILIES["MPNet"]), rngs=nnx.Rngs(0)).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    values = json.loads(file.read_text()) | {"architectures": ["MPNetForMaskedLM"]}
    file.write_text(json.dumps(values))
    with caplog.at_level(logging.INFO, logger="jaxbrewer"):
        assert type(zoo.from_pretrained(tmp_path)) is zoo.MPNetModel
    assert "names MPNetForMaskedLM, but the weights hold no head of it" in caplog.text
    with pytest.raises(WeightsMismatchError, match=r"lm_head\.dense\.weight[\s\S]*new_head=True"):
        zoo.from_pretrained(tmp_path, "masked-lm")
    fresh = zoo.from_pretrained(tmp_path, "masked-lm", new_head=True)
    assert type(fresh) is zoo.MPNetForMaskedLM


def test_a_classifier_beside_the_name_of_pretraining_is_not_its_head(tmp_path):
    """ModernBERT's heads share their first modules."""
    config = zoo.ModernBertConfig(**FAMILIES["ModernBert"])
    tagger = zoo.ModernBertForTokenClassification(config, rngs=nnx.Rngs(0))
    tagger.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    saved = json.loads(file.read_text())
    file.write_text(json.dumps(saved | {"architectures": ["ModernBertForMaskedLM"]}))
    assert type(zoo.from_pretrained(tmp_path)) is zoo.ModernBertModel
    file.write_text(json.dumps(saved))
    with pytest.raises(WeightsMismatchError, match="belong to a ModernBertForTokenClassification"):
        zoo.from_pretrained(tmp_path, "masked-lm")


@pytest.mark.parametrize("student", [zoo.BertForMaskedLM, zoo.DistilBertForMaskedLM])
def test_a_student_begins_with_its_teachers_head(student):
    teacher = model_of("Bert", num_hidden_layers=2)
    teacher.words.bias[...] = jnp.arange(50.0)
    family = student.__name__.removesuffix("ForMaskedLM")
    layers = {"n_layers": 1} if family == "DistilBert" else {"num_hidden_layers": 1}
    begun = init_from_layers(model_of(family, **layers), teacher, layers=[1])
    np.testing.assert_array_equal(begun.words.bias[...], np.arange(50))
    kernel = begun.transform.dense.kernel[...]
    np.testing.assert_array_equal(kernel, teacher.transform.dense.kernel[...])
