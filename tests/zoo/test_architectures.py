"""What RoBERTa, ELECTRA and DistilBERT have of their own: positions, widths, names, old files."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jaxbrewer.zoo as zoo
from jaxbrewer.models.half_products import wide_products
from jaxbrewer.models.precision import Precision, at_level
from jaxbrewer.models.wrap import as_model

from .conftest import FAMILIES, close, family_of, labels_for, make_batch, make_torch, to_torch

NEW = ("Roberta", "XLMRoberta", "Camembert", "Electra", "DistilBert", "MPNet", "ModernBert",
       "DebertaV2", "Deberta")  # fmt: skip
ROBERTAS = NEW[:3]


def config_of(family, **changes):
    return getattr(zoo, f"{family}Config")(**{**FAMILIES[family], **changes})


# --- positions -------------------------------------------------------------------------------


def test_robertas_positions_pass_over_padding():
    model = zoo.RobertaModel(config_of("Roberta"), rngs=nnx.Rngs(0))
    ids = np.array([[7, 8, 3, 9, 3], [3, 3, 5, 5, 5]])
    np.testing.assert_array_equal(model._positions(ids, 5), [[4, 5, 3, 6, 3], [3, 3, 4, 5, 6]])
    np.testing.assert_array_equal(model._positions(None, 3), [[4, 5, 6]])


@pytest.mark.torch
def test_robertas_embeddings_given_equal_transformers(tmp_path):
    import torch

    theirs = make_torch("RobertaModel")
    theirs.save_pretrained(tmp_path)
    ours = zoo.RobertaModel.from_pretrained(tmp_path)
    embedded = np.random.default_rng(0).normal(size=(3, 9, 24)).astype(np.float32)
    got = ours(inputs_embeds=embedded).last_hidden_state
    close(got, theirs(inputs_embeds=torch.tensor(embedded)).last_hidden_state, 1e-5)


def test_robertas_longest_sequence():
    model = zoo.RobertaModel(config_of("Roberta"), rngs=nnx.Rngs(0))
    model.eval()
    out = nnx.eval_shape(lambda model, ids: model(ids), model, np.full((1, 16), 5))
    assert out.last_hidden_state.shape == (1, 16, 24)
    with pytest.raises(ValueError, match="17 is longer than the 16 positions there are"):
        model(np.full((1, 17), 5))


def test_a_mask_of_another_length_is_refused():
    model = zoo.RobertaModel(config_of("Roberta"), rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match=r"attention_mask is \[2, 5\], expected \[2, 6\].*one length"
    ):
        model(np.full((2, 6), 5), np.ones((2, 5), np.int32))


def test_robertas_row_of_padding_is_zero_at_first():
    model = zoo.RobertaModel(config_of("Roberta"), rngs=nnx.Rngs(0))
    for table in (model.embeddings.word_embeddings, model.embeddings.position_embeddings):
        assert not np.asarray(table.embedding[3]).any()
        assert np.asarray(table.embedding[...])[[2, 4]].all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"pad_token_id": None}, "positions count from it"),
        ({"max_position_embeddings": 4}, "leaves no position after pad_token_id=3"),
    ],
)
def test_robertas_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("Roberta", **changes)


@pytest.mark.torch
def test_distilberts_sinusoids_equal_transformers():
    import transformers

    changes = {"sinusoidal_pos_embds": True}
    theirs = transformers.DistilBertModel(
        transformers.DistilBertConfig(**FAMILIES["DistilBert"], **changes)
    )
    ours = zoo.DistilBertModel(config_of("DistilBert", **changes), rngs=nnx.Rngs(0))
    got = ours.embeddings.position_embeddings.embedding[...]
    close(got, theirs.embeddings.position_embeddings.weight, 1e-6)


# --- widths and heads ------------------------------------------------------------------------


@pytest.mark.torch
def test_electra_projects_its_embeddings_where_widths_differ(tmp_path):
    model = zoo.ElectraModel(config_of("Electra"), rngs=nnx.Rngs(0))
    assert model.embeddings_project.kernel.shape == (16, 24)
    theirs = make_torch("ElectraModel", embedding_size=24)
    theirs.save_pretrained(tmp_path)
    ours = zoo.ElectraModel.from_pretrained(tmp_path)
    assert ours.embeddings_project is None
    batch = make_batch(family="Electra")
    close(ours(**batch).last_hidden_state, theirs(**to_torch(batch)).last_hidden_state, 1e-5)


DROPOUTS = {
    "Roberta": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "Electra": ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    "DistilBert": ("dropout", "attention_dropout", "qa_dropout", "seq_classif_dropout"),
}


@pytest.mark.parametrize(
    ("name", "rate"),
    [
        ("RobertaForSequenceClassification", "classifier_dropout"),
        ("ElectraForTokenClassification", "classifier_dropout"),
        ("DistilBertForSequenceClassification", "seq_classif_dropout"),
        ("DistilBertForQuestionAnswering", "qa_dropout"),
        ("DistilBertForTokenClassification", "dropout"),
    ],
)
def test_dropout_of_heads_comes_from_the_config(name, rate):
    family = next(family for family in NEW if name.startswith(family))
    none = dict.fromkeys(DROPOUTS[family], 0.0)
    batch = make_batch(family=family)
    still = getattr(zoo, name)(config_of(family, **none), rngs=nnx.Rngs(0))
    np.testing.assert_array_equal(still(**batch)[0], still(**batch)[0])
    moving = getattr(zoo, name)(config_of(family, **none | {rate: 0.5}), rngs=nnx.Rngs(0))
    assert not np.array_equal(moving(**batch)[0], moving(**batch)[0])


def test_distilbert_drops_nothing_between_attention_and_its_norm():
    config = config_of("DistilBert", dropout=0.5, attention_dropout=0.0)
    layer = zoo.DistilBertModel(config, rngs=nnx.Rngs(0)).encoder.layer[0]
    hidden = jnp.ones((1, 3, 24)) * jnp.arange(24)
    layer.output.kernel[...] = jnp.zeros_like(layer.output.kernel[...])
    np.testing.assert_array_equal(layer(hidden)[0], layer(hidden)[0])


@pytest.mark.parametrize("family", NEW)
def test_half_precision_computes_in_half_and_loses_in_float32(family):
    name = f"{family}ForSequenceClassification"
    asked = {"output_attentions": True, "output_hidden_states": True}

    def run(batch):
        model = getattr(zoo, name)(config_of(family), dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
        return model(**batch, **asked)

    batch = make_batch(family=family) | {"labels": np.zeros(3, np.int32)}
    out = nnx.eval_shape(run, batch)
    for key, value in out.items():
        wanted = jnp.float32 if key == "loss" else jnp.bfloat16
        assert {leaf.dtype for leaf in jax.tree.leaves(value)} == {jnp.dtype(wanted)}, key


@pytest.mark.parametrize(
    "name",
    [
        *(f"{family}ForSequenceClassification" for family in NEW[-4:]),
        *(f"{family}ForMaskedLM" for family in ("Bert", "Electra", "ModernBert")),
    ],
)
def test_a_step_at_o2(name):
    """In bfloat16, dropout on: products in half, norms and what comes out in float32."""
    family = family_of(name)
    cls = getattr(zoo, name)
    model = as_model(cls(config_of(family, num_hidden_layers=1), rngs=nnx.Rngs(0)))
    batch = make_batch(family=family)
    batch |= labels_for(name, *batch["input_ids"].shape, 2)
    batch = {name: jnp.asarray(value, jnp.int32) for name, value in batch.items()}

    def loss(params, handle):
        outputs = handle.apply(params, handle.state, jax.random.key(1), (), batch, True)[0]
        return outputs.loss, outputs.logits

    half = at_level(model, Precision("O2", "bfloat16", emulated=True))
    step = jax.jit(lambda params: jax.value_and_grad(loss, has_aux=True)(params, half))
    traced = step.trace(half.params)
    assert wide_products(traced.jaxpr) == []
    (value, logits), grads = traced.lower().compile()(half.params)
    assert {leaf.dtype for leaf in (value, logits, *grads.values())} == {jnp.dtype("float32")}
    assert all(np.isfinite(grad).all() for grad in grads.values())
    np.testing.assert_allclose(value, loss(model.params, model)[0], rtol=0.02)
    frozen = at_level(model, Precision("O2", "bfloat16"), frozen=True).params
    full = {name for name, leaf in frozen.items() if leaf.dtype == jnp.float32}
    assert full == {name for name in model.params if "norm" in name.split(".")[-2]}


def test_spans_need_two_labels():
    with pytest.raises(ValueError, match="answer spans need 2"):
        zoo.ElectraForQuestionAnswering(config_of("Electra", num_labels=3), rngs=nnx.Rngs(0))


# --- files -----------------------------------------------------------------------------------

PRETRAINING = {
    "Roberta": "RobertaForMaskedLM",
    "XLMRoberta": "XLMRobertaForMaskedLM",
    "Camembert": "CamembertForMaskedLM",
    "Electra": "ElectraForPreTraining",
    "DistilBert": "DistilBertForMaskedLM",
    "MPNet": "MPNetForMaskedLM",
    "ModernBert": "ModernBertForMaskedLM",
    "DebertaV2": "DebertaV2ForMaskedLM",
    "Deberta": "DebertaForMaskedLM",
}


@pytest.mark.torch
@pytest.mark.parametrize("family", NEW)
def test_heads_of_pretraining_are_passed_over(family, tmp_path):
    theirs = make_torch(PRETRAINING[family])
    theirs.save_pretrained(tmp_path)
    options = {"add_pooling_layer": False} if family in (*ROBERTAS, "MPNet") else {}
    ours = getattr(zoo, f"{family}Model").from_pretrained(tmp_path, **options)
    batch = make_batch(family=family)
    wanted = theirs.base_model(**to_torch(batch)).last_hidden_state
    close(ours(**batch).last_hidden_state, wanted, 1e-5)
    tagger = zoo.from_pretrained(tmp_path, "token-classification", new_head=True, num_labels=4)
    np.testing.assert_array_equal(
        tagger(**batch, output_hidden_states=True).hidden_states[-1],
        ours(**batch).last_hidden_state,
    )


@pytest.mark.torch
def test_robertas_old_files_with_a_pooler_and_position_ids_are_read(tmp_path):
    theirs = make_torch("RobertaForSequenceClassification", num_labels=3)
    theirs.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    extra = {
        "roberta.embeddings.position_ids": np.arange(20)[None],
        "roberta.pooler.dense.weight": np.ones((24, 24), np.float32),
        "roberta.pooler.dense.bias": np.ones(24, np.float32),
    }
    save_file(load_file(file) | extra, file, metadata={"format": "pt"})
    batch = make_batch(family="Roberta")
    got = zoo.RobertaForSequenceClassification.from_pretrained(tmp_path)(**batch).logits
    close(got, theirs(**to_torch(batch)).logits, 1e-5)


@pytest.mark.torch
@pytest.mark.parametrize("family", NEW)
def test_defaults_and_files_are_transformers(family, tmp_path):
    import transformers

    theirs = getattr(transformers, f"{family}Config")(
        id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2}
    )
    theirs.save_pretrained(tmp_path)
    ours = zoo.read_config(tmp_path)
    assert ours == getattr(zoo, f"{family}Config")(label_names=("a", "b", "c"), num_labels=3)
    ours.to_json_file(tmp_path / "config.json")
    again = getattr(transformers, f"{family}Config").from_pretrained(tmp_path)
    assert again.to_dict() == theirs.to_dict()
    assert zoo.read_config(tmp_path) == ours


MODEL_TYPES = {"DebertaV2": "deberta-v2"}


@pytest.mark.parametrize(
    ("family", "given"),
    [
        # The keys of the published files: roberta-base, electra-small, distilbert-base, mpnet-base,
        # ModernBERT-base, deberta-v3-base, deberta-v2-xlarge, deberta-base.
        ("Roberta", {"layer_norm_eps": 1e-05, "max_position_embeddings": 514, "bos_token_id": 0,
                     "eos_token_id": 2, "type_vocab_size": 1, "architectures": []}),
        ("Electra", {"embedding_size": 128, "hidden_size": 256, "summary_activation": "gelu",
                     "summary_last_dropout": 0.1, "summary_type": "first",
                     "summary_use_proj": True}),
        ("DistilBert", {"activation": "gelu", "attention_dropout": 0.1, "dim": 768,
                        "dropout": 0.1, "hidden_dim": 3072, "n_heads": 12, "n_layers": 6,
                        "qa_dropout": 0.1, "seq_classif_dropout": 0.2,
                        "sinusoidal_pos_embds": False, "tie_weights_": True}),
        ("MPNet", {"layer_norm_eps": 1e-05, "max_position_embeddings": 514, "pad_token_id": 1,
                   "relative_attention_num_buckets": 32, "vocab_size": 30527}),
        ("ModernBert", {"bos_token_id": 50281, "classifier_activation": "gelu",
                        "classifier_bias": False, "classifier_pooling": "mean",
                        "cls_token_id": 50281, "decoder_bias": True,
                        "deterministic_flash_attn": False, "embedding_dropout": 0.0,
                        "global_attn_every_n_layers": 3, "global_rope_theta": 160000.0,
                        "gradient_checkpointing": False, "hidden_activation": "gelu",
                        "initializer_cutoff_factor": 2.0, "layer_norm_eps": 1e-05,
                        "local_attention": 128, "local_rope_theta": 10000.0, "norm_bias": False,
                        "norm_eps": 1e-05, "pad_token_id": 50283, "sep_token_id": 50282,
                        "position_embedding_type": "absolute", "sparse_pred_ignore_index": -100,
                        "sparse_prediction": False, "tie_word_embeddings": True}),
        ("DebertaV2", {"hidden_size": 768, "intermediate_size": 3072, "layer_norm_eps": 1e-07,
                       "max_relative_positions": -1, "norm_rel_ebd": "layer_norm",
                       "num_attention_heads": 12, "num_hidden_layers": 12,
                       "pos_att_type": "p2c|c2p", "position_biased_input": False,
                       "position_buckets": 256, "relative_attention": True,
                       "share_att_key": True, "type_vocab_size": 0}),
        ("DebertaV2", {"attention_head_size": 64, "conv_act": "gelu", "conv_kernel_size": 3,
                       "hidden_size": 1536, "num_attention_heads": 24, "pooler_dropout": 0,
                       "pooler_hidden_act": "gelu", "pooler_hidden_size": 1536}),
        ("Deberta", {"max_relative_positions": -1, "padding_idx": 0, "pos_att_type": "c2p|p2c",
                     "position_biased_input": False, "relative_attention": True}),
    ],
)  # fmt: skip
def test_published_files_are_read(family, given, tmp_path):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"model_type": MODEL_TYPES.get(family, family.lower()), **given}))
    config = zoo.read_config(path)
    read = config.to_dict()
    assert {key: read[key] for key in given if key in read} == {
        key: {"p2c|c2p": ["p2c", "c2p"], "c2p|p2c": ["c2p", "p2c"]}.get(str(value), value)
        for key, value in given.items()
        if key in read
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": 25}, "dim=25 is not a multiple of n_heads=4"),
        ({"activation": "mish"}, "activation is 'mish': expected one of gelu"),
        ({"dropout": 1.0}, "dropout is 1.0: expected a rate"),
        ({"n_layers": 0}, "n_layers is 0: expected an integer from 1"),
    ],
)
def test_distilberts_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        config_of("DistilBert", **changes)


def test_distilbert_reads_like_a_bert():
    config = config_of("DistilBert")
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (24, 3, 4)
