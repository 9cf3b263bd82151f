"""The levels: an audit of every type there is, for each kind of model; and that they train."""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import jaxbrewer
from jaxbrewer import FunctionModel, LinenModel, TrainingConfig
from jaxbrewer.data.batches import own
from jaxbrewer.errors import ConfigError, PrecisionError, PreflightError
from jaxbrewer.models.adaptors import Side
from jaxbrewer.models.half_products import wide_products
from jaxbrewer.models.handle import Model
from jaxbrewer.models.precision import FLOAT32, Precision, at_level, resolve
from jaxbrewer.models.wrap import as_model
from jaxbrewer.preflight import prepare
from jaxbrewer.training import read_scalars
from jaxbrewer.zoo import (
    BertConfig,
    BertForSequenceClassification,
    BiGRUConfig,
    BiGRUForTokenClassification,
)

from .. import fn_job, nnx_job

ADAM = functools.partial(optax.adam, learning_rate=0.02, eps=1e-4)
LEVELS = ["O1", "O2", "O3"]
HALVES = ["bfloat16", "float16"]
VOCABULARY, WIDTH = 12, 8
IDS = np.arange(10, dtype=np.int32).reshape(2, 5)

# ------------------------------------------------------------------------------- what a config means


def gpu(capability):
    return types.SimpleNamespace(platform="gpu", compute_capability=capability)


CPU, TPU = types.SimpleNamespace(platform="cpu"), types.SimpleNamespace(platform="tpu")


@pytest.mark.parametrize(
    ("device", "auto", "refused"),
    [
        (CPU, "bfloat16", None),
        (TPU, "bfloat16", "float16"),
        (gpu("7.5"), "float16", "bfloat16"),
        (gpu("8.0"), "bfloat16", None),
        (gpu("12.0"), "bfloat16", None),
        (gpu("gfx942"), "bfloat16", None),  # of another make
        (types.SimpleNamespace(platform="gpu"), "bfloat16", None),
    ],
)
def test_auto_takes_what_the_hardware_has(device, auto, refused):
    for level in LEVELS:
        config = TrainingConfig(fp16=True, fp16_opt_level=level)
        assert resolve(config, device) == Precision(level, auto, device is CPU)
    for half in HALVES:
        config = TrainingConfig(fp16=True, half_dtype=half)
        if half != refused:
            assert resolve(config, device).half == half
            continue
        with pytest.raises(PrecisionError, match=f"half_dtype='{half}'.*Set half_dtype='{auto}'"):
            resolve(config, device)


def test_float32_asks_for_no_device():
    for config in (
        TrainingConfig(device="tpu:7"),
        TrainingConfig(device="tpu:7", fp16=True, fp16_opt_level="O0", half_dtype="float16"),
    ):
        assert resolve(config) is FLOAT32
        model = as_model(nnx_job.Encoder(1, 4))
        assert at_level(model, FLOAT32) is model


def test_a_half_type_without_fp16_is_refused():
    with pytest.raises(ConfigError, match="half_dtype is 'float16', but fp16 is False"):
        TrainingConfig(half_dtype="float16")
    with pytest.raises(ConfigError, match="did you mean 'bfloat16'"):
        TrainingConfig(fp16=True, half_dtype="bfloat")
    assert "half_dtype" not in TrainingConfig(fp16=True).to_dict()


def test_a_level_says_what_it_does():
    texts = [str(Precision(level, "float16")) for level in LEVELS]
    assert len(set(texts)) == 3 and all("dynamic loss scale" in text for text in texts)
    assert str(FLOAT32) == "O0, float32"
    assert "scale" not in str(Precision("O2", "bfloat16"))


# --------------------------------------------------------------------------------- the models' kinds


