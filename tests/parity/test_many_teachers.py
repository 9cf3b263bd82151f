"""Several teachers, several tasks, cached results and separate inputs: curves against TextBrewer."""

import random

import jax
import numpy as np
import pytest
import textbrewer

import jaxbrewer
from jaxbrewer.training import resume
from jaxbrewer.training import teacher_cache as caching

from .reference import Job, adaptor, assert_equal_runs, configs, run, run_both
from .twins import batches, twins

pytestmark = pytest.mark.torch

POOLED = {"layers": 2, "width": 8}
TOKENS = POOLED | {"tokens": True}


def mask(batch, outputs):
    return batch["attention_mask"]


def labels(batch, outputs):
    return batch["labels"]


TEACHERS = {
    "one": (1, Job({"temperature": 8, "hard_label_weight": 0.5}, train={"num_epochs": 5})),
    "three, shifted, accumulated": (
        3,
        Job(
            {"probability_shift": True, "kd_loss_type": "mse"},
            training={"gradient_accumulation_steps": 3},
            train={"num_epochs": 5},
            keys_S={"labels": labels},
        ),
    ),
    "three, masked, flsw": (
        3,
        Job(
            {"temperature_scheduler": ["flsw", 1, 2], "kd_loss_weight_scheduler": "linear_decay"},
            train={"num_steps": 50},
            training={"ckpt_steps": 20},
            teacher=TOKENS,
            student=TOKENS,
            keys_S={"logits_mask": mask},
            keys_T={"logits_mask": mask},
        ),
    ),
}


@pytest.mark.parametrize("name", TEACHERS)
def test_multi_teacher(name, tmp_path, x64):
    count, job = TEACHERS[name]
    teachers = [twins(10 + i, "float64", **job.teacher | {"layers": 1 + i}) for i in range(count)]
    student, torch_student = twins(2, "float64", **job.student)
    loader = batches(3, 10, tokens=job.student.get("tokens", False))
    torch_configs, jax_configs = configs(job, tmp_path)
    adaptor_T, adaptor_S = adaptor(job.keys_T), adaptor(job.keys_S)
    theirs = textbrewer.MultiTeacherDistiller(
        *torch_configs, [twin for _, twin in teachers], torch_student, adaptor_T, adaptor_S
    )
    each = [adaptor_T] * count if count > 1 else adaptor_T
    ours = jaxbrewer.MultiTeacherDistiller(
        *jax_configs, [module for module, _ in teachers], student, each, adaptor_S
    )
    assert_equal_runs(*run(job, theirs, ours, loader, tmp_path, torch_student), 1e-6)


