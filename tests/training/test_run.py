"""Training's arguments, the bridge from a distiller to a program, and what subclasses may do."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbrewer
from jaxbrewer import (
    BasicDistiller,
    BasicTrainer,
    DistillationConfig,
    FunctionModel,
    GeneralDistiller,
    TrainingConfig,
    schedulers,
)
from jaxbrewer.data.batches import own
from jaxbrewer.errors import BatchError, PreflightError, PreflightWarning
from jaxbrewer.preflight import prepare
from jaxbrewer.training import run as training

from .. import fn_job
from ..fn_job import adaptor, encoder
from ..nnx_job import read_events


class Lengthless:
    """Batches without end or length, as a stream gives them."""

    def __iter__(self):
        yield from fn_job.batches(3)


# ------------------------------------------------------------------------------------ arguments

LOADER = fn_job.batches(4)
EPOCH = {"num_epochs": 1}
WARM_UP = {"num_warmup_steps": 1, "num_training_steps": 4}


def named(schedule):
    """As a scheduler_class: something that returns the schedule."""
    return lambda: schedule


def other_callback(model, global_step):
    """As TextBrewer's examples never write it, and others do."""


# name → (error, message, arguments of train, config)
WRONG = {
    "no length": (ValueError, r"say how long.*num_epochs=….*num_steps=", {}, {}),
    "no epochs": (ValueError, "num_epochs=0: expected a whole number", {"num_epochs": 0}, {}),
    "half an epoch": (ValueError, "num_epochs=0.5: expected", {"num_epochs": 0.5}, {}),
    "steps below zero": (ValueError, "num_steps=-3: expected", {"num_steps": -3}, {}),
    "steps in words": (ValueError, "num_steps='3': expected", {"num_steps": "3"}, {}),
    "a flag for epochs": (ValueError, "num_epochs=True: expected", {"num_epochs": True}, {}),
    "an epoch shorter than a window": (
        ValueError,
        "epoch of 4 batches is shorter than one accumulation window of 5.*num_steps",
        EPOCH,
        {"gradient_accumulation_steps": 5},
    ),
    "an empty loader": (ValueError, r"dataloader is empty: its length is 0",
                        {**EPOCH, "dataloader": []}, {}),
    "an empty loader, by steps": (ValueError, "loader is empty",
                                  {"num_steps": 1, "dataloader": []}, {}),
    "an empty stream, by steps": (BatchError, "loader is empty",
                                  {"num_steps": 1, "dataloader": iter(())}, {}),
    "a loader without a length": (ValueError, "num_epochs needs a loader with a length.*num_steps",
                                  {**EPOCH, "dataloader": Lengthless()}, {}),
    "no loader": (TypeError, "dataloader is a int, which cannot be iterated",
                  {**EPOCH, "dataloader": 3}, {}),
    "text in a batch": (BatchError, r"batch\['title'\] is a str.*batch_postprocessor",
                        {**EPOCH, "dataloader": [{**LOADER[0], "title": "x"}]}, {}),
    "a schedule for a class": (
        TypeError, "cannot be called with {}.*is it a schedule already.*lambda: schedule",
        {**EPOCH, "scheduler_class": optax.linear_schedule(1, 0, 4)}, {}),
    "arguments it does not take": (
        TypeError, "get_linear_schedule_with_warmup cannot be called with {'warmup': 1}",
        {**EPOCH, "scheduler_class": schedulers.get_linear_schedule_with_warmup,
         "scheduler_args": {"warmup": 1}}, {}),
    "arguments without a class": (TypeError, "scheduler_args without a scheduler_class",
                                  {**EPOCH, "scheduler_args": WARM_UP}, {}),
    "an absolute rate": (
        ValueError, "at or below 0.1, which looks like a learning rate.*factor.*1 at its peak",
        {**EPOCH, "scheduler_class": optax.constant_schedule,
         "scheduler_args": {"value": 5e-5}}, {}),
    "a number for a schedule": (TypeError, "returned 0.5, not a function of the step",
                                {**EPOCH, "scheduler_class": named(0.5)}, {}),
    "a schedule that is not finite": (ValueError, "gave nan: a schedule must return one finite",
                                      {**EPOCH, "scheduler_class":
                                       named(lambda step: float("nan"))}, {}),
    "one batch for a loader": (
        TypeError, "dataloader is one batch, a dict with the keys ids, mask, labels; give an iterable",
        {**EPOCH, "dataloader": LOADER[0]}, {}),
    "a rate in words": (
        PreflightError, r"learning_rate='1e-4' is text, expected a number: learning_rate=0.0001",
        {**EPOCH, "optimizer": functools.partial(optax.adamw, learning_rate="1e-4")}, {}),
    "a callback of other parameters": (
        TypeError, r"callback\(model, global_step\) cannot be called as "
        r"callback\(model=student, step=step\): missing", {**EPOCH, "callback": other_callback}, {}),
    "a misspelt keyword": (PreflightError, r"train\(…, num_epoch=…\).* did you mean 'num_epochs'",
                           {"num_steps": 2, "num_epoch": 1}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_wrong_arguments_are_refused_before_anything_is_written(name, tmp_path):
    refuses(tmp_path, *WRONG[name])


def refuses(tmp_path, error, message, arguments, config):
    distiller = fn_job.distiller(tmp_path, **config)
    with distiller, pytest.raises(error) as caught:
        distiller.train(**{"optimizer": fn_job.SGD, "dataloader": LOADER, **arguments})
    assert re.search(message, str(caught.value), re.DOTALL), caught.value
    assert not (tmp_path / "out").exists()


def test_epochs_beside_steps_are_told_to_count_for_nothing(tmp_path):
    told = "num_epochs=9 counts for nothing beside num_steps=1"
    with fn_job.distiller(tmp_path) as distiller, pytest.warns(PreflightWarning, match=told):
        distiller.train(fn_job.SGD, LOADER, num_epochs=9, num_steps=1)


def test_labels_beyond_the_classes_are_suspected(tmp_path):
    trainer = BasicTrainer(
        TrainingConfig(output_dir=tmp_path / "out", device="cpu"), encoder(1), adaptor("losses")
    )
    batch = {**LOADER[0], "labels": np.array([0, 7, 1])}
    with (
        trainer,
        pytest.raises(FloatingPointError, match="labels holds 0 to 7: has the model so many"),
    ):
        trainer.train(fn_job.SGD, [batch], num_epochs=1)


# The same, of torch and transformers.
TORCH = {
    "a loader without a length": (ValueError, "num_epochs needs a loader with a length"),
    "a scheduler": (
        TypeError, "scheduler= takes a scheduler that was built for a torch optimizer.*"
        "scheduler_class=jaxbrewer.schedulers.get_linear"),
    "an object for a class": (TypeError, "scheduler_class is a ConstantLR; pass the class"),
    "transformers' function": (
        TypeError, "get_linear_schedule_with_warmup wants a torch optimizer. Use "
        "jaxbrewer.schedulers.get_linear_schedule_with_warmup, without the optimizer"),
    "torch's class": (
        TypeError, r"StepLR wants a torch optimizer. jaxbrewer.schedulers has get_constant.*"
        r"lambda step_size, gamma=0.1"),
    "torch's plateau": (TypeError, "ReduceLROnPlateau .* have no counterpart"),
}  # fmt: skip


@pytest.mark.torch
@pytest.mark.parametrize("name", TORCH)
def test_what_is_torchs_is_refused_before_anything_is_written(name, tmp_path):
    import torch
    from transformers import get_linear_schedule_with_warmup

    class Dataset(torch.utils.data.IterableDataset):
        def __iter__(self):
            yield from fn_job.batches(2)

    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.1)
    scheduler = torch.optim.lr_scheduler.ConstantLR(optimizer)
    arguments = {
        "a loader without a length": {
            "dataloader": torch.utils.data.DataLoader(Dataset(), batch_size=None)
        },
        "a scheduler": {"scheduler": scheduler},
        "an object for a class": {"scheduler_class": scheduler},
        "transformers' function": {
            "scheduler_class": get_linear_schedule_with_warmup,
            "scheduler_args": WARM_UP,
        },
        "torch's class": {"scheduler_class": torch.optim.lr_scheduler.StepLR},
        "torch's plateau": {"scheduler_class": torch.optim.lr_scheduler.ReduceLROnPlateau},
    }[name]
    refuses(tmp_path, *TORCH[name], {**EPOCH, **arguments}, {})


def test_custom_matches_of_another_kind(tmp_path):
    with pytest.raises(TypeError, match=r"custom_matches\[0\] is a int"):
        fn_job.distiller(tmp_path, cls=functools.partial(GeneralDistiller, custom_matches=[1]))


CONFIGS = TrainingConfig(device="cpu"), DistillationConfig()
MODELS = encoder(1), encoder(2), adaptor("logits"), adaptor("logits")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: GeneralDistiller({}, CONFIGS[1], *MODELS), "train_config is a dict, not a Training"),
        (lambda: GeneralDistiller(*CONFIGS[::-1], *MODELS), "not a TrainingConfig"),
        (lambda: GeneralDistiller(CONFIGS[0], {}, *MODELS), "distill_config is a dict"),
        (lambda: GeneralDistiller(*CONFIGS, MODELS[0], None, *MODELS[2:]), "model_S is a .*NoneType"),
        (lambda: GeneralDistiller(*CONFIGS, *MODELS[:2], {}, MODELS[3]), "adaptor_T is a dict"),
        (lambda: GeneralDistiller(*CONFIGS, *MODELS[:3], None), "adaptor_S is a NoneType"),
        (lambda: BasicTrainer(CONFIGS[0], fn_job.encode, MODELS[2]), "model is a .*FunctionModel"),
    ],
)  # fmt: skip
def test_wrong_arguments_of_distillers(make, message):
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.torch
def test_a_torch_module_is_no_teacher():
    import torch

    with pytest.raises(TypeError, match="model_T is a torch"):
        GeneralDistiller(*CONFIGS, torch.nn.Linear(1, 1), *MODELS[1:])


