"""Malformed batches later on: each is refused with its place, and what is legal trains."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import PartitionSpec

from jaxbrewer.data.batches import Static, check_ids, own
from jaxbrewer.data.likeness import Likeness
from jaxbrewer.errors import BatchError
from jaxbrewer.training import feed

from . import malformed
from .malformed import BAD, LEGAL, MALFORMED, good

pytestmark = pytest.mark.torch


@pytest.fixture(scope="module")
def checks(tmp_path_factory):
    return malformed.checks_of(tmp_path_factory.mktemp("run"))


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_batch_is_refused_with_its_place(kind, seed, checks):
    result, message = malformed.verdict(kind, seed, lambda loader: malformed.passed(loader, checks))
    assert result == "named", message


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("kind", LEGAL)
def test_a_legal_batch_passes(kind, seed, checks):
    loader, _ = malformed.made(kind, seed)
    assert len(malformed.passed(loader, checks)) == len(loader)


def test_training_names_the_batch(tmp_path):
    """Through `train` itself, with a model in half precision, which stands in for the user's."""
    loader = [good(np.random.default_rng(i)) for i in range(4)]
    loader[BAD]["ids"] = jnp.full_like(loader[BAD]["ids"], -1)
    for options in ({}, {"fp16": True, "fp16_opt_level": "O2"}):
        with pytest.raises(
            BatchError,
            match=r"epoch 1, batch 3 \(index 2 of the loader\): ids holds -1, but model_S",
        ):
            malformed.train(tmp_path, loader, **options)


def test_what_is_legal_trains_to_the_same_numbers(tmp_path):
    plain = [good(np.random.default_rng(i), rows) for i, rows in enumerate([4, 4, 4, 4, 2])]
    mixed = [dict(batch) for batch in plain]
    mixed[1]["mask"] = mixed[1]["mask"] > 0
    mixed[2]["labels"] = torch.asarray(mixed[2]["labels"].astype(np.uint8))
    mixed[3]["scale"] = mixed[3]["scale"].astype(np.float64)
    mixed[4]["ids"] = jnp.asarray(mixed[4]["ids"], jnp.int16)
    students = [malformed.train(tmp_path / str(i), x) for i, x in enumerate((plain, mixed))]
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), *(s.params for s in students)
    )


def test_another_length_is_not_traced_twice(tmp_path, monkeypatch):
    """The check by shape costs nothing: the step takes over its trace."""
    traces, encode = [], malformed.encode

    def counted(*args, **kwargs):
        traces.append(1)
        return encode(*args, **kwargs)

    monkeypatch.setattr(malformed, "encode", counted)
    loader = [good(np.random.default_rng(i), length=n) for i, n in enumerate([5, 7, 5, 7])]
    counts = []
    for _ in range(2):
        malformed.train(tmp_path, loader)
        counts.append(len(traces))
        traces.clear()
        monkeypatch.setattr(feed, "check_by_shape", lambda program, batch: None)
    with_check, without = counts
    assert with_check == without


# ------------------------------------------------------------------------------------ what may differ


def test_a_batch_seen_before_is_not_looked_at_again():
    likeness = Likeness(own(good(np.random.default_rng(0))))
    assert not likeness.check(own(good(np.random.default_rng(1))))
    assert likeness.check(own(good(np.random.default_rng(1), 2)))
    assert not likeness.check(own(good(np.random.default_rng(2), 2)))


def test_an_input_that_all_rows_share_may_have_as_many_rows_by_chance():
    shared = np.array([0.2, 0.3, 0.5], np.float32)
    batch = lambda rows: own({"x": np.ones((rows, 2)), "y": np.ones(rows), "weights": shared})  # noqa: E731
    likeness = Likeness(batch(3))
    assert likeness.check(batch(2))
    changed = batch(2) | {"weights": shared[::-1]}
    with pytest.raises(BatchError, match=r"\['weights'\] has 3 rows .* expected 2"):
        likeness.check(changed)


def test_an_input_of_one_row_may_be_shared_where_the_first_batch_had_one():
    likeness = Likeness(own({"x": np.ones((1, 4)), "y": np.ones(1), "positions": np.ones((1, 4))}))
    assert likeness.check(
        own({"x": np.ones((3, 6)), "y": np.ones(3), "positions": np.ones((1, 6))})
    )


def test_flags_may_change_and_none_may_not():
    likeness = Likeness(own({"x": np.ones(2), "flag": True, "none": None}))
    assert likeness.check({"x": np.ones(2), "flag": Static(False), "none": Static(None)})
    with pytest.raises(BatchError, match=r"'flag'\] is None, expected the flag True"):
        likeness.check({"x": np.ones(2), "flag": Static(None), "none": Static(None)})
    with pytest.raises(BatchError, match=r"'none'\] is an array .* expected None"):
        likeness.check({"x": np.ones(2), "flag": Static(True), "none": np.ones(2)})


def test_numbers_do_not_stand_for_bools():
    likeness = Likeness(own((np.ones(2, bool),)))
    with pytest.raises(BatchError, match=r"batch\[0\] is of type int64, a whole number, expected"):
        likeness.check(own((np.ones(2, np.int64),)))


# ------------------------------------------------------------------------------------------ the ids

SIGNATURE = inspect.signature(lambda ids: None)


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "uint8", "uint16", "uint32"])
@pytest.mark.parametrize("container", [np.asarray, jnp.asarray])
def test_ids_of_every_width(dtype, container):
    info = np.iinfo(dtype)
    for limit in (2, 100, 200, 30522):
        for value in {0, 1, limit - 1, limit, -1, -2, info.min, info.max}:
            if not info.min <= value <= info.max:
                continue
            ids = container(np.array([[0, value]], dtype))
            if 0 <= value < limit:
                check_ids((ids,), SIGNATURE, {"ids": limit}, "model_S")
            else:
                with pytest.raises(BatchError, match=f"ids holds {value}, but model_S knows"):
                    check_ids((ids,), SIGNATURE, {"ids": limit}, "model_S")


def test_ids_that_lie_on_several_devices_are_looked_at_too():
    mesh = jax.make_mesh((2,), ("rows",))
    place = jax.sharding.NamedSharding(mesh, PartitionSpec("rows"))
    ids = jax.device_put(np.array([[1, 2], [3, -1]], np.int32), place)
    with pytest.raises(BatchError, match="ids holds -1"):
        check_ids({"ids": ids}, SIGNATURE, {"ids": 9}, "model_S")
