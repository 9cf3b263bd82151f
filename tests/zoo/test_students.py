"""TextBrewer's student shapes: the numbers of its files and of its README's table."""

import math

import jax
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo
from jaxbrewer.zoo import student_config

# Of examples/student_config: layers, width, inner width, heads.
FILES = {
    "T6": (6, 768, 3072, 12),
    "T3": (3, 768, 3072, 12),
    "T3-small": (3, 384, 1536, 12),
    "T4-tiny": (4, 312, 1200, 12),
}
# Of the README: millions of parameters without a task's output layer, English and Chinese.
MILLIONS = [
    ("T6", "bert-base-cased", 65),
    ("T3", "bert-base-cased", 44),
    ("T3-small", "bert-base-cased", 17),
    ("T4-tiny", "bert-base-cased", 14),
    ("T12-nano", "bert-base-cased", 17),
    ("T3", "roberta-wwm-ext", 38),
    ("T3-small", "roberta-wwm-ext", 14),
    ("T4-tiny", "roberta-wwm-ext", 11),
    ("Electra-small", "roberta-wwm-ext", 12),
]
VOCABULARIES = {"bert-base-cased": 28996, "roberta-wwm-ext": 21128, "bert-base-uncased": 30522}


def count(config):
    cls = zoo.model_class(config.model_type)
    build = getattr(cls, "without_pooler", cls)
    shapes = nnx.eval_shape(lambda: build(config, rngs=nnx.Rngs(0)))
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(nnx.state(shapes, nnx.Param)))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("base", VOCABULARIES)
def test_shapes_are_the_files(name, base):
    layers, width, inner, heads = FILES[name]
    assert student_config(name, base) == zoo.BertConfig(
        attention_probs_dropout_prob=0.1,
        hidden_act="gelu",
        hidden_dropout_prob=0.1,
        hidden_size=width,
        initializer_range=0.02,
        intermediate_size=inner,
        max_position_embeddings=512,
        num_attention_heads=heads,
        num_hidden_layers=layers,
        type_vocab_size=2,
        vocab_size=VOCABULARIES[base],
    )


def test_shapes_of_the_table():
    nano = student_config("T12-nano")
    assert isinstance(nano, zoo.BertConfig)
    small = student_config("Electra-small")
    assert isinstance(small, zoo.ElectraConfig) and small.embedding_size == 128
    for config in (nano, small):
        assert (config.num_hidden_layers, config.hidden_size) == (12, 256)
        assert (config.intermediate_size, config.num_attention_heads) == (1024, 4)
    gru = student_config("BiGRU")
    assert (gru.vocab_size, gru.embedding_size, gru.hidden_size) == (28996, 768, 768)


@pytest.mark.parametrize(("name", "base", "millions"), MILLIONS)
def test_parameters_are_the_tables(name, base, millions):
    assert round(count(student_config(name, base)) / 1e6) == millions


def test_teachers_are_the_tables_too():
    assert round(count(zoo.BertConfig(vocab_size=28996)) / 1e6) == 108
    assert round(count(zoo.BertConfig(vocab_size=21128)) / 1e6) == 102


def test_the_grus_size_is_told():
    assert round(count(student_config("BiGRU")) / 1e6) == 29


def test_a_teachers_config_gives_the_rest():
    teacher = zoo.BertConfig(vocab_size=100, label_names=("no", "yes"), max_position_embeddings=40)
    student = student_config("t4-Tiny", teacher, output_hidden_states=True)
    assert (student.vocab_size, student.max_position_embeddings) == (100, 40)
    assert student.label_names == ("no", "yes") and student.output_hidden_states
    assert (student.num_hidden_layers, student.hidden_size) == (4, 312)
    assert isinstance(student_config("T3", zoo.RobertaConfig()), zoo.RobertaConfig)
    assert student_config("Electra-small", zoo.ElectraConfig(vocab_size=99)).vocab_size == 99
    buckets = zoo.DebertaV2Config(relative_attention=True, position_buckets=256)
    small = student_config("T3-small", buckets)
    assert isinstance(small, zoo.DebertaV2Config) and small.position_buckets == 256
    assert (small.hidden_size, small.num_attention_heads) == (384, 12)
    assert isinstance(student_config("T6", zoo.MPNetConfig()), zoo.MPNetConfig)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("T5",), "no student 'T5': choose from T6, T3, T3-small, T4-tiny, T12-nano,"),
        ((3,), "no student 3"),
        (("T3", "gpt2"), "no base 'gpt2': choose from bert-base-cased,"),
        (("T3", zoo.ElectraConfig()), "base is a ElectraConfig, which has no T3"),
        (("T3", zoo.ModernBertConfig()), "base is a ModernBertConfig, which has no T3"),
        (("Electra-small", zoo.BertConfig()), "base is a BertConfig, which has no Electra-small"),
    ],
)
def test_refusals(arguments, message):
    with pytest.raises(ValueError, match=message):
        student_config(*arguments)
