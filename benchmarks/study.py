"""Which loss distils best, and how do students of jaxbrewer and of TextBrewer compare, on real data?

A list of runs, each a process of its own that writes a file when it has ended, so that the same
command goes on where it was stopped. Two parts:

- ``textbrewer``: on SST-2 and MRPC at several seeds and on WNUT-17 at one, a teacher, a student on
  labels alone, one distilled by jaxbrewer and one by TextBrewer, which has the same beginning,
  batches, losses and rates;
- ``losses``: on SST-2's first 8,000 sentences, the loss on labels with each of some losses beside it.

The model is a folder of an encoder of at least six layers, such as MiniLM's; the data folder has
``sst2``, ``mrpc`` (GLUE's files) and ``wnut17``. The last state of a training is measured, so that
nothing is chosen by the rows it is measured on.

    python benchmarks/study.py --model minilm --data data --device gpu --jobs 10   # one GPU, 16 cores
    python benchmarks/study.py --model minilm --data data --tasks mrpc --seeds 1   # a CPU
"""

import argparse
import fnmatch
import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gpu
import harness
import numpy as np
from study_runs import (
    BY_ONNX,
    ENGINES,
    EPOCHS,
    JAXBREWER,
    LOSSES,
    LOSSES_TASK,
    TASKS,
    TEXTBREWER,
    Run,
    Settings,
    perform,
    quiet,
)

HERE = Path(__file__).resolve().parent
PARTS = ("textbrewer", "losses")
REPEATED = ("labels", "ce", "reverse_kl", "minilm")
"""Losses whose other seeds come before the figures of speed; those of the rest come last."""
DRAWS = 2_000


