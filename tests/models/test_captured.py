"""What submodules return and sow: as items that are matched, and as what adaptors are given."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbrewer
from jaxbrewer import CustomMatch, LinenModel
from jaxbrewer.errors import PreflightError
from tests import fn_job, nnx_decoder, nnx_job
from tests.nnx_decoder import Decoder, LinenDecoder, WithCache

# Where no adaptor asks for it, Flax itself sees to what is sown.
pytestmark = pytest.mark.filterwarnings("ignore:Using 'Module.sow:DeprecationWarning")


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """What is compared here does not depend on how well programs are optimized."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def make(folder, student, *, teacher=None, adaptors=(nnx_decoder.logits,) * 2, matches=(), **how):
    return jaxbrewer.GeneralDistiller(
        jaxbrewer.TrainingConfig(
            output_dir=folder / "out", log_dir=folder / "log", device="cpu", **how
        ),
        jaxbrewer.DistillationConfig(
            intermediate_matches=[fn_job.match(0, 0)] if not matches else [],
        ),
        teacher or WithCache(Decoder(3, 4, seed=1)),
        student,
        *adaptors,
        custom_matches=list(matches),
    )


def run(distiller, loader=None):
    with distiller:
        distiller.train(nnx_job.SGD, loader or nnx_decoder.loader(), num_epochs=1)
    return nnx_job.read_events(distiller.t_config.log_dir)


def linen_model(layers=2, width=4):
    module = LinenDecoder(layers, width)
    ids = nnx_decoder.loader(1)[0]["input_ids"]
    return LinenModel(module, module.init(jax.random.key(3), ids))


def linen_logits(batch, outputs):
    return {"logits": outputs}


def hidden_of(decoder, ids):
    """The hidden states behind each layer, and the scores in it."""
    x, cache = decoder.embed(ids), decoder.make_cache(len(ids))
    hidden, scores = [], []
    for i, layer in enumerate(decoder.layers):
        scores.append(
            jnp.einsum("bqd,bkd->bqk", layer.query(x), jnp.split(layer.key_value(x), 2, -1)[0])
        )
        _, x = layer(x, cache[f"layer{i}"], 0)
        hidden.append(x)
    return hidden, scores


# ----------------------------------------------------------------------- items of what is returned


def test_layers_that_return_a_cache_first_are_matched_by_item(tmp_path):
    teacher, student = Decoder(3, 4, seed=1), Decoder(2, 4, seed=2)
    ids = nnx_decoder.loader(1)[0]["input_ids"]
    expected_T, expected_S = hidden_of(teacher, ids)[0][2], hidden_of(student, ids)[0][1]
    expected = jnp.mean((expected_T - expected_S) ** 2)
    match = CustomMatch("decoder.layers.2:1", "decoder.layers.1:1", 1.0, "hidden_mse")
    distiller = make(tmp_path, WithCache(student), teacher=WithCache(teacher), matches=[match])
    curves = run(distiller, nnx_decoder.loader(1) * 4)
    tag = "scalar/unweighted_custom_hidden_mse_decoder.layers.1:1_decoder.layers.2:1"
    np.testing.assert_allclose(curves[tag][0], expected, rtol=1e-5)
    assert curves[tag][-1] < curves[tag][0]


def test_items_of_patterns_and_of_dicts_in_linen(tmp_path):
    """One side's items are in tuples and nested dicts, the other's in a dict by key."""
    matches = [
        CustomMatch("decoder.layers.[12]:1", "layers_*:x", 1.0, "hidden_mse"),
        CustomMatch("decoder.layers.0:0:key", "layers_0:x", 1.0, "hidden_mse"),
    ]
    adaptors = (nnx_decoder.logits, linen_logits)
    curves = run(make(tmp_path, linen_model(), matches=matches, adaptors=adaptors))
    assert len([tag for tag in curves if "custom_hidden_mse" in tag]) == 3


