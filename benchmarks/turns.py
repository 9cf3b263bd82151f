"""Runs some steps of ``distiller.train`` at a time, so that it can take turns with other programs."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import workloads

from jaxbrewer import loop, training
from jaxbrewer.streams import Micro

Play = Callable[[Callable[[int], None]], Any]

NEVER = 10**9  # an epoch or step at which a checkpoint may be due: it does not come


def work(name: str, smoke: bool) -> workloads.Work:
    """The work of that name; with ``smoke`` one that compiles in a second or two."""
    if not smoke:
        return workloads.work(name)
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": 50, "max_position_embeddings": 128}
    match = {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    grams = {**match, "layer_T": [2, 2], "layer_S": [1, 1], "loss": "mmd"}
    teacher, student = ({**sizes, "num_hidden_layers": layers} for layers in (2, 1))
    return workloads.Work(name, teacher, student, (match, grams))


def train_in_turns(distiller: Any, loader: Any, play: Play, **lengths: int) -> Any:
    """Starts ``train``, and once its loop is ready, hands ``play`` a function that runs steps of it.

    Args:
        distiller: what trains; its config should let no checkpoint fall due.
        loader: its batches.
        play: called with the function; what it returns is returned.
        lengths: ``num_steps`` or ``num_epochs``, no fewer than ``play`` will ask for.
    """
    found = []

    class Turns(loop.Loop):
        def run(self, events: Iterator[Any]) -> None:
            run = super().run
            found.append(play(lambda steps: run(_steps(events, steps))))

    before, training.Loop = training.Loop, Turns
    try:
        with distiller:
            distiller.train(workloads.jax_optimizer(), loader, **lengths)
    finally:
        training.Loop = before
    return found[0]


def all_in_turns(jobs: Mapping[str, tuple[Any, Any, dict[str, int]]], play: Callable) -> Any:
    """The same with several distillers: ``play`` gets name → the function that runs steps of it.

    Args:
        jobs: name → distiller, loader and lengths; see `train_in_turns`.
        play: called once all loops are ready.
    """
    runs: dict[str, Callable[[int], None]] = {}
    waiting = list(jobs.items())

    def start() -> Any:
        if not waiting:
            return play(runs)
        name, (distiller, loader, lengths) = waiting.pop(0)

        def ready(run: Callable[[int], None]) -> Any:
            runs[name] = run
            return start()

        return train_in_turns(distiller, loader, ready, **lengths)

    return start()


def _steps(events: Iterator[Any], count: int) -> Iterator[Any]:
    """Events up to the next so many batches."""
    for event in events:
        yield event
        count -= isinstance(event, Micro)
        if not count:
            return
