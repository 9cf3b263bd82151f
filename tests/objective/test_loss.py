"""The objective against TextBrewer's own functions, on the same numbers."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbrewer import losses, presets
from jaxbrewer.objective import loss as objective
from jaxbrewer.objective import probes
from jaxbrewer.objective.loss import Weights, distillation_loss, kd_term, probability_shift
from jaxbrewer.objective.plan import KD, Match, Plan, Weight

from .. import fn_job

CLASSES = 5
RNG = np.random.default_rng(0)


def logits(*shape, dtype="float64"):
    return RNG.normal(0, 2, (*shape, CLASSES)).astype(dtype)


def kd(loss=losses.kd_ce_loss, temperature=3.0, scheduler=None, shift=False):
    return KD(loss, "name", Weight(temperature), scheduler, shift, True)


def results(logits, mask=None, labels=None):
    found = {"logits": logits, "logits_mask": mask, "labels": labels}
    return {
        name: tuple(map(jnp.asarray, value if isinstance(value, list) else [value]))
        for name, value in found.items()
        if value is not None
    }


def term(kd, *sides):
    """The KD term and the surplus, compiled."""
    return jax.jit(lambda S, T: kd_term(kd, S, T))(*sides)


# ---------------------------------------------------------------------------- probability shift


@pytest.mark.torch
@pytest.mark.parametrize("shape", [(7,), (4, 6)])
def test_probability_shift_is_textbrewers(shape, x64):
    import torch
    from textbrewer.distiller_utils import probability_shift_

    teacher = logits(*shape)
    labels = RNG.integers(0, CLASSES, shape)
    if len(shape) == 2:
        labels[:, ::3] = -100
    expected = probability_shift_(torch.tensor(teacher), torch.tensor(labels)).numpy()
    before = teacher.copy()
    shifted = probability_shift(jnp.asarray(teacher), jnp.asarray(labels))
    np.testing.assert_array_equal(shifted, expected)
    np.testing.assert_array_equal(teacher, before)
    assert np.all(np.asarray(shifted).argmax(-1)[labels >= 0] == labels[labels >= 0])


def test_negative_labels_leave_two_dimensions_alone_too():
    teacher = logits(3, dtype="float32")
    np.testing.assert_array_equal(probability_shift(teacher, jnp.array([-1, -100, -1])), teacher)


def test_labels_beyond_the_classes_give_nan_and_not_another_class():
    shifted = np.asarray(probability_shift(logits(2, dtype="float32"), jnp.array([1, CLASSES])))
    assert not np.isnan(shifted[0]).any()
    assert np.isnan(shifted[1]).any()


@pytest.mark.torch
@pytest.mark.parametrize("labels", [[4, 4], [0, 3]])
def test_equal_logits_shift_like_textbrewers(labels, x64):
    import torch
    from textbrewer.distiller_utils import probability_shift_

    teacher = np.zeros((2, CLASSES))
    expected = probability_shift_(torch.tensor(teacher.copy()), torch.tensor(labels)).numpy()
    np.testing.assert_array_equal(probability_shift(teacher, jnp.array(labels)), expected)


# -------------------------------------------------------------------------- masks of each side

SCHEDULES = {
    "none": None,
    "flsw": presets.TEMPERATURE_SCHEDULER[["flsw", 1, 2]],
    "cwsm": presets.TEMPERATURE_SCHEDULER[["cwsm", 1]],
}


def torch_kd(name):
    """TextBrewer's loss of that name."""
    from textbrewer import losses

    return {"ce": losses.kd_ce_loss, "mse": losses.kd_mse_loss}[name]


def torch_schedule(name):
    """TextBrewer's twin of a schedule above."""
    from textbrewer import schedulers

    return {
        "none": None,
        "flsw": schedulers.flsw_temperature_scheduler_builder(1, 2),
        "cwsm": schedulers.cwsm_temperature_scheduler_builder(1),
    }[name]


