"""Checkpoints: what is saved when, what a resume brings back, and what is refused."""

import json

import jax
import numpy as np
import optax
import pytest

import jaxbrewer
from jaxbrewer.checkpoints import Checkpoints, checkpoint_path, steps_in
from jaxbrewer.errors import BatchError, CheckpointError
from tests import tiny
from tests.tiny import read_events

ADAMW = optax.adamw(1e-2)
MATCHES = [{k: v for k, v in m.items() if k != "proj"} for m in tiny.MATCHES[1:]] + [
    tiny.MATCHES[0] | {"proj": ["linear", 4, 6]}
]


def make(folder, **training):
    training = {"gradient_accumulation_steps": 2, "ckpt_frequency": 2, **training}
    return tiny.distiller(folder, distillation={"intermediate_matches": MATCHES}, **training)


class Killed(Exception):
    pass


def train(distiller, *, loader=None, callback=None, **how):
    how = how or {"num_epochs": 3}
    with distiller:
        distiller.train(ADAMW, loader or tiny.loader(7), callback=callback, **how)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One run from start to end: the folder, the curves, the weights."""
    folder = tmp_path_factory.mktemp("whole")
    distiller = make(folder)
    train(distiller)
    return folder, read_events(folder / "log"), tiny.weights(distiller.model_S)


def kill_at(when):
    def callback(model, step):
        if step == when:
            raise Killed

    return callback


@pytest.mark.parametrize("when", [1, 4, 6])
def test_resumed_run_ends_with_the_same_bits(tmp_path, whole, when):
    """Mid-epoch, with a leftover micro-batch after the last save, and at the end of an epoch."""
    _, curves, expected = whole
    with pytest.raises(Killed):
        train(make(tmp_path), callback=kill_at(when))
    assert steps_in(tmp_path / "out")[-1] == when
    resumed = make(tmp_path, resume=True)
    train(resumed)
    for name, value in tiny.weights(resumed.model_S).items():
        np.testing.assert_array_equal(value, expected[name], err_msg=name)
    again = read_events(tmp_path / "log")
    for tag, curve in curves.items():
        np.testing.assert_array_equal(again[tag], curve, err_msg=tag)


def test_run_by_steps_resumes_with_the_same_bits(tmp_path):
    how = {"num_steps": 8}
    one = make(tmp_path / "a", ckpt_steps=3)
    train(one, **how)
    assert steps_in(tmp_path / "a" / "out") == [3, 6, 8]
    with pytest.raises(Killed):
        train(make(tmp_path / "b", ckpt_steps=3), callback=kill_at(6), **how)
    two = make(tmp_path / "b", ckpt_steps=3, resume=True)
    train(two, **how)
    for name, value in tiny.weights(two.model_S).items():
        np.testing.assert_array_equal(value, tiny.weights(one.model_S)[name])


def test_shuffling_loader_resumes_in_its_own_order(tmp_path):
    """A loader with a random state of its own, and a postprocessor on numpy's global one."""

    class Shuffled:
        def __init__(self):
            self.rng = np.random.default_rng(5)
            self.batches = tiny.loader(7)

        def __len__(self):
            return len(self.batches)

        def __iter__(self):
            return iter([self.batches[i] for i in self.rng.permutation(7)])

    def noisy(batch):
        return batch | {"input_ids": np.random.randint(0, tiny.VOCABULARY, (4, 5))}

    def run(folder, callback=None, **training):
        np.random.seed(0)
        distiller = make(folder, **training)
        with distiller:
            distiller.train(
                ADAMW, Shuffled(), num_epochs=2, callback=callback, batch_postprocessor=noisy
            )
        return tiny.weights(distiller.model_S)

    expected = run(tmp_path / "a")
    with pytest.raises(Killed):
        run(tmp_path / "b", kill_at(4))
    for name, value in run(tmp_path / "b", resume=True).items():
        np.testing.assert_array_equal(value, expected[name])


def test_resume_after_the_end_gives_the_trained_student(whole):
    folder, _, expected = whole
    finished = make(folder, resume=True)
    train(finished)
    for name, value in tiny.weights(finished.model_S).items():
        np.testing.assert_array_equal(value, expected[name])


def test_resume_with_nothing_saved_starts_anew(tmp_path, whole):
    fresh = make(tmp_path, resume=True)
    train(fresh)
    for name, value in tiny.weights(fresh.model_S).items():
        np.testing.assert_array_equal(value, whole[2][name])


