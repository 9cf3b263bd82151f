"""The errors that say what was given, what was expected, and how to mend it."""

import contextlib
import difflib
import inspect
import re
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax


class ConfigError(ValueError):
    """Everything that is wrong with one config, in one report.

    Attributes:
        source: what was read, such as ``TrainingConfig`` or ``TrainingConfig in train.json``.
        problems: one sentence for each thing to mend.
    """

    def __init__(self, source: str, problems: Sequence[str]):
        super().__init__(source, tuple(problems))
        self.source = source
        self.problems = tuple(problems)

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return f"{self.source}: {self.problems[0]}"
        lines = [f"{self.source} has {len(self.problems)} problems:"]
        return "\n  - ".join([*lines, *self.problems])


class UnknownNameError(KeyError):
    """A name that is in none of the tables it was looked up in."""

    def __str__(self) -> str:
        # KeyError would print the repr, quotes and escapes included.
        return str(self.args[0]) if self.args else ""


class BatchError(ValueError):
    """A batch the models cannot take."""


class AdaptorError(ValueError):
    """An adaptor that returned something unusable."""


class PreflightError(ValueError):
    """Everything that would go wrong in training, found before anything was compiled.

    Attributes:
        problems: one message for each.
    """

    def __init__(self, problems: Sequence[str]):
        super().__init__(tuple(problems))
        self.problems = tuple(problems)

    def __str__(self) -> str:
        count = len(self.problems)
        head = f"{count} problem{'s' if count > 1 else ''} found before training:"
        return "\n  - ".join([head, *self.problems])


class CacheError(ValueError):
    """A cache of teacher results that cannot be used as it is."""


class CheckpointError(ValueError):
    """A checkpoint that is missing, does not fit, or cannot be written."""


class DamagedCheckpointError(CheckpointError):
    """A checkpoint that is not what was saved.

    Attributes:
        problem: what is wrong with it, without its path and without advice.
    """

    def __init__(self, message: str, problem: str):
        super().__init__(message)
        self.problem = problem


class PrecisionError(ValueError):
    """A model, or a device, that a level of half precision does not go with."""


class PreflightWarning(UserWarning):
    """Something that trains, but is rarely what was meant."""


class PortingWarning(UserWarning):
    """Something that TextBrewer does not have."""


def suggest(name: object, choices: Iterable[object]) -> str:
    """Returns the end of an error message about a name that is none of the choices.

    That is ``did you mean 'ckpt_steps'?`` if one choice is close to ``name`` (letter case aside),
    otherwise a list of all choices.
    """
    known = [str(choice) for choice in choices]
    if not known:
        return "there is nothing to choose from"
    by_folded = {choice.casefold(): choice for choice in known}
    near = difflib.get_close_matches(str(name).casefold(), by_folded, n=1)
    if near:
        return f"did you mean {by_folded[near[0]]!r}?"
    return "choose from " + ", ".join(repr(choice) for choice in known)


@dataclass
class Findings:
    """What preflight found.

    Attributes:
        problems: what stops the run, each with its fix.
        warnings: what trains, but is rarely meant.
    """

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def extend(self, others: "Findings", prefix: str = "") -> None:
        """Takes over what was found elsewhere."""
        self.problems.extend(prefix + problem for problem in others.problems)
        self.warnings.extend(prefix + warning for warning in others.warnings)


def warn(message: str, category: type[Warning]) -> None:
    """Warns at the line outside of this package that led here."""
    level, frame = 2, inspect.currentframe()
    here = Path(__file__).parent
    while frame and (frame := frame.f_back) and here in Path(frame.f_code.co_filename).parents:
        level += 1
    warnings.warn(message, category, stacklevel=level)


@contextlib.contextmanager
def afterwards(doing: str, step: Callable[[], object]) -> Iterator[None]:
    """Runs a step after the block, also where the block failed.

    An error of the block stays the one that is raised, and one of the step as well is told in a
    note on it; an error of the step alone is raised as it is.

    Args:
        doing: the step in words, for the note.
        step: called once.
    """
    try:
        yield
    except BaseException as error:
        despite(error, doing, step)
        raise
    step()


