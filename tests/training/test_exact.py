"""Exact accumulation in training: micro-batches of any size and padding are one batch."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbrewer
from jaxbrewer.errors import ConfigError, PreflightError
from tests import nnx_job
from tests.devices import every

SIZES = (8, 16, 11)  # of a window's micro-batches


def adaptor(batch, outputs):
    """With each example's loss in place of their mean."""
    each = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], batch["labels"])
    return nnx_job.adaptor(batch, outputs) | {
        "losses": each,
        "sample_weight": batch.get("sample_weight"),
    }


def double(module):
    state = nnx.state(module, nnx.Param)
    nnx.update(module, jax.tree.map(lambda x: x.astype(jnp.result_type(float)), state))
    return module


def teacher(seed=1):
    return double(every.teacher(seed))


def student():
    return double(nnx_job.Encoder(1, 32, seed=2))


MATCHES = [
    {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1.0}
    | {"proj": ["linear", 32, 64]},
    {"layer_T": [0, 2], "layer_S": [0, 1], "feature": "hidden", "loss": "nst", "weight": 1.0},
]
JOBS = {
    "trainer": lambda c: jaxbrewer.BasicTrainer(c, student(), adaptor),
    "general": lambda c: jaxbrewer.GeneralDistiller(
        c, every.distillation(intermediate_matches=MATCHES), teacher(), student(), adaptor, adaptor
    ),
    "teachers": lambda c: jaxbrewer.MultiTeacherDistiller(
        c, every.distillation(), [teacher(1), teacher(5)], student(), adaptor, adaptor
    ),
}


def window(seed=0, sizes=SIZES, weighted=False):
    made = []
    for i, size in enumerate(sizes):
        (batch,) = every.batches(1, size=size, seed=seed + i)
        batch["attention_mask"][:, 2 + i :] = 0
        if weighted:
            batch["sample_weight"] = np.random.default_rng(i).uniform(0, 2, size)
        made.append(batch)
    return made


def joined(batches):
    return {name: np.concatenate([batch[name] for batch in batches]) for name in batches[0]}


def trained(folder, name, batches, accumulation, mode="exact", steps=2, **more):
    config = every.config(
        folder, gradient_accumulation_steps=accumulation, gradient_accumulation=mode, **more
    )
    distiller = JOBS[name](config)
    with distiller:
        distiller.train(optax.sgd(0.1), batches, num_steps=steps)
    return nnx_job.weights(distiller.model_S)


def largest(one, other):
    return max(np.abs(one[name] - other[name]).max() for name in one)


@pytest.mark.parametrize("name", JOBS)
def test_uneven_micro_batches_are_one_batch(name, tmp_path, x64):
    parts = window(weighted=name == "general")
    one = trained(tmp_path / "one", name, [joined(parts)], 1)
    assert largest(one, trained(tmp_path / "exact", name, parts, 3)) < 1e-9
    assert largest(one, trained(tmp_path / "means", name, parts, 3, "means")) > 1e-5


@pytest.mark.parametrize("sharding", [None, "all"])
@pytest.mark.parametrize("devices", [2, 8])
def test_on_any_number_of_devices(devices, sharding, tmp_path, x64, monkeypatch):
    parts = window()
    one = trained(tmp_path / "one", "general", [joined(parts)], 1)
    here = jax.devices()[:devices]
    monkeypatch.setattr("jaxbrewer.machine.placement.resolve_devices", lambda *given, **named: here)
    more = {"data_parallel": True, "sharding": sharding}
    assert largest(one, trained(tmp_path / "many", "general", parts, 3, **more)) < 1e-9


