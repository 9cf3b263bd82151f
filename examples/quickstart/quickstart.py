"""What distillation is for, on text every machine has: docstrings of Python's standard library.

    python examples/quickstart/quickstart.py            # one seed, under five minutes on two CPU cores
    python examples/quickstart/quickstart.py --seeds 3  # three, with their spread
    python examples/quickstart/quickstart.py --fp16-opt-level O1  # in half precision; see docs/precision.md

The task: which package does this passage come from? A teacher is trained on all labels. A student 15
times smaller has a fifth of the labels: once it is trained on those alone, once it is distilled from
the teacher over all passages without any label (KD on logits, hidden MSE with a projection, NST).
Expected: accuracies near 0.77 (teacher), 0.73 (distilled) and 0.33 (alone), in the table printed at
the end; beside it, in ``runs/quickstart/seed0``: checkpoints, tensorboard files and ``curves.png``.
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
from jaxbrewer.evaluation import Accuracy
from jaxbrewer.schedulers import get_linear_schedule_with_warmup
from jaxbrewer.training import read_scalars
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
    hidden_dropout_prob=0.2,
    attention_probs_dropout_prob=0.0,
    initializer_range=0.07,  # BERT's 0.02 is meant for wider models
    num_labels=len(PACKAGES),
    output_hidden_states=True,
)
STUDENT = TEACHER.replace(
    hidden_size=8,
    num_hidden_layers=1,
    num_attention_heads=2,
    intermediate_size=16,
    hidden_dropout_prob=0.1,
)
FIRST, LAST = (0, 0), (TEACHER.num_hidden_layers, STUDENT.num_hidden_layers)  # teacher's, student's


class Loader:
    """Batches of a part of the data, shuffled anew for each epoch, the same for the same seed."""

    def __init__(self, data, seed):
        self.data, self.seed, self.epoch = data, seed, 0

    def __len__(self):
        return len(self.data["input_ids"]) // BATCH

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng((self.seed, self.epoch)).permutation(
            len(self.data["input_ids"])
        )
        for rows in order[: len(self) * BATCH].reshape(-1, BATCH):
            yield {name: array[rows] for name, array in self.data.items()}


def adaptor(batch, outputs):
    return {
        "logits": outputs.logits,
        "hidden": outputs.hidden_states,
        "losses": outputs.loss,
        "inputs_mask": batch["attention_mask"],
    }


def train(trainer, name, loader, dev, epochs, learning_rate, weight_decay=0.01):
    """Trains with AdamW, a warm-up and a linear decay, and evaluates ten times."""
    steps = len(loader) * epochs
    start = time.perf_counter()
    print(f"{name}: {steps} steps", flush=True)
    with trainer:
        trainer.train(
            functools.partial(optax.adamw, learning_rate=learning_rate, weight_decay=weight_decay),
            loader,
            num_epochs=epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={"num_warmup_steps": steps // 10, "num_training_steps": steps},
            eval_loader=[dev],
            metrics=[Accuracy()],
            eval_steps=steps // 10,
        )
    found = trainer.evaluations[steps]["accuracy"]
    print(f"{name}: accuracy {found:.3f} after {time.perf_counter() - start:.0f} s", flush=True)


@nnx.jit
def predict(model, input_ids, attention_mask):
    return model(input_ids, attention_mask).logits.argmax(-1)


def accuracy(model, data):
    model.eval()
    predicted = predict(model, data["input_ids"], data["attention_mask"])
    return float((np.asarray(predicted) == data["labels"]).mean())


def examples_per_second(model, data, passes=5):
    """The fastest of some passes, since other programs can only slow one down."""
    model.eval()
    seconds = []
    for _ in range(passes + 1):
        start = time.perf_counter()
        predict(model, data["input_ids"], data["attention_mask"]).block_until_ready()
        seconds.append(time.perf_counter() - start)
    return len(data["labels"]) / min(seconds)


def a_fifth(data, seed):
    """A fifth of each class's passages."""
    rng = np.random.default_rng(seed)
    rows = [
        rng.permutation(np.flatnonzero(data["labels"] == label))[::5]
        for label in range(len(PACKAGES))
    ]
    return {name: array[np.sort(np.concatenate(rows))] for name, array in data.items()}


