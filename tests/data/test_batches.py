"""Batches: what a loader may yield, what is refused, and that nothing it does later matters."""

import collections
import inspect
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from jaxbrewer.data import batches
from jaxbrewer.data.batches import Static
from jaxbrewer.errors import BatchError
from jaxbrewer.zoo.outputs import SequenceClassifierOutput

from .. import fn_job

Pair = collections.namedtuple("Pair", ["ids", "mask"])

IDS = [[1, 2], [3, 4]]


# ------------------------------------------------------------------------------- the containers


def encoding(items):
    """What tokenizers of transformers return."""
    from transformers import BatchEncoding

    return BatchEncoding(items)


@pytest.mark.parametrize(
    "mapping",
    [
        dict,
        collections.OrderedDict,
        collections.UserDict,
        types.MappingProxyType,
        pytest.param(encoding, marks=pytest.mark.torch),
    ],
)
def test_any_mapping_is_a_dict(mapping):
    batch = batches.own(mapping({"ids": np.array(IDS), "nested": {"mask": np.ones(2)}}))
    assert type(batch) is dict
    assert type(batch["nested"]) is dict
    np.testing.assert_array_equal(batch["ids"], IDS)


@pytest.mark.parametrize("sequence", [tuple, list])
def test_a_sequence_is_a_tuple(sequence):
    batch = batches.own(sequence([np.array(IDS), [np.ones(2), np.zeros(2)]]))
    assert type(batch) is tuple
    assert type(batch[1]) is tuple
    assert batches.as_call(batch, {"flag": 1}) == (batch, {"flag": 1})


def test_a_named_tuple_keeps_its_names_and_goes_by_position():
    batch = batches.own(Pair(np.array(IDS), mask=np.ones(2)))
    assert type(batch) is Pair
    args, kwargs = batches.as_call(batch, {})
    assert args[0] is batch.ids
    assert args[1] is batch.mask
    assert kwargs == {}


def test_a_dict_goes_by_name():
    args, kwargs = batches.as_call({"ids": 1}, {"flag": 2})
    assert args == ()
    assert kwargs == {"ids": 1, "flag": 2}


@pytest.mark.torch
def test_a_registered_output_is_kept_as_it_is():
    import torch

    cache = SequenceClassifierOutput(logits=torch.ones(2, 3), hidden_states=(np.ones(2),))
    batch = batches.own({"teacher": {"a": 1}, "student": {"a": 1}, "teacher_cache": cache})
    owned = batches.plain(batch["teacher_cache"])
    assert type(owned) is SequenceClassifierOutput
    assert owned.loss is None
    np.testing.assert_array_equal(owned.logits, np.ones((2, 3)))
    assert owned.hidden_states[0] is not cache.hidden_states[0]


# ----------------------------------------------------------------------------------- the leaves

NUMPY = ["bool", "int8", "int32", "int64", "uint8", "uint32", "float16", "float32", "float64"]


@pytest.mark.parametrize("dtype", NUMPY)
def test_numpy_is_copied_with_its_type(dtype):
    array = np.array(IDS).astype(dtype)
    (owned,) = batches.own((array,))
    assert owned.dtype == dtype
    assert not np.shares_memory(owned, array)
    np.testing.assert_array_equal(owned, array)


def test_numpy_views_and_bfloat16_are_copied():
    strided = np.arange(8)[::-2]
    half = np.ones(3, ml_dtypes.bfloat16)
    owned = batches.own((strided, half))
    np.testing.assert_array_equal(owned[0], [7, 5, 3, 1])
    assert owned[1].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize("dtype", [d for d in NUMPY if np.dtype(d).itemsize > 1])
def test_numpy_comes_in_this_machines_byte_order(dtype):
    """A compiled function that has seen the shape would read the bytes as they lie."""
    compiled = jax.jit(lambda batch: batch)
    native = np.array(IDS).astype(dtype)
    foreign = native.astype(native.dtype.newbyteorder())
    nested = lambda x: ({"ids": x, "pair": Pair(x.T, [x[0, 1]])}, x[::-1], x.view(np.memmap))  # noqa: E731
    compiled(batches.own(nested(native)))
    owned = batches.own(nested(foreign))
    for leaf in jax.tree.leaves(owned):
        assert leaf.dtype == native.dtype
        assert leaf.dtype.isnative
    jax.tree.map(np.testing.assert_array_equal, compiled(owned), batches.own(nested(native)))


def test_integers_in_the_other_byte_order_are_checked_too():
    foreign = np.dtype(np.int64).newbyteorder()
    with pytest.raises(BatchError, match="holds 4294967296"):
        batches.own((np.array([2**32], foreign),))


TORCH = {
    "bfloat16": ml_dtypes.bfloat16,
    "float16": np.float16,
    "float32": np.float32,
    "int64": np.int64,
    "bool": np.bool_,
}


