import functools

import jax
import optax
import pytest

import jaxbrewer
from jaxbrewer.machine.placement import Sharded
from jaxbrewer.testing import assert_invariant

from . import nnx_job
from .devices import every

PADDING = {"input_ids": 0, "attention_mask": 0}


@pytest.mark.parametrize("name", ["general", "tasks"])
def test_distillers_are_invariant(name, tmp_path):
    distiller = every.JOBS[name](every.config(tmp_path))
    with distiller:
        assert_invariant(
            distiller,
            every.batches(1)[0],
            devices=(1, 2, 8) if name == "general" else (8,),
            padding=PADDING,
            task="a" if name == "tasks" else "",
        )


def test_accumulation_of_micro_batches_that_select_equally_many(tmp_path):
    distiller = every.JOBS["general"](every.config(tmp_path))
    batch = every.batches(1)[0]
    batch["attention_mask"][:] = 1
    assert_invariant(distiller, batch, devices=(), sharding=False, accumulation=4)
    batch["attention_mask"][:4, 1:] = 0
    with pytest.raises(AssertionError, match=r"in 4 accumulated micro-batches(.*\n)*.*hidden_mse"):
        assert_invariant(distiller, batch, devices=(), sharding=False, accumulation=4)


def test_exact_accumulation_of_micro_batches_that_select_unevenly(tmp_path):
    def adaptor(batch, outputs):
        each = optax.softmax_cross_entropy_with_integer_labels(outputs["logits"], batch["labels"])
        return nnx_job.adaptor(batch, outputs) | {"losses": each}

    config = every.config(tmp_path, gradient_accumulation_steps=4, gradient_accumulation="exact")
    distiller = jaxbrewer.GeneralDistiller(
        config,
        every.distillation(intermediate_matches=every.HIDDEN),
        every.teacher(),
        every.student(),
        adaptor,
        adaptor,
    )
    batch = every.batches(1)[0]
    batch["attention_mask"][:4, 1:] = 0
    assert_invariant(distiller, batch, devices=(), sharding=False, accumulation=4)


def test_what_depends_on_padding_is_named(tmp_path):
    class Mean(nnx_job.Encoder):
        def __call__(self, input_ids, attention_mask=None, labels=None):
            logits = self.head(self.embed(input_ids).mean(1))
            return {"logits": logits}

    distiller = jaxbrewer.BasicDistiller(
        every.config(tmp_path),
        jaxbrewer.DistillationConfig(),
        Mean(1, 8),
        Mean(1, 8, seed=1),
        lambda batch, outputs: outputs,
        lambda batch, outputs: outputs,
    )
    batch = every.batches(1)[0]
    check = functools.partial(assert_invariant, distiller, batch, devices=(1, 2))
    check()
    with pytest.raises(AssertionError, match=r"with padding .*\n.*the total") as caught:
        check(padding=PADDING)
    assert "unweighted_kd_loss" in str(caught.value)
    assert "gradient of student/head.kernel" in str(caught.value)


def test_what_depends_on_the_devices_is_named(tmp_path, monkeypatch):
    distiller = every.JOBS["basic"](every.config(tmp_path))
    batch = every.batches(1)[0]
    whole = Sharded.batch

    def first_half(self, batch):
        rows = len(batch["labels"]) // (2 if len(self.devices) == 8 else 1)
        return whole(self, jax.tree.map(lambda x: x[:rows], batch))

    monkeypatch.setattr(Sharded, "batch", first_half)
    with pytest.raises(AssertionError, match="on 8 devices, the step differs by more than 1e-05"):
        assert_invariant(distiller, batch)


def test_mistakes(tmp_path):
    distiller = every.JOBS["basic"](every.config(tmp_path))
    batch = every.batches(1)[0]
    with pytest.raises(ValueError, match=r"devices=\(1, 9\), but there are 8 here.*num_cpu_devi"):
        assert_invariant(distiller, batch, devices=(1, 9))
    with pytest.raises(ValueError, match=r"padding names \['ids'\], and the batch has"):
        assert_invariant(distiller, batch, devices=(), sharding=False, padding={"ids": 0})
    with pytest.raises(ValueError, match="the batch has 16 rows, not a multiple"):
        assert_invariant(distiller, batch, devices=(), sharding=False, accumulation=3)
