"""Look-ups: an id that a table lacks gives NaN, and its table is named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx

import jaxbrewer
from jaxbrewer import zoo
from jaxbrewer.data import batches
from jaxbrewer.models import lookups
from jaxbrewer.models.wrap import as_model
from tests import fn_job

ROWS, WIDTH = 11, 4


class Plain(nnx.Module):
    """A table of Flax's own."""

    def __init__(self, rows=ROWS):
        self.words = nnx.Embed(rows, WIDTH, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(1))

    def __call__(self, ids):
        return self.head(self.words(ids).mean(1))


class Lined(linen.Module):
    """Likewise, in Linen."""

    @linen.compact
    def __call__(self, ids):
        return linen.Dense(3)(linen.Embed(ROWS, WIDTH, name="words")(ids).mean(1))


class Table(nnx.Module):
    """The zoo's."""

    def __init__(self):
        self.words = zoo.blocks.Table(ROWS, WIDTH, 0.1, rngs=nnx.Rngs(0))
        self.head = nnx.Linear(WIDTH, 3, rngs=nnx.Rngs(1))

    def __call__(self, ids):
        return self.head(self.words(ids).mean(1))


def lined():
    module = Lined()
    return jaxbrewer.LinenModel(module, module.init(jax.random.key(0), np.zeros((1, 2), int)))


KINDS = {"nnx": Plain, "linen": lined, "zoo": Table}


def apply(kind, ids, train=True):
    model = as_model(KINDS[kind]())
    run = jax.jit(
        lambda ids: model.apply(model.params, model.state, jax.random.key(0), (ids,), {}, train)
    )
    return run(ids)[0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.uint32])
@pytest.mark.parametrize("train", [True, False])
def test_an_id_outside_gives_nan_and_the_others_do_not(kind, dtype, train):
    ids = np.array([[0, 1], [2, ROWS - 1], [3, ROWS], [4, 100], [5, 6]], dtype)
    bad = [2, 3]
    if np.issubdtype(dtype, np.signedinteger):
        ids[4, 0], bad = -1, [2, 3, 4]
    found = np.isnan(np.asarray(apply(kind, ids, train))).all(-1)
    assert list(np.flatnonzero(found)) == bad


@pytest.mark.parametrize("kind", KINDS)
def test_the_numbers_of_ids_inside_are_those_of_the_model_alone(kind):
    ids = np.arange(ROWS, dtype=np.int32)[None]
    model = KINDS[kind]()
    alone = model.module.apply(model.variables, ids) if kind == "linen" else model(ids)
    np.testing.assert_array_equal(apply(kind, ids), alone)


def test_of_a_table_with_one_row_no_id_matters():
    model = as_model(Plain(rows=1))
    ids = np.array([[5, -1]], np.int32)
    out, _ = model.apply(model.params, model.state, jax.random.key(0), (ids,), {}, True)
    assert np.isfinite(np.asarray(out)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_tables_are_named(kind):
    with lookups.noted() as notes:
        apply(kind, np.array([[1, 2], [-3, 4]], np.int32))
        apply(kind, np.array([[1, 7]], np.int32))
    jax.effects_barrier()
    assert notes == {"words": (-3, 7, ROWS)}
    assert lookups.outside(notes) == ["words was asked for id -3, and has ids 0 to 10"]
    with lookups.noted() as notes:
        apply(kind, jnp.array([[1, 12]], jnp.uint32))
    jax.effects_barrier()
    assert lookups.outside(notes) == ["words was asked for id 12, and has ids 0 to 10"]


PLACES = {
    "one device": {},
    "sharded": {"data_parallel": True},
    "pmap": {"data_parallel": True, "mapping": "pmap"},
    "half": {"fp16": True, "fp16_opt_level": "O2"},
}


@pytest.mark.parametrize(("place", "bad"), [("one device", ROWS), *((p, -1) for p in PLACES)])
def test_training_stops_and_names_the_table(place, bad, tmp_path, monkeypatch):
    """Where the host does not look: the ids lie on another device."""
    monkeypatch.setattr(batches, "_on_host", lambda value: None)
    given = [{"ids": np.random.RandomState(i).randint(0, ROWS, (8, 3))} for i in range(3)]
    given[1]["ids"][5, 2] = bad
    config = jaxbrewer.TrainingConfig(
        output_dir=str(tmp_path / "out"), log_dir=None, device="cpu", **PLACES[place]
    )

    def adaptor(batch, outputs):
        return {"logits": outputs}

    distiller = jaxbrewer.GeneralDistiller(
        config,
        jaxbrewer.DistillationConfig(kd_loss_type="mse"),
        Plain(),
        Plain(),
        adaptor,
        adaptor,
    )
    with distiller, pytest.raises(FloatingPointError) as told:
        distiller.train(fn_job.SGD, given, num_epochs=1)
    assert "at global step 2 (micro-batch 1)" in str(told.value)
    assert f"words was asked for id {bad}, and has ids 0 to {ROWS - 1}" in str(told.value)
