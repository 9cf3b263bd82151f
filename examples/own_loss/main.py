"""Two losses of one's own, by name in a recipe.

python main.py recipe.toml [arguments of `jaxbrewer train`]
"""

import sys
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax

from jaxbrewer import KD_LOSS_MAP, MATCH_LOSS_MAP
from jaxbrewer.__main__ import main as jaxbrewer


def focal_kl(
    logits_S: jax.Array, logits_T: jax.Array, temperature: float, *, gamma: float = 2
) -> jax.Array:
    """KL(teacher ‖ student), of each position by how far the two are apart.

    The weight is (1 − Σ min(p, q))^γ: 0 where the student says what the teacher does, so that what is
    learnt already does not outweigh the rest. The mean over the positions.

    Args:
        logits_S: `[…, classes]`.
        logits_T: the same shape.
        temperature: of both.
        gamma: 0: a plain KL.
    """
    log_q = jax.nn.log_softmax(logits_S / temperature)
    log_p = jax.nn.log_softmax(logits_T / temperature)
    p = jnp.exp(log_p)
    apart = 1 - jnp.minimum(p, jnp.exp(log_q)).sum(-1)
    weight = jax.lax.stop_gradient(jnp.maximum(apart, 1e-6) ** gamma)
    return jnp.mean(weight * (p * (log_p - log_q)).sum(-1))


def huber(
    S: jax.Array, T: jax.Array, mask: jax.Array | None = None, *, delta: float = 1
) -> jax.Array:
    """Squared where the difference is below δ, else linear, so that few large units do not rule.

    Args:
        S: `[batch, length, width]`.
        T: the same shape.
        mask: `[batch, length]`, 0 where a position is padding.
        delta: see above.
    """
    each = optax.losses.huber_loss(S, T, delta=delta).mean(-1)
    return each.mean() if mask is None else (each * mask).sum() / mask.sum()


KD_LOSS_MAP["focal_kl"] = focal_kl
MATCH_LOSS_MAP["huber"] = huber


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `jaxbrewer train`, which knows the two now; returns its exit code."""
    return jaxbrewer(["train", *(sys.argv[1:] if argv is None else argv)])


if __name__ == "__main__":
    sys.exit(main())