def despite(error: BaseException, doing: str, step: Callable[[], object]) -> None:
    """Runs a step although there is an error already; one of the step becomes a note on it."""
    try:
        step()
    except Exception as other:  # noqa: BLE001  whatever it is, it is told with the first
        what = f"{type(other).__name__}: {other}"
        # What cannot be written cannot be flushed and closed either: that is told once.
        notes = getattr(error, "__notes__", ())
        if repr(other) != repr(error) and not any(note.endswith(what) for note in notes):
            error.add_note(f"{doing} failed too: {what}")


def told(error: BaseException) -> str:
    """An error in a line that is not too long."""
    text = " ".join(str(error).split())
    shown = text if len(text) <= 300 else f"{text[:300]} …"
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


# A slip in a function that JAX traces: the error's class, what its message or the module it comes
# from matches, and the way out. The first that fits counts.
_Slip = tuple[type[Exception] | tuple[type[Exception], ...], str, str]
_SLIPS: tuple[_Slip, ...] = (
    (
        jax.errors.NonConcreteBooleanIndexError,
        "",
        "it selects by a boolean index, so that a shape would depend on values. Leave the array "
        "whole and return the mask beside it, as 'logits_mask' or 'inputs_mask'; or use "
        "jnp.where(mask, x, 0)",
    ),
    (
        jax.errors.TracerBoolConversionError,
        "",
        "it branches on an array's values (if, and, while). Use jnp.where(condition, a, b)",
    ),
    (
        (jax.errors.ConcretizationTypeError, jax.errors.TracerIntegerConversionError, IndexError),
        r"[Tt]race|must be static",
        "it asks for an array's values (int(), float(), .item(), jnp.nonzero, a length made of "
        "them), which are not known when the step is compiled. Keep them in arrays, as sums and masks",
    ),
    (
        jax.errors.TracerArrayConversionError,
        "",
        "it makes a numpy or torch array of a JAX array. Compute with jax.numpy: jnp.asarray for "
        "np.asarray, jnp.exp for np.exp, and so on",
    ),
    (
        Exception,
        r"^torch\b|must be Tensor, not|__dlpack",
        "it calls a function of torch on a JAX array. Compute with jax.numpy, jax.nn or optax: "
        "jnp.mean((S - T) ** 2) for torch.nn.functional.mse_loss(S, T)",
    ),
    (
        AttributeError,
        r"Tracer.* has no attribute '?(detach|cpu|cuda|numpy|to|float|half|long|size|dim|unsqueeze"
        r"|permute|contiguous|masked_fill|masked_select|expand|softmax|log_softmax|requires_grad)\b",
        "it calls a method that torch has and JAX arrays lack. Leave out .detach(), .cpu() and "
        ".numpy(); others are in jax.numpy: x[:, None] for x.unsqueeze(1), x.astype('float32') for "
        "x.float(), jnp.where(mask, value, x) for x.masked_fill(mask, value)",
    ),
    (
        TypeError,
        r"'int' object is not callable|unexpected keyword argument '(dim|keepdim)'",
        "is it written for torch? Here x.shape[0] stands for x.size(0), axis= for dim=, and "
        "keepdims= for keepdim=",
    ),
)


def explained(error: BaseException) -> str:
    """An error of a user's function that JAX traces.

    Returns:
        Its class; the way out if it is a usual slip, otherwise its message; and the line of the
        user's code that it comes from.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    module = frames[-1].f_globals.get("__name__", "") if frames else ""
    ways = [
        way
        for kind, pattern, way in _SLIPS
        if isinstance(error, kind) and any(re.search(pattern, x) for x in (str(error), module))
    ]
    return f"{type(error).__name__}: {ways[0] if ways else error}{_place(error)}"


def _place(error: BaseException) -> str:
    """The last line of the user's own code that an error came through."""
    package = Path(__file__).parent
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        path = Path(frame.filename)
        if package not in path.parents and "site-packages" not in path.parts and path.exists():
            return f" ({path.name}, line {frame.lineno})"
    return ""
