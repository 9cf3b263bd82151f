"""What every config does: from text and back, checked whole, frozen."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, ClassVar, Self, cast

from jaxbrewer.configurations import checks
from jaxbrewer.errors import ConfigError
from jaxbrewer.files import UnreadableFileError, read_json, write_json


class Config:
    """What the configs share: checking, dicts, JSON, and a readable ``str()``."""

    _checks: ClassVar[Mapping[str, checks.Check]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Refuses unknown keywords with the nearest known one, which Python does not offer."""
        unknown = checks.keys(kwargs, _field_names(cls))
        if unknown:
            raise TypeError(f"{cls.__name__}: " + "; ".join(unknown))
        return super().__new__(cls)

    def __post_init__(self) -> None:
        values = {name: getattr(self, name) for name in _field_names(type(self))}
        kept, problems = self._checked(values)
        if problems:
            raise ConfigError(type(self).__name__, problems)
        for name, value in kept.items():
            object.__setattr__(self, name, value)

    @classmethod
    def _checked(cls, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """Returns the values to keep, and what is wrong with the others."""
        kept, problems = checks.values(values, cls._checks)
        return kept, problems + cls._check_together(kept)

    @classmethod
    def _check_together(cls, kept: Mapping[str, Any]) -> list[str]:
        """Returns what is wrong with values that are right each alone."""
        return []

    @classmethod
    def from_dict(cls, dict_object: Mapping[str, Any]) -> Self:
        """Returns the config that a dict describes.

        Args:
            dict_object: field names and values; what is left out takes its default. It is copied.

        Raises:
            ConfigError: names every unknown or missing key and every wrong value.
        """
        if not isinstance(dict_object, Mapping):
            raise ConfigError(cls.__name__, [f"expected a dict, got {checks.short(dict_object)}"])
        names = _field_names(cls)
        known = {key: value for key, value in dict_object.items() if key in names}
        kept, problems = cls._checked(known)
        problems += checks.keys(dict_object, names, _required(cls))
        if problems:
            raise ConfigError(cls.__name__, problems)
        return cls(**kept)

    @classmethod
    def from_json_file(cls, json_filename: str | os.PathLike[str]) -> Self:
        """Returns the config that a JSON file describes.

        Raises:
            ConfigError: the file cannot be read, is no JSON (with line and column) or no object in
                it, repeats a key, or describes no valid config.
        """
        source = f"{cls.__name__} in {os.fspath(json_filename)}"
        try:
            return cls.from_dict(read_json(json_filename))
        except UnreadableFileError as error:
            raise ConfigError(source, [error.problem]) from error
        except ConfigError as error:
            raise ConfigError(source, error.problems) from None

    def to_dict(self) -> dict[str, Any]:
        """Returns a dict of lists, text and numbers; :meth:`from_dict` makes an equal of it.

        Fields TextBrewer does not have are left out where they hold their default, so that it can
        read the dict too.
        """
        return {
            field.name: _thawed(value)
            for field in dataclasses.fields(cast(Any, self))
            if (value := getattr(self, field.name)) != field.default or not field.kw_only
        }

    def to_json_file(self, json_filename: str | os.PathLike[str]) -> None:
        """Writes the config as JSON: the whole file or, if that fails, nothing.

        Raises:
            OSError: the file cannot be written.
        """
        write_json(json_filename, self.to_dict())

    def __str__(self) -> str:
        lines = [type(self).__name__]
        for name in _field_names(type(self)):
            value = getattr(self, name)
            if isinstance(value, tuple) and value and isinstance(value[0], Config):
                lines += [f"  {name}:", *(f"    {match}" for match in value)]
            else:
                lines.append(f"  {name}: {_thawed(value)}")
        return "\n".join(lines)


def _field_names(cls: Any) -> list[str]:
    return [field.name for field in dataclasses.fields(cls)]


def _required(cls: Any) -> list[str]:
    missing = dataclasses.MISSING
    fields = dataclasses.fields(cls)
    return [f.name for f in fields if f.default is missing and f.default_factory is missing]


def _thawed(value: Any) -> Any:
    if isinstance(value, Config):
        return value.to_dict()
    if isinstance(value, Mapping):
        return {key: _thawed(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_thawed(item) for item in value]
    return value
