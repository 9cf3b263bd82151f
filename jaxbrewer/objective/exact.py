"""Over what each part of a loss is a mean: found by trying it, and counted in a batch.

Two things need it: exact accumulation, whose micro-batches are put together by their counts, and
``sample_weight``. A loss that is no such mean, as one that compares examples with each other, is refused.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from ..models.adaptors import Results
from .counted import EXAMPLE, IN_WORDS, SELECTED, counts
from .loss import (
    Project,
    kd_rows,
    kd_value,
    labels_of,
    match_rows,
    match_value,
    own_losses,
    pairs,
)
from .plan import HARD_TERM, KD, KD_TERM, Match, Plan, Units

_ROWS, _FIRST = 5, 2  # of a trial, and of its first part
_TOLERANCE = 1e-4


def hard_label_units(results_S: Results, problems: list[str]) -> Units:
    """The units of the student's own losses, by the shapes of its results."""
    losses = results_S.get("losses", ())
    for i, loss in enumerate(losses):
        if loss.ndim == 0:
            problems.append(
                f"adaptor_S: 'losses'[{i}] is one number, of which nobody can tell what it is the mean "
                "over. Return each example's loss, [batch], or each position's, [batch, length], with "
                "'losses_mask' for those that count: of the zoo's models "
                "jaxbrewer.zoo.adaptor(task, each=True)"
            )
    return {HARD_TERM: (SELECTED,) * len(losses)} if losses else {}


def plan_units(
    plan: Plan, results_S: Results, results_T: Results, project: Project, problems: list[str]
) -> Units:
    """The units of all parts of a plan that are trained on.

    Args:
        plan: the plan.
        results_S: the student's results by shape.
        results_T: the teacher's.
        project: see `loss.project_by_shape`.
        problems: gets a line for each part that is no mean.
    """
    units: dict[str, tuple[str, ...]] = {}
    has_kd = plan.kd is not None and "logits" in results_S and "logits" in results_T
    if plan.kd is not None and has_kd and not plan.kd_weight.is_zero:
        units[KD_TERM] = _kd_units(plan.kd, results_S, results_T, problems)
    for match in plan.matches:
        if not match.weight.is_zero:
            units[match.tag] = _match_units(match, results_S, results_T, project, problems)
    if not plan.hard_label_weight.is_zero:
        units |= hard_label_units(results_S, problems)
    return units


def plan_counts(
    plan: Plan, units: Units, results_S: Results, results_T: Results
) -> Float[Array, " parts"]:
    """How many of its unit each part of a plan has in a batch, in the order of `units`."""
    found = []
    for term, each in units.items():
        if term == KD_TERM and plan.kd is not None:
            found += _kd_counts(plan.kd, each, results_S, results_T)
        elif term == HARD_TERM:
            found += hard_label_counts(results_S)
        else:
            (match,) = (m for m in plan.matches if m.tag == term)
            found.append(_match_count(match, each[0], results_S))
    return jnp.stack(found)


def hard_label_counts(results_S: Results) -> list[Array]:
    """How many entries of each of the student's losses count."""
    return [
        jnp.asarray(loss.size if mask is None else jnp.sum(mask), jnp.result_type(float))
        for loss, mask in own_losses(results_S)
    ]


def _kd_counts(kd: KD, units: Sequence[str], results_S: Results, results_T: Results) -> list[Array]:
    found = []
    each = pairs(results_S, results_T, labels_of(kd, results_S))
    for unit, pair in zip(units, each, strict=True):
        count = counts(len(pair.logits_S), pair.mask, pair.labels)[unit]
        found.append(_sum(count, pair.weights))
    return found


def _match_count(match: Match, unit: str, results_S: Results) -> Array:
    mask = None if match.feature == "embedding" else results_S.get("inputs_mask")
    layers = match.layer_S if isinstance(match.layer_S, int | str) else match.layer_S[0]
    rows = len(results_S[match.feature][layers])
    return _sum(counts(rows, mask)[unit], results_S.get("sample_weight"))