@pytest.mark.torch
@pytest.mark.parametrize("name", TORCH)
def test_torch_is_copied_with_its_type(name):
    import torch

    tensor = torch.tensor([[0.0, 1.5], [2.0, 3.0]]).to(getattr(torch, name))
    (owned,) = batches.own((tensor,))
    assert isinstance(owned, np.ndarray)
    assert owned.dtype == TORCH[name]
    before = owned.copy()
    tensor.zero_()
    np.testing.assert_array_equal(owned, before)


@pytest.mark.torch
def test_torch_parameters_and_transposes_are_read():
    import torch

    weight = torch.nn.Parameter(torch.arange(6.0).reshape(2, 3))
    (owned,) = batches.own((weight.T,))
    np.testing.assert_array_equal(owned, np.arange(6.0).reshape(2, 3).T)


def test_jax_arrays_pass_as_they_are():
    array = jnp.ones(3)
    (owned,) = batches.own((array,))
    assert owned is array


def test_numbers_are_arrays():
    owned = batches.own({"int": 3, "float": 0.5, "scalar": np.float32(2), "bool": np.True_})
    assert {k: (v.shape, v.dtype.kind) for k, v in owned.items()} == {
        "int": ((), "i"),
        "float": ((), "f"),
        "scalar": ((), "f"),
        "bool": ((), "b"),
    }


# ------------------------------------------------------------------------------------ the flags


def test_flags_are_part_of_the_program():
    seen = []

    @jax.jit
    def step(batch):
        batch = batches.plain(batch)
        seen.append((batch["return_dict"], batch["labels"]))
        return batch["x"] + 1 if batch["return_dict"] else batch["x"]

    for flag in (True, False, True):
        batch = batches.own({"x": np.ones(1), "return_dict": flag, "labels": None})
        assert step(batch) == 1 + flag
    assert seen == [(True, None), (False, None)]


def test_flags_are_told_apart():
    assert len({Static(True), Static(False), Static(None), Static(True)}) == 3
    assert Static(True) != True  # noqa: E712
    assert Static(False) != Static(None)


# ---------------------------------------------------------------------------------- the refused