def textbrewers_kd(loss, schedule, S, T, mask_S, mask_T):
    """Selects on each side, then compares: TextBrewer's own functions."""

    import torch
    from textbrewer.distiller_utils import select_logits_with_mask

    S, T, mask_S, mask_T = (
        [torch.tensor(x) for x in side] for side in (S, T, mask_S, mask_T)
    )  # fmt: skip
    selected = select_logits_with_mask(S, mask_S), select_logits_with_mask(T, mask_T)
    total = 0
    for l_S, l_T in zip(*selected, strict=True):
        temperature = 3.0 if schedule is None else schedule(l_S, l_T, 3.0)
        total += torch_kd(loss)(l_S, l_T, temperature)
    return total.item()


def masks(rows, length_S, length_T, per_side, kind=np.int64):
    """Random masks that select as many on both sides, but not as many in each row."""
    flat = []
    count = int(RNG.integers(1, rows * min(length_S, length_T)))
    for length in (length_S, length_T):
        mask = np.zeros(rows * length, kind)
        mask[RNG.permutation(rows * length)[:count]] = 1
        flat.append(mask.reshape(rows, length))
    return flat if per_side else [flat[0], flat[0].copy()]


@pytest.mark.torch
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("loss", ["ce", "mse"])
def test_masks_equal_torchs_selection(loss, schedule, x64):
    ours, theirs = SCHEDULES[schedule], torch_schedule(schedule)
    setting = kd(presets.KD_LOSS_MAP[loss], scheduler=ours)
    for lengths, per_side, kind in [
        ((6, 6), True, bool),
        ((4, 9), True, np.int64),
        ((8, 3), True, np.float64),
    ]:
        S, T = logits(3, lengths[0]), logits(3, lengths[1])
        mask_S, mask_T = masks(3, *lengths, per_side, kind)
        expected = textbrewers_kd(loss, theirs, [S], [T], [mask_S], [mask_T])
        value, surplus = term(setting, results(S, mask_S), results(T, mask_T))
        np.testing.assert_allclose(value, expected, rtol=1e-10)
        assert surplus == 0


@pytest.mark.torch
def test_one_mask_that_both_adaptors_return_is_a_weight(x64):
    """The very same array on both sides, as a batch that feeds both gives it."""
    S, T, (mask, _) = logits(3, 6), logits(3, 6), masks(3, 6, 6, True)
    expected = textbrewers_kd("ce", None, [S], [T], [mask], [mask])

    @jax.jit
    def shared(mask):
        one, two = results(S), results(T)
        return kd_term(kd(), {**one, "logits_mask": (mask,)}, {**two, "logits_mask": (mask,)})

    value, surplus = shared(mask)
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    assert surplus == 0
    assert "sort" not in str(jax.make_jaxpr(shared)(mask))


@pytest.mark.torch
def test_several_logits_share_a_mask_or_have_one_each(x64):
    S, T = [logits(3, 6) for _ in range(2)], [logits(3, 4) for _ in range(2)]
    pairs = [masks(3, 6, 4, True) for _ in range(2)]
    mask_S, mask_T = [p[0] for p in pairs], [p[1] for p in pairs]
    expected = textbrewers_kd("ce", None, S, T, mask_S, mask_T)
    value, _ = term(kd(), results(S, mask_S), results(T, mask_T))
    np.testing.assert_allclose(value, expected, rtol=1e-10)
    # TextBrewer breaks on one mask for several three-dimensional logits; give it copies.
    expected = textbrewers_kd("ce", None, S, T, mask_S[:1] * 2, mask_T[:1] * 2)
    value, _ = term(kd(), results(S, mask_S[0]), results(T, mask_T[0]))
    np.testing.assert_allclose(value, expected, rtol=1e-10)


@pytest.mark.torch
def test_masks_do_not_touch_two_dimensions(x64):
    import torch

    S, T = logits(4), logits(4)
    expected = torch_kd("ce")(torch.tensor(S), torch.tensor(T), 3.0)
    value, surplus = term(kd(), results(S, np.zeros((4, 6))), results(T, np.ones((4, 6))))
    np.testing.assert_allclose(value, expected, rtol=1e-12)
    assert surplus == 0


