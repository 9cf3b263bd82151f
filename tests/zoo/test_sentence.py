"""Sentence encoders: the vectors themselves. Their folders are tested in test_sentence_files.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo
from jaxbrewer.zoo import DenseConfig, SentenceConfig, SentenceEncoder
from jaxbrewer.zoo.sentence import normalized, pooled
from jaxbrewer.zoo.sentence_files import DENSE_ACTIVATIONS, POOLINGS

from .conftest import FAMILIES, TINY, close, make_batch, make_torch, to_torch

MASKS = np.array([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [0, 1, 0, 1, 1], [0, 0, 0, 0, 0]])
HIDDEN = np.random.default_rng(0).normal(size=(4, 5, 3))


def encoder_of(family, **changes):
    if family == "BiGRU":
        config = zoo.BiGRUConfig(vocab_size=50, embedding_size=8, hidden_size=12)
    else:
        config = getattr(zoo, f"{family}Config")(**FAMILIES[family])
    return getattr(zoo, f"{family}Model")(config.replace(**changes), rngs=nnx.Rngs(0))


def batch_for(family):
    batch = make_batch(family="DistilBert" if family == "BiGRU" else family)
    return {key: value for key, value in batch.items() if key != "token_type_ids"}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_equals_numpy_and_looks_at_visible_tokens_only(pooling):
    got = pooled(jnp.asarray(HIDDEN), jnp.asarray(MASKS), pooling)
    for row, states, mask in zip(np.asarray(got), HIDDEN, MASKS, strict=True):
        tokens = states[mask == 1]
        if not len(tokens):
            wanted = states[0] if pooling == "cls" else np.zeros(3)
        else:
            wanted = {"mean": tokens.mean(0), "cls": tokens[0], "max": tokens.max(0)}[pooling]
        np.testing.assert_allclose(row, wanted, atol=1e-6)
    spoilt = np.where(MASKS[..., None] == 1, HIDDEN, np.nan)
    np.testing.assert_array_equal(
        pooled(jnp.asarray(spoilt), jnp.asarray(MASKS), pooling)[:3], got[:3]
    )


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_are_finite_where_a_sentence_is_all_padding(pooling, dtype):
    def loss(hidden):
        return jnp.sum(normalized(pooled(hidden, jnp.asarray(MASKS), pooling)) * weights)

    weights = jnp.asarray(np.random.default_rng(1).normal(size=(4, 3)), dtype)
    gradient = np.asarray(jax.grad(loss)(jnp.asarray(HIDDEN, dtype)), np.float32)
    assert np.isfinite(gradient).all() and gradient[0].any()
    seen = MASKS == 1
    if pooling == "cls":
        seen[3, 0] = True  # the first position, for want of a token
    assert not gradient[~seen].any()


def test_a_zero_vector_stays_zero_with_torchs_gradient():
    zero = jnp.zeros((1, 3))
    np.testing.assert_array_equal(normalized(zero), zero)
    gradient = jax.grad(lambda x: jnp.sum(normalized(x)))(zero)
    np.testing.assert_allclose(gradient, 1e12, rtol=1e-6)


@pytest.mark.torch
def test_normalized_equals_torchs_with_its_gradient(x64):
    import torch

    x = np.random.default_rng(0).normal(size=(4, 3)) * [[1e-13], [1e-11], [1.0], [0.0]]
    weights = np.random.default_rng(1).normal(size=(4, 3))
    theirs = torch.tensor(x, requires_grad=True)
    wanted = torch.nn.functional.normalize(theirs, dim=-1)
    (wanted * torch.tensor(weights)).sum().backward()
    close(normalized(jnp.asarray(x)), wanted, 1e-12)
    gradient = jax.grad(lambda x: jnp.sum(normalized(x) * weights))(jnp.asarray(x))
    close(gradient, theirs.grad, 1e-12)


@pytest.mark.torch
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_pools_as_sentence_transformers(family, tmp_path):
    from sentence_transformers.sentence_transformer.modules import Pooling

    theirs = make_torch(f"{family}Model")
    theirs.save_pretrained(tmp_path)
    encoder = zoo.from_pretrained(tmp_path)
    batch = make_batch(family=family)
    states = theirs(**to_torch(batch)).last_hidden_state
    for pooling in POOLINGS:
        features = {"token_embeddings": states, **to_torch(batch)}
        wanted = Pooling(24, pooling)(features)["sentence_embedding"]
        model = SentenceEncoder(encoder, SentenceConfig(pooling=pooling))
        close(model(**batch).embedding, wanted, 1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("name", DENSE_ACTIVATIONS)
def test_dense_layers_equal_sentence_transformers(name, x64):
    import torch
    from sentence_transformers.sentence_transformer.modules import Dense

    from jaxbrewer.zoo.sentence import Dense as Ours

    activation = DENSE_ACTIVATIONS[name].rpartition(".")[2]
    theirs = Dense(5, 4, activation_function=getattr(torch.nn, activation)()).double()
    ours = Ours(
        DenseConfig(width=4, activation=name), 5, 0.02, param_dtype=jnp.float64, rngs=nnx.Rngs(0)
    )
    ours.linear.kernel[...] = jnp.asarray(theirs.linear.weight.detach().numpy().T)
    ours.linear.bias[...] = jnp.asarray(theirs.linear.bias.detach().numpy())
    x = np.random.default_rng(0).normal(size=(3, 5))
    wanted = theirs({"sentence_embedding": torch.tensor(x)})["sentence_embedding"]
    close(ours(jnp.asarray(x)), wanted, 1e-9)


@pytest.mark.parametrize("family", [*FAMILIES, "BiGRU"])
def test_outputs_are_those_of_the_encoder_and_the_embedding(family):
    encoder = encoder_of(family, output_hidden_states=True)
    dense = (DenseConfig(width=7), DenseConfig(width=5, activation="identity", bias=False))
    model = SentenceEncoder(encoder, SentenceConfig(dense=dense, normalize=True), rngs=nnx.Rngs(1))
    model.eval()
    batch = batch_for(family)
    asked = {} if family == "BiGRU" else {"output_attentions": True}
    out, alone = model(**batch, **asked), encoder(**batch, **asked)
    assert out[0] is out.embedding and out.embedding.shape == (3, 5)
    np.testing.assert_allclose(jnp.linalg.norm(out.embedding, axis=-1), 1, rtol=1e-6)
    names = ["embedding", "last_hidden_state", "hidden_states", *(["attentions"] if asked else [])]
    assert out.keys() == names
    for name in names[1:]:
        for ours, theirs in zip(out[name], alone[name], strict=True):
            np.testing.assert_array_equal(ours, theirs)
    assert model(**batch, return_dict=False)[0].shape == (3, 5)
    assert model.id_limits == encoder.id_limits and model.base_model is encoder
    assert model.dense[1].linear.bias is None


def test_it_computes_in_the_type_asked_for():
    config = zoo.BertConfig(**{**TINY, "num_hidden_layers": 1})
    build = {"dtype": jnp.bfloat16, "rngs": nnx.Rngs(0)}
    dense = SentenceConfig(dense=(DenseConfig(width=4),), normalize=True)
    model = SentenceEncoder(zoo.BertModel(config, **build), dense, **build)
    assert model(**make_batch()).embedding.dtype == jnp.bfloat16
    assert model.dense[0].linear.kernel[...].dtype == jnp.float32


def test_a_student_starts_from_its_teachers_layers_and_dense_ones():
    sentence = SentenceConfig(
        pooling="cls", dense=(DenseConfig(width=6),), prompts={"query": "q: "}
    )
    teacher = SentenceEncoder(encoder_of("Bert"), sentence, rngs=nnx.Rngs(1))
    smaller = zoo.BertModel(teacher.config.replace(num_hidden_layers=2), rngs=nnx.Rngs(2))
    student = SentenceEncoder(smaller, teacher.sentence, rngs=nnx.Rngs(3))
    zoo.init_from_layers(student, teacher, [0, 2])
    assert student.sentence.prompts == {"query": "q: "}
    for ours, theirs in (
        (student.dense[0].linear.kernel, teacher.dense[0].linear.kernel),
        (
            student.encoder.encoder.layer[1].output.kernel,
            teacher.encoder.encoder.layer[2].output.kernel,
        ),
    ):
        np.testing.assert_array_equal(ours[...], theirs[...])
    every = zoo.BertModel(teacher.config, rngs=nnx.Rngs(2))
    same = zoo.init_from_layers(SentenceEncoder(every, sentence), teacher, [0, 1, 2])
    for model in (same, teacher):
        model.eval()
    batch = make_batch()
    np.testing.assert_array_equal(same(**batch).embedding, teacher(**batch).embedding)


def test_it_can_be_jitted_and_keeps_its_config_hashable():
    model = SentenceEncoder(
        encoder_of("Bert"), SentenceConfig(prompts={"a": "b"}, kept={"f": {"g": [1]}})
    )
    model.eval()
    batch = make_batch()
    fast = nnx.jit(lambda model, batch: model(**batch))(model, batch)
    np.testing.assert_allclose(fast.embedding, model(**batch).embedding, atol=1e-6)
    assert hash(model.sentence) == hash(model.sentence.replace(pooling="mean"))


def test_refusals():
    headed = zoo.BertForSequenceClassification(zoo.BertConfig(**TINY), rngs=nnx.Rngs(0))
    with pytest.raises(
        TypeError, match="BertForSequenceClassification: give its base_model, a model"
    ):
        SentenceEncoder(headed)
    with pytest.raises(TypeError, match=r"encoder is a Linear: give a model of jaxbrewer\.zoo"):
        SentenceEncoder(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))
    model = SentenceEncoder(encoder_of("Bert"))
    batch = make_batch()
    with pytest.raises(ValueError, match=r"attention_mask is \[3, 9, 9\], expected \[3, 9\]"):
        model(batch["input_ids"], np.ones((3, 9, 9)))
    with pytest.raises(TypeError, match="token_type_ids"):
        SentenceEncoder(encoder_of("DistilBert"))(**batch)
    for wrong, message in (
        ({"pooling": "lasttoken"}, "pooling is 'lasttoken'"),
        ({"dense": [7]}, "dense is .*expected a tuple of DenseConfig"),
        ({"prompts": {"query": 1}}, "prompts is .*expected texts by name"),
        (
            {"default_prompt_name": "q", "prompts": {"query": ""}},
            "'q' is not in prompts, which has 'query'",
        ),
        ({"max_seq_length": 0}, "max_seq_length is 0"),
    ):
        with pytest.raises(ValueError, match=message):
            SentenceConfig(**wrong)
    with pytest.raises(ValueError, match="activation is 'swiglu'"):
        DenseConfig(width=3, activation="swiglu")
    with pytest.raises(ValueError, match="did you mean 'normalize'"):
        SentenceConfig().replace(normalise=True)
