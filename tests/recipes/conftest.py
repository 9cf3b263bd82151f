"""The recipes that tests begin with."""

import pytest

from .files import recipe


@pytest.fixture
def tiny(tmp_path):
    """Task → its recipe."""
    return lambda task="sequence-classification", **changes: recipe(tmp_path, task, **changes)
