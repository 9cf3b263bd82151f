"""Numbers that are not finite: none reaches what training keeps, and the run goes on from before.

A number can be bad in the input, in the label, in what the teacher gives, or in the gradient alone.
"""

import functools
import itertools
import json
import logging
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jaxbrewer
from jaxbrewer.data.batches import own
from jaxbrewer.data.states import as_json, host_random
from jaxbrewer.errors import CheckpointError
from jaxbrewer.preflight import prepare
from jaxbrewer.step import guard, loss_scale
from jaxbrewer.step.program import rewound
from jaxbrewer.training import read_scalars
from jaxbrewer.training.checkpoints import Checkpoints
from jaxbrewer.training.folders import steps_in
from tests.formats.jobs import read

KINDS = ("input", "label", "teacher", "gradient")
ADAM = functools.partial(optax.adam, learning_rate=0.01, eps=1e-3)
ROWS, WIDTH = 4, 3


@pytest.fixture(scope="module", autouse=True)
def torch_is_there_from_the_first():
    """Its random state is saved once it is imported, which tensorboardX does where it can."""
    import tensorboardX  # noqa: F401


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """What is compared here does not depend on how well programs are optimized."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def student(params, state, x, label, slope, key, train):
    """A layer with noise and a running mean; where `slope` is 0, the loss has no gradient."""
    mean = 0.9 * state["mean"] + 0.1 * x.mean()
    hidden = jnp.tanh(x @ params["layer"] + 0.1 * jax.random.normal(key, (WIDTH,)))
    logits = hidden @ params["head"]
    added = 1e-3 * jnp.sqrt(jnp.sum((hidden * slope[:, None]) ** 2))
    loss = jnp.mean((logits.sum(-1) - label) ** 2) + mean
    return {"logits": logits, "loss": loss, "added": added}, {"mean": mean}


def numbers(seed, *shape):
    return np.random.RandomState(seed).uniform(-1, 1, shape).astype(np.float32)


def model():
    params = {"layer": numbers(1, WIDTH, WIDTH), "head": numbers(2, WIDTH, 2)}
    return jaxbrewer.FunctionModel(student, params, {"mean": jnp.zeros(())})


def distiller(folder, **config):
    return jaxbrewer.BasicDistiller(
        jaxbrewer.TrainingConfig(
            output_dir=str(folder / "out"), log_dir=str(folder / "log"), device="cpu", **config
        ),
        jaxbrewer.DistillationConfig(
            temperature=1, hard_label_weight=0.5, kd_loss_type="mse", kd_loss_weight=2
        ),
        jaxbrewer.FunctionModel(lambda params, x: x @ params["w"], {"w": numbers(3, WIDTH, 2)}),
        model(),
        lambda batch, outputs: {"logits": outputs},
        lambda batch, outputs: {
            "logits": outputs["logits"],
            "losses": (outputs["loss"], outputs["added"]),
        },
    )


def batches(count, bad=()):
    """Batches; `bad`: pairs of an index and a kind."""
    made = []
    for i in range(count):
        x = numbers(10 + i, ROWS, WIDTH)
        own = {"x": x, "label": numbers(90 + i, ROWS), "slope": np.ones(ROWS, np.float32)}
        made.append({"teacher": {"x": x.copy()}, "student": own})
    for i, kind in bad:
        if kind == "teacher":
            made[i]["teacher"]["x"][1, 1] = np.nan
        elif kind == "gradient":
            made[i]["student"]["slope"][:] = 0
        elif kind == "gradient of one device":
            made[i]["student"]["slope"][: ROWS // 2] = 0
        else:
            made[i]["student"]["x" if kind == "input" else kind].flat[1] = np.nan
    return made


def bits(tree):
    """Every leaf as numpy, random keys as their numbers."""

    def one(x):
        is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(x) if is_key else x)

    return jax.tree.map(one, tree)


def assert_same(found, wanted):
    jax.tree.map(np.testing.assert_array_equal, bits(found), bits(wanted))


# ------------------------------------------------------------------------------------- in the step


LEVELS = [
    ("O0", "bfloat16", 1),
    ("O0", "bfloat16", 2),
    ("O1", "bfloat16", 2),
    ("O2", "bfloat16", 1),
    ("O3", "bfloat16", 2),
    ("O1", "float16", 2),
    ("O2", "float16", 1),
    ("O3", "float16", 2),
]


def walk(program, data, state=None):
    """The states before each batch and after all, and the metrics."""
    state = program.init(3) if state is None else state
    step = jax.jit(program.step)
    states, rows = [state], []
    for batch in data:
        state, metrics = step(state, program.teacher.variables, own(batch), np.ones(3, np.float32))
        states.append(state)
        rows.append(np.asarray(metrics))
    assert step._cache_size() == 1
    return states, np.array(rows)


def program_of(folder, optimizer=ADAM, **config):
    mine = distiller(folder, **config)
    with mine:
        first = {"": own(batches(1)[0])}
        return prepare(mine.job(), first, optimizer, max_grad_norm=1.0).programs[""]


@pytest.mark.parametrize(("level", "half", "accumulation"), LEVELS)
def test_nothing_bad_is_kept_and_nothing_changes_after_it(tmp_path, level, half, accumulation):
    """First, middle and last of six batches, of every kind."""
    config = {"fp16": True, "fp16_opt_level": level, "half_dtype": half}
    program = program_of(tmp_path, gradient_accumulation_steps=accumulation, **config)
    scaled = program.precision.is_scaled
    step = jax.jit(program.step)
    start = program.init(3)
    if scaled:  # no overflow but ours
        start = replace(start, scaling=replace(start.scaling, scale=jnp.float32(8)))

    def run(data, state=start):
        states, verdicts = [state], []
        for batch in data:
            state, metrics = step(state, program.teacher.variables, own(batch), np.ones(3, "f"))
            states.append(state)
            verdicts.append(int(metrics[2]))
        return states, verdicts

    clean, verdicts = run(batches(6))
    assert verdicts == [guard.GOOD] * 6
    assert np.any(
        bits(clean[-1].params)["student"]["head"] != bits(start.params)["student"]["head"]
    )
    for kind, at in itertools.product(KINDS, (0, 3, 5)):
        states, verdicts = run(batches(6, [(at, kind)]))
        opens = at - at % accumulation
        if scaled:  # the window is dropped, and training goes on
            assert verdicts == [guard.GOOD] * 6
            assert states[-1].scaling.skipped == 1
            end = min(opens + accumulation, 6)
            assert_same(states[end].params, clean[opens].params)
            assert int(states[-1].micro_step) == 6
            continue
        assert verdicts == [guard.GOOD] * at + [guard.STOPPED] * (6 - at), (kind, at)
        for state in states[at + 1 :]:
            assert_same(replace(state, guard=()), replace(states[at], guard=()))
        assert_same(rewound(states[-1], opens), clean[opens])
    assert step._cache_size() == 1


def test_windows_are_dropped_until_there_are_too_many_in_a_row(tmp_path):
    """Two in a row stop; one does not, and two that are apart do not."""
    program = program_of(tmp_path, gradient_accumulation_steps=2, max_nonfinite_steps=2)
    bad = [(1, "gradient"), (4, "label"), (6, "input")]
    states, rows = walk(program, batches(10, bad))
    G, B, S = guard.GOOD, guard.BAD, guard.STOPPED
    assert rows[:, 2].tolist() == [G, B, G, G, B, G, S, S, S, S]
    for first, last in ((0, 2), (4, 6)):  # windows that were dropped
        assert_same(states[last].params, states[first].params)
        assert_same(states[last].opt_state.inner_opt_state, states[first].opt_state.inner_opt_state)
    assert int(states[4].opt_state.gradient_step) == 2  # and counted all the same
    assert int(states[6].guard.in_a_row) == 1
    assert_same(rewound(states[-1], 6), states[6])
    used, _ = walk(program, batches(4)[2:], states[2])
    assert_same(used[-1].params, states[4].params)

    never = replace(program, max_nonfinite_steps=None)
    states, rows = walk(never, batches(6, [(i, "label") for i in range(5)]))
    assert rows[:, 2].tolist() == [B] * 5 + [G]
    assert_same(states[-1].params, states[0].params)
    assert int(states[-1].guard.in_a_row) == 3
    assert np.isfinite(states[-1].model_state["student"]["mean"])


def test_an_update_that_is_not_finite_is_a_fault(tmp_path):
    """Also where there is a loss scale: Adam's eps is 0 in float16, and divides a gradient of 0."""
    half = {"fp16": True, "fp16_opt_level": "O3", "half_dtype": "float16"}
    bare = functools.partial(optax.adam, learning_rate=0.01, eps=1e-8)
    for config in (half, half | {"max_nonfinite_steps": None}):
        program = program_of(tmp_path, bare, **config)
        states, rows = walk(program, batches(2))
        wanted = guard.STOPPED if config == half else guard.BAD
        assert rows[:, 2].tolist() == [wanted] * 2
        assert np.isfinite(rows).all()
        assert_same(states[-1].params, states[0].params)
        assert_same(states[-1].opt_state, states[0].opt_state)
        assert int(states[-1].micro_step) == (0 if config == half else 2)
    mine = distiller(tmp_path, **half)
    with mine, pytest.raises(FloatingPointError, match=r"the optimizer's update of student/.* not"):
        mine.train(bare, batches(2), num_epochs=1)
    assert not steps_in(tmp_path / "out")


