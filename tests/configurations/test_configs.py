"""Configs: TextBrewer's fields, round trips, and one report of everything that is wrong."""

import copy
import dataclasses
import inspect
import json
import math
import os
import pickle
import random
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxbrewer import presets
from jaxbrewer.configurations.configs import DistillationConfig, IntermediateMatch, TrainingConfig
from jaxbrewer.errors import ConfigError, PortingWarning

MATCH = {"layer_T": 8, "layer_S": 2, "weight": 1, "loss": "hidden_mse", "feature": "hidden"}
NST = {"layer_T": [0, 0], "layer_S": [0, 0], "weight": 0.5, "loss": "nst", "feature": "hidden"}

TRAINING = {
    "gradient_accumulation_steps": 2,
    "ckpt_frequency": 3,
    "ckpt_epoch_frequency": 4,
    "ckpt_steps": 500,
    "log_dir": "runs",
    "output_dir": "out",
    "device": "cuda:1",
    "fp16": True,
    "fp16_opt_level": "O2",
    "data_parallel": False,
    "local_rank": 0,
    "seed": 7,
    "resume": True,
    "max_to_keep": 5,
    "sharding": "teacher",
}
DISTILLATION = {
    "temperature": 8,
    "temperature_scheduler": ["flsw", 1, 2.5],
    "hard_label_weight": 0.5,
    "hard_label_weight_scheduler": "linear_growth",
    "kd_loss_type": "mse",
    "kd_loss_weight": 2,
    "kd_loss_weight_scheduler": "linear_decay",
    "probability_shift": True,
    "intermediate_matches": [
        MATCH,
        {**MATCH, "proj": ["linear", 384, 768]},
        {**NST, "proj": ["relu", 384, 768, {"lr": 1e-3, "betas": [0.9, 0.98], "nesterov": True}]},
        {**MATCH, "layer_T": -1, "layer_S": -1, "feature": "attention", "loss": "attention_mse"},
    ],
    "is_caching_logits": True,
}
EXAMPLES = [
    (TrainingConfig, {}),
    (TrainingConfig, TRAINING),
    (DistillationConfig, {}),
    (DistillationConfig, DISTILLATION),
    (DistillationConfig, {"temperature_scheduler": ["cwsm", {"beta": 1}]}),
    (IntermediateMatch, MATCH),
    (IntermediateMatch, {**NST, "proj": ["tanh", 3, 4, {"lr": 0.1}]}),
]


def problems_of(make):
    with pytest.raises(ConfigError) as caught:
        make()
    return caught.value.problems


# --------------------------------------------------------------------------------- fields and forms


@pytest.mark.torch
@pytest.mark.parametrize("ours", [TrainingConfig, DistillationConfig, IntermediateMatch])
def test_fields_order_and_defaults_are_textbrewers(ours):
    from textbrewer import configurations as reference

    theirs = getattr(reference, ours.__name__)
    expected = list(inspect.signature(theirs).parameters.values())
    found = list(inspect.signature(ours).parameters.values())
    assert [(p.name, p.default) for p in found[: len(expected)]] == [
        (p.name, p.default) for p in expected
    ]
    assert all(p.kind is p.POSITIONAL_OR_KEYWORD for p in found[: len(expected)])
    assert all(p.kind is p.KEYWORD_ONLY for p in found[len(expected) :])


def test_our_own_fields_are_keyword_only_and_change_nothing():
    config = TrainingConfig()
    assert (config.seed, config.resume, config.max_to_keep) == (0, False, None)
    with pytest.raises(TypeError, match="positional arguments"):
        TrainingConfig(*range(1, 13))


def test_positional_use():
    assert TrainingConfig(2, 3).ckpt_frequency == 3
    config = DistillationConfig(8, ["flsw", 1, 2], 0.5)
    assert (config.temperature, config.hard_label_weight) == (8, 0.5)
    match = IntermediateMatch(4, 2, 1.5, "cos", "hidden", ["linear", 3, 4])
    assert (match.layer_T, match.layer_S, match.loss) == (4, 2, "cos")


