"""Runs the same job in TextBrewer and in jaxbrewer, and collects what each logged and saved."""

import copy
import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import optax
import textbrewer
import torch

import jaxbrewer

from ..nnx_job import read_events
from .twins import batches, linear_names, twins


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
        self.curves.setdefault(tag, {})[step] = value


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


def configs(job, tmp_path):
    """The configs of both libraries: (TextBrewer's two, jaxbrewer's two)."""
    distillation, training = job.distillation, job.training
    theirs = (
        textbrewer.TrainingConfig(**training, output_dir=str(tmp_path / "torch"), device="cpu"),
        textbrewer.DistillationConfig(**copy.deepcopy(distillation)),
    )
    ours = (
        jaxbrewer.TrainingConfig(
            **training,
            output_dir=str(tmp_path / "jax"),
            log_dir=str(tmp_path / "log"),
            device="cpu",
        ),
        jaxbrewer.DistillationConfig(**copy.deepcopy(distillation)),
    )
    return theirs, ours


def to_torch(value):
    """Arrays inside dicts and lists become tensors."""
    if isinstance(value, dict):
        return {k: to_torch(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(to_torch(v) for v in value)
    return torch.from_numpy(value) if isinstance(value, np.ndarray) else value


def run(job, theirs, ours, loader, tmp_path, student):
    """Trains with both; returns (curves, saved steps) of TextBrewer and of jaxbrewer.

    Args:
        job: the job.
        theirs: TextBrewer's distiller, ours: jaxbrewer's; their students have equal weights.
        loader: batches of numpy arrays, or a dict of such by task.
        tmp_path: as for `configs`.
        student: TextBrewer's student.
    """
    theirs.tb_writer = Recorder()
    projections = getattr(theirs, "projs", None) or [None] * len(ours.projs)
    for module, twin in zip(ours.projs, projections, strict=True):
        if module is not None:
            copy_projection(module, twin.to(next(student.parameters()).dtype))
    steps = []
    with theirs, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch has its own on schedulers
        theirs.train(
            job.torch_optimizer(student.parameters()),
            to_torch(loader),
            callback=lambda model, step: steps.append(step),
            **job.train,
            **job.torch_only,
        )
    with ours:
        ours.train(job.optax_optimizer, loader, **job.train, **job.jax_only)
    saved = sorted(int(p.name[2:]) for p in (tmp_path / "jax").glob("gs*"))
    curves = {t: [c[i] for i in sorted(c)] for t, c in theirs.tb_writer.curves.items()}
    return (curves, sorted(steps)), (read_events(tmp_path / "log"), saved)


def assert_equal_runs(theirs, ours, tolerance, points=48):
    """Same tags, same saved steps, same curves."""
    (curves, steps), (our_curves, saved) = theirs, ours
    assert our_curves.keys() == curves.keys()
    assert saved == steps
    for tag, curve in curves.items():
        assert len(curve) >= points
        np.testing.assert_allclose(our_curves[tag], curve, rtol=tolerance, err_msg=tag)


def run_both(job, tmp_path, dtype):
    """Runs a job with one teacher in both libraries, from the same weights; see `run`."""
    teacher, torch_teacher = twins(1, dtype, **job.teacher)
    student, torch_student = twins(2, dtype, **job.student)
    loader = batches(3, **{"count": 10, "tokens": job.student.get("tokens", False), **job.loader})
    adaptors = adaptor(job.keys_T), adaptor(job.keys_S)
    torch_configs, jax_configs = configs(job, tmp_path)
    theirs = getattr(textbrewer, job.distiller)(
        *torch_configs, torch_teacher, torch_student, *adaptors
    )
    ours = getattr(jaxbrewer, job.distiller)(*jax_configs, teacher, student, *adaptors)
    return run(job, theirs, ours, loader, tmp_path, torch_student)


def copy_projection(module, twin):
    """Both kinds of projection hold one linear layer."""
    (linear,) = [m for m in twin.modules() if isinstance(m, torch.nn.Linear)]
    arrays = {name.split(".")[-1]: np.array(v) for name, v in linear_names(module).items()}
    with torch.no_grad():
        linear.weight.copy_(torch.from_numpy(arrays["kernel"].T.copy()))
        linear.bias.copy_(torch.from_numpy(arrays["bias"]))
