"""The compiled step: how often it compiles, what it does not compute, what it gives back."""

import copy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbrewer
from jaxbrewer.data.batches import own
from jaxbrewer.preflight import prepare
from tests import nnx_job

ROW = np.ones(3, np.float32)


def flops(distiller, batch):
    """FLOPs of the compiled step."""
    with distiller:
        program = prepare(distiller.job(), {"": own(batch)}, optax.sgd(0.1)).programs[""]
    state = jax.eval_shape(lambda: program.init(0))
    lowered = program.compiled.lower(state, program.teacher.variables, own(batch), ROW)
    return lowered.compile().cost_analysis()["flops"]


def job(folder, layers_T, matched, *, teacher_logits):
    """A teacher of `layers_T` wide layers, of which `matched` is used."""
    match = {
        "layer_T": matched,
        "layer_S": 1,
        "feature": "hidden",
        "loss": "hidden_mse",
        "weight": 1,
    }

    def adaptor_T(batch, outputs):
        results = nnx_job.adaptor(batch, outputs)
        return results if teacher_logits else {"hidden": results["hidden"]}

    return jaxbrewer.GeneralDistiller(
        jaxbrewer.TrainingConfig(output_dir=str(folder), device="cpu"),
        jaxbrewer.DistillationConfig(intermediate_matches=[match]),
        nnx_job.Encoder(layers_T, 64),
        nnx_job.Encoder(1, 64),
        adaptor_T,
        nnx_job.adaptor,
    )


@pytest.mark.filterwarnings("ignore::jaxbrewer.errors.PreflightWarning")
def test_teacher_layers_nobody_uses_cost_nothing(tmp_path):
    batch = nnx_job.loader(1, size=16, length=16)[0]
    small = flops(job(tmp_path, 2, 2, teacher_logits=False), batch)
    large = flops(job(tmp_path, 8, 2, teacher_logits=False), batch)
    used = flops(job(tmp_path, 8, 2, teacher_logits=True), batch)
    one_layer = 2 * 16 * 16 * 64 * 64
    assert large == small
    assert used > large + 5 * one_layer


def test_one_compile_for_each_shape_and_none_after_the_first_epoch(tmp_path):
    batches = nnx_job.loader(4) + nnx_job.loader(2, size=3, seed=1)
    compiles, after_epoch = nnx_job.Compiles(), []
    distiller = nnx_job.distiller(tmp_path, gradient_accumulation_steps=2)
    with distiller, compiles:
        distiller.train(
            nnx_job.SGD,
            batches,
            num_epochs=4,
            callback=lambda model, step: after_epoch.append(compiles.count),
        )
    first, *later = after_epoch
    assert len(set(later[1:])) == 1, later
    assert later[0] - first <= 2  # what the first callback itself needed

    steps = []
    program_step = jaxbrewer.step.Program.step

    def counted(self, *args):
        steps.append(1)  # runs while tracing only
        return program_step(self, *args)

    other = nnx_job.distiller(tmp_path / "b")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jaxbrewer.step.Program, "step", counted)
        with other:
            other.train(nnx_job.SGD, batches, num_epochs=3)
    assert len(steps) == 2


def test_the_state_is_donated_but_nothing_of_the_user(tmp_path):
    distiller = nnx_job.distiller(tmp_path)
    with distiller:
        program = prepare(distiller.job(), {"": own(nnx_job.loader(1)[0])}, nnx_job.SGD).programs[
            ""
        ]
    state = program.init(0)
    new, metrics = program.compiled(
        state, program.teacher.variables, own(nnx_job.loader(1)[0]), ROW
    )
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))
    assert int(new.micro_step) == 1
    assert metrics.shape == (3 + len(program.names),)
    assert nnx_job.weights(distiller.model_S) and nnx_job.weights(distiller.model_T)


def test_student_that_shares_arrays_with_its_teacher(tmp_path):
    teacher = nnx_job.Encoder(2, 4, seed=1)
    student = nnx_job.Encoder(2, 4, seed=2)
    nnx.update(student, jax.tree.map(lambda x: x, nnx.state(teacher, nnx.Param)))
    assert student.head.kernel[...] is teacher.head.kernel[...]
    before = copy.deepcopy(nnx_job.weights(teacher))
    distiller = jaxbrewer.BasicDistiller(
        jaxbrewer.TrainingConfig(output_dir=str(tmp_path), device="cpu"),
        jaxbrewer.DistillationConfig(hard_label_weight=1),
        teacher,
        student,
        nnx_job.adaptor,
        nnx_job.adaptor,
    )
    with distiller:
        distiller.train(nnx_job.SGD, nnx_job.loader(3), num_epochs=2)
    for name, value in nnx_job.weights(teacher).items():
        np.testing.assert_array_equal(value, before[name])
    assert (nnx_job.weights(student)["head.kernel"] != before["head.kernel"]).any()


def test_student_that_shares_variables_with_its_teacher_is_refused(tmp_path):
    teacher, student = nnx_job.Encoder(2, 4, seed=1), nnx_job.Encoder(2, 4, seed=2)
    student.embed = teacher.embed
    with pytest.raises(ValueError, match=r"share embed\.embedding.*nnx\.clone"):
        jaxbrewer.GeneralDistiller(
            jaxbrewer.TrainingConfig(output_dir=str(tmp_path), device="cpu"),
            jaxbrewer.DistillationConfig(),
            teacher,
            student,
            nnx_job.adaptor,
            nnx_job.adaptor,
        )


def test_schedule_is_a_traced_input(tmp_path):
    """Weights and rate come in as numbers: total = Σ weight · term, and the rate scales the update."""
    distiller = nnx_job.distiller(
        tmp_path, dropout=0.0, distillation={"kd_loss_weight_scheduler": "linear_decay"}
    )
    with distiller:
        program = prepare(distiller.job(), {"": own(nnx_job.loader(1)[0])}, nnx_job.SGD).programs[
            ""
        ]
    batch, step = own(nnx_job.loader(1)[0]), jax.jit(program.step)
    row = jnp.array([0.25, 0.5, 0.0])
    state, metrics = step(program.init(0), program.teacher.variables, batch, row)
    terms = dict(zip(program.names, metrics[3:], strict=True))
    expected = 0.25 * terms["unweighted_kd_loss"] + 0.5 * terms["unweighted_hard_label_loss"]
    expected += terms["unweighted_hidden_hidden_mse_0_0"] + terms["unweighted_hidden_nst_2-2_3-3"]
    np.testing.assert_allclose(metrics[0], expected, rtol=1e-6)
    for new, old in zip(
        jax.tree.leaves(state.params), jax.tree.leaves(program.init(0).params), strict=True
    ):
        np.testing.assert_array_equal(new, old)


def test_dropout_follows_the_step_and_the_seed(tmp_path):
    distiller = nnx_job.distiller(tmp_path, dropout=0.5)
    with distiller:
        program = prepare(distiller.job(), {"": own(nnx_job.loader(1)[0])}, nnx_job.SGD).programs[
            ""
        ]
    batch, step = own(nnx_job.loader(1)[0]), jax.jit(program.step)
    frozen = np.array([1, 1, 0], np.float32)

    def two(seed):
        state, first = step(program.init(seed), program.teacher.variables, batch, frozen)
        return float(first[0]), float(step(state, program.teacher.variables, batch, frozen)[1][0])

    assert two(0) == two(0)
    assert two(0)[0] != two(0)[1]
    assert two(0)[0] != two(1)[0]
