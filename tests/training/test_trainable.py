"""A student of which a part is trained: the rest keeps its bits, and costs neither moments nor gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jaxbrewer
from jaxbrewer import zoo
from jaxbrewer.data.batches import own
from jaxbrewer.errors import CheckpointError, PreflightError
from jaxbrewer.models.handle import leaf_names
from jaxbrewer.preflight.prepare import prepare
from tests import fn_job, nnx_job
from tests.devices import every

ADAM = functools.partial(optax.adamw, learning_rate=0.02, weight_decay=0.1)
BITS = pytest.mark.filterwarnings("ignore:train\\(\\) outside")


@pytest.fixture(scope="module", autouse=True)
def compiled_quickly():
    """What is compared here does not depend on how well programs are optimized."""
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


def arrays(model):
    """Name → numpy array, of a module or a function."""
    if isinstance(model, nnx.Module):
        return nnx_job.weights(model)
    leaves = jax.tree.leaves(model.params)
    return {name: np.array(x) for name, x in zip(leaf_names(model.params), leaves, strict=True)}


def changed(before, after):
    """The names of the arrays whose bits have changed."""
    return {name for name in before if (before[name] != after[name]).any()}


CONFIG = {
    "hard_label_weight": 0.5,
    "intermediate_matches": [fn_job.match(2, 2, proj=["linear", 5, 5])],
}


def make(folder, student=None, **options):
    """A distiller of functions, their parameters ``embed``, ``layers.0``, ``layers.1``, ``head``."""
    keys = ("logits", "hidden", "losses")
    return fn_job.distiller(folder, config=CONFIG, keys=keys, student=student, **options)


def nnx_make(folder, student=None, **options):
    """A distiller of NNX encoders that compares logits alone: less to compile."""
    bare = {"intermediate_matches": []}
    return nnx_job.distiller(folder, log=False, student=student, distillation=bare, **options)


def train(distiller, *, optimizer=ADAM, **options):
    """Trains three batches; returns the names of what has changed."""
    is_nnx = isinstance(distiller.model_S, nnx.Module)
    loader = nnx_job.loader(3, size=8) if is_nnx else fn_job.batches(3, 8)
    before = arrays(distiller.model_S)
    with distiller:
        distiller.train(optimizer, loader, **({"num_epochs": 1} | options))
    return changed(before, arrays(distiller.model_S))


def program_of(distiller, batch, optimizer=ADAM, task="", **options):
    with distiller:
        return prepare(distiller.job(**options), {task: own(batch)}, optimizer).programs[task]


def flops_of(program, batch):
    """Of a step as it is traced, before XLA leaves out what nothing depends on."""
    state, frozen = program.parted(jax.eval_shape(lambda: program.init(0)))
    arguments = state, program.teacher.variables, own(batch), np.ones(3, np.float32), frozen
    return program.compiled.lower(*arguments).cost_analysis()["flops"]


HEAD = {"head.bias", "head.kernel"}
WAYS = {
    "one device": {},
    "sharded": {"data_parallel": True},
    "pmap": {"data_parallel": True, "mapping": "pmap"},
    "cut into pieces": {"data_parallel": True, "sharding": "all"},
    "O2, accumulated": {"fp16": True, "half_dtype": "float16", "gradient_accumulation_steps": 3},
    "O3": {"fp16": True, "fp16_opt_level": "O3"},
}


@pytest.mark.parametrize("way", WAYS)
def test_what_is_frozen_keeps_its_bits(way, tmp_path):
    """Weight decay and clipping do not touch it; callbacks and checkpoints hold the student whole."""
    distiller = make(tmp_path, **WAYS[way])
    projection, before = nnx_job.weights(distiller.projs[0]), arrays(distiller.model_S)
    seen = []

    def callback(model, step):
        seen.append(changed(before, arrays(model)))

    found = train(distiller, trainable=["head", "*.1"], callback=callback, max_grad_norm=0.5)
    assert found == seen[-1] == {"head", "layers.1"}
    assert changed(projection, nnx_job.weights(distiller.projs[0]))
    saved = jaxbrewer.load_student(tmp_path / "out", fn_job.encoder(9))
    assert not changed(arrays(distiller.model_S), arrays(saved))


@pytest.mark.parametrize("kind", ["tasks", "emd"])
def test_every_distiller_trains_a_part(kind, tmp_path):
    distiller = every.JOBS[kind](every.config(tmp_path))
    before = nnx_job.weights(distiller.model_S)
    every.train(distiller, every.batches(2), trainable="head")
    assert changed(before, nnx_job.weights(distiller.model_S)) == HEAD


def test_with_a_cached_teacher(tmp_path):
    distiller = fn_job.distiller(tmp_path, config={"is_caching_logits": True})
    assert train(distiller, trainable="layers") == {"layers.0", "layers.1"}


def test_the_numbers_are_those_of_gradients_that_are_zeroed(tmp_path):
    """The oracle: all is trained, and the frozen leaves' gradients and updates are 0."""

    def without(learning_rate):
        def update(updates, state, params=None):
            if "embed" in updates:
                updates = {**updates, "embed": jnp.zeros_like(updates["embed"])}
            return updates, state

        still = optax.GradientTransformation(lambda params: (), update)
        return optax.chain(still, optax.adam(learning_rate))

    ours, oracle = make(tmp_path / "ours"), make(tmp_path / "oracle")
    train(
        ours,
        optimizer=functools.partial(optax.adam, learning_rate=0.02),
        trainable=["head", "layers"],
    )
    train(oracle, optimizer=functools.partial(without, learning_rate=0.02))
    other = arrays(oracle.model_S)
    for name, array in arrays(ours.model_S).items():
        np.testing.assert_allclose(array, other[name], atol=1e-6, err_msg=name)


