"""What is logged beside the loss, against its formulas; that it trains nothing and changes no resume."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import log_softmax

import jaxbrewer
from jaxbrewer.errors import PreflightError
from jaxbrewer.objective.monitor import monitored
from tests import fn_job


def expected(S, T, labels=None):
    """Of selected positions alone."""
    q, p = log_softmax(S, -1), log_softmax(T, -1)
    found = {
        "monitor/kl": (np.exp(p) * (p - q)).sum(-1).mean(),
        "monitor/agreement": (S.argmax(-1) == T.argmax(-1)).mean(),
        "monitor/entropy_S": -(np.exp(q) * q).sum(-1).mean(),
        "monitor/entropy_T": -(np.exp(p) * p).sum(-1).mean(),
    }
    if labels is not None:
        keep = labels >= 0
        found["monitor/hard_label_T"] = -p[keep, labels[keep]].mean()
    return found


def compare(found, wanted):
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)


def results(**arrays):
    return {name: (jnp.asarray(value),) for name, value in arrays.items()}


def test_the_numbers_are_their_formulas():
    rng = np.random.default_rng(0)
    S, T = rng.normal(0, 2, (2, 6, 4))
    labels = np.array([0, 3, -100, 1, 2, -100])
    compare(monitored(results(logits=S, labels=labels), results(logits=T)), expected(S, T, labels))
    compare(monitored(results(logits=S), results(logits=T)), expected(S, T))
    # Labels that are no classes, and other classes on the two sides, leave out what they leave out.
    compare(monitored(results(logits=S, labels=S[:, 0]), results(logits=T)), expected(S, T))
    other = monitored(results(logits=S[:, :3]), results(logits=T))
    assert other.keys() == {"monitor/entropy_S", "monitor/entropy_T"}


def test_only_selected_positions_count():
    rng = np.random.default_rng(1)
    S, T = rng.normal(0, 2, (2, 3, 5, 4))
    mask = rng.integers(0, 2, (3, 5))
    labels = rng.integers(-1, 4, (3, 5))
    junk = np.where(mask[..., None], S, np.nan), np.where(mask[..., None], T, np.inf)
    m = jnp.asarray(mask)
    found = monitored(
        {"logits": (jnp.asarray(junk[0]),), "logits_mask": (m,), "labels": (jnp.asarray(labels),)},
        {"logits": (jnp.asarray(junk[1]),), "logits_mask": (m,)},
    )
    chosen = mask == 1
    compare(found, expected(S[chosen], T[chosen], labels[chosen]))


def run(folder, monitor, resume=False, **more):
    config = {"temperature": 2, "hard_label_weight": 1, "monitor": monitor}
    distiller = fn_job.distiller(
        folder, config=config, keys=("logits", "losses", "labels"), log_dir=folder / "log",
        ckpt_steps=1, max_to_keep=9, resume=resume, **more,
    )  # fmt: skip
    with distiller:
        distiller.train(fn_job.SGD, fn_job.batches(4), num_steps=4)
    lines = map(json.loads, (folder / "log" / "metrics.jsonl").read_text().splitlines())
    return jax.tree.leaves(distiller.model_S.params), {line["step"]: line for line in lines}


def test_training_is_the_same_with_and_without(tmp_path):
    plain, _ = run(tmp_path / "plain", False)
    watched, lines = run(tmp_path / "watched", True)
    for one, other in zip(plain, watched, strict=True):
        np.testing.assert_array_equal(one, other)
    batch = fn_job.batches(1)[0]
    S, T = (fn_job.encode(fn_job.encoder(i).params, batch["ids"])["logits"] for i in (2, 1))
    wanted = expected(np.asarray(S), np.asarray(T), batch["labels"])
    compare({k: v for k, v in lines[0].items() if k.startswith("monitor/")}, wanted)


@pytest.mark.parametrize("before", [False, True])
def test_it_may_be_switched_on_or_off_in_a_run(before, tmp_path):
    expected, _ = run(tmp_path / "whole", False)
    run(tmp_path / "cut", before)
    for step in (3, 4):
        (tmp_path / "cut" / "out" / f"gs{step}").rename(tmp_path / f"gs{step}")
    found, _ = run(tmp_path / "cut", not before, resume=True)
    for one, other in zip(expected, found, strict=True):
        np.testing.assert_array_equal(one, other)


def test_without_logits_there_is_nothing_to_watch(tmp_path):
    config = {"monitor": True, "intermediate_matches": [fn_job.match(1, 1)]}
    distiller = fn_job.distiller(tmp_path, config=config, keys=("hidden",))
    with pytest.raises(PreflightError, match="adaptor_S and adaptor_T returns none"):
        distiller.check(fn_job.batches(1)[0])


def test_of_several_teachers_and_a_loss_of_ones_own(tmp_path):
    class Mine(jaxbrewer.GeneralDistiller):
        def compute_loss(self, results_S, results_T, project, weights):
            loss = super().compute_loss(results_S, results_T, project, weights)
            return loss.total * 2, loss.terms

    report = fn_job.distiller(tmp_path, config={"monitor": True}, cls=Mine).check(
        fn_job.batches(1)[0]
    )
    assert "monitor/" not in report
