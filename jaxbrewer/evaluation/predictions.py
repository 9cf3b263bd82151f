"""What a model says of every example, put together from its batches, in the examples' order."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jaxtyping import Bool, Int, Shaped

from ..machine.placement import rows_of

_MASKS = ("logits_mask", "inputs_mask")
Parts = list[Shaped[np.ndarray, "rows ..."]]


def gathered(
    batches: Iterable[tuple[Any, Mapping[str, Any]]], order: Int[np.ndarray, " rows"] | None
) -> dict[str, Any]:
    """Puts the results of all batches together.

    Args:
        batches: each batch with its results, both in numpy arrays.
        order: the example number of each row, over all batches; None: the rows are in order.

    Returns:
        Name → ``[examples, …]``; where batches are padded to different lengths, a list with an array
        ``[length, …]`` for each example, of the positions that its mask keeps. What is not by
        example is left out. Of a list of several results each has a name, ``logits.0``.

    Raises:
        ValueError: no batch; lengths differ and no mask tells what is padding; or `order` is not
            that of all examples.
    """
    parts: dict[str, Parts] = {}
    masks: list[list[np.ndarray]] = []
    counts: list[int] = []
    for batch, results in batches:
        counts.append(rows_of(batch))
        masks.append(_masks(batch, results))
        for name, value in _flat(results).items():
            if value.ndim and len(value) == counts[-1]:
                parts.setdefault(name, []).append(value)
    if not counts:
        raise ValueError("the loader gave no batch to predict")
    whole = {name: each for name, each in parts.items() if len(each) == len(counts)}
    places = _places(order, sum(counts))
    return {name: _joined(name, each, masks, places) for name, each in whole.items()}


def order_of(loader: Any) -> Int[np.ndarray, " rows"] | None:
    """The example number of each row that a loader is about to give, if it says so (``order``)."""
    order = getattr(loader, "order", None)
    return None if order is None or callable(order) else np.asarray(order)


def _flat(results: Mapping[str, Any]) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for name, value in results.items():
        several = value if isinstance(value, list) else None
        named = (
            {name: value} if several is None else {f"{name}.{i}": x for i, x in enumerate(several)}
        )
        found |= {key: np.asarray(each) for key, each in named.items()}
    return found


def _masks(batch: Any, results: Mapping[str, Any]) -> list[np.ndarray]:
    """What may tell a batch's padding, the first that fits counts."""
    there = [results.get(name) for name in _MASKS]
    there.append(batch.get("attention_mask") if isinstance(batch, Mapping) else None)
    return [np.asarray(mask) for mask in there if mask is not None and not isinstance(mask, list)]


def _places(order: Int[np.ndarray, " rows"] | None, rows: int) -> Int[np.ndarray, " rows"]:
    """Where in the batches each example lies."""
    if order is None:
        return np.arange(rows)
    places = np.argsort(order)
    if not np.array_equal(np.asarray(order)[places], np.arange(rows)):
        raise ValueError(
            f"the loader says the order of {len(order)} rows, the highest example is "
            f"{np.max(order, initial=-1)}, and it gave {rows}: to predict, it must give every example "
            "once. Leave out drop_last and num_replicas"
        )
    return places


def _joined(
    name: str, each: Parts, masks: list[list[np.ndarray]], places: Int[np.ndarray, " rows"]
) -> Any:
    if len({value.shape[1:] for value in each}) == 1:
        return np.concatenate(each)[places]
    rows = [
        row[kept]
        for value, candidates in zip(each, masks, strict=True)
        for row, kept in zip(value, _mask(name, each, value, candidates), strict=True)
    ]
    return [rows[i] for i in places]


def _mask(
    name: str, each: Parts, value: Shaped[np.ndarray, "..."], candidates: list[np.ndarray]
) -> Bool[np.ndarray, "rows length"]:
    for mask in candidates:
        if mask.shape == value.shape[:2]:
            return mask != 0
    shapes = sorted({value.shape[1:] for value in each})
    raise ValueError(
        f"{name!r} has the shapes {', '.join(str(list(shape)) for shape in shapes)} of an example in "
        "different batches, and no mask of these lengths tells what is padding: let the adaptor "
        "return 'inputs_mask' or 'logits_mask'"
    )