def test_large_numbers_are_finite():
    """A norm of them would not be."""
    grads = {"w": jnp.full((8,), 3e38), "b": jnp.zeros(())}
    assert guard.is_finite(grads)
    for value in (jnp.nan, jnp.inf, -jnp.inf):
        assert not guard.is_finite(grads | {"b": jnp.float32(value)})


def test_a_state_that_starts_at_infinity_may_stay_there():
    low = {"lowest": jnp.array([jnp.inf, 1.0]), "count": jnp.int32(0), "key": jax.random.key(0)}
    assert guard.stays_finite(low, low)
    assert not guard.stays_finite(low, low | {"lowest": jnp.array([jnp.inf, jnp.inf])})


# ------------------------------------------------------------------------------------ whole runs


class Shuffled(list):
    """Draws its order from numpy's global random state."""

    def __iter__(self):
        return iter([self[i] for i in np.random.permutation(len(self))])


PLACES = {
    "one device": {},
    "sharded": {"data_parallel": True, "sharding": "all"},
    "pmap": {"data_parallel": True, "mapping": "pmap"},
}


def train(folder, data, **config):
    """Trains two epochs from seeds of its own; returns the distiller and the error."""
    np.random.seed(4)
    mine, error = distiller(folder, **config), None
    with mine:
        try:
            mine.train(ADAM, Shuffled(data), num_epochs=2, max_grad_norm=1.0)
        except FloatingPointError as raised:
            error = raised
    return mine, error


