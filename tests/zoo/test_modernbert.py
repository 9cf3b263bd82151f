"""What ModernBERT has of its own: windows, rotations, two spellings of a config, pooling."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxbrewer.zoo as zoo
from jaxbrewer.zoo.modernbert import GLOBAL, LOCAL, near_keys

from .conftest import FAMILIES, close, make_batch, make_torch, to_torch
from .test_parity import check_parity

SEQUENCE = "ModernBertForSequenceClassification"


def config_of(**changes):
    return zoo.ModernBertConfig(**{**FAMILIES["ModernBert"], **changes})


# --- windows ---------------------------------------------------------------------------------


def test_a_window_reaches_as_far_as_it_says():
    near = np.asarray(near_keys(None, 6, 2))[0, 0]
    np.testing.assert_array_equal(near[0], [1, 1, 1, 0, 0, 0])
    np.testing.assert_array_equal(near[3], [0, 1, 1, 1, 1, 1])
    visible = jnp.array([[1, 1, 0, 0, 0, 0]], bool)[:, None, None]
    assert not near_keys(visible, 6, 2)[0, 0, 4].any()
    assert near_keys(visible, 6, 5) is visible and near_keys(None, 6, 5) is None


def padded(length=16, tokens=3):
    """A batch of which one row is mostly padding, beyond every window of three tokens."""
    batch = make_batch(length=length, family="ModernBert")
    batch["attention_mask"][:] = 1
    batch["attention_mask"][1, tokens:] = 0
    return batch


@pytest.mark.torch
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_padding_beyond_every_window_equals_transformers(pooling, tmp_path):
    theirs = make_torch(SEQUENCE, num_labels=3, classifier_pooling=pooling)
    theirs.save_pretrained(tmp_path)
    ours = getattr(zoo, SEQUENCE).from_pretrained(tmp_path)
    batch = padded()
    got = ours(**batch, output_hidden_states=True)
    wanted = theirs(**to_torch(batch), output_hidden_states=True)
    close(got.logits, wanted.logits, 1e-5)
    for mine, its in zip(got.hidden_states, wanted.hidden_states, strict=True):
        close(mine, its, 1e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_padding_beyond_every_window_gives_no_nan(dtype):
    model = getattr(zoo, SEQUENCE)(config_of(), dtype=dtype, rngs=nnx.Rngs(0))
    model.eval()
    batch = padded()
    batch["attention_mask"][0] = 0  # and a row of padding alone

    def loss(model):
        out = model(**batch, labels=np.array([0, 1, 1]), output_hidden_states=True)
        return out.loss + sum(jnp.sum(hidden) for hidden in out.hidden_states)

    value, grads = nnx.jit(nnx.value_and_grad(loss))(model)
    assert np.isfinite(value)
    for leaf in jax.tree.leaves(grads):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()


def test_what_lies_in_padding_does_not_matter():
    model = getattr(zoo, SEQUENCE)(config_of(), rngs=nnx.Rngs(0))
    model.eval()
    batch = padded()
    other = dict(batch, input_ids=np.where(batch["attention_mask"] == 1, batch["input_ids"], 9))
    np.testing.assert_array_equal(model(**batch).logits, model(**other).logits)


# --- layers ----------------------------------------------------------------------------------


@pytest.mark.torch
@pytest.mark.parametrize(
    "changes",
    [
        {"attention_bias": True, "mlp_bias": True, "norm_bias": True, "classifier_bias": True},
        {"layer_types": [LOCAL, GLOBAL, LOCAL], "classifier_activation": "relu"},
        {
            "rope_parameters": {
                GLOBAL: {"rope_type": "default", "rope_theta": 30.0},
                LOCAL: {"rope_type": "default", "rope_theta": 7.0},
            }
        },
        {"classifier_pooling": "cls", "local_attention": 3, "hidden_activation": "silu"},
    ],
)
def test_other_settings_equal_transformers(changes, tmp_path, x64):
    check_parity(SEQUENCE, tmp_path, True, 1e-9, **changes)


@pytest.mark.torch
def test_the_last_hidden_state_is_after_the_final_norm(tmp_path):
    model = zoo.ModernBertModel(config_of(), rngs=nnx.Rngs(0))
    model.eval()
    out = model(**make_batch(family="ModernBert"), output_hidden_states=True)
    np.testing.assert_array_equal(out.hidden_states[-1], out.last_hidden_state)
    np.testing.assert_allclose(jnp.mean(out.last_hidden_state, -1), 0, atol=1e-5)
    assert model.encoder.layer[0].attention_norm is None


def test_initial_weights_are_cut_off_and_narrower_outwards():
    model = getattr(zoo, SEQUENCE)(config_of(hidden_size=64), rngs=nnx.Rngs(0))
    layer = model.model.encoder.layer[1]
    for dense, deviation in (
        (layer.attention.qkv, 0.02),
        (layer.output, 0.02 / 6**0.5),
        (model.head.dense, 0.02 / 6**0.5),
        (model.classifier, 64**-0.5),
    ):
        largest = float(jnp.abs(dense.kernel[...]).max())
        assert 1.5 * deviation < largest <= 2 * deviation
    assert layer.attention.qkv.bias is None and layer.intermediate_norm.bias is None


def test_a_sequence_is_as_long_as_the_config_says():
    model = zoo.ModernBertModel(config_of(), rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match="21 is longer than the 20 positions there are"):
        model(np.full((1, 21), 5))


# --- configs ---------------------------------------------------------------------------------

OLD = {
    "global_attn_every_n_layers": 2, "global_rope_theta": 5000.0, "local_rope_theta": 100.0,
}  # fmt: skip


@pytest.mark.torch
def test_the_published_spelling_and_transformers_are_one(tmp_path):
    import transformers

    base = FAMILIES["ModernBert"] | {"num_hidden_layers": 5}
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"model_type": "modernbert"} | base | OLD))
    read = zoo.read_config(old)
    assert read.kinds == (GLOBAL, LOCAL, GLOBAL, LOCAL, GLOBAL)
    theirs = transformers.ModernBertConfig(**base, **OLD)
    theirs.save_pretrained(tmp_path)
    assert zoo.read_config(tmp_path) == read
    read.to_json_file(tmp_path / "config.json")
    again = transformers.ModernBertConfig.from_pretrained(tmp_path)
    assert again.rope_parameters == theirs.rope_parameters
    assert again.layer_types == theirs.layer_types


def test_a_rhythm_survives_another_number_of_layers():
    config = zoo.ModernBertConfig.from_dict({"layer_types": [GLOBAL, LOCAL] * 11})
    assert config.layer_types is None and config.global_attn_every_n_layers == 2
    assert config.replace(num_hidden_layers=3).kinds == (GLOBAL, LOCAL, GLOBAL)
    odd = zoo.ModernBertConfig(num_hidden_layers=2, layer_types=[LOCAL, LOCAL])
    assert odd.kinds == odd.layer_types == (LOCAL, LOCAL)
    assert zoo.ModernBertConfig.from_dict(odd.to_dict()) == odd
    with pytest.raises(ValueError, match="layer_types names 2 layers, but num_hidden_layers=3"):
        odd.replace(num_hidden_layers=3)


def rotation(**given):
    return {"rope_parameters": {GLOBAL: given}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (rotation(rope_type="yarn", factor=2.0), r"full_attention'\]: rope_type='yarn' is not"),
        (rotation(rope_theta=3.0, partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not"),
        ({"rope_parameters": {"rope_theta": 3.0}}, "expected 'full_attention' and 'sliding_"),
        ({"rope_parameters": [1]}, r"rope_parameters=\[1\], expected"),
        (rotation(rope_theta=-1.0), "global_rope_theta is -1.0: expected a number above 0"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling=.* is not supported, only None is"),
        ({"tie_last_hidden_states": False}, "tie_last_hidden_states=False is not supported"),
        ({"layer_types": ["full_attention", "chunked"]}, "layer_types is .*: expected a list of"),
        ({"layer_types": [LOCAL]}, "layer_types names 1 layers, but num_hidden_layers=3"),
        ({"classifier_pooling": "max"}, "classifier_pooling is 'max': choose from 'cls'"),
        ({"hidden_size": 20}, "hidden_size=20 is not a multiple of twice num_attention_heads=4"),
        ({"position_embedding_type": "rope"}, "position_embedding_type='rope' is not supported"),
    ],
)
def test_refusals(changes, message):
    with pytest.raises(ValueError, match=message):
        zoo.ModernBertConfig.from_dict(FAMILIES["ModernBert"] | changes)


def test_spans_need_two_labels():
    with pytest.raises(ValueError, match="answer spans need 2"):
        zoo.ModernBertForQuestionAnswering(config_of(num_labels=3), rngs=nnx.Rngs(0))
