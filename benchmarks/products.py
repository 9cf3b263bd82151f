"""How much of the teacher's forward pass is its products, by XLA's library and by torch's?

BERT-base on full sequences, in evaluation mode, its hidden states asked for; beside it the products
of its linear layers alone, on the same shapes. jaxbrewer and torch each do both, in turn, each in a
process of its own. Where a step is behind torch's, this tells whether the library of products is.

    python benchmarks/products.py --batch 8 32
"""

import argparse
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import harness
import numpy as np
import workloads

TEACHERS = ("jaxbrewer", "torch")
PRODUCTS = ("XLA's products", "torch's products")


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0], rounds=9)
    add = parser.add_argument
    add("--batch", nargs="+", type=int, default=[8], help="batch sizes")
    add("--length", type=int, default=128, help="sequence length")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length, args.rounds, args.warmup = [2], 16, 2, 1
    rows = []
    for size in args.batch:
        rows.append(measure(args, size))
        harness.save(args, rows)
    harness.show(rows, [column for column in rows[0] if not column.endswith(("q1", "q3"))])


def measure(args: argparse.Namespace, size: int) -> harness.Row:
    """A row of milliseconds, for one batch size."""
    made = {
        name: harness.Elsewhere(program, name, args.smoke, size, args.length)
        for name in (*TEACHERS, *PRODUCTS)
    }
    for each in made.values():
        each.ready()
    timings = harness.take_turns(
        made, rounds=args.rounds, steps=args.steps, warmup=args.warmup, lead=1
    )
    for each in made.values():
        each.close()
    row: harness.Row = {"batch": size}
    for name, each in timings.items():
        row |= each.columns(f"{name} ")
    for what, (ours, theirs) in {"forward": TEACHERS, "products": PRODUCTS}.items():
        middle, low, high = timings[ours].faster_than(timings[theirs])
        name = f"{what}, × torch"
        row |= {name: middle, f"{name} q1": low, f"{name} q3": high}
    return row


def program(name: str, smoke: bool, size: int, length: int) -> harness.Run:
    """One of the four, ready to run."""
    sizes = workloads.work("T3", smoke).teacher
    if name in PRODUCTS:
        make = xla_products if name == PRODUCTS[0] else torch_products
        return make(sizes, size * length)
    make_teacher = jax_teacher if name == "jaxbrewer" else torch_teacher
    return make_teacher(sizes, workloads.make_batch(sizes["vocab_size"], size, length))


def jax_teacher(sizes: dict[str, Any], batch: dict[str, np.ndarray]) -> harness.Run:
    import jax
    from flax import nnx

    from jaxbrewer.machine.memory import kept_memory
    from jaxbrewer.zoo import BertConfig, BertForSequenceClassification

    config = BertConfig(**sizes, output_hidden_states=True)
    model = BertForSequenceClassification(config, rngs=nnx.Rngs(0))
    model.eval()
    graph, state = nnx.split(model)

    @jax.jit
    def forward(state: Any, batch: Any) -> Any:
        outputs = nnx.merge(graph, state)(**batch)
        return outputs.logits, outputs.hidden_states

    batch = jax.device_put({name: batch[name] for name in batch if name != "labels"})
    return Repeated(lambda: jax.block_until_ready(forward(state, batch)), kept_memory("cpu"))


def torch_teacher(sizes: dict[str, Any], batch: dict[str, np.ndarray]) -> harness.Run:
    import torch

    harness.set_torch_threads()
    given = workloads.torch_batch(batch, "cpu")
    del given["labels"]
    teacher, _ = workloads.torch_models(workloads.Work("", sizes, sizes, ()), "cpu")

    def forward() -> None:
        with torch.no_grad():
            teacher(**given)

    return Repeated(forward)


def numbers(sizes: dict[str, Any], rows: int) -> tuple[np.ndarray, list[list[np.ndarray]]]:
    """Hidden states, and for each layer the matrices that they meet."""
    width, inner = sizes["hidden_size"], sizes["intermediate_size"]
    shapes = [(width, width)] * 4 + [(width, inner), (inner, width)]
    rng = np.random.default_rng(0)
    layers = [
        [rng.normal(0, shape[0] ** -0.5, shape).astype(np.float32) for shape in shapes]
        for _ in range(sizes["num_hidden_layers"])
    ]
    return rng.normal(size=(rows, width)).astype(np.float32), layers


def chain(x: Any, layers: Any) -> Any:
    """The products of all layers, one after the other."""
    for query, key, value, out, up, down in layers:
        x = (x @ query + x @ key + x @ value) @ out @ up @ down
    return x


def xla_products(sizes: dict[str, Any], rows: int) -> harness.Run:
    import jax

    from jaxbrewer.machine.memory import kept_memory

    given = jax.device_put(numbers(sizes, rows))
    products = jax.jit(chain)
    return Repeated(lambda: products(*given).block_until_ready(), kept_memory("cpu"))


def torch_products(sizes: dict[str, Any], rows: int) -> harness.Run:
    import torch

    harness.set_torch_threads()
    x, layers = numbers(sizes, rows)
    given = torch.from_numpy(x), [[torch.from_numpy(each) for each in layer] for layer in layers]

    def products() -> None:
        with torch.no_grad():
            chain(*given)

    return Repeated(products)


class Repeated:
    """A program that runs so many times; what it is given with ``memory`` is open as long as it lives."""

    def __init__(self, once: Callable[[], Any], memory: AbstractContextManager[Any] | None = None):
        self._once = once
        if memory is not None:
            opened = ExitStack()
            opened.enter_context(memory)
            weakref.finalize(self, opened.close)

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self._once()


if __name__ == "__main__":
    main()
