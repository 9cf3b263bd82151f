"""Numbers that are logged beside the loss and train nothing: how far the student is from the teacher."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array

from ..data.batches import Batch
from ..errors import Findings
from ..losses.means import log_softmax, mean
from ..models.adaptors import Results
from ..models.handle import Model
from .loss import Loss, Project, pairs
from .objectives import Extension, Objective
from .plan import Weights

PREFIX = "monitor/"


@dataclass(frozen=True)
class Monitored(Extension):
    """Another objective, whose terms are joined by those of `monitored`."""

    def __call__(
        self, results_S: Results, results_T: Results, project: Project, weights: Weights
    ) -> Loss:
        """See `Objective`; the loss is that of `base`."""
        loss = self.base(results_S, results_T, project, weights)
        return loss._replace(terms={**loss.terms, **monitored(results_S, results_T)})

    def check(
        self,
        results_S: Results,
        results_T: Results,
        batch: Batch,
        projections: Mapping[str, Model],
        found: Findings,
    ) -> None:
        """See `Objective`."""
        self.base.check(results_S, results_T, batch, projections, found)
        sides = (("S", results_S), ("T", results_T))
        missing = [f"adaptor_{role}" for role, results in sides if "logits" not in results]
        if missing:
            found.problems.append(
                f"monitor=True compares logits, and {' and '.join(missing)} returns none: return them "
                "under 'logits', or leave monitor out"
            )

    def counted(
        self,
        results_S: Results,
        results_T: Results,
        projections: Mapping[str, Model],
        problems: list[str],
        *,
        is_exact: bool,
    ) -> Self:
        """See `Objective`: what is logged beside it trains nothing."""
        arguments = results_S, results_T, projections, problems
        return replace(self, base=self.base.counted(*arguments, is_exact=is_exact))

    def terms(self, names: Sequence[str]) -> list[str]:
        """See `Objective`: those of `base`."""
        return self.base.terms([name for name in names if not name.startswith(PREFIX)])


def unmonitored(objective: Objective) -> Objective:
    """The objective itself."""
    return objective.base if isinstance(objective, Monitored) else objective


def monitored(results_S: Results, results_T: Results) -> dict[str, Array]:
    """What is logged of both sides' logits.

    Over the positions that both sides select, each the mean; of several logits the mean of theirs.
    All at temperature 1, in nats:

    ======================== ============================================================
    ``monitor/kl``           KL(teacher ‖ student)
    ``monitor/agreement``    the part of the positions where the highest logits agree
    ``monitor/entropy_S``    entropy of the student's distribution
    ``monitor/entropy_T``    entropy of the teacher's
    ``monitor/hard_label_T`` cross-entropy of the teacher under the student's ``labels``, where the
                             adaptor returns them as integers; negative ones do not count
    ======================== ============================================================

    No gradient comes from them.
    """
    results_S, results_T = jax.lax.stop_gradient((results_S, results_T))
    labels = results_S.get("labels")
    if labels is not None and not _are_classes(labels, results_S["logits"]):
        labels = None
    found: list[dict[str, Array]] = []
    for logits_S, logits_T, mask, label, *_ in pairs(results_S, results_T, labels):
        log_q, log_p = log_softmax(logits_S), log_softmax(logits_T)
        weights = None if mask is None else mask.astype(log_q.dtype)
        if mask is not None:  # whatever lies there must not be NaN
            log_q, log_p = (jnp.where(mask[..., None], x, 0) for x in (log_q, log_p))
        one = {
            "entropy_S": mean(_entropy(log_q), weights),
            "entropy_T": mean(_entropy(log_p), weights),
        }
        if log_q.shape == log_p.shape:
            same = jnp.argmax(logits_S, -1) == jnp.argmax(logits_T, -1)
            kl = jnp.sum(jnp.exp(log_p) * (log_p - log_q), axis=-1)
            one |= {"kl": mean(kl, weights), "agreement": mean(same.astype(log_q.dtype), weights)}
        if label is not None:
            counted = (label >= 0).astype(log_p.dtype)
            counted = counted if weights is None else counted * weights
            picked = jnp.take_along_axis(log_p, jnp.maximum(label, 0)[..., None], axis=-1)[..., 0]
            one["hard_label_T"] = mean(jnp.where(counted > 0, -picked, 0), counted)
        found.append(one)
    names = [name for name in found[0] if all(name in one for one in found)]
    return {PREFIX + name: jnp.mean(jnp.stack([one[name] for one in found])) for name in names}


def _are_classes(labels: Sequence[Any], logits: Sequence[Any]) -> bool:
    return len(labels) == len(logits) and all(
        jnp.issubdtype(label.dtype, jnp.integer) and label.shape == of.shape[:-1]
        for label, of in zip(labels, logits, strict=True)
    )


def _entropy(log_p: Array) -> Array:
    return -jnp.sum(jnp.exp(log_p) * log_p, axis=-1)