def test_unselected_positions_may_hold_anything(x64):
    S, T = logits(3, 6), logits(3, 4)
    mask_S, mask_T = masks(3, 6, 4, True)
    clean = term(kd(), results(S, mask_S), results(T, mask_T))[0]

    def value(S, T):
        return kd_term(kd(), results(S, mask_S), results(T, mask_T))[0]

    S[mask_S == 0], T[mask_T == 0] = np.nan, np.inf
    dirty, gradient = jax.jit(jax.value_and_grad(value))(jnp.asarray(S), jnp.asarray(T))
    np.testing.assert_allclose(dirty, clean, rtol=1e-12)
    assert np.all(np.asarray(gradient)[mask_S == 0] == 0)
    assert np.all(np.isfinite(gradient))


@pytest.mark.torch
def test_shift_with_masks_selects_the_students_labels(x64):
    """TextBrewer raises here; the shift of each selected position alone is what is meant."""

    import torch
    from textbrewer.distiller_utils import probability_shift_

    S, T = logits(3, 6), logits(3, 4)
    mask_S, mask_T = masks(3, 6, 4, True)
    labels = RNG.integers(0, CLASSES, (3, 6))
    selected = labels[mask_S != 0]
    shifted = probability_shift_(torch.tensor(T[mask_T != 0]), torch.tensor(selected))
    expected = torch_kd("ce")(torch.tensor(S[mask_S != 0]), shifted, 3.0).item()
    value, _ = term(kd(shift=True), results(S, mask_S, labels), results(T, mask_T))
    np.testing.assert_allclose(value, expected, rtol=1e-10)


def test_labels_count_only_for_the_shift():
    S, T = [logits(4, dtype="float32") for _ in range(2)], [logits(4, dtype="float32")] * 2
    one_label = results(S, labels=np.zeros(4, int))
    np.testing.assert_array_equal(
        term(kd(), one_label, results(T))[0], term(kd(), results(S), results(T))[0]
    )


def test_shift_without_labels_says_so():
    S = results(logits(4, dtype="float32"))
    with pytest.raises(ValueError, match="adaptor_S to return 'labels'"):
        kd_term(kd(shift=True), S, S)


# --------------------------------------------------------------------------------- the surplus


@pytest.mark.parametrize(
    ("counts_S", "counts_T", "surplus"),
    [([5], [5], 0), ([7], [5], 2), ([2], [5], -3), ([5, 5], [4, 6], 1), ([1, 5], [3, 4], -2)],
)
def test_masks_that_select_unequally_are_reported(counts_S, counts_T, surplus):
    def side(counts, length):
        selected = [np.arange(2 * length).reshape(2, length) < n for n in counts]
        return results([logits(2, length, dtype="float32") for _ in counts], selected)

    value, found = term(kd(), side(counts_S, 6), side(counts_T, 4))
    assert found == surplus
    assert np.isfinite(value)


# ---------------------------------------------------------------------- functions of the user's


def with_mask(S, T, temperature, mask=None):
    each = jnp.sum(jnp.abs(S - T), -1) / temperature
    if mask is None:
        return jnp.mean(each)
    return jnp.sum(jnp.where(mask, each, 0)) / jnp.sum(mask)


def by_mean(S, T, temperature):
    temperature = temperature[:, None] if jnp.ndim(temperature) else temperature
    return jnp.mean(jnp.sum(jnp.abs(S - T) / temperature, -1))


def by_batchmean(S, T, temperature):
    """As torch's KL divergence with reduction='batchmean'."""
    p, q = jax.nn.softmax(T / temperature), jax.nn.log_softmax(S / temperature)
    return jnp.sum(p * (jnp.log(p) - q)) / S.shape[0]


def by_sum(S, T, temperature):
    return jnp.sum(jnp.abs(S - T))


def by_largest(S, T, temperature):
    return jnp.max(jnp.abs(S - T))


def swallowing(S, T, temperature, **options):
    return jnp.mean(jnp.abs(S - T))


@pytest.mark.parametrize("loss", [with_mask, by_mean, by_batchmean])
@pytest.mark.parametrize("per_side", [False, True])
def test_users_losses_equal_selection(loss, per_side, x64):
    S, T = logits(3, 6), logits(3, 6)
    mask_S, mask_T = masks(3, 6, 6, per_side)
    S[mask_S == 0] = np.nan
    value, _ = term(kd(loss), results(S, mask_S), results(T, mask_T))
    np.testing.assert_allclose(
        value, loss(jnp.array(S[mask_S == 1]), jnp.array(T[mask_T == 1]), 3.0), rtol=1e-10
    )


