"""Augmentations of token lists, TextBrewer's.

All take a list of tokens (or ids), leave it as it is and return a new list. Each draws from NumPy's
global generator if no ``rng`` is given, and then returns what TextBrewer returns after the same
``np.random.seed``. With ``rng`` (a seed, a ``np.random.Generator`` or a ``np.random.RandomState``)
the global generator is not touched. An empty list gives an empty list.
"""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

Token = TypeVar("Token")
Rng = int | np.random.Generator | np.random.RandomState | None


def masking(
    tokens: Sequence[Any], p: float = 0.1, mask: Any = "[MASK]", *, rng: Rng = None
) -> list[Any]:
    """Returns the tokens, each replaced by ``mask`` with probability ``p``.

    Args:
        tokens: tokens or ids.
        p: from 0 to 1.
        mask: the token, or id, to put in.
        rng: see the module.

    Raises:
        ValueError: ``p`` is no probability.
        TypeError: ``rng`` is none of the kinds named.
    """
    p, random = _probability(p), _generator(rng)
    return [mask if random.random() < p else token for token in tokens]


def deleting(tokens: Sequence[Token], p: float = 0.1, *, rng: Rng = None) -> list[Token]:
    """Returns the tokens less those deleted, each with probability ``p``.

    Args:
        tokens: tokens or ids.
        p: from 0 to 1.
        rng: see the module.

    Raises:
        ValueError: ``p`` is no probability.
        TypeError: ``rng`` is none of the kinds named.
    """
    p, random = _probability(p), _generator(rng)
    kept = random.binomial(1, 1 - p, len(tokens))
    return [token for token, keep in zip(tokens, kept, strict=True) if keep]


def n_gram_sampling(
    tokens: Sequence[Token],
    p_ng: Sequence[float] = (0.2, 0.2, 0.2, 0.2, 0.2),
    l_ng: Sequence[int] = (1, 2, 3, 4, 5),
    *,
    rng: Rng = None,
) -> list[Token]:
    """Returns a run of the tokens, of a random length and at a random place.

    Args:
        tokens: tokens or ids.
        p_ng: the probability of each length; they sum to 1.
        l_ng: the lengths, each at least 1. If the one drawn is more than there are tokens, all of
            them are returned (TextBrewer fails).
        rng: see the module.

    Raises:
        ValueError: the probabilities do not sum to 1, or are not one for each length, or a length
            is not a positive integer.
        TypeError: ``rng`` is none of the kinds named.
    """
    lengths, random = np.asarray(l_ng), _generator(rng)
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or np.any(lengths < 1):
        raise ValueError(f"l_ng must be integers of at least 1, got {l_ng!r}")
    p = _distribution("p_ng", p_ng, len(lengths))
    tokens = list(tokens)
    span = int(random.choice(lengths, p=p))
    if span > len(tokens):
        return tokens
    start = _below(random, len(tokens) - span + 1)
    return tokens[start : start + span]


def short_disorder(
    tokens: Sequence[Token], p: Sequence[float] = (0.9, 0.1, 0, 0, 0), *, rng: Rng = None
) -> list[Token]:
    """Returns the tokens with neighbours put in another order, here and there.

    From left to right, one of five things happens to the three tokens abc at a place: they stay
    (and the next place is one token on), or they become bac, cba, cab or bca (and the next place
    is past those moved). Where only two are left they are swapped in each of the last four cases.

    Args:
        tokens: tokens or ids.
        p: the probabilities of the five cases in that order; they sum to 1.
        rng: see the module.

    Raises:
        ValueError: ``p`` is not five probabilities that sum to 1.
        TypeError: ``rng`` is none of the kinds named.
    """
    probabilities, random = _distribution("p", p, 5), _generator(rng)
    outputs, i = list(tokens), 0
    while i < len(outputs) - 1:
        case = int(random.choice(5, p=probabilities))
        if case != 0 and i == len(outputs) - 2:
            case = 1
        order = ((0,), (1, 0), (2, 1, 0), (2, 0, 1), (1, 2, 0))[case]
        outputs[i : i + len(order)] = [outputs[i + j] for j in order]
        i += len(order)
    return outputs


def long_disorder(
    tokens: Sequence[Token], p: float = 0.1, length: float = 20, *, rng: Rng = None
) -> list[Token]:
    """Returns the tokens with the halves of some spans swapped.

    From left to right, the span at a place is swapped with probability ``p`` (and the next place is
    past it) or stays (and the next place is one token on).

    Args:
        tokens: tokens or ids.
        p: from 0 to 1.
        length: of the spans, above 0, rounded down to an integer and up to an even one. Below 2 it
            is relative to the number of tokens: 0.4 means spans of 0.4 of the text. Where that
            comes to nothing the text is returned as it is (TextBrewer with p = 1 does not return).
        rng: see the module.

    Raises:
        ValueError: ``p`` is no probability, or ``length`` is not above 0.
        TypeError: ``rng`` is none of the kinds named.
    """
    p, random = _probability(p), _generator(rng)
    if not 0 < length < np.inf:
        raise ValueError(f"length must be above 0 and finite, got {length!r}")
    outputs, i = list(tokens), 0
    span = int(length) if length >= 2 else int(len(outputs) * length)
    half = (span + 1) // 2
    while half and i <= len(outputs) - 2 * half:
        if random.random() < p:
            middle, end = i + half, i + 2 * half
            outputs[i:end] = outputs[middle:end] + outputs[i:middle]
            i = end
        else:
            i += 1
    return outputs


def _generator(rng: Rng) -> Any:
    if rng is None:
        return np.random
    if isinstance(rng, np.random.Generator | np.random.RandomState):
        return rng
    if isinstance(rng, int | np.integer) and not isinstance(rng, bool) and rng >= 0:
        return np.random.default_rng(rng)
    raise TypeError(
        f"rng must be a seed of at least 0, a np.random.Generator or a RandomState, got {rng!r}"
    )


def _below(random: Any, end: int) -> int:
    draw = random.integers if isinstance(random, np.random.Generator) else random.randint
    return int(draw(0, end))


def _probability(p: float) -> float:
    number = isinstance(p, int | float | np.integer | np.floating) and not isinstance(p, bool)
    if not number or not 0 <= p <= 1:
        raise ValueError(f"p must be a probability from 0 to 1, got {p!r}")
    return p


def _distribution(name: str, p: Sequence[float], length: int) -> np.ndarray:
    values = np.asarray(p, dtype=np.float64)
    if values.shape != (length,):
        raise ValueError(f"{name} must be {length} probabilities, got {p!r}")
    if not np.all(values >= 0) or abs(values.sum() - 1) > 1e-8:
        raise ValueError(f"{name} must be at least 0 each and sum to 1, got {p!r}")
    return values