def test_a_distiller_of_logits_refuses_matches(tmp_path):
    config = {"intermediate_matches": [fn_job.match(0, 0)]}
    with pytest.raises(ValueError, match=r"BasicDistiller matches logits only.*GeneralDistiller"):
        fn_job.distiller(tmp_path, cls=BasicDistiller, config=config)


def test_a_projection_must_be_a_module(tmp_path, monkeypatch):
    monkeypatch.setitem(jaxbrewer.PROJ_MAP, "mine", lambda dim_in, dim_out, *, rngs: jnp.tanh)
    config = {"intermediate_matches": [fn_job.match(0, 0, proj=["mine", 5, 5])]}
    with pytest.raises(TypeError, match=r"'mine' made a .*\(dim_in, dim_out, \*, rngs\)"):
        fn_job.distiller(tmp_path, config=config)


# ------------------------------------------------------------------------------------ the schedule


def rows(distiller, *, epochs=2, **request):
    """The table that a training would use, one row for each number of updates done."""
    every = dict.fromkeys(training.Request.__dataclass_fields__) | request
    made = training.Request(**every)
    total = epochs * len(LOADER)
    return training._rows(distiller.job(), training.make_factor(made, total), total)


def test_rows_hold_weights_and_the_factor(tmp_path):
    config = {
        "kd_loss_weight": 0.3,
        "kd_loss_weight_scheduler": "linear_decay",
        "hard_label_weight": 2,
    }
    distiller = fn_job.distiller(tmp_path, config=config)
    table = rows(distiller)
    np.testing.assert_allclose(table[:, 0], [0.3, *(1 - np.arange(1, 9) / 8)], rtol=1e-6)
    np.testing.assert_allclose(table[:, 1:], [[2, 1]] * 9)
    table = rows(
        distiller,
        scheduler_class=schedulers.get_linear_schedule_with_warmup,
        scheduler_args={"num_warmup_steps": 2, "num_training_steps": 8},
    )
    factors = [0, 0.5, 1, *(np.arange(5, 0, -1) / 6)]  # the last stands where no update follows
    np.testing.assert_allclose(table[:, 2], [*factors, factors[-1]], rtol=1e-6)


