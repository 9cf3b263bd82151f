"""The named matches: TextBrewer's layers, and a fit for models of the shapes they are made for."""

from functools import cache

import numpy as np
import pytest
from flax import nnx

from jaxbrewer import DistillationConfig, IntermediateMatch, zoo
from jaxbrewer.errors import Findings
from jaxbrewer.models.adaptors import Side
from jaxbrewer.models.wrap import as_model
from jaxbrewer.objective.plan import resolve
from jaxbrewer.objective.terms import check_plan
from jaxbrewer.preflight.sides import inspect
from jaxbrewer.presets import MATCHES, PROJ_MAP

# The layers of TextBrewer's examples, teacher-student, attention as counted there.
LAYERS = {
    "L3_attention": "4-1 8-2 12-3",
    "L3_hidden": "0-0 4-1 8-2 12-3",
    "L4_attention": "3-1 6-2 9-3 12-4",
    "L4_hidden": "0-0 3-1 6-2 9-3 12-4",
    "L6_hidden": "0-0 2-1 4-2 6-3 8-4 10-5 12-6",
    "small_hidden": "0-0 2-2 4-4 6-6 8-8 10-10 12-12",
    "es_hidden": "2-2 4-4 6-6 8-8 10-10 12-12",
}
# Name → its layers, its loss, and the student's width where there is a projection.
EXPECTED = {
    "L3_attention_mse": ("L3_attention", "attention_mse", None),
    "L3_attention_mse_sum": ("L3_attention", "attention_mse_sum", None),
    "L3_attention_ce": ("L3_attention", "attention_ce", None),
    "L3_attention_ce_mean": ("L3_attention", "attention_ce_mean", None),
    "L3_hidden_smmd": ("L3_hidden", "mmd", None),
    "L3_hidden_mse": ("L3_hidden", "hidden_mse", None),
    "L3n_hidden_mse": ("L3_hidden", "hidden_mse", 384),
    "L3l_hidden_mse": ("L3_hidden", "hidden_mse", 1024),
    "L4_attention_mse": ("L4_attention", "attention_mse", None),
    "L4_attention_mse_sum": ("L4_attention", "attention_mse_sum", None),
    "L4_attention_ce": ("L4_attention", "attention_ce", None),
    "L4_attention_ce_mean": ("L4_attention", "attention_ce_mean", None),
    "L4_hidden_smmd": ("L4_hidden", "mmd", None),
    "L4t_hidden_sgram": ("L4_hidden", "gram", 312),
    "L4t_hidden_mse": ("L4_hidden", "hidden_mse", 312),
    "L6_hidden_smmd": ("L6_hidden", "mmd", None),
    "L6_hidden_mse": ("L6_hidden", "hidden_mse", None),
    "small_hidden_smmd": ("small_hidden", "mmd", None),
    "small_hidden_mse": ("small_hidden", "hidden_mse", 256),
    "es_hidden_smmd": ("es_hidden", "mmd", None),
    "es_hidden_mse": ("es_hidden", "hidden_mse", 256),
}
TWICE = ("mmd", "gram")
# The students that a name's first part is for.
STUDENTS = {
    "L3": ["T3", "T3-small"],
    "L3n": ["T3-small"],
    "L4": ["T4-tiny"],
    "L4t": ["T4-tiny"],
    "L6": ["T6"],
    "small": ["T12-nano", "Electra-small"],
    "es": ["T12-nano", "Electra-small"],
}
FITS = [
    (name, student)
    for name in EXPECTED
    for student in STUDENTS.get(name.split("_")[0], ["L3l"])
    # Equal widths, so for T3 alone.
    if not (name == "L3_hidden_mse" and student == "T3-small")
]
BATCH = {"input_ids": np.ones((2, 4), np.int32), "attention_mask": np.ones((2, 4), np.int32)}


def written_out(name):
    """The matches as TextBrewer's examples list them, but attention counted from 0."""
    layers, loss, width = EXPECTED[name]
    feature = layers.split("_")[1]
    found = []
    for pair in LAYERS[layers].split():
        teacher, student = (int(layer) - (feature == "attention") for layer in pair.split("-"))
        found.append(
            {
                "layer_T": [teacher, teacher] if loss in TWICE else teacher,
                "layer_S": [student, student] if loss in TWICE else student,
                "feature": feature,
                "loss": loss,
                "weight": 1,
            }
            | ({"proj": ["linear", width, 768]} if width else {})
        )
    return found


def adaptor(batch, outputs):
    return {
        "logits": outputs.logits,
        "hidden": outputs.hidden_states,
        "attention": outputs.attentions,
        "inputs_mask": batch["attention_mask"],
    }


