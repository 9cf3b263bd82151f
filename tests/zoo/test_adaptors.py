"""The usual adaptors hand on what is there, under a distiller's keys."""

import numpy as np
import pytest
from flax import nnx

from jaxbrewer import zoo

SHAPE = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
IDS = np.arange(12).reshape(3, 4)
MASK = np.ones((3, 4), np.int32)
OF_SEQUENCES, OF_TOKENS = {"labels": np.zeros(3, np.int32)}, {"labels": np.zeros((3, 4), np.int32)}
OF_SPANS = {"start_positions": np.zeros(3, np.int32), "end_positions": np.ones(3, np.int32)}


@pytest.mark.parametrize(
    ("task", "labels", "keys"),
    [
        (None, {}, {"hidden"}),
        ("sequence-classification", {}, {"logits", "hidden"}),
        ("sequence-classification", OF_SEQUENCES, {"logits", "losses", "labels", "hidden"}),
        ("token-classification", OF_TOKENS, {"logits", "losses", "labels", "hidden"}),
        ("masked-lm", {}, {"logits", "hidden"}),
        ("masked-lm", OF_TOKENS, {"logits", "logits_mask", "losses", "labels", "hidden"}),
        ("question-answering", {}, {"logits", "hidden"}),
        ("question-answering", OF_SPANS, {"logits", "losses", "labels", "hidden"}),
    ],
)
@pytest.mark.parametrize("masked", [False, True])
def test_what_is_there_is_handed_on(task, labels, keys, masked):
    config = zoo.BertConfig(**SHAPE, output_hidden_states=True)
    model = zoo.from_config(config, task, rngs=nnx.Rngs(0))
    batch = {"input_ids": IDS, **labels, **({"attention_mask": MASK} if masked else {})}
    found = zoo.adaptor(task)(batch, model(**batch))
    of_mask = {"inputs_mask"} | ({"logits_mask"} if task == "token-classification" else set())
    assert set(found) == (keys | of_mask if masked else keys)
    if task == "question-answering":
        assert [x.shape for x in found["logits"]] == [(3, 4)] * 2
        assert len(found.get("labels", (0, 0))) == 2


def test_only_words_with_a_label_are_compared():
    config = zoo.BertConfig(**SHAPE)
    model = zoo.BertForMaskedLM(config, rngs=nnx.Rngs(0))
    batch = {"input_ids": IDS, "labels": np.where(IDS % 3 == 0, IDS, -100)}
    found = zoo.adaptor("masked-lm")(batch, model(**batch))
    np.testing.assert_array_equal(found["logits_mask"], IDS % 3 == 0)


def test_a_sentence_encoder_hands_on_its_embedding():
    encoder = zoo.BertModel(zoo.BertConfig(**SHAPE), rngs=nnx.Rngs(0))
    batch = {"input_ids": IDS, "attention_mask": MASK}
    found = zoo.adaptor("sentence-embedding")(batch, zoo.SentenceEncoder(encoder)(**batch))
    assert set(found) == {"embedding", "inputs_mask"}
    assert found["embedding"].shape == (3, 8)


def test_another_task_is_refused():
    with pytest.raises(ValueError, match="did you mean 'token-classification'"):
        zoo.adaptor("token-clasification")


@pytest.mark.parametrize(
    ("task", "labels"),
    [
        ("sequence-classification", {"labels": np.array([0, -100, 1], np.int32)}),
        ("sequence-classification", {"labels": np.ones((3, 2), np.float32)}),
        ("token-classification", {"labels": np.where(IDS % 3 == 0, 1, -100)}),
        ("masked-lm", {"labels": np.where(IDS % 3 == 0, IDS, -100)}),
        ("question-answering", {**OF_SPANS, "start_positions": np.array([0, 9, 2], np.int32)}),
    ],
)
def test_losses_one_by_one_have_the_models_mean(task, labels):
    model = zoo.from_config(zoo.BertConfig(**SHAPE), task, rngs=nnx.Rngs(0))
    batch = {"input_ids": IDS, **labels}
    outputs = model(**batch)
    found = zoo.adaptor(task, each=True)(batch, outputs)
    masks = found.get("losses_mask", [1] * len(found["losses"]))
    each = [
        np.mean(x[np.broadcast_to(m, x.shape) != 0])
        for x, m in zip(found["losses"], masks, strict=True)
    ]
    assert all(x.ndim for x in found["losses"])
    np.testing.assert_allclose(sum(each), outputs.loss, rtol=1e-6)


def test_only_some_tasks_have_losses_one_by_one():
    with pytest.raises(ValueError, match=r"adaptor\('ranking', each=True\): only"):
        zoo.adaptor("ranking", each=True)
