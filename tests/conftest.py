"""Settings that must hold before JAX starts, and fixtures every test may use."""

import ast
import atexit
import os
import shutil
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["JAXBREWER_COMPILATION_CACHE"] = "off"  # tests write nothing into the user's home
if "PYTEST_XDIST_WORKER" not in os.environ:
    # What one test compiles, the others read, in whatever process: this halves the time of all.
    _programs = tempfile.mkdtemp(prefix="jaxbrewer-tests-")
    atexit.register(shutil.rmtree, _programs, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _programs
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"
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


# --- torch, and what it takes to do without it ----------------------------------------------------

TORCH = ("torch", "transformers", "textbrewer", "sentence_transformers")
"""What the extra ``test`` installs and ``test-core`` does not."""


def pytest_addoption(parser):
    parser.addoption(
        "--without-torch",
        action="store_true",
        help=f"leave out what is marked torch, and let nothing import {', '.join(TORCH)}",
    )
    parser.addoption(
        "--every-combination",
        action="store_true",
        help="of tests/machine/test_described_programs.py, which otherwise takes some",
    )


def pytest_configure(config):
    config.without_torch = {"tests": {}, "files": {}}  # file → how many are left out
    if config.getoption("--without-torch"):
        sys.meta_path.insert(0, Absent())


class Absent:
    """Makes torch look as if it were not installed, so that a missing mark is seen where it is."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in TORCH:
            raise ModuleNotFoundError(f"no {name!r}: --without-torch was given", name=name)
        return None


def is_marked(tree):
    """Whether a file's syntax tree says ``pytestmark = pytest.mark.torch``."""
    return any(
        isinstance(node, ast.Assign) and ast.unparse(node) == "pytestmark = pytest.mark.torch"
        for node in tree.body
    )


def pytest_ignore_collect(collection_path, config):
    """Passes over the files that import torch as they are read."""
    if not config.getoption("--without-torch") or collection_path.suffix != ".py":
        return None
    tree = ast.parse(collection_path.read_text(encoding="utf-8"))
    if not is_marked(tree):
        return None
    names = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    count = sum(name.startswith("test_") for name in names)
    config.without_torch["files"][str(collection_path.relative_to(config.rootpath))] = count
    return True


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--without-torch"):
        return
    out = [item for item in items if item.get_closest_marker("torch")]
    items[:] = [item for item in items if not item.get_closest_marker("torch")]
    config.hook.pytest_deselected(items=out)
    counts = config.without_torch["tests"]
    for item in out:
        file = item.nodeid.partition("::")[0]
        counts[file] = counts.get(file, 0) + 1


def pytest_sessionfinish(session):
    if hasattr(session.config, "workeroutput"):  # a process of xdist's tells the one that prints
        session.config.workeroutput["without_torch"] = session.config.without_torch


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node):
    node.config.without_torch = getattr(node, "workeroutput", {}).get(
        "without_torch", node.config.without_torch
    )


def pytest_terminal_summary(terminalreporter, config):
    if not config.getoption("--without-torch"):
        return
    tests, files = config.without_torch["tests"], config.without_torch["files"]
    terminalreporter.section("without torch")
    terminalreporter.line(f"deselected: {sum(tests.values())} tests in {len(tests)} files")
    terminalreporter.line(
        f"not read: {len(files)} files with {sum(files.values())} functions of tests"
    )
    for file, count in sorted((tests | files).items()):
        terminalreporter.line(f"  {file}: {count if file in tests else 'the whole file'}")
