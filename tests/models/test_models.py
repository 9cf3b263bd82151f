"""The handle every kind of model becomes: pure, with its state, keys and modes in hand."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxbrewer
from jaxbrewer import FunctionModel, LinenModel
from jaxbrewer.data import batches
from jaxbrewer.machine.placement import OneDevice
from jaxbrewer.models.handle import Model, dotted
from jaxbrewer.models.nnx_model import NNXModel
from jaxbrewer.models.wrap import as_model
from jaxbrewer.preflight import prepare
from jaxbrewer.training.run import Outcome, _copies

from .. import fn_job

X = np.linspace(-1, 1, 24, dtype=np.float32).reshape(6, 4)
KEY, OTHER = jax.random.key(1), jax.random.key(2)


def same(a, b):
    """Whether two pytrees are equal, bit by bit."""
    one, two = jax.tree.flatten(a), jax.tree.flatten(b)
    return one[1] == two[1] and all(map(np.array_equal, map(raw, one[0]), map(raw, two[0])))


def raw(x):
    typed = hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if typed else x)


def run(model, x=X, *, train, key=KEY, **kwargs):
    return model.apply(model.params, model.state, key, (jnp.asarray(x),), kwargs, train)


# ------------------------------------------------------------------------------------------ NNX


class Net(nnx.Module):
    """A linear layer, batch statistics and dropout."""

    def __init__(self, seed=0, rate=0.5):
        rngs = nnx.Rngs(seed)
        self.linear = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, momentum=0.5, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)

    def __call__(self, x, scale=1.0):
        return self.drop(self.norm(self.linear(x))) * scale


@pytest.fixture(scope="module")
def net():
    return Net()


def test_names_are_dotted_and_sorted_into_parts(net):
    model = as_model(net)
    assert isinstance(model, Model)
    assert set(model.params) == {"linear.kernel", "linear.bias", "norm.scale", "norm.bias"}
    assert set(model.state["other"]) == {"norm.mean", "norm.var"}
    assert all("rngs" in name for name in model.state["rngs"])


def test_batch_statistics_move_in_train_mode_only(net):
    model = NNXModel(net)
    _, state = run(model, train=True)
    h = X @ np.asarray(net.linear.kernel[...]) + np.asarray(net.linear.bias[...])
    np.testing.assert_allclose(state["other"]["norm.mean"], 0.5 * h.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(state["other"]["norm.var"], 0.5 + 0.5 * h.var(0), rtol=1e-5)
    assert jax.tree.structure(state) == jax.tree.structure(model.state)
    _, state = run(model, train=False)
    assert same(state, model.state)


def test_dropout_follows_the_key_and_rests_in_eval_mode(net):
    model = NNXModel(net)
    out, other, again = (run(model, train=True, key=k)[0] for k in (KEY, OTHER, KEY))
    assert np.mean(np.asarray(out) == 0) > 0.2
    assert not same(out == 0, other == 0)
    assert same(out, again)
    still, moved = (run(model, train=False, key=k)[0] for k in (KEY, OTHER))
    assert same(still, moved)
    assert not np.any(np.asarray(still) == 0)


def test_dropout_depends_on_the_modules_own_seed_too(net):
    other = Net(seed=9)
    nnx.update(other, nnx.state(net, nnx.Param))
    masks = [run(NNXModel(m), train=True)[0] == 0 for m in (net, other)]
    assert not same(*masks)


def test_dropout_of_stacked_layers_follows_the_key():
    @nnx.split_rngs(splits=3)
    @nnx.vmap
    def stack(rngs):
        return nnx.Dropout(0.5, rngs=rngs)

    class Stacked(nnx.Module):
        def __init__(self):
            self.drops = stack(nnx.Rngs(0))
            self.weight = nnx.Param(jnp.ones(8))

        def __call__(self, x):
            return nnx.vmap(lambda drop, x: drop(x), in_axes=(0, None))(self.drops, x)

    model = NNXModel(Stacked())
    first, second, again = (
        run(model, np.ones(8, np.float32), train=True, key=k)[0] == 0 for k in (KEY, OTHER, KEY)
    )
    assert same(first, again)
    assert not same(first, second)
    assert len({row.tobytes() for row in np.asarray(first)}) == 3  # each layer its own mask


def test_a_model_inside_jit_equals_the_module_itself(net):
    model = NNXModel(net)
    twin = nnx.clone(net)
    twin.eval()
    out = jax.jit(lambda p, s: model.apply(p, s, KEY, (X,), {"scale": 2.0}, False)[0])(
        model.params, model.state
    )
    np.testing.assert_allclose(out, twin(X, scale=2.0), rtol=1e-5)


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_module_is_left_alone_until_it_is_written_to(mode):
    module = Net()
    getattr(module, mode)()
    before = jax.tree.map(jnp.array, nnx.to_pure_dict(nnx.state(module)))
    model = NNXModel(module)
    assert module.drop.deterministic == module.norm.use_running_average == (mode == "eval")
    _, state = run(model, train=True)
    run(model, train=False)
    assert same(nnx.to_pure_dict(nnx.state(module)), before)

    model.write(jax.tree.map(lambda x: x + 1, model.params), state)
    assert module.drop.deterministic == module.norm.use_running_average == (mode == "eval")
    np.testing.assert_array_equal(module.linear.bias[...], before["linear"]["bias"] + 1)
    np.testing.assert_array_equal(module.norm.mean[...], state["other"]["norm.mean"])
    assert same(NNXModel(module).state["rngs"], model.state["rngs"])
    module(X)


class Tied(nnx.Module):
    """The head is the embedding."""

    def __init__(self):
        self.embed = nnx.Embed(7, 3, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(3, 2, rngs=nnx.Rngs(1))
        self.shared = self.embed.embedding

    def __call__(self, ids):
        return self.embed(ids) @ self.shared[...].T


def test_shared_parameters_stay_tied():
    module = Tied()
    model = NNXModel(module)
    assert len(model.params) == 3  # the table once, and the head's two
    (table,) = [name for name, value in model.params.items() if value.shape == (7, 3)]
    ids = jnp.array([1, 2])
    grads = jax.grad(
        lambda p: model.apply(p, model.state, KEY, (ids,), {}, True)[0].sum(), allow_int=False
    )(model.params)
    table_value = model.params[table]
    expected = jax.grad(lambda e: (e[ids] @ e.T).sum())(table_value)
    np.testing.assert_allclose(grads[table], expected, rtol=1e-5)

    model.write(model.params | {table: table_value * 2}, model.state)
    assert module.shared is module.embed.embedding
    np.testing.assert_array_equal(module.shared[...], table_value * 2)


class Sowing(nnx.Module):
    """Keeps its activations aside, as a module does for someone to look at them."""

    def __init__(self):
        self.linear = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
        self.norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))

    def __call__(self, x):
        x = self.linear(x)
        self.sow(nnx.Intermediate, "aside", x)
        return self.norm(x)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")
@pytest.mark.parametrize("calls_before", [0, 2])
def test_what_a_module_sows_is_not_kept(calls_before):
    module = Sowing()
    for _ in range(calls_before):
        module(X)
    model = NNXModel(module)
    assert set(model.state["other"]) == {"norm.mean", "norm.var"}
    for train in (True, False):
        _, state = run(model, train=train)
        assert jax.tree.structure(state) == jax.tree.structure(model.state)
    model.write(model.params, state)
    assert hasattr(module, "aside") == (calls_before > 0)


def test_a_sequential_takes_anything():
    model = as_model(nnx.Sequential(nnx.Linear(4, 2, rngs=nnx.Rngs(0)), jnp.tanh))
    assert run(model, train=True)[0].shape == (6, 2)
    model.signature().bind(1, 2, three=3)


def test_signatures_leave_self_out(net):
    assert list(as_model(net).signature().parameters) == ["x", "scale"]


# ---------------------------------------------------------------------------------------- Linen


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, x, train=False):
        x = linen.BatchNorm(use_running_average=not train, momentum=0.5)(linen.Dense(5)(x))
        return linen.Dropout(0.5, deterministic=not train)(x)


class Deterministic(linen.Module):
    @linen.compact
    def __call__(self, x, deterministic=True):
        return linen.Dropout(0.5, deterministic=deterministic)(linen.Dense(5)(x))


class Averaging(linen.Module):
    @linen.compact
    def __call__(self, x, use_running_average):
        return linen.BatchNorm(use_running_average=use_running_average)(linen.Dense(5)(x))


class Moody(linen.Module):
    """Its flag has a name of its own, and so has its random stream."""

    @linen.compact
    def __call__(self, x, *, learning=False):
        x = linen.Dense(5)(x)
        return x + jax.random.normal(self.make_rng("noise"), x.shape) if learning else x


class Modeless(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.Dense(5, name="only")(x)


class LinenSowing(linen.Module):
    @linen.compact
    def __call__(self, x):
        x = linen.Dense(5)(x)
        self.sow("losses", "aside", x)
        return x


@pytest.fixture(scope="module")
def linen_model():
    module = LinenNet()
    return LinenModel(module, module.init(jax.random.key(0), X))


def test_linen_batch_statistics_and_dropout(linen_model):
    assert isinstance(linen_model, Model)
    assert set(linen_model.state) == {
        "batch_stats.BatchNorm_0.mean",
        "batch_stats.BatchNorm_0.var",
    }
    assert "Dense_0.kernel" in linen_model.params
    out, state = run(linen_model, train=True)
    other, again = (run(linen_model, train=True, key=k)[0] for k in (OTHER, KEY))
    assert not same(out == 0, other == 0)
    assert same(out, again)
    dense = linen_model.variables["params"]["Dense_0"]
    h = X @ dense["kernel"] + dense["bias"]
    np.testing.assert_allclose(
        state["batch_stats.BatchNorm_0.mean"], 0.5 * h.mean(0), rtol=1e-4, atol=1e-6
    )
    still, state = run(linen_model, train=False)
    assert same(state, linen_model.state)
    np.testing.assert_array_equal(still, linen_model.module.apply(linen_model.variables, X))


@pytest.mark.parametrize(
    ("module", "name", "moves"),
    [
        (LinenNet(), "train", True),
        (Deterministic(), "deterministic", True),
        (Averaging(), "use_running_average", True),
        (Modeless(), None, False),
    ],
)
def test_the_mode_is_told_by_the_modules_own_argument(module, name, moves):
    extra = {"use_running_average": True} if name == "use_running_average" else {}
    model = LinenModel(module, module.init(jax.random.key(0), X, **extra))
    assert model.train_argument == name
    assert list(model.signature().parameters) == ["x"]
    trained, evaluated = (run(model, train=mode)[0] for mode in (True, False))
    assert same(trained, evaluated) != moves


def test_a_flag_and_a_stream_of_ones_own():
    module = Moody()
    model = LinenModel(
        module, module.init(jax.random.key(0), X), train_argument="learning", rngs=["noise"]
    )
    first, second = (run(model, train=True, key=k)[0] for k in (KEY, OTHER))
    assert not same(first, second)
    assert same(run(model, train=False)[0], module.apply(model.variables, X))


def test_what_a_linen_module_sows_is_not_kept():
    module = LinenSowing()
    variables = module.init(jax.random.key(0), X)
    assert "losses" in variables
    model = LinenModel(module, variables)
    for train in (True, False):
        out, state = run(model, train=train)
        assert out.shape == (6, 5)
        assert state == model.state == {}


def test_linen_weights_are_written_back(linen_model):
    module, before = linen_model.module, linen_model.variables["params"]["Dense_0"]["kernel"]
    model = LinenModel(module, linen_model.variables)
    _, state = run(model, train=True)
    params = jax.tree.map(lambda x: x + 1, model.params)
    model.write(params, state)
    kernel = model.variables["params"]["Dense_0"]["kernel"]
    np.testing.assert_array_equal(kernel, linen_model.params["Dense_0.kernel"] + 1)
    mean = model.variables["batch_stats"]["BatchNorm_0"]["mean"]
    assert same(mean, state["batch_stats.BatchNorm_0.mean"])
    assert same(run(model, train=False)[0], module.apply(model.variables, X))
    assert same(linen_model.variables["params"]["Dense_0"]["kernel"], before)


def test_wrong_arguments_for_linen(linen_model):
    module = linen_model.module
    with pytest.raises(ValueError, match=r"train_argument='training' is not an argument of Linen"):
        LinenModel(module, linen_model.variables, train_argument="training")
    with pytest.raises(ValueError, match=r"what module.init returned.*got \['Dense_0'"):
        LinenModel(module, linen_model.variables["params"])
    with pytest.raises(ValueError, match=r"got NoneType"):
        LinenModel(module, None)


# ------------------------------------------------------------------------------------- functions


def test_a_function_is_given_what_it_names():
    seen = {}

    def plain(params, x):
        return params * x

    def curious(params, x, *, key, train):
        seen.update(key=key, train=train)
        return params * x

    for function in (plain, curious):
        model = FunctionModel(function, jnp.float32(2))
        assert isinstance(model, Model)
        assert list(model.signature().parameters) == ["x"]
        out, state = run(model, train=True)
        np.testing.assert_array_equal(out, 2 * X)
        assert state is None
    assert seen["train"] is True
    assert same(seen["key"], KEY)


def test_a_functions_state_is_carried_in_train_mode_only():
    def counting(params, state, x, train):
        return x * params, {"count": state["count"] + 1}

    model = FunctionModel(counting, jnp.float32(1), {"count": jnp.int32(0)})
    assert list(model.signature().parameters) == ["x"]
    assert run(model, train=True)[1] == {"count": 1}
    assert run(model, train=False)[1] == {"count": 0}
    model.write(jnp.float32(3), {"count": jnp.int32(5)})
    assert (model.params, model.state) == (3, {"count": 5})


def foreign(tree):
    """The same numbers as numpy arrays in the other byte order, as a file may hold them."""
    return jax.tree.map(lambda x: np.asarray(x).astype(np.dtype(x.dtype).newbyteorder()), tree)


def test_weights_come_in_this_machines_byte_order():
    dense = linen.Dense(3)
    variables = dense.init(KEY, X)
    params, offset = variables["params"], {"offset": jnp.arange(3.0)}

    def apply(params, state, x):
        return x @ params["kernel"] + params["bias"] + state["offset"], state

    module, twin = (nnx.Linear(4, 3, rngs=nnx.Rngs(0)) for _ in range(2))
    twin.kernel = nnx.Param(foreign(module.kernel[...]))
    twin.bias = nnx.Param(foreign(module.bias[...]))
    for wanted, model in (
        (FunctionModel(apply, params, offset), FunctionModel(apply, *foreign((params, offset)))),
        (LinenModel(dense, variables), LinenModel(dense, foreign(variables))),
        (as_model(module), as_model(twin)),
    ):
        assert same(model.params, wanted.params)
        assert all(x.dtype.isnative for x in jax.tree.leaves((model.params, model.state)))
        assert same(run(model, train=False), run(wanted, train=False))


def test_limits_on_ids_are_taken_from_each_kind():
    limits = {"input_ids": 10}
    module = Modeless()
    variables = module.init(jax.random.key(0), X)

    class Limited(Net):
        id_limits = limits

    for model in (
        Limited(),
        LinenModel(module, variables, id_limits=limits),
        FunctionModel(lambda p, x: x, 1.0, id_limits=limits),
    ):
        assert as_model(model).id_limits == limits
    assert as_model(Net()).id_limits == {}


def test_nested_names_are_joined():
    assert dotted({"a": {0: 1, "b": {"c": 2}}}) == {"a.0": 1, "a.b.c": 2}


# ----------------------------------------------------------------------------------- the refused


@pytest.mark.parametrize(
    ("model", "fix"),
    [
        (Modeless(), r"Modeless; .*LinenModel\(module, variables\)"),
        (lambda x: x, r"function; .*FunctionModel\(apply, params\)"),
        (Net, r"ModuleMeta; Net is the class itself: make an instance"),
        (None, "NoneType; give an nnx.Module, a LinenModel or a FunctionModel"),
        ({"params": 1}, "dict; give an nnx.Module"),
    ],
)
def test_what_is_no_model_gets_its_wrapper_named(model, fix):
    with pytest.raises(TypeError, match=f"model_S is a .*{fix}"):
        as_model(model, "model_S")


@pytest.mark.torch
def test_a_torch_module_is_sent_to_the_zoo():
    import torch

    with pytest.raises(
        TypeError, match=r"torch.*Linear; a torch module does not run.*jaxbrewer.zoo"
    ):
        as_model(torch.nn.Linear(2, 2), "model_S")


# --------------------------------------------------------------------- through a distiller, once


class Student(nnx.Module):
    """Shares its embedding's array with the teacher; has dropout and batch statistics."""

    def __init__(self, teacher=None):
        rngs = nnx.Rngs(3)
        self.embed = nnx.Embed(fn_job.VOCABULARY, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.3, rngs=rngs)
        self.head = nnx.Linear(4, fn_job.CLASSES, rngs=rngs)
        if teacher is not None:
            self.embed.embedding[...] = teacher.embed.embedding[...]
            self.norm.mean[...] = teacher.norm.mean[...]

    def __call__(self, ids):
        return {"logits": self.head(self.drop(self.norm(self.embed(ids).mean(1))))}


