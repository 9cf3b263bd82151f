"""What does ``distiller.train`` cost over a step written by hand?

The loop of ``train`` and the bare loop take turns on the same batches in host memory: BERT-base to
T3, and a tiny model of 20 arrays, whose step computes for some microseconds only, so that nothing
but overhead is left. ``train`` does all it does for a user: owns and checks every batch, moves the
schedule, shows a progress bar, watches for numbers that are not finite, and writes tensorboard
files where ``log_dir`` is set.

    python benchmarks/overhead.py                # both, in some five minutes on two cores
    python benchmarks/overhead.py --only tiny
"""

import tempfile
from collections.abc import Callable
from typing import Any

import bare
import harness
import turns
import workloads


def compare(
    make: Callable[..., Any],
    bare_step: bare.BareStep,
    batches: list[Any],
    logged: bool,
    args: Any,
    rounds: int,
    steps: int,
) -> dict[str, Any]:
    """One row: bare and whole, in turn."""
    with tempfile.TemporaryDirectory() as folder:
        config = {"output_dir": f"{folder}/out", "device": args.device}
        distiller = make(**config, log_dir=f"{folder}/log" if logged else None)

        def play(run: Callable[[int], None]) -> dict[str, harness.Timing]:
            programs = {"bare": bare_step.run, "train": run}
            return harness.take_turns(programs, rounds=rounds, steps=steps, warmup=args.warmup)

        total = args.warmup + rounds * steps + 1
        timings = turns.train_in_turns(distiller, batches, play, num_steps=total)
    ratio = timings["bare"].faster_than(timings["train"])[0]
    extra = [
        (t - b) * 1e6
        for t, b in zip(timings["train"].seconds, timings["bare"].seconds, strict=True)
    ]
    return {
        **timings["bare"].columns("bare "),
        **timings["train"].columns("train "),
        "overhead µs": harness.quantile(extra, 0.5),
        "overhead %": (ratio - 1) * 100,
    }


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], rounds=7, steps=2)
    parser.add_argument("--only", choices=["tiny", "bert"], help="one of the two")
    parser.add_argument("--tiny-steps", type=int, default=2000, help="steps in a turn, tiny model")
    parser.add_argument("--student", choices=["T6", "T3"], default="T3")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.steps, args.tiny_steps, args.length = 2, 1, 50, 8
    rows = []
    if args.only != "bert":
        batches = bare.tiny_batches()
        step = bare.tiny(batches)
        for logged in (False, True):
            row = compare(
                bare.tiny_distiller, step, batches, logged, args, args.rounds, args.tiny_steps
            )
            rows.append({"work": "tiny", "log_dir": "tensorboard" if logged else "none", **row})
    if args.only != "tiny":
        work = turns.work(args.student, args.smoke)
        vocabulary = work.teacher["vocab_size"]
        batches = [
            workloads.make_batch(vocabulary, args.batch, args.length, seed=i) for i in range(4)
        ]

        def make(**config: Any) -> Any:
            return workloads.jax_distiller(work, **config)

        row = compare(make, bare.bert(work, batches), batches, False, args, args.rounds, args.steps)
        rows.append({"work": f"BERT-base → {work.name}", "log_dir": "none", **row})
    columns = ["work", "log_dir", "bare ms", "train ms", "overhead µs", "overhead %"]
    harness.show(rows, columns)
    print(harness.save(args, rows))


if __name__ == "__main__":
    main()
