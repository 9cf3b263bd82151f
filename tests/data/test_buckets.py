"""Length buckets: what is in a batch, how many shapes, the order, resuming, and what is refused."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxbrewer
from jaxbrewer.data import buckets as data
from jaxbrewer.data.buckets import bucket_by_length
from jaxbrewer.errors import BatchError
from jaxbrewer.training.folders import steps_in
from tests import fn_job, nnx_job


def examples(count=50, longest=30, seed=0):
    """Examples of 1 to `longest` ids, each beginning with its own number."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, longest + 1, count)
    lengths[0] = longest
    return [
        {
            "ids": np.concatenate([[i], rng.integers(1, 20, n - 1)]).astype(np.int32),
            "mask": [1] * int(n),
            "label": int(i % 3),
            "vector": np.full(5, i, np.float32),
        }
        for i, n in enumerate(lengths)
    ]


def rows(loader):
    """The numbers of the examples of each batch, and its length."""
    return [(tuple(batch["ids"][:, 0].tolist()), batch["ids"].shape[1]) for batch in loader]


# ----------------------------------------------------------------------------- what is in a batch


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("buckets", [3, (10, 20, 40), [30]])
def test_every_example_comes_once_whole_and_padded(buckets, shuffle):
    made = examples()
    loader = bucket_by_length(made, 8, buckets, padding={"ids": -7}, shuffle=shuffle)
    seen = []
    for batch in loader:
        fields = [batch[name] for name in ("ids", "mask", "label", "vector")]
        for ids, mask, label, vector in zip(*fields, strict=True):
            i, n = int(ids[0]), int(mask.sum())
            seen.append(i)
            np.testing.assert_array_equal(ids[:n], made[i]["ids"])
            assert (ids[n:] == -7).all()
            assert n == len(made[i]["ids"])
            assert (mask[:n] == 1).all()
            assert label == made[i]["label"]
            np.testing.assert_array_equal(vector, made[i]["vector"])
        assert {k: v.dtype.name for k, v in batch.items()} == {
            "ids": "int32", "mask": "int64", "label": "int64", "vector": "float32"
        }  # fmt: skip
        assert batch["ids"].shape == batch["mask"].shape
        assert batch["ids"].shape[1] in loader.buckets
    assert sorted(seen) == list(range(50))


def test_short_examples_are_in_short_batches():
    made = examples(400)
    loader = bucket_by_length(made, 8, (8, 16, 32))
    moved_up = 0
    for numbers, length in rows(loader):
        fits = [n for n in numbers if len(made[n]["ids"]) > length / 2 or length == 8]
        moved_up += len(numbers) - len(fits)
    assert moved_up < 2 * 8  # less than a batch from each of the two shorter buckets