def test_small_factors_that_rise_later_are_factors(tmp_path):
    """A run that ends inside its warm-up stays below 0.1, and is no absolute rate."""
    table = rows(
        fn_job.distiller(tmp_path),
        scheduler_class=schedulers.get_constant_schedule_with_warmup,
        scheduler_args={"num_warmup_steps": 1000},
    )
    np.testing.assert_allclose(table[:, 2], [*np.arange(8) / 1000, 7 / 1000], rtol=1e-6)


def test_no_learning_rate_is_asked_for_after_the_last_update(tmp_path):
    asked = []
    distiller = fn_job.distiller(tmp_path)
    table = training._rows(distiller.job(), lambda step: asked.append(step) or 1 / (8 - step), 8)
    assert max(asked) == 7
    assert table.shape == (9, 3)


def test_batches_after_the_last_update_train_nothing(tmp_path):
    """The weights at the end are those of the last checkpoint, which is saved before them."""
    saved = []
    distiller = fn_job.distiller(
        tmp_path,
        config={"kd_loss_weight_scheduler": "linear_growth"},
        gradient_accumulation_steps=3,
    )
    with distiller:
        distiller.train(
            fn_job.SGD,
            LOADER,
            num_epochs=2,
            callback=lambda model, step: saved.append(jax.tree.map(np.array, model.params)),
        )
    assert len(LOADER) % 3 == 1
    jax.tree.map(np.testing.assert_array_equal, distiller.model_S.params, saved[-1])


