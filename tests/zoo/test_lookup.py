"""Rows of a table by their ids: values, and gradients by both ways of summing."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo
from jaxbrewer.models.nnx_model import NNXModel
from jaxbrewer.models.precision import Precision, at_level
from jaxbrewer.zoo import lookup
from jaxbrewer.zoo.blocks import Table
from jaxbrewer.zoo.lookup import look_up

from .conftest import FAMILIES, make_batch

ROWS = (2, lookup.FEW_ROWS + 500)


def drawn(kind, rows, count):
    rng = np.random.default_rng(count)
    ids = rng.integers(0, rows, count)
    if kind == "padding":
        ids[count // 4 :] = 0
    elif kind == "few":
        ids = rows - 1 - rng.integers(0, min(rows, 3), count)
    elif kind == "outside":
        ids = rng.integers(-rows, rows + 3, count)
    return ids.astype(np.int32), rng.normal(size=(count, 5))


@pytest.mark.parametrize("kind", ["all", "padding", "few", "outside"])
@pytest.mark.parametrize("count", [1, lookup.CHUNK, 3 * lookup.CHUNK + 7])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("way", [lookup._by_adding, lookup._by_products])
def test_the_gradient_of_each_row_is_the_sum_over_its_ids(way, rows, count, kind):
    ids, gradient = drawn(kind, rows, count)
    expected = np.zeros((rows, 5))
    np.add.at(expected, ids[ids < rows], gradient[ids < rows])
    got = way(jnp.asarray(ids), jnp.asarray(gradient, jnp.float32), rows=rows, dtype=jnp.float32)
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-4)


def test_half_gradients_are_summed_in_the_tables_type():
    ids = np.zeros(4000, np.int32)
    gradient = jnp.ones((4000, 1), jnp.bfloat16)
    for way in (lookup._by_adding, lookup._by_products):
        got = way(jnp.asarray(ids), gradient, rows=2000, dtype=jnp.float32)
        assert got.dtype == jnp.float32
        assert got[0, 0] == 4000  # which bfloat16 does not reach one by one


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_it_is_take_and_its_gradient(dtype):
    rng = np.random.default_rng(0)
    table = jnp.asarray(rng.normal(size=(7, 3)), jnp.float32)
    ids = jnp.asarray([[0, 3, 6], [3, 3, 1]])

    def by_take(table):
        return jnp.take(table, ids, axis=0).astype(dtype)

    np.testing.assert_array_equal(look_up(table, ids, dtype), by_take(table))
    gradients = [
        jax.grad(lambda t, take=take: jnp.sum(jnp.sin(take(t).astype(jnp.float32))))(table)
        for take in (by_take, lambda t: look_up(t, ids, dtype))
    ]
    np.testing.assert_allclose(*gradients, rtol=1e-2 if dtype == jnp.bfloat16 else 1e-6)


def test_an_id_beyond_the_table_gives_nan_and_no_gradient():
    table = jnp.ones((4, 2))
    ids = jnp.asarray([1, 4])
    rows = look_up(table, ids, jnp.float32)
    assert np.isnan(rows[1]).all()
    assert np.isfinite(rows[0]).all()
    gradient = jax.grad(lambda t: look_up(t, ids, jnp.float32)[0].sum())(table)
    np.testing.assert_array_equal(gradient, [[0, 0], [1, 1], [0, 0], [0, 0]])


def test_no_ids_at_all():
    ids = jnp.zeros((0, 3), jnp.int32)
    gradient = jax.grad(lambda t: look_up(t, ids, jnp.float32).sum())(jnp.ones((4, 2)))
    np.testing.assert_array_equal(gradient, np.zeros((4, 2)))


@pytest.mark.parametrize("rows", ROWS)
def test_on_a_gpu_no_two_sums_go_to_one_place(rows):
    """What is lowered for one adds nothing up in memory, where the order would be chance."""

    def gradient(table, ids):
        return jax.grad(lambda t: look_up(t, ids, jnp.float32).sum())(table)

    shapes = jnp.zeros((rows, 8)), jnp.zeros((2, 40), jnp.int32)
    for platform, adds in (("cuda", False), ("cpu", True)):
        lowered = jax.jit(gradient).trace(*shapes).lower(lowering_platforms=(platform,))
        scatters = re.findall(r'"stablehlo.scatter".*?\}\) :', lowered.as_text(), re.DOTALL)
        assert any("stablehlo.add" in scatter for scatter in scatters) is adds
        if not adds:
            assert all("unique_indices = true" in scatter for scatter in scatters)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
@pytest.mark.parametrize("rows", ROWS)
def test_at_o2_rows_are_rounded_and_the_table_is_not(rows, half):
    table = NNXModel(Table(rows, 8, 1.0, pad_id=1, rngs=nnx.Rngs(0)))
    handle = at_level(table, Precision("O2", half, emulated=True))
    assert handle._tables == {("embedding",)}
    ids = np.random.default_rng(0).integers(0, rows, 3000)
    weights = jax.random.normal(jax.random.key(0), (3000, 8))

    def loss(params):
        looked_up, _ = handle.apply(params, handle.state, jax.random.key(1), (ids,), {}, True)
        return jnp.sum(looked_up * weights), looked_up

    found = {}
    for way, tables in (("late", handle._tables), ("before", frozenset())):
        handle._tables = tables
        (_, looked_up), gradient = jax.value_and_grad(loss, has_aux=True)(handle.params)
        found[way] = looked_up, gradient["embedding"]
    for late, before in zip(found["late"], found["before"], strict=True):
        np.testing.assert_array_equal(late, before)
        assert late.any()
        np.testing.assert_array_equal(late, late.astype(half).astype(jnp.float32))


@pytest.mark.parametrize(
    ("name", "times"), [("BertForSequenceClassification", 0), ("BertForMaskedLM", 1)]
)
def test_a_table_is_rounded_whole_only_where_it_is_a_matrix(name, times):
    config = zoo.BertConfig(**FAMILIES["Bert"] | {"num_hidden_layers": 1, "vocab_size": 61})
    model = NNXModel(getattr(zoo, name)(config, rngs=nnx.Rngs(0)))
    handle = at_level(model, Precision("O2", "bfloat16"))
    batch, width = make_batch(), config.hidden_size

    def run(params):
        return handle.apply(params, handle.state, jax.random.key(1), (), batch, True)[0].logits

    program = str(jax.make_jaxpr(run)(handle.params))
    assert program.count(f"bf16[61,{width}] = convert_element_type") == times