def test_values_are_kept_as_text_and_numbers():
    config = DistillationConfig.from_dict(DISTILLATION)
    assert config.temperature == 8
    assert isinstance(config.temperature, int)
    assert config.temperature_scheduler == ("flsw", 1, 2.5)
    assert config.kd_loss_weight_scheduler == "linear_decay"
    matches = config.intermediate_matches
    assert isinstance(matches, tuple)
    assert all(isinstance(match, IntermediateMatch) for match in matches)
    assert matches[0].proj is None
    assert matches[1].proj == ("linear", 384, 768, {})
    assert matches[2].proj[3] == {"lr": 1e-3, "betas": (0.9, 0.98), "nesterov": True}
    assert (matches[2].layer_T, matches[3].layer_S) == ((0, 0), -1)


@pytest.mark.parametrize("none", ["none", "".join(["no", "ne"]), None])
def test_none_is_compared_by_value(none):
    config = DistillationConfig(
        temperature_scheduler=none, kd_loss_weight_scheduler=none, hard_label_weight_scheduler=none
    )
    assert config == DistillationConfig()
    assert config.temperature_scheduler == "none"


def test_matches_may_be_objects_or_dicts():
    match = IntermediateMatch.from_dict(MATCH)
    config = DistillationConfig(intermediate_matches=[match, MATCH])
    assert config.intermediate_matches == (match, match)
    assert DistillationConfig(intermediate_matches=[]).intermediate_matches == ()
    assert DistillationConfig(intermediate_matches=(MATCH,)).intermediate_matches == (match,)


def test_an_empty_projection_is_none():
    assert IntermediateMatch(**MATCH, proj=[]).proj is None


def test_numpy_numbers_become_plain_ones():
    config = TrainingConfig(np.int64(2), fp16=np.bool_(True))
    assert type(config.gradient_accumulation_steps) is int
    assert config.fp16 is True
    config = DistillationConfig(np.float32(2.5), kd_loss_weight=np.int32(3))
    assert type(config.temperature) is float
    assert type(config.kd_loss_weight) is int
    json.dumps(config.to_dict())


def test_paths_become_text():
    config = TrainingConfig(output_dir=Path("a") / "b", log_dir=Path("c"))
    assert config.output_dir == os.path.join("a", "b")
    assert config.log_dir == "c"


