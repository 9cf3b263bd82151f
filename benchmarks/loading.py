"""Does a loader that takes its time hold up training?

A small encoder is trained from batches that are ready, and from a loader that needs some
milliseconds for each: waiting, as for a disk, or computing. The loop starts a step without waiting
for it and goes on to the next batch, up to `loop.LOOK_BACK` steps ahead of the device, so a loader
that needs less than a step should cost nothing. `threaded` reads the slow loader in a thread of its
own, some batches ahead: what a prefetching thread would add.

    python benchmarks/loading.py        # a minute on two cores
"""

import queue
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import harness
import numpy as np
import scaling
import turns


class Slow:
    """Batches, for each of which something is done first."""

    def __init__(self, batches: list[Any], first: Callable[[], None]):
        self.batches, self.first = batches, first

    def __iter__(self) -> Iterator[Any]:
        for batch in self.batches:
            self.first()
            yield batch


class Threaded:
    """A loader read in a thread, a few batches ahead."""

    def __init__(self, loader: Slow, ahead: int = 4):
        self.loader, self.ahead = loader, ahead

    def __iter__(self) -> Iterator[Any]:
        ready: queue.Queue = queue.Queue(self.ahead)

        def read() -> None:
            for batch in self.loader:
                ready.put(batch)
            ready.put(None)

        threading.Thread(target=read, daemon=True).start()
        while (batch := ready.get()) is not None:
            yield batch


def busy(seconds: float) -> None:
    """Computes in numpy for so long."""
    end = time.perf_counter() + seconds
    values = np.random.default_rng(0).normal(size=10_000)
    while time.perf_counter() < end:
        np.sort(values)


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], rounds=5, steps=20)
    parser.add_argument("--size", choices=list(scaling.SIZES), default="small")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--ms", type=float, default=50.0, help="what the slow loader needs")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.smoke:
        args.size, args.rounds, args.steps, args.ms, args.length = "tiny", 2, 5, 1.0, 8
    seconds = args.ms / 1e3
    with tempfile.TemporaryDirectory() as folder:
        jobs: dict[str, Any] = {}
        total = args.warmup + args.rounds * args.steps + 1
        ways: dict[str, Callable[[list[Any]], Any]] = {
            "ready": list,
            "waiting": lambda batches: Slow(batches, lambda: time.sleep(seconds)),
            "computing": lambda batches: Slow(batches, lambda: busy(seconds)),
            "waiting, threaded": lambda batches: Threaded(
                Slow(batches, lambda: time.sleep(seconds))
            ),
        }
        for name, way in ways.items():
            distiller, batches = scaling.job(args, "batch", args.batch, f"{folder}/{name}")
            jobs[name] = distiller, way(batches * total), {"num_steps": total}

        def play(runs: Any) -> dict[str, harness.Timing]:
            return harness.take_turns(
                runs, rounds=args.rounds, steps=args.steps, warmup=args.warmup
            )

        timings = turns.all_in_turns(jobs, play)
    ready = timings["ready"]
    rows = [
        {
            "loader": name,
            "needs ms": 0 if name == "ready" else args.ms,
            **timing.columns(),
            "× ready": 1 / timing.faster_than(ready)[0],
        }
        for name, timing in timings.items()
    ]
    harness.show(rows)
    print(harness.save(args, rows))


if __name__ == "__main__":
    main()