def saved(folder, step):
    """What a checkpoint holds, but for what the run says of itself."""
    arrays, position = read(folder / "out" / f"gs{step}")
    itself = ("train_config", "digest")  # the folder's name is in it
    position = {k: v for k, v in position.items() if k not in itself}
    # A closed window is 0 or -0, to which the next gradient is added.
    digests = {k: v for k, v in position["digests"].items() if "acc_grads" not in k}
    return arrays, position | {"digests": digests}


@pytest.fixture
def two_devices(monkeypatch):
    """Devices of eight that a run is shared out over."""
    from jaxbrewer.machine import placement

    some = placement.resolve_devices
    monkeypatch.setattr(placement, "resolve_devices", lambda *args, **more: some(*args, **more)[:2])


ORDER = np.random.RandomState(4).permutation(6)  # of the first epoch


@pytest.mark.parametrize(
    ("place", "accumulation"), [("one device", 1), ("one device", 2), ("sharded", 1), ("pmap", 2)]
)
def test_a_run_stops_with_the_state_of_before_and_goes_on_from_it(
    tmp_path, two_devices, place, accumulation
):
    """What is saved is what a run on clean data saves at that step, bit for bit; and so is the end."""
    config = PLACES[place] | {"gradient_accumulation_steps": accumulation}
    clean = tmp_path / "clean"
    wanted, error = train(clean, batches(6), ckpt_frequency=accumulation + 1, **config)
    assert error is None
    at = 3
    step = at // accumulation
    kind = "gradient of one device" if place == "pmap" else "gradient"
    data = batches(6, [(ORDER[at], kind)])
    _, error = train(tmp_path / "bad", data, **config)
    text = str(error)
    assert f"at global step {step + 1} (micro-batch 3), batch 4 of epoch 1" in text
    assert "the gradient of unweighted_hard_label_loss is not finite in student/layer" in text
    assert f"The last good checkpoint is gs{step}" in text
    assert not getattr(error, "__notes__", None)
    assert steps_in(tmp_path / "bad" / "out") == [step]
    found, wanted_there = saved(tmp_path / "bad", step), saved(clean, step)
    assert found[0].keys() == wanted_there[0].keys()
    assert_same(*(dict(sorted(each[0].items())) for each in (found, wanted_there)))
    assert found[1] == wanted_there[1]
    assert set(read_scalars(tmp_path / "bad" / "log")["scalar/total_loss"]) == {0, 1, 2}

    again, error = train(tmp_path / "bad", batches(6), resume=True, **config)
    assert error is None
    assert_same(again.model_S.params, wanted.model_S.params)
    assert_same(again.model_S.state, wanted.model_S.state)


