"""A small job of every distiller, dropout on, with padding in its batches."""

import optax

import jaxbrewer
from jaxbrewer import MultiTaskDistiller, TrainingConfig

from .. import nnx_job

HIDDEN = [
    {"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1.0}
    | {"proj": ["linear", 32, 64, {"lr": 0.05}]},
    {"layer_T": [2, 2], "layer_S": [1, 1], "feature": "hidden", "loss": "nst", "weight": 1.0},
]
EMD = {
    "layer_num_S": 2,
    "layer_num_T": 3,
    "feature": "hidden",
    "loss": "hidden_mse",
    "weight": 1.0,
    "proj": ["linear", 32, 64],
}


def teacher(seed=1):
    return nnx_job.Encoder(2, 64, seed=seed)


def student():
    return nnx_job.Encoder(1, 32, seed=2, dropout=0.2)


def batches(count, size=16, seed=0):
    """Batches whose rows have different lengths."""
    made = nnx_job.loader(count, size=size, length=6, seed=seed)
    for i, batch in enumerate(made):
        for row in range(size):
            batch["attention_mask"][row, 2 + (row + i) % 5 :] = 0
    return made


def config(folder, **options):
    return TrainingConfig(
        output_dir=folder / "out", log_dir=folder / "log", device="cpu", **options
    )


def distillation(**options):
    return jaxbrewer.DistillationConfig(temperature=2, hard_label_weight=0.5, **options)


JOBS = {
    "trainer": lambda c: jaxbrewer.BasicTrainer(c, student(), nnx_job.adaptor),
    "basic": lambda c: jaxbrewer.BasicDistiller(
        c, distillation(), teacher(), student(), nnx_job.adaptor, nnx_job.adaptor
    ),
    "general": lambda c: jaxbrewer.GeneralDistiller(
        c,
        distillation(intermediate_matches=HIDDEN),
        teacher(),
        student(),
        nnx_job.adaptor,
        nnx_job.adaptor,
    ),
    "teachers": lambda c: jaxbrewer.MultiTeacherDistiller(
        c, distillation(), [teacher(1), teacher(5)], student(), nnx_job.adaptor, nnx_job.adaptor
    ),
    "tasks": lambda c: MultiTaskDistiller(
        c,
        distillation(),
        {"a": teacher(1), "b": teacher(5)},
        student(),
        {"a": nnx_job.adaptor, "b": nnx_job.adaptor},
        {"a": nnx_job.adaptor, "b": nnx_job.adaptor},
    ),
    "emd": lambda c: jaxbrewer.EMDDistiller(
        c, distillation(), teacher(), student(), nnx_job.adaptor, nnx_job.adaptor, EMD
    ),
}


def by_example(c):
    """Its accumulation can be exact: the adaptor gives each example's loss."""

    def adaptor(batch, outputs):
        each = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], batch["labels"])
        return nnx_job.adaptor(batch, outputs) | {"losses": each}

    plan = distillation(intermediate_matches=HIDDEN)
    return jaxbrewer.GeneralDistiller(c, plan, teacher(), student(), adaptor, adaptor)


def train(distiller, loader, **options):
    """Trains for one pass with SGD; of two tasks, each has every other batch."""
    if isinstance(distiller, MultiTaskDistiller):
        loaders = {"a": loader[::2], "b": loader[1::2]}
        with distiller:
            distiller.train(nnx_job.SGD, loaders, num_steps=len(loader), **options)
        return
    with distiller:
        distiller.train(nnx_job.SGD, loader, num_epochs=1, **options)
