"""What distillation is for, on text every machine has: docstrings of Python's standard library.

    python examples/quickstart/quickstart.py            # one seed, under five minutes on two CPU cores
    python examples/quickstart/quickstart.py --seeds 3  # three, with their spread

The task: which package does this passage come from? A teacher is trained on all labels. A student
some forty times smaller has a fifth of the labels: once it is trained on those alone, once it is
distilled from the teacher over all passages without any label (KD on logits, hidden MSE with a
projection, NST). Expected: teacher > distilled > alone, in the table printed at the end; beside it,
in ``runs/quickstart/seed0``: checkpoints, tensorboard files and ``losses.png``.
"""

import argparse
import functools
import logging
import time
from pathlib import Path

import matplotlib
import numpy as np
import optax
from corpus import PACKAGES, encode, passages, split, train_tokenizer
from flax import nnx

from jaxbrewer import BasicTrainer, DistillationConfig, GeneralDistiller, TrainingConfig
from jaxbrewer.metrics import read_scalars
from jaxbrewer.schedulers import get_linear_schedule_with_warmup
from jaxbrewer.utils import display_parameters
from jaxbrewer.zoo import BertConfig, BertForSequenceClassification

matplotlib.use("Agg")
from matplotlib import pyplot

LENGTH, BATCH, VOCABULARY = 64, 32, 8000
TEACHER = BertConfig(
    vocab_size=VOCABULARY,
    hidden_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=192,
    max_position_embeddings=LENGTH,
    initializer_range=0.07,
    num_labels=len(PACKAGES),
    output_hidden_states=True,
)
STUDENT = TEACHER.replace(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
)


class Loader:
    """Batches of a part of the data, shuffled anew for each epoch, the same for the same seed."""

    def __init__(self, data, seed):
        self.data, self.seed, self.epoch = data, seed, 0

    def __len__(self):
        return len(self.data["input_ids"]) // BATCH

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(len(self) * BATCH)
        for rows in order.reshape(-1, BATCH):
            yield {name: array[rows] for name, array in self.data.items()}


def adaptor(batch, outputs):
    return {
        "logits": outputs.logits,
        "hidden": outputs.hidden_states,
        "losses": outputs.loss,
        "inputs_mask": batch["attention_mask"],
    }


