"""The numbers of eight devices against those of one, over 20 steps of every distiller."""

import functools
import logging
import shutil
from dataclasses import replace

import jax
import numpy as np
import optax
import pytest

import jaxbrewer
from jaxbrewer.data import streams
from jaxbrewer.data.batches import own, sides
from jaxbrewer.evaluation import Accuracy, Divergence, Evaluator
from jaxbrewer.objective.loss import Weights
from jaxbrewer.preflight import prepare
from jaxbrewer.training import read_scalars

from .. import nnx_job
from . import every

STEPS = 20


def run(name, folder, loader, **options):
    distiller = every.JOBS[name](every.config(folder, **options))
    every.train(distiller, loader)
    return distiller, read_scalars(folder / "log")


def assert_same(distiller, curves, wanted_distiller, wanted_curves, rtol=1e-5):
    assert curves.keys() == wanted_curves.keys()
    for tag, points in wanted_curves.items():
        assert points.keys() == curves[tag].keys()
        np.testing.assert_allclose(
            [curves[tag][step] for step in points], list(points.values()), rtol=rtol, err_msg=tag
        )
    wanted = nnx_job.weights(wanted_distiller.model_S)
    for key, value in nnx_job.weights(distiller.model_S).items():
        np.testing.assert_allclose(
            value, wanted[key], rtol=rtol, atol=rtol * np.abs(wanted[key]).max(), err_msg=key
        )


@pytest.fixture(scope="module", params=every.JOBS)
def one_device(request, tmp_path_factory):
    loader = every.batches(STEPS)
    return request.param, loader, *run(request.param, tmp_path_factory.mktemp("one"), loader)


def test_there_are_eight_devices():
    assert len(jax.devices("cpu")) == 8


@pytest.mark.parametrize("sharding", [None, "optimizer", "all"])
def test_sharded_equals_one_device(one_device, sharding, tmp_path):
    name, loader, *wanted = one_device
    found = run(name, tmp_path, loader, data_parallel=True, sharding=sharding)
    assert_same(*found, *wanted)