class Raw(nnx.Module):
    """Products with bare parameters, a norm of its own, a lookup, a softmax."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.table = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.first = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, WIDTH)) * 0.3)
        self.ln_1 = Scale()
        self.second = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, 3)) * 0.3)

    def __call__(self, input_ids):
        x = self.table(input_ids)
        scores = jax.nn.softmax(jnp.einsum("bqd,bkd->bqk", x, x), -1)
        x = self.ln_1(scores @ x @ self.first[...]) + x
        return {"logits": x[:, 0] @ self.second[...], "hidden": [x]}


class Scale(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.ones(WIDTH))

    def __call__(self, x):
        variance = jnp.square(x.astype(jnp.float32)).mean(-1, keepdims=True)
        return (x * jax.lax.rsqrt(variance + 1e-6) * self.weight[...]).astype(x.dtype)


class Layers(nnx.Module):
    """Flax's own layers: attention, a convolution, batch statistics, dropout."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(VOCABULARY, WIDTH, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(2, WIDTH, decode=False, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.conv = nnx.Conv(WIDTH, WIDTH, (3,), rngs=rngs)
        self.batch = nnx.BatchNorm(WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, input_ids):
        x = self.embed(input_ids)
        x = self.norm(x + self.attention(x))
        x = self.dropout(self.batch(self.conv(x)))
        return {"logits": self.head(x[:, 0]), "hidden": [x]}


class LinenNet(linen.Module):
    @linen.compact
    def __call__(self, input_ids, train):
        x = linen.Embed(VOCABULARY, WIDTH, name="embed")(input_ids)
        x = linen.LayerNorm(name="first_norm")(linen.Dense(WIDTH, name="inner")(x) + x)
        x = linen.BatchNorm(use_running_average=not train, name="bn1")(x)
        return {"logits": linen.Dense(3, name="head")(x[:, 0]), "hidden": [x]}


def linen_model():
    net = LinenNet()
    return LinenModel(net, net.init(jax.random.key(0), IDS, False))


def function(params, input_ids):
    x = params["embed"][input_ids]
    x = x + jnp.tanh(x @ params["layers"][0]["kernel"])
    x = x * params["layers"][0]["layer_norm"]
    return {"logits": x[:, 0] @ params["head"], "hidden": [x]}


def function_model():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    layer = {"kernel": draw(WIDTH, WIDTH), "layer_norm": draw(WIDTH)}
    params = {"embed": draw(VOCABULARY, WIDTH), "layers": [layer], "head": draw(WIDTH, 3)}
    return FunctionModel(function, params)


def bert(**options):
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        max_position_embeddings=8,
        num_labels=3,
        output_hidden_states=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config, rngs=nnx.Rngs(0), **options)


def bigru():
    config = BiGRUConfig(
        vocab_size=VOCABULARY, embedding_size=WIDTH, hidden_size=WIDTH, num_labels=3
    )
    return BiGRUForTokenClassification(config, rngs=nnx.Rngs(0))


KINDS = {
    "zoo": bert,
    "recurrent": bigru,
    "raw NNX": Raw,
    "flax NNX": Layers,
    "Linen": linen_model,
    "function": function_model,
}
build = functools.cache(lambda kind: KINDS[kind]())  # for tests that leave the model as it is
# What stays float32 at O2.
NORMS = {
    "zoo": {
        f"bert.{part}.{name}"
        for part in (
            "embeddings.norm",
            *(f"encoder.layer.0.{n}_norm" for n in ("attention", "output")),
        )
        for name in ("scale", "bias")
    },
    "recurrent": set(),
    "raw NNX": {"ln_1.weight"},
    "flax NNX": {"norm.scale", "norm.bias", "batch.scale", "batch.bias"},
    "Linen": {"first_norm.scale", "first_norm.bias", "bn1.scale", "bn1.bias"},
    "function": {"layers.0.layer_norm"},
}


def dtypes(tree):
    """The types of a tree's floating leaves."""
    return {str(x.dtype) for x in jax.tree.leaves(tree) if jnp.issubdtype(x.dtype, jnp.floating)}


def named(tree):
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): x for path, x in leaves}


def call(handle, paths=None, train=True):
    """A function of (params, state) that runs a handle on `IDS`, with what submodules return."""

    def run(params, state):
        inputs = (jax.random.key(0), (), {"input_ids": jnp.asarray(IDS)}, train)
        return handle.apply(params, state, *inputs, **({"capture": paths} if paths else {}))

    return run


