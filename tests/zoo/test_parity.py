"""Every architecture and head against transformers' torch model, and read by transformers."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo

from .conftest import (
    FAMILIES,
    TASKS,
    TINY,
    close,
    family_of,
    labels_for,
    make_batch,
    make_torch,
    nothing_narrowed,
    to_torch,
)

NAMES = [family + task for family in FAMILIES for task in TASKS]
NEW = [name for name in NAMES if family_of(name) != "Bert"]


def check_parity(name, folder, double, tolerance, **changes):
    num_labels = 2 if name.endswith("ForQuestionAnswering") else 3
    if double and name.endswith("ForSequenceClassification"):  # else DeBERTa's loss is in float32
        changes["problem_type"] = "single_label_classification"
    theirs = make_torch(name, double, num_labels=num_labels, **changes)
    theirs.save_pretrained(folder)
    dtype = jnp.float64 if double else jnp.float32
    ours = getattr(zoo, name).from_pretrained(folder, param_dtype=dtype)
    batch = make_batch(family=family_of(name))
    batch |= labels_for(name, *batch["input_ids"].shape, num_labels)
    asked = {"output_hidden_states": True, "output_attentions": True}
    with nothing_narrowed(name) if double else contextlib.nullcontext():
        wanted = theirs(**to_torch(batch), **asked)
    got = ours(**batch, **asked)
    assert got.keys() == [key for key in wanted.keys() if key != "cross_attentions"]  # noqa: SIM118
    for key, mine in got.items():
        if key not in ("hidden_states", "attentions"):
            mine, other = (mine,), (wanted[key],)
        else:
            other = wanted[key]
            assert len(mine) == TINY["num_hidden_layers"] + (key == "hidden_states")
        for one, its in zip(mine, other, strict=True):
            assert one.dtype == dtype
            close(one, its, tolerance)


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers(name, tmp_path):
    check_parity(name, tmp_path, double=False, tolerance=1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("name", NAMES)
def test_equals_transformers_in_double_precision(name, tmp_path, x64):
    check_parity(name, tmp_path, double=True, tolerance=1e-9)


@pytest.mark.torch
@pytest.mark.parametrize("name", NEW)
def test_transformers_reads_what_is_saved(name, tmp_path):
    import transformers

    family = family_of(name)
    config = getattr(zoo, f"{family}Config")(**FAMILIES[family], label_names=("no", "yes"))
    ours = getattr(zoo, name)(config, rngs=nnx.Rngs(3))
    ours.eval()
    ours.save_pretrained(tmp_path)
    # Written out: the kernels give a query that sees nothing another output.
    theirs, report = getattr(transformers, name).from_pretrained(
        tmp_path, output_loading_info=True, attn_implementation="eager"
    )
    assert not any(report.values()), report
    assert theirs.config.id2label == {0: "no", 1: "yes"}
    batch = make_batch(family=family)
    wanted = theirs.eval()(**to_torch(batch))
    got = ours(**batch)
    for key, value in got.items():
        close(value, wanted[key], 1e-5)
    again = zoo.from_pretrained(tmp_path)
    assert type(again) is type(ours) and again.config == ours.config
    np.testing.assert_array_equal(again(**batch)[0], got[0])


@pytest.mark.parametrize("name", [f"{family}ForTokenClassification" for family in FAMILIES])
def test_scores_are_what_goes_into_the_softmax(name):
    family = family_of(name)
    config = getattr(zoo, f"{family}Config")(**FAMILIES[family])
    model = getattr(zoo, name)(config, rngs=nnx.Rngs(0))
    model.eval()
    batch = make_batch(family=family)
    scores = model(**batch, output_attention_scores=True).attentions
    probs = model(**batch, output_attentions=True).attentions
    assert len(scores) == 3
    for score, prob in zip(scores, probs, strict=True):
        sees = (np.asarray(score) > -9000).any(
            -1, keepdims=True
        )  # a query of padding may see nothing
        assert sees.any()
        np.testing.assert_allclose(jnp.where(sees, jax.nn.softmax(score), prob), prob, atol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("name", [f"{family}ForSequenceClassification" for family in FAMILIES])
def test_positional_order_is_transformers(name, tmp_path):
    import torch

    theirs = make_torch(name, num_labels=3)
    theirs.save_pretrained(tmp_path)
    ours = getattr(zoo, name).from_pretrained(tmp_path)
    family = family_of(name)
    batch = make_batch(family=family)
    labels = np.array([0, 1, 2])
    positions = np.broadcast_to(np.arange(9)[::-1] + 4, (3, 9)).copy()
    if family == "DistilBert":
        values = [*batch.values(), None, labels, positions]
    else:
        values = [*batch.values(), positions, None, labels]
    as_torch = [value if value is None else torch.tensor(value) for value in values]
    close(ours(*values).loss, theirs(*as_torch).loss, 1e-5)


@pytest.mark.torch
def test_robertas_gradients_equal_torchs_and_padding_gets_none(tmp_path, x64):
    name = "RobertaForSequenceClassification"
    theirs = make_torch(name, double=True, num_labels=3, num_hidden_layers=1)
    theirs.save_pretrained(tmp_path)
    ours = getattr(zoo, name).from_pretrained(tmp_path, param_dtype=jnp.float64)
    batch = make_batch(family="Roberta") | {"labels": np.array([0, 2, 1])}
    theirs(**to_torch(batch)).loss.backward()
    grads = nnx.jit(nnx.grad(lambda model, batch: model(**batch).loss))(ours, batch)
    for table in ("word_embeddings", "position_embeddings"):
        got = grads["roberta"]["embeddings"][table]["embedding"][...]
        close(got, getattr(theirs.roberta.embeddings, table).weight.grad, 1e-9)
        assert not np.asarray(got[3]).any() and np.asarray(got[4]).any()


def test_no_batch_with_token_types_for_distilbert():
    config = zoo.DistilBertConfig(**FAMILIES["DistilBert"])
    model = zoo.DistilBertForTokenClassification(config, rngs=nnx.Rngs(0))
    with pytest.raises(TypeError, match="token_type_ids"):
        model(**make_batch(family="Bert"))
    assert model.id_limits == {"input_ids": 50, "position_ids": 20}
