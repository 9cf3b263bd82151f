"""Objectives as values: a user's compute_loss over each distiller's own, and what each reads."""

import jax.numpy as jnp
import numpy as np
import pytest

import jaxbrewer
from jaxbrewer.data.batches import own
from jaxbrewer.errors import PreflightError
from jaxbrewer.objective.loss import Weights
from jaxbrewer.preflight import prepare
from jaxbrewer.training import read_scalars

from .. import fn_job, nnx_job
from ..devices import every

SCHEDULED = {
    "kd_loss_weight_scheduler": "linear_decay",
    "hard_label_weight_scheduler": "linear_growth",
}


def curves(name, folder, change=None):
    """The curves of a job with scheduled weights, its class perhaps changed."""
    distiller = every.JOBS[name](every.config(folder))
    if name != "trainer":
        distiller.d_config = jaxbrewer.DistillationConfig(
            **distiller.d_config.to_dict() | SCHEDULED
        )
    if change is not None:
        distiller.__class__ = change(type(distiller))
    every.train(distiller, every.batches(4))
    return read_scalars(folder / "log")


def unchanged(cls):
    """Calls ``super()`` and nothing else."""

    class Mine(cls):
        def compute_loss(self, results_S, results_T, project, weights):
            return super().compute_loss(results_S, results_T, project, weights)

    return Mine


def with_a_term(cls):
    """Adds a term of its own to what ``super()`` gives, weighted by the schedule."""

    class Mine(cls):
        def compute_loss(self, results_S, results_T, project, weights):
            loss = super().compute_loss(results_S, results_T, project, weights)
            norm = jnp.mean(results_S["logits"][0] ** 2)
            return loss.total + weights.kd * norm, loss.terms | {"norm": norm}

    return Mine


@pytest.mark.parametrize("name", every.JOBS)
def test_an_override_over_each_distiller_has_its_objective_and_its_schedules(name, tmp_path):
    plain = curves(name, tmp_path / "plain")
    assert curves(name, tmp_path / "same", unchanged) == plain
    more = curves(name, tmp_path / "more", with_a_term)
    assert more.keys() == plain.keys() | {"scalar/norm"}
    # The first batch comes before any update: the term is added with the weight of that update.
    first = more["scalar/total_loss"][0] - plain["scalar/total_loss"][0]
    np.testing.assert_allclose(first, more["scalar/norm"][0], rtol=1e-4)


class ReadsALayer(jaxbrewer.GeneralDistiller):
    """Looks at a teacher's layer that no match names."""

    def compute_loss(self, results_S, results_T, project, weights):
        distance = jnp.mean((results_S["hidden"][1] - results_T["hidden"][2]) ** 2)
        return distance, {"distance": distance}


@pytest.mark.parametrize("folder", [None, "cache"])
def test_a_cache_keeps_what_an_override_reads(tmp_path, folder):
    def run(name, **config):
        distiller = fn_job.distiller(
            tmp_path / name,
            cls=ReadsALayer,
            keys=("logits", "hidden"),
            config=config,
            log_dir=tmp_path / name / "log",
        )
        with distiller:
            distiller.train(fn_job.SGD, fn_job.batches(1), num_epochs=3)
        return read_scalars(tmp_path / name / "log")

    where = None if folder is None else tmp_path / folder
    cached = run("cached", is_caching_logits=True, cache_dir=where)
    np.testing.assert_allclose(
        list(cached["scalar/distance"].values()),
        list(run("plain")["scalar/distance"].values()),
        rtol=1e-6,
    )


def test_what_an_objective_reads_of_the_teacher_is_found(tmp_path):
    keys = ("logits", "hidden", "inputs_mask", "losses")
    matches = [fn_job.match(-1, 2), fn_job.match([0, 1], [0, 1], "nst")]

    def reads(cls=jaxbrewer.GeneralDistiller, **config):
        distiller = fn_job.distiller(tmp_path, cls=cls, keys=keys, config=config)
        with distiller:
            prepared = prepare(distiller.job(), {"": own(fn_job.batches(1)[0])}, fn_job.SGD)
        return prepared.programs[""].reads

    assert reads() == {"logits/0"}
    assert reads(intermediate_matches=matches) == {"logits/0", "hidden/0", "hidden/1", "hidden/2"}
    assert reads(ReadsALayer, intermediate_matches=matches) == {"hidden/2"}


def test_checks_by_shape_come_from_the_objective_that_is_evaluated(tmp_path):
    matches = [fn_job.match(7, 1)]

    def check(cls):
        distiller = fn_job.distiller(
            tmp_path, cls=cls, keys=("logits", "hidden"), config={"intermediate_matches": matches}
        )
        return distiller.check(fn_job.batches(1)[0])

    with pytest.raises(PreflightError, match="layer_T=7 is not there"):
        check(unchanged(jaxbrewer.GeneralDistiller))
    assert "distance" in check(ReadsALayer)  # does not evaluate the plan


def test_a_method_put_on_the_object_counts_too(tmp_path):
    distiller = fn_job.distiller(tmp_path, keys=("logits",))
    distiller.compute_loss = lambda results_S, *others: (
        jnp.sum(results_S["logits"][0]),
        {"sum": 1.0},
    )
    assert "sum" in distiller.check(fn_job.batches(1)[0])


