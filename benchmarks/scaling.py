"""How does the cost of a step grow with its parts, and how does the time to compile it?

One thing grows at a time: the batch, the length, the layers matched, the teachers, the tasks, the
accumulation, the devices. `x` is the cost of a micro-batch relative to the smallest; `compile s` is
XLA's time to compile the train steps, `compiled` their number. Nothing may be compiled later.

Devices are virtual ones of the CPU unless there are others: they share its cores, so their times
say nothing of speed; what is shown is that the losses stay those of one device (`loss gap`, the
largest relative difference in the steps timed), sharded and, with a mean that differs by design
where masks do, pmapped.

    python benchmarks/scaling.py                     # a small encoder; some five minutes
    python benchmarks/scaling.py --size base --grow batch length
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import harness
import jax
import numpy as np
import turns
import workloads

os.environ["JAXBREWER_COMPILATION_CACHE"] = "off"  # compiling is timed

import jaxbrewer
from jaxbrewer.training import read_scalars

# Width, layers, heads, inner width and vocabulary of the teacher; the student has half the layers.
SIZES = {
    "tiny": (8, 2, 1, 8, turns.TINY_VOCABULARY),
    "small": (256, 6, 4, 1024, 2000),
    "base": (768, 12, 12, 3072, 30522),
}
VALUES = {
    "batch": (2, 4, 8, 16, 32),
    "length": (16, 32, 64, 128, 256),
    "matches": (0, 1, 2, 3),
    "teachers": (1, 2, 3),
    "tasks": (1, 2, 3),
    "accumulation": (1, 2, 4, 8),
    "sharded": (1, 2, 4),
    "pmap": (1, 2, 4),
}
DEVICES = ("sharded", "pmap")


class Compiled:
    """Counts and sums what XLA compiles: train steps, and everything.

    Attributes:
        steps: seconds that each train step took.
        programs: all programs.
    """

    def __init__(self) -> None:
        self.steps: list[float] = []
        self.programs = 0
        jax.monitoring.register_event_duration_secs_listener(self._hear)

    def _hear(self, event: str, duration: float, fun_name: str = "", **_: Any) -> None:
        if event.endswith("backend_compile_duration"):
            self.programs += 1
            if fun_name in ("jit(step)", "jit(_fun)"):  # the latter is pmap's
                self.steps.append(duration)


COMPILED = Compiled()


def encoder(size: str, layers: int, seed: int) -> Any:
    """A BERT without dropout; for a trial run the tiny model."""
    if size == "tiny":
        return turns.tiny_model(seed, layers)
    from flax import nnx

    from jaxbrewer.zoo import BertConfig, BertForSequenceClassification

    width, _, heads, inner, vocabulary = SIZES[size]
    config = BertConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=vocabulary,
        output_hidden_states=True,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForSequenceClassification(config, rngs=nnx.Rngs(seed))


def job(args: Any, grow: str, value: int, folder: str) -> tuple[Any, Any]:
    """The distiller and its loader where one thing has grown to a value."""
    sizes = {"batch": args.batch, "length": args.length, "matches": 1}
    sizes |= {grow: value} if grow in sizes else {}
    layers = SIZES[args.size][1]
    config = {
        "output_dir": f"{folder}/out",
        "log_dir": f"{folder}/log" if grow in DEVICES else None,
        "device": args.device,
        "ckpt_steps": turns.NEVER,
        "gradient_accumulation_steps": value if grow == "accumulation" else 1,
    }
    if grow in DEVICES and value > 1:
        config |= {"data_parallel": True, "mapping": grow}
    count = value if grow in ("teachers", "tasks") else 1
    teachers = [encoder(args.size, layers, seed) for seed in range(count)]
    student = encoder(args.size, layers // 2, seed=99)
    configs = [jaxbrewer.TrainingConfig(**config)]
    if grow == "teachers":
        configs.append(jaxbrewer.DistillationConfig())
        cls, adaptors = jaxbrewer.MultiTeacherDistiller, [workloads.adaptor, workloads.adaptor]
    else:
        matched = np.linspace(1, layers // 2, sizes["matches"]).round().astype(int)
        matches = [
            {"layer_T": int(2 * layer), "layer_S": int(layer), "weight": 1}
            | {"feature": "hidden", "loss": "hidden_mse"}
            for layer in matched
        ]
        configs.append(
            jaxbrewer.DistillationConfig(hard_label_weight=1, intermediate_matches=matches)
        )
        cls, adaptors = jaxbrewer.GeneralDistiller, [workloads.adaptor, workloads.adaptor]
    batches = [
        workloads.make_batch(SIZES[args.size][-1], sizes["batch"], sizes["length"], seed=seed)
        for seed in range(4)
    ]
    if grow == "tasks":
        names = [f"task {i}" for i in range(count)]
        each = dict.fromkeys(names, workloads.adaptor)
        by_task = dict(zip(names, teachers, strict=True))
        distiller = jaxbrewer.MultiTaskDistiller(*configs, by_task, student, each, each)
        return distiller, dict.fromkeys(names, batches)
    model_T = teachers if grow == "teachers" else teachers[0]
    return cls(*configs, model_T, student, *adaptors), batches


def measure(args: Any, grow: str, value: int) -> harness.Row:
    """One row."""
    micro = value if grow == "accumulation" else 1
    warmup = args.warmup * micro
    if grow == "tasks":
        warmup = max(warmup, 8 * value)  # until each task has come
    total = (warmup + args.rounds * args.steps * micro) // micro + 1
    COMPILED.steps.clear()

    def play(run: Callable[[int], None]) -> harness.Timing:
        run(warmup)
        before = COMPILED.programs
        timing = harness.take_turns(
            {"": run}, rounds=args.rounds, steps=args.steps * micro, warmup=0
        )[""]
        if COMPILED.programs > before:
            raise RuntimeError(f"{grow}={value}: XLA compiled again after the first batches")
        return timing

    with tempfile.TemporaryDirectory() as folder:
        distiller, loader = job(args, grow, value, folder)
        timing = turns.train_in_turns(distiller, loader, play, num_steps=total)
        losses = read_scalars(f"{folder}/log").get("scalar/total_loss", {})
    return {
        "grows": grow,
        "to": value,
        **timing.columns(),
        "compile s": sum(COMPILED.steps),
        "compiled": len(COMPILED.steps),
        "losses": [losses[step] for step in sorted(losses)],
    }


def on_devices(grow: str, value: int) -> harness.Row:
    """`measure` in a process that has so many devices."""
    flags = os.environ.get("XLA_FLAGS", "")
    environment = {
        **os.environ,
        "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count={value}".strip(),
        "NPROC": str(2 * value),
    }
    done = subprocess.run(
        [sys.executable, __file__, "--one", grow, str(value), *sys.argv[1:]],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{grow}={value} failed: see above")
    return json.loads(done.stdout.splitlines()[-1])


def finish(rows: list[harness.Row]) -> None:
    """Puts every row beside the first of its kind."""
    first: dict[str, harness.Row] = {}
    for row in rows:
        base = first.setdefault(row["grows"], row)
        row["x"] = row["ms"] / base["ms"]
        losses, expected = np.array(row.pop("losses")), np.array(base.get("kept", []))
        if row is base:
            row["kept"] = losses
        elif row["grows"] in DEVICES:
            row["loss gap"] = float(np.max(np.abs(losses - expected) / np.abs(expected)))
    for row in first.values():
        row.pop("kept")


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__.splitlines()[0], rounds=5, steps=4)
    parser.add_argument("--size", choices=list(SIZES), default="small")
    parser.add_argument("--grow", nargs="+", choices=list(VALUES), default=list(VALUES))
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.size, args.rounds, args.steps, args.length, args.batch = "tiny", 2, 1, 8, 4
    return args


def main() -> None:
    args = arguments()
    if args.one:
        print(json.dumps(measure(args, args.one[0], int(args.one[1]))))
        return
    rows = []
    for grow in args.grow:
        values = VALUES[grow][:2] if args.smoke else VALUES[grow]
        for value in values:
            virtual = grow in DEVICES and jax.devices()[0].platform == "cpu"
            rows.append(on_devices(grow, value) if virtual else measure(args, grow, value))
    finish(rows)
    columns = ["grows", "to", "ms", "ms_q1", "ms_q3", "x", "compile s", "compiled", "loss gap"]
    harness.show(rows, columns)
    print(harness.save(args, rows))
    if args.plot:
        curves = {
            grow: tuple(
                [row[of] for row in rows if row["grows"] == grow and row["to"]]
                for of in ("to", "x")
            )
            for grow in args.grow
            if grow not in DEVICES
        }
        harness.plot(Path(args.out) / "scaling.png", curves, "grown to", "cost, smallest = 1")


if __name__ == "__main__":
    main()