@pytest.mark.torch
def test_a_users_loss_gets_temperatures_by_position(x64):
    import torch

    S, T, (mask, _) = logits(3, 6), logits(3, 6), masks(3, 6, 6, True)
    ours, theirs = SCHEDULES["flsw"], torch_schedule("flsw")
    S_, T_ = S[mask == 1], T[mask == 1]
    temperature = theirs(torch.tensor(S_), torch.tensor(T_), 3.0).numpy()
    value, _ = term(kd(by_mean, scheduler=ours), results(S, mask), results(T, mask))
    np.testing.assert_allclose(value, by_mean(S_, T_, temperature), rtol=1e-10)


def test_an_empty_mask_gives_zero():
    S, nothing = logits(3, 6, dtype="float32"), np.zeros((3, 6))
    for loss in (losses.kd_ce_loss, by_mean):
        assert term(kd(loss), results(S, nothing), results(S, nothing)) == (0, 0)


def positionwise(S, T, base):
    return base + jnp.max(S, -1)


def positionwise_dangerous(S, T, base):
    return base / jnp.sum(jnp.abs(S), -1)  # what lies at unselected positions may give inf


def masked_mean(S, T, base, mask=None):
    top = jnp.max(S, -1)
    return base + top - (jnp.mean(top) if mask is None else jnp.mean(top, where=mask))


@pytest.mark.parametrize("scheduler", [positionwise, positionwise_dangerous, masked_mean])
def test_users_temperatures_equal_selection(scheduler, x64):
    S, T, (mask_S, mask_T) = logits(3, 6), logits(3, 6), masks(3, 6, 6, True)
    S_, T_ = jnp.array(S[mask_S == 1]), jnp.array(T[mask_T == 1])
    expected = losses.kd_ce_loss(S_, T_, scheduler(S_, T_, 3.0))
    S[mask_S == 0] = 0
    value, _ = term(kd(scheduler=scheduler), results(S, mask_S), results(T, mask_T))
    np.testing.assert_allclose(value, expected, rtol=1e-10)


def test_what_functions_do_is_found_by_trying():
    assert objective.takes_mask(with_mask)
    assert objective.takes_mask(swallowing)
    assert not objective.takes_mask(by_mean)
    for loss, fine in [(by_mean, True), (by_batchmean, True), (by_sum, False), (by_largest, False)]:
        assert probes.is_position_mean(loss) is fine
    assert probes.is_positionwise(positionwise)
    assert probes.is_positionwise(presets.TEMPERATURE_SCHEDULER["constant"])
    assert not probes.is_positionwise(lambda S, T, base: base + jnp.mean(S))
    assert not probes.is_positionwise(lambda S, T, base: jnp.max(S, -1) - jnp.mean(S))
    taid = presets.bound(presets.KD_LOSS_MAP, "taid")
    ours = [loss for loss in presets.KD_LOSS_MAP.values() if not isinstance(loss, type)]
    ours.append(functools.partial(taid, state=taid.init()))
    for function in (with_mask, masked_mean, *ours, SCHEDULES["flsw"]):
        assert probes.heeds_mask(function)
    assert not probes.heeds_mask(swallowing)


# ---------------------------------------------------------------------- matches and the whole sum


def a_match(loss, layer_S=0, layer_T=0, weight=1.0, projection=None, tag="match"):
    weight = weight if isinstance(weight, Weight) else Weight(weight)
    return Match("hidden", layer_S, layer_T, loss, "name", weight, projection, None, {}, tag)


def states(count, width=CLASSES, seed=1):
    rng = np.random.default_rng(seed)
    return tuple(jnp.asarray(rng.normal(size=(2, 3, width)), jnp.float32) for _ in range(count))


