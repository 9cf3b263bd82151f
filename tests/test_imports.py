"""Which room may import which: the direction of things, from text to losses to the loop."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxbrewer

PACKAGE = Path(jaxbrewer.__file__).parent


def is_face(path):
    """Whether a file only hands on the names of its package."""
    return path.name == "__init__.py" and path.parent.name not in ("jaxbrewer", "zoo", "commands")


MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts)
    for path in PACKAGE.rglob("*.py")
    if not is_face(path)
)

# Lowest rooms first; a room imports from rooms above it only.
ROOMS = [
    "errors", "machine.devices", "machine.memory", "machine.programs", "data.buckets", "data_utils",
    "utils", "training.metrics", "objective.transport",
    # functions of arrays, and their names
    "losses.shapes", "losses.hidden", "schedulers", "projections", "matches", "presets",
    # frozen text
    "configurations.checks", "configurations.configs",
    # what a user brings
    "models.handle", "models.half_products", "models.precision", "step.loss_scale", "data.batches",
    "models.adaptors", "models.teachers", "step.optimizer",
    # text → plan → maths
    "objective.plan", "objective.submodules", "objective.loss", "preflight.sides", "objective.terms",
    # the compiled step
    "step.program",
    # input and output
    "machine.placement", "training.teacher_cache", "data.streams", "machine.processes",
    "training.checkpoints", "training.loop", "preflight.report",
    # the facade
    "training.request", "preflight.prepare", "training.run", "distillers.base",
    "distillers.classes", "distillers.emd", "testing",
    # encoders, which know nothing of distillation
    "zoo.activations", "zoo.configuration", "zoo.outputs", "zoo.heads", "zoo.dropout",
    "zoo.attention", "zoo.blocks", "zoo.hf", "zoo.encoder", "zoo.tasks", "zoo.bert",
    "zoo.roberta", "zoo.electra", "zoo.distilbert", "zoo.bigru",
    "zoo.transfer", "zoo.auto", "zoo.students", "zoo.__init__",
    # the command
    "commands.__init__", "commands.port.literals", "commands.zoo_models", "commands.port.verdicts",
    "commands.port.advice",
    "commands.port.documents", "commands.weights", "commands.checking", "commands.inspecting",
    "__init__", "__main__",
]  # fmt: skip

# Libraries that only some rooms may know.
KEPT_APART = {
    "orbax": {"training.checkpoints"},
    "optax": {"commands.checking", "step.optimizer", "step.program", "testing", "training.run"},
    "tensorboardX": {"distillers.base", "training.metrics"},
    "tqdm": {"training.teacher_cache", "training.loop"},
    "safetensors": {"training.teacher_cache", "zoo.hf", "commands.weights", "commands.inspecting"},
    "torch": {"commands.weights"},
    "transformers": set(),
    "textbrewer": set(),
    "tokenizers": set(),
    "matplotlib": set(),
}


def nodes(tree):
    """All nodes but those that only a type checker reads."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        yield node
        yield from nodes(node)


def imports(module):
    """The modules of this package that a module imports, and the libraries."""
    path = PACKAGE.joinpath(*module.split(".")).with_suffix(".py")
    ours, libraries = set(), set()
    for node in nodes(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = absolute(module, node)
        else:
            continue
        for name in names:
            top, _, rest = name.partition(".")
            if top == "jaxbrewer":
                ours.add(module_of(rest))
            else:
                libraries.add(top)
    return ours - {module}, libraries


def absolute(module, node):
    """The full names that ``from … import …`` asks for."""
    folder = ["jaxbrewer", *module.split(".")][: -node.level or None] if node.level else []
    base = ".".join([*folder, *([node.module] if node.module else [])])
    return [f"{base}.{alias.name}" for alias in node.names]


def module_of(name):
    """``'zoo.hf.PretrainedModel'`` → ``'zoo.hf'``."""
    parts = name.split(".")
    while parts and ".".join(parts) not in MODULES:
        if ".".join([*parts, "__init__"]) in MODULES:
            return ".".join([*parts, "__init__"])
        parts.pop()
    return ".".join(parts) or "__init__"


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_a_room_imports_only_what_it_may(module):
    assert module in ROOMS, f"{module} is new: give it its place in the list"
    ours, libraries = imports(module)
    later = [other for other in ours if ROOMS.index(other) > ROOMS.index(module)]
    assert not later, f"{module} imports {later}, against the direction"
    for library in libraries & set(KEPT_APART):
        assert module in KEPT_APART[library], f"{module} must not know {library}"


def test_the_reader_sees_every_form_of_import():
    assert imports("training.run")[0] >= {
        "step.optimizer",
        "training.checkpoints",
        "preflight.report",
    }
    assert imports("configurations.checks")[0] >= {"presets", "errors"}
    assert imports("zoo.bert")[0] >= {"zoo.blocks", "zoo.outputs"}
    assert "zoo.__init__" in imports("__init__")[0]
    assert "distillers.base" not in imports("preflight.report")[0]  # for the type checker alone


def test_importing_needs_none_of_the_extras():
    extras = [name for name, rooms in KEPT_APART.items() if not rooms]
    block = "import sys; sys.modules.update(dict.fromkeys({!r})); import jaxbrewer"
    run = subprocess.run(
        [sys.executable, "-c", block.format(extras)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_public_names_are_there():
    assert len(set(jaxbrewer.__all__)) == len(jaxbrewer.__all__)
    for name in jaxbrewer.__all__:
        assert hasattr(jaxbrewer, name)
