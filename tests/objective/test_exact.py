"""Parts of a loss that are put together: uneven micro-batches make one batch, and rows weigh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbrewer import DistillationConfig, losses, presets
from jaxbrewer.objective.counted import counts, shares
from jaxbrewer.objective.loss import full_weights
from jaxbrewer.objective.objectives import HardLabels, PlanObjective
from jaxbrewer.objective.plan import without_options

ROWS, LENGTH, WIDTH, HEADS, CLASSES = 10, 6, 8, 2, 4
CUTS = (slice(0, 2), slice(2, 6), slice(6, 10))
RNG = np.random.default_rng(0)

COUPLED = {"dist", "rkd_distance", "rkd_angle", "similarity", "cka", "infonce"}
OF_ATTENTION = {name for name in presets.MATCH_LOSS_MAP if name.startswith("attention")}
OF_HEADS = {"relation"}
OF_VECTORS = {"rkd_distance", "rkd_angle", "infonce"}
OF_TWO = {"fsp", "gram", "mmd", "nst"}


def normal(*shape):
    return jnp.asarray(RNG.normal(size=shape))


def mask():
    kept = np.arange(LENGTH) < RNG.integers(1, LENGTH + 1, (ROWS, 1))
    return jnp.asarray(kept.astype(np.int32))


def results(*, dims=3, weights=False, labels=True):
    """Both sides' results of ten examples with padding, of which some have no label."""
    kept = mask()
    shape = (ROWS, LENGTH, CLASSES) if dims == 3 else (ROWS, CLASSES)

    def side():
        return {
            "logits": (normal(*shape),),
            "hidden": tuple(normal(ROWS, LENGTH, WIDTH) for _ in range(3)),
            "attention": tuple(normal(ROWS, HEADS, LENGTH, LENGTH) for _ in range(2)),
            "query": (normal(ROWS, HEADS, LENGTH, WIDTH),),
            "embedding": (normal(ROWS, WIDTH),),
        }

    S, T = side(), side()
    if dims == 3:
        S["logits_mask"] = T["logits_mask"] = (kept,)
    if labels:
        S["labels"] = (jnp.asarray(RNG.integers(-1, CLASSES, shape[:-1])),)
    S["losses"] = (jnp.abs(normal(ROWS, LENGTH)), jnp.abs(normal(ROWS)))
    S["losses_mask"] = (kept, jnp.asarray(RNG.integers(0, 2, ROWS)))
    S["inputs_mask"] = kept
    if weights:
        S["sample_weight"] = jnp.asarray(RNG.uniform(0.1, 2, ROWS)).at[3].set(0)
    return S, T


def objective(S, T, *, exact, **config):
    plain = PlanObjective.of(DistillationConfig(**config), logits_required=False)
    problems = []
    shapes = jax.eval_shape(lambda: (S, T))
    return plain.counted(*shapes, {}, problems, is_exact=exact), problems


def cut(results, part):
    return jax.tree.map(lambda x: x[part], results)


def value(objective, S, T, share=None):
    """A batch's loss; with what its parts are multiplied by, if given."""
    weights = full_weights()
    if share is not None:
        row = jnp.concatenate([jnp.ones(len(objective.scheduled.columns)), share])
        weights = objective.scheduled.read(row)
    return objective(S, T, None, weights).total


def assert_exact(objective, S, T):
    """Three uneven micro-batches, each with its shares, have the mean of one batch."""

    @jax.jit
    def both(S, T):
        parts = [(cut(S, at), cut(T, at)) for at in CUTS]
        share = shares([objective.counts(*part) for part in parts], [""] * len(parts))
        seen = [value(objective, *part, s) for part, s in zip(parts, share, strict=True)]
        return value(objective, S, T), seen

    whole, seen = both(S, T)
    np.testing.assert_allclose(np.mean(seen), whole, rtol=1e-9)


def match(name):
    kinds = {"attention": OF_ATTENTION, "query": OF_HEADS, "embedding": OF_VECTORS}
    feature = next((kind for kind, names in kinds.items() if name in names), "hidden")
    layer = [0, 1] if name in OF_TWO else 0
    return {"layer_T": layer, "layer_S": layer, "weight": 1.0, "loss": name, "feature": feature}


@pytest.mark.parametrize("name", presets.KD_LOSS_MAP)
def test_every_kd_loss_is_exact_or_refused(name, x64):
    S, T = results(dims=2 if name in ("dkd", "mse", "jsd") else 3)
    made, problems = objective(S, T, exact=True, kd_loss_type=name, hard_label_weight=0)
    if name in COUPLED:
        assert f"{name!r} is no mean" in problems[0]
    else:
        assert not problems
        assert_exact(made, S, T)


@pytest.mark.parametrize("name", presets.MATCH_LOSS_MAP)
def test_every_match_is_exact_or_refused(name, x64):
    S, T = results()
    config = {"intermediate_matches": [match(name)], "kd_loss_weight": 0, "hard_label_weight": 0}
    made, problems = objective(S, T, exact=True, **config)
    if name in COUPLED:
        assert name in problems[0]
    else:
        assert not problems
        assert_exact(made, S, T)


def test_what_is_refused_compares_examples():
    tables = {**presets.KD_LOSS_MAP, **presets.MATCH_LOSS_MAP}
    assert {n for n, f in tables.items() if without_options(f) in losses.COUPLING} == COUPLED


def test_hard_labels_are_exact(x64):
    S, T = results()
    made, problems = objective(S, T, exact=True, kd_loss_weight=0, hard_label_weight=1)
    assert not problems
    assert_exact(made, S, T)
    alone = HardLabels().counted(S, T, {}, problems, is_exact=True)
    assert_exact(alone, S, T)


