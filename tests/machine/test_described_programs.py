"""A small BERT's step on TPUs and H100s that are not there: it compiles, and takes what it should.

Where libtpu is installed (the extra ``tpu``), some combinations of devices, sharding and precision are
compiled for TPUs, so that every pair of values but for O3 is in one. All of them, on H100s too where
JAX's CUDA plugin is (the extra ``cuda12``), and on virtual CPU devices::

    python -m pytest -n 0 tests/machine/test_described_programs.py --every-combination

`mapping="pmap"` cannot be compiled for devices that are not there, and float16 is refused on a TPU.
"""

import functools
import importlib.util
import itertools
import os
import re
import warnings
from typing import NamedTuple

import jax
import numpy as np
import optax
import pytest
from flax import nnx

from jaxbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from jaxbrewer.machine.compiled import account_of
from jaxbrewer.machine.described import described
from jaxbrewer.machine.placement import placement_on
from jaxbrewer.preflight import prepare
from jaxbrewer.zoo import BertConfig, BertForSequenceClassification

VOCABULARY, ROWS, LENGTH = 1024, 16, 32
BATCH = {
    "input_ids": np.ones((ROWS, LENGTH), np.int32),
    "attention_mask": np.ones((ROWS, LENGTH), np.int32),
    "labels": np.zeros(ROWS, np.int32),
}
DEVICES = {
    "tpu": {1: "tpu:v5e:1x1", 4: "tpu:v5e:2x2", 8: "tpu:v5e:2x4"},
    "gpu": {1: "gpu:h100:1", 4: "gpu:h100:4", 8: "gpu:h100:8"},
    "cpu": {1: "cpu:1", 4: "cpu:4", 8: "cpu:8"},
}
LEVELS = ("O1", "O2", "O3")
SHARDINGS = (None, "teacher", "optimizer", "all")
KIB = 1024

# MiB of scratch memory that the step may take on a device, by how many there are. On a GPU 4 are what cuBLAS
# works in; on a CPU halves are emulated by copies in float32, of which one device has all.
SCRATCH = {"tpu": {1: 16, 4: 16, 8: 16}, "gpu": {1: 16, 4: 16, 8: 16}, "cpu": {1: 16, 4: 12, 8: 8}}


class Case(NamedTuple):
    kind: str
    devices: int
    sharding: str | None
    precision: tuple[str, str] | None  # level and half type


def combinations(kind):
    """All that the configs allow: one device has nothing to cut."""
    halves = ["bfloat16"] if kind == "tpu" else ["bfloat16", "float16"]
    precisions = [None, *itertools.product(LEVELS, halves)]
    return [
        Case(kind, devices, sharding, precision)
        for devices in DEVICES[kind]
        for sharding in ([None] if devices == 1 else SHARDINGS)
        for precision in precisions
    ]


def pairwise(cases):
    """Few of the cases, which hold every pair of values that all of them hold."""

    def pairs(case):
        return {*itertools.combinations(enumerate(case), 2)}

    missing, chosen = set().union(*map(pairs, cases)), []
    while missing:
        chosen.append(max(cases, key=lambda case: len(missing & pairs(case))))
        missing -= pairs(chosen[-1])
    return chosen


def marks(kind):
    """Why the cases of a kind cannot run here."""
    if kind == "tpu":
        is_shared = "PYTEST_XDIST_WORKER" in os.environ
        return [
            pytest.mark.skipif(
                importlib.util.find_spec("libtpu") is None,
                reason="libtpu is not installed: pip install 'jaxbrewer[tpu]'",
            ),
            pytest.mark.skipif(
                is_shared, reason="libtpu serves one process: pytest -n 0 THIS_FILE"
            ),
        ]
    if kind == "gpu":
        return [
            pytest.mark.skipif(
                importlib.util.find_spec("jax_cuda12_plugin") is None,
                reason="JAX's CUDA plugin is not installed: pip install 'jaxbrewer[cuda12]'",
            )
        ]
    return []


def pytest_generate_tests(metafunc):
    if "step" not in metafunc.fixturenames:
        return
    few = [case for case in combinations("tpu") if case.precision != ("O3", "bfloat16")]
    cases = [*pairwise(few), Case("cpu", 8, "all", ("O2", "bfloat16"))]
    if metafunc.config.getoption("--every-combination"):
        cases = [case for kind in DEVICES for case in combinations(kind)]
    parameters = [
        pytest.param(
            case,
            marks=marks(case.kind),
            id="-".join(
                [
                    DEVICES[case.kind][case.devices],
                    case.sharding or "whole",
                    *(case.precision or ("O0",)),
                ]
            ),
        )
        for case in cases
    ]
    metafunc.parametrize("step", parameters, indirect=True, scope="module")


