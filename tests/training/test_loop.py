"""The loop: callbacks, stops, numbers that cannot be, logs, loaders of every kind."""

import io
import logging
import re
import time
from types import SimpleNamespace

import numpy as np
import orbax.checkpoint as ocp
import pytest
from tqdm import tqdm

import jaxbrewer
from jaxbrewer.errors import BatchError, CheckpointError
from jaxbrewer.training import loop
from jaxbrewer.training.folders import steps_in
from jaxbrewer.training.metrics import MetricsWriter
from tests import fn_job, nnx_job
from tests.nnx_job import read_events


def test_callback_gets_the_trained_student_at_each_checkpoint(tmp_path):
    distiller = nnx_job.distiller(tmp_path, ckpt_frequency=2)
    seen = []

    def callback(model, step):
        assert model is distiller.model_S
        seen.append((step, nnx_job.weights(model)))

    with distiller:
        distiller.train(nnx_job.SGD, nnx_job.loader(4), num_epochs=1, callback=callback)
    assert [step for step, _ in seen] == [2, 4] == steps_in(tmp_path / "out")
    for step, weights in seen:
        saved = jaxbrewer.load_student(tmp_path / "out" / f"gs{step}", nnx_job.Encoder(2, 4))
        for name, value in nnx_job.weights(saved).items():
            np.testing.assert_array_equal(value, weights[name])
    final = nnx_job.weights(distiller.model_S)
    np.testing.assert_array_equal(final["head.kernel"], seen[-1][1]["head.kernel"])


def test_callback_that_raises_loses_nothing(tmp_path):
    def callback(model, step):
        raise RuntimeError("evaluation broke")

    distiller = nnx_job.distiller(tmp_path)
    with distiller, pytest.raises(RuntimeError, match="evaluation broke"):
        distiller.train(nnx_job.SGD, nnx_job.loader(4), num_epochs=2, callback=callback)
    assert steps_in(tmp_path / "out") == [4]
    assert len(read_events(tmp_path / "log")["scalar/total_loss"]) == 4
    jaxbrewer.load_student(tmp_path / "out", nnx_job.Encoder(2, 4))


def test_callback_stops_the_run_and_other_values_do_not(tmp_path):
    results = iter([{"accuracy": 0.5}, jaxbrewer.CallbackResult(stop=True)])
    distiller = nnx_job.distiller(tmp_path)
    with distiller:
        distiller.train(
            nnx_job.SGD, nnx_job.loader(2), num_epochs=9, callback=lambda model, step: next(results)
        )
    assert steps_in(tmp_path / "out") == [2, 4]


def test_nan_names_the_term_and_the_step(tmp_path):
    batches = [batch | {"noise": np.zeros(4, np.float32)} for batch in nnx_job.loader(6)]
    batches[4]["noise"][1] = np.nan
    distiller = nnx_job.distiller(tmp_path, ckpt_frequency=3)
    with distiller, pytest.raises(FloatingPointError) as caught:
        distiller.train(nnx_job.SGD, batches, num_epochs=1)
    message = str(caught.value)
    assert "global step 5 (micro-batch 4)" in message
    assert "unweighted_hard_label_loss = nan" in message
    assert "unweighted_kd_loss" not in message
    assert "gs4" in message
    assert steps_in(tmp_path / "out") == [2, 4]


def test_masks_that_select_different_counts_are_an_error(tmp_path):
    class Tokens(nnx_job.Encoder):
        def __call__(self, input_ids, attention_mask=None, labels=None):
            return {"logits": self.head(self.embed(input_ids))}

    batches = nnx_job.loader(2)
    batches[1]["attention_mask"][0, -2:] = 0
    distiller = jaxbrewer.BasicDistiller(
        jaxbrewer.TrainingConfig(output_dir=str(tmp_path), device="cpu"),
        jaxbrewer.DistillationConfig(),
        Tokens(1, 4),
        Tokens(1, 4, seed=1),
        lambda b, o: {"logits": o["logits"], "logits_mask": b["attention_mask"] * 0 + 1},
        lambda b, o: {"logits": o["logits"], "logits_mask": b["attention_mask"]},
    )
    with distiller, pytest.raises(BatchError, match=r"micro-batch 1 the teacher's .* 2 more"):
        distiller.train(nnx_job.SGD, batches, num_epochs=1)