KD, HARD = "unweighted_kd_loss = nan", "unweighted_hard_label_loss = nan"


@pytest.mark.parametrize(
    ("at", "kept", "kind", "words"),
    [
        (0, [], "input", f"{KD}, {HARD}; the batch is not finite in student/x."),
        (5, [5], "label", f"{HARD}; the batch is not finite in student/label."),
        (6, [6], "teacher", f"{KD}; the batch is not finite in teacher/x; the teacher's results are "
         "not finite: logits/0."),
        (11, [6, 11], "label", f"{HARD}; the batch is not finite in student/label."),
    ],
    ids=["first", "before a save", "after a save", "last"],
)  # fmt: skip
def test_a_run_stops_wherever_it_is_and_says_where(tmp_path, at, kept, kind, words):
    """Also at the very last batch, and where the state of before is on disk already."""
    bad, calls, seen = batches(1, [(0, kind)])[0], itertools.count(), []
    mine = distiller(tmp_path)
    before = bits(mine.model_S.params)
    with mine, pytest.raises(FloatingPointError) as caught:
        mine.train(
            ADAM,
            batches(6),
            num_epochs=2,
            max_grad_norm=1.0,
            batch_postprocessor=lambda batch: bad if next(calls) == at else batch,
            callback=lambda model, step: seen.append(step),
        )
    where = f"global step {at + 1} (micro-batch {at}), batch {at % 6 + 1} of epoch {at // 6 + 1}"
    assert f"the loss is nan at {where}: {words}" in str(caught.value)
    assert steps_in(tmp_path / "out") == kept
    assert seen == [step for step in kept if step % 6 == 0]
    for step in kept:
        arrays, _ = saved(tmp_path, step)
        assert all(np.isfinite(x).all() for x in arrays.values() if x.dtype.kind == "f")
    if not kept:
        assert_same(mine.model_S.params, before)


def test_weights_that_a_finite_gradient_spoils_are_neither_saved_nor_handed_on(tmp_path):
    """At the last step no loss follows that would tell."""

    def rate(count):
        return jnp.where(count < 3, 0.01, jnp.nan)

    seen = []
    for count, text in {
        4: "after global step 4 student/head, student/layer are not finite",
        5: "weights were not finite before: student/head, student/layer",
    }.items():
        mine = distiller(tmp_path / str(count), ckpt_steps=3)
        with mine, pytest.raises(FloatingPointError, match=f"{text}.*last good checkpoint is gs3"):
            mine.train(
                optax.sgd(rate), batches(6), num_steps=count,
                callback=lambda model, step: seen.append(step),
            )  # fmt: skip
        assert steps_in(tmp_path / str(count) / "out") == [3]
    assert seen == [3, 3]
    mine = distiller(tmp_path / "own")  # a number that a model keeps so is its own affair
    mine.model_S.params["low"] = jnp.full((2,), -jnp.inf)
    with mine:
        mine.train(optax.sgd(0.1), batches(2), num_epochs=1)
    assert steps_in(tmp_path / "own" / "out") == [2]


def test_windows_that_a_run_may_lose(tmp_path, caplog):
    """Whose count is kept with a checkpoint, so that a resumed run stops where the whole one does."""
    caplog.set_level(logging.WARNING, "jaxbrewer")
    data = batches(6, [(1, "label"), (2, "gradient")])
    config = {"ckpt_steps": 2, "max_nonfinite_steps": 3}

    def run(steps, resume=False, **more):
        mine = distiller(tmp_path, resume=resume, **config | more)
        with mine:
            mine.train(ADAM, data, num_steps=steps)

    run(2)
    assert "global step 2 (micro-batch 1): its accumulation window is dropped" in caplog.text
    arrays, _ = saved(tmp_path, 2)
    assert arrays["training.guard.in_a_row"] == 1
    with pytest.raises(
        FloatingPointError, match=r"its gradient or update is not finite, at global step 3"
    ):
        run(4, resume=True, max_nonfinite_steps=2)
    run(4, resume=True)
    assert saved(tmp_path, 4)[0]["training.guard.in_a_row"] == 0
    run(6, resume=True, max_nonfinite_steps=1)  # a counter nobody asks for is read over
    assert "training.guard.in_a_row" not in saved(tmp_path, 6)[0]
    run(8, resume=True, max_nonfinite_steps=None)  # and one that is not there starts at 0
    assert saved(tmp_path, 8)[0]["training.guard.in_a_row"] == 1


