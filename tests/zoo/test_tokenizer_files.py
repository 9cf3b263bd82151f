"""The tokenizer's files and the labels' names go from the folder a model came from to its copies."""

import functools
import logging
import os
import shutil

import numpy as np
import optax
import pytest
from flax import nnx

import jaxbrewer
import jaxbrewer.zoo as zoo
from jaxbrewer.zoo.tokenizer_files import TOKENIZER_FILES

from .conftest import TINY, make_batch

LABELS = ("no", "maybe", "yes")


@pytest.fixture
def folder(tmp_path):
    """A classifier's folder with all kinds of tokenizer files, and some that are none."""
    config = zoo.BertConfig(**TINY, num_labels=3, label_names=LABELS)
    model = zoo.BertForSequenceClassification(config, rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path / "source")
    for name in (*TOKENIZER_FILES, "README.md", "pytorch_model.bin"):
        (tmp_path / "source" / name).write_bytes(name.encode() + b"\r\n\xff")
    return tmp_path / "source"


def only(folder, *names):
    """Takes the tokenizer's files out of a folder, but for some."""
    for name in set(TOKENIZER_FILES) - set(names):
        (folder / name).unlink()


def travelled(folder, source):
    """Asserts that the tokenizer's files are in a folder, to the byte, and nothing else is."""
    for name in TOKENIZER_FILES:
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    assert {*os.listdir(folder)} == {"config.json", "model.safetensors", *TOKENIZER_FILES}
    assert zoo.read_config(folder).label_names == LABELS


def test_they_go_where_a_model_that_was_read_is_saved(folder, tmp_path):
    zoo.from_pretrained(folder, output_hidden_states=True).save_pretrained(tmp_path / "first")
    travelled(tmp_path / "first", folder)
    config = zoo.read_config(tmp_path / "first")
    shutil.rmtree(folder)
    model = zoo.from_config(config, "sequence-classification", rngs=nnx.Rngs(0))
    model.save_pretrained(tmp_path / "second")
    travelled(tmp_path / "second", tmp_path / "first")


@pytest.mark.parametrize("made", ["replace", "student_config", "its own config"])
def test_they_go_with_a_student(folder, tmp_path, made):
    teacher = zoo.from_pretrained(folder)
    if made == "replace":
        config = teacher.config.replace(num_hidden_layers=2)
    elif made == "student_config":
        config = zoo.student_config("T3", teacher.config)
        config = config.replace(**{**TINY, "num_hidden_layers": 2})
    else:
        config = zoo.BertConfig(**{**TINY, "num_hidden_layers": 2}, num_labels=3)
    student = zoo.BertForSequenceClassification(config, rngs=nnx.Rngs(1))
    zoo.init_from_layers(student, teacher, [0, 2]).save_pretrained(tmp_path / "student")
    travelled(tmp_path / "student", folder)
    student.bert.save_pretrained(tmp_path / "encoder")
    travelled(tmp_path / "encoder", folder)


def test_they_go_from_bert_to_distilbert(folder, tmp_path):
    teacher = zoo.from_pretrained(folder)
    sizes = dict(vocab_size=50, dim=24, n_layers=1, n_heads=4, hidden_dim=40)
    config = zoo.DistilBertConfig(**sizes, max_position_embeddings=20, label_names=("a", "b"))
    student = zoo.DistilBertForTokenClassification(config, rngs=nnx.Rngs(0))
    zoo.init_from_layers(student, teacher, [1]).save_pretrained(tmp_path / "student")
    assert (tmp_path / "student" / "vocab.txt").read_bytes() == b"vocab.txt\r\n\xff"
    assert zoo.read_config(tmp_path / "student").label_names == ("a", "b")


def test_they_do_not_go_with_another_vocabulary(folder, tmp_path):
    teacher = zoo.from_pretrained(folder)
    config = teacher.config.replace(vocab_size=60)
    zoo.BertModel(config, rngs=nnx.Rngs(0)).save_pretrained(tmp_path / "other")
    config = zoo.BertConfig(**TINY, num_labels=3)
    student = zoo.BertForSequenceClassification(config, rngs=nnx.Rngs(1))
    zoo.init_from_layers(student, teacher, [0, 1, 2], embeddings=False)
    student.save_pretrained(tmp_path / "own tables")
    for name in ("other", "own tables"):
        assert sorted(os.listdir(tmp_path / name)) == ["config.json", "model.safetensors"]
    assert zoo.read_config(tmp_path / "own tables").label_names == LABELS


