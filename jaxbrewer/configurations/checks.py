"""Checks of what a config is made from: of its keys, of its values, and of single values.

A check of a single value takes the value that was given and returns the value to keep: plain text
and numbers, frozen and apart from the caller's. A wrong value is a ValueError that says what was
expected.
"""

import math
import operator
import os
import re
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import jax
import numpy as np

from jaxbrewer import presets
from jaxbrewer.errors import ConfigError, suggest
from jaxbrewer.schedulers import TEMPERATURE_BUILDERS

_MAX_INT = 2**31 - 1
_MAX_DEPTH = 16

Check = Callable[[Any], Any]
_MOST_SHOWN = 20  # unknown keys

_OF_OPTIMIZER = "it belongs to the optimizer: functools.partial(optax.adamw, {}=…)"
_OF_TRAIN = "it is an argument of train: distiller.train(…, {}=…)"
_ELSEWHERE = {
    "learning_rate": _OF_OPTIMIZER.format("learning_rate"),
    "lr": _OF_OPTIMIZER.format("learning_rate"),
    "weight_decay": _OF_OPTIMIZER.format("weight_decay"),
    "num_epochs": _OF_TRAIN.format("num_epochs"),
    "num_train_epochs": _OF_TRAIN.format("num_epochs"),
    "epochs": _OF_TRAIN.format("num_epochs"),
    "num_steps": _OF_TRAIN.format("num_steps"),
    "max_steps": _OF_TRAIN.format("num_steps"),
    "max_grad_norm": _OF_TRAIN.format("max_grad_norm"),
    "batch_size": "the loader decides it: batches are taken as they come",
    "per_device_train_batch_size": "the loader decides it: batches are taken as they come",
    "warmup_steps": _OF_TRAIN.format("scheduler_class"),
}


def keys(given: Iterable[Any], known: Collection[str], required: Collection[str] = ()) -> list[str]:
    """Returns what is wrong with the keys that were given, one sentence each.

    Unknown ones come with the nearest known name, or with where they belong if that is elsewhere;
    those that are near none share one sentence, which lists the known names. Of very many, the
    first are named and the others counted. Missing ones follow.
    """
    given = list(given)
    unknown = [key for key in given if key not in known]
    by_hint: dict[str, list[str]] = {}
    for key in unknown[:_MOST_SHOWN]:
        hint = _ELSEWHERE.get(key) if isinstance(key, str) else None
        by_hint.setdefault(hint or suggest(key, known), []).append(short(key))
    problems = [
        f"unknown key{'s' if len(alike) > 1 else ''} {', '.join(alike)}; {hint}"
        for hint, alike in by_hint.items()
    ]
    if len(unknown) > _MOST_SHOWN:
        problems.append(f"{len(unknown) - _MOST_SHOWN:,} more unknown keys")
    return problems + [f"missing key {name!r}" for name in required if name not in given]


def values(
    given: Mapping[str, Any], checks: Mapping[str, Check]
) -> tuple[dict[str, Any], list[str]]:
    """Returns the values to keep, and what is wrong with the others, one sentence each.

    Args:
        given: values by name.
        checks: by the same names; a value without a check is kept as it is.
    """
    kept: dict[str, Any] = {}
    problems: list[str] = []
    for name, value in given.items():
        try:
            kept[name] = checks[name](value) if name in checks else value
        except ConfigError as error:
            problems += error.problems
        except ValueError as error:
            problems.append(f"{name} is {short(value)}: {error}")
    return kept, problems


