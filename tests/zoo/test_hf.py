"""Hugging Face folders: read, written, and refused when they do not fit."""

import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxbrewer.zoo as zoo
from jaxbrewer.zoo import BertConfig, WeightsMismatchError

from .conftest import TINY, close, make_torch, to_torch

SEQUENCE = "BertForSequenceClassification"


@pytest.fixture
def folder(tmp_path):
    """A folder that transformers wrote: a sequence classifier of three classes."""
    make_torch(SEQUENCE, num_labels=3).save_pretrained(tmp_path / "hf")
    return tmp_path / "hf"


def edit_tensors(folder, change):
    """Rewrites the folder's weights as ``change`` makes them from a dict."""
    tensors = load_file(folder / "model.safetensors")
    save_file(change(tensors), folder / "model.safetensors", metadata={"format": "pt"})


def rename(old, new):
    return lambda tensors: {name.replace(old, new): value for name, value in tensors.items()}


def logits_of(folder, batch, **options):
    return zoo.BertForSequenceClassification.from_pretrained(folder, **options)(**batch).logits


@pytest.mark.torch
@pytest.mark.parametrize(
    "name", ["BertModel", SEQUENCE, "BertForTokenClassification", "BertForQuestionAnswering"]
)
def test_transformers_reads_what_is_saved(name, tmp_path, batch):
    import transformers

    config = BertConfig(**TINY, num_labels=2, label_names=("no", "yes"))
    ours = getattr(zoo, name)(config, rngs=nnx.Rngs(3))
    ours.eval()
    ours.save_pretrained(tmp_path)
    theirs, report = getattr(transformers, name).from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values()), report
    assert theirs.config.id2label == {0: "no", 1: "yes"}
    wanted = theirs.eval()(**to_torch(batch))
    got = ours(**batch)
    for key, value in got.items():
        np.testing.assert_allclose(value, wanted[key].detach().numpy(), atol=1e-5)
    auto = {SEQUENCE: "AutoModelForSequenceClassification"}.get(
        name, f"Auto{name[4:]}".replace("AutoFor", "AutoModelFor")
    )
    assert type(getattr(transformers, auto).from_pretrained(tmp_path)).__name__ == name
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


@pytest.mark.torch
def test_a_saved_model_is_read_back_to_the_bit(folder, tmp_path, batch):
    model = zoo.BertForSequenceClassification.from_pretrained(folder)
    model.save_pretrained(tmp_path / "again")
    again = zoo.BertForSequenceClassification.from_pretrained(tmp_path / "again")
    assert again.config == model.config
    np.testing.assert_array_equal(again(**batch).logits, model(**batch).logits)
    written, original = (
        load_file(path / "model.safetensors") for path in (tmp_path / "again", folder)
    )
    assert written.keys() == original.keys()
    for name, value in original.items():
        np.testing.assert_array_equal(written[name], value)


@pytest.mark.torch
def test_saving_over_a_folder_replaces_it(folder, batch):
    model = zoo.BertForSequenceClassification.from_pretrained(folder)
    kernel = model.classifier.kernel
    kernel[...] = kernel[...] * 2
    model.save_pretrained(folder)
    np.testing.assert_array_equal(logits_of(folder, batch), model(**batch).logits)
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]


@pytest.mark.torch
def test_a_failed_save_leaves_the_old_file(folder, batch, monkeypatch):
    before = logits_of(folder, batch)
    model = zoo.BertForSequenceClassification.from_pretrained(folder)
    model.classifier.kernel[...] = jnp.zeros_like(model.classifier.kernel[...])

    def broken(source, target):
        raise OSError("disk full")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="disk full"):
        model.save_pretrained(folder)
    monkeypatch.undo()
    assert sorted(os.listdir(folder)) == ["config.json", "model.safetensors"]
    np.testing.assert_array_equal(logits_of(folder, batch), before)


