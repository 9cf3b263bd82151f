"""A run goes on only with the job that its checkpoint was trained by, or where a change is meant."""

import contextlib
import functools
import json
import logging
import os
import re
import shutil
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbrewer
from jaxbrewer import presets
from jaxbrewer.configurations.configs import names_of_changes
from jaxbrewer.errors import CheckpointError, ConfigError
from jaxbrewer.models.wrap import as_model
from jaxbrewer.training.comparison import record as records
from jaxbrewer.training.comparison.traces import trace
from jaxbrewer.training.digests import json_digest
from tests import fn_job, nnx_job

STOP = 3
KEYS = ("logits", "hidden", "losses", "labels")
CONFIG = {
    "temperature": 2,
    "hard_label_weight": 0.5,
    "intermediate_matches": [fn_job.match(1, 1), fn_job.match(2, 2, proj=["linear", 5, 5])],
}


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """What is compared here does not depend on how well programs are optimized."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


# ------------------------------------------------------------------------------------- the job


def warm(peak=2):
    """A learning-rate schedule; a factory of one, as `train` takes it."""
    return lambda: lambda step: min(1.0, (step + 1) / peak)


SGD = functools.partial(optax.sgd, learning_rate=0.1)


def batches(size=8):
    return fn_job.batches(3, size)


def run(folder, *, config=None, keys=KEYS, keys_T=None, train=None, optimizer=SGD, **options):
    """Trains three batches an epoch for two; `train` are arguments of it. Returns the numbers."""
    train = {"num_epochs": 2, "scheduler_class": warm(), "max_grad_norm": 1.0} | (train or {})
    data = train.pop("data", None) or batches()
    distiller = fn_job.distiller(
        folder, config=CONFIG | (config or {}), keys=keys, keys_T=keys_T, **options
    )
    with distiller if train.pop("train_mode", True) else contextlib.nullcontext():
        distiller.train(optimizer, data, **train)
    leaves = jax.tree.leaves(distiller.model_S.params)
    return np.concatenate([np.ravel(x) for x in leaves])


def stopped(at=STOP):
    """A callback that stops at a step."""
    return lambda model, step: jaxbrewer.CallbackResult(stop=step == at)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a run that was stopped, and what the whole one ends with."""
    folder = tmp_path_factory.mktemp("saved")
    run(folder, train={"callback": stopped()})
    return folder / "out", run(folder / "whole")


@pytest.fixture
def folder(saved, tmp_path):
    """A copy of its own."""
    shutil.copytree(saved[0], tmp_path / "out")
    return tmp_path


# ------------------------------------------------------------------------------- what is refused


def other(**changes):
    """`CONFIG` with a first match that differs."""
    first, *rest = CONFIG["intermediate_matches"]
    return {"config": {"intermediate_matches": [{**first, **changes}, *rest]}}


def second(**options):
    first, match = CONFIG["intermediate_matches"]
    return {"config": {"intermediate_matches": [first, {**match, **options}]}}


def with_function(function, seed=2):
    """A model of `encoder`'s arrays and another function."""
    return jaxbrewer.FunctionModel(function, fn_job.encoder(seed).params)


def reluish(params, ids, mask=None, labels=None):
    """`encode` with its logits a little larger."""
    found = fn_job.encode(params, ids, mask, labels)
    return {**found, "logits": jax.nn.relu(found["logits"])}


def halves(model):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), model.params)
    return jaxbrewer.FunctionModel(fn_job.encode, params)


def turned(batch, outputs):
    """The adaptor of the job, its layers in the other order."""
    found = fn_job.adaptor(*KEYS)(batch, outputs)
    return found | {"hidden": found["hidden"][::-1]}


class Mine(jaxbrewer.GeneralDistiller):
    """The same by another name."""


def without_mask(batch):
    return {name: x for name, x in batch.items() if name != "mask"}


