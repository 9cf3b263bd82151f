"""What an installation holds, and that Python finds it from wherever a script stands."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

BUILD = "import sys, setuptools.build_meta as backend; getattr(backend, sys.argv[1])(sys.argv[2])"
FIND = """
import importlib.util, site, sys
site.addsitedir(sys.argv[1])
print(importlib.util.find_spec("jaxbrewer").origin)
"""


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what the build reads, in a folder named as a clone is."""
    folder = tmp_path_factory.mktemp("parent") / "jaxbrewer"
    shutil.copytree(
        ROOT / "jaxbrewer", folder / "jaxbrewer", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("tests", "benchmarks", "examples"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    return folder


def python(*arguments, cwd):
    """Runs Python without what is on the path of these tests."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=cwd,
        env=variables,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def build(clone, hook, folder):
    """Calls a hook of the build backend; returns the wheel, opened."""
    python("-c", BUILD, hook, str(folder), cwd=clone)
    (wheel,) = folder.glob("*.whl")
    return zipfile.ZipFile(wheel)


@pytest.mark.parametrize("place", ["parent", "clone", "elsewhere"])
def test_an_editable_install_is_found_from_everywhere(clone, place, tmp_path):
    """From the parent the clone's folder could be taken for a package of that name."""
    (tmp_path / "built").mkdir()
    with build(clone, "build_editable", tmp_path / "built") as wheel:
        wheel.extractall(tmp_path / "site")
    folder = {"parent": clone.parent, "clone": clone, "elsewhere": tmp_path}[place]
    script = folder / "script.py"
    script.write_text(FIND)
    # -S leaves out site-packages, where this package may be installed.
    found = python("-S", str(script), str(tmp_path / "site"), cwd=folder)
    assert found.strip() == str(clone / "jaxbrewer" / "__init__.py")


def test_a_wheel_holds_the_package_and_nothing_else(clone, tmp_path):
    with build(clone, "build_wheel", tmp_path) as wheel:
        names = wheel.namelist()
        (entry_points,) = [name for name in names if name.endswith(".dist-info/entry_points.txt")]
        assert "jaxbrewer = jaxbrewer.__main__:main" in wheel.read(entry_points).decode()
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    package = {name for name in names if ".dist-info/" not in name}
    source = (path for path in (ROOT / "jaxbrewer").rglob("*") if "__pycache__" not in path.parts)
    assert package == {path.relative_to(ROOT).as_posix() for path in source if path.is_file()}
    assert "jaxbrewer/py.typed" in package