@pytest.mark.parametrize("name", every.JOBS)
def test_pmap_equals_the_average_of_the_devices(name, tmp_path):
    """The curves and weights of 'pmap' against a plain loop over the devices' rows."""
    loader = every.batches(STEPS)
    distiller, curves = run(name, tmp_path / "pmap", loader, data_parallel=True, mapping="pmap")
    by_hand = every.JOBS[name](every.config(tmp_path / "hand"))
    tasks = ["a", "b"] if name == "tasks" else [""]
    feeds = {task: iter(loader[i :: len(tasks)] * 2) for i, task in enumerate(tasks)}
    with by_hand:
        first = {task: own(loader[i]) for i, task in enumerate(tasks)}
        programs = prepare(by_hand.job(), first, nnx_job.SGD).programs
    order = streams.task_order(dict.fromkeys(tasks, STEPS // len(tasks)), 1.0, seed=0)
    state = programs[tasks[0]].init(0)
    step = {task: jax.jit(average_step(program)) for task, program in programs.items()}
    for i in range(STEPS):
        task = next(order)
        state, metrics = step[task](state, programs[task].teacher.variables, own(next(feeds[task])))
        tags = ["total_loss", *programs[task].names]
        for tag, value in zip(tags, metrics, strict=True):
            np.testing.assert_allclose(curves[f"scalar/{tag}"][i], value, rtol=1e-5, err_msg=tag)
    for key, value in nnx_job.weights(distiller.model_S).items():
        wanted = np.asarray(state.params["student"][key])
        np.testing.assert_allclose(value, wanted, rtol=1e-5, atol=1e-5 * np.abs(wanted).max())


def average_step(program):
    """One update from the mean of what each of eight devices computes on its own two rows."""

    def one_device(i, rows, state, teacher):
        teacher_batch, student_batch, _ = sides(rows)
        key = jax.random.fold_in(jax.random.fold_in(state.key, state.micro_step), i)
        results_T = program.teacher(teacher, teacher_batch, None)
        (total, (loss, _)), grads = jax.value_and_grad(program.loss, has_aux=True)(
            state.params, state.model_state, key, student_batch, results_T, Weights(1.0, 0.5)
        )
        return grads, [total, *(loss.terms[name] for name in program.names)]

    def step(state, teacher, batch):
        rows = jax.tree.map(lambda x: x.reshape(8, 2, *x.shape[1:]), batch)
        each = jax.vmap(one_device, (0, 0, None, None))(np.arange(8), rows, state, teacher)
        grads, metrics = jax.tree.map(lambda x: x.mean(0), each)
        updates, opt_state = program.optimizer.update(
            grads, state.opt_state, state.params, factor=np.float32(1)
        )
        params = optax.apply_updates(state.params, updates)
        micro_step = state.micro_step + 1
        return replace(state, params=params, opt_state=opt_state, micro_step=micro_step), metrics

    return step


@pytest.mark.parametrize("mapping", ["sharded", "pmap"])
def test_batches_that_do_not_divide_are_exact(mapping, tmp_path, caplog):
    """A last batch of 13 rows, without dropout, which 'pmap' draws anew on each device."""

    def train(folder, **options):
        distiller = jaxbrewer.BasicTrainer(
            every.config(folder, **options), nnx_job.Encoder(1, 32), nnx_job.adaptor
        )
        every.train(distiller, [*every.batches(2), *every.batches(2, size=13)])
        return distiller, read_scalars(folder / "log")

    wanted = train(tmp_path / "one")
    assert not caplog.records
    caplog.set_level(logging.WARNING, "jaxbrewer")
    assert_same(*train(tmp_path / "eight", data_parallel=True, mapping=mapping), *wanted)
    (record,) = caplog.records
    assert "a batch of 13 rows does not divide by 8 devices" in record.getMessage()


@pytest.mark.parametrize("options", [{}, {"sharding": "all"}, {"mapping": "pmap"}], ids=str)
@pytest.mark.parametrize("way", ["eight to one", "one to eight", "eight to eight"])
def test_a_run_goes_on_on_another_number_of_devices(way, options, tmp_path):
    before, _, after = way.split()
    used = {"one": {}, "eight": {"data_parallel": True, **options}}
    loader = every.batches(6)

    def train(folder, devices, **more):
        made = every.JOBS["trainer"](
            every.config(folder, ckpt_frequency=2, **used[devices], **more)
        )
        made.model_S.dropout.rate = 0.0  # which 'pmap' draws otherwise
        every.train(made, loader, callback=more_callback.get(str(folder)))
        return made

    more_callback = {str(tmp_path / "cut"): lambda model, step: jaxbrewer.CallbackResult(stop=True)}
    wanted = nnx_job.weights(train(tmp_path / "whole", "one").model_S)
    train(tmp_path / "cut", before)
    more_callback.clear()
    resumed = nnx_job.weights(train(tmp_path / "cut", after, resume=True).model_S)
    for key, value in resumed.items():
        # 'pmap' averages the means of the devices, which here have equally many labels each.
        np.testing.assert_allclose(value, wanted[key], rtol=2e-5, atol=1e-6, err_msg=key)
    loaded = jaxbrewer.load_student(tmp_path / "cut" / "out", every.student())
    for key, value in nnx_job.weights(loaded).items():
        np.testing.assert_array_equal(value, resumed[key])


def test_a_run_with_the_optimizer_in_pieces_goes_on_anywhere(tmp_path):
    """To the same bits where it lay, and to the same numbers on one device and all in pieces."""
    loader = every.batches(12)
    momentum = functools.partial(optax.sgd, learning_rate=0.1, momentum=0.9)

    def train(folder, callback=None, **options):
        options |= {"gradient_accumulation_steps": 2, "ckpt_frequency": 2}
        made = every.JOBS["trainer"](every.config(folder, **options))
        with made:
            made.train(momentum, loader, num_epochs=1, callback=callback)
        return nnx_job.weights(made.model_S)

    def stop(model, step):
        return jaxbrewer.CallbackResult(stop=True)

    pieces = {"data_parallel": True, "sharding": "optimizer"}
    wanted = train(tmp_path / "whole", **pieces)
    train(tmp_path / "cut", stop, **pieces)
    train(tmp_path / "cut on one", stop)
    ways = {
        "the same": pieces,
        "all": {"data_parallel": True, "sharding": "all"},
        "one": {},
        "from one": pieces,
    }
    for way, options in ways.items():
        before = "cut on one" if way == "from one" else "cut"
        shutil.copytree(tmp_path / before, tmp_path / way)
        for key, value in train(tmp_path / way, resume=True, **options).items():
            if way == "the same":
                np.testing.assert_array_equal(value, wanted[key], err_msg=key)
            np.testing.assert_allclose(value, wanted[key], rtol=2e-5, atol=1e-6, err_msg=way + key)


def test_teacher_results_may_be_cached(tmp_path):
    loader = every.batches(4)
    cached = {"intermediate_matches": every.HIDDEN, "is_caching_logits": True}
    found = []
    for name, options in (("one", {}), ("eight", {"data_parallel": True})):
        distiller = jaxbrewer.GeneralDistiller(
            every.config(tmp_path / name, **options),
            every.distillation(**cached),
            every.teacher(),
            every.student(),
            nnx_job.adaptor,
            nnx_job.adaptor,
        )
        every.train(distiller, loader)
        found.append((distiller, read_scalars(tmp_path / name / "log")))
    assert_same(*found[1], *found[0])


@pytest.mark.parametrize("options", [{}, {"sharding": "all"}, {"mapping": "pmap"}], ids=str)
def test_evaluations_see_the_whole_student_and_training_does_not_notice(options, tmp_path):
    """Where it is cut into pieces or repeated; their numbers are those of a checkpoint's student."""
    loader, dev = every.batches(4), every.batches(2, size=5, seed=8)
    asked = {"eval_loader": dev, "metrics": [Divergence(), Accuracy()], "best_metric": "-kl"}
    found = []
    for name, more in (("with", {**asked, "eval_steps": 1}), ("without", {})):
        config = every.config(tmp_path / name, data_parallel=True, ckpt_frequency=2, **options)
        distiller = every.JOBS["basic"](config)
        every.train(distiller, loader, **more)
        found.append(distiller)
    evaluated, plain = found
    assert list(evaluated.evaluations) == [1, 2, 3, 4]
    wanted = nnx_job.weights(plain.model_S)
    for key, value in nnx_job.weights(evaluated.model_S).items():
        np.testing.assert_array_equal(value, wanted[key], err_msg=key)
    for step in (2, 4):
        student = jaxbrewer.load_student(tmp_path / "with" / "out" / f"gs{step}", every.student())
        evaluate = Evaluator(student, nnx_job.adaptor, teacher=every.teacher())
        there = evaluate(dev, [Divergence(), Accuracy()])
        assert evaluated.evaluations[step] == pytest.approx(there, rel=1e-5)


@pytest.mark.parametrize("mapping", ["sharded", "pmap"])
def test_one_compile_for_each_shape(mapping, tmp_path):
    distiller = every.JOBS["general"](
        every.config(tmp_path, data_parallel=True, mapping=mapping, ckpt_epoch_frequency=3)
    )
    counts = []

    class Loader(list):
        def __iter__(self):
            counts.append(compiles.count)
            return super().__iter__()

    with nnx_job.Compiles() as compiles, distiller:
        distiller.train(nnx_job.SGD, Loader(every.batches(2)), num_epochs=3)
    assert counts[1] == counts[2]


@pytest.mark.parametrize("options", [{}, {"mapping": "pmap"}, {"sharding": "all"}], ids=str)
@pytest.mark.parametrize(("level", "half"), [("O1", "bfloat16"), ("O2", "float16")])
def test_half_precision_on_eight_devices(level, half, options, tmp_path):
    """The curves of one device but for the rounding of half products; and the same loss scale.

    In the third micro-batch one row overflows float16: the window is dropped on all devices.
    """
    loader = every.batches(6)
    for batch in loader:
        batch["noise"] = np.zeros(16, np.float32)
    loader[2]["noise"][3] = np.inf if half == "float16" else 0

    def train(folder, **more):
        distiller = jaxbrewer.BasicTrainer(
            every.config(
                folder,
                fp16=True,
                fp16_opt_level=level,
                half_dtype=half,
                gradient_accumulation_steps=2,
                **more,
            ),
            nnx_job.Encoder(1, 32),
            nnx_job.adaptor,
        )
        every.train(distiller, loader)
        return nnx_job.weights(distiller.model_S), read_scalars(folder / "log")

    wanted_weights, wanted = train(tmp_path / "one")
    weights, curves = train(tmp_path / "eight", data_parallel=True, **options)
    assert curves.keys() == wanted.keys()
    for tag, points in wanted.items():
        found = [curves[tag][i] for i in points]
        np.testing.assert_allclose(found, list(points.values()), rtol=1e-2, err_msg=tag)
    if half == "float16":
        for tag in ("scalar/loss_scale", "scalar/skipped_windows"):
            assert curves[tag] == wanted[tag]
        scales = curves["scalar/loss_scale"]
        assert scales[3] == scales[2] / 2
    for key, value in weights.items():
        scale = np.abs(wanted_weights[key]).max()
        np.testing.assert_allclose(value, wanted_weights[key], atol=1e-2 * scale, err_msg=key)


@pytest.mark.parametrize(
    "options",
    [{}, {"mapping": "pmap"}, {"sharding": "optimizer"}, {"sharding": "all"}],
    ids=str,
)
@pytest.mark.parametrize("half", [None, "float16"])
def test_windows_left_open_are_dropped_on_eight_devices(half, options, tmp_path):
    """An epoch of 6 batches in windows of 4: the curves of one device, and no program compiled anew.

    In float16 a batch of the window that is dropped overflows, which must not spoil the next one.
    """
    compiles, counts = nnx_job.Compiles(), []

    class Loader(list):
        def __iter__(self):
            counts.append(compiles.count)
            return super().__iter__()

    loader = every.batches(6)
    for batch in loader:
        batch["noise"] = np.zeros(16, np.float32)
    loader[5]["noise"][3] = np.inf if half else 0
    precision = {"fp16": True, "fp16_opt_level": "O2", "half_dtype": half} if half else {}

    def train(folder, **more):
        distiller = jaxbrewer.BasicTrainer(
            every.config(
                folder,
                gradient_accumulation_steps=4,
                ckpt_epoch_frequency=3,
                **precision,
                **more,
            ),
            nnx_job.Encoder(1, 32),
            nnx_job.adaptor,
        )
        counts.clear()
        with distiller:
            distiller.train(nnx_job.SGD, Loader(loader), num_epochs=3)
        assert counts[1] == counts[2]
        return distiller, read_scalars(folder / "log")

    with compiles:
        wanted = train(tmp_path / "one")
        found = train(tmp_path / "eight", data_parallel=True, **options)
    for tag in ("scalar/loss_scale", "scalar/skipped_windows") if half else ():
        assert found[1][tag] == wanted[1][tag]
    if half:
        scales, skipped = (wanted[1][f"scalar/{t}"] for t in ("loss_scale", "skipped_windows"))
        assert scales[6] == scales[5] / 2 == scales[10]  # batches 6 to 9 are the next window
        assert skipped[9] == skipped[5]
        for curves in (found[1], wanted[1]):  # the batches that overflow
            for tag in curves:
                curves[tag] = {i: x for i, x in curves[tag].items() if i % 6 != 5}
    assert_same(*found, *wanted, rtol=1e-2 if half else 1e-5)
