"""Predictions of every example, in the examples' order."""

import numpy as np
import pytest

import jaxbrewer
from jaxbrewer.data import bucket_by_length
from jaxbrewer.evaluation import Evaluator

from .. import fn_job

LENGTHS = [3, 9, 5, 12, 1, 7, 16, 4, 10, 2, 6]


def examples():
    rng = np.random.default_rng(0)
    return [
        {"ids": rng.integers(0, fn_job.VOCABULARY, length), "labels": i % fn_job.CLASSES}
        for i, length in enumerate(LENGTHS)
    ]


def both(batch, outputs):
    """Logits of the first position and of every one, as a list; a loss of all, a score of each."""
    return {
        "logits": [outputs["logits"], outputs["tokens"]],
        "losses": outputs["loss"],
        "inputs_mask": batch["mask"],
    }


def tokens(batch, outputs):
    return {"logits": outputs["tokens"]}


MODEL = fn_job.encoder(2)


@pytest.fixture
def unpadded():
    """A model whose numbers do not depend on padding: each position by itself."""
    return jaxbrewer.FunctionModel(by_position, MODEL.params)


def by_position(params, ids, mask=None, labels=None):
    x = params["embed"][ids]
    tokens = x @ params["head"]
    return {"logits": tokens[:, 0], "tokens": tokens, "loss": tokens.sum()}


@pytest.mark.parametrize("shuffle", [False, True])
def test_buckets_come_in_the_order_of_the_examples(shuffle, unpadded):
    loader = bucket_by_length(examples(), 3, 3, mask="mask", shuffle=shuffle)
    assert not np.array_equal(loader.order, np.arange(len(LENGTHS)))
    assert sorted(loader.order) == list(range(len(LENGTHS)))
    got = Evaluator(unpadded, both).predict(loader)
    assert sorted(got) == ["inputs_mask", "labels", "logits.0", "logits.1"]
    head, embed = np.asarray(MODEL.params["head"]), np.asarray(MODEL.params["embed"])
    assert got["logits.0"].shape == (len(LENGTHS), fn_job.CLASSES)
    for i, example in enumerate(examples()):
        wanted = embed[example["ids"]] @ head
        np.testing.assert_allclose(got["logits.0"][i], wanted[0], rtol=1e-6, atol=1e-6)
        assert got["logits.1"][i].shape == (LENGTHS[i], fn_job.CLASSES)
        np.testing.assert_allclose(got["logits.1"][i], wanted, rtol=1e-6, atol=1e-6)
        assert got["labels"][i] == example["labels"]


def test_the_order_is_that_of_the_pass():
    """Of each epoch, and its rows are those that come."""
    loader = bucket_by_length(examples(), 3, 3)
    for epoch in (0, 1):
        loader.set_epoch(epoch)
        labels = np.concatenate([batch["labels"] for batch in loader])
        np.testing.assert_array_equal(labels, loader.order % fn_job.CLASSES)


def test_a_distiller_predicts_by_its_student(tmp_path):
    """Any other loader: in its own order, and of one length in one array."""
    distiller, batches = fn_job.distiller(tmp_path, keys=tokens), fn_job.batches(3)
    got, params = distiller.predict(iter(batches)), distiller.model_S.params
    wanted = np.concatenate([fn_job.encode(params, **batch)["tokens"] for batch in batches])
    assert got["logits"].shape == (9, fn_job.LENGTH, fn_job.CLASSES)
    np.testing.assert_allclose(got["logits"], wanted, rtol=1e-5, atol=1e-6)


def test_several_tasks(tmp_path):
    teachers = {name: fn_job.encoder(i) for i, name in enumerate("ab")}
    heads = dict.fromkeys(teachers, fn_job.adaptor("logits"))
    several = jaxbrewer.MultiTaskDistiller(
        jaxbrewer.TrainingConfig(output_dir=tmp_path, device="cpu"),
        jaxbrewer.DistillationConfig(), teachers, fn_job.encoder(7), heads, heads,
    )  # fmt: skip
    got = several.predict({"b": fn_job.batches(2)})
    assert {task: found["logits"].shape for task, found in got.items()} == {
        "b": (6, fn_job.CLASSES)
    }
    with pytest.raises(ValueError, match="expected a dict of loaders by task, of the tasks a, b"):
        several.predict(fn_job.batches(2))


def test_lengths_are_cut_by_the_batchs_own_mask(unpadded):
    loader = bucket_by_length(examples(), 3, 3, mask="attention_mask")

    def model(params, ids, attention_mask=None, labels=None):
        return by_position(params, ids)

    got = Evaluator(jaxbrewer.FunctionModel(model, MODEL.params), tokens).predict(loader)
    assert [len(each) for each in got["logits"]] == LENGTHS


@pytest.mark.parametrize(
    ("loader", "message"),
    [
        ([], "the loader gave no batch to predict"),
        (bucket_by_length(examples(), 3, 3), "no mask of these lengths tells what is padding"),
        (bucket_by_length(examples(), 3, 3, mask="mask", drop_last=True), "Leave out drop_last"),
        (bucket_by_length(examples(), 2, 3, mask="mask", num_replicas=2), "and num_replicas"),
    ],
)
def test_mistakes(loader, message, unpadded):
    with pytest.raises(ValueError, match=message):
        Evaluator(unpadded, tokens).predict(loader)