# -------------------------------------------------------------------------------------- byte order


def test_the_byte_order_of_batches_and_weights_does_not_matter(tmp_path):
    """Also of batches after the first, whose shape is compiled by then."""

    def foreign(tree):
        return jax.tree.map(lambda x: np.asarray(x).astype(np.dtype(x.dtype).newbyteorder()), tree)

    def train(folder, change, loader):
        models = [FunctionModel(fn_job.encode, change(fn_job.encoder(i).params)) for i in (1, 2)]
        distiller = fn_job.distiller(
            folder,
            config={"hard_label_weight": 1},
            keys=("logits", "losses"),
            teacher=models[0],
            student=models[1],
            log_dir=folder / "log",
        )
        with distiller:
            distiller.train(fn_job.SGD, loader, num_epochs=1)
        return read_events(folder / "log")

    wanted = train(tmp_path / "native", lambda params: params, LOADER)
    found = train(tmp_path / "foreign", foreign, [LOADER[0], *foreign(LOADER[1:])])
    assert found == wanted
    assert len(found["scalar/total_loss"]) == len(LOADER)


# ----------------------------------------------------------------------------- inside and outside


class Noisy(nnx.Module):
    """Dropout and batch statistics."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Embed(fn_job.VOCABULARY, 8, rngs=rngs)
        self.norm = nnx.BatchNorm(8, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.head = nnx.Linear(8, fn_job.CLASSES, rngs=rngs)

    def __call__(self, ids, mask=None, labels=None):
        dropped = self.drop(self.norm(self.embed(ids).mean(1)))
        return {"logits": self.head(dropped), "zeros": jnp.mean(dropped == 0)}


def noisy_trainer(folder):
    """A trainer whose only loss is the fraction of units that are dropped."""
    config = TrainingConfig(output_dir=folder / "out", log_dir=folder / "log", device="cpu")
    losses = lambda batch, outputs: (  # noqa: E731
        outputs["zeros"] + 0 * outputs["logits"].sum()
    )
    return BasicTrainer(config, Noisy(), adaptor(losses=losses))


def test_outside_with_dropout_is_off_and_a_warning_says_so(tmp_path):
    curves, moved = {}, {}
    for place in ("inside", "outside"):
        trainer = noisy_trainer(tmp_path / place)
        if place == "inside":
            with trainer, warnings.catch_warnings():
                warnings.simplefilter("error", PreflightWarning)
                trainer.train(fn_job.SGD, LOADER, num_epochs=1)
        else:
            with pytest.warns(PreflightWarning, match="outside `with distiller:`.*dropout is off"):
                trainer.train(fn_job.SGD, LOADER, num_epochs=1)
        (curves[place],) = read_events(tmp_path / place / "log").values()
        moved[place] = bool(np.any(trainer.model.norm.mean[...]))
    assert curves["outside"] == [0] * 4
    assert min(curves["inside"]) > 0.1
    assert len(set(curves["inside"])) > 1
    assert moved == {"inside": True, "outside": False}


def test_the_context_ends_with_the_block(tmp_path):
    distiller = fn_job.distiller(tmp_path)
    with distiller as same:
        assert same is distiller
        assert distiller._in_context
    with pytest.raises(RuntimeError), distiller:
        raise RuntimeError
    assert not distiller._in_context


def test_ids_are_checked_in_every_batch(tmp_path):
    """Beyond the first: an id outside would give NaN or another row, and no error."""
    student = encoder(2, id_limits={"ids": fn_job.VOCABULARY})
    distiller = fn_job.distiller(tmp_path, student=student)
    loader = fn_job.batches(3)
    loader[2]["ids"] = np.where(loader[2]["ids"] == loader[2]["ids"].max(), 11, loader[2]["ids"])
    with distiller, pytest.raises(BatchError, match="ids holds 11, but model_S knows ids 0 to 10"):
        distiller.train(fn_job.SGD, loader, num_epochs=1)


# ---------------------------------------------------------------------------------- subclasses


@pytest.mark.parametrize(
    ("method", "instead"),
    [
        ("train_on_batch", "override compute_loss"),
        ("save_and_callback", r"train\(…, callback=…\)"),
        ("initialize_training", "optimizer factory"),
        ("write_loss", "terms returned by compute_loss"),
        ("train_with_num_steps", "num_steps"),
        ("train_with_num_epochs", "num_epochs"),
        ("cache_logits", "is_caching_logits"),
    ],
)
@pytest.mark.parametrize("base", [BasicTrainer, BasicDistiller, GeneralDistiller])
def test_methods_that_would_never_run_are_refused(base, method, instead):
    with pytest.raises(TypeError, match=f"Mine overrides {method}, .*Instead: .*{instead}"):
        type("Mine", (base,), {method: lambda self: None})


class WithPenalty(GeneralDistiller):
    """The usual loss and a penalty on the student's logits, which is logged."""

    def compute_loss(self, results_S, results_T, project, weights):
        loss = super().compute_loss(results_S, results_T, project, weights)
        penalty = jnp.mean(results_S["logits"][0] ** 2)
        return loss._replace(total=loss.total + penalty, terms={**loss.terms, "penalty": penalty})


