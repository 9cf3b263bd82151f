"""The page of a report: one HTML file, its style in it, that asks nothing of a network."""

import datetime
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxbrewer.commands import BY_HAND, FINE, CommandError, say_line
from jaxbrewer.commands.report.drawing import COLOURS, chart, matches, number, shown
from jaxbrewer.commands.report.reading import MOST_POINTS, Checkpoint, Curve, Run, read_run
from jaxbrewer.files import replacing
from jaxbrewer.utils import LayerNode

_LEVELS = 3  # of the table of parameters
_MOST_TEXT = 400  # characters of a config's value
_NONE = "–"
_EMPTY = Curve(np.zeros(0), np.zeros(0))
_GROUPS = (
    ("scalar/", "The loss and its terms, by micro-step"),
    ("monitor/", "Beside the loss: the student and the teacher"),
    ("eval/", "Metrics"),
    ("", "Other points of the log"),
)

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1c1e; --faint: #63636a; --rule: #dcdce0;
  --c0: #0a62b8; --c1: #c4501b; --c2: #1b7f4b; --c3: #a03a8c; --c4: #8a6a00; --c5: #007c8a; --c6: #b3263c;
  --c7: #5b5bd6; }
@media (prefers-color-scheme: dark) { :root { --paper: #17171a; --ink: #ececf0; --faint: #a2a2ab;
  --rule: #3a3a41; --c0: #6cb2f5; --c1: #f0905c; --c2: #62cf97; --c3: #e08bd0; --c4: #dcb948; --c5: #57c8d6;
  --c6: #f57f8f; --c7: #a3a3ff; } }
body { margin: 0 auto; max-width: 1180px; padding: 1.5rem 1rem 4rem; background: var(--paper);
  color: var(--ink); font: 15px/1.45 system-ui, sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .6rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .4rem; overflow-wrap: anywhere; }
p, li, figcaption { overflow-wrap: anywhere; } .faint { color: var(--faint); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 1rem; }
figure { margin: 0; max-width: 560px; } figcaption { font-weight: 600; font-size: .9rem; }
svg { width: 100%; height: auto; display: block; } svg text { font-size: 12px; fill: var(--faint); }
svg .grid { stroke: var(--rule); } polyline { fill: none; stroke-width: 1.6; stroke-linejoin: round; }
.wide { overflow-x: auto; } svg.matches { max-width: 560px; min-width: 460px; }
svg .match { stroke: var(--c0); stroke-width: 1.5; }
svg circle.layer { fill: var(--paper); stroke: var(--rule); }
svg circle.layer.met { stroke: var(--c0); } svg text.layer { font-size: 11px; }
svg text.layer.met { fill: var(--ink); }
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: .2rem .9rem .2rem 0;
  border-bottom: 1px solid var(--rule); }
th { font-weight: 600; } td.n, th.n { text-align: right; white-space: nowrap; }
td { overflow-wrap: anywhere; min-width: 6ch; }
tr.other td, tr.other th { background: color-mix(in srgb, var(--c4) 16%, transparent); }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .2rem 1.2rem;
  margin: 0 0 .8rem; padding: 0; }
