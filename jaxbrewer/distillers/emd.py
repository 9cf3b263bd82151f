"""BERT-EMD: layers matched many to many, by earth mover's distance."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from .. import presets
from ..configurations.configs import DistillationConfig, TrainingConfig
from ..data.batches import Batch
from ..errors import ConfigError, Findings, suggest
from ..models.adaptors import Results
from ..objective.loss import Loss, Project, Weights, distillation_loss
from ..objective.plan import make_projection
from ..objective.transport import exact_transport
from .classes import BasicDistiller

_REQUIRED = ("layer_num_S", "layer_num_T", "feature", "loss", "weight")


class EMDDistiller(BasicDistiller):
    """Distils one teacher, matching each student layer with all teacher layers as far as it pays.

    ``total = w_kd · KD + w_hard · Σ losses + weight · (EMD + embedding)``, where EMD is the least
    cost of moving uniform weights over the student's layers onto uniform weights over the
    teacher's, the cost of a pair of layers being its matching loss, and the embeddings' outputs
    (index 0) are matched apart. The plan of the transport is exact and held constant in the
    gradient. BERT-EMD, Li et al., EMNLP 2020 (https://arxiv.org/abs/2010.06133); a first-class
    form of the distiller in TextBrewer's MNLI example, and written as any objective of your own
    would be: by overriding `compute_loss`.

    Args:
        train_config: how to train.
        distill_config: the KD and hard-label terms; no intermediate matches.
        model_T: the teacher.
        model_S: the student.
        adaptor_T: the teacher's adaptor.
        adaptor_S: the student's.
        emd: ``layer_num_S`` and ``layer_num_T``, each with the embeddings' output counted
            (4 + 1, 12 + 1); ``feature`` (``'hidden'``); ``loss``, a name in
            `presets.MATCH_LOSS_MAP` for single layers (``'hidden_mse'``); ``weight``; and, where
            widths differ, ``proj``: ``[name, dim_S, dim_T]``, with optimizer options if wanted,
            of which each student layer gets its own.
    """

    _logits_required = False

    def __init__(
        self,
        train_config: TrainingConfig,
        distill_config: DistillationConfig,
        model_T: Any,
        model_S: Any,
        adaptor_T: Any,
        adaptor_S: Any,
        emd: Mapping[str, Any],
    ):
        super().__init__(train_config, distill_config, model_T, model_S, adaptor_T, adaptor_S)
        if distill_config.is_caching_logits:
            raise ValueError("is_caching_logits: EMDDistiller uses all layers, and does not cache")
        self.emd = _checked(emd)
        proj = self.emd.get("proj")
        if not proj:
            return
        keys = jax.random.split(jax.random.key(train_config.seed), self.emd["layer_num_S"])
        self.projs = [make_projection(proj, key) for key in keys]
        self.projs_group = [proj[3] if len(proj) > 3 else {} for _ in keys]

    def compute_loss(
        self, results_S: Results, results_T: Results, project: Project, weights: Weights
    ) -> Loss:
        """See the class."""
        if self._plan is None:
            raise ValueError("compute_loss runs inside train() or check(), which read the config")
        base = distillation_loss(self._plan, results_S, results_T, project, weights)
        feature, name, weight = (self.emd[key] for key in ("feature", "loss", "weight"))
        source = results_S if weight else jax.lax.stop_gradient(results_S)
        mask = source.get("inputs_mask")
        layers_S = list(source[feature])
        if self.projs:
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

    def _check(self, results_S: Results, results_T: Results, batch: Batch, found: Findings) -> None:
        feature = self.emd["feature"]
        for role, results in (("S", results_S), ("T", results_T)):
            if feature not in results:
                keys = ", ".join(map(repr, results))
                found.problems.append(f"adaptor_{role} returns no {feature!r}, only {keys}")
                continue
            there, wanted = len(results[feature]), self.emd[f"layer_num_{role}"]
            if there != wanted or any(x is None for x in results[feature]):
                found.problems.append(
                    f"emd['layer_num_{role}'] is {wanted}, but adaptor_{role} returns {there} "
                    f"{feature!r} arrays; count the embeddings' output too"
                )
        if found.problems or self._plan is None:
            return
        try:
            weights = Weights(jnp.ones(()), jnp.ones(()))
            jax.eval_shape(
                lambda s, t: self.compute_loss(s, t, self._project_by_shape, weights)[0],
                results_S,
                results_T,
            )
        except ValueError as error:
            found.problems.append(f"emd: {error}")

    def _project_by_shape(self, name: str, feature: jax.Array) -> jax.Array:
        module: Any = self.projs[int(name)]
        return module(feature)


def _checked(emd: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the ``emd`` dict; one error for all of it."""
    if not isinstance(emd, Mapping):
        raise ConfigError("emd", [f"expected a dict with {', '.join(_REQUIRED)}, got {emd!r}"])
    known = (*_REQUIRED, "proj")
    problems = [f"unknown key {key!r}; {suggest(key, known)}" for key in emd if key not in known]
    problems += [f"missing key {key!r}" for key in _REQUIRED if key not in emd]
    if not problems:
        for key in ("layer_num_S", "layer_num_T"):
            if not isinstance(emd[key], int) or emd[key] < 2:
                problems.append(
                    f"{key} is {emd[key]!r}: expected the number of layers plus one, for the "
                    "embeddings' output"
                )
        if emd["loss"] not in presets.MATCH_LOSS_MAP:
            problems.append(f"loss: {suggest(emd['loss'], presets.MATCH_LOSS_MAP)}")
        if emd["feature"] not in presets.FEATURES:
            problems.append(f"feature: {suggest(emd['feature'], presets.FEATURES)}")
        if isinstance(emd["weight"], bool) or not isinstance(emd["weight"], int | float):
            problems.append(f"weight is {emd['weight']!r}: expected a number")
    if problems:
        raise ConfigError("emd", problems)
    return dict(emd)
