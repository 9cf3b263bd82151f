"""Preflight: each mistake is found by shape, with its fix, before anything compiles or is written."""

import functools
import re
import types
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxbrewer import BasicDistiller, BasicTrainer, FunctionModel, TrainingConfig, presets
from jaxbrewer.data.batches import own
from jaxbrewer.errors import PreflightError, PreflightWarning
from jaxbrewer.preflight import prepare

from .. import fn_job
from ..fn_job import adaptor, encoder, match


@pytest.fixture
def compiled():
    """The names of what was compiled during the test."""
    names = []

    def listen(event, duration, **details):
        if event.endswith("backend_compile_duration"):
            names.append(details.get("fun_name"))

    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


def failure(distiller, loader=None, optimizer=fn_job.SGD, **arguments):
    """The problems that stop a training, which must have left nothing behind."""
    with distiller, pytest.raises(PreflightError) as caught:
        distiller.train(optimizer, loader or fn_job.batches(2), num_epochs=1, **arguments)
    assert not Path(distiller.t_config.output_dir).exists()
    return caught.value.problems


# --------------------------------------------------------------------------- one mistake at a time

FEATURES = ("logits", "hidden", "attention")


def shift(**config):
    return {"probability_shift": True, **config}


def several(count, get=lambda outputs: outputs["logits"]):
    return lambda batch, outputs: [get(outputs)] * count


def matched(*matches):
    return {"intermediate_matches": list(matches)}


def raises(error):
    def function(*args, **kwargs):
        raise error

    return function


def vector(S, T, mask=None):
    return jnp.mean((S - T) ** 2, -1)


