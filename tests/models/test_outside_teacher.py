"""Teachers that are no JAX models: their outputs come with the batch."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxbrewer import (
    DistillationConfig,
    FunctionModel,
    GeneralDistiller,
    OutsideTeacher,
    TrainingConfig,
)
from jaxbrewer.errors import AdaptorError, PreflightError

RNG = np.random.default_rng(0)
W = RNG.standard_normal((4, 3)).astype(np.float32)
BATCHES = [{"x": RNG.standard_normal((8, 4)).astype(np.float32)} for _ in range(3)]
MATCH = {"layer_T": 0, "layer_S": 0, "weight": 1, "loss": "hidden_mse", "feature": "hidden"}


def outputs(w, x):
    return {"logits": x @ w, "hidden": (x[:, None, :] * 2,)}


def model(w):
    return FunctionModel(lambda params, x: outputs(params["w"], x), {"w": jnp.asarray(w)})


def same(batch, outputs):
    return outputs


def trained(folder, teacher, adaptor, **options):
    student = model(np.zeros_like(W))
    config = DistillationConfig(temperature=2, intermediate_matches=[MATCH])
    train = TrainingConfig(output_dir=folder, device="cpu")
    distiller = GeneralDistiller(train, config, teacher, student, adaptor, same)
    with distiller:
        optimizer = functools.partial(optax.sgd, learning_rate=0.5)
        distiller.train(optimizer, BATCHES, num_epochs=2, **options)
    return student.params["w"]


def test_it_teaches_what_a_model_of_jax_would(tmp_path):
    compare_with_jax(lambda batch: outputs(W, batch["x"]), tmp_path)


@pytest.mark.torch
def test_a_model_of_torch_teaches_alike(tmp_path):
    import torch

    compare_with_jax(lambda batch: outputs(torch.tensor(W), torch.tensor(batch["x"])), tmp_path)


def compare_with_jax(teach, tmp_path):
    teacher = OutsideTeacher(teach)
    found = trained(tmp_path / "a", teacher, teacher.adaptor, batch_postprocessor=teacher)
    expected = trained(tmp_path / "b", model(W), same)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    assert np.abs(found).max() > 0.01


def test_what_is_missing_is_named(tmp_path):
    teacher = OutsideTeacher(lambda batch: {"logits": batch["x"] @ W})
    with pytest.raises(PreflightError, match="batch_postprocessor=teacher"):
        trained(tmp_path, teacher, teacher.adaptor)
    with pytest.raises(AdaptorError, match="returned a ndarray, expected a dict"):
        OutsideTeacher(lambda batch: W)({})
    with pytest.raises(AdaptorError, match="returned 'logit'; expected some of logits"):
        OutsideTeacher(lambda batch: {"logit": W})({})


def test_a_check_takes_what_it_makes_of_a_batch(tmp_path, capsys):
    teacher = OutsideTeacher(lambda batch: outputs(W, batch["x"]))
    config = DistillationConfig(intermediate_matches=[MATCH])
    train = TrainingConfig(output_dir=tmp_path, device="cpu")
    distiller = GeneralDistiller(train, config, teacher, model(W), teacher.adaptor, same)
    with distiller:
        assert "nothing wrong was found" in distiller.check(teacher(BATCHES[0]))


def test_a_cache_asks_once_for_each_batch(tmp_path):
    asked = []

    def teach(batch):
        asked.append(float(batch["x"][0, 0]))
        return outputs(W, batch["x"])

    teacher, student = OutsideTeacher(teach), model(np.zeros_like(W))
    config = DistillationConfig(is_caching_logits=True)
    train = TrainingConfig(output_dir=tmp_path, device="cpu")
    distiller = GeneralDistiller(train, config, teacher, student, teacher.adaptor, same)
    with distiller:
        optimizer = functools.partial(optax.sgd, learning_rate=0.5)
        distiller.train(optimizer, BATCHES, num_epochs=4, batch_postprocessor=teacher)
    assert sorted(set(asked)) == sorted(float(b["x"][0, 0]) for b in BATCHES)
    assert len(asked) <= 2 * len(BATCHES) and np.abs(student.params["w"]).max() > 0