def test_layers_are_picked_and_only_the_students_mask_is_used():
    seen = []

    def loss(S, T, mask=None):
        seen.append((S, T, mask))
        return jnp.float32(0)

    mask = jnp.ones((2, 3))
    S, T = states(3), (None, *states(4))
    results_S = {"hidden": S, "inputs_mask": mask}
    results_T = {"hidden": T, "inputs_mask": mask * 0}
    objective.match_term(a_match(loss, -1, 4), results_S, results_T, None)
    objective.match_term(a_match(loss, (0, 2), (1, 3)), results_S, {"hidden": T}, None)
    objective.match_term(a_match(loss), {"hidden": S}, {"hidden": S}, None)
    assert seen[0][0] is S[2]
    assert seen[0][1] is T[4]
    assert seen[0][2] is mask
    assert [x is y for x, y in zip(seen[1][0], (S[0], S[2]), strict=True)] == [True, True]
    assert [x is y for x, y in zip(seen[1][1], (T[1], T[3]), strict=True)] == [True, True]
    assert seen[2][2] is None


def test_no_mask_applies_to_embeddings():
    S, T = states(1)[0][:, 0], states(1, seed=2)[0][:, 0]
    match = dataclasses.replace(a_match(losses.cos_loss), feature="embedding")
    results_S = {"embedding": (S,), "inputs_mask": jnp.ones((2, 3))}
    value = objective.match_term(match, results_S, {"embedding": (T,)}, None)
    np.testing.assert_allclose(value, losses.cos_loss(S, T), rtol=1e-6)


def test_projections_act_on_the_student():
    S, T = states(2, width=4), states(2, width=5, seed=2)
    kernel = jnp.ones((4, 5))
    calls = []

    def project(name, x):
        calls.append(name)
        return x @ kernel

    value = objective.match_term(
        a_match(losses.hid_mse_loss, projection="7"), {"hidden": S}, {"hidden": T}, project
    )
    np.testing.assert_allclose(value, losses.hid_mse_loss(S[0] @ kernel, T[0]), rtol=1e-6)
    objective.match_term(
        a_match(losses.fsp_loss, (0, 1), (0, 1), projection="7"), {"hidden": S}, {"hidden": T}, project
    )  # fmt: skip
    assert calls == ["7"] * 3


def test_halves_are_compared_in_float32():
    seen = []

    def loss(S, T, mask=None):
        seen.append((S.dtype, T.dtype))
        return jnp.mean(S - T)

    halves = tuple(x.astype(jnp.bfloat16) for x in states(1))
    value = objective.match_term(a_match(loss), {"hidden": halves}, {"hidden": states(1)}, None)
    assert seen == [(jnp.float32, jnp.float32)]
    assert value.dtype == jnp.float32
    value, _ = kd_term(kd(by_mean), results(halves[0]), results(halves[0]))
    assert value.dtype == jnp.float32
    hard = objective.hard_label_term({"losses": (jnp.full(2**17, 3, jnp.float16),)})
    assert (hard, hard.dtype) == (3, jnp.float32)


def plan(kd_weight=1.0, hard=0.0, matches=(), kd_setting=None):
    return Plan(kd_setting or kd(), tuple(matches), Weight(kd_weight), Weight(hard), True)


def test_the_total_is_the_weighted_sum_of_the_named_terms():
    S, T = states(2), states(2, seed=5)
    results_S = results(S[0][:, 0]) | {"hidden": S, "losses": (jnp.arange(4.0), jnp.float32(2))}
    results_T = results(T[0][:, 0]) | {"hidden": T}
    matches = [a_match(losses.hid_mse_loss, 1, 1, 0.25, tag="a"), a_match(losses.cos_loss, tag="b")]
    found = distillation_loss(
        plan(0.5, 0.1, matches), results_S, results_T, None, Weights(kd=2.0, hard_label=3.0)
    )
    assert list(found.terms) == ["unweighted_kd_loss", "a", "b", "unweighted_hard_label_loss"]
    kd_value, a, b, hard = found.terms.values()
    assert hard == 3.5
    np.testing.assert_allclose(found.total, 2 * kd_value + 0.25 * a + b + 3 * hard, rtol=1e-6)
    # The scheduled weights are used, not the configured ones; a weight of 0 throughout drops it.
    found = distillation_loss(plan(0, 0), results_S, results_T, None, Weights(kd=2.0, hard_label=3))
    assert found.total == 0
    assert set(found.terms) == {"unweighted_kd_loss", "unweighted_hard_label_loss"}


