"""Are a device's numbers those of the CPU, do they repeat, and does a resumed run end in the same bits?

BERT-base to a student. `agree`: losses of the first steps in float32 products, dropout off, beside the
CPU's. `repeat`: two runs from one start, dropout on, for each level of precision; how many arrays of the
state differ in a bit, and by how much at most. `resume`: ``distiller.train`` to its end, and again from a
checkpoint in its middle.

    python benchmarks/same_bits.py --device gpu
    python benchmarks/same_bits.py --device gpu --only repeat --free    # without deterministic operations
"""

import argparse
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import harness
import numpy as np
import workloads

FREE = "--xla_gpu_deterministic_ops=false"


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], steps=10)
    add = parser.add_argument
    add("--only", nargs="+", default=["agree", "repeat", "resume"], help="some of the three")
    add("--student", default="T3", choices=workloads.MATCHED)
    add("--batch", type=int, default=8)
    add("--length", type=int, default=128, help="sequence length")
    add("--device", default="cpu", choices=("cpu", "gpu"))
    add("--levels", nargs="+", default=["O0", "O1", "O2"], choices=("O0", "O1", "O2", "O3"))
    add("--half", default="bfloat16", choices=("bfloat16", "float16"))
    add("--free", action="store_true", help=f"set {FREE}")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.steps, args.levels = 2, 16, 4, ["O2"]
    if args.free:  # read when JAX starts
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FREE}"
    rows: list[harness.Row] = []
    for measure, levels in ((agree, ["O0"]), (repeat, args.levels), (resume, args.levels)):
        for level in levels if measure.__name__ in args.only else ():
            rows.append({"what": measure.__name__, "level": level, **measure(args, level)})
            harness.save(args, rows)  # each time, or a run that is cut short leaves nothing
    harness.show(rows)


def precision(args: argparse.Namespace, level: str) -> dict[str, Any]:
    """The config's fields for a level."""
    if level == "O0":
        return {}
    return {"fp16": True, "fp16_opt_level": level, "half_dtype": args.half}


def batches(args: argparse.Namespace, work: workloads.Work) -> list[dict[str, np.ndarray]]:
    """A batch a step."""
    return [
        workloads.make_batch(work.teacher["vocab_size"], args.batch, args.length, seed=seed)
        for seed in range(args.steps)
    ]


def agree(args: argparse.Namespace, level: str) -> harness.Row:
    """The losses of three steps on both."""
    import jax

    work = workloads.without_dropout(workloads.work(args.student, args.smoke))
    losses = {}
    with jax.default_matmul_precision("highest"):
        for device in ("cpu", args.device):
            losses[device] = []
            with jax.default_device(jax.devices(device)[0]):
                distiller = workloads.jax_distiller(work, device=device, **precision(args, level))
                step = workloads.JaxStep(distiller, batches(args, work)[0])
                for _ in range(3):
                    step.run(1)
                    losses[device].append(np.asarray(step.metrics)[0])
            if step.metrics.devices() != {jax.devices(device)[0]}:
                raise RuntimeError(f"the step ran on {step.metrics.devices()}, not on the {device}")
    ours, there = (np.asarray(losses[device], np.float64) for device in ("cpu", args.device))
    gap = np.max(np.abs(there / ours - 1))
    return {"largest relative gap": float(gap)}


def repeat(args: argparse.Namespace, level: str) -> harness.Row:
    """The same steps twice."""
    import jax

    from jaxbrewer.machine.devices import resolve_device

    place = resolve_device(args.device)
    work = workloads.work(args.student, args.smoke)
    given = batches(args, work)
    distiller = workloads.jax_distiller(work, device=args.device, **precision(args, level))
    step = workloads.JaxStep(distiller, given[0])
    ends = []
    for _ in range(2):
        step.state = jax.device_put(step.program.init(0), place)
        start = time.perf_counter()
        for batch in given:
            step.batch = jax.device_put(batch, place)
            step.run(1)
        seconds = time.perf_counter() - start
        ends.append(jax.tree.map(np.asarray, (step.state.params, step.state.opt_state)))
    return {"free": args.free, "ms": 1e3 * seconds / args.steps, **differences(*ends)}


def resume(args: argparse.Namespace, level: str) -> harness.Row:
    """A run to its end, and one that goes on from its middle."""
    work = workloads.work(args.student, args.smoke)
    given = batches(args, work)
    with tempfile.TemporaryDirectory() as folder:
        ends = []
        for _ in range(2):
            ends.append(train(args, work, given, level, folder))
            shutil.rmtree(Path(folder) / f"gs{args.steps}")
    return {"free": args.free, **differences(*ends)}


def train(
    args: argparse.Namespace, work: workloads.Work, given: list[Any], level: str, folder: str
) -> Any:
    """Trains, from a checkpoint if there is one; the student's arrays at the end."""
    import jax
    from flax import nnx

    distiller = workloads.jax_distiller(
        work,
        device=args.device,
        output_dir=folder,
        ckpt_steps=args.steps // 2,
        resume=True,
        **precision(args, level),
    )
    with distiller:
        distiller.train(workloads.jax_optimizer(), given, num_steps=args.steps)
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(distiller.model_S, nnx.Param)))


def differences(one: Any, other: Any) -> harness.Row:
    """How many arrays differ in a bit, of how many, and the largest difference of a number."""
    import jax

    pairs = list(zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True))
    unequal = [(a, b) for a, b in pairs if a.tobytes() != b.tobytes()]
    gaps = [np.max(np.abs(a.astype(np.float64) - b.astype(np.float64))) for a, b in unequal]
    return {
        "arrays": len(pairs),
        "differ": len(unequal),
        "largest difference": float(max(gaps, default=0.0)),
    }


if __name__ == "__main__":
    main()
