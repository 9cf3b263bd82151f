"""Settings that must hold before JAX starts, and fixtures every test may use."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAXBREWER_COMPILATION_CACHE"] = "off"  # tests write nothing into the user's home

import jax
import pytest


@pytest.fixture
def x64():
    """Runs the test in double precision, as torch does under ``.double()``."""
    with jax.enable_x64(True):
        yield