@functools.cache
def bert(hidden_size, heads, seed):
    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_heads=heads,
        intermediate_size=2 * hidden_size,
        max_position_embeddings=LENGTH,
        output_hidden_states=True,
    )
    return BertForSequenceClassification(config, rngs=nnx.Rngs(seed))


def adaptor(batch, outputs):
    return {
        "logits": outputs.logits,
        "hidden": outputs.hidden_states,
        "losses": outputs.loss,
        "inputs_mask": batch["attention_mask"],
    }


class Step(NamedTuple):
    """A compiled step.

    ``state``, ``optimizer`` (a part of it) and ``teacher`` are bytes, whole; ``teacher_wide`` and
    ``gradients`` those of the teacher and of all trained weights, were they float32.
    """

    case: Case
    account: object
    lowered: str
    text: str
    leaves: int
    state: int
    optimizer: int
    teacher: int
    teacher_wide: int
    gradients: int


def size(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


@pytest.fixture(scope="module")
def step(request, tmp_path_factory):
    case = request.param
    place = described(DEVICES[case.kind][case.devices])
    options = {}
    if case.devices > 1:
        options = {"data_parallel": True, "sharding": case.sharding}
    if case.precision is not None:
        level, half = case.precision
        options |= {"fp16": True, "fp16_opt_level": level, "half_dtype": half}
    match = {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1.0}
    distiller = GeneralDistiller(
        TrainingConfig(output_dir=tmp_path_factory.mktemp("out"), device="cpu", **options),
        DistillationConfig(
            temperature=4,
            hard_label_weight=1.0,
            intermediate_matches=[match | {"proj": ["linear", 128, 256]}],
        ),
        bert(256, 4, 0),
        bert(128, 2, 1),
        adaptor,
        adaptor,
    )
    optimizer = functools.partial(optax.adamw, learning_rate=1e-3)
    with distiller, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of float16 on a CPU, where the models lie
        job = distiller.job()
        program = prepare(job, {"": BATCH}, optimizer, device=place.devices[0]).programs[""]
    lowered = placement_on(place.devices, distiller.t_config).lower(program, BATCH)
    compiled = lowered.compile(compiler_options=dict(place.options))
    state = jax.eval_shape(lambda: program.init(0))
    arrays = [
        x for x in jax.tree.leaves(state) if not jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    return Step(
        case,
        account_of(compiled),
        lowered.as_text(),
        compiled.as_text(),
        len(jax.tree.leaves(state)),
        size(arrays),
        size(state.opt_state),
        size(program.teacher.variables),
        sum(4 * x.size for x in jax.tree.leaves(program.teacher.variables)),
        sum(4 * x.size for x in jax.tree.leaves(state.params)),
    )


def test_what_is_donated_comes_out(step):
    """Every array of the state is updated in place; beside it come the metrics, and a table of places."""
    account, count = step.account, step.leaves
    assert step.text.partition("\n")[0].count("-alias)") == count
    assert 0 < account.outputs - account.donated <= KIB + 8 * (count + 1)


def test_a_device_holds_its_part_and_no_more(step):
    case = step.case
    cut = {
        None: 0,
        "teacher": step.teacher,
        "optimizer": step.optimizer,
        "all": step.teacher + step.state,
    }[case.sharding]
    held = step.teacher + step.state - cut * (1 - 1 / case.devices)
    assert 0.95 * held < step.account.arguments < 1.1 * held + 64 * KIB


def test_scratch_memory_is_bounded(step):
    bound = SCRATCH[step.case.kind][step.case.devices]
    assert 0 < step.account.temporaries < bound * 1024 * KIB


def test_what_is_sent_is_bounded(step):
    """Gradients once, what is cut once, and of activations no more than one array of them."""
    case, sent = step.case, step.account.collectives
    if case.devices == 1:
        assert sent == {}
        return
    sizes = {kind: size for kind, (_, size) in sent.items()}
    activations = 4 * ROWS * LENGTH * 256
    # A CPU turns halves to float32 before it sends them.
    teacher = step.teacher_wide if case.kind == "cpu" else step.teacher
    cut = {
        None: 0,
        "teacher": teacher,
        "optimizer": step.gradients,
        "all": teacher + step.gradients,
    }[case.sharding]
    assert sizes.pop("all-gather", 0) <= 1.1 * cut + activations
    summed = sizes.pop("all-reduce", 0) + case.devices * sizes.pop("reduce-scatter", 0)
    assert 0.2 * step.gradients < summed <= 1.1 * step.gradients + activations
    assert sum(sizes.values()) <= activations


def test_products_are_half_where_asked(step):
    """As lowered: compilers rewrite them. On a CPU halves are emulated, in float32."""
    products = re.findall(r"dot_general.*?: \((.*?)\) ->", step.lowered)
    assert len(products) > 40
    wide = [operands for operands in products if "f32" in operands]
    is_half = step.case.precision is not None and step.case.kind != "cpu"
    assert wide == ([] if is_half else products)
