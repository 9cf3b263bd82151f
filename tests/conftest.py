"""Settings that must hold before JAX starts, and fixtures every test may use."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAXBREWER_COMPILATION_CACHE"] = "off"  # tests write nothing into the user's home
# Eight virtual devices, and threads enough for all of them to wait for each other.
os.environ["NPROC"] = "16"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture
def x64():
    """Runs the test in double precision, as torch does under ``.double()``."""
    with jax.enable_x64(True):
        yield
