"""Answers in text: the best span of a context, and how it compares with those that are right.

By the rules of SQuAD's own script: Rajpurkar et al., 2016 (https://arxiv.org/abs/1606.05250), and for
questions without an answer Rajpurkar et al., 2018 (https://arxiv.org/abs/1806.03822).
"""

import collections
import re
import string
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from .metrics import Results

MOST_TOKENS = 30
"""An answer has at most so many tokens."""

_CANDIDATES = 20  # first tokens, and last ones, of which the best pair is sought

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


class Window(NamedTuple):
    """An example of a question: a part of its context.

    Attributes:
        question: its number.
        offsets: of each token, its first character in the context and the one after its last; None for
            tokens of the question, and special ones.
    """

    question: int
    offsets: Sequence[tuple[int, int] | None]


class Spans:
    """The best span of each question, gathered window by window.

    Args:
        windows: those of the rows that will come, in their order.
        contexts: the text of each question's context.
        may_lack: whether a question may have no answer: then it has none where the first token, as
            beginning and end, scores higher than every span, in all its windows.
    """

    def __init__(
        self, windows: Iterable[Window], contexts: Sequence[str], *, may_lack: bool = False
    ):
        self._windows = iter(windows)
        self._contexts = contexts
        self._may_lack = may_lack
        self._best: dict[int, tuple[float, str]] = {}
        self._none: dict[int, float] = {}

    def take(
        self, starts: Float[np.ndarray, "rows length"], ends: Float[np.ndarray, "rows length"]
    ) -> None:
        """Takes the logits of the next rows.

        Raises:
            ValueError: there are more rows than windows.
        """
        for start, end in zip(starts, ends, strict=True):
            window = next(self._windows, None)
            if window is None:
                raise ValueError(
                    "there are more rows than windows: another loader's windows are given"
                )
            score, (first, last) = best_span(start, end, window.offsets)
            none = float(start[0] + end[0])
            self._none[window.question] = min(none, self._none.get(window.question, none))
            if score > self._best.get(window.question, (-np.inf, ""))[0]:
                text = self._contexts[window.question][first:last]
                self._best[window.question] = (score, text)

    def found(self) -> list[tuple[str, float]]:
        """Each question's answer, empty where it has none, with the sum of its two logits."""
        answers = []
        for question in range(len(self._contexts)):
            score, text = self._best.get(question, (-np.inf, ""))
            none = self._none.get(question, -np.inf)
            lacks = self._may_lack and none > score
            answers.append(("", none) if lacks else (text, score))
        return answers


def best_span(
    start: Float[np.ndarray, " length"],
    end: Float[np.ndarray, " length"],
    offsets: Sequence[tuple[int, int] | None],
) -> tuple[float, tuple[int, int]]:
    """The span of the context whose two logits have the highest sum: that sum, and its characters.

    A window without a token of the context has none: −∞.
    """
    inside = np.array([i for i, place in enumerate(offsets) if place is not None], int)
    if not inside.size:
        return -np.inf, (0, 0)
    firsts, lasts = (_highest(logits, inside) for logits in (start, end))
    length = lasts[None, :] - firsts[:, None]
    sums = np.where(
        (length >= 0) & (length < MOST_TOKENS),
        start[firsts][:, None].astype(float) + end[lasts][None, :],
        -np.inf,
    )
    i, j = np.unravel_index(int(np.argmax(sums)), sums.shape)
    first, last = offsets[firsts[i]], offsets[lasts[j]]
    return float(sums[i, j]), (first[0], last[1])


def _highest(
    logits: Float[np.ndarray, " length"], inside: Int[np.ndarray, " tokens"]
) -> Int[np.ndarray, " candidates"]:
    order = np.argsort(-logits[inside], kind="stable")
    return inside[order[:_CANDIDATES]]


class Answers:
    """Answers in text, as SQuAD's script compares them: ``exact_match`` and ``f1``, from 0 to 1.

    Each question counts once, with the best of its right answers; without one, empty is right.

    Args:
        windows: those of the loader's rows, in its order.
        contexts: the text of each question's context.
        answers: each question's right answers.
    """

    def __init__(
        self,
        windows: Iterable[Window],
        contexts: Sequence[str],
        answers: Sequence[Sequence[str]],
    ):
        self._windows, self._contexts, self._answers = list(windows), contexts, answers
        self._spans: Spans | None = None

    def __deepcopy__(self, memo: Any) -> "Answers":
        """A fresh one, of the same questions: they are many, and nothing changes them."""
        return Answers(self._windows, self._contexts, self._answers)

    def update(self, batch: Any, results: Results) -> None:
        """See `metrics.Metric.update`; ``logits`` are two, of the first and of the last token."""
        logits = results.get("logits")
        if not isinstance(logits, list) or len(logits) != 2:
            raise ValueError(
                "Answers wants two logits [batch, length], of an answer's first and last token, as "
                "zoo.adaptor('question-answering') returns them"
            )
        if self._spans is None:
            may_lack = not all(self._answers)
            self._spans = Spans(self._windows, self._contexts, may_lack=may_lack)
        self._spans.take(*logits)

    def compute(self) -> dict[str, float]:
        """See `metrics.Metric.compute`."""
        found = self._spans.found() if self._spans is not None else []
        scores = [score(text, right) for (text, _), right in zip(found, self._answers, strict=True)]
        return {name: float(np.mean([s[name] for s in scores])) for name in ("exact_match", "f1")}


def score(found: str, right: Sequence[str]) -> Mapping[str, float]:
    """``exact_match`` and ``f1`` of an answer, each with the right answer that it is nearest to."""
    pairs = [(normalized(found), normalized(text)) for text in right or [""]]
    return {
        "exact_match": float(any(ours == theirs for ours, theirs in pairs)),
        "f1": max(_overlap(ours, theirs) for ours, theirs in pairs),
    }


def normalized(text: str) -> str:
    """Text in small letters, without punctuation, articles and blanks that do not count."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def _overlap(found: str, right: str) -> float:
    ours, theirs = found.split(), right.split()
    if not ours or not theirs:
        return float(ours == theirs)
    common = (collections.Counter(ours) & collections.Counter(theirs)).total()
    return 2 * common / (len(ours) + len(theirs))