def test_making_a_config_touches_no_disk(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    TrainingConfig(output_dir=tmp_path / "new", log_dir=tmp_path / "logs")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("device", ["cuda", "cuda:1", "gpu", "tpu", "cpu"])
def test_devices_are_text(device):
    assert TrainingConfig(device=device).device == device


@pytest.mark.torch
def test_a_torch_device_is_kept_as_text():
    import torch

    assert TrainingConfig(device=torch.device("cuda:1")).device == "cuda:1"


def test_a_jax_device_is_kept_as_text():
    assert TrainingConfig(device=jax.devices("cpu")[0]).device == "cpu:0"


# ------------------------------------------------------------------------- frozen, equal, printable


@pytest.mark.filterwarnings("ignore::jaxbrewer.errors.PortingWarning")
@pytest.mark.parametrize(("cls", "given"), EXAMPLES)
def test_round_trips(cls, given, tmp_path):
    config = cls.from_dict(given)
    assert config == cls(**given)
    assert cls.from_dict(config.to_dict()) == config
    assert json.loads(json.dumps(config.to_dict())) == config.to_dict()
    config.to_json_file(tmp_path / "config.json")
    again = cls.from_json_file(str(tmp_path / "config.json"))
    assert again == config
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
    for copied in (again, copy.deepcopy(config), pickle.loads(pickle.dumps(config))):
        assert copied == config
        assert hash(copied) == hash(config)
    assert dataclasses.replace(config) == config


def test_to_dict_gives_textbrewers_form():
    assert DistillationConfig.from_dict(DISTILLATION).to_dict() == DISTILLATION
    assert TrainingConfig.from_dict(TRAINING).to_dict() == TRAINING
    assert DistillationConfig().to_dict()["intermediate_matches"] == []
    assert IntermediateMatch(**MATCH).to_dict() == MATCH
    assert list(IntermediateMatch(**MATCH, proj=["linear", 3, 4]).to_dict()) == [*MATCH, "proj"]


@pytest.mark.torch
def test_what_to_dict_gives_textbrewer_takes():
    from textbrewer import configurations as reference

    config = DistillationConfig.from_dict(DISTILLATION)
    theirs = reference.DistillationConfig.from_dict(config.to_dict())
    assert theirs.intermediate_matches[1].proj == ["linear", 384, 768, {}]
    assert theirs.temperature == 8


@pytest.mark.parametrize(("cls", "given"), EXAMPLES)
def test_the_callers_values_are_neither_kept_nor_changed(cls, given):
    mine = copy.deepcopy(given)
    config = cls.from_dict(mine)
    assert mine == given
    before = config.to_dict()
    for value in mine.values():
        if isinstance(value, list):
            value.clear()
    mine.clear()
    assert config.to_dict() == before
    for value in config.to_dict().values():
        if isinstance(value, list):
            value.clear()
    assert config.to_dict() == before


def test_one_projection_list_can_be_shared():
    shared = ["linear", 3, 4]
    matches = [{**MATCH, "proj": shared}, {**MATCH, "layer_T": 0, "proj": shared}]
    DistillationConfig(intermediate_matches=matches)
    assert shared == ["linear", 3, 4]
    DistillationConfig(intermediate_matches=matches)


def test_configs_are_frozen():
    config = DistillationConfig.from_dict(DISTILLATION)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.temperature = 3
    options = config.intermediate_matches[2].proj[3]
    for change in (
        lambda: options.update(lr=1),
        lambda: options.pop("lr"),
        lambda: options.setdefault("x", 1),
        lambda: options.clear(),
        lambda: options.__setitem__("lr", 1),
        lambda: options.__delitem__("lr"),
        lambda: options.__ior__({"lr": 1}),
    ):
        with pytest.raises(TypeError, match="a config is frozen"):
            change()
    assert options["lr"] == 1e-3
    assert dict(**options)["nesterov"] is True


def test_equal_configs_hash_equal():
    assert DistillationConfig(temperature=4.0) == DistillationConfig(temperature=4)
    assert hash(DistillationConfig(temperature=4.0)) == hash(DistillationConfig())
    assert DistillationConfig(temperature=5) != DistillationConfig()
    assert len({TrainingConfig(), TrainingConfig(), TrainingConfig(seed=1)}) == 2


def test_text_forms():
    text = str(DistillationConfig.from_dict(DISTILLATION))
    assert text.startswith("DistillationConfig\n  temperature: 8\n")
    assert "temperature_scheduler: ['flsw', 1, 2.5]" in text
    assert "proj: ['linear', 384, 768]" in text
    assert "layer_T: [0, 0], layer_S: [0, 0]" in text
    assert str(TrainingConfig(log_dir="runs")).count("\n") == 20
    config = TrainingConfig.from_dict(TRAINING)
    assert eval(repr(config)) == config
    config = DistillationConfig.from_dict(DISTILLATION)
    assert eval(repr(config)) == config


# ---------------------------------------------------------------------------------------- mistakes


def test_an_unknown_key_suggests_the_nearest():
    expected = "unknown key 'ckpt_freqency'; did you mean 'ckpt_frequency'?"
    assert problems_of(lambda: TrainingConfig.from_dict({"ckpt_freqency": 1})) == (expected,)
    with pytest.raises(TypeError, match=r"TrainingConfig: unknown key.*did you mean"):
        TrainingConfig(ckpt_freqency=1)
    with pytest.raises(TypeError, match=r"IntermediateMatch: .*did you mean 'layer_T'"):
        IntermediateMatch(layer_t=3, **MATCH)
    (problem,) = problems_of(lambda: TrainingConfig.from_dict({3: 1}))
    assert problem.startswith("unknown key 3; choose from 'gradient_accumulation_steps', ")
    far, near = problems_of(lambda: TrainingConfig.from_dict({3: 1, "sed": 2, "zzz": 3}))
    assert far.startswith("unknown keys 3, 'zzz'; choose from 'gradient_accumulation_steps', ")
    assert near == "unknown key 'sed'; did you mean 'seed'?"


def test_what_belongs_elsewhere_is_told_where():
    with pytest.raises(TypeError, match=r"'lr'; it belongs to the optimizer: functools.partial"):
        TrainingConfig(lr=1e-4)
    with pytest.raises(
        ConfigError, match=r"'num_train_epochs'; it is an argument of train: .*num_epochs"
    ):
        TrainingConfig.from_dict({"num_train_epochs": 3})


@pytest.mark.parametrize("config", [TrainingConfig, DistillationConfig, IntermediateMatch])
def test_every_field_has_its_check(config):
    assert list(config._checks) == [field.name for field in dataclasses.fields(config)]


def test_everything_wrong_is_in_one_report():
    given = {
        "temprature": 3,
        "temperature": 0,
        "kd_loss_weight": math.nan,
        "temperature_scheduler": "flsw",
        "intermediate_matches": [
            MATCH,
            {**MATCH, "feature": "hiden", "weight": "1"},
            {"layer_T": 0, "layer_S": [0, 0], "loss": "cos", "feature": "hidden"},
            None,
        ],
    }
    with pytest.raises(ConfigError) as caught:
        DistillationConfig.from_dict(given)
    assert caught.value.problems == (
        "temperature is 0: expected a number above 0",
        "kd_loss_weight is nan: expected a finite number",
        "temperature_scheduler is 'flsw': 'flsw' takes arguments: write ['flsw', beta, gamma]",
        "intermediate_matches[1]: weight is '1': expected a number",
        "intermediate_matches[1]: feature is 'hiden': did you mean 'hidden'?",
        "intermediate_matches[2]: layer_T is 0 and layer_S is [0, 0]: "
        "expected one layer on both sides, or two on both",
        "intermediate_matches[2]: missing key 'weight'",
        "intermediate_matches[3]: expected a dict, got None",
        "unknown key 'temprature'; did you mean 'temperature'?",
    )
    text = str(caught.value)
    assert text.startswith("DistillationConfig has 9 problems:\n  - ")
    assert text.count("\n  - ") == 9


def test_a_report_can_be_pickled():
    error = ConfigError("TrainingConfig", ["one", "two"])
    again = pickle.loads(pickle.dumps(error))
    assert str(again) == str(error) == "TrainingConfig has 2 problems:\n  - one\n  - two"


POSITIVE_INTEGERS = ["gradient_accumulation_steps", "ckpt_frequency", "ckpt_epoch_frequency"]


@pytest.mark.parametrize("name", [*POSITIVE_INTEGERS, "ckpt_steps", "max_to_keep"])
@pytest.mark.parametrize("value", [0, -1, 1.0, True, np.True_, "1", [1], math.nan, 2**31])
def test_steps_and_frequencies_are_positive_integers(name, value):
    (problem,) = problems_of(lambda: TrainingConfig(**{name: value}))
    assert problem.startswith(f"{name} is {value!r}: expected an integer from 1 to 2147483647")


@pytest.mark.parametrize("name", POSITIVE_INTEGERS)
def test_steps_and_frequencies_cannot_be_none(name):
    assert problems_of(lambda: TrainingConfig(**{name: None}))


def test_optional_steps_say_that_none_will_do():
    (problem,) = problems_of(lambda: TrainingConfig(ckpt_steps=0))
    assert problem.endswith(", or None")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("log_dir", 3, "expected the name of a folder, or None"),
        ("log_dir", "", "expected the name of a folder"),
        ("output_dir", None, "expected the name of a folder"),
        ("output_dir", b"x", "expected the name of a folder"),
        ("output_dir", "a\0b", "expected the name of a folder"),
        ("device", "cuda0", "expected 'cuda', 'gpu', 'tpu' or 'cpu'"),
        ("device", None, "expected 'cuda', 'gpu', 'tpu' or 'cpu'"),
        ("fp16", 1, "expected True or False"),
        ("fp16", "True", "expected True or False"),
        ("fp16_opt_level", "O4", "choose from 'O0', 'O1', 'O2', 'O3'"),
        ("fp16_opt_level", "o1", "did you mean 'O1'?"),
        ("fp16_opt_level", 7, "choose from 'O0', 'O1', 'O2', 'O3'"),
        ("data_parallel", None, "expected True or False"),
        ("local_rank", -2, "expected an integer from -1"),
        ("seed", -1, "expected an integer from 0 to 4294967295"),
        ("seed", 2**32, "expected an integer from 0 to 4294967295"),
        ("resume", "yes", "the name of a checkpoint"),
    ],
)
def test_wrong_training_values(name, value, expected):
    (problem,) = problems_of(lambda: TrainingConfig.from_dict({name: value}))
    assert problem.startswith(f"{name} is ")
    assert expected in problem


