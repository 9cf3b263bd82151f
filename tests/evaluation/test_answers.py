"""Answers in text: the best span, and SQuAD's exact match and F1."""

import copy

import numpy as np
import pytest

from jaxbrewer.evaluation.answers import Answers, Spans, Window, best_span, normalized, score

CONTEXT = "The red fox sleeps here"
# [CLS] q [SEP] The red fox sleeps here [SEP]
OFFSETS = (None, None, None, (0, 3), (4, 7), (8, 11), (12, 18), (19, 23), None)


def logits(place, high=5.0, length=9):
    found = np.zeros(length, np.float32)
    found[place] = high
    return found


def test_the_best_span_lies_in_the_context_and_does_not_end_before_it_begins():
    total, (first, last) = best_span(logits(4), logits(5), OFFSETS)
    assert CONTEXT[first:last] == "red fox" and total == 10
    total, (first, last) = best_span(logits(0, 9) + logits(4), logits(8, 9) + logits(3, 4), OFFSETS)
    assert (
        CONTEXT[first:last].startswith("red") and total == 5
    )  # neither the question nor backwards
    assert best_span(logits(1), logits(2), (None,) * 9)[0] == -np.inf


def test_an_answer_has_at_most_thirty_tokens():
    offsets = tuple((i, i + 1) for i in range(40))
    first, last = logits(0, 5, 40), logits(35, 5, 40)
    total, (start, end) = best_span(first, last, offsets)
    assert total == 5 and end - start <= 30


def test_the_best_window_counts_and_an_empty_answer_where_it_may():
    windows = [Window(0, OFFSETS), Window(1, OFFSETS), Window(0, OFFSETS)]
    starts = np.stack([logits(4, 2), logits(0, 7), logits(5, 3)])
    ends = np.stack([logits(5, 2), logits(0, 7), logits(5, 3)])
    for may_lack, expected in ((True, ["fox", ""]), (False, ["fox", "The"])):
        spans = Spans(windows, [CONTEXT] * 2, may_lack=may_lack)
        spans.take(starts, ends)
        assert [text for text, _ in spans.found()] == expected
    with pytest.raises(ValueError, match="more rows than windows"):
        spans.take(starts, ends)


def test_text_is_compared_as_squads_script_does():
    assert normalized("The  Red-Fox, a!") == "redfox"
    assert score("the red fox", ["Red fox.", "a"]) == {"exact_match": 1, "f1": 1}
    found = score("red fox sleeps", ["fox"])
    assert found["exact_match"] == 0 and found["f1"] == pytest.approx(0.5)
    assert score("", []) == {"exact_match": 1, "f1": 1}
    assert score("fox", []) == {"exact_match": 0, "f1": 0}
    assert score("fox fox", ["fox"])["f1"] == pytest.approx(2 / 3)


def test_the_metric_takes_batches_and_begins_anew_in_a_copy():
    metric = Answers(
        [Window(0, OFFSETS), Window(1, OFFSETS)], [CONTEXT] * 2, [["red fox"], ["here"]]
    )
    for _ in range(2):
        fresh = copy.deepcopy(metric)
        for place in (4, 6):
            pair = [logits(place)[None], logits(place + 1)[None]]
            fresh.update({}, {"logits": pair})
        found = fresh.compute()
        assert found["exact_match"] == 0.5 and found["f1"] == pytest.approx((1 + 2 / 3) / 2)
    with pytest.raises(ValueError, match="wants two logits"):
        copy.deepcopy(metric).update({}, {"logits": np.zeros((1, 9))})
