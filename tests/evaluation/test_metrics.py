"""Each metric by hand, and over batches as over all at once."""

import numpy as np
import pytest

from jaxbrewer.evaluation import (
    F1,
    Accuracy,
    Agreement,
    Divergence,
    Matthews,
    Pearson,
    SpanF1,
    Spearman,
)
from jaxbrewer.evaluation.metrics import spans

LABELS = np.array([0, 1, 2, 2, 1, 0, 1, -100])
FOUND = np.array([0, 1, 1, 2, 1, 2, 0, 1])


def logits_of(classes, count):
    return np.eye(count)[classes] * 3.0


def computed(metric, *batches):
    for results in batches:
        metric.update({}, results)
    return metric.compute()


def in_batches(**results):
    """The same results whole, in two batches, and one by one."""
    size = len(next(iter(results.values())))
    for parts in (1, 2, size):
        rows = np.array_split(np.arange(size), parts)
        yield [{name: value[row] for name, value in results.items()} for row in rows]


@pytest.mark.parametrize(
    ("metric", "expected"),
    [
        (Accuracy(), {"accuracy": 4 / 7}),
        # class 1: found 3 times, there 3 times, both twice
        (F1(), {"f1": 2 / 3, "precision": 2 / 3, "recall": 2 / 3}),
        (F1(positive=2), {"f1": 0.5, "precision": 0.5, "recall": 0.5}),
        # classes 0, 1, 2: ½, ⅔, ½
        (F1("macro"), {"f1": 5 / 9, "precision": 5 / 9, "recall": 5 / 9}),
        # 7 labels, 4 right; there and found are 2, 3, 2: (4·7 − 17) / (49 − 17)
        (Matthews(), {"matthews": 11 / 32}),
    ],
    ids=["accuracy", "f1", "f1 of 2", "macro", "matthews"],
)
def test_of_classes(metric, expected):
    import copy

    for batches in in_batches(logits=logits_of(FOUND, 3), labels=LABELS):
        assert computed(copy.deepcopy(metric), *batches) == pytest.approx(expected)


def test_matthews_of_two_classes_is_the_known_formula():
    labels, found = np.array([1, 1, 1, 0, 0, 1]), np.array([1, 0, 1, 0, 1, 1])
    right = (3 * 1 - 1 * 1) / np.sqrt((3 + 1) * (3 + 1) * (1 + 1) * (1 + 1))
    got = computed(Matthews(), {"logits": logits_of(found, 2), "labels": labels})
    assert got["matthews"] == pytest.approx(right)
    constant = {"logits": logits_of(np.ones(6, int), 2), "labels": labels}
    assert computed(Matthews(), constant) == {"matthews": 0.0}


def test_of_numbers():
    rng = np.random.default_rng(0)
    labels = np.round(rng.normal(size=20), 1)  # with ties
    found = labels + rng.normal(size=20)
    from scipy import stats

    for shape in ((20,), (20, 1)):
        for batches in in_batches(logits=found.reshape(shape), labels=labels):
            pearson, spearman = computed(Pearson(), *batches), computed(Spearman(), *batches)
            assert pearson["pearson"] == pytest.approx(stats.pearsonr(found, labels).statistic)
            assert spearman["spearman"] == pytest.approx(stats.spearmanr(found, labels).statistic)
    constant = {"logits": np.ones(20), "labels": labels}
    assert computed(Pearson(), constant) == {"pearson": 0.0}


@pytest.mark.parametrize(
    ("tags", "found"),
    [
        ("O B-A I-A O", [("A", 1, 2)]),
        ("B-A B-A", [("A", 0, 0), ("A", 1, 1)]),
        ("I-A I-A", [("A", 0, 1)]),
        ("B-A I-B I-B", [("A", 0, 0), ("B", 1, 2)]),
        ("S-A S-A E-A", [("A", 0, 0), ("A", 1, 1), ("A", 2, 2)]),
        ("B-A I-A E-A I-A", [("A", 0, 2), ("A", 3, 3)]),
        ("O O", []),
        ("B-a-b I-a-b", [("a-b", 0, 1)]),
    ],
)
def test_spans(tags, found):
    assert spans(tags.split()) == found