def test_the_largest_seed_is_taken():
    assert TrainingConfig(seed=2**32 - 1).seed == 2**32 - 1


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("temperature", -1, "expected a number above 0"),
        ("temperature", math.inf, "expected a finite number"),
        ("temperature", 10**400, "expected a finite number"),
        ("temperature", True, "expected a number"),
        ("temperature", "4", "expected a number"),
        ("temperature", None, "expected a number"),
        ("temperature", np.float64("nan"), "expected a finite number"),
        ("hard_label_weight", math.nan, "expected a finite number"),
        ("kd_loss_weight", [1], "expected a number"),
        ("kd_loss_type", 3, "expected a name"),
        ("kd_loss_type", "", "expected a name"),
        ("kd_loss_weight_scheduler", "linear_grwth", "did you mean 'linear_growth'?"),
        ("hard_label_weight_scheduler", "zzz", "choose from 'none', 'linear_decay'"),
        ("hard_label_weight_scheduler", ["linear_decay", 1], "'linear_decay' takes no options"),
        ("hard_label_weight_scheduler", ["step", {"on": 1}], "no option 'on': choose from"),
        ("hard_label_weight_scheduler", ["step", 2], "at must be a fraction"),
        ("kd_loss_weight_scheduler", ["linear", {"begin": 0.6, "until": 0.5}], "end after until"),
        ("base_temperature_scheduler", ["cosin"], "did you mean 'cosine'?"),
        ("kd_loss_type", [], "a list of a name and its options"),
        ("kd_loss_type", [["jsd"]], "a list of a name and its options"),
        ("kd_loss_type", ["jsd", float("nan")], "finite numbers"),
        ("temperature_scheduler", "flws", "did you mean 'flsw'?"),
        ("temperature_scheduler", "cwsm", "write ['cwsm', beta]"),
        ("temperature_scheduler", ["flsw"], "missing 2 required positional arguments"),
        ("temperature_scheduler", ["flsw", 1], "missing 1 required positional argument: 'gamma'"),
        ("temperature_scheduler", ["flsw", 1, 2, 3, 4], "takes from 2 to 3"),
        ("temperature_scheduler", ["flsw", "1", 2], "beta must be a number"),
        ("temperature_scheduler", ["flsw", {"beta": 1, "gama": 2}], "unexpected keyword"),
        ("temperature_scheduler", ["cwsm", math.nan], "expected finite numbers, text"),
        ("temperature_scheduler", ["cwsm", {1: 2}], "expected text as the keys"),
        ("temperature_scheduler", ["constant"], "write 'constant'"),
        ("temperature_scheduler", ["xyz", 1], "choose from 'none', 'constant'"),
        ("temperature_scheduler", [["flsw"], 1], "'flsw'"),
        ("temperature_scheduler", [], "expected a name or a list"),
        ("temperature_scheduler", 3, "expected a name or a list"),
        ("probability_shift", 0, "expected True or False"),
        ("is_caching_logits", "no", "expected True or False"),
        ("intermediate_matches", MATCH, "must be a list of dicts"),
        ("intermediate_matches", "hidden", "must be a list of dicts"),
    ],
)
def test_wrong_distillation_values(name, value, expected):
    (problem,) = problems_of(lambda: DistillationConfig.from_dict({name: value}))
    assert problem.startswith(name)
    assert expected in problem