def test_steps_leave_a_teacher_intact_that_shares_arrays_and_seeds_decide():
    teacher = Student()
    student = Student(teacher)
    assert student.embed.embedding[...] is teacher.embed.embedding[...]
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(teacher, nnx.Param)))
    distiller = jaxbrewer.BasicDistiller(
        jaxbrewer.TrainingConfig(device="cpu"),
        jaxbrewer.DistillationConfig(),
        teacher,
        student,
        fn_job.adaptor("logits"),
        fn_job.adaptor("logits"),
    )
    loader = [batches.own({"ids": batch["ids"]}) for batch in fn_job.batches(2)]
    with distiller:
        program = prepare(distiller.job(), {"": loader[0]}, optax.sgd(0.5)).programs[""]
    step, trained = program.compiled, []
    for seed in (0, 0, 1):
        state = program.init(seed)
        for batch in loader:
            state, _ = step(state, program.teacher.variables, batch, np.ones(3, np.float32))
        trained.append(state.params)
    assert same(trained[0], trained[1])
    assert not same(trained[0], trained[2])  # dropout

    variables = _copies(OneDevice(jax.devices()[0]), state)
    Outcome(
        distiller.job(), variables=variables, student=program.student.model, projections={}
    ).write()
    assert same(nnx.to_pure_dict(nnx.state(teacher, nnx.Param)), before)
    np.testing.assert_array_equal(
        student.embed.embedding[...], trained[2]["student"]["embed.embedding"]
    )
    assert np.any(np.asarray(student.norm.mean[...]) != np.asarray(teacher.norm.mean[...]))
    for module in (teacher, student):  # neither was donated away
        assert np.all(np.isfinite(module(loader[0]["ids"])["logits"]))
        assert not module.drop.deterministic


def test_self_distillation_keeps_the_teacher_it_started_with(tmp_path):
    """One object on both sides: the teacher is what it was when training began."""
    curves = {}
    for name, shared in (("one object", True), ("two", False)):
        teacher = fn_job.encoder(1)
        student = teacher if shared else FunctionModel(fn_job.encode, teacher.params)
        distiller = fn_job.distiller(
            tmp_path / name, teacher=teacher, student=student, config={"hard_label_weight": 1},
            keys=("logits", "losses"), ckpt_frequency=2,
        )  # fmt: skip
        with distiller:
            distiller.train(
                fn_job.SGD,
                fn_job.batches(4),
                num_epochs=1,
                callback=lambda model, step: None,
            )
        curves[name] = student.params
    assert same(*curves.values())


def test_every_kind_of_model_has_the_surface():
    assert {"params", "state", "id_limits", "apply", "write", "signature"} <= set(
        dir(Model) + list(inspect.get_annotations(Model))
    )
