"""Masked words: what a model of language is asked to tell again, drawn anew for each batch."""

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from ..errors import BatchError

_NO_LABEL = -100
_MASKED, _KEPT = 0.8, 0.1  # of the words that are asked for; the others become any word


def mask_words(
    loader: Iterable[Any],
    *,
    mask_id: int,
    vocab_size: int,
    special_ids: Collection[int],
    probability: float = 0.15,
    seed: int = 0,
    rank: int = 0,
) -> "MaskedWords":
    """A loader of the same batches, with some of the words in ``input_ids`` masked.

    Each word is asked for with ``probability``. Of those, 80% become ``mask_id``, 10% any word of the
    vocabulary, and 10% stay; ``labels`` holds what they were, and −100 at all other positions.
    Special tokens and padding (``attention_mask`` 0) are never asked for, and no word becomes one.

    The draws depend on the seed, the epoch and the place of the batch in it alone, so that a resumed
    run sees what it would have seen. The order of the batches is the loader's own; one that shuffles
    does so by ``set_epoch``, which is passed on, or by a generator that it shows.

    Devlin et al., 2019, `BERT <https://arxiv.org/abs/1810.04805>`_.

    Args:
        loader: gives dicts with ``input_ids``, ``[batch, length]`` integers, such as
            `bucket_by_length` does.
        mask_id: the id of the mask: ``tokenizer.mask_token_id``.
        vocab_size: ids are below it: ``model.config.vocab_size``.
        special_ids: ids that are no words: ``tokenizer.all_special_ids``.
        probability: of a word to be asked for.
        seed: of the draws.
        rank: of several processes which this is, each with batches of its own.

    Raises:
        ValueError: an argument that cannot be meant.
        BatchError: when iterated: a batch without ``input_ids``, with labels already, or with an
            ``attention_mask`` of another shape.
    """
    counts = {"mask_id": mask_id, "vocab_size": vocab_size, "seed": seed, "rank": rank}
    for name, value in counts.items():
        if not _is_whole(value) or value < 0:
            raise ValueError(f"{name}={value!r}: expected a whole number of 0 or more")
    if not isinstance(special_ids, Collection) or not all(map(_is_whole, special_ids)):
        raise ValueError(
            f"special_ids={special_ids!r}: expected whole numbers, such as tokenizer.all_special_ids"
        )
    if isinstance(probability, bool) or not isinstance(probability, int | float | np.floating):
        raise ValueError(f"probability={probability!r}: expected a number above 0, up to 1")
    if not 0 < probability <= 1:
        raise ValueError(f"probability={probability!r}: expected a number above 0, up to 1")
    outside = sorted(number for number in {mask_id, *special_ids} if not 0 <= number < vocab_size)
    if outside:
        raise ValueError(
            f"mask_id={mask_id} and special_ids name {outside}, which are outside "
            f"vocab_size={vocab_size}: give the size of the model's table of words"
        )
    special = np.array(sorted({mask_id, *special_ids}))
    words = np.setdiff1d(np.arange(vocab_size), special)
    if not len(words):
        raise ValueError(
            f"special_ids names all ids below vocab_size={vocab_size}: no word is left"
        )
    return MaskedWords(loader, mask_id, special, words, probability, (seed, rank))


class MaskedWords:
    """The batches of `mask_words`; iterate it, or give it to ``train`` as the loader.

    Every pass is an epoch: the draws are those of the epoch set last, the first if none was.
    """

    def __init__(
        self,
        loader: Iterable[Any],
        mask_id: int,
        special: np.ndarray,
        words: np.ndarray,
        probability: float,
        seeds: tuple[int, int],
    ):
        self._loader = loader
        self._mask_id = mask_id
        self._special = special
        self._words = words
        self._probability = probability
        self._seeds = seeds
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Chooses the draws of the next pass, and its order where the loader shuffles by epoch."""
        self._epoch = epoch
        for shuffler in (self._loader, getattr(self._loader, "sampler", None)):
            tell = getattr(shuffler, "set_epoch", None)
            if tell is not None:
                tell(epoch)

    def __len__(self) -> int:
        """Batches in a pass; raises ``TypeError`` where the loader does not say it."""
        return len(self._loader)  # type: ignore[arg-type]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self._epoch
        for index, batch in enumerate(self._loader):
            yield self._masked(batch, epoch, index)

    def __getattr__(self, name: str) -> Any:
        # Where training looks for the generators that a loader shuffles by, to put them back.
        if name in ("generator", "sampler", "batch_sampler"):
            return getattr(self._loader, name)
        raise AttributeError(f"{type(self).__name__} has no {name!r}")

    def _masked(self, batch: Any, epoch: int, index: int) -> dict[str, Any]:
        """A batch with its masks and its labels."""
        ids = _ids_of(batch, index)
        seed, rank = self._seeds
        # The last number is never 0: seeds that differ by zeros at their end are the same.
        rng = np.random.default_rng((seed, epoch, index, rank + 1))
        asked = (rng.random(ids.shape) < self._probability) & ~np.isin(ids, self._special)
        if batch.get("attention_mask") is not None:
            asked &= _mask_of(batch, ids.shape, index)
        how = rng.random(ids.shape)
        others = self._words[rng.integers(0, len(self._words), ids.shape)]
        changed = np.where(how < _MASKED, self._mask_id, others)
        changed = np.where(asked & (how < 1 - _KEPT), changed, ids).astype(ids.dtype)
        labels = np.where(asked, ids, _NO_LABEL).astype(np.int32)
        return {**batch, "input_ids": changed, "labels": labels}


def _is_whole(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


def _ids_of(batch: Any, index: int) -> np.ndarray:
    """The words of a batch; refuses what has none, and labels that would be lost."""
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        there = list(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
        raise BatchError(
            f"batch {index} has no 'input_ids' to mask, but {there}: expected a dict of a model's inputs"
        )
    if "labels" in batch:
        raise BatchError(
            f"batch {index} has 'labels' already, which masking makes: leave them out of the examples"
        )
    ids = np.asarray(batch["input_ids"])
    if ids.ndim != 2 or ids.dtype.kind not in "iu":
        raise BatchError(
            f"batch {index}: 'input_ids' is {ids.dtype}{list(ids.shape)}, expected integers of shape "
            "[batch, length]"
        )
    return ids


def _mask_of(batch: Any, shape: tuple[int, ...], index: int) -> np.ndarray:
    """Where a batch's words are, and no padding."""
    mask = np.asarray(batch["attention_mask"])
    if mask.shape != shape:
        raise BatchError(
            f"batch {index}: 'attention_mask' is {list(mask.shape)}, and 'input_ids' {list(shape)}: "
            "expected the same shape"
        )
    return mask != 0
