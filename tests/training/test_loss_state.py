"""Objectives with a state: it moves on once an optimizer step, is saved, resumed, and held back by faults."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbrewer
from jaxbrewer.losses.stateful import Taid
from jaxbrewer.training import stored
from tests import fn_job
from tests.losses.test_stateful import recurrence

KEYS = ("logits", "hidden", "losses")
TAID = {"temperature": 2, "kd_loss_type": ["taid", {"t_start": 0.1, "alpha": 0.2, "beta": 0.5}]}
BALANCED = {
    "temperature": 2,
    "balance": "hard_label",
    "hard_label_weight": 1,
    "intermediate_matches": [fn_job.match(2, 2, weight=0.5)],
}


class Running(jaxbrewer.GeneralDistiller):
    """The loss over the running mean of itself."""

    def compute_loss(self, results_S, results_T, project, weights):
        loss = super().compute_loss(results_S, results_T, project, weights)
        mean = weights.state["mean"]
        return loss.total / jnp.where(mean > 0, mean, 1), {
            "mean": mean,
            "plain": loss.total,
            **loss.terms,
        }

    def init_loss_state(self):
        return {"mean": jnp.zeros(()), "steps": jnp.int32(0)}

    def advance_loss_state(self, state, means, weights):
        mean = 0.5 * state["mean"] + 0.5 * means["plain"]
        return {"mean": mean, "steps": state["steps"] + 1}


def run(
    folder, config=TAID, cls=jaxbrewer.GeneralDistiller, steps=6, batches=None, resume=False, **more
):
    """What is logged, the trained arrays, and the last state of the objective."""
    distiller = fn_job.distiller(
        folder, config=config, keys=KEYS, log_dir=folder / "log", ckpt_steps=1, max_to_keep=99,
        resume=resume, cls=cls, **more,
    )  # fmt: skip
    batches = fn_job.batches(12, size=8) if batches is None else batches
    with distiller:
        distiller.train(fn_job.SGD, batches, num_steps=steps)
    arrays = jaxbrewer.training.read_scalars(folder / "log")
    logged = {tag: np.array(list(points.values())) for tag, points in arrays.items()}
    return logged, jax.tree.leaves(distiller.model_S.params)


def state_at(folder, step):
    """The objective's state in a checkpoint, by name."""
    saved = stored._as_saved(folder / "out" / f"gs{step}", "training")["objective"]
    return {name: float(x) for name, x in saved.items() if name.startswith("value.")}


@pytest.mark.parametrize("accumulation", [1, 2])
def test_taid_interpolates_by_its_recurrence(tmp_path, accumulation):
    """On the means of the steps' losses; and each step's loss is at the t before it."""
    logged, _ = run(tmp_path, gradient_accumulation_steps=accumulation)
    kd = logged["scalar/unweighted_kd_loss"].reshape(6, accumulation).mean(1)
    expected = recurrence(kd, t_start=0.1, alpha=0.2, beta=0.5)
    found = [state_at(tmp_path, step)["value.kd.t"] for step in range(1, 7)]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert expected[-1] > 0.5
    student, batch = fn_job.encoder(9), fn_job.batches(12, size=8)[accumulation]
    jaxbrewer.training.load_student(tmp_path / "out" / "gs1", student)
    S, T = (fn_job.encode(m.params, batch["ids"])["logits"] for m in (student, fn_job.encoder(1)))
    loss = Taid()(S, T, 2, state={"t": jnp.float32(found[0])})
    np.testing.assert_allclose(logged["scalar/unweighted_kd_loss"][accumulation], loss, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "cls"),
    [(TAID, jaxbrewer.GeneralDistiller), (BALANCED, jaxbrewer.GeneralDistiller), (TAID, Running)],
    ids=["taid", "balance", "own"],
)
@pytest.mark.parametrize("more", [{}, {"gradient_accumulation_steps": 2}], ids=str)
def test_a_resumed_run_ends_in_the_same_bits(tmp_path, config, cls, more):
    _, expected = run(tmp_path / "whole", config, cls, **more)
    run(tmp_path / "cut", config, cls, **more)
    for step in (4, 5, 6):
        (tmp_path / "cut" / "out" / f"gs{step}").rename(tmp_path / f"gs{step}")
    _, found = run(tmp_path / "cut", config, cls, resume=True, **more)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("placement", ["2 devices", "pmap", "sharded"])