def _sum(count: Array, weights: Array | None) -> Array:
    return jnp.sum(count if weights is None else count * weights)


def _kd_units(
    kd: KD, results_S: Results, results_T: Results, problems: list[str]
) -> tuple[str, ...]:
    def each(results_S: Results, results_T: Results) -> list[dict[str, Any]]:
        return [kd_rows(pair) for pair in pairs(results_S, results_T, labels_of(kd, results_S))]

    found = jax.eval_shape(each, results_S, results_T)
    units = []
    for i, rows in enumerate(found):
        unit = _unit(lambda rows: kd_value(kd, rows), rows)
        if unit is None:
            by = f"kd_loss_type={kd.loss_name!r}"
            if kd.temperature_scheduler is not None:
                by += " with its temperature_scheduler"
            problems.append(_refused(by + (f", of logits[{i}]," if len(found) > 1 else "")))
        units.append(unit or EXAMPLE)
    return tuple(units)


def _match_units(
    match: Match, results_S: Results, results_T: Results, project: Project, problems: list[str]
) -> tuple[str, ...]:
    rows = jax.eval_shape(lambda S, T: match_rows(match, S, T, project), results_S, results_T)
    unit = _unit(lambda rows: match_value(match, rows), rows)
    if unit is None:
        problems.append(_refused(f"the match {match}"))
    return (unit or EXAMPLE,)


def _refused(what: str) -> str:
    return (
        f"{what} is no mean over {', '.join(IN_WORDS.values())}, as it compares examples with each "
        "other or weighs them by the batch: neither gradient_accumulation='exact' nor 'sample_weight' "
        "can be had with it. Choose another loss, or leave these out"
    )


def _unit(value: Callable[[Mapping[str, Any]], Any], shapes: Mapping[str, Any]) -> str | None:
    """The unit by which the means of two parts of some rows make the mean of all; None: by none.

    It is tried on random numbers of these shapes. Where several fit, the coarsest: examples.
    """
    rng = np.random.default_rng(0)
    rows = {
        name: jax.tree.map(functools.partial(_trial, name, rng), tree)
        for name, tree in shapes.items()
    }
    count = counts(_ROWS, rows["mask"], rows.get("labels"))
    first, rest = (
        {name: jax.tree.map(lambda x, part=part: x[part], tree) for name, tree in rows.items()}
        for part in (slice(_FIRST), slice(_FIRST, None))
    )

    def all_three(*parts: Any) -> list[Any]:
        return [value(part) for part in parts]

    whole, one, other = map(float, jax.jit(all_three)(rows, first, rest))
    for unit, each in count.items():
        n, m = float(jnp.sum(each[:_FIRST])), float(jnp.sum(each[_FIRST:]))
        if np.isclose(one * n + other * m, whole * (n + m), rtol=_TOLERANCE, atol=1e-6):
            return unit
    return None


def _trial(name: str, rng: np.random.Generator, like: Any) -> Array:
    """A random array of this shape, of `_ROWS` rows: a feature, a mask that differs by row, labels."""
    shape = (_ROWS, *like.shape[1:])
    if name == "labels":
        labels = rng.integers(0, 2, shape)
        labels[0] = -100
        return jnp.asarray(labels, like.dtype)
    if name != "mask":
        values = 3 * rng.normal(size=shape)
        return jnp.asarray(values, jnp.promote_types(like.dtype, jnp.float32))
    if len(shape) == 1:
        kept = np.arange(_ROWS) % 3 != 1
    else:
        kept = np.arange(shape[1]) < 1 + np.arange(_ROWS)[:, None] * 3 % shape[1]
    halves = jnp.issubdtype(like.dtype, jnp.floating)
    return jnp.asarray(kept * rng.choice([0.5, 1.0], shape) if halves else kept, like.dtype)