def equations(jaxpr):
    """All equations, nested ones included."""
    for eqn in jaxpr.eqns:
        yield eqn
        for value in eqn.params.values():
            for item in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(item, "jaxpr", item)
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


# ------------------------------------------------------------------------------------------ the audit


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_types_of_parameters_outputs_and_gradients(kind, level):
    model = as_model(build(kind))
    handle = at_level(model, Precision(level, "bfloat16"))
    assert isinstance(handle, Model)
    own_type = "bfloat16" if level == "O3" else "float32"
    assert dtypes(handle.params) == {own_type}
    assert dtypes(handle.state) <= {"float32"}
    outputs, state = jax.eval_shape(call(handle), handle.params, handle.state)
    assert dtypes(outputs) == {"float32"}
    assert dtypes(state) == dtypes(handle.state)
    assert jax.tree.structure(state) == jax.tree.structure(handle.state)

    def loss(params):
        return jnp.sum(call(handle)(params, handle.state)[0]["logits"])

    grads = jax.eval_shape(jax.grad(loss), handle.params)
    assert dtypes(grads) == {own_type}
    assert dtypes(model.params) == {"float32"}  # the user's own is as it was

    frozen = at_level(model, Precision(level, "bfloat16"), frozen=True)
    full = {name for name, x in named(frozen.params).items() if x.dtype == jnp.float32}
    assert full == {"O1": set(named(model.params)), "O2": NORMS[kind], "O3": set()}[level]


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "function"])
@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("train", [True, False])
def test_types_of_every_layers_output(kind, level, train):
    handle = at_level(as_model(build(kind)), Precision(level, "float16"))
    paths = handle.module_paths((), {"input_ids": IDS})
    (_, captured), _ = jax.eval_shape(call(handle, paths, train), handle.params, handle.state)
    assert len(captured) >= 2
    expected = "float32" if level == "O1" else "float16"
    assert {path: dtypes(x) for path, x in captured.items()} == {
        path: {expected} for path in captured
    }


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_types_inside(kind, level):
    """Products in half, forward and backward; norms and, at O1, all else in float32."""
    handle = at_level(as_model(build(kind)), Precision(level, "bfloat16"))

    def loss(params):
        outputs = call(handle)(params, handle.state)[0]
        return sum(jnp.sum(x) for x in jax.tree.leaves(outputs))

    closed = jax.make_jaxpr(jax.value_and_grad(loss))(handle.params)
    assert wide_products(closed) == []
    names = [eqn.primitive.name for eqn in equations(closed.jaxpr)]
    assert sum("dot_general" in name for name in names) > 4
    for eqn in equations(closed.jaxpr):
        name, out = eqn.primitive.name, dtypes([v.aval for v in eqn.outvars])
        if name == "rsqrt":
            assert out == {"float32"}
        if level == "O1" and "bfloat16" in out:
            assert name in ("convert_element_type", "conv_general_dilated")
        if name == "exp" and kind == "zoo" and eqn.outvars[0].aval.ndim == 4:
            assert out == {"float32"}  # attention's softmax


@pytest.mark.parametrize("level", LEVELS)
def test_a_model_is_shown_what_the_level_says(level):
    """Parameters, inputs and flags as the model itself sees them."""
    seen = {}

    def spy(params, x, ids, flag, table):
        seen.update(params=dtypes(params), x=str(x.dtype), ids=str(ids.dtype), flag=flag)
        seen.update(table=(type(table), str(table.dtype)))
        return {"logits": x @ params["w"], "hidden": [x]}

    params = {"w": jnp.ones((3, 3)), "ln": jnp.ones(3)}
    handle = at_level(FunctionModel(spy, params), Precision(level, "bfloat16"))
    inputs = {"x": jnp.ones((2, 3)), "ids": jnp.ones(2, int), "flag": True}
    inputs["table"] = np.ones(3, np.float32)
    handle.apply(handle.params, None, jax.random.key(0), (), inputs, True)
    half = "float32" if level == "O1" else "bfloat16"
    params = {"O1": {"float32"}, "O2": {"float32", "bfloat16"}, "O3": {"bfloat16"}}[level]
    assert (seen["params"], seen["x"], seen["ids"], seen["flag"]) == (params, half, "int32", True)
    assert seen["table"][1] == half


