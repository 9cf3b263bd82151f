"""BERT-EMD: layers matched many to many, by earth mover's distance."""

from collections.abc import Mapping
from typing import Any

import jax

from .. import presets
from ..configurations import checks
from ..configurations.configs import DistillationConfig, TrainingConfig
from ..errors import ConfigError
from ..objective.emd import EMD
from ..objective.objectives import Objective, PlanObjective
from ..objective.plan import make_projection
from .classes import BasicDistiller


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

    def _objective(self) -> Objective:
        plan = PlanObjective.of(self.d_config, logits_required=False)
        return EMD(plan, self.emd, is_projected=bool(self.projs))


def _layers(value: Any) -> int:
    try:
        return checks.integer(2)(value)
    except ValueError:
        raise ValueError(
            "expected the number of layers plus one, for the embeddings' output"
        ) from None


_CHECKS: Mapping[str, checks.Check] = {
    "layer_num_S": _layers,
    "layer_num_T": _layers,
    "feature": checks.one_of(presets.FEATURES),
    "loss": checks.one_of(presets.MATCH_LOSS_MAP),
    "weight": checks.number,
}


def _checked(emd: Mapping[str, Any]) -> dict[str, Any]:
    """Checks the ``emd`` dict; one error for all of it."""
    if not isinstance(emd, Mapping):
        raise ConfigError("emd", [f"expected a dict with {', '.join(_CHECKS)}, got {emd!r}"])
    kept, problems = checks.values(emd, _CHECKS)
    problems += checks.keys(emd, [*_CHECKS, "proj"], required=_CHECKS)
    if problems:
        raise ConfigError("emd", problems)
    return kept
