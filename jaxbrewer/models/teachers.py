"""A teacher: one model, the mean of several, or none. All are the same call inside the step."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax

from ..data.batches import Batch, plain
from ..errors import AdaptorError
from .adaptors import Results, Side


@dataclass(frozen=True)
class Teacher:
    """What gives the teacher's results, in evaluation mode.

    Attributes:
        sides: its models with their adaptors. Without any, the results are those that come with
            the batch, or none.
        averages: whether it is several teachers (one, perhaps) whose logits are averaged; the first
            one's ``logits_mask`` is used.
        weights: of each in that mean; None: all alike.
    """

    sides: tuple[Side, ...] = ()
    averages: bool = False
    weights: tuple[float, ...] | None = None

    @property
    def variables(self) -> Any:
        """The arrays of its models, an argument of the compiled step."""
        each = tuple((side.model.params, side.model.state) for side in self.sides)
        return each if self.averages or not each else each[0]

    def __call__(self, variables: Any, batch: Batch, cache: Any) -> Results:
        """The results on a batch.

        Args:
            variables: as the attribute.
            batch: the teacher's batch.
            cache: what the batch brought: its models' outputs, computed before, or their results.
        """
        if not self.sides:
            return {} if cache is None else cache
        if self.averages:
            return _mean(self._each(variables, batch, cache), self.weights)
        return _results(self.sides[0], variables, batch, cache)

    def _each(self, variables: Any, batch: Batch, cache: Any) -> list[Results]:
        if cache is None:
            cache = [None] * len(self.sides)
        elif len(cache) != len(self.sides):
            raise AdaptorError(
                f"teacher_cache holds {len(cache)} outputs for {len(self.sides)} teachers; give a "
                "list with one for each"
            )
        pairs = zip(self.sides, variables, cache, strict=True)
        return [_results(side, mine, batch, outputs) for side, mine, outputs in pairs]


def _results(side: Side, variables: Any, batch: Batch, outputs: Any) -> Results:
    """Runs a side, or its adaptor alone where the model's outputs are there."""
    if outputs is not None:
        return side.adapt(batch, plain(outputs))
    # Nothing random happens in evaluation mode; a model may still want some key.
    params, state = variables
    results, _ = side(params, state, jax.random.key(0), batch, False)
    return results


def _mean(each: Sequence[Results], weights: Sequence[float] | None) -> Results:
    """The weighted mean of all logits; {} if a teacher returns none."""
    if not all("logits" in results for results in each):
        return {}
    shapes = [[logits.shape for logits in results["logits"]] for results in each]
    if any(other != shapes[0] for other in shapes):
        raise AdaptorError(
            "the teachers' logits cannot be averaged, they have the shapes "
            f"{', '.join(map(str, shapes))}; all need the same classes, and as many logits each"
        )
    lists = zip(*(results["logits"] for results in each), strict=True)
    if weights is None:
        means = tuple(sum(logits) / len(logits) for logits in lists)
    else:
        parts = [weight / math.fsum(weights) for weight in weights]
        means = tuple(sum(p * x for p, x in zip(parts, logits, strict=True)) for logits in lists)
    mean: Results = {"logits": means}
    if "logits_mask" in each[0]:
        mean["logits_mask"] = each[0]["logits_mask"]
    return mean