def train(trainer, loader, epochs, learning_rate, weight_decay=0.01):
    """Trains with AdamW, a warm-up and a linear decay; returns the seconds it took."""
    steps = len(loader) * epochs
    start = time.perf_counter()
    with trainer:
        trainer.train(
            functools.partial(optax.adamw, learning_rate=learning_rate, weight_decay=weight_decay),
            loader,
            num_epochs=epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={"num_warmup_steps": steps // 10, "num_training_steps": steps},
        )
    return time.perf_counter() - start


@nnx.jit
def predict(model, input_ids, attention_mask):
    return model(input_ids, attention_mask).logits.argmax(-1)


def evaluate(model, data):
    """Accuracy, and examples a second after the first batch."""
    model.eval()
    hits, seconds, seen = 0, 0.0, 0
    for start in range(0, len(data["labels"]) - BATCH + 1, BATCH):
        batch = {name: array[start : start + BATCH] for name, array in data.items()}
        began = time.perf_counter()
        predicted = np.asarray(predict(model, batch["input_ids"], batch["attention_mask"]))
        if start:
            seconds += time.perf_counter() - began
            seen += BATCH
        hits += int((predicted == batch["labels"]).sum())
    return hits / (start + BATCH), seen / seconds


def a_fifth(data, seed):
    """A fifth of each class's passages."""
    rng = np.random.default_rng(seed)
    rows = [
        rng.permutation(np.flatnonzero(data["labels"] == label))[::5]
        for label in range(len(PACKAGES))
    ]
    return {name: array[np.sort(np.concatenate(rows))] for name, array in data.items()}


def run(data, dev, seed, out):
    """One seed of the whole job; returns rows of the table: name → (accuracy, parameters, speed)."""

    def config(name):
        return TrainingConfig(
            output_dir=out / name, log_dir=out / "logs" / name, device="cpu", seed=seed
        )

    def build(shape):
        return BertForSequenceClassification(shape, rngs=nnx.Rngs(seed))

    teacher, alone, distilled = build(TEACHER), build(STUDENT), build(STUDENT)
    seconds = {}
    seconds["teacher"] = train(
        BasicTrainer(config("teacher"), teacher, adaptor), Loader(data, seed), 7, 2e-3, 0.05
    )
    few = a_fifth(data, seed)
    seconds["alone"] = train(
        BasicTrainer(config("alone"), alone, adaptor), Loader(few, seed), 50, 6e-3
    )
    hidden = {"feature": "hidden", "weight": 1}
    pairs = [(0, 0), (TEACHER.num_hidden_layers, STUDENT.num_hidden_layers)]
    proj = ["linear", STUDENT.hidden_size, TEACHER.hidden_size]
    objective = DistillationConfig(
        temperature=4,
        intermediate_matches=[
            {**hidden, "layer_T": t, "layer_S": s, "loss": "hidden_mse", "proj": proj}
            for t, s in pairs
        ]
        + [{**hidden, "layer_T": [t, t], "layer_S": [s, s], "loss": "nst"} for t, s in pairs],
    )
    unlabelled = {name: array for name, array in data.items() if name != "labels"}
    distiller = GeneralDistiller(
        config("distilled"), objective, teacher, distilled, adaptor, adaptor
    )
    seconds["distilled"] = train(distiller, Loader(unlabelled, seed), 10, 6e-3)
    plot(out)
    rows = {}
    for name, model in (("teacher", teacher), ("distilled", distilled), ("alone", alone)):
        count = display_parameters(model)[1].value[0]
        accuracy, speed = evaluate(model, dev)
        rows[name] = (accuracy, count, speed)
    return rows


def plot(out):
    """Draws the loss of each training, smoothed, and the distillation's terms, from tensorboard's files."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name in ("teacher", "alone", "distilled"):
        draw(left, read_scalars(out / "logs" / name)["scalar/total_loss"], name)
    left.set(title="total loss", xlabel="batch", ylabel="loss")
    for tag, curve in read_scalars(out / "logs" / "distilled").items():
        if tag != "scalar/total_loss":
            draw(right, curve, tag.removeprefix("scalar/unweighted_"))
    right.set(title="terms of the distillation", xlabel="batch", yscale="log")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize="small")
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out / "losses.png", dpi=120)
    pyplot.close(figure)


def draw(axes, curve, label):
    values = np.array([curve[step] for step in sorted(curve)])
    window = max(1, len(values) // 60)
    smooth = np.convolve(values, np.ones(window) / window, mode="valid")
    axes.plot(np.arange(len(smooth)) + window // 2, smooth, label=label)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--seeds", type=int, default=1, help="how many seeds to run")
    parser.add_argument("--out", type=Path, default=Path("runs/quickstart"))
    options = parser.parse_args()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")

    train_part, dev_part = split(passages())
    tokenizer = train_tokenizer([p.text for p in train_part], VOCABULARY, LENGTH)
    data, dev = encode(tokenizer, train_part), encode(tokenizer, dev_part)
    print(
        f"{len(train_part)} passages to train on, {len(dev_part)} held out, of {len(PACKAGES)} packages"
    )
    start = time.perf_counter()
    results = []
    for seed in range(options.seed, options.seed + options.seeds):
        print(f"seed {seed}")
        results.append(run(data, dev, seed, options.out / f"seed{seed}"))
    print(f"\n{'':12}{'accuracy':>16}{'parameters':>13}{'examples/s':>13}")
    for name in ("teacher", "distilled", "alone"):
        accuracy, count, speed = np.array([result[name] for result in results]).T
        spread = f" ± {accuracy.std(ddof=1):.3f}" if len(results) > 1 else ""
        print(
            f"{name:12}{f'{accuracy.mean():.3f}{spread}':>16}{count[0]:>13,.0f}{np.median(speed):>13,.0f}"
        )
    print(f"\n{time.perf_counter() - start:.0f} s; files in {options.out}")


if __name__ == "__main__":
    main()
