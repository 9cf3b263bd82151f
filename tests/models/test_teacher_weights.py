"""The mean of several teachers' logits, all alike or by weights."""

import jax
import numpy as np
import pytest

import jaxbrewer
from jaxbrewer.data.batches import own
from jaxbrewer.errors import CheckpointError
from tests import fn_job


def distiller(folder, weights=None, teachers=None, **training):
    """Of three teachers."""
    teachers = [fn_job.encoder(i) for i in range(3)] if teachers is None else teachers
    return jaxbrewer.MultiTeacherDistiller(
        jaxbrewer.TrainingConfig(output_dir=folder / "out", device="cpu", **training),
        jaxbrewer.DistillationConfig(temperature=2),
        teachers,
        fn_job.encoder(5),
        fn_job.adaptor("logits"),
        fn_job.adaptor("logits"),
        teacher_weights=weights,
    )


def logits_of(distiller, batch):
    teacher = distiller.job().tasks[""].teacher
    return teacher(teacher.variables, own(batch), None)["logits"][0]


@pytest.mark.parametrize(
    "weights", [None, (1, 1, 1), (0, 5, 0), (0.2, 0.3, 0.1), np.array([1, 2, 3])]
)
def test_the_mean_is_weighted(weights, tmp_path):
    batch = fn_job.batches(1)[0]
    each = [fn_job.encode(fn_job.encoder(i).params, batch["ids"])["logits"] for i in range(3)]
    expected = np.average(each, axis=0, weights=weights)
    np.testing.assert_allclose(
        logits_of(distiller(tmp_path, weights), batch), expected, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ([1, 2], "3 teachers and 2 teacher_weights"),
        ([1, -1, 1], "expected a list of numbers of 0 or more"),
        ([0, 0, 0], "one at least above 0"),
        (["1", 1, 1], "expected a list of numbers"),
        (3, "expected a list of numbers"),
        ([1, float("nan"), 1], "expected a list of numbers"),
    ],
)
def test_weights_that_are_none(weights, said, tmp_path):
    with pytest.raises(ValueError, match=said):
        distiller(tmp_path, weights)


def test_other_weights_are_no_resume(tmp_path):
    for weights, steps in ((None, 2), ((1, 1, 2), 4)):
        more = {"resume": True} if steps == 4 else {}
        job = distiller(tmp_path, weights, ckpt_steps=1, **more)
        with job:
            if steps == 2:
                job.train(fn_job.SGD, fn_job.batches(2), num_steps=4)
                continue
            (tmp_path / "out" / "gs4").rename(tmp_path / "gs4")
            with pytest.raises(CheckpointError, match="teacher"):
                job.train(fn_job.SGD, fn_job.batches(2), num_steps=4)
    assert jax.tree.leaves(job.model_S.params)
