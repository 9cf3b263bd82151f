"""Name → function: one table for each kind of thing a config can name.

The tables are read when a config is checked and when a distiller is built, so what is put into them
before that counts, by assignment or with :func:`register_new`::

    MATCH_LOSS_MAP['my_loss'] = my_loss          # my_loss(S, T, mask=None)
    FEATURES.append('values')                    # then matches and adaptors know 'values'
"""

import functools
import inspect
from collections import UserDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any

from jaxbrewer.errors import UnknownNameError, suggest
from jaxbrewer.losses.attention import (
    att_ce_loss,
    att_ce_mean_loss,
    att_mse_loss,
    att_mse_sum_loss,
    relation_loss,
)
from jaxbrewer.losses.divergences import (
    kd_dist_loss,
    kd_dkd_loss,
    kd_jsd_loss,
    kd_kl_loss,
    kd_reverse_kl_loss,
    kd_skew_kl_loss,
    kd_skew_reverse_kl_loss,
    kd_tvd_loss,
)
from jaxbrewer.losses.hidden import (
    cos_loss,
    fsp_loss,
    hid_mse_loss,
    l2_loss,
    mmd_loss,
    pkd_loss,
)
from jaxbrewer.losses.logits import (
    kd_bce_loss,
    kd_ce_loss,
    kd_listwise_kl_loss,
    kd_margin_mse_loss,
    kd_mse_loss,
)
from jaxbrewer.losses.relations import (
    cka_loss,
    infonce_loss,
    rkd_angle_loss,
    rkd_distance_loss,
    similarity_loss,
)
from jaxbrewer.losses.stateful import Taid
from jaxbrewer.projections import linear_projection, projection_with_activation
from jaxbrewer.schedulers import (
    constant_temperature_scheduler,
    cosine_weight_scheduler,
    cwsm_temperature_scheduler_builder,
    flsw_temperature_scheduler_builder,
    linear_decay_weight_scheduler,
    linear_growth_weight_scheduler,
    linear_weight_scheduler,
    step_weight_scheduler,
)


class DynamicKeyDict(UserDict):
    """A table whose keys may carry arguments.

    ``table['constant']`` is the entry itself; ``table[['flsw', 1, 2]]`` calls the entry ``flsw``
    with 1 and 2, and ``table[['flsw', {'beta': 1, 'gamma': 2}]]`` with keywords.

    Raises:
        UnknownNameError: a KeyError that lists the names there are.
    """

    def __getitem__(self, key: Any) -> Any:
        if not isinstance(key, list | tuple):
            return self._entry(key)
        if not key:
            raise UnknownNameError("an empty list names nothing; " + suggest("", self.data))
        entry, arguments = self._entry(key[0]), key[1:]
        if len(arguments) == 1 and isinstance(arguments[0], Mapping):
            return entry(**arguments[0])
        return entry(*arguments)

    def __contains__(self, key: object) -> bool:
        if isinstance(key, list | tuple):
            return bool(key) and key[0] in self.data
        return key in self.data

    def _entry(self, name: Any) -> Any:
        try:
            return self.data[name]
        except (KeyError, TypeError):  # TypeError: not hashable, so no name
            raise UnknownNameError(f"unknown name {name!r}; {suggest(name, self.data)}") from None


FEATURES: list[str] = ["hidden", "attention", "embedding", "query", "key", "value"]
"""The features that a match can name, each a key of the adaptor's dict.

``embedding`` is one vector for each example, ``[batch, width]``, which no mask applies to.
``query``, ``key`` and ``value`` are what attention makes of each position, head by head,
``[batch, heads, length, width of a head]``.
"""

ADAPTOR_KEYS: list[str] = [
    "logits", "logits_mask", "losses", "inputs_mask", "labels", *FEATURES, "losses_mask", "sample_weight",
]  # fmt: skip
"""The keys of the dict an adaptor returns. What is appended to FEATURES counts besides."""

KD_LOSS_MAP: dict[str, Callable[..., Any]] = {
    "mse": kd_mse_loss,
    "ce": kd_ce_loss,
    "bce": kd_bce_loss,
    "margin_mse": kd_margin_mse_loss,
    "listwise_kl": kd_listwise_kl_loss,
    "kl": kd_kl_loss,
    "reverse_kl": kd_reverse_kl_loss,
    "jsd": kd_jsd_loss,
    "skew_kl": kd_skew_kl_loss,
    "skew_reverse_kl": kd_skew_reverse_kl_loss,
    "tvd": kd_tvd_loss,
    "dkd": kd_dkd_loss,
    "dist": kd_dist_loss,
    "taid": Taid,
}
"""Losses on logits, ``kd(logits_S, logits_T, temperature, mask=None, *, …)``.

``mask`` may be left out where the loss is the mean of its positions' losses. What follows ``*`` are the
loss's options, which a config may set: ``["jsd", 0.5]``, ``["skew_kl", {"alpha": 0.2}]``. A loss that
names ``labels`` gets those of the student's adaptor. One with a state is a class, see
`jaxbrewer.losses.stateful`.
"""

