"""What does each loss cost, with its gradient, beside TextBrewer's, as length and width grow?

Each loss is timed alone: forward, and backward to the student's side, with a mask over the batch.
Memory is what the loss needs beside its inputs: of the compiled program here, the peak of what
torch's allocator handed out there.

    python benchmarks/losses.py
    python benchmarks/losses.py --lengths 128 256 512 1024 --plot
"""

import argparse
from collections.abc import Callable
from typing import Any

import harness
import numpy as np

LENGTH, WIDTH = 128, 768
HEADS = 12
# A loss's name in MATCH_LOSS_MAP or KD_LOSS_MAP, and the kind of its inputs.
LOSSES = {
    "ce": "logits",
    "mse": "logits",
    "hidden_mse": "hidden",
    "cos": "hidden",
    "pkd": "hidden",
    "fsp": "pair",
    "nst": "pair",
    "attention_mse": "attention",
    "attention_mse_sum": "attention",
    "attention_ce": "attention",
    "attention_ce_mean": "attention",
}


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], rounds=9)
    add = parser.add_argument
    add("--losses", nargs="+", default=list(LOSSES), choices=LOSSES)
    add("--lengths", nargs="+", type=int, default=[64, 128, 256, 512])
    add("--widths", nargs="+", type=int, default=[192, 384, 768])
    add("--batch", type=int, default=8)
    add("--device", default="cpu", choices=("cpu", "gpu"))
    add("--no-torch", action="store_true", help="time jaxbrewer's alone")
    args = parser.parse_args()
    length, width = LENGTH, WIDTH
    if args.smoke:
        args.lengths, args.widths, args.batch = [4, 8], [12], 2
        args.rounds, args.warmup, length, width = 2, 1, 8, 12
    rows = []
    for name in args.losses:
        sizes = [(each, width) for each in args.lengths]
        if LOSSES[name] != "attention":
            sizes += [(length, each) for each in args.widths]
        for size in dict.fromkeys(sizes):
            rows.append(measure(args, name, *size))
    harness.show(rows, [column for column in rows[0] if not column.endswith(("_q1", "_q3"))])
    harness.save(args, rows)
    if args.plot:
        draw(args, rows, width)


def measure(args: argparse.Namespace, name: str, length: int, width: int) -> harness.Row:
    """One row: a loss at one size."""
    inputs = make_inputs(LOSSES[name], args.batch, length, width)
    run, memory = jax_program(name, inputs, args.device)
    programs, megabytes = {"jaxbrewer": run}, {"jaxbrewer": memory}
    if not args.no_torch:
        programs["textbrewer"], megabytes["textbrewer"] = torch_program(name, inputs, args.device)
    timings = harness.take_turns(programs, rounds=args.rounds, steps=args.steps, warmup=args.warmup)
    row: harness.Row = {"loss": name, "length": length, "width": width}
    for program, timing in timings.items():
        row |= timing.columns(f"{program} ")
    if "textbrewer" in timings:
        row["× textbrewer"] = timings["jaxbrewer"].faster_than(timings["textbrewer"])[0]
    return row | {f"{program} MB": memory for program, memory in megabytes.items()}


def make_inputs(kind: str, batch: int, length: int, width: int) -> tuple[Any, Any, Any]:
    """Student's side, teacher's side and mask, as numpy; logits have ``width`` classes."""
    rng = np.random.default_rng(0)
    lengths = np.linspace(length // 2, length, batch).astype(int)
    mask = (np.arange(length) < lengths[:, None]).astype(np.float32)
    shape = (batch, HEADS, length, length) if kind == "attention" else (batch, length, width)
    if kind == "logits":
        shape, mask = (batch * length, width), None

    def side() -> Any:
        if kind == "pair":
            return [rng.normal(size=shape).astype(np.float32) for _ in range(2)]
        return rng.normal(size=shape).astype(np.float32)

    return side(), side(), mask


def jax_program(name: str, inputs: tuple[Any, Any, Any], device: str) -> tuple[harness.Run, float]:
    """jaxbrewer's loss with its gradient, and its memory in MB."""
    import jax

    import jaxbrewer
    from jaxbrewer.machine.devices import resolve_device

    loss = (jaxbrewer.KD_LOSS_MAP | jaxbrewer.MATCH_LOSS_MAP)[name]
    given = jax.device_put(inputs, resolve_device(device))
    more = {"mask": given[2]} if given[2] is not None else {}
    step = jax.jit(jax.value_and_grad(lambda S, T: loss(S, T, **more)))
    compiled = step.lower(*given[:2]).compile()
    analysis = compiled.memory_analysis()

    def run(steps: int) -> None:
        for _ in range(steps):
            value, _ = compiled(*given[:2])
        value.block_until_ready()

    return run, (analysis.temp_size_in_bytes + analysis.output_size_in_bytes) / 1e6


def torch_program(
    name: str, inputs: tuple[Any, Any, Any], device: str
) -> tuple[harness.Run, float]:
    """TextBrewer's loss with its gradient, and its memory in MB."""
    import torch
    from textbrewer.presets import KD_LOSS_MAP, MATCH_LOSS_MAP

    harness.set_torch_threads()
    place = "cuda" if device == "gpu" else "cpu"
    loss = (KD_LOSS_MAP | MATCH_LOSS_MAP)[name]

    def tensors(side: Any, grad: bool) -> Any:
        if isinstance(side, list):
            return [tensors(each, grad) for each in side]
        return torch.as_tensor(side, device=place).requires_grad_(grad)

    S, T = tensors(inputs[0], True), tensors(inputs[1], False)
    more = {} if inputs[2] is None else {"mask": tensors(inputs[2], False)}
    leaves = S if isinstance(S, list) else [S]

    def run(steps: int) -> None:
        for _ in range(steps):
            for leaf in leaves:
                leaf.grad = None
            loss(S, T, **more).backward()
        if place == "cuda":
            torch.cuda.synchronize()

    return run, peak_megabytes(run, leaves, place)


def peak_megabytes(run: Callable[[int], None], leaves: list[Any], place: str) -> float:
    """The most that torch's allocator held at a time during a step, beyond what it held before."""
    import torch

    run(1)
    for leaf in leaves:
        leaf.grad = None
    if place == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run(1)
        return (torch.cuda.max_memory_allocated() - before) / 1e6
    with torch.profiler.profile(profile_memory=True, record_shapes=False) as profile:
        run(1)
    held = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak / 1e6


def draw(args: argparse.Namespace, rows: list[harness.Row], width: int) -> None:
    """The time of each loss as the length grows."""
    programs = ("jaxbrewer",) if args.no_torch else ("jaxbrewer", "textbrewer")
    for program in programs:
        curves = {}
        for name in args.losses:
            mine = [row for row in rows if row["loss"] == name and row["width"] == width]
            xs = [row["length"] for row in mine]
            curves[name] = xs, [row[f"{program} ms"] for row in mine]
        harness.plot(args.out / f"losses_{program}.png", curves, "length", "ms")


if __name__ == "__main__":
    main()
