"""What messages advise is there: every name, keyword, flag and field that one tells the user to use."""

import argparse
import ast
import dataclasses
import functools
import importlib
import inspect
import re
from pathlib import Path

import pytest

import jaxbrewer
from jaxbrewer import __main__ as command_line
from jaxbrewer.recipes import Recipe

PACKAGE = Path(jaxbrewer.__file__).parent

# What stands for a module in a message.
MODULES = {"jnp": "jax.numpy", "np": "numpy"}
OURS = ("jaxbrewer", "jax", "jnp", "np", "numpy", "optax", "flax", "functools")
THEIRS = ("torch", "transformers")
# Flags of other programs.
FOREIGN_FLAGS = {"--index-url", "--local-dir"}
# Names with a dot that are files and hosts.
NO_NAMES = re.compile(r"\.(py|json|org|io|com|toml|whl)\b")


def docstrings(tree):
    """The docstrings of a module, as nodes."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            yield node.body[0].value


def messages():
    """``file:line`` → text of every string in the package but docstrings; {} for what is filled in."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        tree = ast.parse(path.read_text())
        left_out = {id(node) for node in docstrings(tree)}
        inside = set()
        for node in ast.walk(tree):
            where = f"{path.relative_to(PACKAGE)}:{getattr(node, 'lineno', 0)}"
            if isinstance(node, ast.JoinedStr):
                parts = [x.value if isinstance(x, ast.Constant) else "{}" for x in node.values]
                inside |= {id(x) for x in ast.walk(node)} - {id(node)}
                found[where] = "".join(map(str, parts))
            elif isinstance(node, ast.Constant) and id(node) not in left_out | inside:
                found[where] = str(node.value)
    return found


MESSAGES = messages()


def names_in(text, roots):
    """The dotted names in a text that begin with one of the roots."""
    pattern = rf"(?<![\w./'-])({'|'.join(roots)})((?:\.[A-Za-z_]\w*)+)"
    for match in re.finditer(pattern, text):
        if not NO_NAMES.search(match[0]):
            yield match[0]


def resolve(name):
    """The object of a dotted name, submodules imported; raises AttributeError for none."""
    first, *rest = name.split(".")
    value = importlib.import_module(MODULES.get(first, first))
    for part in rest:
        try:
            value = getattr(value, part)
        except AttributeError:
            value = importlib.import_module(f"{value.__name__}.{part}")
    return value


def missing(roots):
    """Names in messages that lead nowhere."""
    wrong = []
    for where, text in MESSAGES.items():
        for name in names_in(text, roots):
            try:
                resolve(name)
            except (AttributeError, ImportError):
                wrong.append(f"{where}: {name}")
    return wrong


def test_there_is_advice_to_look_at():
    names = [name for text in MESSAGES.values() for name in names_in(text, OURS)]
    assert len(MESSAGES) > 500
    assert {"optax.adamw", "functools.partial", "jaxbrewer.schedulers"} <= set(names)


def test_names_in_messages_exist():
    assert missing(OURS) == []


@pytest.mark.torch
def test_names_of_torch_in_messages_exist():
    assert missing(THEIRS) == []


def test_names_that_do_not_exist_would_be_found():
    for name in ("optax.adamww", "jaxbrewer.schedulers.StepLR"):
        with pytest.raises((AttributeError, ImportError)):
            resolve(name)


def flags():
    """Every option of the command line."""
    parser = command_line.parser()
    subparsers = [a for a in parser._actions if isinstance(a, argparse._SubParsersAction)]
    parsers = [parser, *(p for each in subparsers for p in each.choices.values())]
    return {option for p in parsers for action in p._actions for option in action.option_strings}


def test_flags_in_messages_exist():
    known = flags() | FOREIGN_FLAGS | {f"--{field}" for field in Recipe.__dataclass_fields__}
    for where, text in MESSAGES.items():
        for flag in re.findall(r"(?<![\w-])(?<!var\()--[a-z][a-z_-]+\b(?!:)", text):
            assert flag in known, f"{where}: {flag}"


def test_commands_in_messages_exist():
    parser = command_line.parser()
    (subparsers,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    for where, text in MESSAGES.items():
        for name in re.findall(r"\bjaxbrewer ((?:port|check|inspect|train|init)[a-z-]*)", text):
            assert name in subparsers.choices, f"{where}: jaxbrewer {name}"


@functools.cache
def fields():
    """The fields of the configs, ours and the zoo's."""
    configs = [
        jaxbrewer.TrainingConfig,
        jaxbrewer.DistillationConfig,
        jaxbrewer.IntermediateMatch,
        *{cls.config_class for tasks in jaxbrewer.zoo.MODELS.values() for cls in tasks.values()},
    ]
    return {field.name for cls in configs for field in dataclasses.fields(cls)}


def test_arguments_of_train_in_messages_exist():
    takers = [jaxbrewer.GeneralDistiller.train, jaxbrewer.MultiTaskDistiller.train]
    known = {name for taker in takers for name in inspect.signature(taker).parameters}
    for where, text in MESSAGES.items():
        for name in re.findall(r"\btrain\(…, ([a-z_]+)=", text):
            assert name in known, f"{where}: train(…, {name}=…)"


def test_fields_that_are_to_be_set_exist():
    """Advice of the form "set NAME=": a field of a config."""
    functions = (
        jaxbrewer.data.bucket_by_length,
        jaxbrewer.FunctionModel,
        jaxbrewer.zoo.PretrainedModel.from_pretrained,
    )
    arguments = {name for each in functions for name in inspect.signature(each).parameters}
    for where, text in MESSAGES.items():
        for name in re.findall(r"\b(?:[Ss]et|[Ll]ower|[Uu]se|with) ([a-z]+(?:_[a-z]+)+)=", text):
            assert name in fields() | arguments, f"{where}: {name}"