def main() -> int:
    args = arguments()
    settings = settings_of(args)
    if args.one:
        logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%X", level=logging.INFO)
        perform(run_named(args.one), settings)
        return 0
    wanted = runs(args)
    if problem := other_settings(read(wanted, settings), settings):
        print(problem, file=sys.stderr)
        return 2
    told = work_through(wanted, settings, starter(args, settings), args.jobs, args.minutes * 60)
    found = read(wanted, settings)
    for title, rows in tables(found).items():
        print(f"\n{title}\n")
        harness.show(rows)
    every = [row for rows in tables(found).values() for row in rows]
    harness.save(args, every, ended=told)
    return 0 if all(how == "done" for how in told.values()) else 1


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--model", type=Path, required=True, help="folder of the encoder that teachers begin with")
    add("--data", type=Path, required=True, help="folder with sst2, mrpc and wnut17")
    add(
        "--out",
        type=Path,
        default=Path("runs/study"),
        help="folder for models, files and study.json",
    )
    add("--tasks", nargs="+", default=list(TASKS), choices=TASKS)
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS)
    add("--seeds", type=int, default=3, help="seeds, from 1 on; of WNUT-17 there is one")
    add(
        "--only",
        nargs="+",
        metavar="NAME",
        help="runs of these names, * for anything; and teachers",
    )
    add("--device", default="cpu", choices=("cpu", "gpu"))
    add("--jobs", type=int, default=1, help="runs at once")
    add("--minutes", type=float, default=600.0, help="when to stop; what has ended is kept")
    add("--max-examples", type=int, help="rows to train and to measure on at most, for a trial")
    add("--wheels", type=Path, default=HERE / "wheels", help="folder with wheels to install")
    add("--name", help="name of the JSON file, if not the script's")
    add("--smoke", action="store_true", help="a few rows, one epoch, one seed: does it run at all?")
    add("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.seeds, args.max_examples = 1, 32
    return args


def settings_of(args: argparse.Namespace) -> Settings:
    """What is the same in all runs."""
    epochs = 1 if args.smoke else EPOCHS
    folders = (path.resolve() for path in (args.model, args.data, args.out))
    return Settings(*folders, args.device, args.max_examples, epochs)


def other_settings(found: Mapping[Run, Mapping[str, Any]], settings: Settings) -> str | None:
    """What is wrong where files there are of other settings; None where nothing is."""
    for run, result in found.items():
        if result["settings"] != settings.shared():
            return (
                f"{settings.result(run)} is of {result['settings']}, and this study of "
                f"{settings.shared()}: name another folder by --out"
            )
    return None


# ------------------------------------------------------------------------------------- what to run


def runs(args: argparse.Namespace) -> list[Run]:
    """All runs, the most important first, each after the teacher it needs."""
    seeds = range(1, args.seeds + 1)
    found: list[Run] = []
    if "textbrewer" in args.parts:
        for seed in seeds:
            found += [run for name in args.tasks for run in beside(name, seed)]
    with_losses = "losses" in args.parts and LOSSES_TASK in args.tasks
    if with_losses:
        found += [Run(LOSSES_TASK, loss, 1) for loss in LOSSES]
        found += [Run(LOSSES_TASK, loss, seed) for seed in seeds[1:] for loss in REPEATED]
    if "textbrewer" in args.parts:
        found += [Run("all", "speed", 0, engine) for engine in ENGINES]
    if with_losses:
        others = [loss for loss in LOSSES if loss not in REPEATED]
        found += [Run(LOSSES_TASK, loss, seed) for seed in seeds[1:] for loss in others]
    if args.only:
        found = [run for run in found if any(fnmatch.fnmatch(run.name, one) for one in args.only)]
    teachers = dict.fromkeys(run.teacher for run in found if run.task in TASKS)
    return [*teachers, *found]


def beside(name: str, seed: int) -> list[Run]:
    """The students of a task at one seed; the one that takes longest first."""
    if name == "wnut17" and seed > 1:
        return []
    return [
        Run(name, "distilled", seed, TEXTBREWER),
        Run(name, "distilled", seed),
        Run(name, "alone", seed),
    ]


def run_named(name: str) -> Run:
    """The run of a name."""
    task, way, engine, seed = name.split("-")
    return Run(task, way, int(seed), engine)


# ------------------------------------------------------------------------------------- running them


@dataclass
class Working:
    """Runs that are under way, and how those before them ended."""

    settings: Settings
    began: float
    processes: dict[Run, "subprocess.Popen[bytes]"] = field(default_factory=dict)
    ended: dict[Run, str] = field(default_factory=dict)

    def look(self, now: float) -> None:
        """Takes out those that have ended, and says so; of those that failed the end of their logs."""
        for run, process in list(self.processes.items()):
            if (code := process.poll()) is None:
                continue
            del self.processes[run]
            self.ended[run] = "done" if code == 0 else f"failed with code {code}"
            print(f"{now - self.began:5.0f} s  {run.name}: {self.ended[run]}", flush=True)
            log = self.settings.result(run).with_suffix(".log")
            if code != 0 and log.exists():
                print(*log.read_text(errors="replace").splitlines()[-15:], sep="\n", flush=True)

    def stop(self) -> None:
        """Ends all."""
        for run, process in self.processes.items():
            gpu.end(process)
            self.ended[run] = "out of time"
        self.processes.clear()


Start = Callable[[Run], "subprocess.Popen[bytes]"]


def work_through(
    wanted: Sequence[Run], settings: Settings, start: Start, jobs: int, seconds: float
) -> dict[str, str]:
    """Does what has no file yet, so many runs at once, and stops when the time is up.

    Speed is measured while nothing else runs.

    Returns:
        How each ended, by name.
    """
    began = now = time.monotonic()
    there = {run: "done" for run in wanted if settings.result(run).exists()}
    working = Working(settings, began, ended=there)
    left = [run for run in wanted if run not in working.ended]
    try:
        while (left or working.processes) and now - began < seconds:
            working.look(now)
            for run in ready(left, working, jobs):
                left.remove(run)
                working.processes[run] = start(run)
            if not working.processes and not next(ready(left, working, jobs), None):
                break  # what is left waits for a teacher that failed
            time.sleep(0.05)
            now = time.monotonic()
    finally:
        working.stop()
    how = "not started: no time left" if now - began >= seconds else "not started: no teacher"
    return {run.name: working.ended.get(run, how) for run in wanted}


def ready(left: Sequence[Run], working: Working, jobs: int) -> Iterator[Run]:
    """The runs that may start now."""
    for run in list(left):
        if any(other.way == "speed" for other in working.processes):
            return
        if run.way == "speed":
            if not working.processes:
                yield run
            return
        if len(working.processes) >= jobs:
            return
        if run.way == "teacher" or working.ended.get(run.teacher) == "done":
            yield run


def starter(args: argparse.Namespace, settings: Settings) -> Start:
    """Starts a run in a process, with a share of the cores and its output in a file."""
    args.out.mkdir(parents=True, exist_ok=True)
    (settings.out / "runs").mkdir(exist_ok=True)
    common = gpu.prepared(args, settings.out)
    share = str(max(1, len(os.sched_getaffinity(0)) // args.jobs))
    threads = {f"{name}_NUM_THREADS": share for name in ("OMP", "MKL", "OPENBLAS")}
    given = ["--model", settings.model, "--data", settings.data, "--out", settings.out]
    given += ["--device", args.device, *(["--smoke"] if args.smoke else [])]
    given += ["--max-examples", args.max_examples] if args.max_examples else []

    def start(run: Run) -> "subprocess.Popen[bytes]":
        command = [sys.executable, Path(__file__).resolve(), *given, "--one", run.name]
        with settings.result(run).with_suffix(".log").open("wb") as log:
            return subprocess.Popen(
                list(map(str, command)), stdout=log, stderr=subprocess.STDOUT,
                env=common | quiet(run, settings) | threads, start_new_session=True,
            )  # fmt: skip

    return start


# ------------------------------------------------------------------------------------------ figures

Found = Mapping[Run, dict[str, Any]]
Kind = tuple[str, str, str]
"""Task, way and engine: runs that differ in their seed."""


def read(wanted: Sequence[Run], settings: Settings) -> dict[Run, dict[str, Any]]:
    """What the runs that have ended have found."""
    return {
        run: json.loads(path.read_text(encoding="utf-8"))
        for run in wanted
        if (path := settings.result(run)).exists()
    }


def tables(found: Found) -> dict[str, list[harness.Row]]:
    """The tables of what there is, by their titles."""
    speeds: dict[str, float] = {}
    for run, result in found.items():
        if run.way == "speed":
            speeds |= {
                f"{run.engine} {name}": value for name, value in result["sentences/s"].items()
            }
    made = {}
    parts = {"beside TextBrewer": ("teacher", "alone", "distilled"), "losses": tuple(LOSSES)}
    for title, ways in parts.items():
        kinds = dict.fromkeys((r.task, r.way, r.engine) for r in found if r.way in ways)
        ordered = sorted(
            kinds, key=lambda kind: (list(TASKS).index(kind[0]), ways.index(kind[1]), kind[2])
        )
        if rows := [row_of(kind, found, speeds) for kind in ordered]:
            made[title] = rows
    return made


def row_of(kind: Kind, found: Found, speeds: Mapping[str, float]) -> harness.Row:
    """A kind of run over its seeds."""
    task, way, engine = kind
    seeds = seeds_of(kind, found)
    results = [found[run_of(kind, seed)] for seed in seeds]
    scores = [float(score(counts_of(result).sum(0))) for result in results]
    what = "teacher" if way == "teacher" else "student"
    row: harness.Row = {
        "task": task,
        "way": way,
        "by": engine,
        "seeds": len(seeds),
        "score % (95%)": interval(means(kind, seeds, found)),
        "from–to": f"{100 * min(scores):.1f}–{100 * max(scores):.1f}",
    }
    if way in LOSSES:
        others = {"labels": (task, "labels", JAXBREWER), "ce": (task, "ce", JAXBREWER)}
    else:
        others = {
            "alone": (task, "alone", JAXBREWER),
            "TextBrewer": (task, "distilled", TEXTBREWER),
        }
    for name, other in others.items():
        row[f"− {name} (95%)"] = None if way == "teacher" else difference(kind, other, found)
    row["minutes"] = float(np.mean([result["seconds"] for result in results])) / 60
    row["MB"] = results[0]["MB"]
    if way not in LOSSES:
        row["sentences/s"] = speeds.get(f"{engine} {task} {what}")
        row["by ONNX"] = speeds.get(f"{engine} {task} {what} {BY_ONNX}")
    return row


def run_of(kind: Kind, seed: int) -> Run:
    """A kind's run at a seed."""
    task, way, engine = kind
    return Run(task, way, seed, engine)


def seeds_of(kind: Kind, found: Found) -> list[int]:
    """The seeds at which a kind of run has ended."""
    return sorted(run.seed for run in found if (run.task, run.way, run.engine) == kind)


def counts_of(result: Mapping[str, Any]) -> np.ndarray:
    """Right, said and there, of each held-out row: ``[rows, 3]``."""
    return np.asarray(result["counts"])


def score(sums: np.ndarray) -> np.ndarray:
    """The accuracy, or F1, of sums of counts: ``[…, 3]`` → ``[…]``."""
    right, said, there = np.moveaxis(sums, -1, 0)
    return 2 * right / np.maximum(said + there, 1)


def difference(kind: Kind, other: Kind, found: Found) -> str | None:
    """How much better one kind is than another, paired: the same seeds, the same rows drawn.

    None where there is nothing to compare.
    """
    seeds = [seed for seed in seeds_of(kind, found) if seed in seeds_of(other, found)]
    if kind == other or not seeds:
        return None
    return interval(means(kind, seeds, found) - means(other, seeds, found), signed=True)


def means(kind: Kind, seeds: Sequence[int], found: Found) -> np.ndarray:
    """The mean score over seeds: of the held-out rows, then of as many, drawn from them with replacement.

    How they vary is the chance of other rows, not that of other seeds.
    """
    counts = np.stack([counts_of(found[run_of(kind, seed)]) for seed in seeds])
    rows = counts.shape[1]
    drawn = np.random.default_rng(0).multinomial(rows, np.full(rows, 1 / rows), DRAWS)
    weights = np.concatenate([np.ones((1, rows), int), drawn])
    return score(np.einsum("dr,src->dsc", weights, counts)).mean(1)


def interval(values: np.ndarray, *, signed: bool = False) -> str:
    """The first of some values, and between which 95% of the others lie, in per cent."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    mine, low, high = (
        f"{100 * value:{'+' if signed else ''}.1f}" for value in (values[0], low, high)
    )
    return f"{mine} ({low} to {high})"


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the runs under way are ended
    sys.exit(main())
