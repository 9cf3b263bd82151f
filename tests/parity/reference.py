"""Runs the same job in TextBrewer and in jaxbrewer, and collects what each logged and saved."""

import copy
import functools
import struct
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import optax
import textbrewer
import torch
from tensorboardX.proto.event_pb2 import Event

import jaxbrewer

from .toys import batches, linear_names, twins


def masked_nst(state_S, state_T, mask=None):
    """The rule of TextBrewer's head: each Gram matrix is divided by its own width."""
    grams = [s[0] @ s[1].transpose(1, 2) / s[1].size(2) for s in (state_S, state_T)]
    squares = (grams[0] - grams[1]) ** 2
    if mask is None:
        return squares.mean()
    mask = mask.to(squares)
    return (squares * mask[:, :, None] * mask[:, None, :]).sum() / mask.sum(1).pow(2).sum()


class Recorder:
    """Stands in for TextBrewer's tensorboard writer."""

    def __init__(self):
        self.curves = {}

    def add_scalar(self, tag, value, step):
        curve = self.curves.setdefault(tag, [])
        assert step == len(curve)
        curve.append(value)


def read_events(folder):
    """Reads tag → values in order of step from tensorboard files, without tensorboard."""
    points = {}
    for path in sorted(Path(folder).glob("events.*")):
        data = path.read_bytes()
        at = 0
        while at < len(data):
            (length,) = struct.unpack("<Q", data[at : at + 8])
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += 12 + length + 4
            for value in event.summary.value:
                points.setdefault(value.tag, {})[event.step] = value.simple_value
    return {tag: [steps[i] for i in range(len(steps))] for tag, steps in points.items()}


@dataclass
class Job:
    """A distillation, to be run in both libraries.

    Attributes:
        distiller: the class's name.
        distillation: DistillationConfig's arguments.
        training: TrainingConfig's arguments.
        train: arguments of ``train`` that both take as they are.
        torch_only: further ones for TextBrewer, jax_only: for jaxbrewer.
        teacher: the teacher toy's shape, student: the student's.
        keys: what the adaptors return of the batch and the outputs, by side: key → function of
            (batch, outputs).
        loader: arguments of `toys.batches`.
    """

    distillation: dict
    distiller: str = "GeneralDistiller"
    training: dict = field(default_factory=dict)
    train: dict = field(default_factory=dict)
    torch_only: dict = field(default_factory=dict)
    jax_only: dict = field(default_factory=dict)
    torch_optimizer: Callable = lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    optax_optimizer: Callable = field(default=functools.partial(optax.sgd, learning_rate=0.1))
    teacher: dict = field(default_factory=lambda: {"layers": 3, "width": 8})
    student: dict = field(default_factory=lambda: {"layers": 2, "width": 8})
    keys_T: dict = field(default_factory=dict)
    keys_S: dict = field(default_factory=dict)
    loader: dict = field(default_factory=dict)


COMMON = {
    "logits": lambda batch, outputs: outputs["logits"],
    "hidden": lambda batch, outputs: outputs["hidden"],
    "attention": lambda batch, outputs: outputs["attention"],
    "inputs_mask": lambda batch, outputs: batch["attention_mask"],
    "losses": lambda batch, outputs: outputs["loss"],
}


def adaptor(keys):
    chosen = {key: get for key, get in (COMMON | keys).items() if get is not None}
    return lambda batch, outputs: {key: get(batch, outputs) for key, get in chosen.items()}


def run_both(job, tmp_path, dtype):
    """Returns (curves, saved steps) of TextBrewer and of jaxbrewer, from the same weights."""
    teacher, torch_teacher = twins(1, dtype, **job.teacher)
    student, torch_student = twins(2, dtype, **job.student)
    loader = batches(3, **{"count": 10, "tokens": job.student.get("tokens", False), **job.loader})
    adaptors = adaptor(job.keys_T), adaptor(job.keys_S)

    ours = getattr(jaxbrewer, job.distiller)(
        jaxbrewer.TrainingConfig(
            **job.training,
            output_dir=str(tmp_path / "jaxbrewer"),
            log_dir=str(tmp_path / "log"),
            device="cpu",
        ),
        jaxbrewer.DistillationConfig(**copy.deepcopy(job.distillation)),
        teacher,
        student,
        *adaptors,
    )
    theirs = getattr(textbrewer, job.distiller)(
        textbrewer.TrainingConfig(
            **job.training, output_dir=str(tmp_path / "textbrewer"), device="cpu"
        ),
        textbrewer.DistillationConfig(**copy.deepcopy(job.distillation)),
        torch_teacher,
        torch_student,
        *adaptors,
    )
    theirs.tb_writer = Recorder()
    for module, twin in zip(ours.projs, getattr(theirs, "projs", ()), strict=True):
        if module is not None:
            copy_projection(module, twin.to(next(torch_student.parameters()).dtype))

    steps = []
    with theirs, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has its own on schedulers
        theirs.train(
            job.torch_optimizer(torch_student.parameters()),
            [{k: torch.from_numpy(v) for k, v in batch.items()} for batch in loader],
            callback=lambda model, step: steps.append(step),
            **job.train,
            **job.torch_only,
        )
    with ours:
        ours.train(job.optax_optimizer, loader, **job.train, **job.jax_only)
    saved = sorted(int(p.name[2:]) for p in (tmp_path / "jaxbrewer").glob("gs*"))
    return (theirs.tb_writer.curves, sorted(steps)), (read_events(tmp_path / "log"), saved)


def copy_projection(module, twin):
    """Both kinds of projection hold one linear layer."""
    (linear,) = [m for m in twin.modules() if isinstance(m, torch.nn.Linear)]
    arrays = {name.split(".")[-1]: np.array(v) for name, v in linear_names(module).items()}
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(arrays["kernel"].T.copy()))
        linear.bias.copy_(torch.from_numpy(arrays["bias"]))
