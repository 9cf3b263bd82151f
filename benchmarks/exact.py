"""What does exact accumulation cost beside the mean of means?

Windows of accumulated micro-batches, sentences as long as SST-2's padded to one length, as
``distiller.train`` runs them: with the counts of each micro-batch and its shares, and without, in turn.

    python benchmarks/exact.py
"""

import tempfile
import warnings
from typing import Any

import harness
import workloads


class Windows:
    """The optimizer steps of a distiller, each of some micro-batches, without its loop."""

    def __init__(
        self, work: workloads.Work, batches: list[Any], device: str, mode: str, folder: str
    ):
        import jax

        from jaxbrewer.machine.devices import resolve_device
        from jaxbrewer.machine.placement import OneDevice
        from jaxbrewer.preflight import prepare
        from jaxbrewer.zoo import adaptor

        distiller = workloads.jax_distiller(
            work,
            device=device,
            output_dir=folder,
            gradient_accumulation_steps=len(batches),
            gradient_accumulation=mode,
        )
        distiller.adaptor_S = adaptor("sequence-classification", each=True)
        with distiller, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            job = distiller.job()
            programs = prepare(job, {"": batches[0]}, workloads.jax_optimizer()).programs
        self._program, self._batches = programs[""], batches
        place = OneDevice(resolve_device(device))
        self._step, self._count = place.compile(self._program), place.counter(self._program)
        self._teacher = place.teacher(self._program.teacher.variables)
        self._state = place.start(self._program, 0)
        self._is_exact = mode == "exact"
        self._metrics: Any = None
        self._ready = jax.block_until_ready

    def run(self, steps: int) -> None:
        """Trains so many windows and waits for the last."""
        from jaxbrewer.objective.counted import with_shares

        scheduled = self._program.objective.scheduled
        for _ in range(steps):
            rows: Any = [scheduled.row] * len(self._batches)
            if self._is_exact:
                counts = [self._count(self._state, self._teacher, b) for b in self._batches]
                rows = with_shares(scheduled.row, counts, ("",) * len(counts))
            for batch, row in zip(self._batches, rows, strict=True):
                self._state, self._metrics = self._step(self._state, self._teacher, batch, row)
        self._ready(self._metrics)


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], rounds=7)
    add = parser.add_argument
    add("--student", default="T3", choices=workloads.MATCHED)
    add("--batch", type=int, default=8, help="sentences in a micro-batch")
    add("--length", type=int, default=128)
    add("--accumulation", type=int, default=4, help="micro-batches in a window")
    add("--device", default="cpu", choices=("cpu", "gpu"))
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.accumulation, args.rounds, args.warmup = 2, 16, 2, 2, 1
    work = workloads.work(args.student, args.smoke)
    batches = [
        workloads.make_batch(
            work.teacher["vocab_size"],
            args.batch,
            args.length,
            workloads.draw_lengths(args.batch, args.length, seed=seed),
            seed,
        )
        for seed in range(args.accumulation)
    ]
    with tempfile.TemporaryDirectory() as folder:
        programs = {
            mode: Windows(work, batches, args.device, mode, folder).run
            for mode in ("means", "exact")
        }
        timings = harness.take_turns(
            programs, rounds=args.rounds, steps=args.steps, warmup=args.warmup
        )
    middle, low, high = timings["means"].faster_than(timings["exact"])
    row = {
        "student": args.student,
        "batch": args.batch,
        "accumulation": args.accumulation,
        **timings["means"].columns("means "),
        **timings["exact"].columns("exact "),
        "exact / means": middle,
        "exact / means_q1": low,
        "exact / means_q3": high,
    }
    harness.show([row], [column for column in row if not column.endswith(("_q1", "_q3"))])
    print(harness.save(args, [row]))


if __name__ == "__main__":
    main()
