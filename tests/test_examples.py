"""The examples: the quickstart's data is the same in each run, and its shapes fit together."""

import importlib
import sys
from pathlib import Path

import numpy as np
import pytest

EXAMPLES = Path(__file__).parent.parent / "examples"


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "quickstart"))
    yield importlib.import_module("quickstart")
    for name in ("quickstart", "corpus"):
        sys.modules.pop(name, None)


def test_passages_are_the_same_each_time_and_never_on_both_sides(quickstart):
    corpus = sys.modules["corpus"]
    everything = corpus.passages()
    assert everything == corpus.passages()
    train, dev = corpus.split(everything)
    assert len(train) > 4 * len(dev) / 2 > 500
    assert not {p.group for p in train} & {p.group for p in dev}
    assert {p.label for p in dev} == set(range(len(corpus.PACKAGES)))
    assert not any(name in p.text for p in everything for name in ("asyncio", "unittest"))


def test_the_few_labels_are_a_fifth_of_each_class_and_the_order_is_the_epochs(quickstart):
    data = {
        "input_ids": np.arange(1200).reshape(600, 2),
        "labels": np.repeat(np.arange(12), 50),
    }
    few = quickstart.a_fifth(data, seed=0)
    assert np.bincount(few["labels"]).tolist() == [10] * 12
    loader = quickstart.Loader(data, seed=1)
    first, again = ([b["input_ids"] for b in loader] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    loader.set_epoch(1)
    assert (np.stack([b["input_ids"] for b in loader]) != np.stack(first)).any()
    assert len(first) == len(loader) == 18


def test_the_objective_is_a_config(quickstart):
    losses = [match.loss for match in quickstart.objective().intermediate_matches]
    assert losses == ["hidden_mse", "hidden_mse", "nst"]
