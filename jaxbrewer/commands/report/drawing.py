"""Curves and matches as SVG, without scripts."""

import html
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxbrewer.commands import escaped
from jaxbrewer.commands.report.reading import Curve

COLOURS = 8
"""How many lines can be told apart by colour; the page's style has ``.c0`` to ``.c7``."""

_WIDE, _HIGH = 420, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 56, 14, 10, 24
_FEW = 30  # points that are drawn as dots, too
_ROW = 26  # from a layer to the next
_COLUMNS = (48, 196)  # where the teacher's and the student's layers are
_MATCHES_WIDE = 520


def shown(text: object) -> str:
    """Text from a file, so that it is only text in a page."""
    return html.escape(escaped(text), quote=True)


def number(value: float) -> str:
    """A number as it is read: whole ones with commas, others with four digits."""
    if float(value).is_integer() and abs(value) < 1e9:
        return f"{int(value):,}"
    return f"{value:.4g}"


# ---------------------------------------------------------------------------------------- curves


def chart(title: str, lines: Sequence[tuple[str, Curve]]) -> str:
    """Curves over steps in one picture.

    Args:
        title: what is drawn.
        lines: a name and a curve for each colour, in order; a curve without points is left out.
    """
    drawn = [(i, name, curve) for i, (name, curve) in enumerate(lines) if len(curve.steps)]
    caption = f"<figcaption>{shown(title)}</figcaption>"
    if not drawn:
        return f"<figure>{caption}<p>no finite points</p></figure>"
    xs = np.concatenate([curve.steps for _, _, curve in drawn])
    ys = np.concatenate([curve.values for _, _, curve in drawn])
    across, up = _Axis(xs, _LEFT, _WIDE - _RIGHT), _Axis(ys, _HIGH - _BOTTOM, _TOP)
    parts = [_grid(across, up), *(_line(i, name, c, across, up) for i, name, c in drawn)]
    label = f"{shown(title)}: {', '.join(shown(name) for _, name, _ in drawn)}"
    return (
        f'<figure>{caption}<svg viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg></figure>"
    )


class _Axis:
    """From a value to its place in the picture."""

    def __init__(self, values: np.ndarray, start: float, end: float):
        low, high = float(values.min()), float(values.max())
        if high <= low:
            low, high = low - (abs(low) or 1) / 2, high + (abs(high) or 1) / 2
        self.ticks = ticks(low, high)
        self._low, self._span = low, high - low
        self._start, self._length = start, end - start

    def __call__(self, value: float) -> float:
        return self._start + (value - self._low) / self._span * self._length


def ticks(low: float, high: float, most: int = 4) -> list[float]:
    """Round numbers from low to high, at most so many and one."""
    raw = (high - low) / most
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    found = [round((first + i) * step, 12) for i in range(most + 2)]
    return [tick for tick in found if tick <= high + step * 1e-9]


def _grid(across: _Axis, up: _Axis) -> str:
    parts = []
    for tick in up.ticks:
        y = f"{up(tick):.1f}"
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDE - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(
            f'<text x="{_LEFT - 6}" y="{y}" dy="4" text-anchor="end">{number(tick)}</text>'
        )
    for tick in across.ticks:
        x = f"{across(tick):.1f}"
        parts.append(f'<text x="{x}" y="{_HIGH - 6}" text-anchor="middle">{number(tick)}</text>')
    return "".join(parts)


def _line(index: int, name: str, curve: Curve, across: _Axis, up: _Axis) -> str:
    points = [
        (f"{across(x):.1f}", f"{up(y):.1f}") for x, y in zip(curve.steps, curve.values, strict=True)
    ]
    colour, hint = f"c{index % COLOURS}", f"<title>{shown(name)}</title>"
    joined = " ".join(f"{x},{y}" for x, y in points)
    dots = points if len(points) <= _FEW else []
    return f'<polyline class="{colour}" points="{joined}">{hint}</polyline>' + "".join(
        f'<circle class="{colour}" cx="{x}" cy="{y}" r="2.2">{hint}</circle>' for x, y in dots
    )


# --------------------------------------------------------------------------------------- matches


def pairs_of(match: Mapping[str, Any]) -> list[tuple[int, int]]:
    """The teacher's and the student's layers that a match joins, each pair once; none if it is odd."""
    sides = [match.get(name) for name in ("layer_T", "layer_S")]
    teacher, student = (side if isinstance(side, list) else [side] for side in sides)
    whole = all(isinstance(layer, int) for layer in [*teacher, *student])
    if not whole or len(teacher) != len(student):
        return []
    return list(dict.fromkeys(zip(teacher, student, strict=True)))


def matches(found: Sequence[Mapping[str, Any]]) -> str:
    """The layers of both sides, the first at the bottom, with a line for each match between them."""
    joined = [(pair, match) for match in found for pair in pairs_of(match)]
    if not joined:
        return ""
    columns = [_layers([pair[side] for pair, _ in joined]) for side in (0, 1)]
    high = max(map(len, columns)) * _ROW + 34
    places = [_places(layers, high) for layers in columns]
    parts = [
        f'<text x="{x}" y="14" text-anchor="middle">{name}</text>'
        for x, name in zip(_COLUMNS, ("teacher", "student"), strict=True)
    ]
    (left, right), (places_T, places_S) = _COLUMNS, places
    for t, s in dict.fromkeys(pair for pair, _ in joined):
        parts.append(
            f'<line class="match" x1="{left}" y1="{places_T[t]:.1f}" x2="{right}" y2="{places_S[s]:.1f}"/>'
        )
    for side, x in enumerate(_COLUMNS):
        met = {pair[side] for pair, _ in joined}
        parts += [_layer(layer, x, y, layer in met) for layer, y in places[side].items()]
    for layer, y in places_S.items():
        words = dict.fromkeys(_words(match) for pair, match in joined if pair[1] == layer)
        parts.append(f'<text x="{right + 20}" y="{y:.1f}" dy="4">{"; ".join(words)}</text>')
    return (
        f'<svg class="matches" viewBox="0 0 {_MATCHES_WIDE} {high}" role="img" '
        f'aria-label="matched layers">{"".join(parts)}</svg>'
    )


def _layers(named: Sequence[int]) -> list[int]:
    """All layers up to the last that is named, then those that are counted from the end."""
    last = max(named)
    return [*range(last + 1), *sorted({layer for layer in named if layer < 0})]


def _places(layers: Sequence[int], high: int) -> dict[int, float]:
    top, bottom = 36, high - 14
    gap = (bottom - top) / max(len(layers) - 1, 1)
    return {layer: bottom - i * gap for i, layer in enumerate(layers)}


def _layer(layer: int, x: int, y: float, is_met: bool) -> str:
    kind = "layer met" if is_met else "layer"
    return (
        f'<circle class="{kind}" cx="{x}" cy="{y:.1f}" r="10"/>'
        f'<text class="{kind}" x="{x}" y="{y:.1f}" dy="4" text-anchor="middle">{layer}</text>'
    )


def _words(match: Mapping[str, Any]) -> str:
    """The loss of a match and its weight, and the widths that its projection joins."""
    projection = match.get("proj")
    via = ""
    if isinstance(projection, list) and len(projection) >= 3:
        via = f", {shown(projection[0])} {shown(projection[1])} → {shown(projection[2])}"
    return f"{shown(match.get('loss'))} × {shown(match.get('weight'))}{via}"