def test_training_twice_on_one_distiller_goes_on(tmp_path):
    distiller = nnx_job.distiller(tmp_path, log=False)
    with distiller:
        distiller.train(nnx_job.SGD, nnx_job.loader(3), num_epochs=1)
        first = nnx_job.weights(distiller.model_S)
        distiller.train(nnx_job.SGD, nnx_job.loader(3), num_epochs=1)
    assert (nnx_job.weights(distiller.model_S)["head.kernel"] != first["head.kernel"]).any()
    assert steps_in(tmp_path / "out") == steps_in(tmp_path / "out" / "earlier-1") == [3]
    kept = jaxbrewer.load_student(tmp_path / "out" / "earlier-1", nnx_job.Encoder(2, 4))
    np.testing.assert_array_equal(nnx_job.weights(kept)["head.kernel"], first["head.kernel"])


def test_the_log_tells_the_plan_and_the_progress(tmp_path, caplog):
    caplog.set_level(logging.INFO, "jaxbrewer")
    distiller = nnx_job.distiller(tmp_path, log=False)
    with distiller:
        distiller.train(nnx_job.SGD, nnx_job.loader(2), num_epochs=2)
    for line in (
        "Training steps: 4; checkpoints at steps 2, 4",
        f"2 checkpoints of 0.0 MB in {tmp_path / 'out'}: 0.0 MB at the end; max_to_keep would",
        "Global step 2 of 4",
        "Saving at global step 2, epoch 1",
        "Epoch 2 finished",
        "Training finished at step 4",
    ):
        assert line in caplog.text


def test_what_checkpoints_will_take_is_told_at_the_start():
    def room(count, kept):
        return loop._room(count, 100.0, SimpleNamespace(max_to_keep=kept, folder="out"))

    assert room(3, None) == (
        "3 checkpoints of 100.0 MB in out: 300.0 MB at the end; max_to_keep would keep fewer"
    )
    assert room(3, 1) == "3 checkpoints of 100.0 MB in out, of which 1 stays: 200.0 MB at the most"
    assert room(1, None) == room(1, 2) == "1 checkpoint of 100.0 MB in out: 100.0 MB at the end"


class Unsized:
    """A loader without a length, like an iterable dataset's."""

    def __init__(self, batches):
        self.batches = batches
        self.passes = 0

    def __iter__(self):
        self.passes += 1
        return iter(self.batches)


def test_the_log_tells_each_shape_that_is_compiled(tmp_path, caplog):
    short = {k: v[:, :2] if v.ndim == 2 else v for k, v in fn_job.batches(1)[0].items()}
    caplog.set_level(logging.INFO)
    with fn_job.distiller(tmp_path) as distiller:
        distiller.train(fn_job.SGD, [*fn_job.batches(2), short, short], num_epochs=1)
    told = [m for m in caplog.messages if m.startswith("Compiling the step")]
    assert [m.partition(":")[0][-1] for m in told] == ["1", "2"]
    assert "ids int32[3,4]" in told[0].replace(" 4", "4") and "2]" in told[1]


def test_the_bar_shows_the_loss(tmp_path, monkeypatch):
    shown = io.StringIO()

    class Bar(tqdm):
        def __init__(self, **options):
            super().__init__(**(options | {"disable": False, "file": shown, "mininterval": 0}))

    monkeypatch.setattr(loop, "tqdm", Bar)
    with fn_job.distiller(tmp_path) as distiller:
        distiller.train(fn_job.SGD, fn_job.batches(12), num_epochs=1)
    assert re.search(r"12/12 .*loss \d\.\d+", shown.getvalue())


def test_steps_cycle_a_loader_without_a_length(tmp_path):
    stream = Unsized(nnx_job.loader(3))
    distiller = nnx_job.distiller(tmp_path, gradient_accumulation_steps=2)
    with distiller:
        distiller.train(nnx_job.SGD, stream, num_steps=4)
    assert stream.passes == 3
    assert len(read_events(tmp_path / "log")["scalar/total_loss"]) == 8
    assert steps_in(tmp_path / "out") == [4]


def test_loader_that_can_be_read_once_is_named_when_it_runs_dry(tmp_path):
    distiller = nnx_job.distiller(tmp_path)
    with distiller, pytest.raises(BatchError, match="iterated only once"):
        distiller.train(nnx_job.SGD, (b for b in nnx_job.loader(3)), num_steps=4)
    with distiller:
        distiller.train(nnx_job.SGD, (b for b in nnx_job.loader(3)), num_steps=3)
    with distiller, pytest.raises(BatchError, match="the loader is empty"):
        distiller.train(nnx_job.SGD, iter(()), num_steps=3)