def test_only_what_is_trained_has_moments_gradients_and_is_donated(tmp_path):
    distiller = nnx_make(tmp_path, gradient_accumulation_steps=2)
    batch = nnx_job.loader(1)[0]
    program = program_of(distiller, batch, trainable="head")
    whole = program.init(0)
    state, frozen = program.parted(whole)
    opt_state = state.opt_state
    assert set(opt_state.acc_grads["student"]) == HEAD
    assert set(opt_state.inner_opt_state["student"][0].mu) == HEAD
    assert set(state.params["student"]) == HEAD
    assert set(frozen) == set(whole.params["student"]) - HEAD
    after, _ = program.compiled(
        state, program.teacher.variables, own(batch), np.ones(3, np.float32), frozen
    )
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params["student"]))
    assert not any(x.is_deleted() for x in jax.tree.leaves(frozen))
    joined = program.joined(after, frozen).params["student"]
    assert all(joined[name] is frozen[name] for name in frozen)


def test_the_step_costs_less(tmp_path):
    """Gradients are computed down to the lowest trained layer only, and products for it alone."""
    batch = nnx_job.loader(1, size=16)[0]

    def flops(**options):
        student = nnx_job.Encoder(4, 64, seed=2)
        config = jaxbrewer.TrainingConfig(output_dir=tmp_path, device="cpu")
        trainer = jaxbrewer.BasicTrainer(config, student, nnx_job.adaptor)
        return flops_of(program_of(trainer, batch, **options), batch)

    whole, embeddings_frozen, last = (
        flops(),
        flops(trainable=["layers", "head"]),
        flops(trainable="head"),
    )
    products = 16 * 5 * 64 * 64 * 2
    assert whole > embeddings_frozen + 0.9 * products  # the gradient of the first layer's inputs
    assert embeddings_frozen > last + 6.9 * products


def stop(model, step):
    return jaxbrewer.CallbackResult(stop=step == 3)


def test_a_resumed_run_ends_with_the_same_bits(tmp_path):
    options = {"trainable": "layers", "num_epochs": 2}
    whole, cut = make(tmp_path / "whole"), tmp_path / "cut"
    train(whole, **options)
    train(make(cut), **options, callback=stop)
    again = make(cut, resume=True)
    train(again, **options)
    assert not changed(arrays(whole.model_S), arrays(again.model_S))
    assert not changed(nnx_job.weights(whole.projs[0]), nnx_job.weights(again.projs[0]))
    finished = make(cut, resume=True, student=fn_job.encoder(9))
    train(finished, **options)  # nothing is left to train: the whole student comes back
    assert not changed(arrays(whole.model_S), arrays(finished.model_S))


