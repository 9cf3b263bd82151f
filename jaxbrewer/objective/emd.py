"""BERT-EMD's objective: layers matched many to many, by earth mover's distance."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from .. import presets
from ..data.batches import Batch
from ..errors import Findings
from ..models.adaptors import Results
from ..models.handle import Model
from .loss import Loss, Project, Weights, full_weights, project_by_shape
from .objectives import Extension
from .transport import exact_transport


@dataclass(frozen=True)
class EMD(Extension):
    """The terms of a plan, and ``weight · (EMD + embedding)``; see `distillers.emd.EMDDistiller`.

    Attributes:
        base: the KD and hard-label terms.
        options: the distiller's ``emd``, checked.
        is_projected: whether each student layer goes through a projection, named by its index.
    """

    options: Mapping[str, Any]
    is_projected: bool
    adds: ClassVar[str] = "the earth mover's distance"

    def __call__(
        self, results_S: Results, results_T: Results, project: Project, weights: Weights
    ) -> Loss:
        """See the class."""
        base = self.base(results_S, results_T, project, weights)
        feature, name, weight = (self.options[key] for key in ("feature", "loss", "weight"))
        source = results_S if weight else jax.lax.stop_gradient(results_S)
        mask = source.get("inputs_mask")
        layers_S = list(source[feature])
        if self.is_projected:
            layers_S = [project(str(i), x) for i, x in enumerate(layers_S)]
        loss = presets.MATCH_LOSS_MAP[name]

        def pair(layer_S: jax.Array, layer_T: jax.Array) -> jax.Array:
            return loss(layer_S, layer_T, mask=mask)

        all_T = jnp.stack(results_T[feature][1:])
        cost = jnp.stack([jax.vmap(pair, (None, 0))(layer, all_T) for layer in layers_S[1:]])
        distance = jnp.sum(exact_transport(cost) * cost)
        embedding = pair(layers_S[0], results_T[feature][0])
        terms = base.terms | {
            f"unweighted_{feature}_{name}_emd": distance,
            f"unweighted_embedding_{name}": embedding,
        }
        total = base.total + weight * (distance + embedding) if weight else base.total
        return Loss(total, terms, base.surplus)

    def check(
        self,
        results_S: Results,
        results_T: Results,
        batch: Batch,
        projections: Mapping[str, Model],
        found: Findings,
    ) -> None:
        """See `objectives.Objective`."""
        feature = self.options["feature"]
        for role, results in (("S", results_S), ("T", results_T)):
            if feature not in results:
                keys = ", ".join(map(repr, results))
                found.problems.append(f"adaptor_{role} returns no {feature!r}, only {keys}")
                continue
            there, wanted = len(results[feature]), self.options[f"layer_num_{role}"]
            if there != wanted or any(x is None for x in results[feature]):
                found.problems.append(
                    f"emd['layer_num_{role}'] is {wanted}, but adaptor_{role} returns {there} "
                    f"{feature!r} arrays; count the embeddings' output too"
                )
        if found.problems:
            return
        project = project_by_shape(projections)
        try:
            jax.eval_shape(
                lambda s, t: self(s, t, project, full_weights(self.init())).total,
                results_S,
                results_T,
            )
        except ValueError as error:
            found.problems.append(f"emd: {error}")
