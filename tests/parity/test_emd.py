"""The EMD objective against the same formula in torch, with an independent transport solver."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linprog

import jaxbrewer
from jaxbrewer.errors import ConfigError, PreflightError
from jaxbrewer.objective.loss import Weights
from tests import nnx_job

EMD = {"layer_num_S": 3, "layer_num_T": 4, "feature": "hidden", "loss": "hidden_mse", "weight": 0.7}


def make(folder, emd, student_width=6, **distillation):
    return jaxbrewer.EMDDistiller(
        jaxbrewer.TrainingConfig(output_dir=str(folder), log_dir=str(folder / "log"), device="cpu"),
        jaxbrewer.DistillationConfig(**distillation),
        nnx_job.Encoder(3, 6, seed=1),
        nnx_job.Encoder(2, student_width, seed=2),
        nnx_job.adaptor,
        nnx_job.adaptor,
        emd=emd,
    )


def transport(cost):
    """The optimal plan between uniform weights, by linear programming."""
    n, m = cost.shape
    rows = np.zeros((n + m, n * m))
    for i in range(n):
        rows[i, i * m : (i + 1) * m] = 1
    for j in range(m):
        rows[n + j, j::m] = 1
    weights = np.concatenate([np.full(n, 1 / n), np.full(m, 1 / m)])
    return linprog(cost.ravel(), A_eq=rows, b_eq=weights).x.reshape(n, m)


@pytest.mark.torch
@pytest.mark.parametrize("seed", range(5))
def test_loss_and_gradient_equal_the_formula(seed, tmp_path, x64):
    import torch

    rng = np.random.default_rng(seed)
    mask = (np.arange(5) < rng.integers(1, 6, (4, 1))).astype(float)
    hidden_S, hidden_T = rng.normal(size=(3, 4, 5, 6)), rng.normal(size=(4, 4, 5, 6))
    logits = rng.normal(size=(2, 4, 3))

    def mse(s, t):
        m = torch.from_numpy(mask)[:, :, None]
        return ((s - t) ** 2 * m).sum() / (m.sum() * 6)

    torch_S = torch.from_numpy(hidden_S).requires_grad_()
    torch_T = torch.from_numpy(hidden_T)
    cost = torch.stack([torch.stack([mse(s, t) for t in torch_T[1:]]) for s in torch_S[1:]])
    plan = torch.from_numpy(transport(cost.detach().numpy()))
    l_S, l_T = torch.from_numpy(logits)
    kd = -(torch.softmax(l_T / 8, -1) * torch.log_softmax(l_S / 8, -1)).sum(-1).mean()
    expected = kd + 0.7 * ((plan * cost).sum() + mse(torch_S[0], torch_T[0]))
    expected.backward()

    distiller = make(tmp_path, EMD, temperature=8)
    objective = distiller.job().objective

    def ours(hidden):
        results = {"hidden": tuple(hidden), "inputs_mask": mask, "logits": (logits[0],)}
        teacher = {"hidden": tuple(hidden_T), "logits": (logits[1],)}
        return objective(results, teacher, None, Weights(1.0, 0.0)).total

    value, gradient = jax.value_and_grad(ours)(jnp.asarray(hidden_S))
    np.testing.assert_allclose(value, expected.detach(), rtol=1e-9)
    np.testing.assert_allclose(gradient, torch_S.grad, atol=1e-9)


def test_trains_with_its_tags_and_its_projections(tmp_path):
    distiller = make(
        tmp_path, EMD | {"proj": ["linear", 4, 6, {"lr": 0.5}]}, 4, hard_label_weight=0.0
    )
    before = [nnx_job.weights(p) for p in distiller.projs]
    with distiller:
        assert "emd" in distiller.check(nnx_job.loader(1)[0])
        distiller.train(nnx_job.SGD, nnx_job.loader(4), num_epochs=10)
    curves = nnx_job.read_events(tmp_path / "log")
    names = ("unweighted_hidden_hidden_mse_emd", "unweighted_embedding_hidden_mse")
    for name in names:
        curve = curves[f"scalar/{name}"]
        assert np.mean(curve[-4:]) < np.mean(curve[:4])
    assert len(distiller.projs) == 3
    for old, projection in zip(before, distiller.projs, strict=True):
        assert (old["kernel"] != nnx_job.weights(projection)["kernel"]).any()


def test_mistakes_are_named(tmp_path):
    with pytest.raises(ConfigError, match=r"unknown key 'layer_nums_S'.*layer_num_S"):
        make(tmp_path, EMD | {"layer_nums_S": 3})
    with pytest.raises(ConfigError, match="missing key 'weight'"):
        make(tmp_path, {k: v for k, v in EMD.items() if k != "weight"})
    with pytest.raises(ConfigError) as caught:
        make(tmp_path, EMD | {"layer_num_S": 1, "loss": "hiden_mse", "feature": "x", "weight": "1"})
    assert caught.value.problems == (
        "layer_num_S is 1: expected the number of layers plus one, for the embeddings' output",
        "feature is 'x': choose from 'hidden', 'attention', 'embedding', 'query', 'key', 'value'",
        "loss is 'hiden_mse': did you mean 'hidden_mse'?",
        "weight is '1': expected a number",
    )
    wrong = make(tmp_path, EMD | {"layer_num_T": 3})
    with (
        wrong,
        pytest.raises(PreflightError, match=r"layer_num_T'\] is 3, but adaptor_T returns 4"),
    ):
        wrong.train(nnx_job.SGD, nnx_job.loader(2), num_epochs=1)
    wide = make(tmp_path, EMD, student_width=4)
    with wide, pytest.raises(PreflightError, match=r"'proj': \['linear', 4, 6\]"):
        wide.train(nnx_job.SGD, nnx_job.loader(2), num_epochs=1)
