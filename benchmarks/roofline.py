"""How close does a training step come to the machine's matrix products?

FLOPs are counted twice: by formula from the shapes, and from the compiled program; the script fails
where the two differ by more than 5%. (Not on a GPU, where most products are calls of a library, which
the program does not show.) The peak is measured: the best of some products, square ones
and those of the teacher's layers, in turn with the step, so that all meet the same machine. The
share of it is taken from the formula, which counts matrix products alone.

    python benchmarks/roofline.py
    python benchmarks/roofline.py --device gpu --half bfloat16 --batch 128
"""

import argparse
import math
import re
import sys
from typing import Any

import harness
import workloads

AGREE = 0.05


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], rounds=9)
    add = parser.add_argument
    add("--students", nargs="+", default=["T3", "T4-tiny"], choices=workloads.MATCHED)
    add("--batch", nargs="+", type=int, default=[8], help="batch sizes")
    add("--length", type=int, default=128, help="sequence length")
    add("--device", default="cpu", choices=("cpu", "gpu"))
    harness.add_precision(parser)
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.rounds, args.warmup = [2], 16, 2, 1
    rows = [
        measure(args, workloads.work(name, args.smoke), size)
        for name in args.students
        for size in args.batch
    ]
    harness.show(rows, [column for column in rows[0] if not column.endswith(("_q1", "_q3"))])
    harness.save(args, rows)
    if any(abs(row.get("program / formula", 1) - 1) > AGREE for row in rows):
        sys.exit("the formula and the compiled program count different FLOPs")


def measure(args: argparse.Namespace, work: workloads.Work, size: int) -> harness.Row:
    """One row: FLOPs by formula and in the program, time, rate and share of the peak."""
    distiller = workloads.jax_distiller(work, device=args.device, **harness.precision(args))
    batch = workloads.make_batch(work.teacher["vocab_size"], size, args.length)
    step = workloads.JaxStep(distiller, batch)
    formula = step_flops(work, size, args.length)
    analysis = step.compiled.cost_analysis()["flops"]
    counted: harness.Row = {}
    if args.device == "cpu":
        program = product_flops(step.compiled.as_text()) or analysis
        counted = {
            "GFLOP of products in the program": program / 1e9,
            "program / formula": program / formula,
            "GFLOP by XLA's cost analysis": analysis / 1e9,
        }
    side = 64 if args.smoke else 2048 if args.device == "cpu" else 8192
    width, inner = work.teacher["hidden_size"], work.teacher["intermediate_size"]
    tokens = size * args.length
    products = {
        shape: product(shape, args.half or "float32", args.device)
        for shape in ((side, side, side), (tokens, width, inner), (tokens, inner, width))
    }
    timings = harness.take_turns(
        {"step": step.run} | {str(shape): run for shape, (run, _) in products.items()},
        rounds=args.rounds,
        steps=args.steps,
        warmup=args.warmup,
    )
    peaks = {shape: flops / timings[str(shape)].median for shape, (_, flops) in products.items()}
    best = max(peaks, key=lambda shape: peaks[shape])
    times = timings["step"].faster_than(timings[str(best)])
    share = [formula / products[best][1] * ratio for ratio in times]
    return {
        "student": work.name,
        "batch": size,
        "half": args.half,
        "level": args.level if args.half else "O0",
        "GFLOP by formula": formula / 1e9,
        **counted,
        **timings["step"].columns(),
        "GFLOP/s": formula / timings["step"].median / 1e9,
        "peak GFLOP/s": peaks[best] / 1e9,
        "of": "×".join(map(str, best)),
        "share of the peak": share[0],
        "share_q1": share[1],
        "share_q3": share[2],
    }


def step_flops(work: workloads.Work, size: int, length: int) -> float:
    """The matrix products of a step; 2·m·k·n each.

    A layer has four products of width × width, two of width × inner width, and two of attention.
    Backward takes twice what forward does. The classifier's products, of one token, are counted;
    lookups and everything element by element are not.
    """
    tokens = size * length

    def layer(sizes: dict[str, Any]) -> float:
        width, inner = sizes["hidden_size"], sizes["intermediate_size"]
        dense = 2 * tokens * (4 * width**2 + 2 * width * inner)
        return dense + 2 * 2 * size * length**2 * width

    def head(sizes: dict[str, Any]) -> float:
        return 2 * size * (sizes["hidden_size"] ** 2 + 2 * sizes["hidden_size"])

    flops = 0.0
    for sizes, passes in ((work.teacher, 1), (work.student, 3)):
        flops += passes * (sizes["num_hidden_layers"] * layer(sizes) + head(sizes))
    for match in work.matches:
        if "proj" in match:
            _, width_in, width_out = match["proj"]
            flops += 3 * 2 * tokens * width_in * width_out
        if match["loss"] == "mmd":
            gram = 2 * size * length**2
            flops += gram * (work.teacher["hidden_size"] + 3 * work.student["hidden_size"])
    return flops


def product_flops(program: str) -> float:
    """The matrix products in an HLO module's text, those inside fusions too; 0 if it has none."""
    flops = 0.0
    for computation in program.split("\n}"):
        defined = re.findall(r"%?([\w.\-]+) = \(?\w+\[([\d,]*)\][^ ]* ([\w\-]+)\((.*)", computation)
        shapes = {name: numbers(shape) for name, shape, _, _ in defined}
        for _, shape, operation, rest in defined:
            if operation == "dot":
                left = shapes[re.search(r"%([\w.\-]+)", rest).group(1)]
                axes = numbers(re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest).group(1))
                flops += 2 * math.prod(numbers(shape)) * math.prod(left[axis] for axis in axes)
    return flops


def numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]


def product(shape: tuple[int, int, int], dtype: str, device: str) -> tuple[harness.Run, float]:
    """A program that multiplies matrices, rows × inner by inner × columns; FLOPs of its step."""
    import jax

    from jaxbrewer.machine.devices import resolve_device

    keys = jax.random.split(jax.random.key(0))
    place = resolve_device(device)
    rows, inner, columns = shape
    left, right = (
        jax.device_put(jax.random.normal(key, sides, dtype), place)
        for key, sides in zip(keys, ((rows, inner), (inner, columns)), strict=True)
    )
    multiply = jax.jit(lambda left, right: left @ right)
    repeats = max(1, round(2048**3 / math.prod(shape)))  # or a short product is mostly its start

    def run(steps: int) -> None:
        for _ in range(steps * repeats):
            made = multiply(left, right)
        made.block_until_ready()

    return run, 2.0 * math.prod(shape) * repeats


if __name__ == "__main__":
    main()