class OnlyMine(BasicDistiller):
    """A loss of its own, as a pair."""

    def compute_loss(self, results_S, results_T, project, weights):
        mine = jnp.mean((results_S["logits"][0] - results_T["logits"][0]) ** 2)
        return 3 * mine, {"mine": mine}


@pytest.mark.parametrize("cls", [WithPenalty, OnlyMine])
def test_a_loss_of_ones_own_is_trained_on_and_logged(cls, tmp_path):
    distiller = fn_job.distiller(tmp_path, cls=cls, log_dir=tmp_path / "log")
    student = encoder(2)
    teacher = encoder(1)
    with distiller:
        distiller.train(optax.sgd(0.01), LOADER, num_epochs=1)
    curves = read_events(tmp_path / "log")
    first = {side: model.function(model.params, **LOADER[0])["logits"]
             for side, model in (("S", student), ("T", teacher))}  # fmt: skip
    if cls is WithPenalty:
        assert set(curves) == {"scalar/total_loss", "scalar/unweighted_kd_loss", "scalar/penalty"}
        parts = np.array(curves["scalar/unweighted_kd_loss"]) + curves["scalar/penalty"]
        np.testing.assert_allclose(curves["scalar/total_loss"], parts, rtol=1e-5)
        np.testing.assert_allclose(curves["scalar/penalty"][0], np.mean(first["S"] ** 2), rtol=1e-5)
    else:
        assert set(curves) == {"scalar/total_loss", "scalar/mine"}
        expected = np.mean((first["S"] - first["T"]) ** 2)
        np.testing.assert_allclose(curves["scalar/mine"][0], expected, rtol=1e-5)
        np.testing.assert_allclose(
            curves["scalar/total_loss"], 3 * np.array(curves["scalar/mine"]), rtol=1e-6
        )
    # Trained on: the update is the gradient of this very loss.
    assert not np.array_equal(distiller.model_S.params["head"], student.params["head"])


