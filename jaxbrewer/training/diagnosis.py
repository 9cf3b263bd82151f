"""Where a number that is not finite comes from: looked for once training has stopped at it.

The state is still the one that the micro-batch met, so the step can be taken apart there: the
gradient of the total, and if need be of one term after the other, each a program of its own.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ..data.batches import Batch
from ..models import lookups

logger = logging.getLogger(__name__)

Examine = Callable[[str | None], Callable]

SHOWN = 3


def culprits(
    examine: Examine, names: Sequence[str], arguments: tuple[Any, ...], *, total: float
) -> list[str]:
    """The clauses that say what is not finite beside the loss and its terms.

    Args:
        examine: see `loop.CompiledTask`.
        names: the terms of the loss.
        arguments: of the step: state, teacher, batch, row, frozen leaves.
        total: the loss.
    """
    with lookups.noted() as notes:
        found = _not_finite(examine(None)(*arguments))
    jax.effects_barrier()
    clauses = lookups.outside(notes)
    if np.isfinite(total) and found["gradient"]:
        clauses.append(_gradient(examine, names, arguments, found["gradient"]))
    elif np.isfinite(total) and found["update"]:
        clauses.append(
            f"the gradient is finite, but the optimizer's update of {shown(found['update'])} is not "
            "(does it divide by a square root of 0? an eps of 1e-8 is 0 in float16)"
        )
    if found["teacher"]:
        clauses.append(f"the teacher's results are not finite: {shown(found['teacher'])}")
    if found["weights"]:
        clauses.append(f"weights were not finite before: {shown(found['weights'])}")
    if np.isfinite(total) and found["state"]:
        clauses.append(f"the student's own state is not finite: {shown(found['state'])}")
    return clauses


def _gradient(
    examine: Examine, names: Sequence[str], arguments: tuple[Any, ...], parameters: list[str]
) -> str:
    of = ""
    if len(names) > 1:
        logger.info("Looking for the term whose gradient is not finite: %d to compile", len(names))
        of = shown([n for n in names if _not_finite(examine(n)(*arguments))["gradient"]])
    elif names:
        of = names[0]
    of = f" of {of}" if of else ""
    return f"the gradient{of} is not finite in {shown(parameters)}"


def in_batch(batch: Batch) -> list[str]:
    """The clause that names the arrays of a batch that are not finite; if none is, its labels."""
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), np.asarray(leaf))
        for path, leaf in jax.tree_util.tree_leaves_with_path(batch)
        if getattr(leaf, "is_fully_addressable", True)
    ]
    bad = [
        name
        for name, leaf in named
        if jnp.issubdtype(leaf.dtype, jnp.floating) and not np.isfinite(leaf).all()
    ]
    if bad:
        return [f"the batch is not finite in {shown(bad)}"]
    return [
        f"{name} holds {leaf.min()} to {leaf.max()}: has the model so many classes?"
        for name, leaf in named
        if re.search("label|position", name) and leaf.dtype.kind in "iu" and leaf.size
    ]


def _not_finite(found: Mapping[str, Mapping[str, Any]]) -> dict[str, list[str]]:
    return {
        kind: [name for name, is_finite in flags.items() if not is_finite]
        for kind, flags in jax.device_get(found).items()
    }


def shown(names: Sequence[str]) -> str:
    """The first of them."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
