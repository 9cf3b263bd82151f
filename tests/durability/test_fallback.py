"""Which checkpoint a run goes on from, where some are damaged, unfinished, or one is named."""

import json
import logging
import shutil

import numpy as np
import pytest

import jaxbrewer
from jaxbrewer.errors import CheckpointError, ConfigError, DamagedCheckpointError
from jaxbrewer.training.folders import scores_in, steps_in
from tests import fn_job

STEPS = [2, 4, 6]


def train(folder, epochs=3, **options):
    """Trains in a folder to the end; returns the trained numbers."""
    distiller = fn_job.distiller(folder, **options)
    with distiller:
        distiller.train(fn_job.SGD, fn_job.batches(2), num_epochs=epochs)
    return numbers(distiller.model_S)


def numbers(model):
    return np.concatenate([np.ravel(model.params["embed"]), np.ravel(model.params["head"])])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of three checkpoints, with scores, and what it ended with."""
    folder = tmp_path_factory.mktemp("whole")
    distiller = fn_job.distiller(folder)
    with distiller:
        distiller.train(
            fn_job.SGD,
            fn_job.batches(2),
            num_epochs=3,
            callback=lambda model, step: jaxbrewer.CallbackResult(score=step),
        )
    return folder, numbers(distiller.model_S)


@pytest.fixture
def out(whole, tmp_path):
    """A copy of its folder, to be damaged."""
    return shutil.copytree(whole[0] / "out", tmp_path / "out")


def files(path, part):
    return [p for p in (path / part).rglob("*") if p.is_file()]


def truncate(path):
    for file in files(path, "student/d") + files(path, "student/ocdbt.process_0"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def change_position(path, **changes):
    file = path / "position" / "metadata"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


DAMAGES = {
    "truncated": (truncate, "cannot be read"),
    "sharding": (
        lambda path: [p.write_text('{"a": 1}') for p in files(path, ".") if p.name == "_sharding"],
        "",
    ),
    "no student": (lambda path: shutil.rmtree(path / "student"), ""),
    "no optimizer": (lambda path: shutil.rmtree(path / "training"), ""),
    "other step": (lambda path: change_position(path, global_step=10**9), "not what was saved"),
    "no digest": (
        lambda path: change_position(path, digest=None),
        "its position is not what was saved",
    ),
    "other names": (
        lambda path: (path / "student" / "_METADATA").write_text(
            (path / "student" / "_METADATA").read_text().replace("embed", "embad")
        ),
        "",
    ),
    "no json": (lambda path: (path / "position" / "metadata").write_text("{"), "cannot be read"),
    "renamed": (
        lambda path: (shutil.rmtree(path), shutil.copytree(path.parent / "gs4", path)),
        "global_step is 4 in a folder named gs6",
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_the_newest_that_is_whole_is_taken(damage, whole, out, caplog):
    harm, why = DAMAGES[damage]
    caplog.set_level(logging.INFO, "jaxbrewer")
    harm(out / "gs6")
    found = train(out.parent, resume=True)
    np.testing.assert_array_equal(found, whole[1])
    assert steps_in(out) == STEPS
    assert "gs6 is passed over: it " in caplog.text
    assert why in caplog.text
    assert "resuming at step 4 of 6, epoch 2, from gs4, verified" in caplog.text
    assert "gs6 is newer than gs4, from which this run goes on: moved to" in caplog.text
    assert (out / "earlier-1" / "gs6").is_dir()
    assert scores_in(out) == {2: 2, 4: 4}  # that of the old gs6 went with it


def test_where_none_is_whole_the_run_is_refused(out):
    for step in STEPS:
        change_position(out / f"gs{step}", epoch=7)
    with pytest.raises(
        CheckpointError, match=r"(?s)is whole:.*gs6 is damaged.*gs2 is.*resume=False"
    ):
        train(out.parent, resume=True)
    assert steps_in(out) == STEPS
    with pytest.raises(CheckpointError, match=r"no checkpoint in .* is whole"):
        jaxbrewer.load_student(out, fn_job.encoder(2))


def test_a_checkpoint_is_named(whole, out, tmp_path, caplog):
    caplog.set_level(logging.INFO, "jaxbrewer")
    np.testing.assert_array_equal(train(tmp_path, resume="gs2"), whole[1])
    assert "resuming at step 2 of 6, epoch 1, from gs2, verified" in caplog.text
    assert "gs4, gs6 are newer than gs2" in caplog.text
    assert steps_in(out) == STEPS == [2, *steps_in(out / "earlier-1")]
    # by a path, into a folder of its own
    found = train(tmp_path / "other", resume=whole[0] / "out" / "gs4")
    np.testing.assert_array_equal(found, whole[1])
    assert steps_in(tmp_path / "other" / "out") == [6]


def test_a_named_one_is_not_replaced_by_another(out):
    change_position(out / "gs4", epoch=7)
    with pytest.raises(CheckpointError, match=r"resume='gs4'.*is damaged: its position"):
        train(out.parent, resume="gs4")
    with pytest.raises(CheckpointError, match=r"gs5 is not there. Finished ones: gs2, gs4, gs6"):
        train(out.parent, resume="gs5")
    with pytest.raises(DamagedCheckpointError, match=r"Others beside it: gs2, gs6;"):
        jaxbrewer.load_student(out / "gs4", fn_job.encoder(2))
    assert steps_in(out) == STEPS


def test_an_unfinished_folder_is_not_in_the_way(whole, out, caplog):
    caplog.set_level(logging.INFO, "jaxbrewer")
    (out / "gs6" / "_CHECKPOINT_METADATA").unlink()
    (out / "gs6.orbax-checkpoint-tmp").mkdir()
    np.testing.assert_array_equal(train(out.parent, resume=True), whole[1])
    assert steps_in(out) == STEPS
    assert "gs6 is unfinished: without _CHECKPOINT_METADATA" in caplog.text
    assert sorted(p.name for p in out.iterdir()) == [
        "earlier-1",
        "gs2",
        "gs4",
        "gs6",
        "scores.json",
    ]


def test_load_student_takes_the_newest_that_is_whole(out, caplog):
    wanted = numbers(jaxbrewer.load_student(out / "gs4", fn_job.encoder(5)))
    truncate(out / "gs6")
    np.testing.assert_array_equal(numbers(jaxbrewer.load_student(out, fn_job.encoder(5))), wanted)
    assert "gs6 is passed over: it cannot be read" in caplog.text


def test_a_finished_run_whose_end_is_damaged_is_trained_again(whole, out):
    truncate(out / "gs6")
    np.testing.assert_array_equal(train(out.parent, resume=True), whole[1])


def as_format_1(path):
    file = path / "position" / "metadata"
    position = json.loads(file.read_text()) | {"format": 1}
    del position["digest"], position["digests"]
    file.write_text(json.dumps(position))


def test_format_1_is_read_with_a_line(whole, out, caplog):
    caplog.set_level(logging.INFO, "jaxbrewer")
    as_format_1(out / "gs4")
    np.testing.assert_array_equal(train(out.parent, resume="gs4"), whole[1])
    assert "from gs4, not verified" in caplog.text
    assert caplog.text.count("is of format 1, which has no digests") == 1
    jaxbrewer.load_student(out / "gs4", fn_job.encoder(5))
    assert caplog.text.count("is of format 1, which has no digests") == 2


def test_a_format_1_position_that_cannot_be_is_named(out):
    as_format_1(out / "gs6")
    change_position(out / "gs6", global_step=10**9)
    with pytest.raises(CheckpointError, match="global_step is 1000000000 in a folder named gs6"):
        train(out.parent, resume="gs6")
    change_position(out / "gs6", global_step=-1, processes=[])
    with pytest.raises(
        CheckpointError, match=r"global_step is -1, expected .*; processes is \[\], expected"
    ):
        train(out.parent, resume="gs6")


def test_a_later_format_is_refused_as_such(out):
    from jaxbrewer.training.digests import json_digest

    file = out / "gs6" / "position" / "metadata"
    position = json.loads(file.read_text()) | {"format": 3}
    del position["digest"]
    file.write_text(json.dumps(position | {"digest": json_digest(position)}))
    with pytest.raises(CheckpointError, match="format 3, and this version reads up to 2: update"):
        train(out.parent, resume=True)


def test_the_config_says_which(tmp_path):
    make = jaxbrewer.TrainingConfig
    for given, kept in (
        (True, True), (np.False_, False), ("gs12", "gs12"), ("./gs12", "./gs12"), ("a/gs12", "a/gs12"),
        (tmp_path, str(tmp_path)),
    ):  # fmt: skip
        config = make(resume=given)
        assert config.resume == kept
        config.to_json_file(tmp_path / "config.json")
        assert make.from_json_file(tmp_path / "config.json") == config
    for wrong in ("yes", "", "gs", 1, None, "a/\0"):
        with pytest.raises(ConfigError, match="the name of a checkpoint"):
            make(resume=wrong)
