"""How much memory does a training step take, by level of precision, batch and accumulation?

BERT-base to a student. The peak is the compiled program's own plan: what it is given, what it
returns and its scratch memory, less what it updates in place. On a GPU each row is also run, in a
process of its own, for the device's peak and the time of a step; with ``--at-once`` several run at the
same time, and are not timed.

    python benchmarks/memory.py
    python benchmarks/memory.py --device gpu --levels O0 O1 O2 O3 --half bfloat16 float16
"""

import argparse
import itertools
import multiprocessing
from typing import Any

import harness
import workloads

Case = tuple[argparse.Namespace, int, int, bool, str, str | None]


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], rounds=5)
    add = parser.add_argument
    add("--student", default="T3", choices=workloads.MATCHED)
    add("--batch", nargs="+", type=int, default=[8, 32], help="batch sizes")
    add("--length", type=int, default=128, help="sequence length")
    add("--accumulation", nargs="+", type=int, default=[1, 4], help="micro-batches an update")
    add("--levels", nargs="+", default=["O0"], choices=("O0", "O1", "O2", "O3"))
    add("--half", nargs="+", default=["bfloat16"], choices=("bfloat16", "float16"))
    add("--device", default="cpu", choices=("cpu", "gpu"))
    add("--at-once", type=int, default=1, help="processes on a GPU")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.accumulation, args.rounds = [2], 16, [1, 2], 2
    precisions = [
        (level, half if level != "O0" else None)
        for level in args.levels
        for half in (args.half if level != "O0" else args.half[:1])
    ]
    cases: list[Case] = [
        (args, batch, accumulation, checkpointing, level, half)
        for batch, accumulation, checkpointing, (level, half) in itertools.product(
            args.batch, args.accumulation, (False, True), precisions
        )
    ]
    if args.device == "gpu":
        # The device's peak is that of a process.
        with multiprocessing.get_context("spawn").Pool(args.at_once, maxtasksperchild=1) as pool:
            rows = pool.map(measure, cases, chunksize=1)
    else:
        rows = [measure(case) for case in cases]
    harness.show(rows, [column for column in rows[0] if not column.endswith(("_q1", "_q3"))])
    harness.save(args, rows)


def measure(case: Case) -> harness.Row:
    """One row."""
    import jax

    args, size, accumulation, checkpointing, level, half = case
    work = workloads.work(args.student, args.smoke)
    config: dict[str, Any] = {"gradient_accumulation_steps": accumulation}
    if half is not None:
        config |= {"fp16": True, "fp16_opt_level": level, "half_dtype": half}
    distiller = workloads.jax_distiller(work, device=args.device, remat=checkpointing, **config)
    batch = workloads.make_batch(work.teacher["vocab_size"], size, args.length)
    step = workloads.JaxStep(distiller, batch)
    plan = step.compiled.memory_analysis()
    given, scratch = plan.argument_size_in_bytes, plan.temp_size_in_bytes
    new = plan.output_size_in_bytes - plan.alias_size_in_bytes
    row: harness.Row = {
        "student": args.student,
        "level": level,
        "half": half,
        "batch": size,
        "accumulation": accumulation,
        "gradient checkpointing": checkpointing,
        "given MB": given / 1e6,
        "scratch MB": scratch / 1e6,
        "peak MB": (given + scratch + new) / 1e6,
    }
    if args.device == "gpu":
        timing = harness.take_turns(
            {"step": step.run}, rounds=args.rounds, steps=args.steps, warmup=args.warmup
        )["step"]
        row |= timing.columns() if args.at_once == 1 else {}
        row["device peak MB"] = jax.devices()[0].memory_stats()["peak_bytes_in_use"] / 1e6
    return row


if __name__ == "__main__":
    main()
