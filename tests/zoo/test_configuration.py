"""Configs: Hugging Face's and TextBrewer's files, round trips, and refusals."""

import dataclasses
import json

import pytest
import transformers

from jaxbrewer.zoo import MODELS, BertConfig

# A student of TextBrewer's, and the keys of Google's Chinese BERT, which its files carry.
T4_TINY = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 312,
    "initializer_range": 0.02,
    "intermediate_size": 1200,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 4,
    "type_vocab_size": 2,
    "vocab_size": 21128,
}
GOOGLE = {
    "directionality": "bidi",
    "pooler_fc_size": 768,
    "pooler_num_attention_heads": 12,
    "pooler_num_fc_layers": 3,
    "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform",
}


def test_textbrewers_files(tmp_path):
    path = tmp_path / "bert_config_L4t.json"
    path.write_text(json.dumps(T4_TINY | GOOGLE))
    config = BertConfig.from_json_file(path, num_labels=3, output_hidden_states=True)
    assert (config.hidden_size, config.num_hidden_layers, config.vocab_size) == (312, 4, 21128)
    assert config.num_labels == 3 and config.output_hidden_states
    assert config.layer_norm_eps == 1e-12 and config.pad_token_id == 0


def test_tinyberts_files():
    extras = {"cell": {}, "emb_size": 312, "structure": [], "pre_trained": "", "training": ""}
    assert BertConfig.from_dict(T4_TINY | extras) == BertConfig.from_dict(T4_TINY)


def test_transformers_files_both_ways(tmp_path):
    theirs = transformers.BertConfig(
        hidden_size=36, num_hidden_layers=2, id2label={0: "a", 1: "b", 2: "c"},
        label2id={"a": 0, "b": 1, "c": 2}, classifier_dropout=0.3, layer_norm_eps=1e-6,
        problem_type="multi_label_classification", pad_token_id=None,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    config = BertConfig.from_pretrained(tmp_path)
    assert config.label_names == ("a", "b", "c")
    assert config.num_labels == 3
    config.to_json_file(tmp_path / "config.json")
    again = transformers.BertConfig.from_pretrained(tmp_path)
    assert again.to_dict() == theirs.to_dict()
    assert BertConfig.from_pretrained(tmp_path) == config


def test_defaults_are_transformers():
    theirs = transformers.BertConfig().to_dict()
    ours = BertConfig().to_dict()
    assert {key: theirs[key] for key in ours} == {
        **ours,
        "id2label": theirs["id2label"],
        "label2id": theirs["label2id"],
    }
    assert ours["id2label"] == {"0": "LABEL_0", "1": "LABEL_1"}


def test_a_config_is_a_value():
    config = BertConfig(num_labels=2, label_names=("LABEL_0", "LABEL_1"))
    assert config == BertConfig() and hash(config) == hash(BertConfig())
    named = BertConfig(label_names=("no", "yes"))
    assert named.label2id == {"no": 0, "yes": 1}
    assert named.replace(num_labels=3).label_names is None
    assert named.replace(hidden_size=24).label_names == ("no", "yes")
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.hidden_size = 3


def test_every_field_survives_a_round_trip():
    config = BertConfig(
        hidden_size=24, num_attention_heads=3, hidden_act="relu", pad_token_id=None, num_labels=1,
        problem_type="regression", output_hidden_states=True, output_attentions=True,
        output_attention_scores=True, return_dict=False, classifier_dropout=0,
    )  # fmt: skip
    assert BertConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"hiden_size": 3},
            r"unknown key 'hiden_size'; did you mean 'hidden_size'\?.*ignore=\['hiden_size'",
        ),
        ({"color": 1, "shape": 2}, "unknown keys 'color', 'shape'; choose from 'vocab_size', "),
        ({"model_type": "roberta"}, "model_type 'roberta'"),
        ({"position_embedding_type": "relative_key"}, "'relative_key' is not supported"),
        ({"is_decoder": True}, "is_decoder=True is not supported"),
        ({"pruned_heads": {"1": [0]}}, "pruned_heads"),
        ({"pooler_type": "mean"}, "pooler_type='mean'"),
        ({"hidden_act": "mish"}, "hidden_act is 'mish': expected one of gelu,"),
        ({"hidden_size": 100}, "not a multiple of num_attention_heads=12"),
        ({"num_hidden_layers": 0}, "num_hidden_layers is 0: expected an integer from 1"),
        ({"num_hidden_layers": True}, "num_hidden_layers is True: expected an integer"),
        ({"vocab_size": "30522"}, "vocab_size is '30522': expected an integer"),
        ({"hidden_size": None}, "hidden_size is None: expected an integer"),
        ({"hidden_dropout_prob": 1.0}, "a rate of 0 or more and below 1"),
        ({"layer_norm_eps": -1}, "layer_norm_eps is -1: expected a number of 0 or more"),
        ({"layer_norm_eps": "1e-12"}, "expected a number"),
        ({"output_attentions": "yes"}, "output_attentions is 'yes': expected True or False"),
        ({"problem_type": "ranking"}, "problem_type is 'ranking': choose from 'regression', "),
        ({"num_labels": 1, "problem_type": "single_label_classification"}, "2 or more"),
        ({"num_labels": 3, "id2label": {"0": "a", "1": "b"}}, "num_labels=3 but id2label has 2"),
        ({"id2label": {"0": "a", "2": "b"}}, r"id2label numbers \[0, 2\]"),
        ({"id2label": ["a", "b"]}, "not a map from number to name"),
        ({"pad_token_id": 30522}, "pad_token_id=30522 is outside"),
        ([1], "expected a mapping"),
    ],
)
def test_refusals(values, message):
    with pytest.raises(ValueError, match=message):
        BertConfig.from_dict(values)


def test_an_unknown_key_can_be_passed_over():
    config = BertConfig.from_dict({"house_style": 1, "hidden_size": 24}, ignore=["house_style"])
    assert config.hidden_size == 24


def test_files_that_cannot_be_read(tmp_path):
    path = tmp_path / "config.json"
    with pytest.raises(ValueError, match="there is no such file"):
        BertConfig.from_json_file(path)
    path.write_text('{\n  "hidden_size": 24,\n  oops\n}')
    with pytest.raises(ValueError, match=r"config\.json: line 3, column 3: not JSON"):
        BertConfig.from_json_file(path)
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds a list"):
        BertConfig.from_json_file(path)
    path.write_text('{"hidden_size": 25}')
    with pytest.raises(ValueError, match=r"config\.json: BertConfig: hidden_size=25"):
        BertConfig.from_json_file(path)
    with pytest.raises(ValueError, match="label_names is 'ab': expected a tuple"):
        BertConfig(label_names="ab")
    with pytest.raises(ValueError, match="num_labels=2 but label_names has 1"):
        BertConfig(label_names=("a",))
    with pytest.raises(ValueError, match=r"did you mean 'hidden_size'\?$"):
        BertConfig().replace(hiddensize=3)


@pytest.mark.parametrize("model_type", MODELS)
def test_every_field_has_its_check(model_type):
    config = MODELS[model_type][None].config_class
    assert list(config._checks) == [field.name for field in dataclasses.fields(config)]


def test_a_field_of_a_users_own_config_needs_no_check():
    @dataclasses.dataclass(frozen=True, kw_only=True)
    class Mine(BertConfig):
        mood: str = "good"

    assert Mine.from_dict({"mood": "bad"}).mood == "bad"
