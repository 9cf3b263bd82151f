"""Adaptors: every form an entry may have becomes one; every wrong form is named with its fix."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxbrewer import FunctionModel, presets
from jaxbrewer.data.batches import Static, own
from jaxbrewer.errors import AdaptorError
from jaxbrewer.models import adaptors
from jaxbrewer.models.adaptors import Side, freeze

A, B = jnp.ones((2, 3)), jnp.zeros((2, 3))
H = jnp.ones((2, 3, 4))


@pytest.mark.parametrize("name", ["logits", "logits_mask", "losses", "labels"])
def test_one_array_or_a_list_becomes_a_tuple(name):
    assert freeze({name: A}, "S") == {name: (A,)}
    for several in ([A, B], (A, B)):
        frozen = freeze({name: several}, "S")[name]
        assert type(frozen) is tuple
        assert frozen[0] is A
        assert frozen[1] is B


def test_numpy_arrays_and_traced_ones_are_arrays():
    array = np.ones((2, 3))
    assert freeze({"logits": array}, "T")["logits"][0] is array
    shapes = jax.eval_shape(lambda x: freeze({"logits": x, "losses": x.sum()}, "T"), A)
    assert shapes["losses"][0].shape == ()


def test_losses_may_be_numbers():
    first, second = freeze({"losses": [0.5, 2]}, "S")["losses"]
    assert (first, second) == (0.5, 2)
    assert isinstance(first, jax.Array)
    assert freeze({"losses": 1.5}, "S")["losses"] == (1.5,)


@pytest.mark.parametrize("name", ["hidden", "attention"])
def test_features_become_tuples_and_may_hold_none(name):
    frozen = freeze({name: [None, H, H]}, "S")[name]
    assert type(frozen) is tuple
    assert frozen[0] is None
    assert frozen[1] is H


def test_an_embedding_may_be_one_array_or_a_list():
    assert freeze({"embedding": A}, "S") == {"embedding": (A,)}
    assert freeze({"embedding": [A, None, B]}, "S") == {"embedding": (A, None, B)}


def test_entries_that_are_none_are_left_out():
    nothing = dict.fromkeys(presets.ADAPTOR_KEYS)
    assert freeze(nothing, "S") == {}
    assert freeze({}, "S") == {}
    assert freeze({**nothing, "inputs_mask": A}, "S") == {"inputs_mask": A}


WRONG = {
    "not a dict": ((A,), "adaptor_S returned a tuple; it must return a dict .*logits, logits_mask"),
    "one array": (H, "adaptor_S returned one array; it must return a dict"),
    "nothing": (None, "adaptor_S returned a NoneType"),
    "list of masks": ({"inputs_mask": [A]}, "'inputs_mask' must be one array .* not a list"),
    "one hidden": (
        {"hidden": H},
        r"'hidden' must be a list .* not a single \[2, 3, 4\].*\[array\]",
    ),
    "one attention": ({"attention": H}, "'attention' must be a list"),
    "hidden by name": ({"hidden": {"0": H}}, "'hidden' must be a list .* not a single dict"),
    "text among hidden": ({"hidden": [H, "x"]}, r"'hidden'\[1\] is a str"),
    "list of hidden lists": ({"hidden": [[H]]}, r"'hidden'\[0\] is a list"),
    "None among logits": ({"logits": [A, None]}, r"'logits'\[1\] is a NoneType"),
    "None among losses": ({"losses": (None,)}, r"'losses'\[0\] is a NoneType.* labels"),
    "text for labels": ({"labels": "x"}, r"'labels'\[0\] is a str"),
    "numbers for logits": ({"logits": [1.0, 2.0]}, r"'logits'\[0\] is a float"),
    "no logits in the list": ({"logits": []}, "'logits' is an empty list"),
    "no losses in the list": ({"losses": ()}, "'losses' is an empty list"),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_forms_are_named(name):
    results, message = WRONG[name]
    with pytest.raises(AdaptorError, match=f"(?s){message}"):
        freeze(results, "S")


SLIPS = {
    "loss": "losses",
    "attentions": "attention",
    "hidden_states": "hidden",
    "hiddens": "hidden",
    "mask": "inputs_mask",
    "attention_mask": "inputs_mask",
    "input_mask": "inputs_mask",
    "label": "labels",
    "logit": "logits",
    "Logits": "logits",
    "logit_mask": "logits_mask",
    "inputs_masks": "inputs_mask",
    "queries": "query",
    "values": "value",
}


@pytest.mark.parametrize("slip", SLIPS)
def test_slips_get_the_right_key(slip):
    with pytest.raises(AdaptorError, match=f"unknown key '{slip}': did you mean '{SLIPS[slip]}'"):
        freeze({slip: A}, "T")


def test_all_that_is_wrong_is_in_one_error():
    with pytest.raises(AdaptorError) as caught:
        freeze({"loss": A, "hidden": H, "logits": [None], "banana": A, "labels": A}, "T")
    lines = str(caught.value).splitlines()
    assert len(lines) == 4
    assert all("adaptor_T" in line for line in lines)
    assert "choose from" in lines[3]


def test_features_of_ones_own(monkeypatch):
    monkeypatch.setattr(presets, "FEATURES", [*presets.FEATURES, "values"])
    assert freeze({"values": [H, None]}, "S") == {"values": (H, None)}
    with pytest.raises(AdaptorError, match="'values' must be a list"):
        freeze({"values": H}, "S")
    with pytest.raises(AdaptorError, match="did you mean 'values'"):
        freeze({"vallues": H}, "S")
    assert adaptors.adaptor_keys()[-1] == "values"


# ------------------------------------------------------------------------------------- the side


def test_a_side_runs_model_and_adaptor_on_plain_flags():
    seen = []

    def apply(params, x, return_dict, *, scale):
        seen.append(return_dict)
        return {"logits": x * params * scale}

    def adaptor(batch, outputs):
        seen.append(batch["return_dict"])
        return {"logits": outputs["logits"]}

    side = Side("S", FunctionModel(apply, jnp.float32(2)), adaptor, {"scale": 3})
    batch = own({"x": np.ones(2, np.float32), "return_dict": True})
    assert batch["return_dict"] == Static(True)
    results, state = side(jnp.float32(2), None, jax.random.key(0), batch, False)
    assert seen == [True, True]
    assert state is None
    np.testing.assert_array_equal(results["logits"][0], [6, 6])
    again = side.adapt(batch, {"logits": A})
    assert again["logits"][0] is A


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"losses": A, "losses_mask": B[0]}, r"'losses_mask'\[0\] is \[3\], expected \[2, 3\]"),
        ({"losses": [A, A, A], "losses_mask": [A, A]}, "'losses_mask' has 2 arrays for 3 'losses'"),
        ({"logits": A, "sample_weight": A[0]}, r"'sample_weight' is \[3\], expected \[2\]"),
        ({"sample_weight": [1.0, 2.0]}, r"must be one array \[batch\], not a list"),
    ],
)
def test_weights_that_do_not_fit_are_named(given, message):
    with pytest.raises(AdaptorError, match=message):
        freeze(given, "S")


def test_a_weight_of_the_batch_is_not_the_models_unless_it_names_it():
    def model(params, x):
        return x * params

    def naming(params, x, sample_weight):
        return x * sample_weight

    batch = own({"x": A, "sample_weight": A[:, 0]})
    for apply, names in ((model, {"x"}), (naming, {"x", "sample_weight"})):
        side = Side("S", FunctionModel(apply, jnp.ones(())), lambda batch, outputs: {}, {})
        assert set(side.call(batch)[1]) == names
