"""How much sooner does a second run start, with the compiled programs of the first on disk?

Each measurement is a process of its own. `cold` has an empty cache folder, `warm` the same folder
again. Timed in the process: lowering and compiling the train step as `distiller.train` compiles it,
then its first run.

    python benchmarks/compile.py        # BERT-base to T3; about two minutes on two cores
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import jax
import numpy as np
import turns
import workloads

from jaxbrewer.machine.devices import resolve_device
from jaxbrewer.machine.programs import keep_programs
from jaxbrewer.preflight import prepare


def measure(args: Any) -> harness.Row:
    """What one process takes, in seconds."""
    folder = keep_programs()
    job = turns.job(args.student, args.smoke)
    batch = workloads.make_batch(job.vocab_size, args.batch, args.length)
    distiller = job.distiller(device=args.device)
    start = time.perf_counter()
    with distiller:
        programs = prepare(distiller.job(), {"": batch}, workloads.jax_optimizer()).programs
    traced = time.perf_counter()
    program, device = programs[""], resolve_device(args.device)
    state = jax.device_put(program.init(0), device)
    teacher = jax.device_put(program.teacher.variables, device)
    jax.block_until_ready((state, teacher))
    placed = time.perf_counter()
    lowered = program.compiled.lower(state, teacher, batch, np.ones(3, np.float32))
    lower = time.perf_counter()
    step = lowered.compile()
    compiled = time.perf_counter()
    _, metrics = jax.block_until_ready(step(state, teacher, batch, np.ones(3, np.float32)))
    ran = time.perf_counter()
    return {
        "folder": str(folder),
        "check s": traced - start,
        "lower s": lower - placed,
        "compile s": compiled - lower,
        "first step s": ran - compiled,
        "loss": float(metrics[0]),
    }


def in_a_process(args: Any, cache: Path) -> harness.Row:
    """Runs `measure` in a new process whose cache folder lies in `cache`."""
    kept = {k: v for k, v in os.environ.items() if "COMPILATION_CACHE" not in k}
    done = subprocess.run(
        [sys.executable, __file__, "--one", *sys.argv[1:]],
        env={**kept, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the measured process failed:\n{done.stderr}")
    if done.stderr.strip():
        print(done.stderr, file=sys.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], rounds=3)
    parser.add_argument("--student", choices=list(workloads.MATCHED), default="T3")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", action="store_true", help="measure in this process and print JSON")
    args = parser.parse_args()
    if args.smoke:
        args.rounds, args.batch, args.length = 1, 2, 8
    if args.one:
        print(json.dumps(measure(args)))
        return
    found: dict[str, list[harness.Row]] = {"cold": [], "warm": []}
    for _ in range(args.rounds):
        with tempfile.TemporaryDirectory() as folder:
            for name in found:
                found[name].append(in_a_process(args, Path(folder)))
    columns = ["check s", "lower s", "compile s", "first step s"]
    rows = [
        {"cache": name, **{c: harness.quantile([r[c] for r in rows], 0.5) for c in columns}}
        for name, rows in found.items()
    ]
    ratios = [
        (cold["lower s"] + cold["compile s"]) / (warm["lower s"] + warm["compile s"])
        for cold, warm in zip(*found.values(), strict=True)
    ]
    same = len({row["loss"] for rows in found.values() for row in rows}) == 1
    harness.show(rows)
    print(f"lowering + compiling is {harness.quantile(ratios, 0.5):.1f} times as fast when warm")
    print("the losses are the same bits" if same else "THE LOSSES DIFFER")
    print(harness.save(args, rows, ratios=ratios, same_losses=same, runs=found))


if __name__ == "__main__":
    main()
