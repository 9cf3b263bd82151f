"""Schedules of matches and of the temperature in a run: what is logged, resumed and refused."""

import json

import jax
import numpy as np
import pytest

import jaxbrewer
from jaxbrewer.errors import CheckpointError
from jaxbrewer.objective.plan import resolve
from tests import fn_job

CONFIG = {
    "temperature": 8,
    "base_temperature_scheduler": ["linear", {"start": 8, "end": 2}],
    "kd_loss_type": ["jsd", {"beta": 0.25}],
    "hard_label_weight": 1,
    "hard_label_weight_scheduler": ["cosine", {"start": 1, "end": 0}],
    "intermediate_matches": [
        fn_job.match(2, 2),
        fn_job.match(1, 1, loss="cka", weight=0) | {"weight_scheduler": ["step", 0.5]},
    ],
}
KEYS = ("logits", "hidden", "inputs_mask", "losses")


def train(folder, config=CONFIG, stop=None, **options):
    """Trains six steps; returns what is logged, by tag."""
    (folder / "config.json").write_text(json.dumps(config))
    how = jaxbrewer.DistillationConfig.from_json_file(folder / "config.json").to_dict()
    distiller = fn_job.distiller(
        folder,
        config=how,
        keys=KEYS,
        log_dir=folder / "log",
        ckpt_steps=1,
        max_to_keep=9,
        **options,
    )
    with distiller:
        distiller.train(fn_job.SGD, fn_job.batches(6), num_steps=6)
    lines = (folder / "log" / "metrics.jsonl").read_text().splitlines()
    found = {}
    for line in map(json.loads, lines):
        for tag, value in line.items():
            if tag.startswith("scalar/"):
                found.setdefault(tag, {})[line["step"]] = value
    return distiller, found


def test_every_step_has_its_weights_and_its_temperature(tmp_path):
    distiller, found = train(tmp_path)
    plan, _ = resolve(distiller.d_config, logits_required=False)
    scheduled = plan.scheduled
    hard = scheduled.hard_label.table(6)
    late = scheduled.matches[1].table(6)
    assert scheduled.temperature.table(6)[5] == 3
    assert set(found) == {
        "scalar/total_loss",
        "scalar/unweighted_kd_loss",
        "scalar/unweighted_hard_label_loss",
        "scalar/unweighted_hidden_hidden_mse_2_2",
        "scalar/unweighted_hidden_cka_1_1",
    }
    for step, total in found["scalar/total_loss"].items():
        row = step
        expected = (
            found["scalar/unweighted_kd_loss"][step]
            + hard[row] * found["scalar/unweighted_hard_label_loss"][step]
            + found["scalar/unweighted_hidden_hidden_mse_2_2"][step]
            + late[row] * found["scalar/unweighted_hidden_cka_1_1"][step]
        )
        np.testing.assert_allclose(total, expected, rtol=1e-5)
    # The first step's KD loss is at 8, as the config says; the last at 3.
    student = fn_job.encoder(2)
    first = fn_job.batches(1)[0]
    logits = [
        fn_job.encode(model.params, first["ids"])["logits"]
        for model in (student, fn_job.encoder(1))
    ]
    np.testing.assert_allclose(
        found["scalar/unweighted_kd_loss"][0],
        jaxbrewer.losses.kd_jsd_loss(*logits, 8, beta=0.25),
        rtol=1e-5,
    )


def test_a_resumed_run_ends_in_the_same_bits(tmp_path):
    whole, again = tmp_path / "whole", tmp_path / "again"
    for folder in (whole, again):
        folder.mkdir()
    expected, _ = train(whole)
    train(again)
    for step in (5, 6):
        (again / "out" / f"gs{step}").rename(again / f"gs{step}")
    resumed, _ = train(again, resume=True)
    for one, other in zip(
        *(jax.tree.leaves(d.model_S.params) for d in (expected, resumed)), strict=True
    ):
        np.testing.assert_array_equal(one, other)


def test_another_schedule_is_no_resume(tmp_path):
    train(tmp_path)
    (tmp_path / "out" / "gs6").rename(tmp_path / "gs6")
    other = CONFIG | {"base_temperature_scheduler": ["linear", {"start": 8, "end": 4}]}
    with pytest.raises(CheckpointError, match="base_temperature_scheduler"):
        train(tmp_path, other, resume=True)


def test_a_temperature_of_nothing_is_refused_before_training(tmp_path):
    config = CONFIG | {"base_temperature_scheduler": ["linear", {"start": 8, "end": -1}]}
    with pytest.raises(ValueError, match=r"gives 0\.5 after 5|gives -1 after 6 of 6 updates"):
        train(tmp_path, config)
    assert not list((tmp_path / "out").glob("gs*"))