@pytest.mark.filterwarnings("ignore:the hidden matches use")
def test_resume_is_refused_where_it_would_not_be_the_same_run(tmp_path, whole):
    folder, *_ = whole
    with pytest.raises(CheckpointError, match="gradient_accumulation_steps=2, not 1"):
        train(make(folder, resume=True, gradient_accumulation_steps=1))
    other = tiny.distiller(
        folder,
        resume=True,
        gradient_accumulation_steps=2,
        distillation={"intermediate_matches": MATCHES},
        student=tiny.Encoder(3, 4, seed=2),
    )
    with pytest.raises(CheckpointError, match=r"layers\.2\.kernel: not in the checkpoint"):
        train(other, num_epochs=4)
    with pytest.raises(BatchError, match="saved after batch 6"):
        train(make(folder, resume=True), loader=tiny.loader(2), num_epochs=40)


def test_new_run_in_a_used_folder_loses_nothing(tmp_path, caplog):
    train(make(tmp_path), num_epochs=1)
    kept = sorted(p.name for p in (tmp_path / "out").iterdir())
    train(make(tmp_path), num_epochs=1)
    assert sorted(p.name for p in (tmp_path / "out" / "earlier-1").iterdir()) == kept
    assert "earlier-1" in caplog.text


def test_max_to_keep_keeps_the_best_and_the_newest(tmp_path):
    scores = {1: 0.1, 3: 0.9, 4: 0.3, 6: 0.2}

    def callback(model, step):
        return jaxbrewer.CallbackResult(score=scores[step])

    distiller = make(tmp_path, max_to_keep=2)
    train(distiller, callback=callback, num_epochs=2)
    assert steps_in(tmp_path / "out") == [3, 6]
    assert distiller.best_checkpoint == tmp_path / "out" / "gs3"


def test_load_student_by_checkpoint_and_by_folder(whole):
    folder, _, expected = whole
    student = tiny.Encoder(2, 4, seed=9)
    assert jaxbrewer.load_student(folder / "out", student) is student
    for name, value in tiny.weights(student).items():
        np.testing.assert_array_equal(value, expected[name])
    jaxbrewer.load_student(folder / "out" / "gs1", student)
    assert any((tiny.weights(student)[name] != expected[name]).any() for name in expected)


def test_load_student_refuses_what_does_not_fit(tmp_path, whole):
    folder, *_ = whole
    with pytest.raises(
        CheckpointError, match=r"embed\.embedding: saved as \[20, 4\], wanted \[20, 5\]"
    ):
        jaxbrewer.load_student(folder / "out", tiny.Encoder(2, 5))
    with pytest.raises(CheckpointError, match="is not there"):
        jaxbrewer.load_student(tmp_path / "nowhere", tiny.Encoder(2, 4))
    (tmp_path / "gs9").mkdir()
    with pytest.raises(CheckpointError, match="no finished checkpoint"):
        checkpoint_path(tmp_path)
    with pytest.raises(TypeError, match="save_pretrained"):
        jaxbrewer.export_hf(folder / "out", tiny.Encoder(2, 4), tmp_path / "hf")


def test_damaged_checkpoint_is_named(tmp_path):
    train(make(tmp_path), num_epochs=1)
    for path in (tmp_path / "out" / "gs3" / "student").rglob("*"):
        if path.is_file() and path.stat().st_size > 200 and "d" in path.parts[-2:]:
            path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match=r"gs3 cannot be read .*gs1"):
        jaxbrewer.load_student(tmp_path / "out", tiny.Encoder(2, 4))


def test_position_is_readable_json(whole):
    folder, *_ = whole
    saved = json.loads((folder / "out" / "gs4" / "position" / "metadata").read_text())
    assert (saved["format"], saved["epoch"], saved["batch"]) == (1, 1, 2)
    assert saved["distill_config"]["temperature"] == 4
    assert jaxbrewer.DistillationConfig.from_dict(saved["distill_config"])


def test_output_dir_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="cannot be made"):
        Checkpoints(tmp_path / "file" / "out", resume=False, max_to_keep=None)


def test_checkpoint_holds_projections(whole):
    folder, *_ = whole
    distiller = make(folder, resume=True)
    before = tiny.weights(distiller.projs[1])
    train(distiller, num_epochs=4)
    assert jax.tree.all(
        jax.tree.map(lambda a, b: bool((a != b).any()), before, tiny.weights(distiller.projs[1]))
    )
