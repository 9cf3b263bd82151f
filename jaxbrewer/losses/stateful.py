"""Losses on logits that learn from the losses before: what such a loss is, and TAID.

A loss with a state is a class, whose options are its keyword parameters; a config names it as it names
any loss: ``["taid", {"t_start": 0.2}]``. An instance has

``init()``
    the state that training starts with, a dict of arrays;
``(logits_S, logits_T, temperature, mask=None, *, state)``
    the loss, a pure function;
``advance(state, loss, progress)``
    the state after an optimizer step, from the mean of the step's losses over its micro-batches (and
    over all devices), and from the finished part of the training. What is not finite never comes here:
    such a step is dropped, and its state with it.

The state is saved in checkpoints.
"""

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

from jaxbrewer.losses.shapes import check_logits, check_part

from .logits import scaled, soften
from .means import Scalar, log_softmax, mean

State = Mapping[str, Any]


@dataclass(frozen=True)
class Taid:
    r"""Temporally adaptive interpolated distillation.

    .. math:: \operatorname{mean}_i \operatorname{KL}(r_t \| q), \quad
        r_t = \operatorname{softmax}\left((1 - t)\, \bar z_S + t\, z_T\right)

    with :math:`\bar z_S` the student's logits as they are, without a gradient, and all logits over the
    temperature. So the student is first drawn to what is near to it. After each optimizer step, with its
    loss :math:`L`, the one before :math:`L_-` and the finished part of the training :math:`x`,

    .. math:: m \leftarrow \beta m + (1 - \beta) \frac{L_- - L}{L_- + 10^{-15}}, \quad
        t \leftarrow \min\left(t_1, \max\left(t_0 + (t_1 - t_0) x,\;
        t + \alpha\, \sigma(m) (1 - t)\right)\right)

    ``mask`` selects: the mean runs over positions where it is not 0.

    Shing et al. 2025, `TAID <https://arxiv.org/abs/2501.16937>`_.

    Args:
        t_start: :math:`t_0`, the teacher's part at the start.
        t_end: :math:`t_1`, its part at the end.
        alpha: how fast it grows beside the progress of the training.
        beta: how slowly the momentum :math:`m` follows.
        standardize: see `jaxbrewer.losses.logits`.
        scale_by_t2: see there.

    Raises:
        ValueError: an option is not from 0 to 1, or ``t_start`` is above ``t_end``.
    """

    _: KW_ONLY
    t_start: float = 0.4
    t_end: float = 1.0
    alpha: float = 5e-4
    beta: float = 0.99
    standardize: bool = False
    scale_by_t2: bool = False

    def __post_init__(self) -> None:
        for name in ("t_start", "t_end", "alpha", "beta"):
            check_part("taid", name, getattr(self, name))
        if self.t_start > self.t_end:
            raise ValueError(
                f"taid: t_start is {self.t_start} and t_end {self.t_end}; expected t_start up to t_end."
            )

    def init(self) -> State:
        """``t``, the momentum, and the loss before (−1: there is none yet)."""
        return {name: jnp.float32(x) for name, x in (("t", self.t_start), ("m", 0), ("loss", -1))}

    def __call__(
        self,
        logits_S: Float[Array, "*positions classes"],
        logits_T: Float[Array, "*positions classes"],
        temperature: float | Float[Array, "*positions"] = 1,
        mask: Shaped[Array, "*positions"] | None = None,
        *,
        state: State,
    ) -> Scalar:
        """The loss at ``state['t']``.

        Raises:
            ValueError: Shapes of logits, temperature and mask do not fit together.
        """
        check_logits("taid", logits_S, logits_T, temperature, mask)
        S, T, selected = soften(logits_S, logits_T, temperature, mask, self.standardize)
        t = state["t"].astype(S.dtype)
        lowest = jnp.finfo(S.dtype).min
        both = [jnp.maximum(x, lowest / 2) for x in (jax.lax.stop_gradient(S), T)]  # −inf is let in
        log_r = log_softmax((1 - t) * both[0] + t * both[1])
        each = jnp.sum(jnp.exp(log_r) * (log_r - log_softmax(S)), axis=-1)
        return mean(scaled(each, temperature, selected, self.scale_by_t2), selected)

    def advance(self, state: State, loss: Array, progress: Array) -> State:
        """See the class."""
        t, m, before = state["t"], state["m"], state["loss"]
        change = (before - loss) / (before + 1e-15)
        moved = self.beta * m + (1 - self.beta) * change
        wanted = self.t_start + (self.t_end - self.t_start) * progress
        grown = t + self.alpha * jax.nn.sigmoid(moved) * (1 - t)
        is_first = before < 0
        return {
            "t": jnp.where(is_first, t, jnp.minimum(self.t_end, jnp.maximum(wanted, grown))),
            "m": jnp.where(is_first, m, moved),
            "loss": jnp.asarray(loss, jnp.float32),
        }
