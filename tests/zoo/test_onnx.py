"""Models as ONNX files, run by onnxruntime beside the zoo."""

import importlib.util
import json

import jax
import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo
from jaxbrewer.__main__ import main
from jaxbrewer.zoo import export_onnx
from jaxbrewer.zoo import onnx as exporting

from .conftest import FAMILIES
from .test_stablehlo import batch, made

HEADS = {
    "ForSequenceClassification": ["logits"],
    "ForTokenClassification": ["logits"],
    "ForQuestionAnswering": ["start_logits", "end_logits"],
    "ForMaskedLM": ["logits"],
}
# Every family with a head, every head with several families.
CASES = [f"{family}{head}" for family, head in zip(FAMILIES, [*HEADS] * 3, strict=False)]
CASES += ["BertForTokenClassification", "BertForQuestionAnswering", "BertForMaskedLM"]


def large(model, seed=0):
    """Weights large enough to tell formulas apart."""
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    rng = np.random.default_rng(seed)
    drawn = jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), params)
    return nnx.merge(graph, drawn, rest)


def sized(model, rows, length):
    """A batch, in which rows are padded, of as many positions at most as there are."""
    length = min(length, model.base_model.longest() or length)
    return {name: value.astype(np.int64) for name, value in batch(model, rows, length).items()}


def run(file, given):
    import onnxruntime

    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_inputs()] == list(given)
    assert session.get_inputs()[0].shape == ["batch", "length"]
    names = [x.name for x in session.get_outputs()]
    return dict(zip(names, session.run(None, given), strict=True))


def check_same(file, model, given):
    model.eval()
    found = run(file, given)
    expected = model(**{name: value.astype(np.int32) for name, value in given.items()})
    for name, value in found.items():
        np.testing.assert_allclose(value, expected[name], atol=1e-5, err_msg=name)
    return list(found)


@pytest.mark.torch
@pytest.mark.parametrize("name", CASES)
def test_every_family_and_every_head(name, tmp_path):
    model, file = large(made(name)), tmp_path / "model.onnx"
    model.train()  # dropout is off in what is written
    written = export_onnx(model, file)
    assert written.difference < 1e-5
    names = check_same(file, model, sized(model, 4, 12))
    assert names == next(heads for end, heads in HEADS.items() if name.endswith(end))


@pytest.mark.torch
@pytest.mark.parametrize(
    ("model", "outputs"),
    [
        (lambda: made("BertModel"), ["last_hidden_state", "pooler_output"]),
        (lambda: made("BertModel", output_hidden_states=True), None),
        (
            lambda: zoo.BertModel.without_pooler(made("BertModel").config, rngs=nnx.Rngs(0)),
            ["last_hidden_state"],
        ),
        (lambda: made("RobertaModel", type_vocab_size=1), ["last_hidden_state", "pooler_output"]),
    ],
)
def test_encoders_without_a_head(model, outputs, tmp_path):
    model = large(model())
    export_onnx(model, tmp_path / "m")
    names = check_same(tmp_path / "m", model, sized(model, 4, 12))
    assert outputs is None or names == outputs


@pytest.mark.torch
@pytest.mark.parametrize("pooling", ["mean", "cls", "max"])
def test_sentence_encoders(pooling, tmp_path):
    layers = (zoo.DenseConfig(width=5), zoo.DenseConfig(width=7, activation="gelu", bias=False))
    dense = layers if pooling == "mean" else ()
    config = zoo.SentenceConfig(pooling=pooling, dense=dense, normalize=pooling != "max")
    model = large(zoo.SentenceEncoder(made("BertModel"), config))
    written = export_onnx(model, tmp_path / "m")
    given = sized(model, 4, 12)
    given["attention_mask"][1, 0] = 0  # the first token need not be at the first position
    names = check_same(tmp_path / "m", model, given)
    assert names == ["embedding", "last_hidden_state"]
    assert written.outputs["embedding"] == ("batch", 7 if dense else 24)


