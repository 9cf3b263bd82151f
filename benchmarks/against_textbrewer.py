"""How fast is a training step, beside TextBrewer's and a torch loop written by hand?

BERT-base to TextBrewer's students, with the matches its README lists, on full sequences. The three
programs train the same models on the same batches, with dropout and AdamW, in turn, each in a
process of its own:

- jaxbrewer: the compiled step of a `GeneralDistiller`, once for each of ``--levels``;
- textbrewer: TextBrewer's own loop, without its checkpoints, on transformers' models;
- torch: a loop written by hand for this objective, with fused AdamW;
- with ``--compile`` the last two again, with ``torch.compile`` on both models and on the loss.

``--lengths`` asks another question: how many real tokens are trained on in a second, when sentences
are as long as SST-2's? There TextBrewer pads to ``--length``, as its examples do, and jaxbrewer
both so and to the widths of buckets.

    python benchmarks/against_textbrewer.py                    # CPU, float32
    python benchmarks/against_textbrewer.py --device gpu --half bfloat16 --levels O1 O2 \\
        --batch 32 128 --compile
"""

import argparse
from collections.abc import Mapping
from typing import Any

import harness
import numpy as np
import workloads

PROGRAMS = ("jaxbrewer", "textbrewer", "torch")
COMPILED = "-compiled"
BUCKETS = (16, 32, 64, 128)


def main() -> None:
    args = arguments()
    rows = []
    for name in args.students:
        for size in args.batch:
            work = workloads.work(name, args.smoke)
            rows += lengths(args, work, size) if args.lengths else compare(args, work, size)
            harness.save(args, rows)  # each time, or a run that is cut short leaves nothing
            print(f"{name}, batch {size}: done", flush=True)
    harness.show(rows, [column for column in rows[0] if not column.endswith(("q1", "q3"))])


def arguments() -> argparse.Namespace:
    parser = harness.parser(__doc__.splitlines()[0], rounds=7)
    add = parser.add_argument
    add("--lead", type=int, default=1, help="steps at the start of a turn that are not timed")
    add("--students", nargs="+", default=["T3", "T4-tiny"], choices=workloads.MATCHED)
    add("--batch", nargs="+", type=int, default=[8], help="batch sizes")
    add("--length", type=int, default=128, help="length that sequences are padded to")
    add("--device", default="cpu", choices=("cpu", "gpu"))
    add(
        "--half",
        choices=("bfloat16", "float16"),
        help="mixed precision, which torch does by autocast",
    )
    add("--levels", nargs="+", default=["O1"], choices=("O1", "O2", "O3"), help="jaxbrewer's")
    add("--programs", nargs="+", default=list(PROGRAMS), choices=PROGRAMS)
    add("--compile", action="store_true", help="time torch's programs with torch.compile too")
    add("--lengths", nargs="?", const="sst2", help="'sst2', or a file with one length a line")
    args = parser.parse_args()
    args.levels = args.levels if args.half else ["O0"]
    if args.smoke:
        args.batch, args.length, args.rounds, args.warmup = [2], 16, 2, 1
    return args


def programs(
    args: argparse.Namespace, work: workloads.Work, batch: dict[str, np.ndarray]
) -> dict[str, harness.Elsewhere]:
    """The programs to compare, each in a process of its own, ready to run."""
    names = [name for name in args.programs if name != "jaxbrewer"]
    names += [name + COMPILED for name in names if args.compile]
    if "jaxbrewer" in args.programs:
        names = [jaxbrewer(level) for level in args.levels] + names
    made = {name: harness.Elsewhere(program, name, args, work, batch) for name in names}
    for each in made.values():
        each.ready()
    return made


def jaxbrewer(level: str) -> str:
    """The name of our program at a level of precision."""
    return f"jaxbrewer {level}"


def program(
    name: str, args: argparse.Namespace, work: workloads.Work, batch: dict[str, np.ndarray]
) -> harness.Run:
    """One of them, on its own copies of the models."""
    ours, _, level = name.partition(" ")
    if ours == "jaxbrewer":
        half = {"fp16": True, "fp16_opt_level": level, "half_dtype": args.half}
        config = half if args.half else {}
        distiller = workloads.jax_distiller(work, device=args.device, **config)
        return workloads.JaxStep(distiller, batch).run
    import torch

    harness.set_torch_threads()
    device = "cuda" if args.device == "gpu" else "cpu"
    half_type = getattr(torch, args.half) if args.half else None
    step = workloads.TextBrewerStep if name.startswith("textbrewer") else workloads.TorchStep
    return step(work, batch, device, half_type, name.endswith(COMPILED)).run


def compare(args: argparse.Namespace, work: workloads.Work, size: int) -> list[harness.Row]:
    """Times whole steps on full sequences; a row for each level of precision."""
    batch = workloads.make_batch(work.teacher["vocab_size"], size, args.length)
    timings = take_turns(args, programs(args, work, batch))
    ours = {level: timings.pop(jaxbrewer(level), None) for level in args.levels}
    rows = []
    for level, timing in ours.items():
        row: harness.Row = {"student": work.name, "batch": size, "half": args.half, "level": level}
        row["attention in torch"] = workloads.torch_attention() if timings else None
        named = timings if timing is None else {"jaxbrewer": timing, **timings}
        for name, each in named.items():
            row |= each.columns(f"{name} ")
        rows.append(row | ratios(named))
    return rows


def ratios(timings: Mapping[str, harness.Timing]) -> harness.Row:
    """How many times as fast jaxbrewer is as each of the others, with quartiles."""
    row: harness.Row = {}
    for other in [name for name in timings if name != "jaxbrewer" and "jaxbrewer" in timings]:
        middle, low, high = timings["jaxbrewer"].faster_than(timings[other])
        row |= {f"× {other}": middle, f"× {other} q1": low, f"× {other} q3": high}
    return row


def take_turns(
    args: argparse.Namespace, made: dict[str, harness.Elsewhere]
) -> dict[str, harness.Timing]:
    timings = harness.take_turns(
        made, rounds=args.rounds, steps=args.steps, warmup=args.warmup, lead=args.lead
    )
    for each in made.values():
        each.close()  # the next models need the memory
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
            (timing,) = take_turns(args, programs(alone, work, batch)).values()
            seconds += part * timing.median
        row("jaxbrewer", "/".join(map(str, widths)), seconds)
    theirs: Any = next((r for r in rows if r["program"] == "textbrewer"), None)
    for one in rows if theirs else ():
        one["× textbrewer"] = one["sentences/s"] / theirs["sentences/s"]
    return rows


if __name__ == "__main__":
    main()