class OneNorm(linen.Module):
    @linen.compact
    def __call__(self, x):
        return linen.LayerNorm(name="norm")(x)


@pytest.mark.parametrize("framework", [nnx, linen])
@pytest.mark.parametrize("level", LEVELS)
def test_norms_compute_in_float32_at_o2(framework, level):
    """Float32 parameters, unrounded; only what comes in and goes out is half."""
    rng = np.random.default_rng(0)
    x, scale, bias = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((2, 5), 5, 5))
    if framework is nnx:
        norm = nnx.LayerNorm(5, dtype=jnp.float32, rngs=nnx.Rngs(0))
        norm.scale[...], norm.bias[...] = scale, bias
        model = as_model(norm)
    else:
        params = {"norm": {"scale": scale, "bias": bias}}
        model = LinenModel(OneNorm(), {"params": params})

    def exact(x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-6) * scale + bias

    def half(x):
        return np.asarray(jnp.asarray(x, jnp.bfloat16).astype(jnp.float32))

    handle = at_level(model, Precision(level, "bfloat16"))
    found, _ = handle.apply(handle.params, handle.state, jax.random.key(0), (x,), {}, False)
    expected = exact(x) if level == "O1" else half(exact(half(x)))
    differs = np.abs(found - expected).max()
    assert differs < 1e-6 if level != "O3" else differs > 1e-3


@pytest.mark.parametrize(
    ("name", "is_norm"),
    [
        *(
            (n, True)
            for n in ("norm", "layer_norm", "LayerNorm_0", "norm1", "norm_f", "ln", "ln_1")
        ),
        *((n, True) for n in ("input_layernorm", "bn2", "final_ln", "batch_normalization_3")),
        *((n, False) for n in ("normal", "prenorm_block", "kernel", "gnn", "plan", "ln_before_it")),
    ],
)
def test_parameters_of_norms_are_known_by_their_names(name, is_norm):
    model = FunctionModel(lambda params: params, {name: {"w": jnp.ones(2)}, "other": jnp.ones(2)})
    handle = at_level(model, Precision("O2", "float16"), frozen=True)
    assert (handle.params[name]["w"].dtype == jnp.float32) == is_norm
    assert handle.params["other"].dtype == jnp.float16


def test_a_layer_that_holds_a_norm_is_none():
    class PreNormLayer(nnx.Module):
        def __init__(self):
            self.inner = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
            self.scaled = nnx.RMSNorm(2, rngs=nnx.Rngs(0))

    handle = at_level(as_model(PreNormLayer()), Precision("O2", "float16"), frozen=True)
    assert {n for n, x in handle.params.items() if x.dtype == jnp.float32} == {"scaled.scale"}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("level", LEVELS)
def test_write_gives_back_float32(kind, level):
    handle = at_level(as_model(KINDS[kind]()), Precision(level, "bfloat16"))
    changed = jax.tree.map(lambda x: x * 0 + 3, handle.params)
    handle.write(changed, handle.state)
    after = (
        handle.model.params
        if kind in ("Linen", "function")
        else as_model(handle.model.module).params
    )
    assert dtypes(after) == {"float32"}
    assert all((np.asarray(x) == 3).all() for x in jax.tree.leaves(after))


def test_masters_of_a_half_model_are_float32():
    """A student whose own parameters are half still has float32 masters, and gets half back."""
    student = bert(param_dtype=jnp.bfloat16)
    for level in ("O1", "O2"):
        handle = at_level(as_model(student), Precision(level, "bfloat16"))
        assert dtypes(handle.params) == {"float32"}
        handle.write(handle.params, handle.state)
        assert dtypes(as_model(student).params) == {"bfloat16"}
    frozen = at_level(as_model(student), Precision("O1", "bfloat16"), frozen=True)
    assert dtypes(frozen.params) == {"bfloat16"}


