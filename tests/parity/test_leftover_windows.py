"""Batches after an epoch's last update train nothing, but are logged: with TextBrewer's weights."""

import pytest
import textbrewer

import jaxbrewer
from jaxbrewer.presets import WEIGHT_SCHEDULER

from .reference import Job, adaptor, assert_equal_runs, configs, run, run_both
from .twins import batches, twins

pytestmark = pytest.mark.torch

COUNT = 5  # batches, of which one is left over by windows of 2, and two by windows of 3
POOLED = {"layers": 2, "width": 8}
MATCH = {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}

# Every scheduler stands on the KD loss once, and on the hard labels once.
NAMES = list(textbrewer.presets.WEIGHT_SCHEDULER)
WEIGHTS = [
    {
        "kd_loss_weight": 0.3,
        "kd_loss_weight_scheduler": kd,
        "hard_label_weight": 0.7,
        "hard_label_weight_scheduler": hard,
    }
    for kd, hard in zip(NAMES, [*NAMES[1:], NAMES[0]], strict=True)
]


def one_teacher(distiller, **more):
    def train(weights, training, tmp_path):
        job = Job(
            weights | more,
            distiller=distiller,
            training=training,
            train={"num_epochs": 2},
            teacher=POOLED,
            student=POOLED,
            loader={"count": COUNT},
        )
        return run_both(job, tmp_path, "float64")

    return train


def two_teachers(weights, training, tmp_path):
    teachers = [twins(10 + i, "float64", **POOLED) for i in range(2)]
    student, torch_student = twins(2, "float64", **POOLED)
    job = Job(weights, training=training, train={"num_epochs": 2})
    torch_configs, jax_configs = configs(job, tmp_path)
    keys = adaptor({})
    theirs = textbrewer.MultiTeacherDistiller(
        *torch_configs, [twin for _, twin in teachers], torch_student, keys, keys
    )
    ours = jaxbrewer.MultiTeacherDistiller(
        *jax_configs, [module for module, _ in teachers], student, keys, keys
    )
    return run(job, theirs, ours, batches(3, COUNT), tmp_path, torch_student)


def one_task(weights, training, tmp_path):
    """Tasks train by steps, where the last batch closes the last window: none is left over."""
    teacher, torch_teacher = twins(10, "float64", **POOLED)
    student, torch_student = twins(2, "float64", **POOLED)
    job = Job(weights, training=training | {"ckpt_steps": 2}, train={"num_steps": 4})
    torch_configs, jax_configs = configs(job, tmp_path)
    keys = {"a": adaptor({})}
    theirs = textbrewer.MultiTaskDistiller(
        *torch_configs, {"a": torch_teacher}, torch_student, keys, keys
    )
    ours = jaxbrewer.MultiTaskDistiller(*jax_configs, {"a": teacher}, student, keys, keys)
    loaders = {"a": batches(3, COUNT)}
    return run(job, theirs, ours, loaders, tmp_path, torch_student)


DISTILLERS = {
    "BasicDistiller": one_teacher("BasicDistiller"),
    "GeneralDistiller": one_teacher("GeneralDistiller", intermediate_matches=[MATCH]),
    "MultiTeacherDistiller": two_teachers,
    "MultiTaskDistiller": one_task,
}


def test_every_scheduler_is_there():
    assert list(WEIGHT_SCHEDULER)[: len(NAMES)] == NAMES


@pytest.mark.parametrize("weights", WEIGHTS, ids=NAMES)
@pytest.mark.parametrize("accumulation", [2, 3])
@pytest.mark.parametrize("name", DISTILLERS)
def test_curves_end_as_textbrewers(name, accumulation, weights, tmp_path, x64):
    training = {"gradient_accumulation_steps": accumulation}
    theirs, ours = DISTILLERS[name](weights, training, tmp_path)
    points = 4 * accumulation if name == "MultiTaskDistiller" else 2 * COUNT
    assert_equal_runs(theirs, ours, 1e-6, points)


@pytest.mark.parametrize("accumulation", [2, 3])
def test_the_trainers_curve_ends_as_textbrewers(accumulation, tmp_path, x64):
    job = Job(
        {},
        training={"gradient_accumulation_steps": accumulation},
        train={"num_epochs": 2},
    )
    model, twin = twins(2, "float64", **POOLED)
    (their_config, _), (our_config, _) = configs(job, tmp_path)
    losses = adaptor({key: None for key in ("logits", "hidden", "attention", "inputs_mask")})
    theirs = textbrewer.BasicTrainer(their_config, twin, losses)
    ours = jaxbrewer.BasicTrainer(our_config, model, losses)
    found = run(job, theirs, ours, batches(3, COUNT), tmp_path, twin)
    assert_equal_runs(*found, 1e-6, 2 * COUNT)