# name → (arguments of the distiller, arguments of train, what each problem must say)
MISTAKES = {
    # the adaptors
    "a key that is not there": (
        {"config": matched(match(0, 0))},
        {},
        [r"hidden T0 → S0 by hidden_mse: adaptor_S returns no 'hidden', only 'logits'",
         r"hidden T0 → S0 by hidden_mse: adaptor_T returns no 'hidden', only 'logits'"],
    ),
    "adaptors that are exchanged": (
        {"teacher": FunctionModel(lambda p, **batch: {"scores": encoder(1).function(p, **batch)["logits"]},
                                  encoder(1).params),
         "keys_T": adaptor("logits"), "keys_S": lambda batch, outputs: {"logits": outputs["scores"]}},
        {},
        ["adaptor_S failed", "adaptor_T failed", "with adaptor_S and adaptor_T exchanged both would run"],
    ),
    "a key that is misspelt": (
        {"keys_S": adaptor("logits", loss=lambda b, o: o["loss"])},
        {},
        ["adaptor_S returned an unknown key 'loss': did you mean 'losses'"],
    ),
    "slips on both sides": (
        {"keys_S": adaptor(attentions=lambda b, o: o["attention"]),
         "keys_T": adaptor(hidden_states=lambda b, o: o["hidden"])},
        {},
        ["adaptor_S .* 'attentions': did you mean 'attention'",
         "adaptor_T .* 'hidden_states': did you mean 'hidden'"],
    ),
    "two slips in one dict": (
        {"keys_S": adaptor(logit=lambda b, o: o["logits"], hiddens=lambda b, o: o["hidden"])},
        {},
        ["adaptor_S .* 'logit': did you mean 'logits'", "adaptor_S .* 'hiddens': did you mean 'hidden'"],
    ),
    "a single array for hidden": (
        {"keys_T": adaptor("logits", hidden=lambda b, o: o["hidden"][0])},
        {},
        [r"adaptor_T: 'hidden' must be a list.*not a single \[3, 4, 5\]"],
    ),
    "an adaptor that returns nothing": (
        {"keys_S": lambda batch, outputs: None},
        {},
        ["adaptor_S returned a NoneType; it must return a dict"],
    ),
    "an adaptor that looks for what the model does not give": (
        {"keys_S": lambda batch, outputs: {"logits": outputs["scores"]}},
        {},
        ["adaptor_S failed: KeyError: 'scores'.* keys ids, labels, mask,.*"
         "a dict with keys logits, tokens, hidden, attention, loss"],
    ),
    "an adaptor that looks for what the batch does not hold": (
        {"keys_T": lambda batch, outputs: {"logits": batch["target"]}},
        {},
        ["adaptor_T failed: KeyError: 'target'"],
    ),
    "numpy in an adaptor": (
        {"keys_S": adaptor(logits=lambda b, o: np.exp(o["logits"]))},
        {},
        [r"adaptor_S failed: TracerArrayConversionError: .*Compute with jax.numpy"
         r".* \(test_prepare.py, line \d+\)"],
    ),
    "a boolean index": (
        {"keys": adaptor(logits=lambda b, o: o["tokens"][b["mask"] == 1])},
        {},
        ["adaptor_S failed: NonConcreteBooleanIndexError: .*'logits_mask'",
         "adaptor_T failed: NonConcreteBooleanIndexError"],
    ),
    "a branch on values": (
        {"keys_T": adaptor(logits=lambda b, o: o["logits"] if b["mask"].all() else o["tokens"])},
        {},
        [r"adaptor_T failed: TracerBoolConversionError: it branches .*jnp.where\("],
    ),
    "a number out of an array": (
        {"keys_T": adaptor(logits=lambda b, o: o["logits"] * o["loss"].item())},
        {},
        [r"adaptor_T failed: ConcretizationTypeError: it asks for an array's values"],
    ),
    "a length made of values": (
        {"keys_T": adaptor(logits=lambda b, o: o["tokens"][:, : b["mask"].sum()])},
        {},
        [r"adaptor_T failed: IndexError: it asks for an array's values"],
    ),
    "a method of torch's": (
        {"keys_T": adaptor(logits=lambda b, o: o["logits"].detach())},
        {},
        [r"adaptor_T failed: AttributeError: it calls a method that torch has.*Leave out .detach"],
    ),
    "torch's size": (
        {"keys_T": adaptor(logits=lambda b, o: o["logits"][: o["logits"].size(0)])},
        {},
        [r"adaptor_T failed: TypeError: is it written for torch.*x.shape\[0\]"],
    ),
    # the matches
    "a hidden layer beyond the last": (
        {"keys": FEATURES, "config": matched(match(3, 2))},
        {},
        [r"T3 → S2.*layer_T=3 is not there. adaptor_T returns 'hidden' for layers 0–2 \(hidden 0 is"],
    ),
    "an attention layer counted from 1": (
        {"keys": FEATURES, "config": matched(match(2, 1, "attention_mse", "attention"))},
        {},
        [r"layer_T=2 is not there.*'attention' for layers 0–1 \(attention is counted from 0"],
    ),
    "a layer that is None": (
        {"keys_S": adaptor("logits", attention=lambda b, o: [None, *o["attention"]]),
         "keys_T": ("logits", "attention"),
         "config": matched(match(0, 0, "attention_mse", "attention"))},
        {},
        ["layer_S=0 is not there.*layers 1–2"],
    ),
    "two layers, both wrong": (
        {"keys": FEATURES, "config": matched(match([0, 9], [7, 0], "nst"))},
        {},
        ["layer_S=7 is not there", "layer_T=9 is not there"],
    ),
    "widths that differ": (
        {"keys": FEATURES, "teacher": encoder(1, width=7), "config": matched(match(2, 2))},
        {},
        [r"T2 → S2.*\(3, 4, 5\).*\(3, 4, 7\).*Add 'proj': \['linear', 5, 7\]"],
    ),
    "a projection the wrong way round": (
        {"keys": FEATURES, "teacher": encoder(1, width=7),
         "config": matched(match(2, 2, proj=["linear", 7, 5]))},
        {},
        [r"takes 7 features, but the student's hidden\[2\] is \[3, 4, 5\]: "
         r"use 'proj': \['linear', 5, 5\] \(the student's width first\)"],
    ),
    "a projection to the wrong width": (
        {"keys": FEATURES, "teacher": encoder(1, width=7),
         "config": matched(match(2, 2, proj=["linear", 5, 6]))},
        {},
        [r"gives 6 features, but the teacher's hidden\[2\] is \[3, 4, 7\]: "
         r"use 'proj': \['linear', 5, 7\]"],
    ),
    "one layer where two are needed": (
        {"keys": FEATURES, "config": matched(match(2, 2, "nst"), match(2, 2, "fsp"))},
        {},
        ["T2 → S2 by nst: .*must be a list of two", "T2 → S2 by fsp: .*must be a list of two"],
    ),
    "two layers where one is needed": (
        {"keys": FEATURES, "config": matched(match([0, 2], [0, 2]))},
        {},
        ["T0-2 → S0-2 by hidden_mse: .*must be single layers"],
    ),
    "heads that differ": (
        {"keys_S": FEATURES,
         "keys_T": adaptor("logits", attention=lambda b, o: [a.repeat(2, 1) for a in o["attention"]]),
         "config": matched(match(1, 1, "attention_mse", "attention"))},
        {},
        ["T1 → S1 by attention_mse: .*Use a loss that reduces the heads: attention_mse_sum"],
    ),
    "a mask of the wrong shape": (
        {"keys_S": adaptor("hidden", inputs_mask=lambda b, o: b["mask"][:, None]),
         "keys_T": ("hidden",), "config": matched(match(1, 1))},
        {},
        [r"T1 → S1.*mask has shape \(3, 1, 4\); expected one array of shape \(3, 4\)"],
    ),
    "unknown losses": (
        {"keys": FEATURES, "config": {"kd_loss_type": "cee", **matched(match(0, 0, "hidden_msee"))}},
        {},
        ["kd_loss_type='cee' is not a known loss: did you mean 'ce'",
         r"intermediate_matches\[0\].loss='hidden_msee' .* did you mean 'hidden_mse'"],
    ),
    # the logits
    "classes that differ": (
        {"teacher": encoder(1, classes=4)},
        {},
        [r"logits\[0\]: the student has 3 classes \[3, 3\], the teacher 4 \[3, 4\].*num_labels"],
    ),
    "vocabularies that differ": (
        {"teacher": encoder(1, classes=9), "keys": adaptor(logits=fn_job.tokens)},
        {},
        [r"student has 3 classes.*the teacher 9.*the same vocabulary.*cut it in .*logits\[\.\.\., :3\]"],
    ),
    "a softmax over one class": (
        {"teacher": encoder(1, classes=1), "student": encoder(2, classes=1)},
        {},
        [r"logits\[0\] are \[3, 1\]: a softmax over one class is always 1.*kd_loss_type='mse'"],
    ),
    "another divergence over one class": (
        {"teacher": encoder(1, classes=1), "student": encoder(2, classes=1),
         "config": {"kd_loss_type": ["jsd", 0.1]}},
        {},
        [r"over one class is always 1, so the KD loss 'jsd\(0\.1\)' and its gradient are 0"],
    ),
    "dkd over one class": (
        {"teacher": encoder(1, classes=1), "student": encoder(2, classes=1),
         "keys_S": ("logits", "labels"), "config": {"kd_loss_type": "dkd"}},
        {},
        [r"KD loss 'dkd': kd_dkd_loss: the logits have shape \(3, 1\); expected 2 or more classes"],
    ),
    "dkd without labels": (
        {"config": {"kd_loss_type": "dkd"}},
        {},
        ["the KD loss 'dkd' needs the labels: return them from adaptor_S under 'labels'"],
    ),
    "an option out of its range": (
        {"config": {"kd_loss_type": ["jsd", 2]}},
        {},
        ["the KD loss 'jsd\\(2\\)': kd_jsd_loss: beta is 2; expected a number from 0 to 1"],
    ),
    "an option that is not there": (
        {"config": {"kd_loss_type": ["jsd", {"bta": 1}]}},
        {},
        ["kd_loss_type: 'jsd' has no option 'bta': did you mean 'beta'"],
    ),
    "a relation of examples on every position": (
        {"keys": FEATURES, "config": matched(match(1, 1, "rkd_distance"))},
        {},
        [r"rkd_distance_loss: state_S has shape \(3, 4, 5\); expected \(batch, width\), one .*'embedding'"],
    ),
    "logits without classes": (
        {"keys": adaptor(logits=lambda b, o: o["logits"][:, 0])},
        {},
        [r"logits\[0\] are \[3\], without an axis of classes.*\[batch, 1\] with kd_loss_type='mse'"],
    ),
    "lists of unequal length": (
        {"keys_S": adaptor(logits=several(2))},
        {},
        ["adaptor_S returns 2 logits and adaptor_T 1"],
    ),
    "a distiller of logits without them": (
        {"cls": BasicDistiller, "keys_S": ("hidden",), "keys_T": adaptor(labels=fn_job.KEYS["labels"])},
        {},
        ["adaptor_S returns no 'logits', which this distiller compares; it returns 'hidden'",
         "adaptor_T returns no 'logits'.* it returns 'labels'"],
    ),
    "a mask on one side only": (
        {"keys_S": adaptor("logits_mask", logits=fn_job.tokens), "keys_T": adaptor(logits=fn_job.tokens)},
        {},
        ["adaptor_T returns no 'logits_mask' while the other side does"],
    ),
    "masks of the wrong shape and number": (
        {"keys_S": adaptor(logits=several(2, lambda o: o["tokens"]),
                           logits_mask=lambda b, o: b["mask"][:, 1:]),
         "keys_T": adaptor(logits=several(2, lambda o: o["tokens"]),
                           logits_mask=lambda b, o: [b["mask"]] * 3)},
        {},
        [r"adaptor_S: logits_mask is \[3, 3\], but the logits are \[3, 4, 3\]: .* = \[3, 4\]",
         "adaptor_T returns 3 logits_mask for 2 logits"],
    ),
    "shift without labels": (
        {"config": shift()},
        {},
        [r"probability_shift needs the labels: .* \(it returns 'logits'\)"],
    ),
    "shift with labels of another shape": (
        {"config": shift(), "keys_S": adaptor("logits", labels=lambda b, o: b["ids"])},
        {},
        [r"labels\[0\] is int32\[3, 4\]; probability_shift needs integers of shape \[3\]"],
    ),
    "shift with labels that are no integers": (
        {"config": shift(), "keys_S": adaptor("logits", labels=lambda b, o: b["labels"] * 1.0)},
        {},
        [r"labels\[0\] is float32\[3\]; probability_shift needs integers"],
    ),
    "shift with labels for one of two logits": (
        {"config": shift(), "keys_S": adaptor("labels", logits=several(2)),
         "keys_T": adaptor(logits=several(2))},
        {},
        ["adaptor_S returns 1 labels for 2 logits"],
    ),
    # the weights
    "hard labels without losses": (
        {"config": {"hard_label_weight": 0.5}},
        {},
        ["hard_label_weight is 0.5, but adaptor_S returns no 'losses'.*hold the labels"],
    ),
    "scheduled hard labels without losses": (
        {"config": {"hard_label_weight_scheduler": "linear_growth"}},
        {},
        ["hard_label_weight is 0, then scheduled, but adaptor_S returns no 'losses'"],
    ),
    "every weight zero": (
        {"keys": (*FEATURES, "losses"),
         "config": {"kd_loss_weight": 0, **matched(match(0, 0, weight=0))}},
        {},
        ["every weight is zero: set kd_loss_weight, hard_label_weight or a match's weight"],
    ),
    "nothing to optimise": (
        {"keys_S": ("hidden",), "keys_T": ("hidden", "labels")},
        {},
        ["nothing to optimise: adaptor_S returns 'hidden' and adaptor_T 'hidden', 'labels'"],
    ),
    # the batch and the models
    "ids outside the vocabulary": (
        {"teacher": encoder(1, id_limits={"ids": 5}), "student": encoder(2, id_limits={"ids": 11})},
        {"loader": [{"ids": np.array([[1, 11, 2, 3]])}]},
        ["ids holds 11, but model_S knows ids 0 to 10", "ids holds 11, but model_T knows ids 0 to 4"],
    ),
    "ids below zero in a tuple": (
        {"student": encoder(2, id_limits={"ids": 11})},
        {"loader": [(np.array([[1, -1, 2, 3]]),)]},
        ["ids holds -1, but model_S"],
    ),
    "inputs a model does not take": (
        {"student": FunctionModel(lambda params, ids, mask: params, 1.0)},
        {},
        [r"the batch has 'labels', which model_S does not take: choose from 'ids', 'mask'"],
    ),
    "inputs a model needs": (
        {},
        {"loader": [{"mask": np.ones((3, 4))}]},
        [r"does not fit model_S.*missing a required argument: 'ids'", "does not fit model_T"],
    ),
    "a tuple that is too long": (
        {},
        {"loader": [tuple(np.ones((5, 2)))]},
        ["does not fit model_S.*too many positional arguments.*by position", "model_T"],
    ),
    "a keyword of train that is misspelt": (
        {},
        {"callbacks": [print]},
        [r"train\(…, callbacks=…\) is passed on to model_S, which does not take it: "
         "did you mean 'callback'",
         "passed on to model_T"],
    ),
    "a keyword that is in the batch too": (
        {},
        {"mask": None},
        ["model_S gets 'mask' twice", "model_T gets 'mask' twice"],
    ),
    "a model that fails": (
        {"teacher": FunctionModel(raises(IndexError("no such layer")), 1.0)},
        {},
        [r"model_T failed on the batch \(ids int32\[3, 4\], .*\): IndexError: no such layer"],
    ),
    "a model whose inputs do not fit": (
        {"student": FunctionModel(lambda params, ids, mask, labels: ids @ mask, 1.0)},
        {},
        ["model_S failed on the batch .*TypeError: dot_general"],
    ),
    "parameters that are no numbers to train": (
        {"student": FunctionModel(lambda p, ids, mask, labels: {"logits": p["w"]},
                                  {"w": jnp.ones((3, 3)), "layers": jnp.int32(2)})},
        {},
        [r"model_S cannot be trained: layers \(int32\) among its parameters"],
    ),
    "no parameters": (
        {"student": FunctionModel(lambda p, ids, mask, labels: {"logits": jnp.ones((3, 3))}, {})},
        {},
        ["model_S has no parameters to train"],
    ),
    # the optimizer
    "an optimizer that cannot take options": (
        {"keys": FEATURES, "config": matched(match(2, 2, proj=["linear", 5, 5, {"lr": 1e-3}]))},
        {},
        ["options {'lr': 0.001}, but the optimizer is already built.*functools.partial"],
    ),
    "an option that is not taken": (
        {"keys": FEATURES, "config": matched(match(2, 2, proj=["linear", 5, 5, {"momentum": 1}]))},
        {"optimizer": functools.partial(optax.adamw, learning_rate=1)},
        ["'momentum', which adamw does not take"],
    ),
    "no optimizer": ({}, {"optimizer": None}, ["optimizer is a builtins.NoneType; pass an optax"]),
}  # fmt: skip


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_found_before_anything_compiles(name, tmp_path, compiled):
    made, arguments, expected = MISTAKES[name]
    distiller = fn_job.distiller(tmp_path, **made)
    del compiled[:]
    problems = failure(distiller, **arguments)
    assert compiled == []
    assert len(problems) == len(expected), problems
    for problem, message in zip(problems, expected, strict=True):
        assert re.search(message, problem, re.DOTALL), problem


