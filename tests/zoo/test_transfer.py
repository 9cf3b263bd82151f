"""A student started from its teacher's layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo
from jaxbrewer.zoo import BertConfig, init_from_layers

from .conftest import FAMILIES, TINY


@pytest.fixture
def config():
    return BertConfig(**TINY, num_labels=3)


@pytest.fixture
def teacher(config):
    return zoo.BertForSequenceClassification(config, rngs=nnx.Rngs(0))


def student_of(config, cls=zoo.BertForSequenceClassification, **changes):
    return cls(config.replace(num_hidden_layers=2, **changes), rngs=nnx.Rngs(1))


def same(ours, theirs):
    pairs = zip(
        jax.tree.leaves(nnx.state(ours, nnx.Param)),
        jax.tree.leaves(nnx.state(theirs, nnx.Param)),
        strict=True,
    )
    return all(np.array_equal(a, b) for a, b in pairs)


def test_chosen_layers_are_copied(config, teacher):
    student = student_of(config)
    assert init_from_layers(student, teacher, [0, 2]) is student
    assert same(student.bert.encoder.layer[0], teacher.bert.encoder.layer[0])
    assert same(student.bert.encoder.layer[1], teacher.bert.encoder.layer[2])
    assert same(student.bert.embeddings, teacher.bert.embeddings)
    assert same(student.bert.pooler, teacher.bert.pooler)
    assert same(student.classifier, teacher.classifier)


def test_parts_can_be_left_out(config, teacher):
    student = init_from_layers(student_of(config), teacher, (1, 1), embeddings=False, head=False)
    assert same(student.bert.encoder.layer[1], teacher.bert.encoder.layer[1])
    assert not same(student.bert.embeddings, teacher.bert.embeddings)
    assert not same(student.classifier, teacher.classifier)


def test_the_copies_are_the_students_own(config, teacher):
    student = init_from_layers(student_of(config), teacher, [0, 1])
    for leaf in jax.tree.leaves(nnx.state(student, nnx.Param)):
        leaf.delete()
    teacher.eval()
    assert np.isfinite(teacher(np.ones((3, 9), np.int32)).logits).all()


def test_the_students_dtype_is_kept(config, teacher):
    small = config.replace(num_hidden_layers=2)
    student = zoo.BertForSequenceClassification(small, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(1))
    init_from_layers(student, teacher, [0, 1])
    leaves = jax.tree.leaves(nnx.state(student, nnx.Param))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_array_equal(
        student.classifier.kernel[...], teacher.classifier.kernel[...].astype(jnp.bfloat16)
    )


def test_heads_that_differ(config, teacher):
    other = student_of(config, num_labels=5)
    before = np.asarray(other.classifier.kernel[...])
    init_from_layers(other, teacher, [0, 1])
    np.testing.assert_array_equal(other.classifier.kernel[...], before)
    with pytest.raises(ValueError, match=r"classifier, kernel: \(24, 5\) in the student"):
        init_from_layers(other, teacher, [0, 1], head=True)
    encoder = student_of(config, zoo.BertModel)
    init_from_layers(encoder, teacher, [0, 1])
    assert same(encoder.encoder.layer[0], teacher.bert.encoder.layer[0])
    with pytest.raises(ValueError, match="do not have the same head"):
        init_from_layers(encoder, teacher, [0, 1], head=True)


def test_refusals(config, teacher):
    with pytest.raises(ValueError, match=r"layers \[3\] are not in the teacher, which has 0 to 2"):
        init_from_layers(student_of(config), teacher, [0, 3])
    with pytest.raises(ValueError, match="names 3 layers, but the student has 2"):
        init_from_layers(student_of(config), teacher, [0, 1, 2])
    narrow = student_of(config, hidden_size=12)
    before = np.asarray(narrow.bert.embeddings.norm.scale[...])
    with pytest.raises(ValueError, match=r"query\.kernel: \(12, 12\) in the student, \(24, 24\)"):
        init_from_layers(narrow, teacher, [0, 1])
    np.testing.assert_array_equal(narrow.bert.embeddings.norm.scale[...], before)


@pytest.mark.parametrize(
    "family", ["Roberta", "Electra", "DistilBert", "MPNet", "ModernBert", "DebertaV2", "Deberta"]
)
def test_every_transformer_can_be_cut(family):
    config = getattr(zoo, f"{family}Config")(**FAMILIES[family])
    short = config.replace(**{"n_layers" if family == "DistilBert" else "num_hidden_layers": 2})
    cls = getattr(zoo, f"{family}ForSequenceClassification")
    teacher, student = cls(config, rngs=nnx.Rngs(0)), cls(short, rngs=nnx.Rngs(1))
    init_from_layers(student, teacher, [0, 2])
    ours, theirs = student.base_model, teacher.base_model
    assert same(ours.encoder.layer[1], theirs.encoder.layer[2])
    assert same(ours.embeddings, theirs.embeddings)
    assert same(student.classifier, teacher.classifier)
    if family == "Electra":
        assert same(ours.embeddings_project, theirs.embeddings_project)
    shared = {
        "MPNet": ["relative"],
        "ModernBert": ["final_norm"],
        "DebertaV2": ["rel_embeddings", "position_norm", "conv"],
        "Deberta": ["rel_embeddings"],
    }
    for name in shared.get(family, []):
        assert same(getattr(ours.encoder, name), getattr(theirs.encoder, name))


def test_a_norm_that_only_one_layer_has_is_left_out():
    config = zoo.ModernBertConfig(**FAMILIES["ModernBert"])
    teacher = zoo.ModernBertModel(config, rngs=nnx.Rngs(0))
    student = zoo.ModernBertModel(config.replace(num_hidden_layers=2), rngs=nnx.Rngs(1))
    second = teacher.encoder.layer[1].attention_norm.scale
    second[...] = second[...] * 2
    init_from_layers(student, teacher, [1, 0])
    for ours, theirs in zip(student.encoder.layer, (1, 0), strict=True):
        theirs = teacher.encoder.layer[theirs]
        assert same(ours.attention, theirs.attention) and same(ours.output, theirs.output)
    assert student.encoder.layer[0].attention_norm is None
    np.testing.assert_array_equal(student.encoder.layer[1].attention_norm.scale[...], 1)


def test_tables_that_only_the_student_has_are_named():
    config = zoo.DebertaV2Config(**FAMILIES["DebertaV2"])
    teacher = zoo.DebertaV2Model(config.replace(type_vocab_size=0), rngs=nnx.Rngs(0))
    student = zoo.DebertaV2Model(config, rngs=nnx.Rngs(1))
    with pytest.raises(ValueError, match="token_type_embeddings: the parts are built differently"):
        init_from_layers(student, teacher, [0, 1, 2])


def test_a_distilbert_from_a_bert_computes_the_same(config):
    teacher = zoo.BertForTokenClassification(config, rngs=nnx.Rngs(0))
    student = zoo.DistilBertForTokenClassification(
        zoo.DistilBertConfig(**FAMILIES["DistilBert"], num_labels=3), rngs=nnx.Rngs(1)
    )
    init_from_layers(student, teacher, [0, 1, 2])
    ids = np.arange(18).reshape(2, 9) + 1
    teacher.eval()
    student.eval()
    np.testing.assert_allclose(student(ids).logits, teacher(ids).logits, atol=1e-6)
    other = zoo.RobertaForTokenClassification(
        zoo.RobertaConfig(**FAMILIES["Roberta"]), rngs=nnx.Rngs(1)
    )
    with pytest.raises(ValueError, match="built on RobertaModel, the teacher on BertModel"):
        init_from_layers(other, teacher, [0, 1, 2])


def test_heads_of_different_tasks_are_not_the_same(config, teacher):
    tagger = student_of(config, zoo.BertForTokenClassification)
    init_from_layers(tagger, teacher, [0, 1])
    assert not same(tagger.classifier, teacher.classifier)
    with pytest.raises(ValueError, match="do not have the same head"):
        init_from_layers(tagger, teacher, [0, 1], head=True)