def test_length_that_is_not_true_is_told(tmp_path, caplog):
    class Liar(list):
        def __len__(self):
            return 3

    distiller = nnx_job.distiller(tmp_path)
    with distiller:
        distiller.train(nnx_job.SGD, Liar(nnx_job.loader(4)), num_epochs=1)
    assert "epoch 1 had 4 batches, which is not what len(loader) announced" in caplog.text


def test_basic_trainer_trains_on_the_losses(tmp_path):
    model = nnx_job.Encoder(2, 4)
    trainer = jaxbrewer.BasicTrainer(
        jaxbrewer.TrainingConfig(
            output_dir=str(tmp_path / "o"), log_dir=str(tmp_path / "l"), device="cpu"
        ),
        model,
        lambda batch, outputs: {"losses": outputs["loss"]},
    )
    with trainer:
        trainer.train(nnx_job.SGD, nnx_job.loader(2), num_epochs=40)
    curve = read_events(tmp_path / "l")
    assert list(curve) == ["scalar/total_loss"]
    assert curve["scalar/total_loss"][-1] < 0.9 * curve["scalar/total_loss"][0]
    assert trainer.model is model


FULL = "OSError: no space left for"


@pytest.mark.parametrize("fails", ["log", "checkpoint", "both", "callback and both"])
def test_whatever_fails_the_checkpoint_is_waited_for_and_all_is_told(tmp_path, monkeypatch, fails):
    finalize = ocp.CompositeCheckpointHandler.finalize

    def slow(self, directory):
        time.sleep(0.3)
        if fails != "log":
            raise OSError("no space left for a checkpoint")
        finalize(self, directory)

    flushes = []

    def flush(self):
        flushes.append(1)
        if "callback" not in fails or len(flushes) > 1:  # the first is before the save
            raise OSError("no space left for the log")

    def callback(model, step):
        if "callback" in fails:
            raise RuntimeError("evaluation broke")

    monkeypatch.setattr(ocp.CompositeCheckpointHandler, "finalize", slow)
    if fails != "checkpoint":
        monkeypatch.setattr(MetricsWriter, "flush", flush)
    error, told, notes = {
        "log": (OSError, f"{FULL} the log", []),
        "checkpoint": (CheckpointError, f"{FULL} a checkpoint", []),
        "both": (OSError, f"{FULL} the log", [f"{FULL} a checkpoint"]),
        "callback and both": (
            RuntimeError,
            "RuntimeError: evaluation broke",
            [f"{FULL} a checkpoint", f"{FULL} the log"],
        ),
    }[fails]
    distiller = fn_job.distiller(tmp_path, log_dir=tmp_path / "log")
    with distiller, pytest.raises(error) as caught:
        distiller.train(fn_job.SGD, fn_job.batches(2), num_epochs=1, callback=callback)
    assert told in f"{type(caught.value).__name__}: {caught.value}"
    noted = getattr(caught.value, "__notes__", [])
    assert len(noted) == len(notes)
    assert all(text in note for text, note in zip(notes, noted, strict=True))
    assert steps_in(tmp_path / "out") == ([2] if fails == "log" else [])


def test_a_loss_that_is_not_finite_is_told_though_a_checkpoint_failed(tmp_path, monkeypatch):
    def fails(self, directory):
        raise OSError("no space left for a checkpoint")

    monkeypatch.setattr(ocp.CompositeCheckpointHandler, "finalize", fails)
    batches = [batch | {"scale": np.ones(3, np.float32)} for batch in fn_job.batches(3)]
    batches[2]["scale"][:] = np.nan
    scaled = fn_job.adaptor(logits=lambda b, o: o["logits"] * b["scale"][:, None])
    student = fn_job.encoder(2)
    encode = student.function
    student.function = lambda params, ids, mask, labels, scale: encode(params, ids, mask, labels)
    distiller = fn_job.distiller(tmp_path, student=student, keys_S=scaled, ckpt_steps=2)
    plain = [
        {"student": b, "teacher": {k: v for k, v in b.items() if k != "scale"}} for b in batches
    ]
    with distiller, pytest.raises(FloatingPointError, match="Nothing was saved yet") as caught:
        distiller.train(fn_job.SGD, plain, num_steps=3)
    (note,) = caught.value.__notes__
    assert note.startswith("writing the checkpoint failed too: CheckpointError: ")
    assert f"gs2 could not be written ({FULL} a checkpoint)" in note