def test_all_mistakes_are_in_one_report(tmp_path, compiled):
    distiller = fn_job.distiller(
        tmp_path,
        keys=(*FEATURES, "logits_mask"),
        keys_T=adaptor("hidden", logits=several(2)),
        teacher=encoder(1, width=7),
        config={
            "hard_label_weight": 1,
            "probability_shift": True,
            "intermediate_matches": [
                match(0, 0),
                match(5, 1),
                match(0, 0, "hidden_msee"),
                match(1, 1, "attention_mse", "attention"),
                match(1, 1, proj=["linear", 4, 7, {"lr": 1}]),
            ],
        },
    )
    del compiled[:]
    problems = failure(distiller)
    text = str(PreflightError(problems))
    assert text.startswith(f"{len(problems)} problems found before training:\n  - ")
    for part in [
        "hidden_msee",
        "already built",
        "1 logits and adaptor_T 2",
        "'proj': ['linear', 5, 7]",
        "layer_T=5",
        "adaptor_T returns no 'attention'",
        "takes 4 features",
        "needs the labels",
        "returns no 'losses'",
    ]:
        assert part in text, part
    assert len(problems) == 9
    assert compiled == []


def test_mistakes_of_both_models_and_the_rest_come_together(tmp_path):
    distiller = fn_job.distiller(
        tmp_path,
        keys_S=adaptor(logit=fn_job.KEYS["logits"]),
        teacher=FunctionModel(raises(ValueError("broken")), 1.0),
        config={"kd_loss_type": "xx"},
    )
    problems = failure(distiller, optimizer=0.1)
    assert len(problems) == 4
    for part in ("kd_loss_type='xx'", "builtins.float", "'logit'", "broken"):
        assert any(part in problem for problem in problems)


