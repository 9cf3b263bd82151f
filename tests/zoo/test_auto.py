"""Classes by model_type and task."""

import importlib
import json
import pkgutil

import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo

from .conftest import FAMILIES, make_batch, make_torch

TASKS = {
    None: "Model",
    "sequence-classification": "ForSequenceClassification",
    "token-classification": "ForTokenClassification",
    "question-answering": "ForQuestionAnswering",
    "masked-lm": "ForMaskedLM",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_task_has_its_class(family):
    model_type = getattr(zoo, f"{family}Config").model_type
    for task, ending in TASKS.items():
        cls = zoo.model_class(model_type, task)
        assert cls is getattr(zoo, family + ending)
        assert cls.architecture == cls.__name__ and cls.task == task
        config = getattr(zoo, f"{family}Config")(**FAMILIES[family])
        assert type(zoo.from_config(config, task, rngs=nnx.Rngs(0))) is cls


def test_every_class_of_every_file_is_handed_on_and_found():
    files = [
        importlib.import_module(f"{zoo.__name__}.{m.name}")
        for m in pkgutil.iter_modules(zoo.__path__)
    ]
    defined = [
        value
        for file in files
        for value in vars(file).values()
        if getattr(value, "__module__", "") == file.__name__ and hasattr(value, "config_class")
    ]
    assert defined
    for cls in defined:
        assert getattr(zoo, cls.__name__) is cls
        assert getattr(zoo, cls.config_class.__name__) is cls.config_class
        assert zoo.MODELS[cls.config_class.model_type][cls.task] is cls
        assert cls.architecture == cls.__name__


def test_a_class_made_from_one_of_these_is_saved_as_that_one():
    class Mine(zoo.BertForSequenceClassification):
        pass

    assert Mine.architecture == "BertForSequenceClassification"
    assert zoo.model_class("bert", Mine.task) is zoo.BertForSequenceClassification


@pytest.mark.torch
def test_a_folder_says_its_class(tmp_path):
    make_torch("ElectraForTokenClassification", num_labels=5).save_pretrained(tmp_path)
    batch = make_batch(family="Electra")
    saved = zoo.from_pretrained(tmp_path, output_hidden_states=True)
    assert type(saved) is zoo.ElectraForTokenClassification
    assert saved(**batch).logits.shape == (3, 9, 5)
    same = zoo.from_pretrained(tmp_path, "token-classification")
    np.testing.assert_array_equal(same(**batch).logits, saved(**batch).logits)
    spans = zoo.from_pretrained(tmp_path, "question-answering", num_labels=2, new_head=True)
    assert type(spans) is zoo.ElectraForQuestionAnswering
    with pytest.raises(zoo.WeightsMismatchError, match="new_head=True"):
        zoo.from_pretrained(tmp_path, "sequence-classification")


@pytest.mark.torch
def test_without_a_known_architecture_it_is_the_encoder(tmp_path):
    make_torch("BertModel").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    for named in (["BertForMaskedLM"], None):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"architectures": named}))
        assert type(zoo.from_pretrained(tmp_path)) is zoo.BertModel


def test_configs_are_read_by_their_type(tmp_path):
    file = tmp_path / "bert_config_L3.json"
    file.write_text(json.dumps({"num_hidden_layers": 3}))
    assert zoo.read_config(file, num_labels=3) == zoo.BertConfig(num_hidden_layers=3, num_labels=3)
    config = zoo.BiGRUConfig(hidden_size=5)
    config.to_json_file(tmp_path / "config.json")
    assert zoo.read_config(tmp_path) == config


def test_refusals(tmp_path):
    file = tmp_path / "config.json"
    file.write_text('{"model_type": "xlnet"}')
    known = (
        "'bert', 'bigru', 'roberta', 'camembert', 'deberta-v2', 'deberta', 'distilbert', "
        "'electra', 'modernbert', 'mpnet', 'xlm-roberta'"
    )
    for read in (zoo.from_pretrained, zoo.read_config):
        with pytest.raises(ValueError, match=rf"config\.json.*'xlnet': choose from {known}"):
            read(tmp_path)
    file.write_text('{"model_type": ["bert"]}')
    with pytest.raises(ValueError, match="choose from 'bert'"):
        zoo.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no bert here is for the task 'tagging': choose from"):
        zoo.model_class("bert", "tagging")
    with pytest.raises(ValueError, match="choose from None, 'token-classification'"):
        zoo.model_class("bigru", "question-answering")
    with pytest.raises(ValueError, match="no folder"):
        zoo.from_pretrained(tmp_path / "none")
