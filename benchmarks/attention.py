"""What does cuDNN's attention save a step, beside attention written out?

BERT-base to a student in half precision. The teacher has no dropout, so its attention may run as one
kernel; the student's may with ``--no-dropout``. Both programs take turns, at each length. Only on NVIDIA
GPUs are there two: elsewhere the two programs are the same.

    python benchmarks/attention.py --device gpu --length 128 512
"""

from typing import Any

import harness
import numpy as np
import workloads

from jaxbrewer.zoo import attention


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], rounds=5, steps=10)
    add = parser.add_argument
    add("--student", default="T3", choices=workloads.MATCHED)
    add("--batch", type=int, default=32)
    add("--length", nargs="+", type=int, default=[128, 512], help="sequence lengths")
    add("--no-dropout", action="store_true", help="the student's is off")
    add("--device", default="cpu", choices=("cpu", "gpu"))
    harness.add_precision(parser)
    parser.set_defaults(half="bfloat16", level="O2")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.rounds, args.steps = 2, [16], 2, 1
    rows = [measure(args, length) for length in args.length]
    harness.show(rows, [column for column in rows[0] if not column.endswith(("_q1", "_q3"))])
    print(harness.save(args, rows))


def measure(args: Any, length: int) -> harness.Row:
    """One row: both programs in turn, and how far their losses are apart at the first step."""
    work = workloads.work(args.student, args.smoke)
    work = workloads.without_dropout(work) if args.no_dropout else work
    batch = workloads.make_batch(work.teacher["vocab_size"], args.batch, length)
    takes = attention.cudnn_takes
    steps = {}
    for name, choose in (("written out", lambda query: False), ("cudnn", takes)):
        attention.cudnn_takes = choose
        try:
            distiller = workloads.jax_distiller(work, device=args.device, **harness.precision(args))
            steps[name] = workloads.JaxStep(distiller, batch)
        finally:
            attention.cudnn_takes = takes
    losses = []
    for step in steps.values():
        step.run(1)
        losses.append(float(np.asarray(step.metrics)[0]))
    timings = harness.take_turns(
        {name: step.run for name, step in steps.items()},
        rounds=args.rounds,
        steps=args.steps,
        warmup=args.warmup,
    )
    ratio, low, high = timings["cudnn"].faster_than(timings["written out"])
    scratch = {
        f"{name} scratch MB": step.compiled.memory_analysis().temp_size_in_bytes / 1e6
        for name, step in steps.items()
    }
    return {
        "student": work.name,
        "batch": args.batch,
        "length": length,
        "level": args.level,
        "dropout": not args.no_dropout,
        **timings["written out"].columns("written out "),
        **timings["cudnn"].columns("cudnn "),
        "× written out": ratio,
        "× written out_q1": low,
        "× written out_q3": high,
        **scratch,
        "loss gap": abs(losses[1] / losses[0] - 1),
    }


if __name__ == "__main__":
    main()