# name → (what the error says of it, how the job differs)
REFUSED = {
    # configs
    "temperature": ("temperature: was 2, is 4", {"config": {"temperature": 4}}),
    "kd loss": ("kd_loss_type: was 'ce', is 'mse'", {"config": {"kd_loss_type": "mse"}}),
    "kd weight": ("kd_loss_weight: was 1, is 0.5", {"config": {"kd_loss_weight": 0.5}}),
    "temperature scheduler": (
        "temperature_scheduler: was 'none', is 'constant'",
        {"config": {"temperature_scheduler": "constant"}},
    ),
    "hard labels": (
        "hard_label_weight: was 0.5, is 1", {"config": {"hard_label_weight": 1}},
    ),
    "weight scheduler": (
        "hard_label_weight_scheduler: was 'none', is 'linear_decay'",
        {"config": {"hard_label_weight_scheduler": "linear_decay"}},
    ),
    "kd weight scheduler": (
        "kd_loss_weight_scheduler: was 'none', is 'linear_growth'",
        {"config": {"kd_loss_weight_scheduler": "linear_growth"}},
    ),
    "probability shift": (
        "probability_shift: was False, is True", {"config": {"probability_shift": True}},
    ),
    "match weight": (r"intermediate_matches[0].weight: was 1, is 2", other(weight=2)),
    "match layer": (r"intermediate_matches[0].layer_T: was 1, is 2", other(layer_T=2)),
    "match loss": (r"intermediate_matches[0].loss: was 'hidden_mse', is 'cos'", other(loss="cos")),
    "match gone": (
        "intermediate_matches: was [",
        {"config": {"intermediate_matches": [CONFIG["intermediate_matches"][1] | {"proj": None}]}},
    ),
    "projection": (
        "intermediate_matches[1].proj: was ['linear', 5, 5], is ['relu', 5, 5]",
        second(proj=["relu", 5, 5]),
    ),
    "projection's rate": (
        "intermediate_matches[1].proj: was ['linear', 5, 5], is ['linear', 5, 5, {",
        second(proj=["linear", 5, 5, {"learning_rate": 0.1}]),
    ),
    "seed": ("seed: was 0, is 1", {"seed": 1}),
    "half precision": ("fp16: was False, is True", {"fp16": True}),
    "cached": (
        "is_caching_logits: was False, is True", {"config": {"is_caching_logits": True}},
    ),
    # the arguments of train
    "rate": (
        "optimizer: was -0.1, is -0.2",
        {"optimizer": functools.partial(optax.sgd, learning_rate=0.2)},
    ),
    "optimizer": (
        "optimizer: was ", {"optimizer": functools.partial(optax.adam, learning_rate=0.1)},
    ),
    "schedule": (
        "schedule, learning-rate factor at step 1: was 0.5, is 0.25",
        {"train": {"scheduler_class": warm(4)}},
    ),
    "no schedule": (
        "schedule, learning-rate factor at step 1: was 0.5, is 1.0",
        {"train": {"scheduler_class": None}},
    ),
    "clipping": ("max_grad_norm: was 1.0, is 0.5", {"train": {"max_grad_norm": 0.5}}),
    "no clipping": ("max_grad_norm: was 1.0, is 0.0", {"train": {"max_grad_norm": -1}}),
    "evaluation mode": ("train_mode: was True, is False", {"train": {"train_mode": False}}),
    # models and adaptors
    "teacher's weights": ("teacher, weights: was 4 float32 arrays", {"teacher": fn_job.encoder(7)}),
    "teacher's type": ("is 4 bfloat16 arrays", {"teacher": halves(fn_job.encoder(1))}),
    "teacher's function": ("teacher: was ", {"teacher": with_function(reluish, 1)}),
    "teacher's size": ("is 5 float32 arrays", {"teacher": fn_job.encoder(1, layers=3)}),
    "student's function": ("student: was ", {"student": with_function(reluish)}),
    "student's adaptor": ("student: was ", {"keys": turned, "keys_T": KEYS}),
    "teacher's adaptor": ("teacher: was ", {"keys": KEYS, "keys_T": turned}),
    # batches
    "batch size": ("batch, rows: was 8, is 5", {"train": {"data": batches(size=5)}}),
    "inputs": (
        "batch, inputs: was ids, labels, mask, is ids, labels",
        {"train": {"data": [without_mask(batch) for batch in batches()]}},
    ),
    "axes": (
        "batch, mask: was 'int32[8,4]', is 'int32[8]'",
        {"train": {"data": [b | {"mask": b["mask"][:, 0]} for b in batches()]}},
    ),
    "numbers": (
        "batch, mask: was 'int32[8,4]', is 'float32[8,4]'",
        {"train": {"data": [b | {"mask": b["mask"] * 1.0} for b in batches()]}},
    ),
    "class": ("class: was 'GeneralDistiller', is 'Mine'", {"cls": Mine}),
}  # fmt: skip