def test_another_part_is_another_job(tmp_path, caplog):
    was, now = None, ["head"]
    both = {"num_epochs": 2}
    train(make(tmp_path), trainable=was, **both, callback=stop)
    with pytest.raises(CheckpointError) as caught:
        train(make(tmp_path, resume=True), trainable=now, **both)
    message = "  - trainable: was all parameters, is 1 parameters, among them head"
    assert message in str(caught.value)
    assert "say so: TrainingConfig(resume_changes=['trainable'])" in str(caught.value)
    saved = jaxbrewer.load_student(tmp_path / "out", fn_job.encoder(9))
    again = make(tmp_path, resume=True, resume_changes=["trainable"])
    train(again, trainable=now, **both)
    assert "resume_changes allows: trainable: was" in caplog.text
    assert "the functions of student and optimizer (trainable has changed)" in caplog.text
    assert changed(arrays(saved), arrays(again.model_S)) == set(now)
    caplog.clear()
    train(make(tmp_path, resume=True), trainable=now, **both)  # its checkpoints are of the new job
    assert "allows" not in caplog.text


def test_what_is_trained_on_keeps_its_moments(tmp_path):
    """Where another part is trained, what was trained before has its moments; others start at 0."""
    kept = []

    def momentum(learning_rate, told=False):
        inner = optax.sgd(learning_rate, momentum=0.9)

        def update(updates, state, params=None):
            if told and "head" in updates and updates["head"].shape == (5, 3):
                jax.debug.callback(kept.append, state[0].trace)
            return inner.update(updates, state, params)

        return optax.GradientTransformation(inner.init, update)

    first = functools.partial(momentum, learning_rate=0.1)
    train(make(tmp_path), optimizer=first, trainable="layers", num_epochs=2, callback=stop)
    saved = jaxbrewer.load_student(tmp_path / "out", fn_job.encoder(9))
    second = functools.partial(momentum, learning_rate=0.1, told=True)
    options = {"optimizer": second, "trainable": ["layers.1", "head"], "num_epochs": 2}
    message = r"was 2 parameters, among them layers\.0, is 2 parameters, among them head"
    with pytest.raises(CheckpointError, match=message):
        train(make(tmp_path, resume=True), **options)
    again = make(tmp_path, resume=True, resume_changes=["trainable"])
    train(again, **options)
    assert changed(arrays(saved), arrays(again.model_S)) == {"layers.1", "head"}
    jax.effects_barrier()
    assert set(kept[0]) == {"layers.1", "head"}
    assert not np.any(kept[0]["head"])
    assert np.any(kept[0]["layers.1"])


class Normed(nnx_job.Encoder):
    """With batch statistics behind its embeddings and before its head."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        rngs = nnx.Rngs(3)
        self.low, self.high = nnx.BatchNorm(4, rngs=rngs), nnx.BatchNorm(4, rngs=rngs)
        self.embed = nnx.Sequential(self.embed, self.low)
        self.head = nnx.Sequential(self.high, self.head)


def test_batch_statistics_of_what_is_frozen_stand_still(tmp_path):
    student = Normed(2, 4, seed=2)
    distiller = nnx_make(tmp_path, student)
    low, high = np.array(student.low.mean[...]), np.array(student.high.mean[...])
    assert train(distiller, trainable="high") == {"head.layers.0.bias", "head.layers.0.scale"}
    np.testing.assert_array_equal(student.low.mean[...], low)
    assert (student.high.mean[...] != high).any()


@BITS
def test_numbers_that_cannot_be_trained_may_be_frozen(tmp_path):
    """A quantized table among a function's parameters, which has another structure than a dict."""
    table = np.arange(fn_job.VOCABULARY * 5, dtype=np.int8).reshape(-1, 5) % 7

    def apply(params, ids, mask=None, labels=None):
        (table, scale), head = params
        x = table[ids] * scale
        return {"logits": x[:, 0] @ head}

    student = jaxbrewer.FunctionModel(
        apply, ((table, np.float32(0.1)), np.eye(5, 3, dtype=np.float32))
    )
    with pytest.raises(PreflightError, match=r"0\.0 \(int8\) among its parameters is not floating"):
        fn_job.distiller(tmp_path / "all", student=student).train(
            fn_job.SGD, fn_job.batches(2), num_epochs=1
        )
    distiller = fn_job.distiller(tmp_path, student=student)
    distiller.train(ADAM, fn_job.batches(2), num_epochs=1, trainable=["1"])
    (after, scale), head = student.params
    np.testing.assert_array_equal(after, table)
    assert after.dtype == np.int8
    assert scale == np.float32(0.1)
    assert (np.asarray(head) != np.eye(5, 3)).any()


