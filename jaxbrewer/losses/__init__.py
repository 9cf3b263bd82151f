"""The losses on logits and on features, pure functions of arrays."""

from .hidden import (
    att_ce_loss,
    att_ce_mean_loss,
    att_mse_loss,
    att_mse_sum_loss,
    cos_loss,
    fsp_loss,
    hid_mse_loss,
    kd_ce_loss,
    kd_mse_loss,
    mmd_loss,
    pkd_loss,
)

__all__ = [
    "att_ce_loss",
    "att_ce_mean_loss",
    "att_mse_loss",
    "att_mse_sum_loss",
    "cos_loss",
    "fsp_loss",
    "hid_mse_loss",
    "kd_ce_loss",
    "kd_mse_loss",
    "mmd_loss",
    "pkd_loss",
]