def named_in(text):
    """The names that an error says to allow."""
    return re.findall(r"'(\w+)'", text.partition("resume_changes=[")[2].partition("]")[0])


@pytest.mark.filterwarnings("ignore:train\\(\\) outside", "ignore:the hidden matches use")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_changed_job_is_refused(kind, folder, saved):
    line, how = REFUSED[kind]
    allowed = {}
    if "data" in how.get("train", {}):  # a batch is compared with its checksum first
        with pytest.raises(CheckpointError, match=r"say resume_changes=\['data'\]"):
            run(folder, resume=True, **how)
        allowed = {"resume_changes": ["data"]}
    with pytest.raises(CheckpointError, match="was trained by another job") as caught:
        run(folder, resume=True, **how, **allowed)
    text = str(caught.value)
    assert line in text
    name = named_in(text)
    assert set(name) <= {*names_of_changes()}
    assert len(name) == 1, text
    assert [p.name for p in (folder / "out").iterdir()] == [p.name for p in saved[0].iterdir()]


MEANT = [
    ["temperature", "match weight", "rate", "schedule", "clipping", "student's function"],
    ["teacher's type", "batch size", "evaluation mode", "class", "cached"],
]


def together(kinds):
    """One job that differs in all of these ways."""
    how: dict = {"config": {}, "train": {}}
    for kind in kinds:
        for key, value in REFUSED[kind][1].items():
            how[key] = how[key] | value if isinstance(how.get(key), dict) else value
    return how


@pytest.mark.filterwarnings("ignore:train\\(\\) outside")
@pytest.mark.parametrize("kinds", MEANT, ids="; ".join)
def test_what_is_meant_goes_on(kinds, folder, caplog):
    """All that has changed is told at once; named, it goes on, and its checkpoints are of the new job."""
    how = together(kinds)
    with pytest.raises(CheckpointError) as caught:
        run(folder, resume=True, resume_changes=["data"], **how)
    names = named_in(str(caught.value))
    for kind in kinds:
        assert REFUSED[kind][0] in str(caught.value) or kind == "student's function"
    with pytest.raises(CheckpointError) as caught:
        run(folder, resume=True, resume_changes=[*names[1:], "data"], **how)
    assert named_in(str(caught.value)) == names[:1]
    caplog.set_level(logging.INFO, "jaxbrewer")
    run(folder, resume=True, resume_changes=[*names, "data"], **how)
    assert "resume_changes allows: " in caplog.text
    assert (folder / "out" / "gs6").is_dir()
    caplog.clear()
    run(folder, resume=True, **how)
    assert "allows" not in caplog.text


def test_a_clone_that_is_not_installed_has_no_version(monkeypatch):
    monkeypatch.setattr(records, "_LIBRARIES", ("not-installed-anywhere", "jax"))
    assert records.versions() == {"not-installed-anywhere": "", "jax": jax.__version__}


def test_any_change_may_be_meant(folder, caplog):
    run(folder, resume=True, resume_changes="any", teacher=fn_job.encoder(7))
    assert "resume_changes allows: teacher, weights: was 4 float32 arrays" in caplog.text


# ---------------------------------------------------------------------------------- what is free

FREE = {
    "nothing": {},
    "where and how often": {"log_dir": True, "max_to_keep": 1, "ckpt_frequency": 3},
    "bad steps": {"max_nonfinite_steps": 3},
    "devices": {"data_parallel": True},
    "pmap": {"data_parallel": True, "mapping": "pmap"},
}
CLOSE = {"rtol": 1e-4, "atol": 1e-5}  # across devices sums are of another order


@pytest.mark.parametrize("kind", FREE)
def test_what_is_free_ends_with_the_same_bits(kind, folder, saved, caplog):
    how = dict(FREE[kind])
    if how.pop("log_dir", None):
        how["log_dir"] = folder / "log"
    found = run(folder, resume=True, **how)
    if "data_parallel" not in how:
        np.testing.assert_array_equal(found, saved[1])
    np.testing.assert_allclose(found, saved[1], **CLOSE)
    assert "not compared" not in caplog.text