def test_what_an_error_of_the_users_says_is_short(tmp_path):
    distiller = fn_job.distiller(
        tmp_path, keys=adaptor(logits=lambda b, o: np.asarray(o["logits"]))
    )
    assert all(len(problem) < 400 for problem in failure(distiller))


def torch_mse(S, T, mask=None):
    from torch.nn.functional import mse_loss

    return mse_loss(S, T)


@pytest.mark.torch
def test_losses_of_torch_are_told_as_such(tmp_path, monkeypatch):
    monkeypatch.setitem(presets.MATCH_LOSS_MAP, "mine", torch_mse)
    made = {"keys": FEATURES, "config": matched(match(1, 1, "mine"))}
    (problem,) = failure(fn_job.distiller(tmp_path, **made))
    assert "it calls a function of torch on a JAX array" in problem
    assert "(test_prepare.py, line" in problem


# --------------------------------------------------------------------------- what teaches amiss


def watched(tmp_path, **made):
    """The warnings of a training."""
    loader = made.pop("loader")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", PreflightWarning)
        with fn_job.distiller(tmp_path, **made) as distiller:
            distiller.train(fn_job.SGD, loader, num_epochs=1)
    return [str(each.message) for each in caught]


def with_attention_mask(padded):
    """Batches whose mask has its own name, the ones given with a zero in it."""
    made = []
    for i, batch in enumerate(fn_job.batches(3)):
        mask = np.ones_like(batch["mask"])
        mask[0, -1] = i not in padded
        made.append({"ids": batch["ids"], "attention_mask": mask})
    return made