WRONG = {
    "no such item": (
        "decoder.layers.0:2",
        "submodule 'decoder.layers.0' has no item '2' in what it returns, a tuple of 0 (a dict), "
        "1 (float32[4, 5, 4])",
    ),
    "no item": (
        "decoder.layers.0",
        "submodule 'decoder.layers.0' returns a tuple of 0 (a dict), 1 (float32[4, 5, 4]), and "
        "custom_matches need one array, or a tuple that begins with one; name one of its items, such "
        "as 'decoder.layers.0:1'",
    ),
    "an item of items": (
        "decoder.layers.0:0",
        "returns:0 a dict of key (float32[4, 5, 4]), value (float32[4, 5, 4]), and custom_matches "
        "need one array, or a tuple that begins with one; name one of its items, such as "
        "'decoder.layers.0:0:key'",
    ),
    "of an array": ("decoder.head:x", "has no item 'x' in what it returns, float32[4, 5, 12]"),
    "no such submodule": ("decoder.layers.9:1", "'decoder.layers.9:1' finds no submodule; "),
}


@pytest.mark.parametrize("kind", WRONG)
def test_items_that_are_not_there_are_told_with_those_that_are(kind, tmp_path):
    path, message = WRONG[kind]
    match = CustomMatch("decoder.layers.0:1", path, 1.0, "hidden_mse")
    with pytest.raises(PreflightError) as caught:
        run(make(tmp_path, WithCache(Decoder(2, 4)), matches=[match]))
    assert message in str(caught.value)
    assert "model_S" in str(caught.value) or "module_S" in str(caught.value)


def test_the_teachers_items_too(tmp_path):
    matches = [CustomMatch("decoder.layers.0:7", "decoder.layers.0:1", 1.0, "hidden_mse")]
    with pytest.raises(
        PreflightError, match=r"model_T's submodule 'decoder\.layers\.0' has no item '7'"
    ):
        run(make(tmp_path, WithCache(Decoder(2, 4)), matches=matches))


# ------------------------------------------------------------------------- adaptors with `captured`


def states_and_scores(batch, outputs, captured):
    """What is matched, read by path: the layers' hidden states and what they sowed."""
    layers = sorted(
        {path for path in captured if path.startswith("decoder.layers.") and path[-1:].isdigit()}
    )
    return {
        "logits": outputs["logits"],
        "hidden": [captured["decoder.embed"], *(captured[path][1] for path in layers)],
        "attention": [captured[f"{path}.scores"][0][:, None] for path in layers],
    }


