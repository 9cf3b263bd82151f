"""The plan: names resolved, weights in a table, and TextBrewer's schedule as step numbers."""

import itertools
from collections.abc import Callable

import jax.numpy as jnp
import numpy as np
import pytest

from jaxbrewer import DistillationConfig, TrainingConfig, presets
from jaxbrewer.configurations.checks import Options
from jaxbrewer.objective.plan import Weight, plan_terms, resolve
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
    assert (plan.kd.temperature.initial, plan.kd.probability_shift, plan.kd.required) == (
        8,
        True,
        True,
    )
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
    assert [m.weight.initial for m in plan.matches] == [1, 0.5, 0, 1]
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


# --------------------------------------------------------------------------- options and schedules


def test_options_are_bound_in_order_and_by_name():
    for given in (["jsd", 0.25], ["jsd", {"beta": 0.25}]):
        config = DistillationConfig(kd_loss_type=given)
        plan, problems = resolve(config, logits_required=True)
        assert problems == []
        assert plan.kd.loss.func is presets.KD_LOSS_MAP["jsd"]
        assert plan.kd.loss.keywords == {"beta": 0.25}
        assert DistillationConfig.from_dict(config.to_dict()) == config
        assert config.to_dict()["kd_loss_type"] == given
    words = {
        ("jsd", 0.25): "jsd(0.25)",
        ("kl", Options({"scale_by_t2": True})): "kl(scale_by_t2=True)",
        "ce": "ce",
    }
    assert {given: presets.in_words(given) for given in words} == words
    assert DistillationConfig(kd_loss_type=["ce"]).kd_loss_type == "ce"


def test_options_that_a_loss_has_not(monkeypatch):
    monkeypatch.setitem(presets.KD_LOSS_MAP, "plain", lambda S, T, temperature: 0.0)
    for given, said in (
        (["jsd", {"betta": 1}], "'jsd' has no option 'betta': did you mean 'beta'?"),
        (["jsd", 0.1, True, False, 1], "takes 3 options, beta, standardize, scale_by_t2; got 4"),
        (["dkd", {"labels": 1}], "'dkd' has no option 'labels'"),
        (["plain", 1], "'plain' takes no options: its function has no parameters after *"),
        (["jds", 1], "kd_loss_type='jds' is not a known loss: did you mean 'jsd'?"),
    ):
        plan, problems = resolve(DistillationConfig(kd_loss_type=given), logits_required=True)
        assert plan.kd is None
        assert len(problems) == 1 and said in problems[0]
    config = DistillationConfig(intermediate_matches=[match(loss=["infonce", {"t": 1}])])
    _, problems = resolve(config, logits_required=True)
    assert problems[0].startswith("intermediate_matches[0].loss: 'infonce' has no option 't'")


def test_matches_of_one_tag_are_told_apart():
    config = DistillationConfig(
        intermediate_matches=[match(loss="cka"), match(loss="cka"), match(loss=["cka"])]
    )
    plan, _ = resolve(config, logits_required=True)
    assert [m.tag.removeprefix("unweighted_hidden_") for m in plan.matches] == [
        "cka_0_0", "cka_0_0_2", "cka_0_0_3",
    ]  # fmt: skip


def test_what_is_scheduled_has_a_column():
    config = DistillationConfig(
        temperature=8,
        base_temperature_scheduler=["linear", {"start": 8, "end": 2}],
        intermediate_matches=[match(), match(weight=0, weight_scheduler=["step", 0.5])],
    )
    plan, _ = resolve(config, logits_required=True)
    scheduled = plan.scheduled
    assert scheduled.matches[0] is None
    np.testing.assert_allclose(scheduled.temperature.table(4), [8, 6.5, 5, 3.5, 2])
    np.testing.assert_allclose(scheduled.matches[1].table(4), [0, 0, 1, 1, 1])
    assert len(scheduled.columns) == 5
    assert plan_terms(plan)[0] == "1 × KD by 'ce', temperature 8, then by its scheduler"
    assert plan_terms(plan)[3].startswith("0, then by its scheduler × hidden")
    assert "weight_scheduler" not in config.to_dict()["intermediate_matches"][0]
    assert DistillationConfig.from_dict(config.to_dict()) == config
    plain, _ = resolve(DistillationConfig(), logits_required=True)
    assert len(plain.scheduled.columns) == 3
