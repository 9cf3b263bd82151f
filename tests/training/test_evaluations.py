"""Evaluation by `train` itself: when, by which weights, where the numbers go, and what it costs nothing."""

import json
import logging

import jax
import numpy as np
import optax
import pytest

import jaxbrewer
from jaxbrewer.data import bucket_by_length
from jaxbrewer.errors import CheckpointError
from jaxbrewer.evaluation import Accuracy, Agreement, Divergence
from jaxbrewer.training import folders, read_scalars
from jaxbrewer.training.folders import evaluations_in, scores_in, steps_in

from .. import fn_job
from ..durability.test_curves import points

DEV = [*fn_job.batches(2, seed=5), *fn_job.batches(1, size=2, seed=6)]
LOADER = fn_job.batches(4)


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """What is compared here does not depend on how well programs are optimized."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


class Killed(BaseException):
    """Stands for a kill."""


class Sum:
    """The sum of all logits: another number for other weights."""

    seen = 0
    killed_at = None

    def __init__(self):
        self.sum = 0.0

    def update(self, batch, results):
        self.sum += float(np.sum(results["logits"], dtype=float))

    def compute(self):
        Sum.seen += 1
        if Sum.seen == Sum.killed_at:
            raise Killed
        return {"sum": self.sum}


def train(folder, *, steps=None, **options):
    """Two epochs of four batches, or so many steps; returns the distiller and its weights."""
    config = {"log_dir": folder / "log", "ckpt_frequency": 2}
    config |= {k: options.pop(k) for k in ("resume", "max_to_keep", "ckpt_steps") if k in options}
    distiller = fn_job.distiller(folder, **config)
    lengths = {"num_epochs": 2} if steps is None else {"num_steps": steps}
    with distiller:
        distiller.train(optax.sgd(0.5, momentum=0.9), LOADER, **lengths, **options)
    return distiller


def weights(distiller):
    return [np.asarray(x) for x in jax.tree.leaves(distiller.model_S.params)]


def same(one, other):
    return all((a == b).all() for a, b in zip(weights(one), weights(other), strict=True))


def curves(folder):
    """All curves but for the training's own."""
    return {tag: c for tag, c in read_scalars(folder / "log").items() if tag.startswith("eval/")}


# ---------------------------------------------------------------------------- what it does


def test_at_each_checkpoint_with_its_weights(tmp_path, caplog):
    caplog.set_level(logging.INFO, "jaxbrewer")
    seen = []

    def callback(model, step):
        here = tested.best_checkpoint
        seen.append((step, dict(tested.evaluations[step]), here and here.name))
        assert tested.evaluate(DEV, [Sum(), Accuracy()]) == tested.evaluations[step]

    tested = fn_job.distiller(tmp_path, log_dir=tmp_path / "log", ckpt_frequency=2)
    with tested:
        tested.train(
            optax.sgd(0.5, momentum=0.9), LOADER, num_epochs=2, callback=callback,
            eval_loader=DEV, metrics=[Sum(), Accuracy()], best_metric="-sum",
        )  # fmt: skip
    assert [step for step, _, _ in seen] == list(tested.evaluations) == [2, 4, 6, 8]
    sums = {step: found["sum"] for step, found in tested.evaluations.items()}
    assert len(set(sums.values())) == 4
    assert scores_in(tmp_path / "out") == {step: -value for step, value in sums.items()}
    for step, _, best in seen:  # the best one is known to the callback already
        assert best == f"gs{min((s for s in sums if s <= step), key=sums.get)}"
    assert tested.best_checkpoint.name == f"gs{min(sums, key=sums.get)}"
    # Each at the last micro-batch before it, so that one that goes on from there keeps it.
    logged = curves(tmp_path)
    assert logged.keys() == {"eval/sum", "eval/accuracy"}
    wanted = {step - 1: np.float32(value) for step, value in sums.items()}
    assert logged["eval/sum"] == wanted
    last = tested.evaluations[8]
    assert (
        f"Evaluated at step 8: sum {last['sum']:.4g}, accuracy {last['accuracy']:.4g} ("
        in caplog.text
    )
    assert same(tested, train(tmp_path / "without"))