def masked_encoder(seed):
    model = encoder(seed)
    return FunctionModel(
        lambda params, ids, attention_mask: model.function(params, ids, attention_mask),
        model.params,
    )


@pytest.mark.parametrize(
    ("keys", "padded", "count"),
    [
        (adaptor(logits=fn_job.tokens), (1, 2), 1),
        (adaptor(logits=fn_job.tokens), (), 0),
        (adaptor("logits"), (1,), 0),
        (adaptor(logits=fn_job.tokens, logits_mask=lambda b, o: b["attention_mask"]), (1,), 0),
    ],
)
def test_padding_that_counts_is_told_once(keys, padded, count, tmp_path):
    told = watched(
        tmp_path,
        teacher=masked_encoder(1),
        student=masked_encoder(2),
        keys=keys,
        loader=with_attention_mask(padded),
    )
    assert len(told) == count
    assert all("'logits_mask': batch['attention_mask']" in each for each in told)


@pytest.mark.parametrize(
    ("width_T", "width_S", "count"), [(240, 360, 1), (240, 320, 0), (5, 360, 0)]
)
def test_a_teacher_much_smaller_than_its_student_is_told(width_T, width_S, count, tmp_path):
    models = {"teacher": encoder(1, width=width_T), "student": encoder(2, width=width_S)}
    told = watched(tmp_path, **models, loader=fn_job.batches(2))
    assert len(told) == count
    assert all("are the two swapped?" in each for each in told)


def test_where_something_is_wrong_a_smaller_teacher_is_told_too(tmp_path):
    models = {"teacher": encoder(1, width=240), "student": encoder(2, width=320)}
    wrong = {"config": matched(match(9, 1)), "keys": FEATURES}
    with pytest.warns(PreflightWarning, match="are the two swapped"):
        failure(fn_job.distiller(tmp_path, **models, **wrong))


def test_two_vocabularies_fed_one_batch_are_told(tmp_path):
    models = {
        "teacher": encoder(1, id_limits={"ids": 11}),
        "student": encoder(2, id_limits={"ids": 12}),
    }
    (told,) = watched(tmp_path, **models, loader=fn_job.batches(2))
    assert "model_T knows 11 ids of ids, model_S 12" in told
    assert "{'teacher': {…}, 'student': {…}}" in told


class MultiLabel(nnx.Module):
    """Its config says that labels do not exclude one another, as one of the zoo's may."""

    def __init__(self, seed):
        self.head = nnx.Linear(3, 4, rngs=nnx.Rngs(seed))
        self.config = types.SimpleNamespace(problem_type="multi_label_classification")

    def __call__(self, x):
        return self.head(x)


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize("loss", ["ce", "bce", "mse"])
def test_a_softmax_over_labels_that_go_together(loss, beside, tmp_path):
    def adaptor(batch, outputs):
        return {"logits": outputs, "losses": jnp.mean(outputs**2)}

    distiller = fn_job.distiller(
        tmp_path,
        teacher=MultiLabel(1),
        student=MultiLabel(2),
        keys=adaptor,
        config={"kd_loss_type": loss, "hard_label_weight": float(beside)},
    )
    batch = {"x": np.ones((2, 3), np.float32)}
    if loss != "ce":
        distiller.check(batch)
    elif beside:
        with pytest.warns(PreflightWarning, match=r"multi_label.*kd_loss_type='bce'"):
            distiller.check(batch)
    else:
        with pytest.raises(PreflightError, match=r"multi_label.*kd_loss_type='bce'"):
            distiller.check(batch)