def test_spans_right_by_type_and_both_ends():
    names = ["O", "B-A", "I-A", "B-B"]
    labels = np.array([[1, 2, 0, 3, -100], [0, 1, -100, 2, 0]])
    best = np.array(
        [[1, 2, 0, 1, 3], [1, 1, 3, 2, 0]]
    )  # of 3 spans: one wrong type, one whole, one more
    expected = {"span_f1": 4 / 7, "span_precision": 2 / 4, "span_recall": 2 / 3}
    for batches in in_batches(logits=logits_of(best, 4), labels=labels):
        for given in (names, {"3": "B-B", 0: "O", 1: "B-A", "2": "I-A"}):
            assert computed(SpanF1(given), *batches) == pytest.approx(expected)


def test_masked_positions_do_not_count():
    labels, mask = np.array([[0, 1, 1]]), np.array([[1, 1, 0]])
    results = {"logits": logits_of(np.array([[0, 0, 1]]), 2), "labels": labels}
    assert computed(Accuracy(), results) == pytest.approx({"accuracy": 2 / 3})
    assert computed(Accuracy(), results | {"logits_mask": mask}) == {"accuracy": 0.5}


def test_beside_the_teacher():
    S, T = np.array([[1.0, 0], [0, 2], [3, 3]]), np.array([[2.0, 0], [1, 0], [0, 1]])
    assert computed(Agreement(), {"logits": S, "teacher": {"logits": T}}) == {"agreement": 1 / 3}

    def softmax(x):
        return np.exp(x) / np.exp(x).sum(-1, keepdims=True)

    p, q = softmax(T), softmax(S)
    expected = np.mean(np.sum(p * np.log(p / q), -1))
    got = computed(Divergence(), {"logits": S, "teacher": {"logits": T}})
    assert got["kl"] == pytest.approx(expected)
    hard = {"logits": S[:1], "teacher": {"logits": np.array([[0.0, -np.inf]])}}
    assert computed(Divergence(), hard)["kl"] == pytest.approx(-np.log(q[0, 0]))


@pytest.mark.parametrize(
    ("metric", "results", "message"),
    [
        (Accuracy(), {"labels": LABELS}, r"Accuracy needs 'logits', and the adaptor returned \['labels'\]"),
        (Accuracy(), {"logits": np.ones((2, 3)), "labels": np.ones(2)}, r"whole numbers .* float64\[2\]"),
        (Accuracy(), {"logits": np.ones((2, 4, 3)), "labels": np.ones(2, int)}, r"\[2, 4\] .* int64\[2\]"),
        (Accuracy(), {"logits": [np.ones(2), np.ones(2)], "labels": LABELS}, "returned 2: write a metric"),
        (Pearson(), {"logits": np.ones((2, 3)), "labels": np.ones(2)}, r"one number .*\[2, 3\]"),
        (SpanF1(["O"]), {"logits": np.ones((1, 1, 2)), "labels": np.ones((1, 1), int)}, "1 names, .* 2 tags"),
        (SpanF1(["O"]), {"logits": np.ones((1, 2)), "labels": np.ones(1, int)}, r"\[batch, length, tags\]"),
        (Divergence(), {"logits": np.ones((1, 2)), "teacher": {"logits": np.ones((1, 3))}}, "of one shape"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_told(metric, results, message):
    with pytest.raises(ValueError, match=message):
        metric.update({}, results)


def test_no_label_at_all():
    with pytest.raises(ValueError, match="Accuracy saw no label that counts"):
        computed(Accuracy(), {"logits": np.ones((2, 3)), "labels": np.full(2, -100)})
    with pytest.raises(ValueError, match=r"F1\(average='mean'\): expected 'binary' or 'macro'"):
        F1("mean")