def test_they_go_through_a_checkpoint(folder, tmp_path):
    def adaptor(batch, outputs):
        return {"losses": outputs.loss}

    config = jaxbrewer.TrainingConfig(output_dir=str(tmp_path / "run"), log_dir=None, device="cpu")
    student = zoo.read_config(folder, num_hidden_layers=1)
    model = zoo.BertForSequenceClassification(student, rngs=nnx.Rngs(4))
    trainer = jaxbrewer.BasicTrainer(config, model, adaptor)
    batch = make_batch() | {"labels": np.array([0, 1, 2])}
    with trainer:
        trainer.train(functools.partial(optax.sgd, 0.1), [batch], num_epochs=1)
    fresh = zoo.BertForSequenceClassification(student, rngs=nnx.Rngs(5))
    jaxbrewer.export_hf(tmp_path / "run", fresh, tmp_path / "out")
    travelled(tmp_path / "out", folder)
    bias = zoo.from_pretrained(tmp_path / "out").classifier.bias[...]
    np.testing.assert_array_equal(bias, model.classifier.bias[...])
    assert np.any(bias)


def test_a_config_from_elsewhere_takes_those_beside_the_weights(folder, tmp_path):
    config = zoo.BertConfig(**TINY, num_labels=3, label_names=LABELS)
    model = zoo.BertForSequenceClassification.from_pretrained(folder, config=config)
    model.save_pretrained(tmp_path / "out")
    travelled(tmp_path / "out", folder)


def test_a_file_cannot_name_the_folder(tmp_path):
    with pytest.raises(ValueError, match="unknown key 'source_folder'"):
        zoo.BertConfig.from_dict({"source_folder": "/etc"})
    config = zoo.BertConfig(source_folder=tmp_path)
    assert "source_folder" not in config.to_dict() and "source_folder" not in repr(config)
    assert config == zoo.BertConfig() and hash(config) == hash(zoo.BertConfig())
    with pytest.raises(ValueError, match="source_folder is 3: expected the name of a folder"):
        zoo.BertConfig(source_folder=3)


def test_the_folder_is_found_from_another_working_folder(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(folder.parent)
    model = zoo.from_pretrained("source")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model.save_pretrained("out")
    travelled(tmp_path / "elsewhere" / "out", folder)


def test_files_that_are_there_stay(folder, tmp_path, caplog):
    model = zoo.from_pretrained(folder)
    out = tmp_path / "out"
    model.save_pretrained(out)
    caplog.clear()
    model.save_pretrained(out)
    model.save_pretrained(folder)
    assert not caplog.records
    (out / "vocab.txt").write_text("mine")
    model.save_pretrained(out)
    assert (out / "vocab.txt").read_text() == "mine"
    assert f"{out} keeps the tokenizer's files that it has, which are not those of" in caplog.text


def test_a_line_says_what_is_missing(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    made = zoo.BertModel(zoo.BertConfig(**TINY), rngs=nnx.Rngs(0))
    made.save_pretrained(tmp_path / "made")
    (line,) = caplog.records
    assert line.levelname == "INFO" and "was not read from a folder" in line.getMessage()
    assert "tokenizer.json, tokenizer_config.json" in line.getMessage()

    model = zoo.from_pretrained(folder)
    only(folder)
    caplog.clear()
    model.save_pretrained(tmp_path / "none")
    shutil.rmtree(folder)
    model.save_pretrained(tmp_path / "gone")
    none, gone = caplog.records
    assert none.levelname == gone.levelname == "WARNING"
    assert f"{folder}, which the model came from, has none" in none.getMessage()
    assert f"{folder}, which the model came from, is no longer there" in gone.getMessage()


def test_a_link_out_of_the_folder_is_left_out(folder, tmp_path, caplog):
    only(folder, "tokenizer.json", "vocab.txt")
    (tmp_path / "secret").write_text("secret")
    (folder / "vocab.txt").unlink()
    (folder / "vocab.txt").symlink_to(tmp_path / "secret")
    zoo.from_pretrained(folder).save_pretrained(tmp_path / "out")
    assert sorted(os.listdir(tmp_path / "out")) == [
        "config.json", "model.safetensors", "tokenizer.json",
    ]  # fmt: skip
    assert "vocab.txt is not copied" in caplog.text and "outside of the folder" in caplog.text


def test_the_hubs_cache_is_followed(folder, tmp_path):
    """There every file is a link from ``snapshots`` to ``blobs``; the copies are files."""
    shutil.copytree(folder, tmp_path / "hub" / "blobs")
    snapshot = tmp_path / "hub" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for name in os.listdir(folder):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    zoo.from_pretrained(snapshot).save_pretrained(tmp_path / "out")
    travelled(tmp_path / "out", folder)
    assert not any((tmp_path / "out" / name).is_symlink() for name in TOKENIZER_FILES)