def test_two_vocabularies_with_a_batch_each_are_fine(tmp_path):
    models = {
        "teacher": encoder(1, id_limits={"ids": 11}),
        "student": encoder(2, id_limits={"ids": 12}),
    }
    loader = [{"teacher": b, "student": b} for b in fn_job.batches(2)]
    assert watched(tmp_path, **models, loader=loader) == []


# --------------------------------------------------------------------------- functions of the user's


def kd_sum(S, T, temperature):
    return jnp.sum((S - T) ** 2)


def kd_swallowing(S, T, temperature, **options):
    return jnp.mean((S - T) ** 2)


def kd_mean(S, T, temperature):
    return jnp.mean((S - T) ** 2)


def average(S, T, base):
    return base + jnp.mean(S)


def swallowing(S, T, base, **options):
    return base + jnp.mean(S, -1) - jnp.mean(S)


TOKENS = adaptor("logits_mask", logits=fn_job.tokens)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (kd_sum, "KD loss 'mine' is used with logits_mask, but it is not the mean.*mask=None"),
        (kd_swallowing, "KD loss 'mine' .* takes mask=, but unselected positions change"),
        (raises(KeyError("x")), "KD loss 'mine' failed when tried: KeyError"),
        (kd_mean, None),
    ],
)
def test_losses_of_ones_own_under_masks(loss, message, tmp_path, compiled, monkeypatch):
    monkeypatch.setitem(presets.KD_LOSS_MAP, "mine", loss)
    made = {"config": {"kd_loss_type": "mine"}, "keys": TOKENS}
    distiller = fn_job.distiller(tmp_path, **made)
    if message is None:
        with distiller:
            prepare(distiller.job(), {"": own(fn_job.batches(1)[0])}, fn_job.SGD).programs[""]
        return
    (problem,) = failure(distiller)
    assert re.search(message, problem)
    assert not any("step" in str(name) for name in compiled)


@pytest.mark.parametrize(
    ("scheduler", "message"),
    [
        (average, "temperature scheduler is used with logits_mask, but it is not decided by each"),
        (swallowing, "temperature scheduler .* takes mask=, but unselected positions change"),
        (raises(TypeError("x")), "temperature scheduler failed when tried: TypeError"),
        (lambda S, T, base: base + jnp.mean(S, -1), None),
    ],
)
def test_temperatures_of_ones_own_under_masks(scheduler, message, tmp_path, monkeypatch):
    monkeypatch.setitem(presets.TEMPERATURE_SCHEDULER.data, "mine", scheduler)
    made = {"config": {"temperature_scheduler": "mine"}, "keys": TOKENS}
    distiller = fn_job.distiller(tmp_path, **made)
    if message is None:
        with distiller:
            prepare(distiller.job(), {"": own(fn_job.batches(1)[0])}, fn_job.SGD).programs[""]
        return
    (problem,) = failure(distiller)
    assert re.search(message, problem)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (vector, r"T0 → S0 by mine gives \[3, 4\], not a scalar"),
        (lambda S, T, mask=None: None, "by mine gives NoneType, not a scalar"),
        (lambda S, T: 0.0, "by mine: TypeError: .*unexpected keyword argument 'mask'"),
        (raises(RuntimeError("broken")), "by mine: RuntimeError: broken"),
    ],
)
def test_match_losses_of_ones_own(loss, message, tmp_path, monkeypatch):
    monkeypatch.setitem(presets.MATCH_LOSS_MAP, "mine", loss)
    distiller = fn_job.distiller(tmp_path, keys=FEATURES, config=matched(match(0, 0, "mine")))
    (problem,) = failure(distiller)
    assert re.search(message, problem)


def test_a_feature_of_ones_own(tmp_path, monkeypatch):
    monkeypatch.setattr(presets, "FEATURES", presets.FEATURES)
    presets.FEATURES.append("values")
    try:
        keys = adaptor(values=lambda batch, outputs: outputs["hidden"])
        made = {"keys": keys, "config": matched(match(0, 0, feature="values"))}
        distiller = fn_job.distiller(tmp_path, **made)
        with distiller:
            program = prepare(
                distiller.job(), {"": own(fn_job.batches(1)[0])}, fn_job.SGD
            ).programs[""]
        assert program.names == ("unweighted_values_hidden_mse_0_0",)
        made["config"] = matched(match(0, 9, feature="values"))
        (problem,) = failure(fn_job.distiller(tmp_path, **made))
        assert "'values' for layers 0–2" in problem
    finally:
        presets.FEATURES.remove("values")


