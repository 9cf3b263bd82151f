"""What every benchmark here shares: taking turns, medians with spread, a table, JSON, a plot.

A program to time is a function ``run(steps)`` that runs so many steps and returns when the last one
has finished. Programs are run in turn (A, B, C, A, B, C…), so that whatever else the machine is
doing falls on all of them; ratios are taken within a round, and their median is reported.
"""

import argparse
import json
import math
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

# JAX shares the accelerator with torch where both are timed; read when JAX starts.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # torch's profiler is talkative

RESULTS = Path(__file__).parent / "results"

Run = Callable[[int], None]
Row = dict[str, Any]


def parser(question: str, *, rounds: int = 5, steps: int = 1) -> argparse.ArgumentParser:
    """A parser with the flags every script has; ``question`` is what the script answers."""
    made = argparse.ArgumentParser(
        description=question, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    made.add_argument("--rounds", type=int, default=rounds, help="turns that each program gets")
    made.add_argument("--steps", type=int, default=steps, help="steps in a turn")
    made.add_argument("--warmup", type=int, default=2, help="steps of each before the first turn")
    made.add_argument("--out", type=Path, default=RESULTS, help="folder for the JSON and the plots")
    made.add_argument("--name", help="name of the JSON file, if not the script's")
    made.add_argument("--plot", action="store_true", help="draw the curves too (needs matplotlib)")
    made.add_argument(
        "--smoke", action="store_true", help="tiny sizes: does the script run at all?"
    )
    return made


def add_precision(made: argparse.ArgumentParser) -> None:
    """The flags of mixed precision; `precision` reads them."""
    made.add_argument("--half", choices=("bfloat16", "float16"), help="mixed precision")
    made.add_argument("--level", default="O1", choices=("O1", "O2", "O3"), help="fp16_opt_level")


def precision(args: argparse.Namespace) -> dict[str, Any]:
    """The fields of a `TrainingConfig` that the flags ask for."""
    if not args.half:
        return {}
    return {"fp16": True, "fp16_opt_level": args.level, "half_dtype": args.half}


@dataclass(frozen=True)
class Timing:
    """Seconds a step, one number for each round."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        """The median over rounds."""
        return quantile(self.seconds, 0.5)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The first and third quartile over rounds."""
        return quantile(self.seconds, 0.25), quantile(self.seconds, 0.75)

    def faster_than(self, other: "Timing") -> tuple[float, float, float]:
        """How many times as fast as ``other``: median and quartiles of each round's ratio."""
        ratios = [b / a for a, b in zip(self.seconds, other.seconds, strict=True)]
        return quantile(ratios, 0.5), quantile(ratios, 0.25), quantile(ratios, 0.75)

    def columns(self, prefix: str = "", *, unit: float = 1e3, name: str = "ms") -> Row:
        """Median and quartiles as cells of a row, by default in milliseconds."""
        low, high = self.quartiles
        values = {"": self.median, "_q1": low, "_q3": high}
        return {f"{prefix}{name}{which}": value * unit for which, value in values.items()}


def quantile(values: Sequence[float], q: float) -> float:
    """A quantile with linear interpolation, as numpy's default."""
    ordered = sorted(values)
    place = q * (len(ordered) - 1)
    low, high = math.floor(place), math.ceil(place)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


class Elsewhere:
    """A program in a process of its own, with its own threads and memory; called as `Run`.

    Several that are made one after the other build at the same time; `ready` waits for one.

    Args:
        make: builds the program there; a function at the top of a module.
        arguments: what it is called with.

    ``ready`` and a call raise ``RuntimeError`` with the other process's traceback, if that fails to
    build or to run it.
    """

    def __init__(self, make: Callable[..., Run], *arguments: Any):
        context = multiprocessing.get_context("spawn")
        self._end, other = context.Pipe()
        self._process = context.Process(target=_serve, args=(other, make, arguments), daemon=True)
        self._process.start()
        other.close()
        self._is_ready = False

    def ready(self) -> None:
        """Waits until the program is built."""
        if not self._is_ready:
            self._wait()
            self._is_ready = True

    def __call__(self, steps: int) -> None:
        """Runs so many steps and waits for the last."""
        self.ready()
        self._end.send(steps)
        self._wait()

    def close(self) -> None:
        """Ends the process."""
        self._end.close()
        self._process.join()

    def _wait(self) -> None:
        try:
            problem = self._end.recv()
        except EOFError:
            self._process.join()
            problem = f"it ended with exit code {self._process.exitcode}"
        if problem is not None:
            raise RuntimeError(f"a program in another process failed: {problem}")


def _serve(end: Any, make: Callable[..., Run], arguments: Sequence[Any]) -> None:
    """What runs in the other process."""
    try:
        run = make(*arguments)
        end.send(None)
        while True:
            steps = end.recv()
            run(steps)
            end.send(None)
    except (EOFError, BrokenPipeError):  # closed by the other end
        return
    except Exception:  # noqa: BLE001 - told to the other end
        end.send(traceback.format_exc())


def take_turns(
    programs: Mapping[str, Run], *, rounds: int, steps: int = 1, warmup: int = 2, lead: int = 0
) -> dict[str, Timing]:
    """Times programs in turn.

    A program that needs no compiling may be given ``warmup=0``. ``lead`` steps at the start of each
    turn are not timed: there a program gets back the memory and caches that the one before it had.
    """
    if warmup:
        for run in programs.values():
            run(warmup)
    seconds: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, run in programs.items():
            if lead:
                run(lead)
            start = time.perf_counter()
            run(steps)
            seconds[name].append((time.perf_counter() - start) / steps)
    return {name: Timing(tuple(each)) for name, each in seconds.items()}


def set_torch_threads() -> None:
    """Gives torch as many threads as JAX has: one a core."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))


def machine() -> Row:
    """What the figures were taken on."""
    import jax

    packages = ("jax", "jaxlib", "flax", "optax", "torch", "transformers", "textbrewer")
    row: Row = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "device": jax.devices()[0].device_kind,
        "platform": jax.devices()[0].platform,
        "devices": jax.device_count(),
    }
    for package in packages:
        try:
            row[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            row[package] = None
    return row


def _command() -> str:
    """The command line without the folder the results go to."""
    words = list(sys.argv[1:])
    if "--out" in words:
        place = words.index("--out")
        del words[place : place + 2]
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor()


def save(args: argparse.Namespace, rows: Sequence[Row], **more: Any) -> Path:
    """Writes ``{machine, settings, rows, …}`` as JSON; the script names the file unless told."""
    name = args.name or Path(sys.argv[0]).stem
    settings = {key: _plain(value) for key, value in vars(args).items() if key != "out"}
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{name}.json"
    found = {"machine": machine(), "settings": settings, "rows": list(rows), **more}
    path.write_text(json.dumps(found, indent=1, ensure_ascii=False, default=_plain) + "\n")
    return path


def _plain(value: Any) -> Any:
    """A value as JSON has it: numpy's numbers as Python's, paths as text."""
    if hasattr(value, "tolist"):
        return value.tolist()
    return str(value) if isinstance(value, Path) else value


def show(rows: Sequence[Row], columns: Sequence[str] | None = None) -> None:
    """Prints rows as a Markdown table, so that it can stand in a README as it is."""
    columns = list(columns or dict.fromkeys(key for row in rows for key in row))
    cells = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    print("\n".join(lines), flush=True)


def _cell(value: Any) -> str:
    if value is None:
        return "–"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def plot(
    path: Path, curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], x: str, y: str
) -> None:
    """Draws curves, name → (x, y), on logarithmic axes."""
    from matplotlib import figure

    drawing = figure.Figure(figsize=(6, 4), layout="constrained")
    axes = drawing.subplots()
    for name, (xs, ys) in curves.items():
        axes.plot(xs, ys, marker="o", label=name)
    axes.set(xlabel=x, ylabel=y, xscale="log", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(path)
