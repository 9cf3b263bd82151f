"""Matches of any two depths, and the likeness of layers that stands beside them."""

import json

import numpy as np
import pytest
from flax import nnx

from jaxbrewer import DistillationConfig, zoo
from jaxbrewer.presets import MATCHES
from jaxbrewer.zoo import similarity, suggest_matches
from jaxbrewer.zoo.suggestions import spread

from .conftest import make_batch


def config(layers, width=24, heads=4, **changes):
    return zoo.BertConfig(
        vocab_size=50,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=40,
        max_position_embeddings=20,
        type_vocab_size=3,
        initializer_range=0.3,
        **changes,
    )


def bert(layers, width=24, seed=0):
    return zoo.BertModel(config(layers, width), rngs=nnx.Rngs(seed))


@pytest.mark.parametrize(
    ("deep", "shallow", "name"),
    [(12, 3, "L3"), (12, 4, "L4"), (12, 6, "L6"), (6, 3, "L3of6"), (24, 12, "L12of24")],
)
def test_suggestions_are_the_presets_where_there_are_some(deep, shallow, name):
    sides = config(deep), config(shallow)
    assert suggest_matches(*sides, "mmd") == list(MATCHES[f"{name}_hidden_smmd"])
    if f"{name}_hidden_mse" in MATCHES:
        assert suggest_matches(*sides) == list(MATCHES[f"{name}_hidden_mse"])
    if f"{name}_attention_ce" in MATCHES:
        assert suggest_matches(*sides, "attention_ce") == list(MATCHES[f"{name}_attention_ce"])


@pytest.mark.parametrize(
    ("deep", "shallow", "teachers"),
    [(12, 5, [0, 2, 5, 7, 10, 12]), (7, 2, [0, 4, 7]), (3, 3, [0, 1, 2, 3]), (9, 1, [0, 9])],
)
def test_any_depths_are_spread_with_both_ends_met(deep, shallow, teachers):
    assert spread(deep, shallow) == [(t, s) for s, t in enumerate(teachers)]


def test_other_widths_are_projected_where_the_loss_needs_it():
    sides = config(4), config(2, width=12)
    (first, *_) = found = suggest_matches(*sides, "cos", weight=0.5)
    assert first["proj"] == ["linear", 12, 24] and first["weight"] == 0.5
    assert all("proj" not in match for match in suggest_matches(*sides, "nst"))
    kept = DistillationConfig(intermediate_matches=json.loads(json.dumps(found)))
    assert len(kept.intermediate_matches) == 3


@pytest.mark.parametrize(
    ("teacher", "student", "loss", "message"),
    [
        (config(3), config(2), "pkd", "loss='pkd': expected one of hidden_mse, cos, mmd"),
        (config(2), config(3), "cos", "the student has 3 layers and the teacher 2"),
        (config(3), config(2, heads=2), "attention_ce", "use attention_ce_mean"),
    ],
)
def test_what_cannot_be_suggested(teacher, student, loss, message):
    with pytest.raises(ValueError, match=message):
        suggest_matches(teacher, student, loss)


def cka(x, y):
    """By the formula, in the space of features."""
    x, y = x - x.mean(0), y - y.mean(0)
    over = np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y)
    return np.linalg.norm(y.T @ x) ** 2 / over


def test_the_similarity_is_the_formula_over_what_is_not_masked():
    teacher, student = bert(2), bert(1, width=12, seed=1)
    batches = [make_batch(seed) for seed in (0, 1)]
    found = similarity(teacher, student, iter(batches))
    sides = []
    for model in (teacher, student):
        model.eval()
        outputs = [model(**batch, output_hidden_states=True).hidden_states for batch in batches]
        seen = [batch["attention_mask"] == 1 for batch in batches]
        sides.append(
            [
                np.concatenate([np.asarray(x)[m] for x, m in zip(layer, seen, strict=True)])
                for layer in zip(*outputs, strict=True)
            ]
        )
    expected = [[cka(x, y) for y in sides[1]] for x in sides[0]]
    np.testing.assert_allclose(found.values, expected, rtol=1e-4)
    assert found.values.shape == (3, 2)
    assert found.positions == sum(int(batch["attention_mask"].sum()) for batch in batches)


def test_a_student_cut_from_its_teacher_is_like_the_layers_it_has():
    teacher = bert(3)
    student = zoo.BertModel(config(1), rngs=nnx.Rngs(5))
    zoo.init_from_layers(student, teacher, layers=[0])
    found = similarity(teacher, student, [make_batch()])
    np.testing.assert_allclose(np.diag(found.values), 1, rtol=1e-5)
    assert found.best() == [0, 1]
    table = str(found).splitlines()
    assert "over 21 positions" in table[0]
    assert [line.split()[0] for line in table[1:]] == ["T3", "T2", "T1", "T0", "S0"]
    assert "1.000*" in table[3] and "*" not in table[1]


def test_positions_are_bounded_and_enough(monkeypatch):
    model = bert(1)
    monkeypatch.setattr(zoo.suggestions, "MOST_POSITIONS", 25)

    def batches():
        yield make_batch(0)
        yield make_batch(1)
        raise AssertionError("read further than needed")

    assert similarity(model, model, batches()).positions == 25
    with pytest.raises(ValueError, match="the batches have 0 positions that are not masked"):
        similarity(model, model, [])