def test_arrays_stay_where_they_lie():
    """A teacher in host memory may be more than a device holds, and so may a trained student."""
    with jax.default_device(jax.devices("cpu")[1]):
        model = as_model(nnx_job.Encoder(1, 4))
    home = model.params["embed.embedding"].devices()
    assert home == {jax.devices("cpu")[1]}
    for level in ("O2", "O3"):
        handle = at_level(model, Precision(level, "bfloat16"), frozen=True)
        assert all(x.devices() == home for x in handle.params.values())
    in_numpy = {"w": np.ones(3, np.float32)}
    plain = FunctionModel(lambda params: params, in_numpy)
    handle = at_level(plain, Precision("O3", "bfloat16"))
    assert isinstance(handle.params["w"], np.ndarray) and dtypes(handle.params) == {"bfloat16"}
    handle.write(handle.params, None)
    assert isinstance(plain.params["w"], np.ndarray) and dtypes(plain.params) == {"float32"}


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("half", HALVES)
def test_types_of_a_whole_step(tmp_path, level, half):
    """State, losses and gradients of a distillation with a projection, and what the metrics are."""
    mine = nnx_job.distiller(tmp_path, fp16=True, fp16_opt_level=level, half_dtype=half)
    batch = own(nnx_job.loader(1)[0])
    with mine:
        (program,) = prepare(mine.job(), {"": batch}, ADAM).programs.values()
    kept = {half} if level == "O3" else {"float32"}
    state = jax.eval_shape(lambda: program.init(0))
    assert dtypes(state.params) == dtypes(state.opt_state) == kept
    assert (state.scaling == ()) == (half == "bfloat16")
    teacher = program.teacher.variables
    assert dtypes(teacher) == ({"float32"} if level == "O1" else {half})
    results_T = jax.eval_shape(program.teacher.__call__, teacher, batch, None)
    assert dtypes(results_T) == {"float32"}
    weights = jaxbrewer.objective.Weights(jnp.ones(()), jnp.ones(()))
    key = jax.random.key(0)
    total, (loss, _) = jax.eval_shape(
        program.loss, state.params, state.model_state, key, batch, results_T, weights
    )
    assert dtypes(total) == dtypes(loss.terms) == {"float32"}
    assert len(loss.terms) == 4
    grads = jax.eval_shape(
        lambda *args: jax.grad(program.loss, has_aux=True)(*args)[0],
        *(state.params, state.model_state, key, batch, results_T, weights),
    )
    assert dtypes(grads) == kept
    after, metrics = program.compiled.eval_shape(state, teacher, batch, np.ones(3, np.float32))
    assert metrics.shape == (3 + 4 + 2 * (half == "float16"),) and metrics.dtype == jnp.float32
    same = jax.tree.map(lambda a, b: a.dtype == b.dtype, state, after)
    assert all(jax.tree.leaves(same))


# ------------------------------------------------------------------------------------------- training


# The largest distance from float32, relative to the largest value, of a random BERT's outputs.
BOUNDS = {"O1": 3, "O2": 6, "O3": 6}  # in units of the half type's rounding


@pytest.mark.parametrize("half", HALVES)
def test_a_bert_stays_near_float32(half):
    """In units of 2^-8 for bfloat16, 2^-11 for float16; more than none."""
    config = BertConfig(
        vocab_size=60,
        hidden_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=96,
        max_position_embeddings=16,
        num_labels=5,
        initializer_range=0.15,
        output_hidden_states=True,
    )
    model = as_model(BertForSequenceClassification(config, rngs=nnx.Rngs(0)))
    ids = np.random.default_rng(0).integers(1, 60, (4, 16), np.int32)
    inputs = {"input_ids": ids, "attention_mask": (ids > 6).astype(np.int32)}

    def outputs(precision):
        handle = at_level(model, precision, frozen=True)
        run = jax.jit(lambda p, s: handle.apply(p, s, jax.random.key(0), (), inputs, False)[0])
        found = run(handle.params, handle.state)
        return [*found.hidden_states[1:], found.logits]

    exact, unit = outputs(FLOAT32), {"bfloat16": 2.0**-8, "float16": 2.0**-11}[half]
    for level, bound in BOUNDS.items():
        near = outputs(Precision(level, half, emulated=True))
        far = [
            float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(near, exact, strict=True)
        ]
        assert 0.1 * unit < max(far) < bound * unit, (level, far, unit)