class Options(dict):
    """A dict inside a config: it can be read, hashed and copied, not changed."""

    def _refuse(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a config is frozen; make another with dataclasses.replace")

    __setitem__ = __delitem__ = __ior__ = _refuse
    clear = pop = popitem = setdefault = update = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> Any:
        return Options, (dict(self),)


def integer(low: int, high: int = _MAX_INT) -> Check:
    """Returns a check for integers, NumPy's too, from ``low`` to ``high``; bools are none."""

    def check(value: Any) -> int:
        expected = f"expected an integer from {low} to {high}"
        try:
            found = operator.index(value)
        except TypeError:
            raise ValueError(expected) from None
        if isinstance(value, bool | np.bool_) or not low <= found <= high:
            raise ValueError(expected)
        return found

    return check


def number(value: Any) -> int | float:
    """Accepts a finite number, NumPy's too; a bool is none."""
    if isinstance(value, np.integer | np.floating):
        value = value.item()
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("expected a number")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond every float
        finite = False
    if not finite:
        raise ValueError("expected a finite number")
    return value


def positive(value: Any) -> int | float:
    """Accepts a finite number above 0."""
    value = number(value)
    if value <= 0:
        raise ValueError("expected a number above 0")
    return value


def not_negative(value: Any) -> int | float:
    """Accepts a finite number of 0 or more."""
    value = number(value)
    if value < 0:
        raise ValueError("expected a number of 0 or more")
    return value


def proportions(value: Any) -> tuple[int | float, ...]:
    """Accepts a list of finite numbers of 0 or more, one of which at least is above 0; keeps a tuple."""
    expected = "expected a list of numbers of 0 or more, one at least above 0"
    try:
        kept = tuple(not_negative(item) for item in value)
    except (TypeError, ValueError):
        raise ValueError(expected) from None
    if not any(kept):
        raise ValueError(expected)
    return kept


def rate(value: Any) -> int | float:
    """Accepts a rate of dropout: a number of 0 or more and below 1."""
    value = number(value)
    if not 0 <= value < 1:
        raise ValueError("expected a rate of 0 or more and below 1")
    return value


def boolean(value: Any) -> bool:
    """Accepts True and False, NumPy's too, and not 0 and 1."""
    if not isinstance(value, bool | np.bool_):
        raise ValueError("expected True or False")
    return bool(value)


def text(value: Any) -> str:
    """Accepts text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError("expected a name")
    return value


def folder(value: Any) -> str:
    """Accepts a path, as text or ``os.PathLike``; keeps it as text."""
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str) or not value or "\0" in value:
        raise ValueError("expected the name of a folder")
    return value


def checkpoint(value: Any) -> bool | str:
    """Accepts True and False, the name of a checkpoint, or a path to one; keeps that as text."""
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
        if isinstance(value, str) and not os.path.dirname(value):
            value = os.path.join(os.curdir, value)
    is_name = isinstance(value, str) and re.fullmatch(r"gs\d+", value)
    is_path = isinstance(value, str) and os.path.dirname(value) and "\0" not in value
    if not is_name and not is_path:
        raise ValueError(
            "expected True or False, the name of a checkpoint in output_dir ('gs1200'), or a path to "
            "one, with a / in it"
        )
    return value


def optional(check: Check) -> Check:
    """Returns a check that accepts None besides what ``check`` accepts."""

    def check_if_given(value: Any) -> Any:
        if value is None:
            return None
        try:
            return check(value)
        except ConfigError:  # what is wrong within it
            raise
        except ValueError as error:
            raise ValueError(f"{error}, or None") from None

    return check_if_given


def one_of(choices: Collection[str]) -> Check:
    """Returns a check for the choices, as they are when a value is checked."""

    def check(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError(suggest(value, choices))
        return value

    return check


def names(choices: Callable[[], Collection[str]]) -> Check:
    """Returns a check for names of some choices, in any collection or one alone; keeps a tuple."""

    def check(value: Any) -> tuple[str, ...]:
        given = (value,) if isinstance(value, str) else value
        if not isinstance(given, list | tuple | set | frozenset):
            raise ValueError("expected a list of names")
        for name in given:
            if not isinstance(name, str) or name not in choices():
                raise ValueError(f"{short(name)} is none of the names; {suggest(name, choices())}")
        return tuple(sorted(set(given)))

    return check


def frozen(value: Any, depth: int = 0) -> Any:
    """Accepts what JSON can carry: text, finite numbers, None, and lists and dicts of them."""
    if depth > _MAX_DEPTH:
        raise ValueError(f"expected at most {_MAX_DEPTH} lists and dicts inside each other")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bool | np.bool_):
        return bool(value)
    if isinstance(value, Mapping):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("expected text as the keys of options")
        return Options({key: frozen(item, depth + 1) for key, item in value.items()})
    if isinstance(value, list | tuple):
        return tuple(frozen(item, depth + 1) for item in value)
    try:
        return number(value)
    except ValueError:
        raise ValueError(
            f"expected finite numbers, text, lists and dicts, not {short(value)}"
        ) from None


def named(value: Any) -> str | tuple:
    """Accepts a name, and a list of a name and its options; keeps that as a tuple."""
    if isinstance(value, list | tuple):
        if not value or not isinstance(value[0], str) or not value[0]:
            raise ValueError("expected a name, or a list of a name and its options")
        value = frozen(value)
        return value if len(value) > 1 else value[0]
    if not isinstance(value, str) or not value:
        raise ValueError("expected a name, or a list of a name and its options")
    return value


def weight_scheduler(value: Any) -> str | tuple:
    """Accepts ``'none'`` or None, names in ``presets.WEIGHT_SCHEDULER``, and lists of one and its options.

    With options it is called once, to see whether it takes them.
    """
    if value is None or (isinstance(value, str) and value == "none"):
        return "none"
    value = named(value)
    name = value if isinstance(value, str) else value[0]
    if name not in presets.WEIGHT_SCHEDULER:
        raise ValueError(suggest(name, ["none", *presets.WEIGHT_SCHEDULER]))
    if not isinstance(value, str):
        try:
            presets.bound(presets.WEIGHT_SCHEDULER, value)(0.5)
        except TypeError as error:
            raise ValueError(f"{name!r} refuses its options: {error}") from error
    return value


def temperature_scheduler(value: Any) -> str | tuple:
    """Accepts ``'none'`` or None, names in ``presets.TEMPERATURE_SCHEDULER``, names with arguments.

    A function that takes arguments is built once, to see whether it takes these.
    """
    if value is None or (isinstance(value, str) and value == "none"):
        return "none"
    if not isinstance(value, str | list | tuple) or not value:
        raise ValueError("expected a name or a list of a name and its arguments")
    value = frozen(value)
    name = value if isinstance(value, str) else value[0]
    if not isinstance(name, str) or name not in presets.TEMPERATURE_SCHEDULER:
        raise ValueError(suggest(name, ["none", *presets.TEMPERATURE_SCHEDULER]))
    if isinstance(value, str):
        if presets.TEMPERATURE_SCHEDULER[name] in TEMPERATURE_BUILDERS:
            raise ValueError(f"{name!r} takes arguments: {_example(name)}")
        return value
    try:
        built = presets.TEMPERATURE_SCHEDULER[value]
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name!r} refuses its arguments ({error}); {_example(name)}") from error
    if not callable(built):
        raise ValueError(f"{name!r} built {built!r}, not a function of (S, T, base_temperature)")
    return value


def _example(name: str) -> str:
    examples = {"flsw": "['flsw', beta, gamma]", "cwsm": "['cwsm', beta]", "constant": "'constant'"}
    return f"write {examples.get(name, 'those its function takes')}"


def layers(value: Any) -> int | tuple[int, int]:
    """Accepts a layer's index, or a list of two."""
    expected = "expected a layer's index or a list of two"
    try:
        if isinstance(value, list | tuple):
            first, second = value
            return integer(-_MAX_INT)(first), integer(-_MAX_INT)(second)
        return integer(-_MAX_INT)(value)
    except ValueError:
        raise ValueError(expected) from None


def projection(value: Any) -> tuple | None:
    """Accepts ``[name, dim_S, dim_T]`` and the same with a dict of options; keeps all four."""
    if value is None or (isinstance(value, list | tuple) and not value):
        return None
    if not isinstance(value, list | tuple) or len(value) not in (3, 4):
        raise ValueError(
            "expected [name, width of the student, width of the teacher], and a dict of optimizer "
            "options if wanted"
        )
    name, dim_s, dim_t, *rest = value
    if not isinstance(name, str) or name not in presets.PROJ_MAP:
        raise ValueError(f"unknown projection {short(name)}; {suggest(name, presets.PROJ_MAP)}")
    options = rest[0] if rest else {}
    if not isinstance(options, Mapping):
        raise ValueError("expected a dict of optimizer options as the last item")
    try:
        widths = integer(1)(dim_s), integer(1)(dim_t)
    except ValueError:
        raise ValueError("expected integers above 0 as the two widths") from None
    return (name, *widths, frozen(options))


def short(value: Any) -> str:
    """Returns the repr of a value, cut where it is long."""
    shortener = reprlib.Repr()
    shortener.maxstring = shortener.maxother = 60
    return shortener.repr(value)


_NAME = re.compile(r"(cuda|gpu|tpu|cpu)(?::(\d{1,6}))?", re.ASCII)


_ACCEPTED = (
    "expected 'cuda', 'gpu', 'tpu' or 'cpu', with an index where one is meant ('gpu:1'), "
    "or a jax.Device"
)


def device_name(device: Any) -> str:
    """Returns a device as text: ``'cpu'``, ``'cuda:1'``.

    Args:
        device: such a text, anything whose ``str()`` is one (a ``torch.device``), or a
            ``jax.Device`` of this process.

    Raises:
        ValueError: it is none of these.
    """
    if isinstance(device, jax.Device):
        return name_of(device)
    text = str(device).strip().lower()
    if not _NAME.fullmatch(text):
        raise ValueError(_ACCEPTED)
    return text


def name_of(device: jax.Device) -> str:
    """A device of this process as text.

    Raises:
        ValueError: it is another process\'s.
    """
    local = jax.local_devices(backend=device.platform)
    if device not in local:
        raise ValueError(f"{device!r} belongs to another process; choose from {local}")
    return f"{device.platform}:{local.index(device)}"