def test_after_every_so_many_steps_too(tmp_path):
    tested = train(tmp_path, eval_loader=DEV, metrics=[Sum()], eval_steps=3)
    assert list(tested.evaluations) == [2, 3, 4, 6, 8]
    assert list(curves(tmp_path)["eval/sum"]) == [1, 2, 3, 5, 7]
    assert steps_in(tmp_path / "out") == [2, 4, 6, 8]
    assert scores_in(tmp_path / "out") == {}
    assert tested.best_checkpoint is None
    assert train(tmp_path / "three", steps=3).evaluate(DEV, [Sum()]) == tested.evaluations[3]
    assert same(tested, train(tmp_path / "without"))


def test_what_is_compiled_for_a_shape_serves_all(tmp_path):
    traced = []

    def adaptor(batch, outputs):
        traced.append(batch["ids"].shape)
        return {"logits": outputs["logits"]}

    loader = fn_job.batches(4, size=7)
    tested = fn_job.distiller(tmp_path, keys_T=("logits",), keys_S=adaptor)
    asked = {"eval_loader": DEV, "metrics": [Sum(), Agreement()], "eval_steps": 1}
    with tested:
        tested.train(fn_job.SGD, loader, num_epochs=2, **asked)
    tested.evaluate(DEV, [Sum(), Agreement()])
    assert [shape[0] for shape in traced if shape[0] != 7] == [3, 2]


def test_the_data_and_the_random_states_do_not_notice(tmp_path):
    """A loader that draws, and metrics that do, beside a training that draws."""

    class Drawn(list):
        def __iter__(self):
            return iter([self[i] for i in np.random.permutation(len(self))])

    class Draws(Sum):
        def compute(self):
            return {"sum": float(np.random.random())}

    found = []
    for name, asked in (
        ("with", {"eval_loader": Drawn(DEV), "metrics": [Draws()]}),
        ("without", {}),
    ):
        np.random.seed(3)
        distiller = fn_job.distiller(tmp_path / name)
        with distiller:
            distiller.train(fn_job.SGD, Drawn(LOADER), num_epochs=3, **asked)
        found.append((distiller, np.random.random()))
    assert same(found[0][0], found[1][0])
    assert found[0][1] == found[1][1]


def test_several_tasks(tmp_path):
    tasks = {name: fn_job.encoder(i) for i, name in enumerate("ab")}
    heads = dict.fromkeys(tasks, fn_job.adaptor("logits"))
    several = jaxbrewer.MultiTaskDistiller(
        jaxbrewer.TrainingConfig(output_dir=tmp_path, device="cpu", ckpt_steps=2),
        jaxbrewer.DistillationConfig(), tasks, fn_job.encoder(7), heads, heads,
    )  # fmt: skip
    loaders = dict.fromkeys(tasks, LOADER)
    asked = {"eval_loader": {"b": DEV}, "metrics": {"b": [Accuracy(), Divergence()]}}
    with several:
        several.train(fn_job.SGD, loaders, num_steps=4, best_metric="-b/kl", **asked)
    assert {tuple(found) for found in several.evaluations.values()} == {("b/accuracy", "b/kl")}
    best = min(several.evaluations, key=lambda step: several.evaluations[step]["b/kl"])
    assert several.best_checkpoint.name == f"gs{best}"
    for loader, message in (
        (DEV, "a dict of loaders by task, of the tasks a, b; it is a list"),
        ({"c": DEV}, r"of the tasks a, b; it is \['c'\]"),
        ({}, "eval_loader is an empty dict"),
        ({"a": DEV[0]}, r"eval_loader\['a'\] is one batch"),
        ({"a": iter(DEV)}, r"eval_loader\['a'\] is a list_iterator"),
    ):
        with several, pytest.raises((TypeError, ValueError), match=message):
            several.train(fn_job.SGD, loaders, 2, eval_loader=loader, metrics=[Accuracy()])