def test_a_scale_that_no_overflow_explains_stops_the_state_too(tmp_path, monkeypatch):
    monkeypatch.setattr(loss_scale, "INITIAL", 2.0)
    half = {"fp16": True, "fp16_opt_level": "O2", "half_dtype": "float16"}
    data = batches(6, [(3, "label"), (4, "gradient")])
    mine = distiller(tmp_path, **half)
    with mine, pytest.raises(FloatingPointError) as caught:
        mine.train(ADAM, data, num_steps=6)
    text = str(caught.value)
    assert "the loss scale has fallen to 0.5 at global step 5 (micro-batch 4)" in text
    assert "The last good checkpoint is gs4" in text
    arrays, _ = saved(tmp_path, 4)
    assert arrays["training.scaling.scale"] == 1
    assert all(np.isfinite(x).all() for x in arrays.values() if x.dtype.kind == "f")
    again = distiller(tmp_path, resume=True, resume_changes=["data"], **half)
    with again:
        again.train(ADAM, batches(6), num_steps=6)
    assert steps_in(tmp_path / "out") == [4, 6]


# ----------------------------------------------------------------------------- what checkpoints hold


def position_at(step):
    """The JSON part of a checkpoint, without a run behind it."""
    here = {"epoch": 0, "batch": step}
    return here | {
        "global_step": step,
        "micro_step": step,
        "train_config": {"gradient_accumulation_steps": 1},
        "processes": [here | {"host_random": as_json(host_random())}],
    }


def test_a_plain_job_keeps_the_layout_it_had(tmp_path):
    mine = distiller(tmp_path)
    with mine:
        mine.train(ADAM, batches(2), num_epochs=1)
    arrays, _ = saved(tmp_path, 2)
    parts = {".".join(name.split(".")[:2]) for name in arrays}
    assert parts == {
        "student.params", "student.state", "training.opt_state", "training.key",
        "training.micro_step",
    }  # fmt: skip


def test_a_state_of_the_objectives_own_is_kept_by_name(tmp_path):
    state = program_of(tmp_path).init(0)
    rich = replace(state, objective={"queue": jnp.ones((2, 3)), "seen": {"count": jnp.int32(5)}})
    checkpoints = Checkpoints(tmp_path / "out", resume=True, max_to_keep=None)
    for step, each in ((1, state), (2, rich)):
        checkpoints.save(step, each, position_at(step))
    checkpoints.wait()
    gs = {step: tmp_path / "out" / f"gs{step}" for step in (1, 2)}
    zeros = replace(rich, objective=jax.tree.map(jnp.zeros_like, rich.objective))
    assert_same(checkpoints.restore(gs[2], zeros), rich)
    assert_same(checkpoints.restore(gs[1], zeros), zeros)  # older: starts as a new run does
    more = replace(zeros, objective=zeros.objective | {"more": jnp.full((2,), 7.0)})
    assert_same(
        checkpoints.restore(gs[2], more).objective, rich.objective | {"more": np.full(2, 7.0)}
    )
    with pytest.raises(CheckpointError, match="objective/queue: in the checkpoint only"):
        checkpoints.restore(gs[2], state)
    wrong = replace(rich, objective=rich.objective | {"queue": jnp.zeros((2, 4))})
    with pytest.raises(CheckpointError, match=r"objective/queue: saved as float32\[2, 3\]"):
        checkpoints.restore(gs[2], wrong)
    checkpoints.close()


def test_the_option_is_text_like_the_others():
    assert jaxbrewer.TrainingConfig().max_nonfinite_steps == 1
    for value in (1, 5, None):
        config = jaxbrewer.TrainingConfig(max_nonfinite_steps=value)
        text = json.dumps(config.to_dict())
        assert jaxbrewer.TrainingConfig.from_dict(json.loads(text)) == config
    for value in (0, -1, 1.5, True, "1"):
        with pytest.raises(ValueError, match="max_nonfinite_steps"):
            jaxbrewer.TrainingConfig(max_nonfinite_steps=value)