@pytest.mark.torch
def test_a_model_read_is_in_eval_mode_and_in_the_dtype_asked_for(folder, batch):
    model = zoo.BertForSequenceClassification.from_pretrained(
        folder, dtype=jnp.bfloat16, output_hidden_states=True
    )
    out = model(**batch)
    assert out.logits.dtype == jnp.bfloat16
    assert len(out.hidden_states) == 4
    np.testing.assert_array_equal(out.logits, model(**batch).logits)
    assert model.classifier.kernel[...].dtype == jnp.float32


@pytest.mark.torch
@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16])
def test_half_precision_files_are_read_and_written(folder, dtype, batch):
    import torch
    import transformers

    edit_tensors(folder, lambda tensors: {n: v.astype(dtype) for n, v in tensors.items()})
    model = zoo.BertForSequenceClassification.from_pretrained(folder)
    theirs = transformers.BertForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    wanted = theirs.eval()(**to_torch(batch)).logits.detach().numpy()
    np.testing.assert_allclose(model(**batch).logits, wanted, atol=1e-4)
    half = zoo.BertForSequenceClassification.from_pretrained(folder, param_dtype=dtype)
    half.save_pretrained(folder)
    np.testing.assert_array_equal(logits_of(folder, batch), model(**batch).logits)
    stored = json.loads((folder / "config.json").read_text())
    assert stored["dtype"] == np.dtype(dtype).name


@pytest.mark.torch
def test_shards_are_read(folder, tmp_path, batch):
    import transformers

    theirs = transformers.BertForSequenceClassification.from_pretrained(folder)
    theirs.save_pretrained(tmp_path / "shards", max_shard_size="8KB")
    files = os.listdir(tmp_path / "shards")
    assert "model.safetensors" not in files and len(files) > 3
    np.testing.assert_array_equal(logits_of(tmp_path / "shards", batch), logits_of(folder, batch))
    shard = next(name for name in sorted(files) if name.startswith("model-"))
    (tmp_path / "shards" / shard).unlink()
    with pytest.raises(ValueError, match=f"names {shard}, which is not in the folder"):
        logits_of(tmp_path / "shards", batch)


