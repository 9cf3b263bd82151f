"""Masked words: shares, what is never masked, the same draws again, and what is refused."""

import functools

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxbrewer import (
    BasicTrainer,
    CallbackResult,
    DistillationConfig,
    FunctionModel,
    GeneralDistiller,
    TrainingConfig,
    zoo,
)
from jaxbrewer.data import bucket_by_length, mask_words
from jaxbrewer.data.batches import own
from jaxbrewer.errors import BatchError, PreflightError
from jaxbrewer.preflight import prepare
from jaxbrewer.training.folders import steps_in
from jaxbrewer.zoo import heads

MASK, SPECIAL, WORDS = 4, (0, 1, 2, 3), 50
how = functools.partial(mask_words, mask_id=MASK, vocab_size=WORDS, special_ids=SPECIAL)


def ragged(count=200, length=40, seed=0):
    """Batches of sentences with special ids at both ends, and padding."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(5, WORDS, (count, length))
    lengths = rng.integers(3, length + 1, count)
    ids[:, 0], ids[np.arange(count), lengths - 1] = 1, 2
    mask = (np.arange(length) < lengths[:, None]).astype(np.int32)
    return [{"input_ids": np.where(mask, ids, 7), "attention_mask": mask}]  # padding like a word


def test_the_shares_are_those_of_bert():
    (batch,) = ragged(2000)
    (made,) = how([batch])
    ids, labels = batch["input_ids"], made["labels"]
    may = (batch["attention_mask"] == 1) & ~np.isin(ids, SPECIAL)
    asked = labels != -100
    assert not asked[~may].any()
    np.testing.assert_array_equal(labels[asked], ids[asked])
    np.testing.assert_array_equal(made["input_ids"][~asked], ids[~asked])
    assert labels.dtype == np.int32 and made["input_ids"].dtype == ids.dtype
    new, old = made["input_ids"][asked], ids[asked]
    masked, kept = new == MASK, new == old
    others = ~masked & ~kept
    # 45 words, one of which is the old one; three deviations of a share in so many draws.
    for found, of, share in (
        (asked.sum(), may.sum(), 0.15),
        (masked.sum(), asked.sum(), 0.8),
        (kept.sum(), asked.sum(), 0.1 + 0.1 / 45),
        (others.sum(), asked.sum(), 0.1 - 0.1 / 45),
    ):
        assert abs(found / of - share) < 3 * (share * (1 - share) / of) ** 0.5
    assert set(new[others]) == set(range(5, WORDS))
    assert made["attention_mask"] is batch["attention_mask"]


def test_draws_depend_on_seed_epoch_place_and_rank_alone():
    loader = how(ragged() * 3)
    first = [batch["labels"] for batch in loader]
    again = [batch["labels"] for batch in loader]
    np.testing.assert_array_equal(first, again)
    assert len(loader) == 3
    others = [first[1], first[2]]
    for options in ({"seed": 1}, {"rank": 1}):
        others.append(next(iter(how(ragged(), **options)))["labels"])
    loader.set_epoch(1)
    others.append(next(iter(loader))["labels"])
    for other in others:
        assert (other != first[0]).any()
    loader.set_epoch(0)
    np.testing.assert_array_equal(next(iter(loader))["labels"], first[0])


def test_seeds_with_zeros_at_their_end_differ():
    (one,), (other,) = (how(ragged(), seed=seed) for seed in (0, 1))
    assert (one["labels"] != other["labels"]).any()


def test_the_loaders_order_and_generators_are_reached():
    examples = [{"input_ids": [1, *range(5, 5 + n), 2]} for n in range(1, 30)]
    inner = bucket_by_length(examples, 4, 2, mask="attention_mask", seed=3)
    loader = how(inner)
    loader.set_epoch(5)
    inner_order = [batch["attention_mask"].sum() for batch in inner]
    assert [batch["attention_mask"].sum() for batch in loader] == inner_order
    assert not hasattr(loader, "generator")

    class Shown(list):
        generator = np.random.default_rng(0)

    assert how(Shown(ragged())).generator is Shown.generator
    with pytest.raises(TypeError):
        len(how(iter(ragged())))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"probability": 0}, "probability=0: expected a number above 0"),
        ({"probability": 1.5}, r"probability=1\.5"),
        ({"mask_id": 50}, r"name \[50\], which are outside vocab_size=50"),
        ({"special_ids": (-1, 3)}, r"name \[-1\]"),
        ({"special_ids": range(50)}, "no word is left"),
        ({"seed": -1}, "seed=-1: expected a whole number of 0 or more"),
        ({"rank": -1}, "rank=-1"),
        ({"mask_id": None}, "mask_id=None: expected a whole number"),
        ({"mask_id": True}, "mask_id=True: expected a whole number"),
        ({"special_ids": ["[PAD]"]}, r"special_ids=\['\[PAD\]'\]: expected whole numbers, such as"),
        ({"special_ids": 3}, "special_ids=3: expected whole numbers"),
        ({"probability": "0.1"}, "probability='0.1': expected a number"),
        ({"probability": True}, "probability=True: expected a number"),
    ],
)
def test_arguments_that_cannot_be_meant(options, message):
    with pytest.raises(ValueError, match=message):
        how([], **options)


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"ids": np.ones((2, 3), int)}, r"batch 0 has no 'input_ids' to mask, but \['ids'\]"),
        ((np.ones((2, 3), int),), "but a tuple"),
        ({"input_ids": np.ones((2, 3), int), "labels": np.ones(2)}, "has 'labels' already"),
        ({"input_ids": np.ones((2, 3))}, r"float64\[2, 3\], expected integers"),
        ({"input_ids": np.ones(3, int)}, r"int64\[3\], expected integers of shape"),
        (
            {"input_ids": np.ones((2, 3), int), "attention_mask": np.ones(3)},
            r"'attention_mask' is \[3\], and 'input_ids' \[2, 3\]",
        ),
    ],
)
def test_batches_that_cannot_be_masked(batch, message):
    with pytest.raises(BatchError, match=message):
        list(how([batch]))


# ------------------------------------------------------------------------------------- as a job

SGD = functools.partial(optax.sgd, 0.1)
CONFIG = zoo.BertConfig(
    vocab_size=WORDS,
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=16,
    output_qkv=True,
)


def corpus():
    rng = np.random.default_rng(0)
    sentences = [[1, *rng.integers(5, WORDS, n), 2] for n in rng.integers(2, 7, 22)]
    examples = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in sentences]
    return how(bucket_by_length(examples, 4, (8,)), probability=0.5)


def test_a_resumed_run_sees_the_same_masks(tmp_path):
    def score(params, input_ids, attention_mask, labels):
        logits = params[input_ids] @ params.T
        return heads.token_classification_loss(logits, labels)

    def train(folder, callback=None, **options):
        params = jax.random.normal(jax.random.key(0), (WORDS, 4))
        config = TrainingConfig(output_dir=tmp_path / folder, device="cpu", **options)
        mine = BasicTrainer(
            config, FunctionModel(score, params), lambda batch, outputs: {"losses": outputs}
        )
        with mine:
            mine.train(SGD, corpus(), num_epochs=2, callback=callback)
        return np.asarray(mine.model.params)

    middle = len(corpus()) + 2
    straight = train("a")
    train("b", lambda model, step: CallbackResult(stop=step == middle), ckpt_frequency=3)
    assert steps_in(tmp_path / "b")[-1] == middle
    np.testing.assert_array_equal(train("b", ckpt_frequency=3, resume=True), straight)


def distiller(folder, teacher):
    """Masked words, their labels, and the relations of the last layer; the student is narrower."""
    relations = [
        {"feature": name, "layer_T": -1, "layer_S": -1, "loss": "relation", "weight": 1}
        for name in ("query", "key", "value")
    ]
    configs = teacher, CONFIG.replace(hidden_size=4)
    return GeneralDistiller(
        TrainingConfig(output_dir=folder / "out", device="cpu"),
        DistillationConfig(hard_label_weight=0.5, intermediate_matches=relations),
        *(zoo.BertForMaskedLM(config, rngs=nnx.Rngs(0)) for config in configs),
        zoo.adaptor("masked-lm"),
        zoo.adaptor("masked-lm"),
    )


def test_the_whole_job_fits_together_and_says_what_is_missing(tmp_path):
    batches = {"": own(next(iter(corpus())))}
    prepare(distiller(tmp_path, CONFIG).job(), batches, SGD)
    for changes, message in (
        ({"output_qkv": False}, r"adaptor_T returns no 'query'.*output_qkv=True"),
        ({"hidden_size": 9, "num_attention_heads": 3}, r"3 relation heads.*4 numbers.*teacher's 9"),
    ):
        with pytest.raises(PreflightError, match=message):
            prepare(distiller(tmp_path, CONFIG.replace(**changes)).job(), batches, SGD)
