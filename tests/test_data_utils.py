"""The augmentations: TextBrewer's outputs for the same seed, edge cases, generators."""

import numpy as np
import pytest

from jaxbrewer import data_utils

CASES = {
    "masking": [{}, {"p": 0.5}, {"p": 1, "mask": 103}, {"p": 0}],
    "deleting": [{}, {"p": 0.5}, {"p": 1}, {"p": 0}],
    "n_gram_sampling": [{}, {"p_ng": [0.5, 0.5], "l_ng": [2, 1]}, {"p_ng": [1], "l_ng": [1]}],
    "short_disorder": [{}, {"p": [0.2] * 5}, {"p": [0, 0, 0.3, 0.3, 0.4]}, {"p": [1, 0, 0, 0, 0]}],
    "long_disorder": [
        {},
        {"p": 1, "length": 0.4},
        {"p": 0.5, "length": 5},
        {"p": 0.3, "length": 1},
        {"p": 0.3, "length": 1.7},
        {"p": 0.3, "length": 2.9},
    ],
}
ALL = [(name, kwargs) for name, cases in CASES.items() for kwargs in cases]


@pytest.mark.torch
@pytest.mark.parametrize(("name", "kwargs"), ALL)
def test_equals_textbrewer_for_the_same_seed(name, kwargs):
    from textbrewer import data_utils as reference

    ours, theirs = getattr(data_utils, name), getattr(reference, name)
    for seed in range(60):
        tokens = [f"token{i}" for i in range(5 + seed % 40)]
        np.random.seed(seed)
        expected, expected_next = theirs(list(tokens), **kwargs), np.random.rand()
        np.random.seed(seed)
        assert ours(tokens, **kwargs) == expected
        assert np.random.rand() == expected_next  # as many numbers were drawn
        assert tokens == [f"token{i}" for i in range(len(tokens))]


@pytest.mark.torch
def test_short_lists_equal_textbrewer():
    from textbrewer import data_utils as reference

    cases = [
        ("masking", {"p": 0.5}),
        ("deleting", {"p": 0.5}),
        ("short_disorder", {"p": [0.2] * 5}),
    ]
    for name, kwargs in cases:
        for seed in range(20):
            for length in range(4):
                np.random.seed(seed)
                expected = getattr(reference, name)(list(range(length)), **kwargs)
                np.random.seed(seed)
                assert getattr(data_utils, name)(list(range(length)), **kwargs) == expected


def test_positional_arguments_come_in_textbrewers_order():
    assert data_utils.masking([1, 2], 1, 0) == [0, 0]
    assert data_utils.n_gram_sampling([1, 2, 3], [1], [3]) == [1, 2, 3]
    assert data_utils.long_disorder([1, 2, 3, 4], 1, 4) == [3, 4, 1, 2]


@pytest.mark.parametrize(("name", "kwargs"), ALL)
def test_rng_repeats_and_leaves_the_global_generator_alone(name, kwargs):
    function, tokens = getattr(data_utils, name), list(range(50))
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    for make in (np.random.default_rng, np.random.RandomState, int, np.int64):
        first = [function(tokens, rng=make(7), **kwargs) for _ in range(2)]
        assert first[0] == first[1]
    assert function(tokens, rng=7, **kwargs) == function(
        tokens, rng=np.random.default_rng(7), **kwargs
    )
    np.testing.assert_array_equal(before, np.random.get_state()[1])


def test_rng_of_the_same_kind_as_the_global_one_gives_the_same():
    for name, kwargs in ALL:
        np.random.seed(11)
        expected = getattr(data_utils, name)(list(range(30)), **kwargs)
        rng = np.random.RandomState(11)
        assert getattr(data_utils, name)(list(range(30)), rng=rng, **kwargs) == expected


def test_one_generator_moves_on_from_call_to_call():
    rng, tokens = np.random.default_rng(0), list(range(200))
    assert data_utils.masking(tokens, rng=rng) != data_utils.masking(tokens, rng=rng)