@pytest.mark.torch
def test_shards_that_lack_a_tensor_are_refused(folder):
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    index = {"weight_map": {"classifier.weight": "one.safetensors", "lost": "one.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="names tensors that no shard has: lost"):
        zoo.BertForSequenceClassification.from_pretrained(folder)


@pytest.mark.torch
@pytest.mark.parametrize(
    "change",
    [
        rename("LayerNorm.weight", "LayerNorm.gamma"),
        rename("LayerNorm.bias", "LayerNorm.beta"),
        rename("bert.", ""),
        lambda tensors: {f"module.{name}": tensor for name, tensor in tensors.items()},
        lambda tensors: tensors | {"bert.embeddings.position_ids": np.arange(20)[None]},
        lambda tensors: tensors | {"cls.predictions.bias": np.zeros(50, np.float32)},
    ],
)
def test_known_ways_to_write_the_same_weights(folder, change, batch):
    before = logits_of(folder, batch)
    edit_tensors(folder, change)
    np.testing.assert_array_equal(logits_of(folder, batch), before)


@pytest.mark.torch
def test_an_encoder_reads_from_any_head(folder, batch):
    whole = zoo.BertForSequenceClassification.from_pretrained(folder).bert(**batch)
    encoder = zoo.BertModel.from_pretrained(folder)
    np.testing.assert_array_equal(encoder(**batch).pooler_output, whole.pooler_output)
    bare = zoo.BertModel.from_pretrained(folder, add_pooling_layer=False)
    assert bare.pooler is None
    np.testing.assert_array_equal(bare(**batch)[0], whole[0])


@pytest.mark.torch
def test_a_headless_file_needs_new_head(folder, batch):
    zoo.BertModel.from_pretrained(folder).save_pretrained(folder)
    with pytest.raises(WeightsMismatchError, match=r"classifier\.weight[\s\S]*pass new_head=True"):
        zoo.BertForSequenceClassification.from_pretrained(folder)
    model = zoo.BertForSequenceClassification.from_pretrained(
        folder, new_head=True, num_labels=5, rngs=nnx.Rngs(7)
    )
    assert model(**batch).logits.shape == (3, 5)
    wanted = zoo.BertModel.from_pretrained(folder)(**batch)
    np.testing.assert_array_equal(model.bert(**batch).pooler_output, wanted.pooler_output)
    assert 0 < np.asarray(model.classifier.kernel[...]).std() < 0.05


@pytest.mark.torch
def test_new_head_ignores_the_heads_in_the_file(folder):
    same = zoo.BertForSequenceClassification.from_pretrained(folder)
    fresh = zoo.BertForSequenceClassification.from_pretrained(folder, new_head=True)
    assert not np.array_equal(same.classifier.kernel[...], fresh.classifier.kernel[...])
    spans = zoo.BertForQuestionAnswering.from_pretrained(folder, num_labels=2, new_head=True)
    query = spans.bert.encoder.layer[2].attention.query.kernel
    np.testing.assert_array_equal(
        query[...], same.bert.encoder.layer[2].attention.query.kernel[...]
    )


@pytest.mark.torch
def test_new_head_starts_a_missing_pooler(tmp_path, batch):
    make_torch("BertForTokenClassification").save_pretrained(tmp_path)
    model = zoo.BertForSequenceClassification.from_pretrained(tmp_path, new_head=True)
    assert np.isfinite(model(**batch).logits).all()
    with pytest.raises(WeightsMismatchError, match=r"pooler\.dense\.weight[\s\S]*new pooler"):
        zoo.BertModel.from_pretrained(tmp_path)


@pytest.mark.torch
def test_a_head_of_another_task_is_refused(folder):
    message = (
        f"belong to a {SEQUENCE}: read it with that class, or start a new head with new_head=True"
    )
    with pytest.raises(WeightsMismatchError, match=message):
        zoo.BertForTokenClassification.from_pretrained(folder)
    zoo.BertForTokenClassification.from_pretrained(folder, new_head=True)


@pytest.mark.torch
def test_a_fine_tuned_head_beside_the_config_of_pretraining_is_read(folder, tmp_path, batch):
    """As where the weights alone were saved, and the config is that of the model before."""
    copied = shutil.copytree(folder, tmp_path / "copied")
    config = json.loads((copied / "config.json").read_text())
    for architectures in (["BertForMaskedLM"], ["BertModel"], ["BertForPreTraining"], None):
        (copied / "config.json").write_text(json.dumps(config | {"architectures": architectures}))
        cls = zoo.BertForSequenceClassification
        wanted = cls.from_pretrained(folder)(**batch).logits
        np.testing.assert_array_equal(cls.from_pretrained(copied)(**batch).logits, wanted)


@pytest.mark.torch
def test_a_config_under_its_old_name_is_read(folder, tmp_path, batch):
    copied = shutil.copytree(folder, tmp_path / "copied")
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").unlink()
    del config["model_type"]
    (copied / "bert_config.json").write_text(json.dumps(config))
    np.testing.assert_array_equal(logits_of(copied, batch), logits_of(folder, batch))
    assert type(zoo.from_pretrained(copied)) is type(zoo.from_pretrained(folder))
    assert zoo.read_config(copied) == zoo.read_config(folder)


@pytest.mark.torch
def test_the_way_out_of_a_pickle_keeps_the_head(tmp_path, batch):
    """The snippet is run as it stands in the message."""
    import torch
    import transformers

    theirs = make_torch(SEQUENCE, num_labels=3)
    folder = tmp_path / "model"
    theirs.save_pretrained(folder)
    (folder / "model.safetensors").unlink()
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin is a pickle") as caught:
        zoo.BertForSequenceClassification.from_pretrained(folder)
    snippet = re.search(
        r"transformers\.\w+\.from_pretrained\(.*?\)\.save_pretrained\(.*?\)", str(caught.value)
    )
    before = (folder / "config.json").read_text()
    eval(snippet[0], {"transformers": transformers})
    assert (folder / "config.json").read_text() == before
    ours = zoo.from_pretrained(f"{folder}-safetensors")
    close(ours(**batch).logits, theirs(**to_torch(batch)).logits, 1e-5)


@pytest.mark.torch
def test_keys_of_a_config_may_be_ignored(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied")
    config = json.loads((copied / "config.json").read_text())
    known = {"sbert_ce_default_activation_function": "torch.nn.modules.linear.Identity",
             "sentence_transformers": {"version": "5.0"}}  # fmt: skip
    (copied / "config.json").write_text(json.dumps(config | known))
    zoo.from_pretrained(copied)
    (copied / "config.json").write_text(json.dumps(config | {"house_style": 1}))
    for read in (zoo.from_pretrained, zoo.BertModel.from_pretrained, zoo.read_config):
        with pytest.raises(ValueError, match=r"house_style.*ignore=\['house_style'\]"):
            read(copied)
        read(copied, ignore=["house_style"])


@pytest.mark.torch
def test_another_number_of_labels_names_the_fix(folder):
    with pytest.raises(WeightsMismatchError) as caught:
        zoo.BertForSequenceClassification.from_pretrained(folder, num_labels=4)
    message = str(caught.value)
    assert "shape of classifier.weight: (3, 24) in the file, (4, 24) in the model" in message
    assert "num_labels=4" in message and "new_head=True" in message


@pytest.mark.torch
def test_everything_that_does_not_fit_is_one_error(folder):
    def change(tensors):
        del tensors["bert.encoder.layer.1.output.dense.bias"]
        tensors["bert.encoder.layer.9.output.dense.bias"] = np.zeros(3, np.float32)
        tensors["mystery"] = np.zeros(1, np.float32)
        tensors["bert.pooler.dense.bias"] = np.zeros(7, np.float32)
        return tensors

    edit_tensors(folder, change)
    with pytest.raises(WeightsMismatchError) as caught:
        zoo.BertForSequenceClassification.from_pretrained(folder)
    message = str(caught.value)
    assert str(folder) in message and SEQUENCE in message
    assert "not in the file: bert.encoder.layer.1.output.dense.bias (24,)" in message
    assert "not in the model: bert.encoder.layer.9.output.dense.bias (3,)" in message
    assert "not in the model: mystery (1,)" in message
    assert "shape of bert.pooler.dense.bias: (7,) in the file, (24,) in the model" in message


@pytest.mark.torch
def test_one_tensor_under_two_names_is_refused(folder):
    edit_tensors(
        folder,
        lambda tensors: tensors | {"embeddings.LayerNorm.gamma": np.ones(24, np.float32)},
    )
    with pytest.raises(WeightsMismatchError, match="twice in the file"):
        zoo.BertForSequenceClassification.from_pretrained(folder)


@pytest.mark.torch
def test_folders_that_cannot_be_read(folder, tmp_path):
    read = zoo.BertForSequenceClassification.from_pretrained
    with pytest.raises(ValueError, match=r"no folder 'bert-base-uncased'.*hf download"):
        read("bert-base-uncased")
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[:1000])
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        read(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(
        ValueError, match=r"has no model\.safetensors and no model\.safetensors\.index"
    ):
        read(folder)
    (folder / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"pytorch_model.bin is a pickle.*save_pretrained"):
        read(folder)
    (folder / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: there is no such file"):
        read(folder)
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        zoo.BertModel(BertConfig(**TINY), rngs=nnx.Rngs(0)).save_pretrained(__file__)


@pytest.mark.torch
def test_a_misspelt_option_is_refused(folder):
    with pytest.raises(ValueError, match="did you mean 'num_labels'"):
        zoo.BertForSequenceClassification.from_pretrained(folder, num_label=3)


@pytest.mark.torch
def test_weights_are_independent_of_the_file_and_of_other_models(folder, batch):
    model = zoo.BertForSequenceClassification.from_pretrained(folder)
    before = np.asarray(model(**batch).logits)
    for leaf in jax.tree.leaves(
        nnx.state(zoo.BertForSequenceClassification.from_pretrained(folder))
    ):
        leaf.delete()
    (folder / "model.safetensors").write_bytes(b"")
    np.testing.assert_array_equal(model(**batch).logits, before)