REFUSED = {
    "text": ({"ids": np.ones(1), "title": "a passage"}, r"batch\['title'\] is a str \('a passage'"),
    "a list of numbers": (
        {"labels": [0, 1, 1]},
        r"batch\['labels'\] is a list of numbers.*"
        r"np.asarray\(batch\['labels'\]\)",
    ),
    "a list of lists": ({"ids": [[0, 1], [1, 2]]}, r"np.asarray\(batch\['ids'\]\)"),
    "ragged lists": ({"ids": [[0, 1], [1]]}, r"a list of 2 lists of 1 to 2 numbers.*pad them"),
    "nested text": ({"meta": (np.ones(1), ["x"])}, r"batch\['meta'\]\[1\]\[0\] is a str"),
    "text in a tuple": ((np.ones(1), "x"), r"batch\[1\] is a str"),
    "array of text": ((np.array(["a"]),), r"batch\[0\] is an array of shape \(1,\) and type <U1"),
    "objects": ((np.array([{}, None]),), r"batch\[0\] is an array .* object"),
    "dates": ((np.array(["2020-01-01"], "M8[D]"),), r"batch\[0\] is an array"),
    "records": ((np.zeros(2, [("a", "i4")]),), r"batch\[0\] is an array"),
    "bytes without a type": ((np.zeros(2, "V8"),), r"batch\[0\] is an array"),
    "a set": (({1, 2},), r"batch\[0\] is a set"),
    "huge": ((2**80,), r"batch\[0\] is a int"),
    "a function": ({"f": len}, r"batch\['f'\] is a builtin"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_go_to_the_device_is_named_with_its_place(name):
    batch, message = REFUSED[name]
    with pytest.raises(BatchError, match=message) as caught:
        batches.own(batch)
    assert "batch_postprocessor" in str(caught.value)


def tensor(*values):
    import torch

    return torch.tensor(values)


@pytest.mark.parametrize(
    ("batch", "what"),
    [
        (np.ones((2, 3)), r"array of shape \(2, 3\)"),
        (jnp.ones(2), r"array of shape \(2,\)"),
        ("ids", "a str"),
        (None, "a NoneType"),
        (3, "a int"),
        (iter(()), "a tuple_iterator"),
    ],
)
def test_neither_dict_nor_tuple(batch, what):
    with pytest.raises(BatchError, match=f"must be a dict .* or a tuple .*{what}"):
        batches.own(batch)


@pytest.mark.torch
def test_neither_dict_nor_tuple_but_a_tensor():
    test_neither_dict_nor_tuple(tensor(1.0, 1.0), r"array of shape \(2,\)")


@pytest.mark.parametrize(
    "array",
    [np.array([0, 2**31]), np.array([-(2**31) - 1]), np.array([2**32], np.uint64), 2**40],
)  # fmt: skip
def test_integers_that_would_be_cut_are_refused(array):
    with pytest.raises(
        BatchError, match=r"batch\['stamp'\] holds -?\d+, which does not fit the 32"
    ):
        batches.own({"stamp": array})
    with jax.enable_x64(True):
        batches.own({"stamp": array})
    batches.own({"stamp": np.array([2**31 - 1, -(2**31)]), "unsigned": np.uint64(2**32 - 1)})


@pytest.mark.torch
def test_integers_of_tensors_that_would_be_cut_are_refused():
    test_integers_that_would_be_cut_are_refused(tensor(1, 2**50))


def test_keys_of_a_dict_are_text():
    with pytest.raises(
        BatchError, match=r"names the model's inputs, but has the keys \[1, 'ids'\]"
    ):
        batches.own({1: np.ones(2), "ids": np.ones(2)})


@pytest.mark.parametrize("empty", [{}, (), []])
def test_empty(empty):
    with pytest.raises(BatchError, match="empty batch"):
        batches.own(empty)


# ------------------------------------------------------------------------------- reused buffers


def aligned(array):
    """A copy where JAX on the CPU would read from, rather than copy."""
    space = np.zeros(array.nbytes + 64, np.uint8)
    start = -space.ctypes.data % 64
    copy = space[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
    copy[:] = array
    return copy


@pytest.mark.torch
def test_a_buffer_the_loader_reuses_does_not_corrupt_a_batch(tmp_path):
    import torch

    made = fn_job.batches(12, size=512)

    class Reusing:
        """Yields one dict over and over, its arrays overwritten; numpy for two, torch for one."""

        def __len__(self):
            return len(made)

        def __iter__(self):
            buffer = {k: aligned(v) for k, v in made[0].items()}
            buffer["labels"] = torch.from_numpy(buffer["labels"])
            for batch in made:
                for name, value in batch.items():
                    buffer[name][:] = torch.from_numpy(value) if name == "labels" else value
                yield buffer
                for value in buffer.values():
                    value[:] = 0

    trained = {}
    for name, loader in (("copied", made), ("reused", Reusing())):
        distiller = fn_job.distiller(
            tmp_path / name, config={"hard_label_weight": 1}, keys=("logits", "losses")
        )
        with distiller:
            distiller.train(fn_job.SGD, loader, num_epochs=1)
        trained[name] = distiller.model_S.params
    jax.tree.map(np.testing.assert_array_equal, trained["copied"], trained["reused"])


# -------------------------------------------------------------------------------- ids and sides


def model(input_ids, token_type_ids=None, attention_mask=None):
    pass


SIGNATURE = inspect.signature(model)
LIMITS = {"input_ids": 10, "token_type_ids": 2}


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"input_ids": np.array([[0, 10]])}, "input_ids holds 10, but model_T knows ids 0 to 9"),
        ({"input_ids": np.array([[0, -1]])}, "input_ids holds -1"),
        ({"input_ids": (np.array([[9]]), np.array([[12]]))}, "input_ids holds 12"),
        ({"input_ids": np.array([[3]]), "token_type_ids": np.array([2])}, "token_type_ids holds 2"),
        ((np.array([10]),), "input_ids holds 10"),
        ((np.array([1]), np.array([-100])), "token_type_ids holds -100"),
        (Pair(np.array([77]), np.ones(1)), "input_ids holds 77"),
        (np.array([[1, 99]]), "input_ids holds 99"),
        ({"input_ids": np.array([2**40])}, "input_ids holds 1099511627776"),
        ({"input_ids": jnp.array([[0, 10]])}, "input_ids holds 10"),
        ((jnp.array([[0, -1]], jnp.int16),), "input_ids holds -1"),
    ],
)
def test_ids_outside_the_vocabulary(batch, message):
    with pytest.raises(BatchError, match=message):
        batches.check_ids(batch, SIGNATURE, LIMITS, "model_T")


@pytest.mark.parametrize(
    "batch",
    [
        {"input_ids": np.array([[0, 9]]), "attention_mask": np.array([500])},
        (np.array([0, 9], np.uint8), np.array([0, 1])),
        {"input_ids": jnp.array([0, 9])},
        {"input_ids": jnp.array([10.0])},
        {"input_ids": np.array([10.0])},  # not ids: soft inputs
        {"input_ids": np.zeros((0, 4), int)},
        {"input_ids": Static(None)},
    ],
)
def test_ids_that_are_fine_or_not_looked_at(batch):
    batches.check_ids(batch, SIGNATURE, LIMITS, "model_T")


def test_each_side_gets_its_own_part():
    both = {"teacher": {"a": 1}, "student": (2,)}
    assert batches.sides(both) == ({"a": 1}, (2,), None)
    assert batches.sides({**both, "teacher_cache": 3}) == ({"a": 1}, (2,), 3)
    only_one = {"teacher": 1, "ids": 2}
    assert batches.sides(only_one) == (only_one, only_one, None)
    assert batches.sides((1, 2)) == ((1, 2), (1, 2), None)


def test_a_batch_is_described_by_shapes():
    batch = batches.own({"ids": np.zeros((2, 3), np.int32), "x": (np.zeros(4, np.float32),)})
    assert batches.signature_of(batch) == "ids int32[2, 3], x.0 float32[4]"
