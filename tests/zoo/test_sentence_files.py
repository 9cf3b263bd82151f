"""Folders of sentence-transformers: read, written, and refused where they would mean something else."""

import json
import logging
import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxbrewer.zoo as zoo
from jaxbrewer.zoo import DenseConfig, SentenceConfig, SentenceEncoder

from .conftest import TINY, make_torch

SENTENCES = ["the cat sat", "a dog", "the dog sat on the cat on a mat", "sat unheard of", ""]
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "the", "cat", "sat", "a", "dog", "on", "mat"]
PROMPTS = {"query": "the ", "document": ""}
KINDS = {
    "mean": SentenceConfig(),
    "cls, normalized": SentenceConfig(pooling="cls", normalize=True),
    "max, dense": SentenceConfig(pooling="max", dense=(DenseConfig(width=10),)),
    "mean, two dense, normalized": SentenceConfig(
        dense=(
            DenseConfig(width=16, activation="gelu"),
            DenseConfig(width=8, activation="identity", bias=False),
        ),
        normalize=True,
    ),
}


def write_tokenizer(folder):
    """A tokenizer of a few words, as BERT's."""
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    settings = {"tokenizer_class": "BertTokenizer", "do_lower_case": True, "model_max_length": 20}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def made(sentence=None):
    """A new model, in eval mode, with weights large enough to tell formulas apart."""
    config = zoo.BertConfig(**{**TINY, "num_hidden_layers": 1, "initializer_range": 0.3})
    model = SentenceEncoder(zoo.BertModel(config, rngs=nnx.Rngs(0)), sentence, rngs=nnx.Rngs(1))
    model.eval()
    return model


def edit(file, change):
    """Changes a JSON file by a function of its value, or with some keys."""
    value = json.loads(file.read_text())
    file.write_text(json.dumps(change(value) if callable(change) else value | change))


