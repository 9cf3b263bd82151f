"""Teachers: one, the mean of several, or none. All are the same call inside the step."""

from collections.abc import Sequence
from typing import Any, Protocol

import jax

from ..data.batches import Batch, plain
from ..errors import AdaptorError
from .adaptors import Results, Side


class Teacher(Protocol):
    """What the step needs of a teacher.

    Attributes:
        sides: its models with their adaptors.
        variables: their arrays, an argument of the compiled step.
    """

    sides: tuple[Side, ...]
    variables: Any

    def __call__(self, variables: Any, batch: Batch, cache: Any) -> Results:
        """The teacher's results on a batch; `cache` holds model outputs computed before."""
        ...

    def with_sides(self, sides: Sequence[Side]) -> "Teacher":
        """The same teacher of other sides, as many."""
        ...


class NoTeacher:
    """No teacher: supervised training."""

    sides: tuple[Side, ...] = ()
    variables: Any = ()

    def __call__(self, variables: Any, batch: Batch, cache: Any) -> Results:
        """Returns no results."""
        return {}

    def with_sides(self, sides: Sequence[Side]) -> "Teacher":
        """See `Teacher.with_sides`."""
        return self


class OneTeacher:
    """A single teacher, in evaluation mode.

    Args:
        side: its model and adaptor.
    """

    def __init__(self, side: Side):
        self.sides: tuple[Side, ...] = (side,)
        self.variables: Any = (side.model.params, side.model.state)

    def __call__(self, variables: Any, batch: Batch, cache: Any) -> Results:
        """Runs the teacher, or its adaptor alone if the batch brought its outputs."""
        (side,) = self.sides
        if cache is not None:
            return side.adapt(batch, plain(cache))
        return _evaluate(side, variables, batch)

    def with_sides(self, sides: Sequence[Side]) -> "Teacher":
        """See `Teacher.with_sides`."""
        return OneTeacher(*sides)


class MeanTeacher:
    """Several teachers whose logits are averaged; the first one's ``logits_mask`` is used.

    Args:
        sides: their models and adaptors.
    """

    def __init__(self, sides: Sequence[Side]):
        self.sides = tuple(sides)
        self.variables: Any = tuple((side.model.params, side.model.state) for side in sides)

    def __call__(self, variables: Any, batch: Batch, cache: Any) -> Results:
        """Runs every teacher (or adapts the outputs the batch brought) and averages the logits."""
        if cache is not None and len(cache) != len(self.sides):
            raise AdaptorError(
                f"teacher_cache holds {len(cache)} outputs for {len(self.sides)} teachers; give a "
                "list with one for each"
            )
        if cache is not None:
            each = [s.adapt(batch, plain(c)) for s, c in zip(self.sides, cache, strict=True)]
        else:
            pairs = zip(self.sides, variables, strict=True)
            each = [_evaluate(side, mine, batch) for side, mine in pairs]
        if not all("logits" in results for results in each):
            return {}
        shapes = [[logits.shape for logits in results["logits"]] for results in each]
        if any(other != shapes[0] for other in shapes):
            raise AdaptorError(
                "the teachers' logits cannot be averaged, they have the shapes "
                f"{', '.join(map(str, shapes))}; all need the same classes, and as many logits each"
            )
        lists = zip(*(results["logits"] for results in each), strict=True)
        mean: Results = {"logits": tuple(sum(logits) / len(logits) for logits in lists)}
        if "logits_mask" in each[0]:
            mean["logits_mask"] = each[0]["logits_mask"]
        return mean

    def with_sides(self, sides: Sequence[Side]) -> "Teacher":
        """See `Teacher.with_sides`."""
        return MeanTeacher(sides)


def _evaluate(side: Side, variables: Any, batch: Batch) -> Results:
    # Nothing random happens in evaluation mode; a model may still want some key.
    params, state = variables
    results, _ = side(params, state, jax.random.key(0), batch, False)
    return results


class ServedTeacher:
    """Stands for a teacher whose results come with each batch: no weights, nothing to run."""

    sides: tuple[Side, ...] = ()
    variables: Any = ()

    def __call__(self, variables: Any, batch: Batch, cache: Any) -> Results:
        """Hands on the batch's own results."""
        return cache

    def with_sides(self, sides: Sequence[Side]) -> Teacher:
        """See `teachers.Teacher.with_sides`."""
        return self