def test_a_trainer_without_losses(tmp_path):
    config = TrainingConfig(output_dir=tmp_path / "out", device="cpu")
    trainer = BasicTrainer(config, encoder(), adaptor("logits"))
    (problem,) = failure(trainer)
    assert "returns 'logits', but no 'losses' to minimise" in problem


# ------------------------------------------------------------------------------------- warnings


def warned(distiller, **arguments):
    """The warnings of a training that would go on, without compiling it."""
    batch = arguments.pop("batch", None) or fn_job.batches(1)[0]
    with distiller, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        prepare(distiller.job(**arguments), {"": own(batch)}, fn_job.SGD).programs[""]
    assert all(w.category is PreflightWarning for w in caught)
    return [str(w.message) for w in caught]


TOKEN_LABELS = {**fn_job.batches(1)[0], "labels": np.zeros((3, 4), np.int32)}
PADDED_LABELS = {**TOKEN_LABELS, "labels": np.where(TOKEN_LABELS["mask"], 1, -100)}
TOKEN_KEYS = adaptor("labels", logits=fn_job.tokens)


def token_model():
    model = encoder(1)
    return FunctionModel(lambda p, ids, mask, labels: model.function(p, ids, mask), model.params)


SUSPECT = {
    "hidden counted from blocks": (
        {"keys": FEATURES, "config": matched(match(2, 2), match(1, 0))},
        {},
        ["hidden T1 → S0 .* pairs the embeddings' output .hidden 0. with the output of a block"],
    ),
    "in a list too": (
        {"keys": FEATURES, "config": matched(match([0, 2], [1, 2], "nst"))},
        {},
        ["hidden T0-2 → S1-2 by nst pairs the embeddings' output"],
    ),
    "the last layer of one side only": (
        {"keys": FEATURES, "teacher": encoder(1, layers=3), "config": matched(match(2, 2))},
        {},
        ["hidden matches use the student's last layer but not the teacher's.*0 is the embeddings"],
    ),
    "attention counted from 1, within range": (
        {"keys": FEATURES, "teacher": encoder(1, layers=3),
         "config": matched(match(2, 0, "attention_mse", "attention"))},
        {},
        ["attention matches use the teacher's last layer but not the student's.*0 is the first"],
    ),
    "a mask on the teacher's side": (
        {"keys_S": ("hidden",), "keys_T": ("hidden", "inputs_mask"), "config": matched(match(1, 1))},
        {},
        ["only adaptor_T returns an 'inputs_mask'.*Return it from adaptor_S"],
    ),
    "logits on one side": (
        {"keys_S": ("hidden",), "keys_T": FEATURES, "config": matched(match(1, 1))},
        {},
        ["adaptor_S returns no 'logits' while the other side does: there will be no KD loss"],
    ),
    "a mask without effect": (
        {"keys": ("logits", "logits_mask")}, {}, ["logits_mask has no effect on logits without"]
    ),
    "a softmax over one class beside a match": (
        {"teacher": encoder(1, classes=1), "student": encoder(2, classes=1),
         "keys": ("logits", "hidden"), "config": matched(match(1, 1), match(2, 2))},
        {},
        [r"a softmax over one class is always 1, so the KD loss 'ce' and its gradient are 0"],
    ),
    "examples compared across micro-batches": (
        {"keys": FEATURES, "gradient_accumulation_steps": 2,
         "config": matched(match(1, 1, "cka")) | {"kd_loss_type": "dist"}},
        {},
        ["'dist', 'cka' compare the examples .* each of the accumulated micro-batches is compared by itself"],
    ),
    "examples compared in one batch": (
        {"keys": FEATURES, "config": matched(match(1, 1, "cka"))}, {}, []
    ),
    "one class by mse": (
        {"teacher": encoder(1, classes=1), "student": encoder(2, classes=1),
         "config": {"kd_loss_type": "mse"}},
        {},
        [],
    ),
    "unmasked padding labels under the shift": (
        {"config": shift(), "keys": TOKEN_KEYS, "student": token_model(), "teacher": token_model()},
        {"batch": TOKEN_LABELS},
        ["probability_shift on logits with a length, without logits_mask"],
    ),
    "marked padding labels": (
        {"config": shift(), "keys": TOKEN_KEYS, "student": token_model(), "teacher": token_model()},
        {"batch": PADDED_LABELS},
        [],
    ),
    "a misspelt keyword that a model swallows": (
        {"student": FunctionModel(lambda p, **inputs: {"logits": p}, jnp.ones((3, 3))),
         "teacher": FunctionModel(lambda p, **inputs: {"logits": p}, jnp.ones((3, 3)))},
        {"max_grad_nrom": 1.0, "output_hidden_states": True},
        [r"train\(…, max_grad_nrom=…\) is passed on to model_S; did you mean 'max_grad_norm'",
         "model_T"],
    ),
    "nothing suspicious": (
        {"keys": (*FEATURES, "inputs_mask", "losses"), "teacher": encoder(1, layers=3),
         "config": matched(match(0, 0), match(3, 2), match(-1, -1), match([0, 3], [0, 2], "nst"))},
        {},
        [],
    ),
}  # fmt: skip