@pytest.mark.torch
def test_the_command_and_the_labels_of_the_file(tmp_path, capsys):
    import onnxruntime

    names = ("très bien", "mal", "neutre")
    model = large(made("BertForSequenceClassification", num_labels=3, label_names=names))
    model.save_pretrained(tmp_path / "student")
    file = tmp_path / "model.onnx"
    argv = ["export", tmp_path / "student", "--to", "onnx", "--out", file]
    assert main([str(word) for word in argv]) == 0
    told = capsys.readouterr().out
    assert "BertForSequenceClassification" in told
    assert "takes input_ids int64[batch,length], attention_mask int64[batch,length]" in told
    assert "gives logits float32[batch,3]" in told
    assert "random batches of 3 × 5 and 1 × 20 (rows × length): the largest difference is" in told
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    kept = session.get_modelmeta().custom_metadata_map
    assert (kept["architecture"], kept["task"]) == (
        "BertForSequenceClassification", "sequence-classification",
    )  # fmt: skip
    labels = {int(number): name for number, name in json.loads(kept["id2label"]).items()}
    given = sized(model, 9, 12)
    found = run(file, given)["logits"].argmax(-1)
    model.eval()
    expected = np.asarray(model(**given).logits).argmax(-1)
    assert [labels[i] for i in found] == [model.config.id2label[i] for i in expected]
    assert len({*found}) > 1


@pytest.mark.torch
def test_a_file_with_other_numbers_is_not_written(tmp_path, monkeypatch):
    model = large(made("BertForSequenceClassification"))
    other = made("BertForSequenceClassification")
    exported = exporting._exported
    monkeypatch.setattr(exporting, "_exported", lambda _, names: exported(other, names))
    with pytest.raises(ValueError, match="logits of the ONNX file differs from the model's by"):
        export_onnx(model, tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.torch
def test_without_onnxruntime_a_line_says_so(tmp_path, capsys, monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxruntime" else found(name)
    )
    made("DistilBertForSequenceClassification").save_pretrained(tmp_path / "student")
    argv = ["export", tmp_path / "student", "--to", "onnx", "--out", tmp_path / "m"]
    assert main([str(word) for word in argv]) == 0
    assert "! not compared with the model: onnxruntime is not installed" in capsys.readouterr().out


@pytest.mark.torch
def test_what_cannot_be_written(tmp_path, monkeypatch):
    config = zoo.BiGRUConfig(vocab_size=50, embedding_size=8, hidden_size=8)
    with pytest.raises(ValueError, match="transformers has no BiGRUForTokenClassification"):
        export_onnx(zoo.BiGRUForTokenClassification(config, rngs=nnx.Rngs(0)), tmp_path / "m")
    encoder = zoo.BiEncoder(zoo.SentenceEncoder(made("BertModel")))
    with pytest.raises(ValueError, match="BiEncoder is no model of a folder: give the encoder"):
        export_onnx(encoder, tmp_path / "m")
    monkeypatch.setattr(exporting, "_LARGEST", 1000)
    with pytest.raises(ValueError, match=r"the weights of BertModel are .* GiB in float32"):
        export_onnx(made("BertModel"), tmp_path / "m")
    assert list(tmp_path.iterdir()) == []


def test_what_is_not_installed_is_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    made("BertModel").save_pretrained(tmp_path / "student")
    argv = ["export", tmp_path / "student", "--to", "onnx", "--out", tmp_path / "m"]
    assert main([str(word) for word in argv]) == 2
    told = capsys.readouterr().err
    assert "needs torch, transformers, onnx" in told
    assert "pip install 'jaxbrewer[onnx]'" in told


@pytest.mark.parametrize(
    ("option", "message"),
    [(("--length", "8"), "--length is for --to"), (("--platforms", "cpu"), "--platforms is for")],
)
def test_options_of_the_other_format_are_refused(option, message, tmp_path, capsys):
    argv = ["export", str(tmp_path), "--to", "onnx", "--out", str(tmp_path / "m"), *option]
    assert main(argv) == 2
    assert message in capsys.readouterr().err