def test_labels_of_probability_shift_and_float_masks_are_counted(x64):
    S, T = results()
    S["inputs_mask"] = S["inputs_mask"] * jnp.asarray(RNG.uniform(0.2, 1, (ROWS, LENGTH)))
    config = {
        "probability_shift": True,
        "intermediate_matches": [match("hidden_mse"), match("cos")],
    }
    made, problems = objective(S, T, exact=True, **config)
    assert not problems
    assert made.plan.units["unweighted_hidden_hidden_mse_0_0"] == ("position",)
    assert_exact(made, S, T)


@pytest.mark.parametrize("scheduler", [["flsw", 1, 2], ["cwsm", 1]])
def test_a_temperature_by_position_is_tried_with_its_loss(scheduler, x64):
    S, T = results(dims=2)
    made, problems = objective(S, T, exact=True, temperature_scheduler=scheduler)
    if problems:
        assert "temperature_scheduler" in problems[0]
    else:
        assert_exact(made, S, T)


def test_a_loss_of_ones_own_is_tried(x64, monkeypatch):
    monkeypatch.setitem(
        presets.KD_LOSS_MAP, "per_row", lambda S, T, temperature: jnp.mean(jnp.abs(S - T))
    )
    monkeypatch.setitem(
        presets.KD_LOSS_MAP, "summed", lambda S, T, temperature: jnp.sum(jnp.abs(S - T))
    )
    S, T = results(dims=2)
    made, problems = objective(S, T, exact=True, kd_loss_type="per_row", hard_label_weight=0)
    assert not problems
    assert_exact(made, S, T)
    _, problems = objective(S, T, exact=True, kd_loss_type="summed", hard_label_weight=0)
    assert "'summed' is no mean" in problems[0]


def test_a_scalar_loss_is_refused_with_the_line_to_write():
    S, T = results()
    S["losses"] = (jnp.float32(1.0),)
    _, problems = objective(S, T, exact=True, hard_label_weight=1)
    assert "'losses'[0] is one number" in problems[0]
    assert "jaxbrewer.zoo.adaptor(task, each=True)" in problems[0]


def test_a_part_that_a_micro_batch_has_none_of(x64):
    S, T = results()
    S["inputs_mask"] = S["inputs_mask"].at[:2].set(0)
    S["losses_mask"] = (S["losses_mask"][0].at[:2].set(0), S["losses_mask"][1].at[:2].set(0))
    made, _ = objective(
        S, T, exact=True, hard_label_weight=1, intermediate_matches=[match("hidden_mse")]
    )
    assert_exact(made, S, T)


def test_tasks_have_their_share_of_the_window():
    window = [jnp.asarray([3.0]), jnp.asarray([1.0]), jnp.asarray([7.0])]
    np.testing.assert_allclose(jnp.stack(shares(window, "aab"))[:, 0], [1.5, 0.5, 1.0])


def test_pairs_of_positions_are_squares():
    found = counts(2, jnp.asarray([[1, 1, 1], [1, 0, 0]]))
    np.testing.assert_array_equal(found["pair"], [9, 1])
    np.testing.assert_array_equal(found["selected"], [3, 1])


# ------------------------------------------------------------------------------- sample_weight


@pytest.mark.parametrize("dims", [2, 3])
def test_weights_of_one_change_nothing_and_whole_ones_repeat_an_example(dims, x64):
    S, T = results(dims=dims)
    config = {
        "hard_label_weight": 1,
        "kd_loss_type": "dkd",
        "intermediate_matches": [match("hidden_mse"), match("attention_mse")],
    }
    plain, _ = objective(S, T, exact=False, **config)
    run = jax.jit(lambda S, T: value(plain, S, T))
    found = run({**S, "sample_weight": jnp.ones(ROWS)}, T)
    np.testing.assert_allclose(found, run(S, T), rtol=1e-12)
    times = np.array([0, 1, 2, 3, 1, 0, 1, 2, 0, 0])  # ten again, so that nothing new compiles
    weighed = run({**S, "sample_weight": jnp.asarray(times)}, T)
    repeated = jax.tree.map(lambda x: np.repeat(x, times, axis=0), (S, T))
    np.testing.assert_allclose(weighed, run(*repeated), rtol=1e-12)


def test_weights_are_exact_too(x64):
    S, T = results(weights=True)
    config = {"hard_label_weight": 1, "intermediate_matches": [match("attention_mse")]}
    made, problems = objective(S, T, exact=True, **config)
    assert not problems
    assert_exact(made, S, T)


def test_weights_with_two_tokenizers(x64):
    """Positions that are paired in order take their example's weight along."""
    S, T = results(weights=True, labels=False)
    lengths = RNG.permuted(np.tile([2, 3, 4, 5, 6], (2, 1))).reshape(-1)
    first = np.arange(LENGTH) < lengths[:, None]
    S["logits_mask"] = (jnp.asarray(first),)
    T["logits_mask"] = (jnp.asarray(first[:, ::-1]),)
    made, _ = objective(S, T, exact=False, hard_label_weight=0)
    run = jax.jit(lambda S, T: value(made, S, T))
    whole = run(S, T)
    each, n = [], lengths * np.asarray(S["sample_weight"])
    del S["sample_weight"]
    for row in range(ROWS):
        each.append(run(*cut((S, T), slice(row, row + 1))))
    np.testing.assert_allclose(whole, np.dot(each, n) / n.sum(), rtol=1e-12)
