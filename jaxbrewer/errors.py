"""The exceptions users may want to catch, and how a fix is suggested."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A config that cannot be meant as it stands."""


class BatchError(ValueError):
    """A batch the models cannot take."""


class AdaptorError(ValueError):
    """An adaptor that returned something unusable."""


class PreflightError(ValueError):
    """Everything that would go wrong in training, found before anything was compiled.

    Attributes:
        problems: one message each.
    """

    def __init__(self, problems: Iterable[str]):
        self.problems = tuple(problems)
        count = len(self.problems)
        head = "1 problem" if count == 1 else f"{count} problems"
        super().__init__(
            f"{head} found before training:\n" + "\n".join(f"  - {p}" for p in self.problems)
        )


class CheckpointError(ValueError):
    """A checkpoint that is missing, does not fit, or cannot be written."""


class PreflightWarning(UserWarning):
    """Something that trains, but is rarely what was meant."""


def suggest(name: object, choices: Iterable[object]) -> str:
    """Says what `name` was probably meant to be, or else lists the choices."""
    known = [str(choice) for choice in choices]
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.6)
    return f"did you mean {near[0]!r}?" if near else f"choose from {', '.join(known)}"
