"""The tables of names: what is in them, how more gets in, what is said of unknown names."""

import pytest

from jaxbrewer import presets
from jaxbrewer.configurations.configs import DistillationConfig, IntermediateMatch
from jaxbrewer.errors import ConfigError, UnknownNameError, suggest
from jaxbrewer.presets import MAPS, TEMPERATURE_SCHEDULER, lookup, register_new

# Table → names that TextBrewer does not have.
OURS: dict[str, set[str]] = {
    "kd_loss": {
        "bce",
        "margin_mse",
        "listwise_kl",
        "kl",
        "reverse_kl",
        "jsd",
        "skew_kl",
        "skew_reverse_kl",
        "tvd",
        "dkd",
        "dist",
        "taid",
    },
    "match_Loss": {
        "l2",
        "relation",
        "rkd_distance",
        "rkd_angle",
        "similarity",
        "cka",
        "infonce",
    },
    "weight_scheduler": {"step", "linear", "cosine"},
    "keys": {"embedding", "query", "key", "value", "losses_mask", "sample_weight"},
    "features": {"embedding", "query", "key", "value"},
}


@pytest.fixture(autouse=True)
def tables_as_they_were():
    """Takes out again what a test puts into the tables."""
    before = {name: dict(table) for name, table in MAPS.items()}
    features, keys = list(presets.FEATURES), list(presets.ADAPTOR_KEYS)
    yield
    for name, table in MAPS.items():
        table.clear()
        table.update(before[name])
    presets.FEATURES[:], presets.ADAPTOR_KEYS[:] = features, keys


@pytest.mark.torch
def test_the_tables_hold_textbrewers_names():
    from textbrewer import presets as reference

    assert list(MAPS) == list(reference.MAPS)
    for name, table in reference.MAPS.items():
        theirs = table.store if name == "temperature_scheduler" else table
        assert set(MAPS[name]) - OURS.get(name, set()) == set(theirs)
        for key, function in theirs.items():
            assert callable(MAPS[name][key])
            if "_" in function.__name__ and name in ("kd_loss", "match_Loss", "weight_scheduler"):
                assert MAPS[name][key].__name__ == function.__name__
    for kind, ours, theirs in (
        ("features", presets.FEATURES, reference.FEATURES),
        ("keys", presets.ADAPTOR_KEYS, reference.ADAPTOR_KEYS),
    ):
        assert [name for name in ours if name not in OURS[kind]] == theirs


@pytest.mark.parametrize("map_name", MAPS)
def test_register_new_puts_a_function_in(map_name):
    def mine(*args):
        return args

    register_new(map_name, "mine", mine)
    assert MAPS[map_name]["mine"] is mine
    assert lookup(map_name, "mine") is mine
    register_new(map_name, "mine", len)
    assert MAPS[map_name]["mine"] is len


def test_plain_assignment_counts_in_configs_made_later():
    match = {"layer_T": 0, "layer_S": 0, "weight": 1, "loss": "mine", "feature": "values"}
    with pytest.raises(ConfigError, match="feature is 'values'"):
        IntermediateMatch(**match)
    presets.FEATURES.append("values")
    presets.PROJ_MAP["mine"] = len
    presets.WEIGHT_SCHEDULER["mine"] = abs
    presets.TEMPERATURE_SCHEDULER["mine"] = lambda logits_S, logits_T, base: base
    assert IntermediateMatch(**match, proj=["mine", 2, 3]).feature == "values"
    config = DistillationConfig(
        temperature_scheduler="mine",
        kd_loss_weight_scheduler="mine",
        hard_label_weight_scheduler="mine",
    )
    assert config.temperature_scheduler == config.kd_loss_weight_scheduler == "mine"


def test_temperatures_can_be_built_by_indexing():
    assert TEMPERATURE_SCHEDULER["constant"](0, 0, 3) == 3
    flsw = presets.flsw_temperature_scheduler_builder
    assert TEMPERATURE_SCHEDULER["flsw"] is flsw
    for key in (
        ["flsw", 1, 2],
        ("flsw", 1, 2, 1e-3),
        ["flsw", {"beta": 1, "gamma": 2}],
        ["cwsm", 1],
        ("cwsm", {"beta": 1}),
    ):
        assert key in TEMPERATURE_SCHEDULER
        assert callable(TEMPERATURE_SCHEDULER[key])


def test_the_table_of_temperatures_is_a_mapping():
    assert list(TEMPERATURE_SCHEDULER) == list(TEMPERATURE_SCHEDULER.keys())
    assert len(TEMPERATURE_SCHEDULER) == 3
    assert "cwsm" in TEMPERATURE_SCHEDULER
    assert "none" not in TEMPERATURE_SCHEDULER
    assert ["none", 1] not in TEMPERATURE_SCHEDULER
    assert [] not in TEMPERATURE_SCHEDULER
    assert TEMPERATURE_SCHEDULER.get("none") is None
    assert TEMPERATURE_SCHEDULER.get("cwsm") is TEMPERATURE_SCHEDULER["cwsm"]
    assert dict(TEMPERATURE_SCHEDULER.items())["constant"](0, 0, 3) == 3


def test_unknown_temperatures_name_the_choices():
    with pytest.raises(KeyError, match=r"unknown name 'flws'; did you mean 'flsw'\?"):
        TEMPERATURE_SCHEDULER["flws"]
    with pytest.raises(KeyError, match=r"unknown name 'x'; choose from 'constant', 'flsw', 'cwsm'"):
        TEMPERATURE_SCHEDULER[["x", 1]]
    with pytest.raises(KeyError, match=r"unknown name \[\]"):
        TEMPERATURE_SCHEDULER[[[]]]
    with pytest.raises(KeyError, match="an empty list names nothing"):
        TEMPERATURE_SCHEDULER[[]]


def test_missing_arguments_are_a_type_error():
    with pytest.raises(TypeError, match="missing 2 required"):
        TEMPERATURE_SCHEDULER[["flsw"]]


def test_an_unknown_table_names_the_tables():
    with pytest.raises(UnknownNameError, match="no table is called 'match_loss'; did you mean"):
        register_new("match_loss", "mine", len)
    with pytest.raises(KeyError, match="choose from 'kd_loss', 'match_Loss', 'projection'"):
        lookup("xyz", "mine")


def test_an_unknown_name_is_looked_up_in_vain():
    with pytest.raises(KeyError) as caught:
        lookup("match_Loss", "hiden_mse")
    assert str(caught.value) == "no match_Loss is called 'hiden_mse'; did you mean 'hidden_mse'?"


def test_what_cannot_be_registered():
    with pytest.raises(TypeError, match="must be a function, got 3"):
        register_new("kd_loss", "mine", 3)
    with pytest.raises(TypeError, match="a name in 'kd_loss' is text, got 3"):
        register_new("kd_loss", 3, len)
    with pytest.raises(ValueError, match="'none' cannot be a name"):
        register_new("weight_scheduler", "none", len)
    with pytest.raises(ValueError, match="'' cannot be a name"):
        register_new("weight_scheduler", "", len)


def test_suggestions():
    assert suggest("ckpt_step", ["ckpt_steps", "seed"]) == "did you mean 'ckpt_steps'?"
    assert suggest("Hidden", ["hidden", "attention"]) == "did you mean 'hidden'?"
    assert suggest("zzz", ["hidden", "attention"]) == "choose from 'hidden', 'attention'"
    assert suggest(7, []) == "there is nothing to choose from"
    assert str(UnknownNameError()) == ""