def test_a_longer_run_is_the_same_where_its_rows_are(folder, saved):
    """Constant after the warm-up, whatever the length; the first two epochs are those of before."""
    run(folder, resume=True, train={"num_epochs": 3}, ckpt_frequency=3)
    model = jaxbrewer.load_student(folder / "out" / "gs6", fn_job.encoder(5))
    leaves = [np.ravel(x) for x in jax.tree.leaves(model.params)]
    np.testing.assert_array_equal(np.concatenate(leaves), saved[1])


def test_a_longer_run_with_other_rows_is_refused(tmp_path):
    """The weight grows with the fraction of training that is done: the length changes it."""
    config = {"hard_label_weight_scheduler": "linear_growth"}
    run(tmp_path, config=config, train={"callback": stopped()})
    with pytest.raises(CheckpointError) as caught:
        run(tmp_path, config=config, train={"num_epochs": 3}, resume=True)
    assert named_in(str(caught.value)) == ["schedule"]
    assert re.search(
        r"weight of the hard labels at step 2: was 0\.1\d+, is 0\.1", str(caught.value)
    )


def test_lengths_may_differ_and_the_last_batch_be_shorter(tmp_path, caplog):
    """A batch of another length, and one of fewer rows at an epoch's end, are no change."""
    data = batches()
    long = [{k: np.tile(v, (1, 2)) if v.ndim > 1 else v for k, v in b.items()} for b in data]
    data = [data[0], long[1], {k: v[:2] for k, v in data[2].items()}]
    for resume, stop in ((False, 2), ("gs1", 2), ("gs2", 3)):
        train = {"data": data, "callback": stopped(stop)}
        run(tmp_path, train=train, resume=resume, ckpt_frequency=3)
    assert "rows of a batch: this one may be the last of its epoch" in caplog.text
    assert "functions" not in caplog.text


# ----------------------------------------------------------------- which checkpoints are compared


def test_a_checkpoint_that_is_named_is_compared_and_a_finished_run(folder, saved, tmp_path):
    for resume in ("gs3", str(saved[0] / "gs3")):
        with pytest.raises(CheckpointError, match="teacher, weights: was"):
            run(folder, resume=resume, teacher=fn_job.encoder(7))
    done = tmp_path / "done"
    shutil.copytree(saved[0].parent / "whole", done)
    with pytest.raises(CheckpointError, match="teacher, weights: was"):
        run(done, resume=True, teacher=fn_job.encoder(7))
    np.testing.assert_array_equal(run(done, resume=True), saved[1])


def rewrite(path, change):
    """Changes the JSON part of a checkpoint, and seals it again."""
    file = path / "position" / "metadata"
    position = json.loads(file.read_text())
    change(position)
    position.pop("digest", None)
    seal = {"digest": json_digest(position)} if position["format"] > 1 else {}
    file.write_text(json.dumps(position | seal))


def as_format_1(position):
    for key in ("digests", "digest", "job"):
        position.pop(key)
    position["format"] = 1


@pytest.mark.parametrize("older", [lambda position: position.pop("job"), as_format_1])
def test_without_a_record_the_configs_are_compared(older, folder, saved, caplog):
    rewrite(folder / "out" / "gs3", older)
    with pytest.raises(CheckpointError, match="temperature: was 2, is 4"):
        run(folder, resume=True, config={"temperature": 4})
    np.testing.assert_array_equal(run(folder, resume=True), saved[1])
    line = (
        "gs3: not compared with what it was trained by: teacher, models, loss, optimizer, schedule"
    )
    assert caplog.text.count(line) == 1


def test_across_versions_numbers_are_compared(folder, monkeypatch, caplog):
    """Traces are not: another function of the student is not seen, and that is said."""
    now = records.versions()
    monkeypatch.setattr(records, "versions", lambda: now | {"jax": "0.99"})
    with pytest.raises(CheckpointError, match=r"optimizer, \S+ of made-up arrays: was"):
        run(folder, resume=True, optimizer=REFUSED["rate"][1]["optimizer"])
    presets.KD_LOSS_MAP["ce"], kept = shifted, presets.KD_LOSS_MAP["ce"]
    try:
        with pytest.raises(CheckpointError, match="loss, total of made-up arrays: was"):
            run(folder, resume=True)
    finally:
        presets.KD_LOSS_MAP["ce"] = kept
    run(folder, resume=True, student=with_function(reluish))
    assert f"the functions of teacher and student (jax {now['jax']} then, 0.99 now)" in caplog.text