@pytest.mark.parametrize("missing", ["S", "T"])
def test_without_logits_on_both_sides_there_is_no_kd(missing):
    both = {"S": results(logits(4, dtype="float32")), "T": results(logits(4, dtype="float32"))}
    both[missing] = {"losses": (jnp.float32(2),)} if missing == "S" else {}
    found = distillation_loss(plan(), both["S"], both["T"], None, Weights(1, 1))
    assert "unweighted_kd_loss" not in found.terms


# ----------------------------------------------------------------------------- weights of zero

LEARN = ["kd", "match", "hard"]


def branches(params, x):
    """Three features that share no parameters, one for each kind of term."""
    hidden = x @ params["match"] @ params["match"]
    return {
        "logits": (x[:, 0] @ params["kd"] @ params["kd"],),
        "hidden": (hidden,),
        "losses": (jnp.mean((x @ params["hard"] @ params["hard"]) ** 2),),
    }


def objective_of(weights, poison=None):
    """The total as a function of parameters; the poisoned term is NaN."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 40)), jnp.float32)
    teacher = branches({name: jnp.eye(40) for name in LEARN}, x)

    def loss(S, T, mask=None):
        return jnp.mean((S - T) ** 2) * (jnp.nan if poison == "match" else 1)

    def kd_loss(S, T, temperature):
        return jnp.mean((S - T) ** 2) * (jnp.nan if poison == "kd" else 1)

    made = plan(
        weights["kd"], weights["hard"], [a_match(loss, weight=weights["match"])], kd(kd_loss)
    )

    def total(params):
        S = branches(params, x)
        if poison == "hard":
            S["losses"] = (S["losses"][0] * jnp.nan,)
        found = distillation_loss(made, S, teacher, None, Weights(weights["kd"], weights["hard"]))
        return found.total, found.terms

    return total


ONES = dict.fromkeys(LEARN, 1.0)


@pytest.fixture(scope="module")
def compiled():
    """Compiles the gradient of an objective; with or without its terms as a second output."""

    @functools.cache
    def compile_(off=None, with_terms=True):
        total = objective_of(ONES | {off: 0.0} if off else ONES, poison=off)
        function = total if with_terms else lambda params: (total(params)[0], None)
        params = {name: jnp.eye(40) * (i + 2) for i, name in enumerate(LEARN)}
        program = jax.jit(jax.value_and_grad(function, has_aux=True)).lower(params).compile()
        return program, program(params)

    return compile_


@pytest.mark.parametrize("off", LEARN)
def test_a_weight_of_zero_has_no_gradient_and_costs_no_backward_pass(off, compiled):
    (full, _), (silent, found), (without, _) = compiled(), compiled(off), compiled(off, False)
    (total, terms), grads = found
    assert np.isfinite(total)  # though the term itself is NaN
    assert sum(map(int, map(np.isnan, terms.values()))) == 1
    for name in LEARN:
        assert np.all(np.isfinite(grads[name]))
        assert np.any(grads[name]) == (name != off)

    flops = [program.cost_analysis()["flops"] for program in (full, silent, without)]
    whole, logged = flops[0] - flops[2], flops[1] - flops[2]
    # Two products forward, three backward.
    assert 0 < logged < 0.5 * whole


@pytest.mark.torch
def test_every_kd_loss_of_the_presets_is_textbrewers_too(x64):
    import textbrewer
    import torch

    assert set(textbrewer.presets.KD_LOSS_MAP) <= set(presets.KD_LOSS_MAP)
    S, T = logits(4), logits(4)
    for name, temperature in itertools.product(("ce", "mse"), (1.0, 8.0)):
        expected = torch_kd(name)(torch.tensor(S), torch.tensor(T), temperature)
        value, _ = kd_term(kd(presets.KD_LOSS_MAP[name], temperature), results(S), results(T))
        np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_kd_of_token_logits_without_masks_takes_every_position():
    found = fn_job.tokens({}, {"tokens": jnp.asarray(logits(2, 4, dtype="float32"))})
    value, _ = kd_term(kd(by_mean_3d), results(found), results(found * 2))
    np.testing.assert_allclose(value, jnp.mean(jnp.abs(found)), rtol=1e-6)


def by_mean_3d(S, T, temperature):
    assert S.ndim == 3
    return jnp.mean(jnp.abs(S - T))


# ------------------------------------------------------------------------------ labels and schedules


def test_a_loss_that_names_labels_gets_them():
    S, T, labels = logits(6), logits(6), np.array([0, 1, -100, 2, 4, 3])
    value, _ = term(kd(losses.kd_dkd_loss), results(S, labels=labels), results(T))
    np.testing.assert_allclose(value, losses.kd_dkd_loss(S, T, 3.0, labels=labels), rtol=1e-6)
    chosen = labels >= 0
    alone = losses.kd_dkd_loss(S[chosen], T[chosen], 3.0, labels=labels[chosen])
    np.testing.assert_allclose(value, alone, rtol=1e-6)
    bound = functools.partial(losses.kd_dkd_loss, labels=labels)
    assert not objective.takes_labels(bound) and objective.takes_labels(losses.kd_dkd_loss)


@pytest.mark.parametrize("has_mask", [False, True])
def test_labels_go_with_their_positions_where_masks_select(has_mask):
    """One that takes no mask gets them position by position; both sides are compacted by theirs."""

    def by_label(logits_S, logits_T, temperature, mask=None, *, labels):
        each = labels * jnp.square(logits_S - logits_T).sum(-1)
        return jnp.mean(each) if mask is None else jnp.sum(each * mask) / jnp.sum(mask)

    def without_mask(logits_S, logits_T, temperature, *, labels):
        return by_label(logits_S, logits_T, temperature, labels=labels)

    loss = by_label if has_mask else without_mask
    S, T, labels = logits(2, 3), logits(2, 4), RNG.integers(0, CLASSES, (2, 3))
    mask_S, mask_T = np.array([[1, 0, 1], [1, 1, 0]]), np.array([[1, 1, 0, 0], [0, 0, 1, 1]])
    value, surplus = term(kd(loss), results(S, mask_S, labels), results(T, mask_T))
    expected = by_label(S[mask_S == 1], T[mask_T == 1], 3.0, labels=labels[mask_S == 1])
    assert surplus == 0
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    assert probes.is_position_mean(without_mask)
    assert probes.heeds_mask(by_label)


def test_scheduled_weights_and_temperatures_stand_in_for_the_configured_ones():
    S, T = results(logits(4)), results(logits(4))
    features = {"hidden": tuple(RNG.normal(size=(3, 2, 4)))}
    S, T = S | features, T | {"hidden": tuple(RNG.normal(size=(3, 2, 4)))}
    moving = Weight(0.0, lambda x: x)
    matches = (
        a_match(losses.hid_mse_loss, 0, 0, weight=2.0, tag="still"),
        a_match(losses.cos_loss, 1, 1, weight=moving, tag="late"),
    )
    setting = dataclasses.replace(kd(), temperature=Weight(3.0, lambda x: 1 + x))
    plan = Plan(setting, matches, Weight(1.0), Weight(0.0), False)
    assert plan.scheduled.columns[3:] == [setting.temperature, moving]
    weights = plan.scheduled.read(np.array([0.5, 0.0, 1.0, 2.0, 0.25]))
    assert (weights.temperature, weights.matches) == (2.0, (None, 0.25))

    def total(hidden_S, weights):
        return distillation_loss(plan, S | {"hidden": hidden_S}, T, None, weights)

    found = total(S["hidden"], weights)
    kd_now = kd_term(kd(temperature=2.0), S, T)[0]
    still, late = found.terms["still"], found.terms["late"]
    np.testing.assert_allclose(found.total, 0.5 * kd_now + 2 * still + 0.25 * late, rtol=1e-6)
    # A weight that is 0 now and grows later is in the graph from the start.
    gradient = jax.grad(lambda x: total(x, weights).total)(S["hidden"])
    assert np.abs(gradient[1]).max() > 0
    plain = total(S["hidden"], Weights(0.5, 0.0))
    assert plain.total == 0.5 * kd_term(kd(), S, T)[0] + 2 * still
