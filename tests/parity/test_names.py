"""Every public name of TextBrewer is here, or the porting guide says where it went."""

import importlib
import inspect
from pathlib import Path

import pytest

GUIDE = Path(__file__).parent.parent.parent / "docs" / "porting.md"
MODULES = [
    "",
    "configurations",
    "presets",
    "losses",
    "schedulers",
    "projections",
    "utils",
    "data_utils",
]


def public_names(module):
    """What a module of TextBrewer defines itself, or in the package's own case hands on."""
    for name, value in vars(module).items():
        if name.startswith("_") or inspect.ismodule(value):
            continue
        home = getattr(value, "__module__", module.__name__) or module.__name__
        if home.startswith("textbrewer") or not callable(value):
            yield name


@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_has_its_place(name):
    theirs = importlib.import_module(f"textbrewer.{name}".rstrip("."))
    ours = importlib.import_module(f"jaxbrewer.{name}".rstrip("."))
    guide = GUIDE.read_text()
    names = [n for n in public_names(theirs) if not hasattr(ours, n)]
    missing = [n for n in names if f"`{n}`" not in guide and f"`{name}.{n}`" not in guide]
    assert not missing, f"{theirs.__name__}: not here and not in the guide: {missing}"