def test_only_the_longest_bucket_has_a_ragged_batch():
    for count in range(1, 60, 7):
        loader = bucket_by_length(examples(count), 8, (10, 20, 40))
        sizes = [(len(numbers), length) for numbers, length in rows(loader)]
        ragged = [size for size in sizes if size[0] != 8]
        assert ragged == ([(count % 8, 40)] if count % 8 else [])
        assert len(sizes) == len(loader) == -(-count // 8)
        assert set(sizes) == set(loader.shapes)
        assert len(loader.shapes) <= len(loader.buckets) + 1


def test_shapes_are_those_of_every_epoch():
    loader = bucket_by_length(examples(43), 4, (8, 12, 16, 20, 24, 32))
    first = loader.shapes
    for epoch in range(30):
        loader.set_epoch(epoch)
        assert loader.shapes == first
        assert len(list(loader)) == len(loader)


def test_the_ragged_batch_can_be_dropped():
    loader = bucket_by_length(examples(21), 4, (8, 32), drop_last=True)
    assert [len(numbers) for numbers, _ in rows(loader)] == [4] * 5
    assert len(loader) == 5
    with pytest.raises(ValueError, match="3 examples do not fill one batch of 4"):
        bucket_by_length(examples(3), 4, (8, 32), drop_last=True)


def test_fields_of_several_axes_are_padded_along_the_first():
    made = [{"ids": [i] * n, "boxes": np.full((n, 2, 3), i)} for i, n in enumerate((1, 4, 2), 1)]
    (batch,) = bucket_by_length(made, 3, (6,), shuffle=False)
    assert batch["boxes"].shape == (3, 6, 2, 3)
    np.testing.assert_array_equal(batch["boxes"][..., 1, 2], batch["ids"])
    np.testing.assert_array_equal(batch["ids"].sum(axis=1), [1, 8, 6])


def test_where_no_length_differs_the_longest_fields_are_padded():
    made = [{"ids": [1] * 5, "mask": [1] * 5, "vector": [2.0, 3.0], "label": 0}] * 2
    (batch,) = bucket_by_length(made, 2)
    assert {k: v.shape for k, v in batch.items()} == {
        "ids": (2, 8), "mask": (2, 8), "vector": (2, 2), "label": (2,)
    }  # fmt: skip


def test_each_side_can_have_its_own_tokens():
    made = [
        {"teacher": {"ids": [1] * t}, "student": {"ids": [2] * s}, "pair": (3, [4] * s)}
        for t, s in ((3, 9), (12, 2), (5, 6))
    ]
    padding = {"teacher.ids": -1, "student.ids": -2, "pair.1": -4}
    batches = list(bucket_by_length(made, 1, (6, 10, 12), padding=padding, shuffle=False))
    assert [batch["student"]["ids"].shape[1] for batch in batches] == [6, 10, 12]
    np.testing.assert_array_equal(batches[1]["teacher"]["ids"], [[1] * 3 + [-1] * 7])
    np.testing.assert_array_equal(batches[1]["student"]["ids"], [[2] * 9 + [-2]])
    np.testing.assert_array_equal(batches[1]["pair"][1], [[4] * 9 + [-4]])
    np.testing.assert_array_equal(batches[1]["pair"][0], [3])


def test_tuples_stay_tuples():
    made = [([1, 2, 3], 0), ([4], 1)]
    (batch,) = bucket_by_length(made, 2, (4,), padding={"0": 9}, shuffle=False)
    assert type(batch) is tuple
    np.testing.assert_array_equal(batch[0], [[1, 2, 3, 9], [4, 9, 9, 9]])
    np.testing.assert_array_equal(batch[1], [0, 1])


COLUMNS = {"input_ids": [[1, 2, 3], [4], [5, 6]], "labels": [0, 1, 0]}


@pytest.mark.parametrize(
    "given",
    [
        COLUMNS,
        {**COLUMNS, "labels": np.array([0, 1, 0])},
        {"input_ids": tuple(COLUMNS["input_ids"]), "labels": [0, 1, 0]},
        [dict(zip(COLUMNS, row, strict=True)) for row in zip(*COLUMNS.values(), strict=True)],
        ({"input_ids": jnp.array(i), "labels": n} for i, n in zip(*COLUMNS.values(), strict=True)),
    ],
)
def test_columns_rows_and_kinds_of_arrays(given):
    (batch,) = bucket_by_length(given, 3, (4,), shuffle=False)
    np.testing.assert_array_equal(batch["input_ids"], [[1, 2, 3, 0], [4, 0, 0, 0], [5, 6, 0, 0]])
    assert batch["labels"].shape == (3,)


@pytest.mark.torch
def test_what_torch_and_transformers_give():
    import torch
    from transformers import BatchEncoding

    for given in [
        BatchEncoding(COLUMNS),
        {"input_ids": tuple(COLUMNS["input_ids"]), "labels": torch.tensor([0, 1, 0])},
        [{"input_ids": torch.tensor(i), "labels": 0} for i in COLUMNS["input_ids"]],
        iter([BatchEncoding({"input_ids": i, "labels": 0}) for i in COLUMNS["input_ids"]]),
    ]:
        test_columns_rows_and_kinds_of_arrays(given)


def test_empty_examples_are_all_padding():
    made = [{"ids": [], "label": 1}, {"ids": [5, 6], "label": 0}]
    (batch,) = bucket_by_length(made, 2, padding={"ids": 3}, mask="mask", shuffle=False)
    np.testing.assert_array_equal(batch["ids"], [[3] * 8, [5, 6] + [3] * 6])
    np.testing.assert_array_equal(batch["mask"].sum(axis=1), [0, 2])
    assert batch["ids"].dtype.kind == "i"


def test_a_mask_is_added():
    made = [{"ids": example["ids"]} for example in examples()]
    for batch in bucket_by_length(made, 8, 4, padding={"ids": -1}, mask="attention_mask"):
        np.testing.assert_array_equal(batch["attention_mask"], batch["ids"] != -1)
        assert batch["attention_mask"].dtype == np.int32


# ------------------------------------------------------------------------------ choosing lengths


def positions(lengths, buckets):
    return sum(min(b for b in buckets if b >= n) for n in lengths)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("most", [1, 2, 3, 5])
def test_the_chosen_lengths_pad_least(most, seed):
    rng = np.random.default_rng(seed)
    lengths = np.minimum(1 + rng.geometric(0.05, 40), 60)
    chosen = bucket_by_length([{"ids": [1] * n} for n in lengths], 4, most).buckets
    every = sorted({-(-n // 8) * 8 for n in lengths})
    best = min(
        positions(lengths, (*some, every[-1]))
        for count in range(most)
        for some in itertools.combinations(every[:-1], count)
    )
    assert positions(lengths, chosen) == best
    assert len(chosen) <= most
    assert set(chosen) <= set(every)


def test_no_more_lengths_are_chosen_than_there_are():
    assert bucket_by_length([{"ids": [1] * n} for n in (2, 7, 20)], 1, 8).buckets == (8, 24)


def test_it_tells_how_full_it_is():
    loader = bucket_by_length([{"ids": [1] * n} for n in (4, 8, 20, 30)], 2, (8, 32))
    assert loader.fullness == (4 + 8 + 20 + 30) / (2 * 8 + 2 * 32)
    assert loader.counts == (2, 2)
    assert repr(loader) == (
        "<4 examples in 2 batches of 2, of the lengths 8, 32; 78% of the positions are used>"
    )


# ------------------------------------------------------------------------------------- the order


def test_the_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        loader = bucket_by_length(examples(), 4, (10, 20, 30), seed=seed)
        loader.set_epoch(epoch)
        return rows(loader)

    np.random.seed(3)
    first = order(0, 0)
    np.random.seed(4)
    assert order(0, 0) == first
    assert len({str(order(seed, epoch)) for seed in range(3) for epoch in range(3)}) == 9
    lengths = [length for _, length in first]
    assert lengths[:-1] != sorted(lengths[:-1])
    assert lengths[-1] == 30


def test_other_epochs_batch_other_examples_together():
    loader = bucket_by_length(examples(60), 4, (10, 20, 30))
    together = []
    for epoch in range(2):
        loader.set_epoch(epoch)
        together.append({frozenset(numbers) for numbers, _ in rows(loader)})
    assert len(together[0] & together[1]) < 3


def test_unshuffled_batches_come_in_order():
    loader = bucket_by_length(examples(), 4, (10, 20, 30), shuffle=False)
    first = rows(loader)
    loader.set_epoch(5)
    assert rows(loader) == first
    lengths = [length for _, length in first]
    assert lengths == sorted(lengths)
    assert all(numbers == tuple(sorted(numbers)) for numbers, length in first if length == 10)


def test_batches_are_arrays_of_their_own():
    loader = bucket_by_length(examples(), 4, (10, 20, 30))
    first = [batch["ids"].copy() for batch in loader]
    for batch in loader:
        for value in batch.values():
            value[:] = 0
    for before, after in zip(first, loader, strict=True):
        np.testing.assert_array_equal(before, after["ids"])


@pytest.mark.parametrize("count", [48, 43, 41])
def test_processes_share_the_batches_of_one(count):
    def order(**share):
        loader = bucket_by_length(examples(count), 8 // share.get("num_replicas", 1), 3, **share)
        loader.set_epoch(2)
        assert len(loader) == len(list(loader))
        return rows(loader)

    alone = order()
    shares = [order(num_replicas=2, rank=rank) for rank in range(2)]
    assert len(shares[0]) == len(alone)
    joined = [
        (tuple(n for part, _ in parts for n in part), parts[0][1])
        for parts in itertools.zip_longest(*shares, fillvalue=((), None))
    ]
    assert joined == alone
    assert len(shares[1]) == len(alone) - (count == 41)


# --------------------------------------------------------------------------------------- training


def bucketed():
    rng = np.random.default_rng(0)
    sentences = [
        {
            "ids": rng.integers(0, fn_job.VOCABULARY, n),
            "labels": int(n % fn_job.CLASSES),
        }
        for n in rng.integers(1, 9, 21)
    ]
    return bucket_by_length(sentences, 4, (4, 8), mask="mask", seed=1)


def distiller(folder, **training):
    return fn_job.distiller(
        folder, config={"hard_label_weight": 1}, keys=("logits", "losses"), **training
    )


def test_training_compiles_once_a_shape_and_never_after_the_first_epoch(tmp_path):
    loader, counts, compiles = bucketed(), [], nnx_job.Compiles()
    mine = distiller(tmp_path)
    with mine, compiles:
        mine.train(
            fn_job.SGD,
            loader,
            num_epochs=3,
            callback=lambda model, step: counts.append(compiles.count),
        )
    assert len(counts) == 3
    assert counts[0] >= len(loader.shapes) == 3
    assert counts[1:] == [counts[0]] * 2


def test_a_run_resumes_in_the_middle_of_an_epoch(tmp_path):
    straight = distiller(tmp_path / "a")
    with straight:
        straight.train(fn_job.SGD, bucketed(), num_epochs=3)
    middle = len(bucketed()) + 2

    def stop(model, step):
        return jaxbrewer.CallbackResult(stop=step == middle)

    first = distiller(tmp_path / "b", ckpt_frequency=3)
    with first:
        first.train(fn_job.SGD, bucketed(), num_epochs=3, callback=stop)
    assert steps_in(tmp_path / "b" / "out")[-1] == middle
    second = distiller(tmp_path / "b", ckpt_frequency=3, resume=True)
    with second:
        second.train(fn_job.SGD, bucketed(), num_epochs=3)
    jax.tree.map(np.testing.assert_array_equal, straight.model_S.params, second.model_S.params)


# -------------------------------------------------------------------------------------- the refused


REFUSED = {
    "no batch": ({"batch_size": 0}, "batch_size=0: expected a whole number"),
    "half a batch": ({"batch_size": 1.5}, r"batch_size=1\.5"),
    "no processes": ({"num_replicas": 0}, "num_replicas=0: expected a whole"),
    "no such process": (
        {"num_replicas": 2, "rank": 2},
        "rank=2: expected a whole number from 0 to 1",
    ),
    "no buckets": ({"buckets": ()}, r"buckets=\(\): expected lengths in rising order"),
    "falling": ({"buckets": (32, 16)}, r"buckets=\(32, 16\): expected lengths in rising"),
    "twice": ({"buckets": (32, 32)}, "rising order"),
    "a text": ({"buckets": "32"}, "buckets='32'"),
    "none": ({"buckets": 0}, "buckets=0"),
    "flag": ({"buckets": True}, "buckets=True"),
    "unknown field": ({"padding": {"idz": 1}}, "no field 'idz': did you mean 'ids'"),
    "padding of numbers": ({"padding": {"label": 1}}, "'label', which is not padded.*'ids'"),
    "no such number": ({"padding": {"ids": 0.5}}, r"'ids': 0\.5.*int32"),
    "too large": ({"padding": {"ids": 2**40}}, "int32, which has no such number"),
    "text": ({"padding": {"ids": "[PAD]"}}, "has no such number"),
    "mask there": ({"mask": "mask"}, "mask='mask' would add that field"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_arguments_that_cannot_be_meant(name):
    changes, message = REFUSED[name]
    arguments = {"batch_size": 4, "buckets": (32,)} | changes
    with pytest.raises(ValueError, match=message):
        bucket_by_length(examples(), **arguments)


def test_numbers_a_field_has():
    made = [{"x": np.ones(n, np.float32), "flag": np.ones(n, bool)} for n in (1, 2)]
    for x, flag in ((float("nan"), 0), (-1e9, True), (0.1, False)):
        (batch,) = bucket_by_length(made, 2, padding={"x": x, "flag": flag}, shuffle=False)
        np.testing.assert_array_equal(batch["x"][1, 2:], np.float32(x))
        assert (batch["flag"][1, 2:] == bool(flag)).all()
    with pytest.raises(ValueError, match="bool, which has no such number"):
        bucket_by_length(made, 2, padding={"flag": 2})


def test_examples_longer_than_the_longest_bucket():
    with pytest.raises(BatchError) as caught:
        bucket_by_length(examples(50, longest=30), 4, (8, 16))
    message = str(caught.value)
    assert message.startswith("example 0 has length 30, and the longest bucket is 16, and ")
    assert "max_length=16" in message
    assert "add a bucket of 30" in message


IDS = {"ids": [1, 2]}

UNREADABLE = {
    "none": ([], "there are no examples"),
    "no columns": ({}, "there are no examples"),
    "empty columns": ({"ids": []}, "there are no examples"),
    "columns that differ": ({"ids": [[1]], "x": [1, 2]}, r"numbers of examples: .*'x': 2"),
    "an array": ([np.ones(3)], "example 0 is a ndarray; expected a dict"),
    "text": ([{**IDS, "text": "hello"}], r"'text' of example 0 holds <U5 \('hello'\).*Tokenise"),
    "nothing": ([IDS, {"ids": None}], "'ids' of example 1 holds object"),
    "other fields": ([IDS, {"id": [1]}], r"example 1 has the fields \['id'\], the first has"),
    "a field too many": ([IDS, {**IDS, "x": 1}], r"example 1 has the fields \['ids', 'x'\]"),
    "ragged inside": ([{"ids": [[1, 2], [3]]}], "list of lists of different lengths"),
    "other widths": ([{"x": np.ones((2, 3))}, {"x": np.ones((2, 4))}], "first axis only"),
    "number and list": ([{"x": 1}, {"x": [1]}], "first axis only"),
    "numbers alone": ([{"x": 1, "y": 2}], r"no field .* has a length: \['x', 'y'\]"),
}


@pytest.mark.parametrize("name", UNREADABLE)
def test_examples_that_cannot_be_batched(name):
    made, message = UNREADABLE[name]
    with pytest.raises(BatchError, match=message):
        bucket_by_length(made, 2)


def test_tuples_have_no_names_for_a_mask():
    with pytest.raises(ValueError, match="they are tuples"):
        bucket_by_length([([1, 2], 0)], 1, mask="mask")


def test_it_is_public():
    assert jaxbrewer.data.bucket_by_length is data.bucket_by_length