def shifted(logits_S, logits_T, temperature=1):
    return jnp.mean((logits_S - logits_T + 0.01) ** 2) / temperature


def test_a_loss_of_the_users_whose_code_has_changed(folder, monkeypatch):
    monkeypatch.setitem(presets.KD_LOSS_MAP, "ce", shifted)
    with pytest.raises(CheckpointError, match="loss: was ") as caught:
        run(folder, resume=True)
    assert named_in(str(caught.value)) == ["loss"]


def test_a_teacher_that_is_cached(tmp_path):
    """Another teacher is refused before it runs, and before its cache is made."""
    config = {"is_caching_logits": True, "intermediate_matches": []}
    run(tmp_path, config=config, train={"callback": stopped()})
    shutil.copytree(tmp_path / "out", tmp_path / "again" / "out")
    for how in ({"teacher": fn_job.encoder(7)}, {"teacher": with_function(reluish, 1)}):
        folder = tmp_path / "cache"
        with pytest.raises(CheckpointError, match=r"teacher.*: was"):
            run(tmp_path, config=config | {"cache_dir": folder}, resume=True, **how)
        assert not folder.exists()
    found = run(tmp_path, config=config | {"cache_dir": folder}, resume=True)
    np.testing.assert_array_equal(run(tmp_path / "again", config=config, resume=True), found)


# ---------------------------------------------------------------------------------------- traces

PRINTED = """
import jax, jax.numpy as jnp, numpy as np
from flax import nnx
from jaxbrewer.training.comparison.traces import trace

@jax.custom_vjp
def bent(x):
    return jnp.maximum(x, 0) + {offset}
bent.defvjp(lambda x: (bent(x), x), lambda x, g: (g * (x > 0) * {slope},))
table = jnp.asarray(np.random.RandomState(0).normal(size=(50, 60)))
masks = {{"a", "b", "c", "d"}}

def run(params, key, x):
    def layer(x, w):
        return bent(x @ w), None
    def loss(params):
        hidden, _ = jax.lax.scan(layer, x, params["layers"])
        hidden = nnx.Dropout(0.1)(hidden, rngs=nnx.Rngs(key), deterministic=False)
        for name in {order}:
            hidden = jax.jit(lambda h: jnp.tanh(h * params[name]))(hidden) + hidden
        return jax.nn.softmax(hidden).mean() + table.sum() * {factor}
    return jax.value_and_grad(jax.checkpoint(loss))(params)

params = {{name: jnp.ones(4) for name in masks}} | {{"layers": jnp.ones((3, 4, 4))}}
print(trace(run, params=params, key=jax.random.key(0), x=jnp.ones((2, 4)))[0]["digest"])
"""
SAME = {"offset": "0", "slope": "1", "factor": "1", "order": "sorted(masks)"}