def test_half_a_model_stays_half(tmp_path):
    """Masters are made of what is trained only; what is frozen is not widened."""
    student = nnx_job.Encoder(2, 4, seed=2)
    student.embed.embedding = nnx.Param(student.embed.embedding[...].astype(jnp.bfloat16))
    student.head.kernel = nnx.Param(student.head.kernel[...].astype(jnp.bfloat16))
    distiller = nnx_make(tmp_path, student, fp16=True)
    program = program_of(distiller, nnx_job.loader(1)[0], trainable="head")
    state, frozen = program.parted(program.init(0))
    assert {x.dtype for x in state.params["student"].values()} == {jnp.dtype("float32")}
    assert frozen["embed.embedding"].dtype == jnp.bfloat16
    assert frozen["layers.0.kernel"].dtype == jnp.float32
    assert train(distiller, trainable="head") == HEAD
    assert student.head.kernel[...].dtype == jnp.bfloat16


def test_projections_alone_may_be_trained_and_nothing_may_not(tmp_path):
    distiller = make(tmp_path / "a")
    projection = nnx_job.weights(distiller.projs[0])
    assert train(distiller, trainable=[], max_grad_norm=1.0) == set()
    assert changed(projection, nnx_job.weights(distiller.projs[0]))
    bare = fn_job.distiller(tmp_path / "b")
    with pytest.raises(
        PreflightError, match="leaves nothing of the student to train, and there is"
    ):
        train(bare, trainable=[])
    assert not (tmp_path / "b" / "out").exists()


def test_a_mask_of_all_parameters_is_refused(tmp_path):
    mask = jax.tree.map(lambda x: x.ndim > 1, fn_job.encoder(2).params)
    optimizer = functools.partial(ADAM, mask=mask)
    with pytest.raises(PreflightError, match="make them by a function, as mask="):
        train(fn_job.distiller(tmp_path), optimizer=optimizer, trainable="head")
    optimizer = functools.partial(ADAM, mask=jaxbrewer.decay_mask)
    assert train(fn_job.distiller(tmp_path), optimizer=optimizer, trainable="head") == {"head"}


def test_what_no_loss_depends_on_is_refused(tmp_path):
    """A head where hidden states are matched: nothing would be trained."""
    keys = {
        "keys": ("logits", "hidden"),
        "config": {**CONFIG, "kd_loss_weight": 0, "hard_label_weight": 0},
    }
    with pytest.raises(
        PreflightError, match=r"no loss depends on what trainable='head' finds: head\."
    ):
        train(fn_job.distiller(tmp_path, **keys), trainable="head")
    distiller = fn_job.distiller(tmp_path, **keys)
    assert train(distiller, optimizer=nnx_job.SGD, trainable=["head", "embed"]) == {"embed"}


def test_a_pattern_that_finds_nothing_is_refused_with_the_rest(tmp_path):
    distiller = nnx_make(tmp_path)
    loader = [{**batch, "lables": 0} for batch in nnx_job.loader(2)]
    with distiller, pytest.raises(PreflightError) as caught:
        distiller.train(ADAM, loader, num_epochs=1, trainable=["layers.7", "haed"])
    text = str(caught.value)
    assert "trainable='layers.7' finds no parameter of model_S; below 'layers': choose from" in text
    assert "trainable='haed' finds no parameter of model_S; did you mean 'head'?" in text
    assert "the batch has 'lables', which model_S does not take" in text


def test_check_says_what_is_trained(tmp_path, capsys):
    distiller = nnx_make(tmp_path)
    distiller.check(nnx_job.loader(1)[0], ADAM, trainable="head")
    assert "  trained              15 parameters in 2 of 7 arrays" in capsys.readouterr().out