@pytest.mark.parametrize("name", CASES)
def test_empty_list_gives_empty_list(name):
    assert getattr(data_utils, name)([]) == []
    assert getattr(data_utils, name)([], rng=0) == []


@pytest.mark.parametrize("name", CASES)
def test_tuples_and_arrays_give_lists_and_stay_as_they_are(name):
    array = np.arange(30)
    result = getattr(data_utils, name)(array, rng=0)
    assert isinstance(result, list)
    assert result == getattr(data_utils, name)(tuple(range(30)), rng=0)
    np.testing.assert_array_equal(array, np.arange(30))


def test_n_gram_longer_than_the_text_is_the_text():
    for seed in range(10):
        assert data_utils.n_gram_sampling([1, 2], [1], [5], rng=seed) == [1, 2]
        assert data_utils.n_gram_sampling([1, 2], [1], [2], rng=seed) == [1, 2]


def test_n_gram_starts_everywhere():
    rng = np.random.default_rng(0)
    found = {data_utils.n_gram_sampling("abcd", [1], [2], rng=rng)[0] for _ in range(100)}
    assert found == {"a", "b", "c"}


def test_long_disorder_of_a_share_that_comes_to_nothing_leaves_the_text():
    assert data_utils.long_disorder([1, 2, 3], p=1, length=0.2) == [1, 2, 3]


def test_rates_are_the_probabilities():
    tokens = list(range(20000))
    masked = data_utils.masking(tokens, 0.3, -1, rng=0)
    assert abs(masked.count(-1) / 20000 - 0.3) < 0.02
    assert abs(len(data_utils.deleting(tokens, 0.3, rng=0)) / 20000 - 0.7) < 0.02
    assert sorted(data_utils.short_disorder(tokens, [0.2] * 5, rng=0)) == tokens
    assert sorted(data_utils.long_disorder(tokens, 0.2, rng=0)) == tokens


@pytest.mark.parametrize("p", [-0.1, 1.1, float("nan"), "0.1", None, True])
@pytest.mark.parametrize("name", ["masking", "deleting", "long_disorder"])
def test_a_probability_out_of_range_is_refused(name, p):
    with pytest.raises(ValueError, match="p must be a probability from 0 to 1"):
        getattr(data_utils, name)([1, 2, 3], p)


@pytest.mark.parametrize(
    "p", [[0.5, 0.1, 0, 0, 0], [1.5, -0.5, 0, 0, 0], [float("nan"), 1, 0, 0, 0]]
)
def test_probabilities_that_do_not_sum_to_one_are_refused(p):
    with pytest.raises(ValueError, match="sum to 1"):
        data_utils.short_disorder([1, 2, 3], p)
    with pytest.raises(ValueError, match=r"p_ng must be .* sum to 1"):
        data_utils.n_gram_sampling([1, 2, 3], p)


def test_lists_of_the_wrong_length_are_refused():
    with pytest.raises(ValueError, match="p must be 5 probabilities"):
        data_utils.short_disorder([1, 2, 3], [1])
    with pytest.raises(ValueError, match="p_ng must be 2 probabilities"):
        data_utils.n_gram_sampling([1, 2, 3], [1], [1, 2])


@pytest.mark.parametrize("lengths", [[0], [1.5], [-1], 3])
def test_n_gram_lengths_are_positive_integers(lengths):
    with pytest.raises(ValueError, match="l_ng must be integers"):
        data_utils.n_gram_sampling([1, 2, 3], [1], lengths)


@pytest.mark.parametrize("length", [0, -1, float("nan"), float("inf")])
def test_span_lengths_are_positive(length):
    with pytest.raises(ValueError, match="length must be above 0"):
        data_utils.long_disorder([1, 2, 3], 0.1, length)


@pytest.mark.parametrize("rng", ["0", -1, 1.5, True, object()])
def test_an_unknown_rng_is_refused(rng):
    with pytest.raises(TypeError, match="rng must be a seed"):
        data_utils.masking([1, 2, 3], rng=rng)