@pytest.mark.filterwarnings("ignore:task .b.. hard_label_weight")
def test_multi_task(tmp_path, monkeypatch, x64):
    order = list(np.random.default_rng(0).choice(["a", "b"], 100))
    turns = iter(order)
    monkeypatch.setattr(np.random, "choice", lambda names, p: next(turns))
    monkeypatch.setattr(resume, "task_order", lambda sizes, tau, seed: iter(order))
    job = Job(
        {
            "hard_label_weight": 0.5,
            "hard_label_weight_scheduler": "linear_growth",
            "intermediate_matches": [
                {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
                | {"proj": ["linear", 8, 8, {"lr": 0.03}]}
            ],
        },
        training={"gradient_accumulation_steps": 2, "ckpt_steps": 10},
        train={"num_steps": 25, "max_grad_norm": 0.5, "tau": 0.5},
    )
    teachers = {task: twins(seed, "float64", **POOLED) for task, seed in (("a", 10), ("b", 11))}
    student, torch_student = twins(2, "float64", **POOLED)
    adaptors = {"a": adaptor({}), "b": adaptor({"losses": None})}
    torch_configs, jax_configs = configs(job, tmp_path)
    theirs = textbrewer.MultiTaskDistiller(
        *torch_configs,
        {t: pair[1] for t, pair in teachers.items()},
        torch_student,
        adaptors,
        adaptors,
    )
    ours = jaxbrewer.MultiTaskDistiller(
        *jax_configs, {t: pair[0] for t, pair in teachers.items()}, student, adaptors, adaptors
    )
    loaders = {"a": batches(3, 7), "b": batches(4, 4, size=3)}
    one, two = run(job, theirs, ours, loaders, tmp_path, torch_student)
    hard = "scalar/unweighted_hard_label_loss"  # only where task 'a' had its turn
    theirs_hard, ours_hard = one[0].pop(hard), two[0].pop(hard)
    np.testing.assert_allclose(ours_hard, theirs_hard, rtol=1e-6)
    assert len(theirs_hard) == order[:50].count("a")
    assert_equal_runs(one, two, 1e-6)


@pytest.mark.parametrize("where", ["memory", "disk"])
def test_cached_logits(where, tmp_path, monkeypatch, x64):
    """TextBrewer shuffles with Python's global generator; here both get our order."""
    first = []

    def shuffle(cache):
        if not first:
            first.extend(cache)
        order = caching.CachedLoader([None] * len(cache), [], {}, seed=0)
        order.set_epoch(shuffle.epoch)
        shuffle.epoch += 1
        cache[:] = [first[i] for i in order.order()]

    shuffle.epoch = 0
    monkeypatch.setattr(random, "shuffle", shuffle)
    job = Job(
        {"is_caching_logits": True, "temperature": 2, "hard_label_weight": 1},
        distiller="BasicDistiller",
        training={"gradient_accumulation_steps": 2},
        train={"num_epochs": 5},
    )
    if where == "disk":
        original = jaxbrewer.DistillationConfig
        monkeypatch.setattr(
            jaxbrewer,
            "DistillationConfig",
            lambda **config: original(**config, cache_dir=tmp_path / "cache"),
        )
    assert_equal_runs(*run_both(job, tmp_path, "float64"), 1e-6)


def test_inputs_of_each_side_and_cached_outputs(tmp_path, x64):
    """Half the batches bring the teacher's outputs along."""
    job = Job({"hard_label_weight": 1}, train={"num_epochs": 5})
    teacher, torch_teacher = twins(10, "float64", **POOLED)
    student, torch_student = twins(2, "float64", **POOLED)
    loader = []
    for i, (batch_T, batch_S) in enumerate(zip(batches(3, 10), batches(4, 10), strict=True)):
        batch = {"teacher": batch_T, "student": batch_S}
        if i % 2:
            outputs = teacher(**batch_T)
            batch["teacher_cache"] = jax.tree.map(np.asarray, {k: outputs[k] for k in ("logits",)})
        loader.append(batch)
    keys = adaptor({"hidden": None, "attention": None})
    only_logits = adaptor({"hidden": None, "attention": None, "losses": None, "inputs_mask": None})
    torch_configs, jax_configs = configs(job, tmp_path)
    theirs = textbrewer.GeneralDistiller(
        *torch_configs, torch_teacher, torch_student, only_logits, keys
    )
    ours = jaxbrewer.GeneralDistiller(*jax_configs, teacher, student, only_logits, keys)
    assert_equal_runs(*run(job, theirs, ours, loader, tmp_path, torch_student), 1e-6)


@pytest.mark.parametrize("distiller", ["BasicDistiller", "GeneralDistiller"])
def test_two_tokenizers(distiller, tmp_path, x64):
    """Other word pieces and lengths on each side, aligned on the first piece of each word."""

    def pieces(rng, words, length):
        """Ids, and a mask that marks the first piece of each of `words` words."""
        first = np.zeros((len(words), length), np.int64)
        for row, count in zip(first, words, strict=True):
            row[np.sort(rng.permutation(length)[:count])] = 1
        return {"input_ids": rng.integers(0, 30, first.shape), "attention_mask": first}

    rng = np.random.default_rng(0)
    loader = []
    for _ in range(10):
        words = rng.integers(1, 6, 4)
        loader.append({"teacher": pieces(rng, words, 9), "student": pieces(rng, words, 6)})
    job = Job(
        {"temperature": 2, "temperature_scheduler": ["cwsm", 1]},
        distiller=distiller,
        train={"num_epochs": 5},
    )
    keys = adaptor(
        {"hidden": None, "attention": None, "losses": None, "inputs_mask": None}
        | {"logits_mask": mask}
    )
    teacher, torch_teacher = twins(10, "float64", **TOKENS)
    student, torch_student = twins(2, "float64", **TOKENS)
    torch_configs, jax_configs = configs(job, tmp_path)
    theirs = getattr(textbrewer, distiller)(
        *torch_configs, torch_teacher, torch_student, keys, keys
    )
    ours = getattr(jaxbrewer, distiller)(*jax_configs, teacher, student, keys, keys)
    assert_equal_runs(*run(job, theirs, ours, loader, tmp_path, torch_student), 1e-6)