@cache
def shapes(student, role):
    """The results of a student, or of the teacher of the two experiments, by shape alone."""
    if student == "teacher":
        config = zoo.BertConfig()
    elif student == "L3l":
        config = zoo.BertConfig(num_hidden_layers=3, hidden_size=1024, num_attention_heads=16)
    else:
        config = zoo.student_config(student, "bert-base-uncased")
    config = config.replace(output_hidden_states=True, output_attention_scores=True)
    cls = zoo.model_class(config.model_type, "sequence-classification")
    module = nnx.eval_shape(lambda: cls(config, rngs=nnx.Rngs(0)))
    found = Findings()
    results = inspect(Side(role, as_model(module), adaptor, {}), BATCH, False, found)
    assert not found.problems
    return results


@cache
def projection(name, width_S, width_T):
    return as_model(PROJ_MAP[name](width_S, width_T, rngs=nnx.Rngs(0)))


# Ours, for teachers of other depths: student → its depth and the teacher's.
OF_OTHER_DEPTHS = {"L3of6": (3, 6), "L12of24": (12, 24)}
OURS = [
    f"{student}_{loss}"
    for student in OF_OTHER_DEPTHS
    for loss in (
        "attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean",
        "hidden_mse", "hidden_smmd",
    )
]  # fmt: skip


def test_the_names_are_textbrewers_and_those_of_other_depths():
    assert MATCHES.keys() == {*EXPECTED, *OURS}


@pytest.mark.parametrize("name", OURS)
def test_every_second_layer_of_other_depths(name):
    student, loss = name.split("_", 1)
    depth, deep = OF_OTHER_DEPTHS[student]
    assert deep == 2 * depth
    feature = loss.split("_")[0]
    first = 1 if feature == "attention" else 0
    pairs = [(2 * layer - first, layer - first) for layer in range(first, depth + 1)]
    for match, (teacher, own) in zip(MATCHES[name], pairs, strict=True):
        twice = loss == "hidden_smmd"
        assert match == {
            "layer_T": [teacher, teacher] if twice else teacher,
            "layer_S": [own, own] if twice else own,
            "feature": feature,
            "loss": "mmd" if twice else loss,
            "weight": 1,
        }
        assert IntermediateMatch.from_dict(match).to_dict() == match


@pytest.mark.parametrize("name", EXPECTED)
def test_the_layers_are_textbrewers(name):
    assert list(MATCHES[name]) == written_out(name)
    for match in MATCHES[name]:
        assert IntermediateMatch.from_dict(match).to_dict() == match


@pytest.mark.parametrize(("name", "student"), FITS)
def test_matches_fit_their_students(name, student):
    plan, problems = resolve(
        DistillationConfig(intermediate_matches=MATCHES[name]), logits_required=True
    )
    assert not problems
    projections = {m.projection: projection(*m.proj) for m in plan.matches if m.projection}
    found = Findings()
    check_plan(plan, shapes(student, "S"), shapes("teacher", "T"), BATCH, projections, found)
    assert not found.problems and not found.warnings


def test_attention_counted_from_one_does_not_fit():
    """What TextBrewer's own numbers would do on outputs that start with the first layer."""
    shifted = [
        match | {"layer_T": match["layer_T"] + 1, "layer_S": match["layer_S"] + 1}
        for match in MATCHES["L3_attention_mse"]
    ]
    plan, _ = resolve(DistillationConfig(intermediate_matches=shifted), logits_required=True)
    found = Findings()
    check_plan(plan, shapes("T3", "S"), shapes("teacher", "T"), BATCH, {}, found)
    assert any("counted from 0" in problem for problem in found.problems)


def test_attention_matches_mean_the_layers_that_were_meant():
    """Through the adaptor that TextBrewer's examples assume, ``[None] + layers``."""
    teacher = [None, *(np.full((1, 1), layer) for layer in range(1, 13))]
    zoos = teacher[1:]
    for name in ("L3_attention_mse", "L4_attention_ce"):
        pairs = [tuple(map(int, p.split("-"))) for p in LAYERS[EXPECTED[name][0]].split()]
        for match, (in_theirs, _) in zip(MATCHES[name], pairs, strict=True):
            assert zoos[match["layer_T"]] is teacher[in_theirs]


def test_matches_add_up():
    both = MATCHES["L4t_hidden_mse"] + MATCHES["L4_hidden_smmd"]
    config = DistillationConfig(temperature=8, intermediate_matches=both)
    assert len(config.intermediate_matches) == 10
    chosen = []
    chosen += MATCHES["L3_hidden_mse"]  # as the examples' scripts do
    assert chosen == list(MATCHES["L3_hidden_mse"])