MATCH_LOSS_MAP: dict[str, Callable[..., Any]] = {
    "attention_mse_sum": att_mse_sum_loss,
    "attention_mse": att_mse_loss,
    "attention_ce_mean": att_ce_mean_loss,
    "attention_ce": att_ce_loss,
    "relation": relation_loss,
    "hidden_mse": hid_mse_loss,
    "cos": cos_loss,
    "l2": l2_loss,
    "pkd": pkd_loss,
    "gram": fsp_loss,
    "fsp": fsp_loss,
    "mmd": mmd_loss,
    "nst": mmd_loss,
    "rkd_distance": rkd_distance_loss,
    "rkd_angle": rkd_angle_loss,
    "similarity": similarity_loss,
    "cka": cka_loss,
    "infonce": infonce_loss,
}
"""Losses on features, ``loss(S, T, mask=None, *, …)``; S and T are lists of two for two-layer losses.

What follows ``*`` are the loss's options, which a config may set: ``["infonce", {"temperature": 0.05}]``.
"""

PROJ_MAP: dict[str, Callable[..., Any]] = {
    "linear": linear_projection,
    "relu": projection_with_activation("relu"),
    "tanh": projection_with_activation("tanh"),
}
"""Projections, ``(dim_in, dim_out, *, rngs) -> nnx.Module``."""

WEIGHT_SCHEDULER: dict[str, Callable[..., Any]] = {
    "linear_decay": linear_decay_weight_scheduler,
    "linear_growth": linear_growth_weight_scheduler,
    "step": step_weight_scheduler,
    "linear": linear_weight_scheduler,
    "cosine": cosine_weight_scheduler,
}
"""Schedules of a loss weight, or of the base temperature, ``scheduler(x, *, …)``, x the finished fraction
of the training. What follows ``*`` are its options: ``["linear", {"start": 1, "end": 0.1}]``."""

TEMPERATURE_SCHEDULER = DynamicKeyDict(
    {
        "constant": constant_temperature_scheduler,
        "flsw": flsw_temperature_scheduler_builder,
        "cwsm": cwsm_temperature_scheduler_builder,
    }
)
"""Schedules of the temperature, ``temperature(logits_S, logits_T, base_temperature)``.

``flsw`` and ``cwsm`` are built with arguments: ``['flsw', beta, gamma]``, ``['cwsm', beta]``.
"""

MAPS: dict[str, MutableMapping[str, Callable[..., Any]]] = {
    "kd_loss": KD_LOSS_MAP,
    "match_Loss": MATCH_LOSS_MAP,
    "projection": PROJ_MAP,
    "weight_scheduler": WEIGHT_SCHEDULER,
    "temperature_scheduler": TEMPERATURE_SCHEDULER,
}
"""All tables of functions, by the names :func:`register_new` and :func:`lookup` take."""


def register_new(map_name: str, name: str, func: Callable[..., Any]) -> None:
    """Puts a function into a table, in place of the one of that name if there is one.

    Args:
        map_name: ``'kd_loss'``, ``'match_Loss'``, ``'projection'``, ``'weight_scheduler'`` or
            ``'temperature_scheduler'``.
        name: what configs will call it; not ``'none'``, which stands for no schedule.
        func: has the signature that the table's description gives.

    Raises:
        UnknownNameError: a KeyError; there is no such table.
        TypeError: ``name`` is no text, or ``func`` cannot be called.
        ValueError: ``name`` is empty or ``'none'``.
    """
    table = _table(map_name)
    if not isinstance(name, str):
        raise TypeError(f"a name in {map_name!r} is text, got {name!r}")
    if name in ("", "none"):
        raise ValueError(f"{name!r} cannot be a name in {map_name!r}: it stands for no function")
    if not callable(func):
        raise TypeError(f"{name!r} in {map_name!r} must be a function, got {func!r}")
    table[name] = func


def lookup(map_name: str, name: str) -> Callable[..., Any]:
    """Returns the function a table has under a name.

    Raises:
        UnknownNameError: a KeyError that says what there is, for the table or the name.
    """
    table = _table(map_name)
    if name not in table:
        raise UnknownNameError(f"no {map_name} is called {name!r}; {suggest(name, table)}")
    return table[name]


