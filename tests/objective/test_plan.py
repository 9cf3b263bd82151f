"""The plan: names resolved, weights in a table, and TextBrewer's schedule as step numbers."""

import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbrewer import DistillationConfig, TrainingConfig, presets
from jaxbrewer.objective.plan import Weight, resolve
from jaxbrewer.training.timeline import Timeline

# -------------------------------------------------------------------------------------- weights


def textbrewers_weights(initial, scheduler, total):
    """Steps through training as TextBrewer does: each update uses the weight that stands there.

    The last is left standing for batches after the last update.
    """
    weight, used = initial, []
    for step in range(1, total + 1):
        used.append(weight)
        if scheduler is not None:
            weight = scheduler(step / total)
    return [*used, weight]


@pytest.mark.parametrize("total", [1, 2, 3, 7, 50])
@pytest.mark.parametrize("name", ["none", "linear_growth", "linear_decay"])
def test_weights_follow_textbrewers_rule(name, total):
    scheduler = None if name == "none" else presets.WEIGHT_SCHEDULER[name]
    table = Weight(0.3, scheduler).table(total)
    assert table.shape == (total + 1,)
    np.testing.assert_allclose(table, textbrewers_weights(0.3, scheduler, total), rtol=1e-15)


@pytest.mark.parametrize(
    "scheduler", [lambda x: x**2, lambda x: jnp.sin(x), lambda x: 1 if x < 0.5 else np.float32(2)]
)
def test_weights_by_any_function_of_the_fraction(scheduler):
    expected = [float(w) for w in textbrewers_weights(0.0, scheduler, 9)]
    np.testing.assert_allclose(Weight(0.0, scheduler).table(9), expected, rtol=1e-6)


def test_a_weight_is_zero_only_if_it_stays_so():
    assert Weight(0.0).is_zero
    assert not Weight(0.0, presets.WEIGHT_SCHEDULER["linear_growth"]).is_zero
    assert not Weight(0.1).is_zero
    assert not Weight(-1.0).is_zero


# ------------------------------------------------------------------------------------ schedules


def textbrewer_by_epochs(config, epochs, batches):
    """Where TextBrewer's loop over epochs saves: (step, epoch) in order, and the steps it takes."""
    n = batches // config.gradient_accumulation_steps
    points = {int(n * i / config.ckpt_frequency) for i in range(config.ckpt_frequency)}
    saved, step = [], 0
    for epoch in range(epochs):
        for batch in range(batches):
            if (batch + 1) % config.gradient_accumulation_steps:
                continue
            step += 1
            due = (epoch + 1) % config.ckpt_epoch_frequency == 0 or epoch + 1 == epochs
            if step % n in points and due:
                saved.append((step, epoch))
    return saved, step


def textbrewer_by_steps(ckpt_steps, steps):
    return [s for s in range(1, steps + 1) if s % ckpt_steps == 0 or s == steps]


GRID = list(
    itertools.product([1, 2, 5, 7, 12], [1, 2, 3, 5], [1, 2, 3, 4, 9], [1, 2, 3, 5], [1, 2, 3, 4])
)


def test_epochs_save_where_textbrewer_does():
    tried = 0
    for batches, accumulation, frequency, epoch_frequency, epochs in GRID:
        if batches < accumulation:
            continue  # nothing would be trained
        config = TrainingConfig(accumulation, frequency, epoch_frequency)
        timeline = Timeline.by_epochs(config, epochs, batches)
        saved, steps = textbrewer_by_epochs(config, epochs, batches)
        case = (batches, accumulation, frequency, epoch_frequency, epochs)
        assert timeline.total_steps == steps, case
        assert timeline.checkpoints() == [step for step, _ in saved], case
        n = timeline.steps_per_epoch
        for step in range(1, steps + 1):
            epoch = (step - 1) // n
            assert timeline.saves_at(step, epoch) == ((step, epoch) in saved), case
        assert steps in timeline.checkpoints(), case  # the end is always saved
        tried += 1
    assert tried > 800