@pytest.mark.parametrize(
    ("total", "message"),
    [(lambda logits: logits.sum(-1), r"the total as float32\[3\]; it must be one number"),
     (lambda logits: logits.argmax(), r"the total as int32\[\]; it must be one number")],
)  # fmt: skip
def test_a_loss_that_is_no_scalar_is_refused(total, message, tmp_path):
    class Wrong(GeneralDistiller):
        def compute_loss(self, results_S, results_T, project, weights):
            return total(results_S["logits"][0]), {}

    distiller = fn_job.distiller(tmp_path, cls=Wrong)
    with distiller, pytest.raises(PreflightError, match=message):
        distiller.train(fn_job.SGD, LOADER, num_epochs=1)


# ------------------------------------------------------------------------------ what clients read


def test_the_attributes_clients_read(tmp_path):
    config = {
        "kd_loss_type": "mse",
        "intermediate_matches": [
            fn_job.match(0, 0),
            fn_job.match(2, 2, proj=["linear", 5, 5, {"lr": 0.1}]),
        ],
    }
    distiller = fn_job.distiller(tmp_path, config=config)
    assert distiller.t_config.device == "cpu"
    assert distiller.d_config.kd_loss_type == "mse"
    assert distiller.kd_loss is jaxbrewer.KD_LOSS_MAP["mse"]
    assert distiller.projs[0] is None
    assert isinstance(distiller.projs[1], nnx.Linear)
    assert distiller.projs_group == [None, {"lr": 0.1}]
    assert (distiller.tb_writer, distiller.rank, distiller.local_rank) == (None, 0, -1)
    assert distiller.print_freq == 20
    assert {"Basic", "General", "Train"} <= set(jaxbrewer.Distillers)
    trainer = BasicTrainer(CONFIGS[0], MODELS[0], MODELS[2])
    assert (trainer.model, trainer.adaptor) == (MODELS[0], MODELS[2])


def test_projections_are_drawn_from_the_seed(tmp_path):
    config = {"intermediate_matches": [fn_job.match(1, 1, proj=["linear", 5, 5]) for _ in range(2)]}
    drawn = [
        [
            np.asarray(p.kernel[...])
            for p in fn_job.distiller(tmp_path, config=config, seed=seed).projs
        ]
        for seed in (0, 0, 1)
    ]
    np.testing.assert_array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0][0], drawn[0][1])
    assert not np.array_equal(drawn[0][0], drawn[2][0])


def test_presets_changed_after_the_config_count(tmp_path, monkeypatch):
    distiller = fn_job.distiller(tmp_path)
    monkeypatch.setitem(jaxbrewer.KD_LOSS_MAP, "ce", lambda S, T, t: jnp.float32(7) + 0 * S.sum())
    with distiller:
        program = prepare(distiller.job(), {"": own(LOADER[0])}, fn_job.SGD).programs[""]
    model = distiller.model_S
    _, (loss, _) = program.loss(
        {"student": model.params, "projections": {}},
        {"student": model.state, "projections": {}},
        jax.random.key(0),
        own(LOADER[0]),
        program.teacher(program.teacher.variables, own(LOADER[0]), None),
        jaxbrewer.objective.Weights(1.0, 0.0),
    )
    assert loss.total == 7
