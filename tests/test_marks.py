"""What needs torch says so: a mark on the file that imports it, or on each test that does."""

import ast
from pathlib import Path

import pytest

from .conftest import TORCH, is_marked

FOLDER = Path(__file__).parent
FILES = {".".join(p.relative_to(FOLDER).with_suffix("").parts): p for p in FOLDER.rglob("*.py")}
TREES = {name: ast.parse(path.read_text()) for name, path in FILES.items()}


def imported(file, node):
    """What an import statement brings in: ``(of torch or its kind?, file of tests, name here)``."""
    if isinstance(node, ast.Import):
        return [
            (alias.name.split(".")[0] in TORCH, None, (alias.asname or alias.name).split(".")[0])
            for alias in node.names
        ]
    module = node.module or ""
    if node.level:
        here = file.split(".")[: -node.level]
        base = ".".join([*here, *filter(None, [module])])
    else:
        base = (
            module.removeprefix("tests").removeprefix(".") if module.startswith("tests") else None
        )
    found = []
    for alias in node.names:
        of_torch = not node.level and bool({*module.split(".")} & {*TORCH})
        inner = None if base is None else ".".join(filter(None, [base, alias.name]))
        source = inner if inner in FILES else base if base in FILES else None
        found.append((of_torch, source, alias.asname or alias.name))
    return found


def statements(file):
    """The import statements that run as the file is read."""
    return [node for node in TREES[file].body if isinstance(node, ast.Import | ast.ImportFrom)]


def reads_torch(file, seen=()):
    """Whether reading a file imports torch, or another file of tests that does."""
    return file not in seen and any(
        of_torch or (source is not None and reads_torch(source, (*seen, file)))
        for node in statements(file)
        for of_torch, source, _ in imported(file, node)
    )


def needing(file, seen=()):
    """The functions, fixtures and values of a file that import torch, or use one that does."""
    names = {}
    for node in TREES[file].body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names[node.name] = node
        elif isinstance(node, ast.Assign):
            names |= {t.id: node for t in node.targets if isinstance(t, ast.Name)}
    found = {
        name
        for name, node in names.items()
        for inner in ast.walk(node)
        if isinstance(inner, ast.Import | ast.ImportFrom)
        if any(of_torch for of_torch, _, _ in imported(file, inner))
    }
    for node in statements(file):
        for of_torch, source, name in imported(file, node):
            theirs = needing(source, (*seen, file)) if source and source not in seen else ()
            if of_torch or name in theirs:
                found.add(name)
    if file.startswith("zoo.test"):
        found |= needing("zoo.conftest")  # its fixtures
    while True:
        more = {name for name, node in names.items() if name not in found and uses(node) & found}
        if not more:
            return found
        found |= more


def uses(node):
    """The names in a definition, and its fixtures; of a test, not those in its decorators."""
    parts = node.body if isinstance(node, ast.FunctionDef) else [node]
    names = {n.id for part in parts for n in ast.walk(part) if isinstance(n, ast.Name)}
    return names | {a.arg for a in node.args.args} if isinstance(node, ast.FunctionDef) else names


TESTS = sorted(file for file in FILES if file.split(".")[-1].startswith("test_"))


@pytest.mark.parametrize("file", TESTS)
def test_a_file_or_its_tests_are_marked_where_they_import_torch(file):
    tree = TREES[file]
    assert is_marked(tree) == reads_torch(file), "pytestmark = pytest.mark.torch is for such files"
    if is_marked(tree):
        return
    needy = needing(file)
    for node in tree.body:
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
            marked = "pytest.mark.torch" in map(ast.unparse, node.decorator_list)
            assert marked or node.name not in needy, f"{node.name} needs @pytest.mark.torch"


def test_the_reader_finds_what_needs_torch():
    assert reads_torch("parity.reference") and reads_torch("parity.test_distillers")
    assert not reads_torch("parity.test_emd") and not reads_torch("training.test_loop")
    assert {"make_torch", "to_torch", "torch_model"} <= needing("zoo.conftest")
    assert "test_loss_and_gradient_equal_the_formula" in needing("parity.test_emd")
    assert "test_shards_are_read" in needing("zoo.test_hf")  # by way of a fixture
    assert "test_what_is_no_optimizer" not in needing("training.test_loop")