.legend svg { display: inline-block; width: 22px; height: 8px; margin-right: .4rem; }
.missing { border-left: 3px solid var(--c6); padding-left: 1.6rem; }
""" + "".join(
    f"polyline.c{i}, line.c{i} {{ stroke: var(--c{i}); }} circle.c{i} {{ fill: var(--c{i}); }}\n"
    for i in range(COLOURS)
)


def write_report(folders: Sequence[str], out: str) -> int:
    """Writes a report; see the command's help.

    Raises:
        CommandError: a folder is none of a run, or the page cannot be written.
    """
    if Path(out).is_dir():
        raise CommandError(f"--out {out} is a folder, expected a file")
    runs = [read_run(folder) for folder in dict.fromkeys(folders)]
    text = page(runs, datetime.datetime.now(tz=datetime.UTC))
    try:
        with replacing(Path(out)) as file:
            file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise CommandError(f"--out {out} cannot be written: {error}") from error
    drawn = len({tag for run in runs for tag in run.curves})
    say_line(
        f"{out}: {len(text) / 1e3:,.0f} KB, {_counted(len(runs), 'run')}, {_counted(drawn, 'tag')}"
    )
    for run in runs:
        for line in run.missing:
            say_line(f"  ! {run.name}: {line}")
    return BY_HAND if any(run.missing for run in runs) else FINE


def page(runs: Sequence[Run], written: datetime.datetime) -> str:
    """The page of some runs, as text."""
    title = f"{runs[0].name}" if len(runs) == 1 else f"{len(runs)} runs"
    sections = (
        _missing(runs),
        _overview(runs),
        _curves(runs),
        _ends(runs),
        _each(runs, "What is matched", _matched),
        _configs(runs),
        _each(runs, "Checkpoints", _checkpoints),
        _each(runs, "Parameters of the student", _parameters),
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{shown(title)} – jaxbrewer report</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        f'<h1>{shown(title)}</h1>\n<p class="faint">Report of jaxbrewer, written '
        f"{_time(written)}.</p>\n{''.join(sections)}</body>\n</html>\n"
    )


# --------------------------------------------------------------------------------- pieces of HTML


def _section(title: str, body: str) -> str:
    return f"<section>\n<h2>{shown(title)}</h2>\n{body}\n</section>\n"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], numbers: Sequence[int] = ()) -> str:
    """A table of cells that are HTML already; the columns `numbers` are set to the right."""

    def line(cells: Sequence[str], tag: str) -> str:
        kinds = [' class="n"' if i in numbers else "" for i in range(len(cells))]
        inside = "".join(
            f"<{tag}{kind}>{cell}</{tag}>" for kind, cell in zip(kinds, cells, strict=True)
        )
        return f"<tr>{inside}</tr>"

    body = "\n".join(line(row, "td") for row in rows)
    return f'<div class="wide"><table><thead>{line(head, "th")}</thead><tbody>\n{body}</tbody></table></div>'


def _each(runs: Sequence[Run], title: str, body: Callable[[Run], str]) -> str:
    """A section with a part for each run; runs with the same part share it."""
    parts: dict[str, list[str]] = {}
    for run in runs:
        parts.setdefault(body(run), []).append(run.name)
    if len(parts) == 1:
        return _section(title, next(iter(parts)))
    named = [f"<h3>{shown(', '.join(names))}</h3>\n{part}" for part, names in parts.items()]
    return _section(title, "\n".join(named))


def _time(when: datetime.datetime | None) -> str:
    return _NONE if when is None else when.strftime("%Y-%m-%d %H:%M:%S UTC")


def _optional(value: Any, how: Callable[[Any], str] = shown) -> str:
    return _NONE if value is None else how(value)


def _counted(n: int, one: str, several: str | None = None) -> str:
    return f"{n} {one if n == 1 else several or f'{one}s'}"


# --------------------------------------------------------------------------------------- sections


def _missing(runs: Sequence[Run]) -> str:
    lines = [f"<li>{shown(run.name)}: {shown(line)}</li>" for run in runs for line in run.missing]
    if not lines:
        return ""
    return _section(
        "Not there, or not as it should be", f'<ul class="missing">{"".join(lines)}</ul>'
    )


def _overview(runs: Sequence[Run]) -> str:
    head = ("run", "trained by", "step", "epoch", "best score", "parameters", "micro-steps/s")
    rows = []
    for run in runs:
        scores = [c.score for c in run.checkpoints if c.score is not None]
        count = None if run.parameters is None else run.parameters.value[0]
        rows.append(
            (
                shown(run.name),
                _optional(run.position.get("class")),
                _optional(run.position.get("global_step"), number),
                _optional(_epoch(run.position)),
                _optional(max(scores, default=None), number),
                _optional(count, number),
                _optional(None if run.speed is None else _median(run.speed), number),
            )
        )
    note = '<p class="faint">Of the newest checkpoint that can be read; the median speed, by the log.</p>'
    return _section("Runs", _table(head, rows, range(2, 7)) + note)


def _epoch(position: Mapping[str, Any]) -> int | None:
    epoch = position.get("epoch")
    return epoch + 1 if isinstance(epoch, int) else None


def _median(curve: Curve) -> float:
    ordered = sorted(map(float, curve.values))
    return ordered[len(ordered) // 2]


def _curves(runs: Sequence[Run]) -> str:
    tags = list(dict.fromkeys(tag for run in runs for tag in run.curves))
    if not tags:
        return _section("Curves", "<p>There are none.</p>")
    parts = [_legend(runs)]
    left = set(tags)
    for prefix, title in _GROUPS:
        of_group = [tag for tag in tags if tag in left and tag.startswith(prefix)]
        left -= {*of_group}
        if of_group:
            charts = "\n".join(
                chart(tag.removeprefix(prefix), [(r.name, r.curves.get(tag, _EMPTY)) for r in runs])
                for tag in of_group
            )
            parts.append(f'<h3>{title}</h3>\n<div class="charts">\n{charts}\n</div>')
    if any(run.speed is not None for run in runs):
        lines = [(run.name, run.speed or _EMPTY) for run in runs]
        parts.append(
            f'<h3>Speed</h3>\n<div class="charts">\n{chart("micro-steps a second", lines)}\n</div>'
        )
    return _section("Curves", "\n".join([*parts, *_thinning(runs)]))


def _legend(runs: Sequence[Run]) -> str:
    if len(runs) == 1:
        return ""
    items = [
        f'<li><svg viewBox="0 0 22 8"><line class="c{i % COLOURS}" x1="0" x2="22" y1="4" y2="4" '
        f'stroke-width="3"/></svg>{shown(run.name)}</li>'
        for i, run in enumerate(runs)
    ]
    return f'<ul class="legend">{"".join(items)}</ul>'


def _thinning(runs: Sequence[Run]) -> list[str]:
    """What was done to the points before they were drawn."""
    curves = [(run, tag, curve) for run in runs for tag, curve in run.curves.items()]
    lines = []
    if any(curve.each > 1 for _, _, curve in curves):
        lines.append(
            f"A curve of more than {MOST_POINTS} points is drawn by the means of as many intervals."
        )
    lines += [
        f"{shown(run.name)}, {shown(tag)}: {_counted(curve.left_out, 'point')} left out that are not finite."
        for run, tag, curve in curves
        if curve.left_out
    ]
    return [f'<p class="faint">{line}</p>' for line in lines]


def _ends(runs: Sequence[Run]) -> str:
    tags = list(dict.fromkeys(tag for run in runs for tag in run.curves))
    if not tags:
        return ""
    rows = [[shown(tag), *(_end(run.curves.get(tag)) for run in runs)] for tag in tags]
    head = ["tag", *(shown(run.name) for run in runs)]
    note = '<p class="faint">Where a point of a curve is a mean, its last mean.</p>'
    return _section("Last values", _table(head, rows, range(1, len(head))) + note)


def _end(curve: Curve | None) -> str:
    return number(float(curve.values[-1])) if curve is not None and len(curve.values) else _NONE


def _matched(run: Run) -> str:
    config = run.position.get("distill_config")
    if not config:
        return "<p>Nothing: there is no distillation config.</p>"
    found = [m for m in config.get("intermediate_matches") or () if isinstance(m, Mapping)]
    words = _in_words(run.position)
    if not found:
        return f"<p>No layers, only what the outputs give.</p>{words}"
    features = dict.fromkeys(str(match.get("feature")) for match in found)
    parts = []
    for feature in features:
        drawn = matches([match for match in found if str(match.get("feature")) == feature])
        parts.append(f'<h3>{shown(feature)}</h3><div class="wide">{drawn}</div>')
    note = (
        '<p class="faint">Layers as the features are numbered, hidden 0 being the embeddings\' output; '
        "those behind the last that is matched are not drawn.</p>"
    )
    return "\n".join([*parts, note, words])


def _in_words(position: Mapping[str, Any]) -> str:
    """The objective, a line a term, as the checkpoint keeps it."""
    job = position.get("job")
    tasks = job.get("tasks") if isinstance(job, Mapping) else None
    if not isinstance(tasks, Mapping):
        return ""
    plans = [task.get("plan") for task in tasks.values() if isinstance(task, Mapping)]
    lines = dict.fromkeys(str(line) for plan in plans if isinstance(plan, list) for line in plan)
    items = "".join(f"<li>{shown(line)}</li>" for line in lines)
    return f"<p>The loss is made of:</p><ul>{items}</ul>" if items else ""


def _configs(runs: Sequence[Run]) -> str:
    parts = []
    for name in ("train_config", "distill_config"):
        configs = [run.position.get(name) or {} for run in runs]
        keys = list(dict.fromkeys(key for config in configs for key in config))
        if not keys:
            parts.append(f"<p>There is no {name}.</p>")
            continue
        head = "".join(f"<th>{shown(run.name)}</th>" for run in runs)
        rows = "\n".join(_setting(key, configs) for key in keys)
        parts.append(
            f'<h3>{name}</h3>\n<div class="wide"><table><thead><tr><th>field</th>{head}</tr></thead>'
            f"<tbody>\n{rows}</tbody></table></div>"
        )
    note = '<p class="faint">Fields that differ are marked.</p>' if len(runs) > 1 else ""
    return _section("Configs", "\n".join(parts) + note)


def _setting(key: str, configs: Sequence[Mapping[str, Any]]) -> str:
    values = [_value(key, config[key]) if key in config else _NONE for config in configs]
    differ = len({json.dumps(config.get(key), sort_keys=True) for config in configs}) > 1
    kind = ' class="other"' if differ else ""
    return f"<tr{kind}><th>{shown(key)}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>"


def _value(key: str, value: Any) -> str:
    if key == "intermediate_matches" and isinstance(value, list):
        return f"{_counted(len(value), 'match', 'matches')}, as above"
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return shown(text if len(text) <= _MOST_TEXT else f"{text[:_MOST_TEXT]}…")


def _checkpoints(run: Run) -> str:
    head = ("checkpoint", "step", "epoch", "MB", "score", "written", "")
    best = max((c.score for c in run.checkpoints if c.score is not None), default=None)
    rows = [_checkpoint(c, c.score is not None and c.score == best) for c in run.checkpoints]
    note = (
        '<p class="faint">Their arrays were not read for this page: <code>jaxbrewer inspect</code> '
        "does that, and verifies them.</p>"
    )
    return _table(head, rows, range(1, 5)) + note


def _checkpoint(checkpoint: Checkpoint, is_best: bool) -> Sequence[str]:
    return (
        shown(checkpoint.name),
        _optional(checkpoint.position.get("global_step"), number),
        _optional(_epoch(checkpoint.position)),
        _optional(checkpoint.megabytes, lambda size: f"{size:,.1f}"),
        _optional(checkpoint.score, number),
        _time(checkpoint.written),
        shown(checkpoint.problem or ("the best" if is_best else "")),
    )


def _parameters(run: Run) -> str:
    if run.parameters is None:
        return "<p>They cannot be told.</p>"
    total = run.parameters.value[0]
    rows = list(_nodes(run.parameters, 0, total))
    return _table(("part", "parameters", "share", "MB"), rows, (1, 2, 3))


def _nodes(node: LayerNode, level: int, total: int) -> Iterable[Sequence[str]]:
    count, memory = node.value
    share = f"{count / total:.1%}" if total else _NONE
    name = "all" if level == 0 else f"{'&emsp;' * (level - 1)}{shown(node.name)}"
    yield name, f"{count:,}", share, f"{memory:,.2f}"
    if level < _LEVELS:
        for child in node.children.values():
            yield from _nodes(child, level + 1, total)