@pytest.mark.parametrize("steps", [1, 2, 7, 12, 30])
@pytest.mark.parametrize("every", [1, 2, 5, 7, 30, 31, 100])
def test_steps_save_where_textbrewer_does(steps, every):
    timeline = Timeline.by_steps(TrainingConfig(3, ckpt_steps=every), steps)
    assert (timeline.total_steps, timeline.accumulation) == (steps, 3)
    expected = textbrewer_by_steps(every, steps)
    assert timeline.checkpoints() == expected
    assert [s for s in range(1, steps + 1) if timeline.saves_at(s, epoch=4)] == expected


def test_steps_without_a_frequency_save_at_the_end():
    timeline = Timeline.by_steps(TrainingConfig(ckpt_frequency=4), 10)
    assert timeline.checkpoints() == [10]


# -------------------------------------------------------------------------------------- resolve


def match(**changes):
    found = {"layer_T": 0, "layer_S": 0, "weight": 1, "loss": "hidden_mse", "feature": "hidden"}
    return found | changes


def test_names_become_functions_and_tags():
    config = DistillationConfig(
        temperature=8,
        temperature_scheduler=["flsw", 1, 2],
        hard_label_weight=0.5,
        hard_label_weight_scheduler="linear_decay",
        kd_loss_type="mse",
        probability_shift=True,
        intermediate_matches=[
            match(),
            match(layer_T=[0, 12], layer_S=[0, 3], loss="nst", weight=0.5),
            match(layer_T=-1, layer_S=-2, feature="attention", loss="attention_mse", weight=0),
            match(layer_T=8, layer_S=2, proj=["linear", 312, 768, {"lr": 1e-3}]),
        ],
    )
    plan, problems = resolve(config, logits_required=True)
    assert problems == []
    assert plan.kd.loss is presets.KD_LOSS_MAP["mse"]
    assert (plan.kd.temperature, plan.kd.probability_shift, plan.kd.required) == (8, True, True)
    assert isinstance(plan.kd.temperature_scheduler, Callable)
    assert plan.hard_label_weight.initial == 0.5
    assert plan.hard_label_weight.scheduler is presets.WEIGHT_SCHEDULER["linear_decay"]
    assert plan.kd_weight == Weight(1)
    assert [m.tag for m in plan.matches] == [
        "unweighted_hidden_hidden_mse_0_0",
        "unweighted_hidden_nst_0-3_0-12",
        "unweighted_attention_attention_mse_-2_-1",
        "unweighted_hidden_hidden_mse_2_8",
    ]
    assert [m.projection for m in plan.matches] == [None, None, None, "3"]
    projected = plan.matches[3]
    assert projected.proj == ("linear", 312, 768)
    assert projected.options == {"lr": 1e-3}
    assert str(plan.matches[1]) == "hidden T0-12 → S0-3 by nst"
    assert [m.weight for m in plan.matches] == [1, 0.5, 0, 1]
    assert resolve(DistillationConfig(), logits_required=False)[0].kd.required is False


def test_unknown_losses_are_all_named():
    config = DistillationConfig(
        kd_loss_type="cee",
        intermediate_matches=[match(loss="hidden_msee"), match(layer_S=1), match(loss="zzz")],
    )
    plan, problems = resolve(config, logits_required=True)
    assert plan.kd is None
    assert [m.layer_S for m in plan.matches] == [1]  # what is known can still be checked
    assert len(problems) == 3
    assert problems[0] == "kd_loss_type='cee' is not a known loss: did you mean 'ce'?"
    assert "intermediate_matches[0].loss='hidden_msee'" in problems[1]
    assert "did you mean 'hidden_mse'" in problems[1]
    assert "intermediate_matches[2].loss='zzz'" in problems[2]
    assert "choose from" in problems[2]


def test_losses_registered_after_the_config_count(monkeypatch):
    config = DistillationConfig(kd_loss_type="mine", intermediate_matches=[match(loss="mine")])
    monkeypatch.setitem(presets.KD_LOSS_MAP, "mine", len)
    monkeypatch.setitem(presets.MATCH_LOSS_MAP, "mine", max)
    plan, problems = resolve(config, logits_required=True)
    assert problems == []
    assert plan.kd.loss is len
    assert plan.matches[0].loss is max