# ---------------------------------------------------------------------------- what it refuses


class Typo(Sum):
    def update(self, batch, results):
        return results["logit"]


class Spread(Sum):
    """Cannot say anything of one batch."""

    def __init__(self):
        self.sums = []

    def update(self, batch, results):
        self.sums.append(results["logits"].sum())

    def compute(self):
        return {"spread": np.var(self.sums) / (len(self.sums) - 1 or 1 // 0)}


def generator():
    yield from DEV


ASKED = {"eval_loader": DEV, "metrics": [Accuracy()]}
WRONG = {
    "no loader": (ValueError, "^metrics without eval_loader: say on what", {"metrics": [Accuracy()]}),
    "no metrics": (ValueError, "eval_loader without metrics: say what", {"eval_loader": DEV}),
    "steps alone": (ValueError, "eval_steps=5 without eval_loader", {"eval_steps": 5}),
    "a best alone": (ValueError, "best_metric='accuracy' without eval", {"best_metric": "accuracy"}),
    "one batch": (TypeError, "eval_loader is one batch, a dict with the keys ids, mask, labels",
                  {**ASKED, "eval_loader": DEV[0]}),
    "a number": (TypeError, "eval_loader is a int, which cannot be iterated",
                 {**ASKED, "eval_loader": 3}),
    "a generator": (TypeError, r"eval_loader is a generator, which the first evaluation would exhaust;"
                    r" give list\(loader\)", {**ASKED, "eval_loader": generator()}),
    "nothing in it": (ValueError, "the loader gave no batch", {**ASKED, "eval_loader": []}),
    "no steps": (ValueError, "eval_steps=0: expected a whole number", {**ASKED, "eval_steps": 0}),
    "a flag": (ValueError, "eval_steps=True: expected", {**ASKED, "eval_steps": True}),
    "another best": (ValueError, "best_metric='-acuracy' is none of what the metrics give: did you "
                     "mean 'accuracy'?", {**ASKED, "best_metric": "-acuracy"}),
    "no name": (TypeError, "best_metric=3: expected the name", {**ASKED, "best_metric": 3}),
    "a class": (ValueError, r"write Accuracy\(\)", {**ASKED, "metrics": [Accuracy]}),
    "no list": (ValueError, "expected a list such as", {**ASKED, "metrics": Accuracy()}),
    "two of a name": (ValueError, "two metrics give 'accuracy'",
                      {**ASKED, "metrics": [Accuracy(), Accuracy()]}),
    "no labels": (ValueError, "Accuracy needs 'labels'", {**ASKED, "eval_loader":
                  [{k: b[k] for k in ("ids", "mask")} for b in DEV]}),
    "a slip of the user's": (KeyError, "logit", {**ASKED, "metrics": [Typo()]}),
    "a misspelt keyword": (jaxbrewer.errors.PreflightError, "did you mean 'eval_loader'",
                           {"eval_loaders": DEV}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_mistakes_are_told_before_anything_is_written(name, tmp_path):
    error, message, asked = WRONG[name]
    distiller = fn_job.distiller(tmp_path)
    with distiller, pytest.raises(error, match=message):
        distiller.train(fn_job.SGD, LOADER, num_epochs=1, **asked)
    assert steps_in(tmp_path / "out") == []
    assert not (tmp_path / "out" / "evaluations.json").exists()


def test_the_trainings_own_loader_is_refused_unless_it_can_be_shared(tmp_path):
    class Stream:
        def __len__(self):
            return 4

        def __iter__(self):
            return iter(LOADER)

    shared = Stream()
    with pytest.raises(ValueError, match="is the loader that is trained on"):
        fn_job.distiller(tmp_path / "a").train(
            fn_job.SGD, shared, num_epochs=1, eval_loader=shared, metrics=[Sum()]
        )
    examples = [{k: v[i] for k, v in b.items()} for b in LOADER for i in range(3)]
    loader = bucket_by_length(examples, 3)
    for each in (LOADER, loader):
        distiller = fn_job.distiller(tmp_path / "b")
        with distiller:
            distiller.train(fn_job.SGD, each, num_epochs=1, eval_loader=each, metrics=[Sum()])
        assert list(distiller.evaluations) == [4]


def test_a_name_that_one_batch_does_not_tell_is_checked_at_the_first_evaluation(tmp_path):
    """The checkpoint is there all the same, and is evaluated by the run that goes on."""
    asked = {"eval_loader": DEV, "metrics": [Spread()], "steps": 2}
    with pytest.raises(ValueError, match=r"best_metric='spred' is none .* mean 'spread'"):
        train(tmp_path, best_metric="spred", **asked)
    assert steps_in(tmp_path / "out") == [2]
    gone_on = train(tmp_path, resume=True, best_metric="spread", **asked)
    assert list(gone_on.evaluations) == list(scores_in(tmp_path / "out")) == [2]


def test_one_that_fails_between_checkpoints_saves_the_state(tmp_path):
    class Fails(Sum):
        def update(self, batch, results):
            if Fails.is_down:
                raise OSError("the file is gone")
            super().update(batch, results)

    Fails.is_down = False

    def callback(model, step):
        Fails.is_down = True

    asked = {"eval_loader": DEV, "metrics": [Fails()], "eval_steps": 3}
    with pytest.raises(OSError, match="the file is gone"):
        train(tmp_path, callback=callback, **asked)
    assert steps_in(tmp_path / "out") == [2, 3]
    Fails.is_down = False
    gone_on = train(tmp_path, resume=True, **asked)
    whole = train(tmp_path / "whole", **asked)
    assert gone_on.evaluations == whole.evaluations
    assert same(gone_on, whole)
    assert curves(tmp_path) == curves(tmp_path / "whole")


# ---------------------------------------------------------------------------- scores


def test_a_callbacks_own_score_counts_first(tmp_path, caplog):
    def callback(model, step):
        return jaxbrewer.CallbackResult(score=float(-step))

    asked = {"eval_loader": DEV, "metrics": [Sum()], "best_metric": "sum"}
    tested = train(tmp_path, callback=callback, **asked)
    assert scores_in(tmp_path / "out") == {2: -2.0, 4: -4.0, 6: -6.0, 8: -8.0}
    assert tested.best_checkpoint.name == "gs2"
    assert caplog.text.count("counts in place of best_metric='sum'") == 1


def test_a_number_that_is_not_finite_is_no_score(tmp_path, caplog):
    class Nothing(Sum):
        def compute(self):
            return {"nothing": float("nan")}

    tested = train(tmp_path, eval_loader=DEV, metrics=[Nothing()], best_metric="nothing")
    assert tested.best_checkpoint is None
    assert "gs2 has no score: nothing is nan" in caplog.text
    assert np.isnan(evaluations_in(tmp_path / "out")[8]["nothing"])


def test_the_best_are_kept(tmp_path):
    asked = {"eval_loader": DEV, "metrics": [Sum()], "best_metric": "sum", "max_to_keep": 2}
    tested = train(tmp_path, **asked)
    sums = {step: found["sum"] for step, found in tested.evaluations.items()}
    best = max(sorted(sums)[:-1], key=sums.get)
    assert steps_in(tmp_path / "out") == [best, 8]


# ---------------------------------------------------------------------------- resumed


RESUMED = {"eval_loader": DEV, "metrics": [Sum()], "best_metric": "sum", "eval_steps": 3}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run that nothing kills: the distiller and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    return train(folder, **RESUMED), folder


def die():
    raise Killed


def killed_in_an_evaluation(folder, at, monkeypatch):
    """In the rehearsal of each start, too."""
    Sum.seen, Sum.killed_at = 0, at
    with pytest.raises(Killed):
        train(folder, resume=True, **RESUMED)
    Sum.killed_at = None


def killed_before_it_is_kept(folder, at, monkeypatch):
    """Its numbers are in the logs already, and its score is noted."""
    written, write = [], folders.write_beside

    def count(there, name, value):
        written.extend([1] if name == folders.EVALUATIONS else [])
        die() if len(written) == at else write(there, name, value)

    with monkeypatch.context() as patched, pytest.raises(Killed):
        patched.setattr(folders, "write_beside", count)
        train(folder, resume=True, **RESUMED)


def killed_in_the_callback(folder, at, monkeypatch):
    """The evaluation is kept, and no mark stands behind its numbers yet."""
    with pytest.raises(Killed):
        train(folder, resume=True, callback=lambda model, step: step == at and die(), **RESUMED)


@pytest.mark.parametrize(
    ("kill", "times"),
    [
        (killed_in_an_evaluation, (2,)),
        (killed_in_an_evaluation, (5, 2)),
        (killed_in_an_evaluation, (6,)),  # the last one, of a run that is finished
        (killed_before_it_is_kept, (1,)),
        (killed_before_it_is_kept, (4, 1)),
        (killed_in_the_callback, (2, 6)),
    ],
)
def test_a_killed_run_ends_as_a_whole_one(kill, times, whole, tmp_path, monkeypatch):
    """Whatever was not kept is evaluated anew, and is in the curves once."""
    for at in times:
        kill(tmp_path, at, monkeypatch)
    cut = train(tmp_path, resume=True, **RESUMED)
    distiller, folder = whole
    assert same(cut, distiller)
    assert cut.evaluations == distiller.evaluations == evaluations_in(tmp_path / "out")
    assert list(cut.evaluations) == [2, 3, 4, 6, 8]
    assert curves(tmp_path) == curves(folder)
    assert scores_in(tmp_path / "out") == scores_in(folder / "out")
    assert cut.best_checkpoint.name == distiller.best_checkpoint.name


@pytest.mark.torch  # tensorboard comes with it
@pytest.mark.parametrize("kill", [killed_before_it_is_kept, killed_in_the_callback])
def test_tensorboard_has_every_point_once(kill, whole, tmp_path, monkeypatch):
    kill(tmp_path, 4, monkeypatch)
    train(tmp_path, resume=True, **RESUMED)
    assert points(tmp_path / "log") == points(whole[1] / "log")


def test_what_was_evaluated_after_the_checkpoint_is_forgotten(tmp_path):
    """And what is asked of a run that goes on may be another evaluation, or none."""
    asked = {"eval_loader": DEV, "metrics": [Sum()], "eval_steps": 1}
    train(tmp_path, **asked)
    other = train(tmp_path, resume="gs4", eval_loader=DEV[:1], metrics=[Accuracy()])
    assert {step: [*found] for step, found in other.evaluations.items()} == {
        1: ["sum"], 2: ["sum"], 3: ["sum"], 4: ["sum"], 6: ["accuracy"], 8: ["accuracy"],
    }  # fmt: skip
    assert {tag: list(c) for tag, c in curves(tmp_path).items()} == {
        "eval/sum": [0, 1, 2, 3], "eval/accuracy": [5, 7],
    }  # fmt: skip
    none = train(tmp_path, resume=True)
    assert none.evaluations == other.evaluations
    elsewhere = train(tmp_path / "new", resume=str(tmp_path / "out" / "gs4"))
    assert list(elsewhere.evaluations) == [1, 2, 3, 4]
    assert list(evaluations_in(tmp_path / "new" / "out")) == [1, 2, 3, 4]
    anew = train(tmp_path)
    assert anew.evaluations == {}
    assert list(evaluations_in(tmp_path / "out" / "earlier-2")) == [1, 2, 3, 4, 6, 8]


def test_a_damaged_file_is_named(tmp_path):
    train(tmp_path, eval_loader=DEV, metrics=[Sum()])
    path = tmp_path / "out" / "evaluations.json"
    for content in ([1], {"2": 3}, {"two": {}}, {"2": {"sum": "x"}}):
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"evaluations.json is damaged: .*; delete it"):
            train(tmp_path, resume=True)
    path.unlink()
    assert train(tmp_path, resume=True).evaluations == {}