@pytest.mark.parametrize("weight", [-1, 0, 1e6, -0.5])
def test_weights_are_any_finite_number(weight):
    config = DistillationConfig(kd_loss_weight=weight, hard_label_weight=weight)
    assert config.kd_loss_weight == config.hard_label_weight == weight
    assert IntermediateMatch(**{**MATCH, "weight": weight}).weight == weight


def test_a_registered_temperature_must_build_a_function(monkeypatch):
    monkeypatch.setitem(presets.TEMPERATURE_SCHEDULER, "mine", lambda a=1: a)
    (problem,) = problems_of(lambda: DistillationConfig(temperature_scheduler=["mine", 2]))
    assert "'mine' built 2, not a function of (S, T, base_temperature)" in problem
    (problem,) = problems_of(lambda: DistillationConfig(temperature_scheduler=["mine", 2, 3]))
    assert "'mine' refuses its arguments" in problem
    assert DistillationConfig(temperature_scheduler="mine").temperature_scheduler == "mine"


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"layer_T": 1.0}, "layer_T is 1.0: expected a layer's index or a list of two"),
        ({"layer_T": True}, "layer_T is True: expected a layer's index"),
        ({"layer_S": "2"}, "layer_S is '2': expected a layer's index"),
        ({"layer_T": [1], "layer_S": [1, 1]}, "layer_T is [1]: expected"),
        ({"layer_T": [1, 2], "layer_S": [1, 2, 3]}, "layer_S is [1, 2, 3]: expected"),
        ({"layer_T": [1, None], "layer_S": [1, 2]}, "layer_T is [1, None]: expected"),
        ({"layer_T": [1, 2]}, "layer_T is [1, 2] and layer_S is 2: expected one layer on both"),
        ({"weight": math.inf}, "weight is inf: expected a finite number"),
        ({"loss": hash}, "loss is <built-in function hash>: expected a name"),
        ({"feature": "Hidden"}, "feature is 'Hidden': did you mean 'hidden'?"),
        ({"feature": ["hidden"]}, "feature is ['hidden']: "),
        ({"proj": "linear"}, "proj is 'linear': expected [name, width of the student"),
        ({"proj": ["linear", 3]}, "expected [name, width of the student"),
        ({"proj": ["linear", 3, 4, {}, 5]}, "expected [name, width of the student"),
        ({"proj": ["liner", 3, 4]}, "unknown projection 'liner'; did you mean 'linear'?"),
        ({"proj": [3, 3, 4]}, "unknown projection 3; choose from 'linear', 'relu', 'tanh'"),
        ({"proj": ["linear", 0, 4]}, "expected integers above 0 as the two widths"),
        ({"proj": ["linear", 3, 4.0]}, "expected integers above 0 as the two widths"),
        ({"proj": ["linear", 3, 4, 1e-3]}, "expected a dict of optimizer options"),
        ({"proj": ["linear", 3, 4, {1: 2}]}, "expected text as the keys of options"),
        ({"proj": ["linear", 3, 4, {"lr": math.nan}]}, "expected finite numbers"),
        ({"proj": ["linear", 3, 4, {"lr": abs}]}, "not <built-in function abs>"),
    ],
)
def test_wrong_match_values(change, expected):
    (problem,) = problems_of(lambda: IntermediateMatch.from_dict({**MATCH, **change}))
    assert expected in problem


