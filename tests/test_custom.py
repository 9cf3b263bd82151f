"""Custom matches: any two submodules, by path, pattern or object, in NNX and Linen."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbrewer
from jaxbrewer import CustomMatch, LinenModel
from jaxbrewer.errors import ConfigError, PreflightError
from tests import tiny
from tests.parity.reference import read_events


class Inherits(tiny.Encoder):
    """Its ``__call__`` is inherited; so is that of its layers."""


def make(folder, matches, student=None, teacher=None, adaptor=tiny.adaptor):
    return jaxbrewer.GeneralDistiller(
        jaxbrewer.TrainingConfig(
            output_dir=str(folder / "out"), log_dir=str(folder / "log"), device="cpu"
        ),
        jaxbrewer.DistillationConfig(kd_loss_weight=0),
        teacher or Inherits(3, 6, seed=1),
        student or Inherits(2, 4, seed=2),
        adaptor,
        adaptor,
        custom_matches=matches,
    )


def run(distiller, **how):
    with distiller:
        distiller.train(tiny.SGD, tiny.loader(4), **(how or {"num_epochs": 1}))
    return read_events(distiller.t_config.log_dir)


def test_by_path_and_by_object_equal_the_loss_on_what_the_modules_return(tmp_path):
    teacher, student = Inherits(3, 4, seed=1), Inherits(2, 4, seed=2)
    batch = tiny.loader(1)[0]
    ids = batch["input_ids"]
    expected_T = teacher.layers[0](teacher.embed(ids))
    expected_S = student.layers[1](jnp.tanh(student.layers[0](student.embed(ids))))
    expected = jnp.mean((expected_T - expected_S) ** 2)
    for how in ("path", "object"):
        student = Inherits(2, 4, seed=2)
        named = {"path": ("layers.0", "layers.1"), "object": (teacher.layers[0], student.layers[1])}
        match = CustomMatch(*named[how], weight=2.0, loss="hidden_mse")
        curves = run(make(tmp_path / how, [match], student, teacher), num_steps=1)
        curve = curves["scalar/unweighted_custom_hidden_mse_layers.1_layers.0"]
        np.testing.assert_allclose(curve[0], expected, rtol=1e-5)
        np.testing.assert_allclose(curves["scalar/total_loss"][0], 2 * expected, rtol=1e-5)


def test_patterns_projections_and_their_rates(tmp_path):
    matches = [
        {"module_T": "layers.[12]", "module_S": "layers.*", "weight": 1.0, "loss": "hidden_mse"}
        | {"proj_func": ["linear", 4, 6], "proj_group": {"lr": 0.5}},
        {"module_T": "embed", "module_S": "embed", "weight": 1.0}
        | {"loss": lambda S, T, mask=None: jnp.mean(S) ** 2 - jnp.mean(T) ** 2},
    ]
    distiller = make(tmp_path, matches)
    curves = run(distiller, num_epochs=8)
    assert {t for t in curves if "hidden_mse" in t} == {
        "scalar/unweighted_custom_hidden_mse_layers.0_layers.1",
        "scalar/unweighted_custom_hidden_mse_layers.1_layers.2",
    }
    for tag in (t for t in curves if "hidden_mse" in t):
        assert curves[tag][-1] < curves[tag][0]
    assert len([p for p in distiller.projs if p is not None]) == 2
    trained = tiny.weights(distiller.projs[0])
    run(distiller, num_epochs=1)  # goes on with the same projections
    assert len([p for p in distiller.projs if p is not None]) == 2
    assert (tiny.weights(distiller.projs[0])["kernel"] != trained["kernel"]).any()


class Net(nn.Module):
    width: int

    @nn.compact
    def __call__(self, input_ids, attention_mask=None, labels=None):
        x = nn.Embed(tiny.VOCABULARY, self.width, name="embed")(input_ids)
        x = jnp.tanh(nn.Dense(self.width, name="dense")(x))
        return {"logits": nn.Dense(3)(x[:, 0])}


def linen(width, seed):
    module = Net(width)
    variables = module.init(jax.random.key(seed), tiny.loader(1)[0]["input_ids"])
    return LinenModel(module, variables)


def logits_only(batch, outputs):
    return {"logits": outputs["logits"]}


def test_linen_modules_by_path(tmp_path):
    student = linen(6, 1)
    matches = [CustomMatch("layers.1", "dense", 1.0, "hidden_mse")]
    curves = run(make(tmp_path, matches, student, adaptor=logits_only), num_epochs=5)
    curve = curves["scalar/unweighted_custom_hidden_mse_dense_layers.1"]
    assert curve[-1] < curve[0]


def test_what_cannot_be_found_is_named_with_what_is_near(tmp_path):
    other = tiny.Encoder(1, 4)
    matches = [
        CustomMatch("layers.7", "layers.0", 1.0, "hidden_mse"),
        CustomMatch("layers.*", "layers.*", 1.0, "hidden_mse"),
        CustomMatch(other.head, "head", 1.0, "hidden_mse"),
        CustomMatch("embed", "embd", 1.0, "hiden_mse"),
        CustomMatch("layers.0", "layers.0", 1.0, "hidden_mse"),
    ]
    with pytest.raises(PreflightError) as caught:
        run(make(tmp_path, matches))
    message = str(caught.value)
    for part in (
        "custom_matches[0].module_T='layers.7' finds no submodule; did you mean 'layers.",
        "'layers.*' finds 3 submodules of the teacher (layers.0, layers.1, layers.2, …) and",
        "custom_matches[2].module_T is a Linear that is not part of the model",
        "custom_matches[3].module_S='embd' finds no submodule; did you mean 'embed'?",
        "custom_matches[3].loss='hiden_mse' is not a known loss: did you mean 'hidden_mse'?",
        "expected one width, got 4 and 6",
    ):
        assert part in message
    with pytest.raises(ConfigError) as refused:
        make(tmp_path, [{"modul_T": "a", "module_S": "b", "weight": 1, "loss": "cos"}])
    assert refused.value.problems == (
        "unknown key 'modul_T'; did you mean 'module_T'?",
        "missing key 'module_T'",
    )


def test_function_models_have_no_submodules(tmp_path):
    student = jaxbrewer.FunctionModel(
        lambda params, input_ids, attention_mask, labels: {"logits": params[input_ids[:, 0]]},
        jnp.zeros((tiny.VOCABULARY, 3)),
    )
    distiller = make(
        tmp_path, [CustomMatch("embed", "embed", 1, "cos")], student, adaptor=logits_only
    )
    with pytest.raises(PreflightError, match="use intermediate_matches"):
        run(distiller)