@pytest.mark.parametrize(
    ("config", "cls"),
    [(TAID, jaxbrewer.GeneralDistiller), (BALANCED, jaxbrewer.GeneralDistiller), (TAID, Running)],
    ids=["taid", "balance", "own"],
)
def test_devices_make_no_difference(tmp_path, config, cls, placement):
    options = {
        "2 devices": {"data_parallel": True},
        "pmap": {"data_parallel": True, "mapping": "pmap"},
        "sharded": {"data_parallel": True, "sharding": "all"},
    }[placement]
    one, expected = run(tmp_path / "one", config, cls, gradient_accumulation_steps=2)
    many, found = run(tmp_path / "many", config, cls, gradient_accumulation_steps=2, **options)
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-4, atol=2e-5)
    for tag, values in one.items():
        np.testing.assert_allclose(many[tag], values, rtol=2e-4, atol=2e-5, err_msg=tag)


def test_an_objective_of_ones_own_sees_its_state(tmp_path):
    logged, _ = run(tmp_path, TAID, Running, gradient_accumulation_steps=2)
    plain = logged["scalar/plain"].reshape(6, 2)
    mean, expected = 0.0, []
    for window in plain:
        expected += [mean, mean]
        mean = 0.5 * mean + 0.5 * window.mean()
    np.testing.assert_allclose(logged["scalar/mean"], expected, rtol=1e-5)


def test_a_dropped_window_leaves_the_state_as_it_was(tmp_path):
    """A step whose loss is not finite is as if it had not been."""

    def spoilt(batches, at):
        batches = [dict(batch) for batch in batches]
        batches[at]["mask"] = np.full_like(batches[at]["mask"], np.nan)
        return batches

    clean = [b | {"mask": np.ones(b["mask"].shape, "f")} for b in fn_job.batches(6, size=8)]

    class Scaled(Running):
        def compute_loss(self, results_S, results_T, project, weights):
            scale = results_S["inputs_mask"].mean()
            total, terms = super().compute_loss(results_S, results_T, project, weights)
            return total * scale, terms

    adapt = fn_job.adaptor("logits", "inputs_mask")

    def last(folder, batches):
        distiller = fn_job.distiller(
            folder, config={"temperature": 2}, keys=adapt, log_dir=folder / "log", ckpt_steps=1, cls=Scaled,
            max_nonfinite_steps=3,
        )  # fmt: skip
        with distiller:
            distiller.train(fn_job.SGD, batches, num_steps=len(batches))
        points = jaxbrewer.training.read_scalars(folder / "log")
        return list(points["scalar/mean"].values()), jax.tree.leaves(distiller.model_S.params)

    without, _ = last(tmp_path / "without", [clean[0], *clean[2:]])
    found, _ = last(tmp_path / "spoilt", spoilt(clean, 1))
    assert 0 == found[0] < found[1] == found[2] < found[3]
    np.testing.assert_allclose(found[2:], without[1:], rtol=1e-6)


def test_terms_are_scaled_to_the_hard_labels(tmp_path):
    logged, _ = run(tmp_path, BALANCED)
    sizes = dict.fromkeys(("kd", "match", "hard"), 0.0)
    tags = {
        "kd": "scalar/unweighted_kd_loss",
        "match": "scalar/unweighted_hidden_hidden_mse_2_2",
        "hard": "scalar/unweighted_hard_label_loss",
    }
    for step, total in enumerate(logged["scalar/total_loss"]):
        now = {name: logged[tag][step] for name, tag in tags.items()}
        factor = {n: sizes["hard"] / sizes[n] if step else 1.0 for n in ("kd", "match")}
        expected = factor["kd"] * now["kd"] + 0.5 * factor["match"] * now["match"] + now["hard"]
        np.testing.assert_allclose(total, expected, rtol=1e-5)
        sizes = {name: 0.99 * size + 0.01 * now[name] for name, size in sizes.items()}


def test_balance_needs_the_hard_labels(tmp_path):
    distiller = fn_job.distiller(tmp_path, config={"balance": "hard_label"})
    with pytest.raises(jaxbrewer.errors.PreflightError, match="balance='hard_label' scales"):
        distiller.check(fn_job.batches(1)[0])


def test_a_checkpoint_without_a_state_begins_it(tmp_path):
    """As one of an older version: what is not there starts as in a new run."""
    plain = TAID | {"kd_loss_type": "ce"}
    run(tmp_path, plain, steps=2)
    logged, _ = run(tmp_path, TAID, steps=4, resume=True, resume_changes=["kd_loss_type", "loss"])
    assert len(logged["scalar/unweighted_kd_loss"]) == 4


def test_terms_that_a_state_needs_are_to_be_handed_on(tmp_path):
    class Silent(jaxbrewer.GeneralDistiller):
        def compute_loss(self, results_S, results_T, project, weights):
            return super().compute_loss(results_S, results_T, project, weights).total, {}

    distiller = fn_job.distiller(tmp_path, config=TAID, cls=Silent)
    with pytest.raises(
        jaxbrewer.errors.PreflightError,
        match=r"compute_loss returns no 'unweighted_kd_loss'.*\*\*loss\.terms",
    ):
        distiller.check(fn_job.batches(1)[0])
