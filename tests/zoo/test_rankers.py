"""Scores of candidates equal those of one pair, and of one vector, after another."""

import functools

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from jaxbrewer import DistillationConfig, FunctionModel, GeneralDistiller, TrainingConfig, zoo
from jaxbrewer.data import bucket_by_length
from jaxbrewer.zoo import BiEncoder, CrossEncoder, SentenceConfig, SentenceEncoder

SHAPE = {
    "vocab_size": 30,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 8,
}
RNG = np.random.default_rng(0)
IDS = RNG.integers(1, 30, (2, 3, 5))
MASK = np.array([[[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]] * 2)
QUERY = {
    "query_input_ids": RNG.integers(1, 30, (2, 4)),
    "query_attention_mask": np.array([[1, 1, 1, 1], [1, 1, 0, 0]]),
}


def encoder_of(seed=0, **settings):
    encoder = zoo.BertModel(zoo.BertConfig(**SHAPE), rngs=nnx.Rngs(seed))
    model = SentenceEncoder(encoder, SentenceConfig(**settings))
    model.eval()
    return model


def classifier_of(num_labels=1):
    config = zoo.BertConfig(**SHAPE, num_labels=num_labels)
    model = zoo.BertForSequenceClassification(config, rngs=nnx.Rngs(0))
    model.eval()
    return model


def test_a_cross_encoder_scores_each_pair():
    types = np.where(np.arange(5) > 1, 1, 0) * np.ones_like(IDS)
    inputs = {"input_ids": IDS, "attention_mask": MASK, "token_type_ids": types}
    alone = classifier_of()
    scores = CrossEncoder(alone)(**inputs).logits
    assert scores.shape == (2, 3)
    pairs = {name: np.concatenate([*array]) for name, array in inputs.items()}
    wanted = np.asarray(alone(**pairs).logits)  # of query 0's candidates, then of query 1's
    for i, j in np.ndindex(2, 3):
        np.testing.assert_allclose(scores[i, j], wanted[3 * i + j, 0], atol=1e-6)
    apart = {name: tuple(np.moveaxis(array, 1, 0)) for name, array in inputs.items()}
    np.testing.assert_array_equal(CrossEncoder(alone)(**apart).logits, scores)


@pytest.mark.parametrize("similarity", ["dot", "cosine"])
def test_a_bi_encoder_compares_vectors(similarity):
    encoder = encoder_of()
    model = BiEncoder(encoder, similarity=similarity, scale=3)
    scores = model(**QUERY, input_ids=IDS, attention_mask=MASK).logits
    queries = np.asarray(encoder(*QUERY.values()).embedding)
    texts = np.asarray(encoder(np.concatenate([*IDS]), np.concatenate([*MASK])).embedding)
    for i, j in np.ndindex(2, 3):
        one = texts[3 * i + j]
        wanted = queries[i] @ one
        if similarity == "cosine":
            wanted /= np.linalg.norm(queries[i]) * np.linalg.norm(one)
        np.testing.assert_allclose(scores[i, j], 3 * wanted, rtol=1e-5)
    apart = {"input_ids": tuple(np.moveaxis(IDS, 1, 0)), "attention_mask": [*MASK.swapaxes(0, 1)]}
    np.testing.assert_array_equal(model(**QUERY, **apart).logits, scores)


def test_stored_scores_teach_a_bi_encoder(tmp_path):
    def example(i):
        lengths = RNG.integers(2, 7, 3)
        return {
            "teacher": {"scores": np.array([2.0, -1.0, i % 2], np.float32)},
            "student": {
                "query_input_ids": RNG.integers(1, 30, 4),
                "input_ids": tuple(RNG.integers(1, 30, n) for n in lengths),
                "attention_mask": tuple(np.ones(n, np.int32) for n in lengths),
            },
        }

    student = BiEncoder(encoder_of())
    loader = bucket_by_length([example(i) for i in range(8)], 4, buckets=(8,))
    before = np.asarray(student.encoder.encoder.embeddings.word_embeddings.embedding[...])
    distiller = GeneralDistiller(
        TrainingConfig(
            output_dir=str(tmp_path / "out"), log_dir=str(tmp_path / "log"), device="cpu"
        ),
        DistillationConfig(temperature=1, kd_loss_type="listwise_kl"),
        FunctionModel(lambda params, scores: scores, {}),
        student,
        lambda batch, outputs: {"logits": outputs},
        zoo.adaptor("ranking"),
    )
    with distiller:
        distiller.train(functools.partial(optax.sgd, learning_rate=0.1), loader, num_epochs=1)
    after = np.asarray(student.encoder.encoder.embeddings.word_embeddings.embedding[...])
    assert np.isfinite(after).all() and (after != before).any()


def test_the_adaptor_hands_on_scores_alone():
    batch = {**QUERY, "input_ids": IDS, "attention_mask": MASK}
    found = zoo.adaptor("ranking")(batch, BiEncoder(encoder_of())(**batch))
    assert set(found) == {"logits"} and found["logits"].shape == (2, 3)


def test_refusals():
    with pytest.raises(ValueError, match="num_labels=2, and a pair has one score"):
        CrossEncoder(classifier_of(2))
    with pytest.raises(TypeError, match="model is a SentenceEncoder: give a classifier"):
        CrossEncoder(encoder_of())
    with pytest.raises(TypeError, match="encoder is a BertModel: give a SentenceEncoder"):
        BiEncoder(encoder_of().encoder)
    with pytest.raises(ValueError, match="similarity='cosin': did you mean 'cosine'"):
        BiEncoder(encoder_of(), similarity="cosin")
    for scale in (0, -1.0, float("nan"), float("inf"), True, "1"):
        with pytest.raises(ValueError, match=r"scale=.*expected a finite number above 0"):
            BiEncoder(encoder_of(), scale=scale)
    model = BiEncoder(encoder_of())
    with pytest.raises(ValueError, match=r"input_ids is \[2, 5\], expected \[batch, candidates"):
        model(**QUERY, input_ids=IDS[:, 0])
    with pytest.raises(ValueError, match=r"attention_mask is \[2, 1, 5\], and input_ids \[2, 3"):
        model(**QUERY, input_ids=IDS, attention_mask=MASK[:, :1])
    with pytest.raises(ValueError, match="holds 2 queries, and input_ids the candidates of 1"):
        model(**QUERY, input_ids=jnp.asarray(IDS[:1]))
