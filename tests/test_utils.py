"""The table of parameters, for every kind of model, and which of them decay."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxbrewer
from jaxbrewer import zoo
from jaxbrewer.models.wrap import as_model
from jaxbrewer.step.optimizer import build
from jaxbrewer.utils import LayerNode, decay_mask, display_parameters

from .zoo.conftest import FAMILIES, make_torch


class Block(nnx.Module):
    def __init__(self, rngs):
        self.wide = nnx.Linear(3, 4, rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(4, 4, rngs=rngs) for _ in range(2)])
        self.again = self.wide
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)


@pytest.mark.torch
def test_the_layout_is_textbrewers():
    import textbrewer.utils
    import torch

    shapes = {
        "bert.embeddings.word.weight": (50, 24),
        "bert.embeddings.position.weight": (20, 24),
        "bert.layer.0.dense.weight": (24, 24),
        "bert.layer.0.dense.bias": (24,),
        "bert.layer.1.dense.weight": (24, 24),
        "classifier.weight": (3, 24),
    }
    theirs, ours = {}, {}
    for name, shape in shapes.items():
        theirs[name] = torch.zeros(shape)
        *path, leaf = name.split(".")
        below = ours
        for part in path:
            below = below.setdefault(part, {})
        below[leaf] = jnp.zeros(shape)
    theirs["tied.weight"] = theirs["bert.embeddings.word.weight"]
    ours["tied"] = {"weight": ours["bert"]["embeddings"]["word"]["weight"]}
    for max_level in (None, 0, 1, 2, 3, 9):
        text, node = display_parameters(ours, max_level)
        wanted, wanted_node = textbrewer.utils.display_parameters(theirs, max_level)
        assert text == wanted
        assert list(node.value) == pytest.approx(wanted_node.value)


def test_an_nnx_module():
    text, node = display_parameters(Block(nnx.Rngs(0)))
    lines = [line.split("\t")[0].strip(" -:") for line in text.strip().splitlines()[1:]]
    assert lines[:4] == ["model", "wide", "kernel", "bias"]
    assert [line for line in lines if "shared" in line] == ["kernel(shared)", "bias(shared)"]
    assert node["wide"].value == (16, pytest.approx(64 / 2**20))
    assert node["blocks"]["1"]["kernel"].fullname == "blocks.1.kernel"
    assert node["again"].value == (0, 0.0)
    assert node["norm"].value[0] == 16  # scale, bias, mean, variance
    assert "dropout" not in node
    assert node.value[0] == 16 + 2 * 20 + 16


def test_two_modules_that_hold_one_array():
    first, second = nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.Linear(3, 4, rngs=nnx.Rngs(1))
    second.kernel.set_value(first.kernel.get_value())
    _, node = display_parameters({"first": first, "second": second})
    assert node.value[0] == 16 + 4
    assert node["second"]["kernel"].name == "kernel(shared)"


def test_linen_variables_and_wrapped_models():
    module = linen.Dense(4)
    variables = module.init(jax.random.key(0), jnp.ones((1, 3)))
    text, node = display_parameters(variables)
    assert node["params"]["kernel"].value[0] == 12
    wrapped = types.SimpleNamespace(variables=variables)
    assert display_parameters(wrapped)[0] == text
    function = types.SimpleNamespace(apply=None, params={"w": np.zeros((2, 5), np.float16)})
    assert display_parameters(function)[1].value == (10, pytest.approx(20 / 2**20))


def test_other_pytrees_and_abstract_arrays():
    model = Block(nnx.Rngs(0))
    abstract = jax.eval_shape(lambda: {"w": jnp.zeros((2, 3)), "b": [jnp.zeros(3)] * 2})
    assert display_parameters(abstract)[1].value[0] == 12
    state = nnx.state(model)
    assert display_parameters(state)[1].value[0] == display_parameters(model)[1].value[0]
    assert display_parameters({"key": jax.random.key(0), "w": np.ones(3)})[1].value[0] == 3


def test_an_empty_model():
    text, node = display_parameters({})
    assert node.value == (0, 0)
    assert "0.00%" in text


def test_half_precision_takes_half_the_memory():
    full = display_parameters({"w": jnp.zeros((512, 1024))})[1]
    half = display_parameters({"w": jnp.zeros((512, 1024), jnp.bfloat16)})[1]
    assert full.value == (524288, 2.0) and half.value == (524288, 1.0)


def test_the_tree_can_be_searched():
    _, node = display_parameters({"a": {"b": jnp.zeros(3)}})
    assert isinstance(node["a"]["b"], LayerNode)
    assert "a" in node and "b" not in node
    assert node["a"]["b"].children == {}


def test_refusals():
    with pytest.raises(TypeError, match=r"cannot find parameters in a int: give an nnx\.Module"):
        display_parameters(3)
    with pytest.raises(TypeError, match="Linen module holds no parameters"):
        display_parameters(linen.Dense(4))
    with pytest.raises(ValueError, match="max_level=-1"):
        display_parameters({}, max_level=-1)


# ------------------------------------------------------------------------------------- decay


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_what_decays_is_what_textbrewers_scripts_let_decay(family):
    """Their list is ``['bias', 'LayerNorm.weight']``, anywhere in a name.

    DistilBERT's and ModernBERT's norms are named otherwise. MPNet's relative positions are a bias.
    """
    theirs = make_torch(f"{family}ForSequenceClassification")
    spared = ("bias", "LayerNorm.weight", "norm.weight")
    named = theirs.named_parameters()
    wanted = sum(p.numel() for n, p in named if not any(part in n for part in spared))
    config = getattr(zoo, f"{family}Config")(**FAMILIES[family])
    ours = getattr(zoo, f"{family}ForSequenceClassification")(config, rngs=nnx.Rngs(0))
    params = as_model(ours).params
    mask = decay_mask(params)
    assert sum(params[name].size for name, decays in mask.items() if decays) == wanted
    nested = nnx.to_pure_dict(nnx.state(ours, nnx.Param))
    assert sum(jax.tree.leaves(decay_mask(nested))) == sum(mask.values())


def test_the_mask_goes_with_an_optimizer_and_projections(tmp_path):
    """With gradients of 0, what decays is all that moves."""
    optimizer = functools.partial(
        optax.adamw, learning_rate=0.1, weight_decay=0.5, mask=jaxbrewer.decay_mask
    )
    params = {"student": {"layer.kernel": jnp.ones(2), "layer.bias": jnp.ones(2)},
              "projections": {"hidden": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}}}  # fmt: skip
    made = build(optimizer, {"hidden": None})
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates, _ = made.update(zeros, made.init(params), params, factor=jnp.ones(()))
    for part in (updates["student"], updates["projections"]["hidden"]):
        assert {name: bool(x.any()) for name, x in part.items()} == {
            name: not name.endswith("bias") for name in part
        }
