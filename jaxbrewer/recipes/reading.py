"""A recipe from a file or a dict, with what is to be set on top, and what is wrong with it."""

import json
import os
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..configurations import checks
from ..data.tables import column, form_of, read_rows
from ..errors import ConfigError
from ..files import UnreadableFileError, read_json_object, read_text
from .folders import folder_problem, tokenizer_problem
from .schema import COLUMNS, Recipe, from_table

Setting = tuple[str, Any]
"""``("distillation.temperature", 4)``: a field, and the value that is set there."""

_CONFIGS = ("training", "distillation")
# The paths in a recipe, beside the folders in `_folder`.
_PATHS = (
    ("data", "train"),
    ("data", "eval"),
    ("data", "tokenizer"),
    ("training", "output_dir"),
    ("training", "log_dir"),
    ("distillation", "cache_dir"),
)
_MOST_LOOKED_AT = 20  # rows of each file, before anything is loaded


def read_recipe(
    source: str | os.PathLike[str] | Mapping[str, Any], settings: Iterable[Setting] = ()
) -> Recipe:
    """Reads a recipe, checked whole: its fields, its folders, and the first rows of its files.

    Args:
        source: a TOML or JSON file, to whose folder paths are relative; or a dict of the same.
        settings: what is set on top, by field: ``("training.resume", True)``.

    Raises:
        UnreadableFileError: a file that cannot be read, with its line.
        ConfigError: all that is wrong.
    """
    if isinstance(source, Mapping):
        name, base, values = "the recipe", Path(), checks_plain(source)
    else:
        name, base, values = os.fspath(source), Path(source).parent, read_table(source)
    for section in _CONFIGS:
        if isinstance(values.get(section), str):
            values[section] = read_json_object(base / values[section])
    for field, value in settings:
        _set(values, field, value, name)
    try:
        recipe = from_table(Recipe, _located(values, base))
    except ConfigError as error:
        raise ConfigError(name, error.problems) from None
    if problems := [*_folder_problems(recipe), *_data_problems(recipe)]:
        raise ConfigError(name, problems)
    return recipe


def checks_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """A copy whose tables can be changed."""
    return {k: checks_plain(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def read_table(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads a TOML file, or a JSON file by its suffix.

    Raises:
        UnreadableFileError: it cannot be read; names the line.
    """
    if Path(path).suffix.lower() == ".json":
        return read_json_object(path)
    text = read_text(path)
    try:
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, RecursionError) as error:
        raise UnreadableFileError(path, f"is not TOML: {error}") from error


def setting(field: str, text: str) -> Setting:
    """A setting in words: its value is read as JSON where it is some, else as text."""
    try:
        return field, json.loads(text)
    except (ValueError, RecursionError):
        return field, text


def _set(values: dict[str, Any], field: str, value: Any, name: str) -> None:
    *sections, last = field.split(".")
    table = values
    for section in sections:
        inner = table.setdefault(section, {})
        if isinstance(inner, str) and section in ("optimizer", "scheduler"):
            inner = table[section] = {"name": inner}
        if isinstance(inner, str) and section == "student":
            inner = table[section] = {"folder": inner}
        if not isinstance(inner, dict):
            raise ConfigError(
                name, [f"--{field}: {section} is {checks.short(inner)}, not a table to set it in"]
            )
        table = inner
    table[last] = value


# ------------------------------------------------------------------------------------------ paths


def _located(values: dict[str, Any], base: Path) -> dict[str, Any]:
    """With every path as it is from here."""
    found = checks_plain(values)
    for section, field in _PATHS:
        table = found.get(section)
        if isinstance(table, dict) and field in table:
            table[field] = _from(base, table[field])
    training = found.get("training")
    if isinstance(training, dict) and os.sep in str(training.get("resume", "")):
        training["resume"] = _from(base, training["resume"])
    if "teacher" in found:
        found["teacher"] = _folder(base, found["teacher"])
    student = found.get("student")
    if isinstance(student, dict) and "folder" in student:
        student["folder"] = _folder(base, student["folder"])
    elif student is not None:
        found["student"] = _folder(base, student)
    return found


def _from(base: Path, path: Any) -> Any:
    """A path, or several, from the folder that they are relative to."""
    if isinstance(path, list | tuple):
        return [_from(base, each) for each in path]
    return os.path.normpath(base / path) if isinstance(path, str) and path else path


def _folder(base: Path, folder: Any) -> Any:
    """Likewise of folders of models; what is not there stays as it is: it may be a name of the Hub."""
    if isinstance(folder, list | tuple):
        return [_folder(base, each) for each in folder]
    there = _from(base, folder)
    return there if isinstance(there, str) and os.path.isdir(there) else folder


# ------------------------------------------------------------------------------ what lies on disk


def _folder_problems(recipe: Recipe) -> list[str]:
    named = [("teacher", folder) for folder in recipe.teacher or ()]
    if recipe.student.folder is not None:
        named.append(("student", recipe.student.folder))
    problems = [f"{name}: {problem}" for name, f in named if (problem := folder_problem(f))]
    if problems:
        return problems
    if recipe.data.tokenizer is not None:  # stands in where a folder has none
        named = [("data.tokenizer", recipe.data.tokenizer)]
    elsewhere = "" if recipe.data.tokenizer else "; or name another folder as data.tokenizer"
    return [
        f"{name}: {problem}{elsewhere}" for name, f in named if (problem := tokenizer_problem(f))
    ]


def _data_problems(recipe: Recipe) -> list[str]:
    texts, label = columns_of(recipe)
    problems = []
    for field in ("train", "eval"):
        needed = [*texts, label] if needs_labels(recipe, field) else texts
        for path in getattr(recipe.data, field) or ():
            try:
                form_of(path, recipe.data.form)
                rows = read_rows(path, recipe.data.form, _MOST_LOOKED_AT)
                for name in needed:
                    column(rows, name, path)
            except ValueError as error:
                problems.append(f"data.{field}: {error}")
    return problems


def columns_of(recipe: Recipe) -> tuple[Sequence[str], str]:
    """The columns of the text, and that of the label."""
    texts, label = COLUMNS[recipe.task]
    return recipe.data.text or texts or (), recipe.data.label or label


def needs_labels(recipe: Recipe, field: str) -> bool:
    """Whether rows of ``train`` or ``eval`` must have labels."""
    how = recipe.distillation
    if field == "eval":
        return True
    return recipe.teacher is None or (
        how is not None and (how.hard_label_weight != 0 or how.probability_shift)
    )