@pytest.mark.parametrize("train", [True, False])
def test_what_nnx_modules_return_and_sow_reaches_the_adaptor(train):
    student = WithCache(Decoder(2, 4, seed=2))
    model = jaxbrewer.models.wrap.as_model(student)
    side = jaxbrewer.models.adaptors.Side("S", model, states_and_scores, {})
    batch = nnx_decoder.loader(1)[0]
    results, _ = jax.jit(
        lambda params, state: side(params, state, jax.random.key(0), batch, train)
    )(model.params, model.state)
    hidden, scores = hidden_of(student.decoder, batch["input_ids"])
    assert len(results["hidden"]) == 3
    for found, wanted in zip(results["hidden"][1:], hidden, strict=True):
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-6)
    for found, wanted in zip(results["attention"], scores, strict=True):
        np.testing.assert_allclose(found[:, 0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("train", [True, False])
def test_what_linen_modules_return_and_sow_reaches_the_adaptor(train):
    """What they sow into other collections too; what a module has not called is not there."""
    seen = {}

    def adaptor(batch, outputs, captured):
        seen.update(captured)
        return {"logits": outputs, "hidden": [captured[f"layers_{i}"]["x"] for i in range(2)]}

    model = linen_model()
    side = jaxbrewer.models.adaptors.Side("S", model, adaptor, {})
    side(model.params, model.state, jax.random.key(0), nnx_decoder.loader(1)[0], train)
    assert {"Embed_0", "Dense_0", "layers_0", "layers_0.Dense_0"} <= {*seen}
    assert isinstance(seen["layers_1.scores"], tuple)
    assert seen["layers_1.scores"][0].shape == (4, 5, 5)
    assert len(seen["layers_0.size"]) == 1
    assert "" not in seen


@pytest.mark.parametrize("level", [{}, {"fp16": True}])
def test_training_on_what_was_captured(level, tmp_path):
    adaptors = (states_and_scores,) * 2
    distiller = make(tmp_path, WithCache(Decoder(2, 4)), adaptors=adaptors, **level)
    curves = run(distiller, nnx_decoder.loader(1) * 4)
    (curve,) = [curves[tag] for tag in curves if "hidden_mse" in tag]
    assert curve[-1] < curve[0]


def test_both_at_once_and_in_the_teacher_alone(tmp_path):
    matches = [CustomMatch("decoder.layers.0:1", "decoder.layers.1:1", 1.0, "hidden_mse")]
    adaptors = (states_and_scores, nnx_decoder.logits)
    curves = run(make(tmp_path, WithCache(Decoder(2, 4)), adaptors=adaptors, matches=matches))
    assert any("custom" in tag for tag in curves)


def reads(path):
    def adaptor(batch, outputs, captured):
        return {"logits": outputs["logits"], "hidden": [captured[path]]}

    return adaptor


def of_function(batch, outputs, captured):
    return {"logits": outputs["logits"], "hidden": outputs["hidden"]}


def test_paths_that_were_not_captured_are_told_with_those_that_were(tmp_path):
    adaptors = (reads("decoder.layers.7"), reads("decoder.emebd"))
    with pytest.raises(PreflightError) as caught:
        run(make(tmp_path, WithCache(Decoder(2, 4)), adaptors=adaptors))
    text = str(caught.value)
    assert "adaptor_T: nothing was captured at 'decoder.layers.7'; below 'decoder.layers': " in text
    assert (
        "adaptor_S: nothing was captured at 'decoder.emebd'; below 'decoder': did you mean" in text
    )


class Counted(nnx.Module):
    """Returns a cache with a number and text in it beside its hidden states, or a function."""

    def __init__(self, extra):
        rngs = nnx.Rngs(0)
        self.extra = extra
        self.embed = nnx.Embed(nnx_decoder.VOCABULARY, 4, rngs=rngs)
        self.head = nnx.Linear(4, 12, rngs=rngs)
        self.layer = _Counting(extra, rngs)

    def __call__(self, input_ids):
        _, x = self.layer(self.embed(input_ids))
        return {"logits": self.head(x)}


class _Counting(nnx.Module):
    def __init__(self, extra, rngs):
        self.extra, self.inner = extra, nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, x):
        return {"length": x.shape[1], "extra": self.extra}, self.inner(x)


@pytest.mark.parametrize("level", [{}, {"fp16": True}])
def test_a_submodule_may_return_numbers_and_text_beside_arrays(level, tmp_path):
    seen = []

    def adaptor(batch, outputs, captured):
        cache, x = captured["layer"]
        seen.append(cache)
        return {"logits": outputs["logits"], "hidden": [x]}

    run(make(tmp_path, Counted("text"), adaptors=(reads("decoder.embed"), adaptor), **level))
    assert all(cache == {"length": nnx_decoder.LENGTH, "extra": "text"} for cache in seen)


def test_a_submodule_that_returns_anything_else_is_not_captured(tmp_path):
    adaptors = (reads("decoder.embed"), reads("layer"))
    with pytest.raises(PreflightError, match="returns what is no array, number or text"):
        run(make(tmp_path, Counted(len), adaptors=adaptors))


ODD = {
    "another name": (lambda batch, outputs, capture: {}, "missing a required argument: 'capture'"),
    "the second": (lambda batch, captured: {}, "multiple values for argument 'captured'"),
}


@pytest.mark.parametrize("kind", ODD)
def test_adaptors_of_other_parameters_are_told_how_they_are_called(kind, tmp_path):
    adaptor, message = ODD[kind]
    adaptors = (reads("decoder.embed"), adaptor)
    with pytest.raises(PreflightError) as caught:
        run(make(tmp_path, WithCache(Decoder(2, 4)), adaptors=adaptors))
    assert message in str(caught.value)
    assert "It is called as (batch, outputs), and with captured=…" in str(caught.value)


class Checkpointed(nnx.Module):
    """Its first layer runs within a transformation."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(nnx_decoder.VOCABULARY, 4, rngs=rngs)
        self.inner, self.head = nnx.Linear(4, 4, rngs=rngs), nnx.Linear(4, 12, rngs=rngs)

    def __call__(self, input_ids):
        x = nnx.remat(lambda layer, x: layer(x))(self.inner, self.embed(input_ids))
        return {"logits": self.head(x)}


def test_what_runs_inside_a_transformation_may_be_there_but_not_be_read(tmp_path):
    adaptors = (reads("decoder.embed"), reads("embed"))
    run(make(tmp_path / "beside", Checkpointed(), adaptors=adaptors))
    with pytest.raises(PreflightError) as caught:
        run(make(tmp_path / "inside", Checkpointed(), adaptors=(adaptors[0], reads("inner"))))
    assert "adaptor_S: nothing was captured at 'inner'; " in str(caught.value)
    assert "or only within nnx.scan, nnx.remat or the like" in str(caught.value)
    match = CustomMatch("decoder.embed", "inner", 1.0, "hidden_mse")
    with pytest.raises(PreflightError, match="submodule 'inner' is not called, or only within nnx"):
        run(make(tmp_path / "matched", Checkpointed(), matches=[match]))


def test_of_functions_and_of_outputs_computed_before_nothing_is_captured(tmp_path):
    distiller = fn_job.distiller(tmp_path, keys=of_function)
    with (
        distiller,
        pytest.raises(
            PreflightError, match="adaptor_S takes 'captured', and of a FunctionModel nothing"
        ),
    ):
        distiller.train(fn_job.SGD, fn_job.batches(1), num_epochs=1)
    teacher = WithCache(Decoder(3, 4, seed=1))
    batch = nnx_decoder.loader(1)[0]
    loader = [{"student": batch, "teacher": batch, "teacher_cache": teacher(**batch)}]
    adaptors = (states_and_scores, states_and_scores)
    with pytest.raises(
        PreflightError, match="adaptor_T takes 'captured', which is not there beside"
    ):
        run(make(tmp_path, WithCache(Decoder(2, 4)), adaptors=adaptors), loader)


# ------------------------------------------------------------------- models that need a cache


def test_a_cache_may_come_with_the_batch(tmp_path):
    """Each side's own, as an argument by name; the numbers are those of a wrapper that makes it."""
    teacher, student = Decoder(3, 4, seed=1), Decoder(2, 6, seed=2)

    def with_caches(batch):
        rows = len(batch["input_ids"])
        sides = {"teacher": teacher, "student": student}
        return {side: {**batch, "cache": x.make_cache(rows)} for side, x in sides.items()}

    def match(path):
        return [CustomMatch(path, path, 1.0, "hidden_mse", ["linear", 6, 4])]

    made = make(
        tmp_path / "made",
        WithCache(Decoder(2, 6, seed=2)),
        teacher=WithCache(teacher),
        matches=match("decoder.layers.0:1"),
    )
    given = make(tmp_path / "given", student, teacher=teacher, matches=match("layers.0:1"))
    one = run(made)
    other = run(given, [with_caches(batch) for batch in nnx_decoder.loader()])
    for tag in ("scalar/total_loss", "scalar/unweighted_kd_loss"):
        np.testing.assert_allclose(one[tag], other[tag], rtol=1e-5)
