"""On GPUs, programs are compiled so that they give the same bits each time.

A GPU adds up by atomic operations where it is told nothing else, in an order that changes from run to
run, and its kernels for products are chosen by timing them. A run that is killed and resumed would then
not end in the bits it would have ended in.
"""

import os
from collections.abc import Sequence

import jax

OPTION = "xla_gpu_deterministic_ops"


def compiler_options(devices: Sequence[jax.Device]) -> dict[str, bool] | None:
    """The options of `jax.jit` for a program on `devices`; None: it needs none.

    What the environment variable ``XLA_FLAGS`` says of the option holds, so that
    ``XLA_FLAGS=--xla_gpu_deterministic_ops=false`` goes without it.
    """
    if devices[0].platform != "gpu" or OPTION in os.environ.get("XLA_FLAGS", ""):
        return None
    return {OPTION: True}
