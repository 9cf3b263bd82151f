"""What an installation holds, and that Python finds it from wherever a script stands."""

import email
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

import jaxbrewer

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
    for name in ("pyproject.toml", "MANIFEST.in", "README.md", "CHANGELOG.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    for name in ("tests", "benchmarks", "examples"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").touch()
    return folder


def python(*arguments, cwd, executable=sys.executable):
    """Runs Python without what is on the path of these tests."""
    variables = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        [executable, *arguments],
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


LOOK = """
import importlib.metadata, importlib.resources, jaxbrewer
print(jaxbrewer.__file__)
print(importlib.metadata.version("jaxbrewer"), jaxbrewer.__version__)
print(importlib.resources.files("jaxbrewer").joinpath("py.typed").is_file())
"""


@pytest.fixture(scope="module")
def source(clone, tmp_path_factory):
    """The source distribution, unpacked."""
    folder = tmp_path_factory.mktemp("sdist")
    python("-c", BUILD, "build_sdist", str(folder), cwd=clone)
    (archive,) = folder.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        file.extractall(folder, filter="data")
    return folder / archive.name.removesuffix(".tar.gz")


def test_a_source_distribution_holds_the_package_and_what_builds_it(source):
    assert source.name == f"jaxbrewer-{jaxbrewer.__version__}"
    beside = {"CHANGELOG.md", "LICENSE", "MANIFEST.in", "README.md", "pyproject.toml"}
    made = {"PKG-INFO", "jaxbrewer.egg-info", "setup.cfg"}
    assert {path.name for path in source.iterdir()} == beside | made | {"jaxbrewer"}
    assert (source / "jaxbrewer" / "py.typed").is_file()


def test_what_is_built_of_it_is_installed_in_a_fresh_environment(source, tmp_path):
    (tmp_path / "built").mkdir()
    with build(source, "build_wheel", tmp_path / "built") as wheel:
        (name,) = [name for name in wheel.namelist() if name.endswith("/METADATA")]
        said = email.message_from_bytes(wheel.read(name))
    assert said["Version"] == jaxbrewer.__version__
    assert said["License-Expression"] == "Apache-2.0" and said["License-File"] == "LICENSE"
    assert said["Requires-Python"] == ">=3.11"
    assert said["Description-Content-Type"] == "text/markdown"
    assert "Typing :: Typed" in said.get_all("Classifier")
    assert {"text", "docs", "test"} <= set(said.get_all("Provides-Extra"))

    venv.create(tmp_path / "fresh", with_pip=False)
    fresh = tmp_path / "fresh" / "bin"
    file = next((tmp_path / "built").glob("*.whl"))
    install = ["-m", "pip", "--python", str(fresh / "python"), "install", "-q", "--no-deps"]
    python(*install, "--no-index", str(file), cwd=tmp_path)
    # What it depends on is here already: it need not be fetched again.
    site = Path(sysconfig.get_path("purelib", vars={"base": str(tmp_path / "fresh")}))
    (site / "here.pth").write_text(sysconfig.get_path("purelib"))
    where, versions, is_typed = python(
        "-c", LOOK, cwd=tmp_path, executable=str(fresh / "python")
    ).splitlines()
    assert Path(where) == site / "jaxbrewer" / "__init__.py"
    assert versions.split() == 2 * [jaxbrewer.__version__] and is_typed == "True"
    shown = python(str(fresh / "jaxbrewer"), "--version", cwd=tmp_path, executable=fresh / "python")
    assert shown.strip() == f"jaxbrewer {jaxbrewer.__version__}"
