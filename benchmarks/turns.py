"""What is trained in turns, and how: some steps of ``distiller.train`` at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import workloads

import jaxbrewer
from jaxbrewer.data.streams import Micro
from jaxbrewer.training import loop
from jaxbrewer.training import run as training

Play = Callable[[Callable[[int], None]], Any]

TINY_VOCABULARY, TINY_WIDTH, TINY_LAYERS = 50, 8, 9
NEVER = 10**9  # an epoch or step at which a checkpoint may be due: it does not come


class Outputs(NamedTuple):
    """What the tiny model returns."""

    logits: jax.Array
    hidden_states: list[jax.Array]
    loss: jax.Array


def tiny_apply(
    params: dict[str, Any],
    input_ids: jax.Array,
    attention_mask: Any = None,
    token_type_ids: Any = None,
    labels: Any = None,
) -> Outputs:
    """Embeddings and some small layers: microseconds to compute, a second to compile."""
    x = params["embed"][input_ids]
    hidden = [x]
    for weight, bias in params["layers"]:
        x = jnp.tanh(x @ weight + bias)
        hidden.append(x)
    logits = x[:, 0] @ params["head"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return Outputs(logits, hidden, loss)


def tiny_params(seed: int, layers: int = TINY_LAYERS) -> dict[str, Any]:
    """Two arrays, and two a layer: twenty."""
    rng = np.random.default_rng(seed)

    def draw(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(0, 0.3, shape), jnp.float32)

    return {
        "embed": draw(TINY_VOCABULARY, TINY_WIDTH),
        "layers": [(draw(TINY_WIDTH, TINY_WIDTH), draw(TINY_WIDTH)) for _ in range(layers)],
        "head": draw(TINY_WIDTH, 2),
    }


def tiny_model(seed: int, layers: int = TINY_LAYERS) -> jaxbrewer.FunctionModel:
    """The tiny model, whose ids are checked."""
    limits = {"input_ids": TINY_VOCABULARY}
    return jaxbrewer.FunctionModel(tiny_apply, tiny_params(seed, layers), id_limits=limits)


@dataclass(frozen=True)
class Job:
    """Models and how they are matched; ``vocab_size`` is that of their ids."""

    teacher: Any
    student: Any
    matches: Sequence[dict[str, Any]]
    vocab_size: int

    def distiller(self, distillation: Mapping[str, Any] | None = None, **training: Any) -> Any:
        """A `GeneralDistiller`, with further fields of its two configs."""
        return jaxbrewer.GeneralDistiller(
            jaxbrewer.TrainingConfig(**training),
            jaxbrewer.DistillationConfig(
                temperature=workloads.TEMPERATURE,
                hard_label_weight=workloads.HARD_LABEL_WEIGHT,
                intermediate_matches=self.matches,
                **(distillation or {}),
            ),
            self.teacher,
            self.student,
            workloads.adaptor,
            workloads.adaptor,
        )


def bert_job(work: workloads.Work) -> Job:
    """BERT-base and its student."""
    made = workloads.jax_distiller(work)
    return Job(made.model_T, made.model_S, work.matches, work.teacher["vocab_size"])


def tiny_bert() -> workloads.Work:
    """BERTs of two layers and of one, for trial runs."""
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
    sizes |= {"vocab_size": TINY_VOCABULARY, "max_position_embeddings": 16}
    match = {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    grams = match | {"layer_T": [2, 2], "layer_S": [1, 1], "loss": "mmd"}
    teacher, student = ({**sizes, "num_hidden_layers": layers} for layers in (2, 1))
    return workloads.Work("tiny", teacher, student, (match, grams))


def tiny_job() -> Job:
    """The tiny model into its like."""
    match = {"layer_T": TINY_LAYERS, "layer_S": TINY_LAYERS, "feature": "hidden", "weight": 1}
    return Job(tiny_model(0), tiny_model(1), [match | {"loss": "hidden_mse"}], TINY_VOCABULARY)


def job(student: str, smoke: bool) -> Job:
    """BERT-base to a student; with ``smoke`` the tiny one, which is quick to compile."""
    return tiny_job() if smoke else bert_job(workloads.work(student))


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
        def run(self, events: Iterator[Any], after_step: Callable[[], None]) -> None:
            run = super().run
            found.append(play(lambda steps: run(_steps(events, steps), after_step)))

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
