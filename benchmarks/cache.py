"""When does caching the teacher's results pay?

The same batches of BERT-base to T3 are trained with the teacher run each step, and with its results
cached: in host memory or on disk, in float32 or float16. All take turns; every timed step is one of
a second or later epoch. `first pass s` is what filling the cache takes for these batches, `pays
after` the epochs from which on the cached run, first pass included, is ahead. On disk, reading is
from the page cache where that holds it, as it does here by default.

    python benchmarks/cache.py          # some five minutes on two cores
"""

import os
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import jax
import turns
import workloads

from jaxbrewer.training import teacher_cache as caching

WAYS = {
    "none": {},
    "memory float32": {"is_caching_logits": True},
    "memory float16": {"is_caching_logits": True, "cache_dtype": "float16"},
    "disk float32": {"is_caching_logits": True, "cache_dir": "cache-32"},
    "disk float16": {"is_caching_logits": True, "cache_dir": "cache-16", "cache_dtype": "float16"},
}


class Filled:
    """Times every `caching.build`, and weighs what it made.

    Attributes:
        passes: for each, the seconds it took and the bytes it holds.
    """

    def __init__(self) -> None:
        self.passes: list[tuple[float, int]] = []
        self._build = caching.build

    def __enter__(self) -> "Filled":
        caching.build = self._timed
        return self

    def __exit__(self, *exception: Any) -> None:
        caching.build = self._build

    def _timed(self, *args: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        loader = self._build(*args, **keywords)
        seconds = time.perf_counter() - start
        if (folder := keywords.get("folder")) is not None:
            size = sum(file.stat().st_size for file in Path(folder).iterdir())
        else:
            size = sum(x.nbytes for x in jax.tree.leaves([batch.results for batch in loader]))
        self.passes.append((seconds, size))
        return loader


def make(args: Any, job: turns.Job, way: str, folder: str) -> Any:
    """A distiller that caches in one of the ways."""
    options = dict(WAYS[way])
    if "cache_dir" in options:
        options["cache_dir"] = os.path.join(folder, str(options["cache_dir"]))
    return job.distiller(
        options,
        output_dir=os.path.join(folder, way),
        device=args.device,
        ckpt_epoch_frequency=turns.NEVER,
        **harness.precision(args),
    )


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], rounds=5, steps=2)
    parser.add_argument("--student", choices=list(workloads.MATCHED), default="T3")
    parser.add_argument("--ways", nargs="+", choices=list(WAYS), default=list(WAYS))
    parser.add_argument("--batches", type=int, default=6, help="batches in an epoch")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    harness.add_precision(parser)
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.steps, args.batches, args.batch, args.length = 2, 1, 2, 2, 8
        args.ways = ["none", "memory float16", "disk float32"]
    if args.ways[0] != "none":
        args.ways.insert(0, "none")
    job = turns.job(args.student, args.smoke)
    loader = [
        workloads.make_batch(job.vocab_size, args.batch, args.length, seed=seed)
        for seed in range(args.batches)
    ]
    with tempfile.TemporaryDirectory() as folder:
        rows = compare(args, job, loader, folder)
    harness.show(rows)
    print(harness.save(args, rows))


def compare(args: Any, job: turns.Job, loader: list[Any], folder: str) -> list[harness.Row]:
    """A row for each way."""
    epochs = (args.warmup + args.rounds * args.steps) // args.batches + 2
    jobs = {
        way: (make(args, job, way, folder), loader, {"num_epochs": epochs}) for way in args.ways
    }

    def play(runs: Any) -> dict[str, harness.Timing]:
        return harness.take_turns(runs, rounds=args.rounds, steps=args.steps, warmup=args.warmup)

    with Filled() as filled:
        timings = turns.all_in_turns(jobs, play)
    passes = dict(zip(args.ways[1:], filled.passes, strict=True))
    plain = timings["none"]
    rows = []
    for way, timing in timings.items():
        first_pass, size = passes.get(way, (0.0, 0))
        ratio, low, high = timing.faster_than(plain)
        saved = (plain.median - timing.median) * args.batches
        rows.append(
            {
                "cache": way,
                "steps/s": 1 / timing.median,
                **timing.columns(),
                "× uncached": ratio,
                "× q1": low,
                "× q3": high,
                "first pass s": first_pass,
                "MiB a batch": size / args.batches / 2**20,
                "pays after": first_pass / saved if saved > 0 and first_pass else None,
            }
        )
    return rows


if __name__ == "__main__":
    main()