def tokenized(folder, sentences):
    """The sentences' ids as transformers' tokenizer gives them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    return dict(tokenizer(sentences, padding=True, truncation=True, return_tensors="np"))


def theirs(folder, **options):
    """The model as sentence-transformers reads it."""
    import torch
    from sentence_transformers import SentenceTransformer

    torch.set_num_threads(1)
    return SentenceTransformer(str(folder), device="cpu", local_files_only=True, **options)


@pytest.fixture
def folder(tmp_path):
    """A folder that was written here, with a dense layer, a normalisation and a tokenizer."""
    sentence = SentenceConfig(dense=(DenseConfig(width=10),), normalize=True, max_seq_length=12)
    path = tmp_path / "folder"
    made(sentence).save_pretrained(path)
    write_tokenizer(path)
    return path


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_sentence_transformers_reads_what_is_saved(kind, tmp_path):
    sentence = KINDS[kind].replace(
        max_seq_length=12, prompts=PROMPTS, default_prompt_name="query", similarity_fn_name="dot"
    )
    model = made(sentence)
    model.save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    other = theirs(tmp_path)
    wanted = other.encode(SENTENCES, prompt="")
    got = model(**tokenized(tmp_path, SENTENCES)).embedding
    np.testing.assert_allclose(got, wanted, atol=1e-5)
    assert np.abs(wanted).max() > 0.1
    with_prompt = [sentence.prompt + text for text in SENTENCES]
    got = model(**tokenized(tmp_path, with_prompt)).embedding
    np.testing.assert_allclose(got, other.encode(SENTENCES), atol=1e-5)
    assert other.max_seq_length == 12 and other.similarity_fn_name == "dot"
    assert other.prompts == PROMPTS and other.default_prompt_name == "query"


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("spelling", ["theirs", "older"])
def test_what_sentence_transformers_writes_is_read(kind, spelling, tmp_path):
    made(KINDS[kind]).save_pretrained(tmp_path / "ours")
    write_tokenizer(tmp_path / "ours")
    other = theirs(tmp_path / "ours", prompts={"query": "the "}, similarity_fn_name="cosine")
    folder = tmp_path / "theirs"
    other.save_pretrained(str(folder), create_model_card=False)
    if spelling == "older":
        for module in (modules := json.loads((folder / "modules.json").read_text())):
            module["type"] = "sentence_transformers.models." + module["type"].rpartition(".")[2]
        (folder / "modules.json").write_text(json.dumps(modules))
        edit(folder / "1_Pooling" / "config.json", lambda values: {
            "word_embedding_dimension": 24,
            **{f"pooling_mode_{key}": key.removesuffix("s") == f"{KINDS[kind].pooling}_token"
               for key in ("cls_token", "mean_tokens", "max_tokens", "mean_sqrt_len_tokens")},
        })  # fmt: skip
        (folder / "config_sentence_transformers.json").unlink()
        (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 20}')
    model = zoo.from_pretrained(folder)
    assert type(model) is SentenceEncoder
    for name in ("pooling", "dense", "normalize"):
        assert getattr(model.sentence, name) == getattr(KINDS[kind], name)
    got = model(**tokenized(folder, SENTENCES)).embedding
    np.testing.assert_allclose(got, other.encode(SENTENCES, prompt=""), atol=1e-5)
    if spelling == "theirs":
        assert model.sentence.prompts["query"] == "the "
        assert model.sentence.similarity_fn_name == "cosine"
        model.save_pretrained(tmp_path / "again")
        for name in ("config_sentence_transformers.json", "sentence_bert_config.json"):
            texts = [json.loads((path / name).read_text()) for path in (folder, tmp_path / "again")]
            assert texts[0].items() <= texts[1].items()
        again = theirs(tmp_path / "again").encode(SENTENCES, prompt="")
        np.testing.assert_allclose(again, got, atol=1e-5)


@pytest.mark.torch
def test_a_cross_encoders_scores_stay_what_they_were(tmp_path):
    import torch
    from sentence_transformers import CrossEncoder

    pairs = [("the cat sat", "a dog"), ("on a mat", "the cat sat on the mat")]
    make_torch("BertForSequenceClassification", num_labels=1).save_pretrained(tmp_path / "plain")
    write_tokenizer(tmp_path / "plain")
    for name in ("Identity", "Sigmoid", "Tanh"):
        activation = getattr(torch.nn, name)()
        other = CrossEncoder(
            str(tmp_path / "plain"), activation_fn=activation, local_files_only=True
        )
        other.save_pretrained(str(tmp_path / name))
        older = shutil.copytree(tmp_path / "plain", tmp_path / f"older {name}")
        kept = f"{type(activation).__module__}.{name}"
        edit(older / "config.json", {"sbert_ce_default_activation_function": kept})
        for folder in (tmp_path / name, older):
            model = zoo.from_pretrained(folder)
            assert type(model) is zoo.BertForSequenceClassification
            assert model.config.score_activation == kept
            assert zoo.read_config(folder) == model.config
            logits = model(**tokenized(folder, [list(pair) for pair in pairs])).logits
            wanted = activation(torch.tensor(np.asarray(logits)))[:, 0]
            np.testing.assert_allclose(other.predict(pairs), wanted, atol=1e-5)
            model.save_pretrained(tmp_path / f"{folder.name}, again")
            again = CrossEncoder(str(tmp_path / f"{folder.name}, again"), local_files_only=True)
            np.testing.assert_allclose(again.predict(pairs), other.predict(pairs), atol=1e-5)


def test_the_activation_of_scores_goes_with_the_config():
    values = {"num_labels": 1, "sentence_transformers": {"activation_fn": "torch.nn.Tanh"}}
    config = zoo.BertConfig.from_dict(values)
    assert config.replace(num_hidden_layers=2).score_activation == "torch.nn.Tanh"
    assert config.replace(num_labels=3).score_activation is None
    assert config.to_dict()["sentence_transformers"] == {"activation_fn": "torch.nn.Tanh"}
    assert zoo.BertConfig.from_dict(config.to_dict()) == config
    assert "sentence_transformers" not in zoo.BertConfig().to_dict()
    with pytest.raises(ValueError, match="unknown key 'score_activation'"):
        zoo.BertConfig.from_dict({"score_activation": "torch.nn.Tanh"})


def test_a_folder_is_read_back_to_the_bit(folder, tmp_path):
    model = zoo.from_pretrained(folder, param_dtype=jnp.float32)
    assert model.encoder.pooler is not None
    model.save_pretrained(tmp_path / "again")
    for root, _, names in os.walk(folder):
        for name in names:
            copy = tmp_path / "again" / os.path.relpath(root, folder) / name
            assert copy.read_bytes() == Path(root, name).read_bytes()


def test_the_bare_encoder_and_a_head_can_be_read_from_it(folder):
    assert type(zoo.BertModel.from_pretrained(folder)) is zoo.BertModel
    model = zoo.from_pretrained(folder, "sequence-classification", new_head=True, num_labels=3)
    assert type(model) is zoo.BertForSequenceClassification


def test_a_pooler_is_read_where_there_is_one(folder, tmp_path):
    file = folder / "model.safetensors"
    tensors = {name: x for name, x in load_file(file).items() if not name.startswith("pooler.")}
    save_file(tensors, file)
    model = zoo.from_pretrained(folder)
    assert model.encoder.pooler is None
    model.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == tensors.keys()


def test_the_encoder_may_lie_in_a_folder_of_its_own(folder):
    """As the first releases of sentence-transformers wrote them."""
    wanted = zoo.from_pretrained(folder)(np.ones((1, 3), int)).embedding
    (folder / "0_Transformer").mkdir()
    for name in ("config.json", "model.safetensors", "sentence_bert_config.json", "vocab.txt"):
        (folder / name).rename(folder / "0_Transformer" / name)
    edit(
        folder / "modules.json",
        lambda modules: [modules[0] | {"path": "0_Transformer"}, *modules[1:]],
    )
    model = zoo.from_pretrained(folder)
    np.testing.assert_array_equal(model(np.ones((1, 3), int)).embedding, wanted)
    assert model.sentence.max_seq_length == 12
    model.save_pretrained(folder.parent / "again")
    assert (folder.parent / "again" / "vocab.txt").is_file()
    np.testing.assert_array_equal(
        zoo.from_pretrained(folder.parent / "again")(np.ones((1, 3), int)).embedding, wanted
    )


def test_a_line_gives_the_prompts(folder, caplog):
    zoo.from_pretrained(folder)
    edit(folder / "config_sentence_transformers.json", {"prompts": {"query": "", "document": ""}})
    zoo.from_pretrained(folder)
    assert not caplog.records
    prompts = {"query": "query: ", "passage": "passage: ", "none": ""}
    edit(folder / "config_sentence_transformers.json", {"prompts": prompts})
    model = zoo.from_pretrained(folder)
    assert model.sentence.prompts == prompts and model.sentence.prompt == ""
    edit(folder / "config_sentence_transformers.json", {"default_prompt_name": "query"})
    assert zoo.from_pretrained(folder).sentence.prompt == "query: "
    without, with_default = (record.getMessage() for record in caplog.records)
    assert "'query': 'query: ', 'passage': 'passage: ' (none by default" in without
    assert "'query' by default" in with_default and "you add before tokenizing" in with_default


def test_the_hubs_cache_is_followed(folder, tmp_path):
    blobs = tmp_path / "hub" / "blobs"
    blobs.mkdir(parents=True)
    for root, _, names in os.walk(folder):
        for name in names:
            inside = os.path.relpath(os.path.join(root, name), folder)
            blob = blobs / inside.replace(os.sep, "-")
            shutil.copy(os.path.join(root, name), blob)
            link = tmp_path / "hub" / "snapshots" / "abc" / inside
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(os.path.relpath(blob, link.parent))
    model = zoo.from_pretrained(tmp_path / "hub" / "snapshots" / "abc")
    wanted = zoo.from_pretrained(folder)(np.ones((1, 3), int)).embedding
    np.testing.assert_array_equal(model(np.ones((1, 3), int)).embedding, wanted)


def module(number, **changes):
    return lambda modules: [m | (changes if m["idx"] == number else {}) for m in modules]


WRONG = {
    "a module of another kind": (
        "modules.json", module(2, type="sentence_transformers.models.LSTM"),
        r"modules.json: module 2 is a 'sentence_transformers.models.LSTM'; known here are .*Pooling",
    ),
    "a module of somebody's": (
        "modules.json", module(1, type="my.code.Pooling"), "module 1 is a 'my.code.Pooling'",
    ),
    "no type": ("modules.json", module(1, type=None), "module 1 needs a 'type' and a 'path'"),
    "no list": ("modules.json", lambda modules: {}, "expected a list of modules"),
    "another order": (
        "modules.json", lambda modules: [*modules[:2], modules[3], modules[2]],
        "the modules are Transformer, Pooling, Normalize, Dense; expected Transformer, Pooling",
    ),
    "nothing": ("modules.json", lambda modules: [], "the modules are none; expected"),
    "a path up": ("modules.json", module(1, path="../other"), "outside of the folder"),
    "a path from the root": ("modules.json", module(1, path="/etc"), "outside of the folder"),
    "a path to nothing": (
        "modules.json", module(2, path="9_Dense"), "names 9_Dense/config.json, which is not in",
    ),
    "another pooling": (
        "1_Pooling/config.json", {"pooling_mode_weightedmean_tokens": True},
        r"pooling_mode=\['mean', 'weightedmean'\]; known here is one of mean, cls, max",
    ),
    "another pooling, as it is spelt today": (
        "1_Pooling/config.json", {"pooling_mode": "lasttoken"}, r"pooling_mode=\['lasttoken'\]",
    ),
    "two poolings": ("1_Pooling/config.json", {"pooling_mode": ["cls", "mean"]}, "'cls', 'mean'"),
    "pooling without the prompt": (
        "1_Pooling/config.json", {"include_prompt": False},
        "include_prompt=False is not supported, only True is",
    ),
    "an unknown key of the pooling": (
        "1_Pooling/config.json", {"include_prompts": True}, "did you mean 'include_prompt'",
    ),
    "no width": (
        "1_Pooling/config.json", {"word_embedding_dimension": None},
        "embedding_dimension=None: expected an integer",
    ),
    "another width": (
        "1_Pooling/config.json", {"word_embedding_dimension": 23}, "in_features=24, but 23 come in",
    ),
    "an activation of somebody's": (
        "2_Dense/config.json", {"activation_function": "my.code.Tanh"},
        "activation_function='my.code.Tanh'; known here are torch's Identity, Tanh",
    ),
    "a residual": (
        "2_Dense/config.json", {"use_residual": True}, "use_residual=True is not supported, only False is",
    ),
    "a dense layer of something else": (
        "2_Dense/config.json", {"module_input_name": "token_embeddings"},
        "module_input_name='token_embeddings' is not supported, only 'sentence_embedding' is",
    ),
    "a dense layer of another width": (
        "2_Dense/config.json", {"out_features": 9},
        r"2_Dense/model.safetensors does not fit its config.json: it holds .*\(10, 24\).*\(9, 24\)",
    ),
    "a bias that is none": ("2_Dense/config.json", {"bias": 1}, "bias is 1: expected True or False"),
    "another kind of model": (
        "config_sentence_transformers.json", {"model_type": "SparseEncoder"},
        "model_type='SparseEncoder' is not supported, only 'SentenceTransformer' is",
    ),
    "embeddings that are cut": (
        "config_sentence_transformers.json", {"truncate_dim": 64}, "truncate_dim=64 is not supported",
    ),
    "a default that is no prompt": (
        "config_sentence_transformers.json", {"default_prompt_name": "query"},
        "default_prompt_name='query' is not in prompts, which has none",
    ),
    "prompts that are no texts": (
        "config_sentence_transformers.json", {"prompts": {"query": 3}}, "expected texts by name",
    ),
    "another task": (
        "sentence_bert_config.json", {"transformer_task": "fill-mask"},
        "transformer_task='fill-mask' is not supported, only 'feature-extraction' is",
    ),
    "options of the model": (
        "sentence_bert_config.json", {"config_args": {"num_hidden_layers": 1}},
        "config_args=.*is not supported, only {} is",
    ),
    "another output": (
        "sentence_bert_config.json",
        {"modality_config": {"text": {"method": "forward", "method_output_name": "pooler_output"}}},
        "modality_config=.*only the last_hidden_state of forward for texts is",
    ),
    "a length that is none": (
        "sentence_bert_config.json", {"max_seq_length": "long"}, "max_seq_length is 'long'",
    ),
    "another encoder": ("config.json", {"model_type": "xlnet"}, r"config\.json.*'xlnet': choose from"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_what_would_give_other_embeddings_is_refused(what, folder):
    file, change, message = WRONG[what]
    edit(folder / file, change)
    with pytest.raises(ValueError, match=message) as caught:
        zoo.from_pretrained(folder)
    assert file.rpartition("/")[2] in str(caught.value)


def test_a_pooling_for_another_encoder_is_refused(tmp_path):
    made().save_pretrained(tmp_path)
    edit(tmp_path / "1_Pooling" / "config.json", {"word_embedding_dimension": 23})
    with pytest.raises(ValueError, match=r"is for a width of 23, but the encoder's .* are 24 wide"):
        zoo.from_pretrained(tmp_path)


def test_links_out_of_the_folder_are_refused(folder, tmp_path):
    (tmp_path / "elsewhere").mkdir()
    for name in ("1_Pooling/config.json", "2_Dense/model.safetensors"):
        target = tmp_path / "elsewhere" / name.replace("/", "-")
        (folder / name).rename(target)
        (folder / name).symlink_to(target)
        with pytest.raises(ValueError, match=f"names '{name}', a link to .*outside of the folder"):
            zoo.from_pretrained(folder)
        (folder / name).unlink()
        shutil.copy(target, folder / name)
    zoo.from_pretrained(folder)


def test_a_dense_layer_in_a_pickle_is_not_read(folder):
    (folder / "2_Dense" / "model.safetensors").rename(folder / "2_Dense" / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"2_Dense has its weights in a pickle.*save_pretrained"):
        zoo.from_pretrained(folder)


def test_a_folder_without_a_list_of_parts_names_the_way(folder):
    (folder / "modules.json").unlink()
    assert type(zoo.from_pretrained(folder)) is zoo.BertModel
    with pytest.raises(ValueError, match=r"no modules\.json: .*SentenceConfig\(pooling='mean'\)"):
        SentenceEncoder.from_pretrained(folder)


def test_saving_says_nothing_of_a_tokenizer_that_is_there(folder, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    zoo.from_pretrained(folder).save_pretrained(tmp_path / "again")
    assert not caplog.records
