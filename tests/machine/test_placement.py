import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec

import jaxbrewer
from jaxbrewer import TrainingConfig
from jaxbrewer.data.batches import own
from jaxbrewer.errors import BatchError, ConfigError
from jaxbrewer.machine.placement import OneDevice, Pmapped, Sharded, placement_for, rows_of
from jaxbrewer.preflight import prepare

from .. import fn_job, nnx_job
from ..devices import every

EIGHT = jax.devices("cpu")


def test_the_config_chooses():
    assert type(placement_for(TrainingConfig(device="cpu"))) is OneDevice
    eight = placement_for(TrainingConfig(device="cpu", data_parallel=True))
    assert type(eight) is Sharded
    assert eight.devices == tuple(EIGHT)
    pmapped = TrainingConfig(device="cpu", data_parallel=True, mapping="pmap")
    assert type(placement_for(pmapped)) is Pmapped


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"data_parallel": True, "local_rank": 0}, "expected one of them; with local_rank, all"),
        ({"mapping": "pmap"}, "mapping is 'pmap', which is for several devices: set data_parallel"),
        ({"sharding": "all"}, "sharding is 'all', which is for several devices: set data_parallel"),
        (
            {"sharding": "all", "mapping": "pmap", "data_parallel": True},
            "in which each device holds everything: expected mapping='sharded'",
        ),
        ({"mapping": "pmapped"}, "mapping is 'pmapped'"),
        (
            {"sharding": "optimizer"},
            "sharding is 'optimizer', which is for several devices: set data_parallel",
        ),
        ({"sharding": "student"}, "sharding is 'student'"),
    ],
)
def test_configs_that_cannot_be_meant(options, message):
    with pytest.raises(ConfigError, match=message):
        TrainingConfig(**options)


def test_devices_that_are_not_there():
    with pytest.raises(ValueError, match=r"there is no device 'cpu:8' here; there are: cpu:0"):
        placement_for(TrainingConfig(device="cpu:8"))
    with pytest.raises(ValueError, match="there is no device 'tpu' here; there are: cpu:0"):
        placement_for(TrainingConfig(device="tpu", data_parallel=True))
    with pytest.raises(ValueError, match=r"'cpu:3' names one device, and data_parallel .* use all"):
        placement_for(TrainingConfig(device="cpu:3", data_parallel=True))
    with pytest.raises(ValueError, match=r"local_rank=0 means several processes.*initialize"):
        placement_for(TrainingConfig(device="cpu", local_rank=0))


def test_one_rule_cuts_the_longest_axis_that_divides():
    def spec(shape, cut=True, dtype=jnp.float32):
        leaf = jax.ShapeDtypeStruct(shape, dtype)
        return Sharded(EIGHT).shardings(leaf, cut=cut).spec

    whole = PartitionSpec()
    assert spec((64, 128)) == PartitionSpec(None, "data")
    assert spec((128, 64)) == PartitionSpec("data")
    assert spec((30522, 768)) == PartitionSpec(None, "data")  # rows do not divide by 8
    assert spec((30522, 767)) == whole
    assert spec((8,)) == whole  # too small to be worth it
    assert spec((64, 128), cut=False) == whole
    assert spec((1024,), dtype=jax.random.key(0).dtype) == whole


