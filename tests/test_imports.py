"""Which room may import which: the direction of things, from text to losses to the loop.

``python -m tests.test_imports`` prints the measures of the house.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import jaxbrewer

PACKAGE = Path(jaxbrewer.__file__).parent
MODULES = sorted(
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in PACKAGE.rglob("*.py")
)

# The floors, lowest first: a room imports rooms of its own floor's left, and of the floors below.
FLOORS = [
    ["errors", "files"],
    # TextBrewer's own import paths
    ["losses", "schedulers", "projections", "presets", "utils", "data_utils"],
    ["data"],
    ["configurations"],
    # the engine
    ["models"],
    ["objective"],
    ["step"],
    ["preflight"],
    ["machine"],
    ["evaluation"],
    ["training"],
    # the facade
    ["distillers"],
    ["testing"],
    # the wings
    ["zoo"],
    ["recipes"],
    ["commands"],
    ["__init__", "__main__"],
]
ROOMS = [room for floor in FLOORS for room in floor]
ENGINE = ["models", "objective", "step", "preflight", "machine", "evaluation", "training"]
MOST_ROOMS = 25

# Libraries that only some files may know.
KEPT_APART = {
    "orbax": {"training.backend"},
    "optax": {
        "commands.checking", "recipes.jobs", "recipes.schema", "step.optimizer", "step.program",
        "testing", "training.run",
    },
    "tensorboardX": {"training.event_files"},
    "tqdm": {"training.teacher_cache", "training.loop"},
    "safetensors": {
        "training.teacher_cache", "zoo.folders", "commands.weights",
    },
    "torch": {"commands.weights", "zoo.onnx.__init__", "zoo.onnx.twins"},
    "transformers": {"zoo.onnx.twins"},
    "onnx": {"zoo.onnx.__init__"},
    "onnxruntime": set(),
    "sentence_transformers": set(),
    "textbrewer": set(),
    "tokenizers": set(),
    "matplotlib": set(),
}  # fmt: skip


def tree_of(module):
    return ast.parse(PACKAGE.joinpath(*module.split(".")).with_suffix(".py").read_text())


def imports(module):
    """The modules of this package that a module imports (for type checkers too), and the libraries."""
    ours, libraries = set(), set()
    for node in ast.walk(tree_of(module)):
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


def room_of(module):
    """``'training.loop'`` → ``'training'``."""
    return module.split(".")[0]


def circle(arrows):
    """Some names that lead back to themselves by `arrows` (name → names), or none."""
    done = set()

    def walk(name, path):
        if name in path:
            return path[path.index(name) :]
        if name in done:
            return []
        for other in sorted(arrows.get(name, ())):
            if found := walk(other, [*path, name]):
                return found
        done.add(name)
        return []

    return next((found for name in sorted(arrows) if (found := walk(name, []))), [])


def underscored(tree):
    """The names with one leading underscore that a module defines, on objects too."""
    defined = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.AsyncFunctionDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            defined.add(node.attr)
    return {name for name in defined if is_private(name)}


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def climbs(module):
    """Where a module of the engine speaks of a distiller: in a name, an annotation or an import."""
    found = []
    for node in ast.walk(tree_of(module)):
        name = getattr(node, "id", None) or getattr(node, "arg", None)
        if name in ("distiller", "Trainable") or getattr(node, "value", None) == "Trainable":
            found.append(f"{module}:{node.lineno}")
    return found + [other for other in imports(module)[0] if room_of(other) == "distillers"]


def upwards(module):
    """The modules that a module imports from rooms above its own."""
    rank = ROOMS.index(room_of(module))
    return [other for other in imports(module)[0] if ROOMS.index(room_of(other)) > rank]


def circles():
    """A circle of modules and one of rooms; empty where there is none."""
    arrows = {module: imports(module)[0] for module in MODULES if module != "__init__"}
    rooms = {}
    for module, others in arrows.items():
        rooms.setdefault(room_of(module), set()).update(map(room_of, others))
    return circle(arrows), circle({room: others - {room} for room, others in rooms.items()})


@pytest.mark.parametrize("module", [m for m in MODULES if m != "__init__"])
def test_a_module_imports_only_what_it_may(module):
    assert room_of(module) in ROOMS, f"{module} is new: give it a room"
    libraries = imports(module)[1]
    assert not (up := upwards(module)), f"{module} imports {up}, upwards"
    for library in libraries & set(KEPT_APART):
        assert module in KEPT_APART[library], f"{module} must not know {library}"


def test_there_is_no_circle_of_modules_or_rooms():
    assert circles() == ([], [])


def test_no_room_takes_an_underscore_of_another():
    own = {}
    for module in MODULES:
        own.setdefault(room_of(module), set()).update(underscored(tree_of(module)))
    taken = []
    for module in MODULES:
        others = set().union(*(names for room, names in own.items() if room != room_of(module)))
        for node in ast.walk(tree_of(module)):
            names = [node.attr] if isinstance(node, ast.Attribute) else []
            if isinstance(node, ast.ImportFrom) and (
                node.level or "jaxbrewer" in (node.module or "")
            ):
                names = [alias.name for alias in node.names]
            taken += [
                f"{module}:{node.lineno}: {name}"
                for name in names
                if is_private(name) and name not in own[room_of(module)] and name in others
            ]
    assert not taken


@pytest.mark.parametrize("module", [m for m in MODULES if room_of(m) in ENGINE])
def test_the_engine_does_not_climb_into_the_distillers(module):
    assert not climbs(module)


def test_the_house_has_few_rooms():
    assert len({room_of(module) for module in MODULES} - {"__init__", "__main__"}) <= MOST_ROOMS


def test_the_reader_sees_every_form_of_import():
    assert imports("training.run")[0] >= {"step.optimizer", "training.checkpoints"}
    assert imports("configurations.checks")[0] >= {"presets", "errors"}
    assert imports("zoo.bert")[0] >= {"zoo.blocks", "zoo.outputs"}
    assert "zoo.__init__" in imports("__init__")[0]
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c"]
    assert not circle({"a": ["b", "c"], "b": ["c"]})
    assert underscored(ast.parse("_a = 1\ndef _b(self): self._c = 2; self.d = 3")) == {
        "_a", "_b", "_c",
    }  # fmt: skip


def test_importing_needs_none_of_the_extras():
    extras = [name for name, rooms in KEPT_APART.items() if not rooms]
    block = "import sys; sys.modules.update(dict.fromkeys({!r})); import jaxbrewer"
    run = subprocess.run(
        [sys.executable, "-c", block.format(extras)], capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr


def test_importing_brings_no_torch():
    """TensorboardX imports it where it is, which takes longer than all else."""
    block = (
        "import sys, jaxbrewer; print({'torch', 'transformers', 'tensorboardX'} & set(sys.modules))"
    )
    run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"


def test_importing_brings_what_trains_and_no_more():
    """The zoo, what runs recipes, and Orbax are imported once they are used."""
    late = {"orbax", "jaxbrewer.zoo", "jaxbrewer.recipes"}
    block = f"import sys, jaxbrewer; print({late} & set(sys.modules))"
    run = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "set()"
    assert {"zoo", "run_recipe", "predict"} <= set(dir(jaxbrewer))
    with pytest.raises(AttributeError, match="no attribute 'zoe'"):
        jaxbrewer.zoe  # noqa: B018


def test_public_names_are_there():
    assert len(set(jaxbrewer.__all__)) == len(jaxbrewer.__all__)
    for name in jaxbrewer.__all__:
        assert hasattr(jaxbrewer, name)


def functions(module):
    """The functions of a module with their lengths in lines."""
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.FunctionDef):
            yield node.end_lineno - node.lineno + 1, f"{module}.{node.name}"


if __name__ == "__main__":
    inside = [module for module in MODULES if module != "__init__"]
    files = {m: PACKAGE.joinpath(*m.split(".")).with_suffix(".py") for m in MODULES}
    longest = max(MODULES, key=lambda m: files[m].read_text().count("\n"))
    function = max(f for m in MODULES for f in functions(m))
    print("rooms at the top:", len({room_of(m) for m in inside} - {"__main__"}))
    print("longest file:", longest, files[longest].read_text().count("\n"), "lines")
    print("longest function:", function[1], function[0], "lines")
    print("imports that run up:", sum(len(upwards(m)) for m in inside))
    print("circles:", sum(map(bool, circles())))
    engine = [m for m in MODULES if room_of(m) in ENGINE]
    print("climbs from the engine into distillers:", sum(len(climbs(m)) for m in engine))