def curve(folder, **config):
    """The losses of a distillation with labels and a projection, and what it was trained by."""
    match = fn_job.match(1, 1, proj=["linear", 3, fn_job.WIDTH])
    mine = fn_job.distiller(
        folder,
        config={"intermediate_matches": [match], "hard_label_weight": 1, "kd_loss_weight": 0.5},
        student=fn_job.encoder(2, width=3),
        keys=("logits", "hidden", "losses", "inputs_mask"),
        gradient_accumulation_steps=2,
        log_dir=folder / "log",
        **config,
    )
    with mine:
        mine.train(ADAM, fn_job.batches(4, size=6), num_epochs=10, max_grad_norm=1.0)
    return np.array(list(read_scalars(folder / "log")["scalar/total_loss"].values())), mine


@pytest.fixture(scope="module")
def in_float32(tmp_path_factory):
    """The curve in float32, clipped as it is at the levels."""
    build = jaxbrewer.step.optimizer.build

    def clipping_all(*args, **options):
        return build(*args, **{**options, "clips_projections": True})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxbrewer.step.optimizer, "build", clipping_all)
        return curve(tmp_path_factory.mktemp("float32"))[0]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("half", HALVES)
def test_each_level_trains_near_float32(tmp_path, monkeypatch, in_float32, level, half):
    monkeypatch.setattr(
        jaxbrewer.step.loss_scale, "INITIAL", 1024.0
    )  # so that no window is dropped
    found, mine = curve(tmp_path, fp16=True, fp16_opt_level=level, half_dtype=half)
    assert in_float32[-4:].mean() < 0.8 * in_float32[:4].mean()
    # At O3 Adam's own moments are half: in float16 small squares are 0.
    bounds = {"bfloat16": {"O1": 0.01, "O2": 0.02}, "float16": {"O1": 0.001, "O2": 0.0025}}
    np.testing.assert_allclose(found, in_float32, rtol=bounds[half].get(level, 0.1))
    assert not np.array_equal(found, in_float32)
    trained = mine.model_S.params
    assert dtypes(trained) == {"float32"}
    loaded = jaxbrewer.load_student(tmp_path / "out", fn_job.encoder(3, width=3)).params
    for a, b in zip(jax.tree.leaves(loaded), jax.tree.leaves(trained), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_cache_names_its_level(tmp_path):
    """What a teacher gave at a level is not served to a run in float32."""
    config = {"is_caching_logits": True, "cache_dir": str(tmp_path / "cache")}

    def run(name, **more):
        mine = fn_job.distiller(tmp_path / name, config=config, **more)
        with mine:
            mine.train(fn_job.SGD, fn_job.batches(2), num_epochs=1)
        return jax.tree.map(np.asarray, mine.model_S.params)

    first, again = run("first", fp16=True), run("again", fp16=True)
    jax.tree.map(np.testing.assert_array_equal, first, again)
    with pytest.raises(jaxbrewer.errors.CacheError, match=r"another level of precision \(O1: "):
        run("other")


def test_check_tells_the_level(tmp_path, capsys):
    mine = fn_job.distiller(tmp_path, fp16=True, fp16_opt_level="O2", half_dtype="float16")
    with mine:
        mine.check(fn_job.batches(1)[0])
    assert "precision   O2: float32 master parameters" in capsys.readouterr().out
    mine = fn_job.distiller(tmp_path)
    with mine:
        mine.check(fn_job.batches(1)[0])
    assert "precision" not in capsys.readouterr().out


def test_custom_matches_reach_a_models_parts(tmp_path):
    """By path and by object, in models at a level."""
    for level in ("O1", "O3"):
        teacher, student = nnx_job.Encoder(2, 4, seed=1), nnx_job.Encoder(1, 4, seed=2)
        match = {"module_T": teacher.layers[1], "module_S": "layers.0", "weight": 1}
        mine = jaxbrewer.GeneralDistiller(
            TrainingConfig(
                output_dir=tmp_path / level, device="cpu", fp16=True, fp16_opt_level=level
            ),
            jaxbrewer.DistillationConfig(),
            teacher,
            student,
            nnx_job.adaptor,
            nnx_job.adaptor,
            custom_matches=[{**match, "loss": "hidden_mse"}],
        )
        with mine:
            (program,) = prepare(
                mine.job(), {"": own(nnx_job.loader(1)[0])}, ADAM
            ).programs.values()
        assert "unweighted_custom_hidden_mse_layers.0_layers.1" in program.names
        assert program.teacher.sides[0].model.precision.level == level


# ------------------------------------------------------------------------------------------ bad input


def test_a_model_that_does_not_go_with_half_values_is_told_of_o1(tmp_path):
    def scans(params, ids, mask=None, labels=None):
        x = params["embed"][ids].astype(params["head"].dtype)

        def body(carry, row):
            return carry + row.astype(jnp.float32) @ params["head"].astype(jnp.float32), None

        carry, _ = jax.lax.scan(body, jnp.zeros((3, 3), params["head"].dtype), x.swapaxes(0, 1))
        return {"logits": carry}

    student = FunctionModel(scans, fn_job.encoder(2).params)
    make = functools.partial(fn_job.distiller, student=student, fp16=True)
    mine = make(tmp_path, fp16_opt_level="O2")
    with mine, pytest.raises(PreflightError, match=r"(?s)model_S failed.*In float32 it runs.*'O1'"):
        mine.train(fn_job.SGD, fn_job.batches(2), num_epochs=1)
    mine = make(tmp_path, fp16_opt_level="O1")
    with mine:
        mine.train(fn_job.SGD, fn_job.batches(2), num_epochs=1)


def test_a_model_that_is_broken_anyway_is_not(tmp_path):
    student = FunctionModel(lambda params, ids, **rest: 1 / 0, {"w": jnp.ones(1)})
    mine = fn_job.distiller(tmp_path, student=student, fp16=True, fp16_opt_level="O2")
    with mine, pytest.raises(PreflightError) as caught:
        mine.train(fn_job.SGD, fn_job.batches(2), num_epochs=1)
    assert "ZeroDivisionError" in str(caught.value) and "O1" not in str(caught.value)


def test_a_product_out_of_reach_is_a_preflight_error(tmp_path):
    mesh = jax.make_mesh((1,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec()
    product = jax.shard_map(jnp.matmul, mesh=mesh, in_specs=spec, out_specs=spec)

    def apply(params, ids, mask=None, labels=None):
        return {"logits": product(params["embed"][ids][:, 0], params["head"])}

    student = FunctionModel(apply, fn_job.encoder(2).params)
    mine = fn_job.distiller(tmp_path, student=student, fp16=True)
    with mine, pytest.raises(PreflightError, match="product inside 'shard_map'"):
        mine.train(fn_job.SGD, fn_job.batches(2), num_epochs=1)
    assert not (tmp_path / "out").exists()


def test_a_half_type_the_backend_lacks_is_refused_before_anything(tmp_path, monkeypatch):
    monkeypatch.setattr(
        jaxbrewer.models.precision, "_lacks", lambda device: {"float16": "it is a toy"}
    )
    mine = fn_job.distiller(tmp_path, fp16=True, half_dtype="float16")
    with mine, pytest.raises(PrecisionError, match=r"float16.*it is a toy.*'bfloat16'"):
        mine.train(fn_job.SGD, fn_job.batches(2), num_epochs=1)
    assert not (tmp_path / "out").exists()


def test_a_handle_passes_on_what_only_some_models_offer():
    function = at_level(function_model(), Precision("O1", "bfloat16"))
    assert not hasattr(function, "module_paths") and not hasattr(function, "path_of")
    net = Raw()
    handle = at_level(as_model(net), Precision("O2", "bfloat16"))
    assert handle.path_of(net.ln_1) == "ln_1"
    assert list(handle.signature().parameters) == ["input_ids"]
    assert Side("S", handle, nnx_job.adaptor, {}).model is handle
