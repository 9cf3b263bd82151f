"""How fast is a training step, beside TextBrewer's and a torch loop written by hand?

BERT-base to TextBrewer's students, with the matches its README lists, on full sequences. The three
programs train the same models on the same batches, with dropout and AdamW, in turn:

- jaxbrewer: the compiled step of a `GeneralDistiller`;
- textbrewer: TextBrewer's own loop, without its checkpoints, on transformers' models;
- torch: a loop written by hand for this objective, with fused AdamW; with ``--compile``, compiled.

``--lengths`` asks another question: how many real tokens are trained on in a second, when sentences
are as long as SST-2's? There TextBrewer pads to ``--length``, as its examples do, and jaxbrewer
both so and to the widths of buckets.

    python benchmarks/against_textbrewer.py                    # CPU, float32
    python benchmarks/against_textbrewer.py --device gpu --half bfloat16 --batch 32 128 --compile
"""

import argparse
import gc
import os
from collections.abc import Mapping
from typing import Any

import harness
import numpy as np
import workloads

PROGRAMS = ("jaxbrewer", "textbrewer", "torch")
BUCKETS = (16, 32, 64, 128)


def main() -> None:
    args = arguments()
    if "torch" in args.programs or "textbrewer" in args.programs:
        set_torch_threads()
    rows = []
    for name in args.students:
        for size in args.batch:
            work = workloads.work(name, args.smoke)
            rows += lengths(args, work, size) if args.lengths else [compare(args, work, size)]
            print(f"{name}, batch {size}: done", flush=True)
    harness.show(rows, [column for column in rows[0] if not column.endswith(("q1", "q3"))])
    harness.save(args, rows)


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__.splitlines()[0], rounds=7)
    add = parser.add_argument
    add("--students", nargs="+", default=["T3", "T4-tiny"], choices=workloads.MATCHED)
    add("--batch", nargs="+", type=int, default=[8], help="batch sizes")
    add("--length", type=int, default=128, help="length that sequences are padded to")
    add("--device", default="cpu", choices=("cpu", "gpu"))
    add(
        "--half",
        choices=("bfloat16", "float16"),
        help="mixed precision, which torch does by autocast",
    )
    add("--level", default="O1", choices=("O1", "O2", "O3"), help="jaxbrewer's fp16_opt_level")
    add("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    add("--compile", action="store_true", help="torch.compile the loop written by hand")
    add("--lengths", nargs="?", const="sst2", help="'sst2', or a file with one length a line")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.rounds, args.warmup = [2], 16, 2, 1
    return args


def set_torch_threads() -> None:
    """Gives torch as many threads as JAX has: one a core."""
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))


def programs(
    args: argparse.Namespace, work: workloads.Work, batch: dict[str, np.ndarray]
) -> dict[str, harness.Run]:
    """The programs to compare, each on its own copies of the models."""
    made: dict[str, harness.Run] = {}
    if "jaxbrewer" in args.programs:
        half = {"fp16": True, "fp16_opt_level": args.level, "half_dtype": args.half}
        config = half if args.half else {}
        distiller = workloads.jax_distiller(work, device=args.device, **config)
        made["jaxbrewer"] = workloads.JaxStep(distiller, batch).run
    if {"textbrewer", "torch"} & set(args.programs):
        import torch

        device = "cuda" if args.device == "gpu" else "cpu"
        half_type = getattr(torch, args.half) if args.half else None
        if "textbrewer" in args.programs:
            made["textbrewer"] = workloads.TextBrewerStep(work, batch, device, half_type).run
        if "torch" in args.programs:
            step = workloads.TorchStep(work, batch, device, half_type, args.compile)
            made["torch"] = step.run
    return made


def compare(args: argparse.Namespace, work: workloads.Work, size: int) -> harness.Row:
    """Times whole steps on full sequences."""
    batch = workloads.make_batch(work.teacher["vocab_size"], size, args.length)
    timings = take_turns(args, programs(args, work, batch))
    row: harness.Row = {"student": work.name, "batch": size, "half": args.half}
    for name, timing in timings.items():
        row |= timing.columns(f"{name} ")
    return row | ratios(timings)


def ratios(timings: Mapping[str, harness.Timing]) -> harness.Row:
    """How many times as fast jaxbrewer is as each of the others, with quartiles."""
    row: harness.Row = {}
    for other in set(timings) - {"jaxbrewer"} if "jaxbrewer" in timings else ():
        middle, low, high = timings["jaxbrewer"].faster_than(timings[other])
        row |= {f"× {other}": middle, f"× {other} q1": low, f"× {other} q3": high}
    return row


def take_turns(args: argparse.Namespace, made: dict[str, harness.Run]) -> dict[str, harness.Timing]:
    timings = harness.take_turns(made, rounds=args.rounds, steps=args.steps, warmup=args.warmup)
    made.clear()
    gc.collect()  # the next pair of models needs the memory
    return timings


def lengths(args: argparse.Namespace, work: workloads.Work, size: int) -> list[harness.Row]:
    """Real tokens and sentences a second, from the time of a batch at each width.

    The time of a step depends on the width alone, so each width is timed once and weighted by its
    share of the batches.
    """
    file = None if args.lengths == "sst2" else args.lengths
    drawn = workloads.draw_lengths(2_000 if args.smoke else 50_000, args.length, file)
    widths = sorted({min(width, args.length) for width in BUCKETS})
    buckets = np.searchsorted(widths, drawn)
    share = np.bincount(buckets, minlength=len(widths)) / len(drawn)
    vocab_size = work.teacher["vocab_size"]
    rows = []

    def row(name: str, padding: str, seconds: float) -> None:
        rows.append(
            {
                "student": work.name,
                "batch": size,
                "program": name,
                "padded to": padding,
                "ms a batch": seconds * 1e3,
                "sentences/s": size / seconds,
                "real tokens/s": size * float(drawn.mean()) / seconds,
            }
        )

    fixed = programs(args, work, workloads.make_batch(vocab_size, size, args.length))
    for name, timing in take_turns(args, fixed).items():
        row(name, str(args.length), timing.median)
    if "jaxbrewer" in args.programs:
        alone = argparse.Namespace(**(vars(args) | {"programs": ["jaxbrewer"]}))
        seconds = 0.0
        for width, part in zip(widths, share, strict=True):
            batch = workloads.make_batch(vocab_size, size, width)
            timing = take_turns(args, programs(alone, work, batch))["jaxbrewer"]
            seconds += part * timing.median
        row("jaxbrewer", "/".join(map(str, widths)), seconds)
    theirs: Any = next((r for r in rows if r["program"] == "textbrewer"), None)
    for one in rows if theirs else ():
        one["× textbrewer"] = one["sentences/s"] / theirs["sentences/s"]
    return rows


if __name__ == "__main__":
    main()