def test_a_sum_may_begin_at_zero(tmp_path):
    distiller = fn_job.distiller(tmp_path, keys=("logits",))
    distiller.compute_loss = lambda results_S, *others: (
        0 + jnp.sum(results_S["logits"][0]),
        {"nothing": 0},
    )
    assert "nothing" in distiller.check(fn_job.batches(1)[0])


def test_a_loss_that_reads_nothing_of_the_student_is_refused(tmp_path):
    distiller = fn_job.distiller(tmp_path, keys=("logits",))
    distiller.compute_loss = lambda results_S, results_T, *others: (
        jnp.sum(results_T["logits"][0]),
        {},
    )
    with pytest.raises(PreflightError, match=r"nothing of what adaptor_S returns.*'logits'"):
        distiller.check(fn_job.batches(1)[0])


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (
            lambda results_S, results_T: None,
            r"must take \(results_S, .*, weights\), not \(results_S",
        ),
        (3, "compute_loss is a int, not a function"),
    ],
)
def test_a_method_of_other_arguments_is_refused(method, message, tmp_path):
    distiller = fn_job.distiller(tmp_path, keys=("logits",))
    distiller.compute_loss = method
    with pytest.raises(TypeError, match=message):
        distiller.check(fn_job.batches(1)[0])


def test_a_warning_points_at_the_line_that_led_to_it(tmp_path):
    distiller = fn_job.distiller(tmp_path)
    with pytest.warns(jaxbrewer.errors.PreflightWarning, match="evaluation mode") as caught:
        distiller.train(fn_job.SGD, fn_job.batches(1), num_epochs=1)
    assert caught[0].filename == __file__


def test_outside_of_training_there_is_no_loss(tmp_path):
    distiller = fn_job.distiller(tmp_path)
    with pytest.raises(ValueError, match="runs inside train"):
        distiller.compute_loss({}, {}, None, Weights(1.0, 1.0))


def test_nothing_is_left_behind_by_an_override_that_fails(tmp_path):
    class Fails(jaxbrewer.GeneralDistiller):
        def compute_loss(self, *arguments):
            super().compute_loss(*arguments)
            raise RuntimeError("no")

    distiller = fn_job.distiller(tmp_path, cls=Fails)
    with pytest.raises(PreflightError, match="RuntimeError: no"):
        distiller.check(fn_job.batches(1)[0])
    with pytest.raises(ValueError, match="runs inside train"):
        distiller.compute_loss({}, {}, None, Weights(1.0, 1.0))


# --------------------------------------------------------------------- what the user holds meanwhile


def custom(folder, **training):
    """A distiller with a projection of a match and one of a custom match."""
    distiller = nnx_job.distiller(folder, dropout=0.0, **training)
    return jaxbrewer.GeneralDistiller(
        distiller.t_config,
        distiller.d_config,
        distiller.model_T,
        distiller.model_S,
        nnx_job.adaptor,
        nnx_job.adaptor,
        custom_matches=[
            {
                "module_T": "layers.0",
                "module_S": "layers.0",
                "weight": 1.0,
                "loss": "hidden_mse",
                "proj_func": ["linear", 4, 6],
                "proj_group": {"lr": 0.01},
            }
        ],
    )


def test_a_check_writes_nothing_and_a_training_all(tmp_path):
    distiller = custom(tmp_path, ckpt_frequency=2)
    projs, seen = distiller.projs, []
    with distiller:
        distiller.check(nnx_job.loader(1)[0])
        assert len(projs) == len(nnx_job.MATCHES)

        def callback(model, step):
            assert model is distiller.model_S
            assert distiller.projs is projs and len(projs) == len(nnx_job.MATCHES) + 1
            assert distiller.projs_group[-1] == {"lr": 0.01}
            assert distiller.rank == 0 and distiller.tb_writer is not None
            seen.append((step, nnx_job.weights(projs[-1])["kernel"], distiller.best_checkpoint))
            return jaxbrewer.CallbackResult(score=step)

        distiller.train(nnx_job.SGD, nnx_job.loader(4), num_epochs=1, callback=callback)
        made = projs[-1]
        distiller.train(nnx_job.SGD, nnx_job.loader(4), num_epochs=1)
    assert projs[-1] is made, "a second training goes on with the same projections"
    (first, kernel_1, _), (second, kernel_2, best) = seen
    assert (first, second) == (2, 4)
    assert np.any(kernel_1 != kernel_2)
    assert best.name == "gs2"
    assert distiller.best_checkpoint is None  # the second training scored nothing


def test_an_error_leaves_what_the_last_checkpoint_gave(tmp_path):
    distiller = custom(tmp_path, ckpt_frequency=2)
    seen = []

    def callback(model, step):
        if step == 4:
            raise KeyboardInterrupt
        seen.append(nnx_job.weights(model))
        return jaxbrewer.CallbackResult(score=1.0)

    with distiller, pytest.raises(KeyboardInterrupt):
        distiller.train(nnx_job.SGD, nnx_job.loader(4), num_epochs=1, callback=callback)
    assert len(distiller.projs) == len(nnx_job.MATCHES) + 1
    assert distiller.best_checkpoint.name == "gs2"
    assert seen
    for name, value in nnx_job.weights(distiller.model_S).items():
        assert value.shape == seen[0][name].shape
