"""Which parameters are trained: paths, patterns, filters and functions, in every kind of model."""

import flax.linen as linen
import jax
import jax.numpy as jnp
import pytest
from flax import nnx

import jaxbrewer
from jaxbrewer.models.nnx_model import NNXModel
from jaxbrewer.models.trainable import part


class Net(nnx.Module):
    """An embedding that is tied, one that goes by two names at the top, LoRA, and two norms."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(4, 3, rngs=rngs)
        self.head = nnx.Dict(table=self.embed)
        self.layers = nnx.List([nnx.LoRALinear(3, 3, lora_rank=2, rngs=rngs) for _ in range(2)])
        self.first = self.layers[0].kernel
        self.norm = nnx.BatchNorm(3, rngs=rngs)
        self.bare = nnx.BatchNorm(3, use_scale=False, use_bias=False, rngs=rngs)
        self.pairs = nnx.data([nnx.Param(jnp.ones(2)), {"x": nnx.Linear(1, 1, rngs=rngs)}])
        self.itself = self


LORA = [f"layers.{i}.lora.lora_{part}" for i in (0, 1) for part in "ab"]
FOUND = {
    "a path": ("layers.1", ["layers.1.bias", "layers.1.kernel", *LORA[2:]]),
    "a leaf": ("norm.bias", ["norm.bias"]),
    "a pattern": ("layers.*.bias", ["layers.0.bias", "layers.1.bias"]),
    "a pattern across dots": ("*_a", [LORA[0], LORA[2]]),
    "what lies below a pattern": ("*.lora", LORA),
    "what lies in containers": ("pairs.1", ["pairs.1.x.bias", "pairs.1.x.kernel"]),
    "several": (["norm.bias", "*.lora_b"], ["norm.bias", LORA[1], LORA[3]]),
    "a type": (nnx.LoRAParam, LORA),
    "a filter": (nnx.PathContains("lora_a"), [LORA[0], LORA[2]]),
    "a filter and a path": ((nnx.LoRAParam, "norm.bias"), [*LORA, "norm.bias"]),
    "a function": (lambda path, value: path[0] == "norm", ["norm.bias", "norm.scale"]),
    "a function of the path's own parts": (
        lambda path, value: 1 in path[:2],
        ["layers.1.bias", "layers.1.kernel", *LORA[2:], "pairs.1.x.bias", "pairs.1.x.kernel"],
    ),
    "a tied array by its other name": ("head", ["embed.embedding"]),
    "a shared variable by its other name": ("layers.0.kernel", ["first"]),
    "one of two names is enough": ("layers.0.*", ["first", "layers.0.bias", *LORA[:2]]),
    "several in several": ([["norm.bias"], [("*.lora_b",)]], ["norm.bias", LORA[1], LORA[3]]),
    "nothing": ([], []),
}


def parted(model, trainable):
    problems = []
    found = part(model, trainable, "model_S", problems)
    assert not problems
    return found


@pytest.mark.parametrize("kind", FOUND)
def test_what_is_found_in_nnx(kind):
    trainable, names = FOUND[kind]
    model = NNXModel(Net())
    found = parted(model, trainable)
    assert sorted(found.trained) == sorted(names)
    trained, frozen = found.part(model.params)
    assert set(trained) == set(names)
    assert set(frozen) == set(model.params) - set(names)
    assert found.join(trained, frozen) == model.params


@pytest.mark.parametrize("trainable", [None, "*", nnx.Param, ["embed", "*"]])
def test_all_of_it_is_no_parting(trainable):
    assert parted(NNXModel(Net()), trainable) is None


@pytest.mark.parametrize(
    ("trainable", "still"),
    [
        ("embed", ["other.norm.mean", "other.norm.var"]),
        ("norm.bias", []),
        ([], ["other.bare.mean", "other.bare.var", "other.norm.mean", "other.norm.var"]),
    ],
)
def test_what_stands_still(trainable, still):
    """A norm without parameters goes with the module around it."""
    model = NNXModel(Net())
    found = parted(model, trainable)
    assert sorted(found.still) == still
    new = jax.tree.map(lambda x: x if x.dtype != jnp.float32 else x + 1, model.state)
    after = found.steady(model.state, new)
    for name, leaf in after["other"].items():
        moved = bool((leaf != model.state["other"][name]).any())
        assert moved == (f"other.{name}" not in still)


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.Dense(3, name="one")(x)
        x = linen.BatchNorm(use_running_average=not train, name="norm")(x)
        return linen.Dense(2, name="lora_two")(x)


def linen_model():
    module = LinenNet()
    return jaxbrewer.LinenModel(module, module.init(jax.random.key(0), jnp.ones((2, 3))))


def function_model():
    params = {"layers": [{"w": jnp.ones(2)}, {"w": jnp.ones(3)}], "lora": (jnp.ones(1),)}
    return jaxbrewer.FunctionModel(lambda params, x: x, params)


@pytest.mark.parametrize(
    ("make", "trainable", "names", "still"),
    [
        (linen_model, "one", ["one.bias", "one.kernel"], 2),
        (
            linen_model,
            ["*.kernel", "norm"],
            ["lora_two.kernel", "norm.bias", "norm.scale", "one.kernel"],
            0,
        ),
        (linen_model, lambda path, value: value.ndim == 2 and path[0] == "one", ["one.kernel"], 2),
        (function_model, "layers.1", ["layers.1.w"], 0),
        (function_model, ["layers.0", "lora"], ["layers.0.w", "lora.0"], 0),
        (function_model, lambda path, value: path == ("lora", "0"), ["lora.0"], 0),
    ],
)
def test_what_is_found_in_linen_and_functions(make, trainable, names, still):
    model = make()
    found = parted(model, trainable)
    assert sorted(found.trained) == names
    assert len(found.still) == still
    joined = found.join(*found.part(model.params))
    assert jax.tree.structure(joined) == jax.tree.structure(model.params)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (joined, model.params)), strict=True))


WRONG = {
    "a typo": (
        Net,
        "norms",
        "trainable='norms' finds no parameter of model_S; did you mean 'norm'?",
    ),
    "a typo below": (Net, "layers.0.kernl", "below 'layers.0': did you mean 'kernel'?"),
    "a typo below a pattern": (Net, "layers.*.lorra.x", "below 'layers.*': did you mean 'lora'?"),
    "nothing near": (Net, "zzz.*", "at the top there are "),
    "one of several": (Net, ["norm", "q"], "trainable='q' finds no parameter"),
    "a type of none": (
        Net,
        nnx.BatchStat,
        "trainable=BatchStat finds no parameter of model_S; there",
    ),
    "a function of none": (Net, lambda path, value: False, "of the types Param, LoRAParam"),
    "a flag": (
        Net,
        True,
        "trainable=True is a bool; expected a path, a pattern, an NNX filter such",
    ),
    "another class": (Net, int, "trainable=int is a type; expected"),
    "a function of one": (Net, lambda path: True, "It is called as (path, parameter)"),
    "a type in linen": (
        linen_model,
        nnx.LoRAParam,
        "of model_S, a LinenModel, are plain arrays: say it by names, such as "
        "trainable='lora_two.bias'",
    ),
    "a type of a function's": (function_model, nnx.Param, "such as trainable='lora.0'"),
    "two of one name": (
        lambda: jaxbrewer.FunctionModel(len, {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}),
        "a",
        "two parameters named 'a.b'",
    ),
}


@pytest.mark.parametrize("kind", WRONG)
def test_what_finds_nothing_is_told_what_there_is(kind):
    make, trainable, message = WRONG[kind]
    model = NNXModel(Net()) if make is Net else make()
    problems: list[str] = []
    assert part(model, trainable, "model_S", problems) is None
    assert len(problems) == 1
    assert message in problems[0]