def test_a_loss_of_the_users_own_may_take_other_classes(tmp_path, monkeypatch):
    """As for two vocabularies: it is traced, and its own numbers count."""

    def cut(S, T, temperature):
        return jnp.mean((S[..., :2] - T[..., :2]) ** 2) / temperature

    monkeypatch.setitem(presets.KD_LOSS_MAP, "cut", cut)
    teacher, student = encoder(1, classes=9), encoder(2, classes=3)
    config = {"kd_loss_type": "cut", "temperature": 2}
    distiller = fn_job.distiller(tmp_path, teacher=teacher, student=student, config=config)
    (batch,) = fn_job.batches(1)
    before = student.params

    def loss(params):
        S, T = (fn_job.encode(p, batch["ids"])["logits"] for p in (params, teacher.params))
        return cut(S, T, 2)

    with distiller:
        distiller.train(functools.partial(optax.sgd, learning_rate=1.0), [batch], num_epochs=1)
    wanted = jax.tree.map(lambda p, g: p - g, before, jax.grad(loss)(before))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), student.params, wanted)
    monkeypatch.setitem(presets.KD_LOSS_MAP, "cut", lambda S, T, temperature: S - T)
    other = {"teacher": teacher, "student": encoder(2), "config": config}
    (problem,) = failure(fn_job.distiller(tmp_path / "other", **other))
    assert "the KD loss 'cut'" in problem


@pytest.mark.parametrize("name", SUSPECT)
def test_likely_slips_are_warned_of(name, tmp_path):
    made, arguments, expected = SUSPECT[name]
    found = warned(fn_job.distiller(tmp_path, **made), **arguments)
    assert len(found) == len(expected), found
    for warning, message in zip(found, expected, strict=True):
        assert re.search(message, warning), warning


# ---------------------------------------------------------------------- the first batch, and check


def test_looking_at_the_first_batch_does_not_lose_it(tmp_path):
    loader = fn_job.batches(5)
    trained, seen = [], []

    def once():
        for batch in loader:
            seen.append(batch["ids"])
            yield batch

    for name, source in (("list", loader), ("generator", once())):
        distiller = fn_job.distiller(tmp_path / name)
        with distiller:
            distiller.train(fn_job.SGD, source, num_steps=5)
        trained.append(distiller.model_S.params)
    assert len(seen) == 5
    jax.tree.map(np.testing.assert_array_equal, *trained)


def test_models_without_logits_are_distilled_on_features(tmp_path):
    distiller = fn_job.distiller(
        tmp_path,
        keys=("hidden", "attention", "inputs_mask"),
        teacher=encoder(1, width=6),
        config=matched(
            match(2, 2, proj=["linear", 5, 6]), match(1, 1, "attention_mse", "attention")
        ),
    )
    before = distiller.model_S.params
    with distiller:
        distiller.train(fn_job.SGD, fn_job.batches(3), num_epochs=1)
    after = distiller.model_S.params
    assert not np.array_equal(before["layers"][1], after["layers"][1])
    assert np.array_equal(before["head"], after["head"])


def test_check_tells_what_would_be_trained(tmp_path, capsys):
    distiller = fn_job.distiller(
        tmp_path,
        keys=("logits", "hidden", "losses"),
        teacher=encoder(1, width=6),
        config={
            "temperature": 8,
            "kd_loss_weight_scheduler": "linear_decay",
            "intermediate_matches": [match(2, 2, weight=0.5, proj=["linear", 5, 6])],
        },
    )
    report = distiller.check(fn_job.batches(1)[0], optax.adam(1e-3))
    assert capsys.readouterr().out == report + "\n"
    for line in [
        r"GeneralDistiller: nothing wrong was found",
        r"batch +ids int32\[3, 4\], labels int32\[3\], mask int32\[3, 4\]",
        rf"model_T +{11 * 6 + 2 * 36 + 18} parameters \(1.3× the student\)",
        rf"model_S +{11 * 5 + 2 * 25 + 15} parameters",
        rf"proj 0 +{5 * 6 + 6} parameters",
        r"\+ 1, then by its scheduler × KD by 'ce', temperature 8$",
        r"\+ 0 × the student's own losses  \(logged only\)",
        r"\+ 0.5 × hidden T2 → S2 by hidden_mse, projected 5 → 6 \(linear\)",
        r"\d GFLOP",
        r"\d MiB of arrays held; .* MiB at the peak",
    ]:
        assert re.search(line, report, re.MULTILINE), line
    assert not (tmp_path / "out").exists()


def test_check_finds_what_train_would_find(tmp_path, compiled):
    distiller = fn_job.distiller(tmp_path, config={"hard_label_weight": 1}, keys=("logits",))
    del compiled[:]
    with pytest.raises(PreflightError, match="returns no 'losses'"):
        distiller.check(fn_job.batches(1)[0])
    with pytest.raises(PreflightError, match="model_S gets 'mask' twice"):
        distiller.check(fn_job.batches(1)[0], mask=None)
    assert compiled == []


def test_an_optimizer_that_was_made_with_text(tmp_path):
    distiller = fn_job.distiller(tmp_path)
    with distiller, pytest.raises(PreflightError, match=r"text \(optax\.adamw\('1e-4'\)\)\?"):
        distiller.train(optax.adamw("1e-4"), fn_job.batches(2), num_epochs=1)
