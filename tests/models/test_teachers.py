"""Teachers: one, several averaged, none; outputs that a batch brought; always in evaluation mode."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbrewer import FunctionModel
from jaxbrewer.data.batches import own
from jaxbrewer.errors import AdaptorError
from jaxbrewer.models.adaptors import Side
from jaxbrewer.models.teachers import Teacher

from .. import fn_job

BATCH = own({"x": np.arange(6, dtype=np.float32).reshape(2, 3), "mask": np.ones((2, 3))})


def model(factor, modes=None):
    def apply(params, state, x, mask, key, train):
        if modes is not None:
            modes.append(train)
        return {"logits": x * params, "hidden": [x]}, {"calls": state["calls"] + 1}

    return FunctionModel(apply, jnp.float32(factor), {"calls": jnp.int32(0)})


def give(*keys):
    def adaptor(batch, outputs):
        every = {**outputs, "logits_mask": batch["mask"], "labels": batch["mask"]}
        return {key: every[key] for key in keys}

    return adaptor


def side(role, factor, keys=("logits",), modes=None):
    return Side(role, model(factor, modes), give(*keys), {})


def test_no_teacher_has_no_results():
    teacher = Teacher()
    assert teacher.sides == ()
    assert teacher(teacher.variables, BATCH, None) == {}


def test_one_teacher_runs_in_evaluation_mode():
    modes = []
    teacher = Teacher((side("T", 2, ("logits", "hidden"), modes),))
    results = jax.jit(lambda v, b: teacher(v, b, None))(teacher.variables, BATCH)
    np.testing.assert_array_equal(results["logits"][0], BATCH["x"] * 2)
    np.testing.assert_array_equal(results["hidden"][0], BATCH["x"])
    assert modes == [False]


def test_the_arrays_are_an_argument():
    teacher = Teacher((side("T", 2),))
    _, state = teacher.variables
    (logits,) = teacher((jnp.float32(5), state), BATCH, None)["logits"]
    np.testing.assert_array_equal(logits, BATCH["x"] * 5)


def test_outputs_that_the_batch_brought_go_through_the_adaptor():
    modes = []
    teacher = Teacher((side("T", 2, ("logits", "logits_mask"), modes),))
    cache = own({"logits": np.full((2, 3), 7.0), "hidden": None, "is_cache": True})
    results = teacher(teacher.variables, BATCH, cache)
    np.testing.assert_array_equal(results["logits"][0], 7)
    np.testing.assert_array_equal(results["logits_mask"][0], 1)
    assert modes == []


def test_several_teachers_are_averaged_under_the_firsts_mask():
    masked = side("T[0]", 1, ("logits", "logits_mask"))
    teacher = Teacher((masked, side("T[1]", 4), side("T[2]", 4, ("logits",))), averages=True)
    results = jax.jit(lambda v, b: teacher(v, b, None))(teacher.variables, BATCH)
    assert set(results) == {"logits", "logits_mask"}
    np.testing.assert_allclose(results["logits"][0], BATCH["x"] * 3, rtol=1e-6)
    np.testing.assert_array_equal(results["logits_mask"][0], BATCH["mask"])


def test_several_logits_are_averaged_one_by_one():
    twice = lambda batch, outputs: {"logits": [outputs["logits"], -outputs["logits"]]}  # noqa: E731
    teacher = Teacher(tuple([Side(f"T[{i}]", model(i), twice, {}) for i in (1, 3)]), averages=True)
    first, second = teacher(teacher.variables, BATCH, None)["logits"]
    np.testing.assert_array_equal(first, BATCH["x"] * 2)
    np.testing.assert_array_equal(second, BATCH["x"] * -2)


def test_several_teachers_take_outputs_that_the_batch_brought():
    teacher = Teacher(tuple([side("T[0]", 1), side("T[1]", 1)]), averages=True)
    cache = own(({"logits": np.full((2, 3), 1.0)}, {"logits": np.full((2, 3), 3.0)}))
    np.testing.assert_array_equal(teacher(teacher.variables, BATCH, cache)["logits"][0], 2)
    with pytest.raises(AdaptorError, match="holds 1 outputs for 2 teachers"):
        teacher(teacher.variables, BATCH, cache[:1])


def test_logits_that_do_not_fit_together_are_refused():
    halves = lambda batch, outputs: {"logits": outputs["logits"][:, :2]}  # noqa: E731
    twice = lambda batch, outputs: {"logits": [outputs["logits"]] * 2}  # noqa: E731
    for adaptor in (halves, twice):
        teacher = Teacher(
            tuple([side("T[0]", 1), Side("T[1]", model(1), adaptor, {})]), averages=True
        )
        with pytest.raises(AdaptorError, match=r"cannot be averaged.*\(2, 3\)"):
            teacher(teacher.variables, BATCH, None)


def test_a_teacher_without_logits_leaves_none():
    teacher = Teacher(tuple([side("T[0]", 1), side("T[1]", 1, ("hidden",))]), averages=True)
    assert teacher(teacher.variables, BATCH, None) == {}


def test_batches_that_feed_each_side_its_own(tmp_path):
    """The teacher's inputs apart, and its outputs computed before: the same training."""
    loader = fn_job.batches(3)
    teacher = fn_job.encoder(1)
    cached = [
        {"logits": np.asarray(teacher.function(teacher.params, **batch)["logits"])}
        for batch in loader
    ]
    forms = {
        "one for both": loader,
        "apart": [{"teacher": (b["ids"],), "student": b} for b in loader],
        "cached": [
            {"teacher": {"ids": b["ids"] * 0}, "student": b, "teacher_cache": outputs}
            for b, outputs in zip(loader, cached, strict=True)
        ],
    }
    trained = []
    for name, batches in forms.items():
        distiller = fn_job.distiller(tmp_path / name, teacher=teacher)
        with distiller:
            distiller.train(fn_job.SGD, batches, num_epochs=1)
        trained.append(distiller.model_S.params)
    for other in trained[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7), trained[0], other
        )
