"""Supervised training: the curve and the saved steps of TextBrewer's BasicTrainer."""

import pytest
import textbrewer

import jaxbrewer

from .reference import Job, adaptor, assert_equal_runs, configs, run
from .twins import batches, twins

pytestmark = pytest.mark.torch


def test_trainer(tmp_path, x64):
    job = Job(
        {},
        training={"gradient_accumulation_steps": 3, "ckpt_frequency": 2},
        train={"num_epochs": 5, "max_grad_norm": 0.3},
    )
    model, twin = twins(2, "float64", **job.student)
    (their_config, _), (our_config, _) = configs(job, tmp_path)
    losses = adaptor({key: None for key in ("logits", "hidden", "attention", "inputs_mask")})
    theirs = textbrewer.BasicTrainer(their_config, twin, losses)
    ours = jaxbrewer.BasicTrainer(our_config, model, losses)
    assert_equal_runs(*run(job, theirs, ours, batches(3, 10), tmp_path, twin), 1e-6)
