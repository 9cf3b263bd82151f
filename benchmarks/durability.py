"""What do the guard against numbers that are not finite, and the digests of a checkpoint, cost?

The step of BERT-base to a student is compiled as it is, and with the guard taken out of it; both take
turns, and the compiler says what each reads and writes, and what scratch memory it needs. Then the
state of that step is saved with digests and without, in turn, until all is on disk.

    python benchmarks/durability.py              # some five minutes on two cores
"""

import contextlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

import harness
import jax
import jax.numpy as jnp
import workloads

from jaxbrewer.step import guard, program
from jaxbrewer.training import checkpoints

GUARD = ["student", "bare ms", "guarded ms", "guard %", "guard %_q1", "guard %_q3", "bytes %",
         "scratch MB more"]  # fmt: skip
DIGESTS = ["student", "state MB", "digests ms", "bare save ms", "save ms", "digests %", "digests %_q1",
           "digests %_q3"]  # fmt: skip


@contextlib.contextmanager
def without_guard() -> Iterator[None]:
    """What is traced meanwhile looks at no number, and keeps no old one."""

    def is_fine(*trees: Any) -> jax.Array:
        return jnp.bool_(True)

    changes = (
        (guard, "is_finite", is_fine),
        (guard, "stays_finite", is_fine),
        (guard, "unless", lambda held, update, old: update(old)),
        (program, "guarded", lambda old, new, finite: (new, jnp.int32(guard.GOOD))),
    )
    with contextlib.ExitStack() as back:
        for place, name, value in changes:
            back.callback(setattr, place, name, getattr(place, name))
            setattr(place, name, value)
        yield


def percent(bare: harness.Timing, whole: harness.Timing) -> tuple[float, float, float]:
    """By how much the whole takes longer: median and quartiles over rounds."""
    median, low, high = (100 * (ratio - 1) for ratio in bare.faster_than(whole))
    return median, low, high


def guard_row(args: Any, work: workloads.Work) -> tuple[harness.Row, workloads.JaxStep]:
    """What the guard costs; and the guarded step."""
    batch = workloads.make_batch(work.teacher["vocab_size"], args.batch, args.length)

    def make() -> workloads.JaxStep:
        return workloads.JaxStep(workloads.jax_distiller(work, device=args.device), batch)

    guarded = make()
    with without_guard():
        bare = make()
    both = {"bare": bare.run, "guarded": guarded.run}
    timings = harness.take_turns(
        both, rounds=args.rounds, steps=args.steps, warmup=args.warmup, lead=args.lead
    )
    bytes_of = [step.compiled.cost_analysis()["bytes accessed"] for step in (bare, guarded)]
    scratch = [step.compiled.memory_analysis().temp_size_in_bytes for step in (bare, guarded)]
    median, low, high = percent(timings["bare"], timings["guarded"])
    row = {
        "student": work.name,
        **timings["bare"].columns("bare "),
        **timings["guarded"].columns("guarded "),
        "guard %": median,
        "guard %_q1": low,
        "guard %_q3": high,
        "bytes %": 100 * (bytes_of[1] / bytes_of[0] - 1),
        "scratch MB more": (scratch[1] - scratch[0]) / 1e6,
    }
    return row, guarded


class Saves:
    """Saves of one state, with digests or without.

    Attributes:
        seconds: that each computation of digests took.
    """

    def __init__(self, folder: str, state: Any):
        self._checkpoints = checkpoints.Checkpoints(folder, resume=False, max_to_keep=1)
        self._state = state
        self._step = 0
        self.seconds: list[float] = []

    def run(self, steps: int, *, is_digested: bool) -> None:
        """Saves so many times, each until all is on disk."""
        whole = checkpoints.digests
        checkpoints.digests = self._timed(whole) if is_digested else lambda items: {}
        try:
            for _ in range(steps):
                self._step += 1
                self._checkpoints.save(self._step, self._state, {})
                self._checkpoints.wait()
        finally:
            checkpoints.digests = whole

    def _timed(self, digests: Any) -> Any:
        def run(items: Any) -> Any:
            start = time.perf_counter()
            found = digests(items)
            self.seconds.append(time.perf_counter() - start)
            return found

        return run

    def close(self) -> None:
        """Ends the background threads."""
        self._checkpoints.close()


def digests_row(args: Any, work: workloads.Work, state: Any) -> harness.Row:
    """What the digests cost a save."""
    with tempfile.TemporaryDirectory() as folder:
        saves = Saves(folder, state)
        timings = harness.take_turns(
            {
                "bare": lambda steps: saves.run(steps, is_digested=False),
                "whole": lambda steps: saves.run(steps, is_digested=True),
            },
            rounds=args.saves,
            warmup=1,
        )
        saves.close()
    median, low, high = percent(timings["bare"], timings["whole"])
    arrays = (state.params, state.model_state, state.opt_state)
    digests = harness.Timing(tuple(saves.seconds[1:]))  # the first compiles
    return {
        "student": work.name,
        "state MB": sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(arrays)) / 1e6,
        **digests.columns("digests "),
        "digests first ms": 1e3 * saves.seconds[0],
        **timings["bare"].columns("bare save "),
        **timings["whole"].columns("save "),
        "digests %": median,
        "digests %_q1": low,
        "digests %_q3": high,
    }


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], rounds=9, steps=2)
    parser.add_argument("--student", default="T3", choices=workloads.MATCHED)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--lead", type=int, default=1, help="steps of a turn that are not timed")
    parser.add_argument("--saves", type=int, default=7, help="turns of saves")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.rounds, args.steps, args.saves = 2, 16, 2, 1, 2
    work = workloads.work(args.student, args.smoke)
    guard_cost, step = guard_row(args, work)
    harness.show([guard_cost], GUARD)
    digests_cost = digests_row(args, work, step.state)
    harness.show([digests_cost], DIGESTS)
    print(harness.save(args, [guard_cost, digests_cost]))


if __name__ == "__main__":
    main()