def bound(
    table: Mapping[str, Callable[..., Any]], given: str | Sequence[Any]
) -> Callable[..., Any]:
    """Returns the function that a config names, with the options it gives bound to it.

    Args:
        table: one of the tables.
        given: a name; or a list of a name and its options, in their order (``['jsd', 0.5]``) or by
            name (``['jsd', {'beta': 0.5}]``). Options are what follows ``*`` in the function's
            parameters, ``labels`` apart.

    Raises:
        UnknownNameError: a KeyError; there is no such name.
        ValueError: the function has no such options, or fewer.
    """
    name, arguments = (given, ()) if isinstance(given, str) else (given[0], tuple(given[1:]))
    if name not in table:
        raise UnknownNameError(f"{name!r} is not known: {suggest(name, table)}")
    function = table[name]
    if not arguments:
        return function() if isinstance(function, type) else function
    known = [
        parameter.name
        for parameter in inspect.signature(function).parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "labels"
    ]
    if not known:
        raise ValueError(f"{name!r} takes no options: its function has no parameters after *")
    if len(arguments) == 1 and isinstance(arguments[0], Mapping):
        options = dict(arguments[0])
    elif len(arguments) > len(known):
        raise ValueError(
            f"{name!r} takes {len(known)} options, {', '.join(known)}; got {len(arguments)}"
        )
    else:
        options = dict(zip(known, arguments, strict=False))
    for option in options:
        if option not in known:
            raise ValueError(f"{name!r} has no option {option!r}: {suggest(option, known)}")
    return (
        function(**options)
        if isinstance(function, type)
        else functools.partial(function, **options)
    )


def in_words(given: str | Sequence[Any]) -> str:
    """What a config gives where a name may have options, as text: ``jsd``, ``jsd(beta=0.5)``."""
    if isinstance(given, str):
        return given
    name, arguments = given[0], given[1:]
    if len(arguments) == 1 and isinstance(arguments[0], Mapping):
        shown = [f"{key}={value}" for key, value in arguments[0].items()]
    else:
        shown = [str(value) for value in arguments]
    return f"{name}({', '.join(shown)})" if shown else str(name)


def _table(map_name: str) -> MutableMapping[str, Callable[..., Any]]:
    if map_name not in MAPS:
        raise UnknownNameError(f"no table is called {map_name!r}; {suggest(map_name, MAPS)}")
    return MAPS[map_name]


__all__ = [
    "ADAPTOR_KEYS",
    "FEATURES",
    "KD_LOSS_MAP",
    "MAPS",
    "MATCHES",
    "MATCH_LOSS_MAP",
    "PROJ_MAP",
    "TEMPERATURE_SCHEDULER",
    "WEIGHT_SCHEDULER",
    "DynamicKeyDict",
    "bound",
    "in_words",
    "lookup",
    "register_new",
]


TEACHER_LAYERS = 12
TEACHER_WIDTH = 768
Match = dict[str, Any]


def _layers(
    layers: int, step: int = 1, first: int = 0, of: int = TEACHER_LAYERS
) -> list[tuple[int, int]]:
    """The student's hidden layers ``first``, ``first + step``…, each with the teacher's as deep."""
    ratio = of // layers
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
        "L3of6": _layers(3, of=6),
        "L12of24": _layers(12, of=24),
    }
    projected = {
        "L3n": ("L3", 384),
        "L3l": ("L3", 1024),
        "L4t": ("L4", 312),
        "small": ("small", 256),
        "es": ("es", 256),
    }
    found = {}
    for student in ("L3", "L4", "L3of6", "L12of24"):
        for loss in ("attention_mse", "attention_mse_sum", "attention_ce", "attention_ce_mean"):
            found[f"{student}_{loss}"] = _attention(paths[student][1:], loss)
    for student, path in paths.items():
        found[f"{student}_hidden_smmd"] = _hidden(path, "mmd", twice=True)
    for student in ("L3", "L6", "L3of6", "L12of24"):
        found[f"{student}_hidden_mse"] = _hidden(paths[student], "hidden_mse")
    for student, (like, width) in projected.items():
        found[f"{student}_hidden_mse"] = _hidden(paths[like], "hidden_mse", width=width)
    found["L4t_hidden_sgram"] = _hidden(paths["L4"], "gram", twice=True, width=312)
    return found


MATCHES: dict[str, tuple[Match, ...]] = _all()
"""The intermediate matches of TextBrewer's examples, by name, and such for teachers of other depths.

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
L3of6   3 of 6, every second; not TextBrewer's          layers of the teacher, as wide
L12of24 12 of 24, every second; not TextBrewer's        layers of the teacher, as wide
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

For any two depths and widths: `jaxbrewer.zoo.suggest_matches`.

Name → matches, as dicts of the fields of `jaxbrewer.IntermediateMatch`.
"""