def test_tasks_have_their_share_of_a_window(tmp_path, x64):
    """Two micro-batches of one task and one of another: the mean of three, each task's exact."""
    data = {"a": [window()[0], window()[2]], "b": [window()[1]]}
    both = {"a": [joined(data["a"])] * 3, "b": data["b"] * 3}

    def run(folder, mode, data):
        config = every.config(
            folder, gradient_accumulation_steps=3, gradient_accumulation=mode, seed=3
        )
        adaptors = dict.fromkeys("ab", adaptor)
        models = {"a": teacher(1), "b": teacher(5)}
        distiller = jaxbrewer.MultiTaskDistiller(
            config, every.distillation(), models, student(), adaptors, adaptors
        )
        with distiller:
            distiller.train(optax.sgd(0.1), data, num_steps=1, tau=0)
        return nnx_job.weights(distiller.model_S)

    # The same draw of tasks; where each has one batch all along, means are exact already.
    assert largest(run(tmp_path / "x", "exact", both), run(tmp_path / "m", "means", both)) < 1e-9
    assert largest(run(tmp_path / "y", "exact", data), run(tmp_path / "z", "means", data)) > 1e-6


class Drawing:
    """A loader that draws its batches as they are taken."""

    def __len__(self):
        return 8

    def __iter__(self):
        for _ in range(8):
            yield window(seed=int(np.random.randint(1000)), sizes=(4,))[0]


def test_a_resumed_run_has_the_same_bits(tmp_path):
    """The batches of a window are drawn ahead, and a checkpoint holds the state of those trained on."""

    def run(folder, resume=False, stop=None):
        config = every.config(
            folder, gradient_accumulation_steps=3, gradient_accumulation="exact", resume=resume,
            ckpt_steps=1,
        )  # fmt: skip
        distiller = JOBS["general"](config)

        def callback(model, step):
            np.random.rand()
            return jaxbrewer.CallbackResult(stop=step == stop)

        with distiller:
            distiller.train(nnx_job.SGD, Drawing(), num_steps=7, callback=callback)
        return nnx_job.weights(distiller.model_S)

    np.random.seed(0)
    whole = run(tmp_path / "whole")
    for stop in (2, 3):  # of 8 batches an epoch, 3 a window: in the middle, and across its end
        np.random.seed(0)
        folder = tmp_path / str(stop)
        run(folder, stop=stop)
        np.random.seed(1)
        found = run(folder, resume=True)
        assert all(np.array_equal(found[name], whole[name]) for name in whole)


def test_nothing_compiles_anew_after_a_window(tmp_path):
    config = every.config(
        tmp_path, gradient_accumulation_steps=2, gradient_accumulation="exact", ckpt_steps=99
    )
    distiller, seen = JOBS["general"](config), []
    batches = every.batches(8)
    compiles = nnx_job.Compiles()

    def counted():
        for i, batch in enumerate(batches):
            if i == 4:
                compiles.__enter__()
            yield batch
        seen.append(compiles.count)
        compiles.__exit__()

    class Loader:
        def __iter__(self):
            return counted()

        def __len__(self):
            return len(batches)

    with distiller:
        distiller.train(nnx_job.SGD, Loader(), num_epochs=1)
    assert seen == [0]


def test_an_incomplete_window_is_dropped_at_an_epochs_end(tmp_path, x64):
    parts = window()
    one = trained(tmp_path / "one", "trainer", [joined(parts)], 1, steps=1)
    config = every.config(
        tmp_path / "two", gradient_accumulation_steps=3, gradient_accumulation="exact"
    )
    distiller = JOBS["trainer"](config)
    with distiller:
        distiller.train(optax.sgd(0.1), [*parts, parts[0]], num_epochs=1)
    assert largest(one, nnx_job.weights(distiller.model_S)) < 1e-9


def test_what_cannot_be_is_refused_before_anything_compiles(tmp_path):
    with pytest.raises(ConfigError, match="expected mapping='sharded'"):
        every.config(tmp_path, gradient_accumulation="exact", mapping="pmap", data_parallel=True)
    config = every.config(tmp_path, gradient_accumulation_steps=2, gradient_accumulation="exact")
    for job, message in {
        "trainer": "'losses'.0. is one number",
        "emd": "earth mover's distance is no mean",
    }.items():
        distiller = every.JOBS[job](config)
        with distiller, pytest.raises(PreflightError, match=message):
            distiller.train(nnx_job.SGD, every.batches(2), num_epochs=1)