def test_weights_that_are_frozen_and_not_finite_are_named(tmp_path):
    student = nnx_job.Encoder(2, 4, seed=2)
    student.layers[0].bias[...] = jnp.nan
    distiller = nnx_make(tmp_path, student)
    with pytest.raises(
        FloatingPointError, match=r"weights were not finite before: student/layers\.0"
    ):
        train(distiller, trainable="head")


# ------------------------------------------------------------------------------------------ LoRA


def with_lora(module, rank=2, seed=5):
    """`nnx.LoRA` around every linear layer of a list, as `docs/any_model.md` shows it."""
    rngs = nnx.Rngs(seed)
    for i, base in enumerate(module.layers):
        module.layers[i] = nnx.LoRA(
            base.in_features, rank, base.out_features, base_module=base, rngs=rngs
        )
    return module


def adapted(width=4):
    """An encoder with both kinds of LoRA layers."""
    student = with_lora(nnx_job.Encoder(1, width, seed=2))
    student.head = nnx.LoRALinear(width, 3, lora_rank=2, rngs=nnx.Rngs(6))
    return student


LORA = {f"{module}.lora_{part}" for module in ("layers.0", "head.lora") for part in "ab"}


def test_lora_trains_what_it_adds_alone(tmp_path):
    """Frozen arrays keep their bits, and a run that was cut ends with those of the whole one."""
    options = {"trainable": nnx.LoRAParam, "num_epochs": 2, "max_grad_norm": 1.0}
    whole = nnx_make(tmp_path / "whole", adapted())
    assert train(whole, **options) == LORA
    cut = tmp_path / "cut"
    train(nnx_make(cut, adapted()), **options, callback=stop)
    again = nnx_make(cut, adapted(), resume=True)
    train(again, **options)
    assert not changed(arrays(whole.model_S), arrays(again.model_S))


def test_lora_has_moments_of_what_it_adds_alone_and_costs_less(tmp_path):
    batch = nnx_job.loader(1, size=16)[0]
    config = jaxbrewer.TrainingConfig(output_dir=tmp_path, device="cpu")

    def program(**options):
        trainer = jaxbrewer.BasicTrainer(config, adapted(64), nnx_job.adaptor)
        return program_of(trainer, batch, **options)

    lora, whole = program(trainable=nnx.LoRAParam), program()
    state, frozen = lora.parted(jax.eval_shape(lambda: lora.init(0)))
    assert set(state.opt_state["student"][0].mu) == LORA
    assert {*frozen} == {*whole.student.model.params} - LORA
    flops = [flops_of(one, batch) for one in (lora, whole)]
    assert flops[0] < flops[1] - 0.9 * 2 * 16 * 5 * 64 * 64  # the gradient of the layer's kernel


def test_lora_is_merged_into_a_model_of_the_zoo(tmp_path):
    """As `docs/any_model.md` shows it: the model is of the zoo again, and gives the same numbers."""
    config = zoo.BertConfig(
        vocab_size=20,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        max_position_embeddings=8,
        num_labels=3,
    )
    student = zoo.BertForSequenceClassification(config, rngs=nnx.Rngs(0))
    attentions = [layer.attention for layer in student.bert.encoder.layer]
    rngs = nnx.Rngs(1)
    for attention in attentions:
        base = attention.query
        attention.query = nnx.LoRA(
            base.in_features, 2, base.out_features, base_module=base, rngs=rngs
        )
        attention.query.lora_b[...] += 0.1  # as training would
    batch = nnx_job.loader(1)[0]
    student.eval()
    run = nnx.jit(lambda model: model(**batch).logits)
    before = run(student)
    with pytest.raises(
        ValueError, match=r"attention\.query\.lora_b, for which a Hugging Face folder"
    ):
        student.save_pretrained(tmp_path / "folder")
    for attention in attentions:
        lora = attention.query
        lora.base_module.kernel[...] += lora.lora_a[...] @ lora.lora_b[...]
        attention.query = lora.base_module
    np.testing.assert_allclose(run(student), before, atol=1e-5)
    student.save_pretrained(tmp_path / "folder")
    read = zoo.BertForSequenceClassification.from_pretrained(tmp_path / "folder")
    assert not changed(arrays(student), arrays(read))