def printed(hash_seed="0", **changes):
    """The digest of the function above, from a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", PRINTED.format(**SAME | changes)],
        env=os.environ | {"PYTHONHASHSEED": hash_seed, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split()[-1]


def test_a_trace_is_the_same_in_another_process():
    """With dropout, a rule of its own for its gradient, a scan, and a captured array."""
    digests = [printed(), printed("12"), printed(slope="2")]
    assert digests[0] == digests[1]
    assert digests[0] != digests[2]


def digest_of(function):
    return trace(function, x=jnp.ones((2, 3)), y=jnp.ones((2, 3)))[0]["digest"]


def test_what_a_trace_tells_apart():
    table = np.arange(3000.0)

    def one(x, y):
        a = jnp.sin(x)
        b = jnp.cos(y)
        return {"sum": a + b, "table": jnp.sum(table)}

    def in_another_order_and_by_other_names(x, y):
        second = jnp.cos(y)
        unused = jnp.tanh(y)  # noqa: F841
        first = jnp.sin(x)
        return {"table": jnp.sum(table), "sum": first + second}

    assert digest_of(one) == digest_of(in_another_order_and_by_other_names)
    changed = table.copy()
    changed[1234] += 1
    others = [
        lambda x, y: {"sum": jnp.sin(y) + jnp.cos(x), "table": jnp.sum(table)},
        lambda x, y: {"sum": jnp.cos(y) + jnp.sin(x), "table": jnp.sum(table)},
        lambda x, y: {"sum": jnp.sin(x) + jnp.cos(y), "table": jnp.sum(changed * 1.0)},
        lambda x, y: {"sum": jnp.sin(x) + 1.0000001 * jnp.cos(y), "table": jnp.sum(table)},
        lambda x, y: {"total": jnp.sin(x) + jnp.cos(y), "table": jnp.sum(table)},
    ]
    assert len({digest_of(one), *map(digest_of, others)}) == 6


def test_what_a_kernel_does_counts():
    """References are read and written in turn, which no value shows."""
    from jax.experimental import pallas as pl

    def called(kernel):
        shape = jax.ShapeDtypeStruct((2, 3), jnp.float32)
        return lambda x, y: pl.pallas_call(kernel, out_shape=shape, interpret=True)(x, y)

    def kernel(factor, is_late=False):
        def run(x_ref, y_ref, o_ref):
            o_ref[...] = x_ref[...] * factor
            if is_late:
                o_ref[...] += y_ref[...]
            else:
                o_ref[...] = y_ref[...] + o_ref[...]

        return run

    digests = [digest_of(called(kernel(factor))) for factor in (1, 1, 2)]
    assert digests[0] == digests[1] != digests[2]


def test_an_optimizer_by_what_it_starts_from():
    """A rate that lies in its state is not in its update."""
    from jaxbrewer.step.optimizer import build
    from jaxbrewer.training.comparison.parts import probe_optimizer, trace_optimizer

    params = {"student": {"w": jnp.ones((3, 4))}, "projections": {}}
    found = []
    for rate in (0.1, 0.1, 0.2):
        optimizer = build(optax.inject_hyperparams(optax.sgd)(learning_rate=rate), {})
        traced, probe = trace_optimizer(optimizer, params), probe_optimizer(optimizer, params)
        found.append((traced["digest"], probe["student/w"]))
    assert found[0] == found[1]
    assert found[0][0] != found[2][0]
    np.testing.assert_allclose(2 * found[0][1], found[2][1], rtol=1e-6)


def test_the_random_keys_of_a_teacher_do_not_count():
    """It is in evaluation mode; its weights may have been loaded into a model of another seed."""
    model, twin, other = (nnx_job.Encoder(1, 4, seed=seed, dropout=0.1) for seed in (1, 2, 2))
    nnx.update(twin, nnx.state(model, nnx.Param))
    first, same, another = (
        records.weights_of((as_model(x).params, as_model(x).state)) for x in (model, twin, other)
    )
    assert first == same != another


def test_long_schedules_are_kept_by_some_of_their_rows():
    rows = np.ones((100_001, 3), np.float32)
    kept = records.with_schedule({}, rows, 100_000)["schedule"]
    assert len(kept["rows"]) == 256
    assert kept["rows"]["1"] == kept["rows"]["100000"] == [1, 1, 1]
    assert len(json.dumps(kept)) < 8_000


# -------------------------------------------------------------------------------------- the config


def test_the_config_names_what_may_differ(tmp_path):
    make = jaxbrewer.TrainingConfig
    for given in (
        {"teacher", "temperature"},
        ["temperature", "teacher"],
        ("teacher", "temperature"),
    ):
        config = make(resume_changes=given)
        assert config.resume_changes == ("teacher", "temperature")
        config.to_json_file(tmp_path / "config.json")
        assert make.from_json_file(tmp_path / "config.json") == config
    assert make(resume_changes="any").resume_changes == ("any",)
    assert "resume_changes" not in make().to_dict()
    with pytest.raises(ConfigError, match="did you mean 'temperature'"):
        make(resume_changes=["temprature"])
    for wrong in ("output_dir", "gradient_accumulation_steps", 1, [1], None, {"any": 1}):
        with pytest.raises(ConfigError, match="resume_changes is"):
            make(resume_changes=wrong)