@pytest.mark.parametrize(("sharding", "parts"), [("teacher", (8, 1)), ("all", (8, 8))])
def test_what_is_cut_into_pieces(sharding, parts):
    """The teacher can be cut while the student is whole; the optimizer's state goes with it."""
    placement = Sharded(EIGHT, sharding)
    kernel = jnp.ones((64, 64))
    for tree, count in zip((placement.teacher({"kernel": kernel}),), parts, strict=False):
        held = {shard.data.shape for shard in tree["kernel"].addressable_shards}
        assert held == {(64 // count, 64)}

    class Adam:
        variables = ({"kernel": kernel}, {})

        @staticmethod
        def init(seed, variables=None):
            made = Adam.variables if variables is None else variables
            return {"params": made[0], "mu": jax.tree.map(jnp.zeros_like, made[0])}

    state = placement.start(Adam, 0)
    for name in ("params", "mu"):
        held = {shard.data.shape for shard in state[name]["kernel"].addressable_shards}
        assert held == {(64 // parts[1], 64)}
    assert isinstance(placement.local(state)["mu"]["kernel"], np.ndarray | jax.Array)


def pieces(tree):
    """What lies on a device of each kernel of 32 × 32 in a tree."""
    held = {
        x.addressable_shards[0].data.shape for x in jax.tree.leaves(tree) if x.shape == (32, 32)
    }
    (shape,) = held
    return shape


def test_the_optimizers_state_may_be_cut_alone(tmp_path):
    """Of a window too, and after a step as before it; the weights and the teacher are whole."""
    distiller = every.JOBS["basic"](every.config(tmp_path, gradient_accumulation_steps=2))
    batch = own(every.batches(1)[0])
    with distiller:
        adam = functools.partial(optax.adam, learning_rate=1e-3)
        program = prepare(distiller.job(), {"": batch}, adam).programs[""]
    placement = Sharded(EIGHT, "optimizer")
    teacher = placement.teacher(program.teacher.variables)
    assert all(x.is_fully_replicated for x in jax.tree.leaves(teacher))
    state = placement.start(program, 0)
    step = placement.compile(program)
    for _ in range(2):
        assert pieces(state.opt_state.acc_grads) == (4, 32)
        assert pieces(state.opt_state.inner_opt_state) == (4, 32)
        assert pieces(state.params) == (32, 32)
        state, _ = step(state, teacher, placement.batch(batch), program.row, ())


@pytest.mark.parametrize(("level", "sent"), [("O1", "f32"), ("O2", "bf16")])
def test_what_is_brought_together_is_sent_in_the_type_it_is_used_in(tmp_path, level, sent):
    """Gradients go in the type of the weights."""
    config = every.config(tmp_path, fp16=True, fp16_opt_level=level, half_dtype="bfloat16")
    distiller = every.JOBS["basic"](config)
    batch = own(every.batches(1)[0])
    with distiller:
        adam = functools.partial(optax.adam, learning_rate=1e-3)
        program = prepare(distiller.job(), {"": batch}, adam).programs[""]
    lowered = Sharded(EIGHT, "all").lower(program, batch).as_text()
    found = re.findall(r"sharding_constraint .*<@mesh, (.*)> : tensor<32x32x(\w+)>", lowered)
    assert found == [("[{}, {}]", sent), ('[{"data"}, {}]', "f32")]  # the student's kernel


def test_rows_are_what_most_inputs_have():
    assert rows_of({"a": np.ones((4, 3)), "b": np.ones(4), "positions": np.ones((1, 3))}) == 4
    assert rows_of({"a": np.ones((4, 3)), "weights": np.ones(9), "b": np.ones((4, 2))}) == 4
    assert rows_of({"flag": 1.0}) == 1


@pytest.mark.parametrize("mapping", ["sharded", "pmap"])
def test_inputs_that_all_rows_share_stay_whole(mapping, tmp_path):
    """Positions ``[1, length]``, for instance."""

    def encode(params, ids, scale):
        return {"logits": (params["embed"][ids] * scale).mean(1)}

    def train(folder, **options):
        made = [
            jaxbrewer.FunctionModel(encode, {"embed": jax.random.normal(jax.random.key(i), (5, 3))})
            for i in range(2)
        ]
        distiller = fn_job.distiller(
            folder, teacher=made[0], student=made[1], keys=("logits",), **options
        )
        batch = {"ids": np.arange(16).reshape(8, 2) % 5, "scale": np.array([[[0.5], [2.0]]])}
        with distiller:
            distiller.train(fn_job.SGD, [batch] * 3, num_epochs=1)
        return np.asarray(made[1].params["embed"])

    found = train(tmp_path / "eight", data_parallel=True, mapping=mapping)
    np.testing.assert_allclose(found, train(tmp_path / "one"), rtol=1e-5)


def test_a_batch_smaller_than_the_mesh(tmp_path):
    distiller = nnx_job.distiller(tmp_path, log=False, data_parallel=True)
    with distiller, pytest.raises(BatchError, match="the first batch has 4 rows for 8 devices"):
        distiller.train(nnx_job.SGD, nnx_job.loader(2, size=4), num_epochs=1)
    assert not (tmp_path / "out").exists()


def test_only_a_last_batch_may_be_smaller(tmp_path):
    distiller = nnx_job.distiller(tmp_path, log=False, data_parallel=True)
    with distiller:
        distiller.train(
            nnx_job.SGD, nnx_job.loader(1, size=8) + nnx_job.loader(1, size=3), num_epochs=1
        )


@pytest.mark.parametrize("mapping", ["sharded", "pmap"])
def test_masks_that_differ_on_one_device_are_seen(mapping, tmp_path):
    batches = fn_job.batches(2, size=8)
    batches[1]["mask"][5, :] = 0

    def keep(batch, outputs):
        return {"logits": outputs["tokens"], "logits_mask": jnp.ones_like(batch["mask"])}

    distiller = fn_job.distiller(
        tmp_path,
        keys_T=keep,
        keys_S=fn_job.adaptor("logits_mask", logits=fn_job.tokens),
        data_parallel=True,
        mapping=mapping,
    )
    with distiller, pytest.raises(BatchError, match="micro-batch 0 the teacher's logits_mask"):
        distiller.train(fn_job.SGD, batches, num_epochs=1)


def test_a_trainer_has_no_teacher_to_cut(tmp_path):
    config = TrainingConfig(
        output_dir=tmp_path, device="cpu", data_parallel=True, sharding="teacher"
    )
    trainer = jaxbrewer.BasicTrainer(config, nnx_job.Encoder(1, 8), nnx_job.adaptor)
    with trainer, pytest.raises(ValueError, match="BasicTrainer has no teacher"):
        trainer.train(nnx_job.SGD, nnx_job.loader(1, size=8), num_epochs=1)
