"""What does ``distiller.train`` cost over a step written by hand?

The loop of ``train`` and the bare loop take turns on the same batches in host memory: BERT-base to
T3, and a tiny model of 20 arrays, whose step computes for some microseconds only, so that nothing
but overhead is left. ``train`` does all it does for a user: owns and checks every batch, moves the
schedule, shows a progress bar, watches for numbers that are not finite, and writes tensorboard
files where ``log_dir`` is set. `loss gap` is how far apart the two end, where train logs its losses.

    python benchmarks/overhead.py                # both, in some five minutes on two cores
    python benchmarks/overhead.py --only tiny
"""

import functools
import tempfile
from collections.abc import Callable
from typing import Any

import bare
import harness
import turns
import workloads

from jaxbrewer.training import read_scalars


def compare(
    make_job: Callable[[], turns.Job],
    make_bare: Callable[[list[Any]], bare.BareStep],
    batches: list[Any],
    logged: bool,
    args: Any,
    steps: int,
) -> dict[str, Any]:
    """One row: bare and whole, in turn."""
    bare_step = make_bare(batches)
    total = args.warmup + args.rounds * steps

    def play(run: Callable[[int], None]) -> dict[str, harness.Timing]:
        both = {"bare": bare_step.run, "train": run}
        return harness.take_turns(both, rounds=args.rounds, steps=steps, warmup=args.warmup)

    with tempfile.TemporaryDirectory() as folder:
        distiller = make_job().distiller(
            output_dir=f"{folder}/out",
            log_dir=f"{folder}/log" if logged else None,
            device=args.device,
        )
        timings = turns.train_in_turns(distiller, batches, play, num_steps=total + 1)
        losses = read_scalars(f"{folder}/log").get("scalar/total_loss", {})
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
        "loss gap": abs(losses[total - 1] / float(bare_step.loss) - 1) if losses else None,
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
        vocabulary = turns.TINY_VOCABULARY
        batches = [workloads.make_batch(vocabulary, 4, 8, seed=seed) for seed in range(4)]
        for logged in (False, True):
            row = compare(turns.tiny_job, bare.tiny, batches, logged, args, args.tiny_steps)
            rows.append({"work": "tiny", "log_dir": "tensorboard" if logged else "none", **row})
    if args.only != "tiny":
        work = turns.tiny_bert() if args.smoke else workloads.work(args.student)
        vocabulary = work.teacher["vocab_size"]
        batches = [
            workloads.make_batch(vocabulary, args.batch, args.length, seed=seed)
            for seed in range(4)
        ]
        make_job = functools.partial(turns.bert_job, work)
        make_bare = functools.partial(bare.bert, work)
        row = compare(make_job, make_bare, batches, False, args, args.steps)
        rows.append({"work": f"BERT-base → {work.name}", "log_dir": "none", **row})
    columns = ["work", "log_dir", "bare ms", "train ms", "overhead µs", "overhead %", "loss gap"]
    harness.show(rows, columns)
    print(harness.save(args, rows))


if __name__ == "__main__":
    main()