def test_a_match_lacks_keys():
    assert problems_of(lambda: IntermediateMatch.from_dict({"layer_T": 1})) == (
        "missing key 'layer_S'",
        "missing key 'weight'",
        "missing key 'loss'",
        "missing key 'feature'",
    )


def test_options_without_end_are_refused():
    options = {}
    options["again"] = options
    (problem,) = problems_of(lambda: IntermediateMatch(**MATCH, proj=["linear", 3, 4, options]))
    assert "expected at most 16 lists and dicts inside each other" in problem


def test_long_values_are_cut_in_reports():
    (problem,) = problems_of(lambda: DistillationConfig(temperature="9" * 10_000))
    assert len(problem) < 200


@pytest.mark.parametrize("given", [None, 3, "text", [("temperature", 3)]])
def test_only_a_dict_is_a_dict(given):
    (problem,) = problems_of(lambda: DistillationConfig.from_dict(given))
    assert problem.startswith("expected a dict, got")


# -------------------------------------------------------------------------------------------- files


def write(tmp_path, content):
    path = tmp_path / "train.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def test_a_file_may_spell_none_out_and_begin_with_a_byte_order_mark(tmp_path):
    text = '\ufeff{"temperature_scheduler": "none", "kd_loss_weight_scheduler": "none"}'
    assert DistillationConfig.from_json_file(write(tmp_path, text)) == DistillationConfig()


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ('{\n  "seed": 1,\n  "fp16": tru\n}', "line 3, column 11: not JSON: Expecting value"),
        ("", "line 1, column 1: not JSON"),
        ("[1, 2]", r"expected a dict, got \[1, 2\]"),
        ("null", "expected a dict, got None"),
        ('{"seed": 1, "seed": 2}', "the key 'seed' is there twice"),
        ('{"sed": 1}', "unknown key 'sed'; did you mean 'seed'"),
        ('{"seed": NaN}', "seed is nan: expected an integer"),
        ('{"seed": 1e999}', "seed is inf: expected an integer"),
        ('{"seed": ' + "9" * 5000 + "}", "cannot be used as JSON"),
        ("[" * 100_000, "cannot be used as JSON|not JSON"),
        (b'{"seed": "\xff"}', "the file cannot be read"),
    ],
)
def test_a_bad_file_is_named_with_what_is_wrong(tmp_path, content, expected):
    path = write(tmp_path, content)
    with pytest.raises(ConfigError, match=expected) as caught:
        TrainingConfig.from_json_file(path)
    assert str(caught.value).startswith(f"TrainingConfig in {path}")


