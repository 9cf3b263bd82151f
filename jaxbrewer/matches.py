"""The intermediate matches of TextBrewer's examples, by name.

A name is ``{student}_{feature}_{loss}``: ``L4t_hidden_mse`` draws the hidden states of a student of
four layers, 312 wide, towards those of a teacher of twelve, 768 wide. They add up::

    DistillationConfig(
        temperature=8,
        intermediate_matches=MATCHES['L4t_hidden_mse'] + MATCHES['L4_hidden_smmd'],
    )

======= =============================================== =====================================
student layers, and the teacher's they are matched with `jaxbrewer.zoo.student_config`
======= =============================================== =====================================
L3      3 of 12, every fourth                           T3
L3n     3, 384 wide                                     T3-small
L3l     3, 1024 wide
L4      4 of 12, every third                            T4-tiny, for losses blind to width
L4t     4, 312 wide                                     T4-tiny
L6      6 of 12, every second                           T6
small   12 of 12, 256 wide; every second is matched     T12-nano, Electra-small
es      small without the embeddings' output            T12-nano, Electra-small
======= =============================================== =====================================

Hidden states are matched from the embeddings' output (layer 0) to the last layer.
``hidden_mse`` is the mean squared error, through a linear projection where the widths differ.
``hidden_smmd`` (the loss ``mmd``) and ``hidden_sgram`` (``gram``) compare a layer with itself, so
each of their layers stands twice.

``attention_mse``, ``attention_mse_sum``, ``attention_ce`` and ``attention_ce_mean`` compare
attention scores, which models of `jaxbrewer.zoo` give for ``output_attention_scores=True``. Their
layers are **counted from 0** here: the last of three is 2. TextBrewer's examples count from 1,
because their models return ``[None] + layers``; the same layers are meant. Carry a match over from
there by taking 1 from both of its layers, or return ``[None, *attentions]`` from the adaptors.
"""

from collections.abc import Sequence
from typing import Any

TEACHER_LAYERS = 12
TEACHER_WIDTH = 768
Match = dict[str, Any]


def _layers(layers: int, step: int = 1, first: int = 0) -> list[tuple[int, int]]:
    """The student's hidden layers ``first``, ``first + step``…, each with the teacher's as deep."""
    ratio = TEACHER_LAYERS // layers
    return [(layer * ratio, layer) for layer in range(first, layers + 1, step)]


def _hidden(
    pairs: Sequence[tuple[int, int]], loss: str, *, twice: bool = False, width: int | None = None
) -> tuple[Match, ...]:
    """One match for each pair of layers, the teacher's first."""
    return tuple(
        {
            "layer_T": [teacher, teacher] if twice else teacher,
            "layer_S": [student, student] if twice else student,
            "feature": "hidden",
            "loss": loss,
            "weight": 1,
            **({} if width is None else {"proj": ["linear", width, TEACHER_WIDTH]}),
        }
        for teacher, student in pairs
    )


def _attention(pairs: Sequence[tuple[int, int]], loss: str) -> tuple[Match, ...]:
    """One match for each pair of layers that are counted from 1."""
    return tuple(
        {
            "layer_T": teacher - 1,
            "layer_S": student - 1,
            "feature": "attention",
            "loss": loss,
            "weight": 1,
        }
        for teacher, student in pairs
    )


def _all() -> dict[str, tuple[Match, ...]]:
    paths = {
        "L3": _layers(3),
        "L4": _layers(4),
        "L6": _layers(6),
        "small": _layers(12, step=2),
        "es": _layers(12, step=2, first=2),
    }
    projected = {
        "L3n": ("L3", 384),
        "L3l": ("L3", 1024),
        "L4t": ("L4", 312),
        "small": ("small", 256),
        "es": ("es", 256),
    }
    found = {}
    for student in ("L3", "L4"):
        for loss in ("attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean"):
            found[f"{student}_{loss}"] = _attention(paths[student][1:], loss)
    for student, path in paths.items():
        found[f"{student}_hidden_smmd"] = _hidden(path, "mmd", twice=True)
    for student in ("L3", "L6"):
        found[f"{student}_hidden_mse"] = _hidden(paths[student], "hidden_mse")
    for student, (like, width) in projected.items():
        found[f"{student}_hidden_mse"] = _hidden(paths[like], "hidden_mse", width=width)
    found["L4t_hidden_sgram"] = _hidden(paths["L4"], "gram", twice=True, width=312)
    return found


MATCHES: dict[str, tuple[Match, ...]] = _all()
"""Name → matches, as dicts of the fields of `jaxbrewer.IntermediateMatch`."""