def objective():
    """What the student learns from: the teacher's logits, and the first and last hidden states."""
    proj = ["linear", STUDENT.hidden_size, TEACHER.hidden_size]
    mse = {"feature": "hidden", "loss": "hidden_mse", "weight": 1, "proj": proj}
    nst = {"feature": "hidden", "loss": "nst", "weight": 1}
    teacher_layers, student_layers = zip(FIRST, LAST, strict=True)
    return DistillationConfig(
        temperature=4,
        intermediate_matches=[
            *({**mse, "layer_T": t, "layer_S": s} for t, s in (FIRST, LAST)),
            {**nst, "layer_T": list(teacher_layers), "layer_S": list(student_layers)},
        ],
    )


def run(data, dev, seed, out, **precision):
    """One seed of the whole job; returns rows of the table: name → (accuracy, parameters, speed)."""

    def config(name, every):
        return TrainingConfig(
            output_dir=out / name,
            log_dir=out / "logs" / name,
            ckpt_epoch_frequency=every,
            device="cpu",
            seed=seed,
            **precision,
        )

    def build(shape):
        return BertForSequenceClassification(shape, rngs=nnx.Rngs(seed))

    teacher, alone, distilled = build(TEACHER), build(STUDENT), build(STUDENT)
    few = a_fifth(data, seed)
    unlabelled = {name: array for name, array in data.items() if name != "labels"}

    trainer = BasicTrainer(config("teacher", 2), teacher, adaptor)
    train(trainer, "teacher", Loader(data, seed), dev, 8, 2e-3, weight_decay=0.5)
    distiller = GeneralDistiller(
        config("distilled", 2), objective(), teacher, distilled, adaptor, adaptor
    )
    train(distiller, "distilled", Loader(unlabelled, seed), dev, 10, 1e-2)
    trainer = BasicTrainer(config("alone", 10), alone, adaptor)  # as many steps as the distilled
    train(trainer, "alone", Loader(few, seed), dev, 50, 1e-2)

    plot(out)
    return {
        name: (
            accuracy(model, dev),
            display_parameters(model)[1].value[0],
            examples_per_second(model, dev),
        )
        for name, model in (("teacher", teacher), ("distilled", distilled), ("alone", alone))
    }


def plot(out):
    """Draws the accuracy of each training, and the distillation's terms, smoothed, from the logs."""
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4))
    for name in ("teacher", "distilled", "alone"):
        curve = read_scalars(out / "logs" / name)["eval/accuracy"]
        share = np.array([*curve]) / max(curve)
        left.plot(share, [*curve.values()], marker=".", label=name)
    left.set(title="accuracy on held-out passages", xlabel="share of the training", ylim=(0, 1))
    left.axhline(1 / len(PACKAGES), color="grey", linewidth=1, linestyle=":", label="chance")
    for tag, curve in read_scalars(out / "logs" / "distilled").items():
        if tag.startswith("scalar/unweighted_"):
            draw(right, curve, tag.removeprefix("scalar/unweighted_"))
    right.set(title="terms of the distillation", xlabel="batch", yscale="log")
    for axes in (left, right):
        axes.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1, 1))
        axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(out / "curves.png", dpi=120)
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
    parser.add_argument("--fp16-opt-level", choices=["O0", "O1", "O2", "O3"], default="O0")
    parser.add_argument("--half-dtype", choices=["auto", "bfloat16", "float16"], default="auto")
    options = parser.parse_args()
    precision = {"fp16": True, "fp16_opt_level": options.fp16_opt_level}
    precision["half_dtype"] = options.half_dtype
    logging.basicConfig(level=logging.WARNING, format="  %(message)s")
    for said in ("feed", "evaluations"):  # what is compiled, and how good it is
        logging.getLogger(f"jaxbrewer.training.{said}").setLevel(logging.INFO)

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
        results.append(run(data, dev, seed, options.out / f"seed{seed}", **precision))
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