def test_problems_in_a_file_are_listed_under_its_name(tmp_path):
    path = write(tmp_path, '{"seed": -1, "resume": 3}')
    with pytest.raises(ConfigError, match=r"train.json has 2 problems:\n  - seed"):
        TrainingConfig.from_json_file(path)


def test_a_missing_file_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"no such file \(.*nowhere.json\)"):
        TrainingConfig.from_json_file("nowhere.json")


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="is a folder, expected a file"):
        TrainingConfig.from_json_file(tmp_path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    TrainingConfig(seed=1).to_json_file(path)

    def full(*args):
        raise OSError("no space left")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space left"):
        TrainingConfig(seed=2).to_json_file(path)
    assert TrainingConfig.from_json_file(path).seed == 1
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


# --------------------------------------------------------------------------------------------- fuzz

JUNK = [
    *(None, True, False, 0, 1, -1, 2, 10**400, 0.5, -0.0, math.nan, math.inf, 1e308, "", "none"),
    *("hidden", "flsw", "O1", "O9", "cuda:1", "x" * 3000, "\0", "\ud800", [], {}, [[]], [None]),
    *([1, 2], ["flsw", 1, 2], ["flsw", {"beta": 1}], ["cwsm", [1]], {"a": 1}, {1: 2}, (1, 2)),
    *({"lr": {"lr": {"lr": []}}}, [0] * 50, ["linear", 3, 4, {"lr": 1}], b"bytes", 1j, object()),
    *(np.float32(2), np.int8(3), np.zeros(2), np.array(4), float, len, {1, 2}, range(3)),
]
KEYS = [None, 1, "", "temprature", "Layer_T", "proj", "seed", "weight", ("a",), b"seed", math.nan]


def mutate(rng, value):
    """Puts junk at a random place of a nest of dicts and lists, or takes a part of it away."""
    kinds = list(value) if isinstance(value, dict) else list(range(len(value)))
    key = rng.choice(kinds) if kinds else None
    deeper = isinstance(value[key], dict | list) and value[key] if kinds else False
    if deeper and rng.random() < 0.6:
        mutate(rng, value[key])
        return
    action = rng.choice(["junk", "junk", "junk", "drop", "new", "twice", "text"])
    junk = rng.choice(JUNK)
    if not kinds or (action == "new" and isinstance(value, dict)):
        value.update({rng.choice(KEYS): junk}) if isinstance(value, dict) else value.append(junk)
    elif action == "drop":
        del value[key]
    elif action == "twice" and isinstance(value, list):
        value.append(copy.deepcopy(value[key]))
    elif action == "text":
        value[key] = str(value[key])
    else:
        value[key] = copy.deepcopy(junk)


@pytest.mark.filterwarnings("ignore::jaxbrewer.errors.PortingWarning")
def test_a_thousand_mutated_dicts_give_a_config_or_a_report(tmp_path):
    rng = random.Random(0)
    outcomes = {"config": 0, "report": 0}
    for i in range(1000):
        cls, given = rng.choice(EXAMPLES)
        mutated = copy.deepcopy(given)
        for _ in range(rng.choice([1, 1, 1, 1, 2, 5])):
            mutate(rng, mutated)
        try:
            config = cls.from_dict(mutated)
        except ConfigError as error:
            assert error.problems
            assert str(error).startswith(cls.__name__)
            outcomes["report"] += 1
            continue
        outcomes["config"] += 1
        assert cls.from_dict(config.to_dict()) == config
        assert str(config)
        hash(config)
        config.to_json_file(tmp_path / f"{i}.json")
        assert cls.from_json_file(tmp_path / f"{i}.json") == config
    assert min(outcomes.values()) > 50, outcomes


def test_a_thousand_mutated_files_give_a_config_or_a_report(tmp_path):
    rng, path = random.Random(1), tmp_path / "config.json"
    texts = [(cls, json.dumps(given, indent=1).encode()) for cls, given in EXAMPLES]
    for _ in range(1000):
        cls, text = rng.choice(texts)
        content = bytearray(text)
        for _ in range(rng.choice([1, 1, 2, 8])):
            at = rng.randrange(len(content))
            how = rng.choice(["flip", "cut", "insert"])
            if how == "flip":
                content[at] = rng.randrange(256)
            elif how == "cut":
                del content[at : at + rng.choice([1, 2, 20])]
            else:
                content[at:at] = rng.choice([b'"', b"{", b"]", b",", b"9", b"null", b"\\u0000"])
            content = content or bytearray(b"{}")
        path.write_bytes(content)
        try:
            assert isinstance(cls.from_json_file(path), cls)
        except ConfigError as error:
            assert str(path) in str(error)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"kd_loss_type": ["jsd", 0.1]}, "a list as kd_loss_type"),
        ({"monitor": True}, "monitor"),
        ({"base_temperature_scheduler": "linear"}, "base_temperature_scheduler"),
        ({"hard_label_weight_scheduler": ["step", 0.5]}, "a list as hard_label_weight_scheduler"),
        (
            {
                "intermediate_matches": [
                    {"layer_T": 1, "layer_S": 1, "feature": "hidden", "loss": ["cka"], "weight": 1},
                    {
                        "layer_T": 1,
                        "layer_S": 1,
                        "feature": "hidden",
                        "loss": ["infonce", 1],
                        "weight": 1,
                    }
                    | {"weight_scheduler": "linear_decay"},
                ]
            },
            r"intermediate_matches\[1\].weight_scheduler, a list as intermediate_matches\[1\].loss",
        ),
    ],
)
def test_what_textbrewer_could_not_read_is_named(given, named, tmp_path):
    config = DistillationConfig.from_dict(given)
    with pytest.warns(
        PortingWarning, match=rf"TextBrewer cannot read .*: only jaxbrewer has {named}$"
    ):
        config.to_json_file(tmp_path / "config.json")
    assert DistillationConfig.from_json_file(tmp_path / "config.json") == config
