"""Pure losses between a student's and a teacher's outputs: arrays, and a mask, in; a scalar out.

Rules that hold for every loss:

- Half precision is computed, and returned, in float32; float64 stays float64.
- ``mask`` may have any dtype. Each docstring says whether its values are weights or only select
  (nonzero is selected). A mask that selects nothing gives 0 with zero gradients, where
  TextBrewer gives NaN.
- What stands at masked positions does not count, not even NaN, with two exceptions:
  ``fsp_loss`` and ``mmd_loss`` want it finite, and the attention cross-entropies take the softmax
  over all keys, masked ones too (where scores are usually very low).
- Shapes are checked before anything is computed; a :class:`ValueError` names both shapes and the
  fix.

Values and gradients are those of `TextBrewer <https://arxiv.org/abs/2002.12620>`_ unless a
docstring says otherwise.
"""

from .attention import (
    att_ce_loss,
    att_ce_mean_loss,
    att_mse_loss,
    att_mse_sum_loss,
    relation_loss,
)
from .divergences import (
    kd_dist_loss,
    kd_dkd_loss,
    kd_jsd_loss,
    kd_kl_loss,
    kd_reverse_kl_loss,
    kd_skew_kl_loss,
    kd_skew_reverse_kl_loss,
    kd_tvd_loss,
)
from .hidden import cos_loss, fsp_loss, hid_mse_loss, l2_loss, mmd_loss, pkd_loss
from .logits import (
    kd_bce_loss,
    kd_ce_loss,
    kd_listwise_kl_loss,
    kd_margin_mse_loss,
    kd_mse_loss,
)
from .relations import (
    cka_loss,
    infonce_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_loss,
)

COUPLING = (
    kd_dist_loss,
    rkd_distance_loss,
    rkd_angle_loss,
    similarity_loss,
    cka_loss,
    infonce_loss,
)
"""The losses that compare the examples of a batch with each other, so are no means over examples."""

__all__ = [
    "kd_ce_loss",
    "kd_mse_loss",
    "kd_bce_loss",
    "kd_margin_mse_loss",
    "kd_listwise_kl_loss",
    "kd_kl_loss",
    "kd_reverse_kl_loss",
    "kd_jsd_loss",
    "kd_skew_kl_loss",
    "kd_skew_reverse_kl_loss",
    "kd_tvd_loss",
    "kd_dkd_loss",
    "kd_dist_loss",
    "att_mse_loss",
    "att_mse_sum_loss",
    "att_ce_loss",
    "att_ce_mean_loss",
    "relation_loss",
    "hid_mse_loss",
    "cos_loss",
    "l2_loss",
    "pkd_loss",
    "fsp_loss",
    "mmd_loss",
    "rkd_distance_loss",
    "rkd_angle_loss",
    "similarity_loss",
    "cka_loss",
    "infonce_loss",
]
