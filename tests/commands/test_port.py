"""``jaxbrewer port``: every kind of file, what is said of each field, what is written, a fuzz."""

import ast
import importlib
import inspect
import json
import random
import re
from pathlib import Path

import numpy as np
import pytest
from flax import nnx

from jaxbrewer import DistillationConfig, TrainingConfig, presets, training, zoo
from jaxbrewer.__main__ import main
from jaxbrewer.commands.port import documents as porting
from jaxbrewer.commands.port import verdicts as port
from jaxbrewer.commands.port.literals import parse, written_configs
from jaxbrewer.commands.port.verdicts import Run, Verdict
from jaxbrewer.data.batches import own
from jaxbrewer.preflight import prepare
from jaxbrewer.training.request import make_factor, make_timeline
from jaxbrewer.zoo import BertConfig

from ..test_presets import OURS

# ------------------------------------------------------------------ files as TextBrewer's users have

TRAINING = {
    "gradient_accumulation_steps": 2,
    "ckpt_frequency": 4,
    "ckpt_epoch_frequency": 2,
    "ckpt_steps": 500,
    "log_dir": "logs",
    "output_dir": "models",
    "device": "cpu",
}
HIDDEN = [
    {"layer_T": 4 * i, "layer_S": i, "feature": "hidden", "loss": "hidden_mse", "weight": 1}
    for i in range(4)
]
GRAM = [
    {"layer_T": [3 * i] * 2, "layer_S": [i] * 2, "feature": "hidden", "loss": "gram", "weight": 1}
    | {"proj": ["linear", 312, 768]}
    for i in range(5)
]
DISTILLATION = {
    "temperature": 8,
    "temperature_scheduler": ["flsw", 1, 2],
    "hard_label_weight": 0.5,
    "hard_label_weight_scheduler": "linear_decay",
    "kd_loss_type": "mse",
    "kd_loss_weight": 2,
    "kd_loss_weight_scheduler": "linear_growth",
    "probability_shift": True,
    "is_caching_logits": True,
    "intermediate_matches": HIDDEN + GRAM,
}
STUDENT = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 384,
    "initializer_range": 0.02,
    "intermediate_size": 1536,
    "max_position_embeddings": 512,
    "num_attention_heads": 12,
    "num_hidden_layers": 3,
    "type_vocab_size": 2,
    "vocab_size": 21128,
}
CHINESE = STUDENT | {
    "directionality": "bidi",
    "pooler_fc_size": 768,
    "pooler_num_attention_heads": 12,
    "pooler_num_fc_layers": 3,
    "pooler_size_per_head": 128,
    "pooler_type": "first_token_transform",
}
MEMBER = {
    "model_type": "bert",
    "prefix": "bertuncased",
    "vocab_file": "vocab.txt",
    "config_file": "student.json",
    "checkpoint": None,
    "tokenizer_kwargs": {"do_lower_case": True},
    "disable": False,
}
JOB = {"teachers": [MEMBER, MEMBER, MEMBER | {"disable": True}], "student": MEMBER}
EMD = {
    "layer_num_S": 5,
    "layer_num_T": 13,
    "feature": "hidden",
    "loss": "hidden_mse",
    "weight": 1.0,
    "proj": ["linear", 312, 768],
}
SCRIPT = """
import torch, textbrewer
from textbrewer import TrainingConfig, DistillationConfig as DC
from transformers import AdamW, BertForSequenceClassification, get_linear_schedule_with_warmup

device = torch.device("cuda", 1)
L3 = [{"layer_T": 0, "layer_S": 0, "feature": "hidden", "loss": "hidden_mse", "weight": 1}]
matches = {"L3": L3}

class Mine(textbrewer.GeneralDistiller):
    def train_on_batch(self, batch, args):
        return 1

def main(args):
    bert_config.output_hidden_states = True
    train_config = TrainingConfig(2, device=device, log_dir="log", output_dir=args.output_dir)
    distill_config = DC(temperature=2 + 6, intermediate_matches=matches["L3"] + [
        {"layer_T": [8, 8], "layer_S": [2, 2], "feature": "hidden", "loss": "nst", "weight": 1}])
    model = BertForSequenceClassification(bert_config)
    other = textbrewer.DistillationConfig(**{"kd_loss_type": "mse"})
    optimizer = AdamW(model.parameters(), lr=1e-4)
    distiller = Mine(train_config, distill_config, model, model, adaptor, adaptor)
    distiller.train(optimizer, loader, num_epochs=1, scheduler_class=get_linear_schedule_with_warmup)
"""


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Writes the files into the working folder."""
    monkeypatch.chdir(tmp_path)
    contents = {
        "train": TRAINING,
        "distill": DISTILLATION,
        "matches": HIDDEN,
        "student": STUDENT,
        "chinese": CHINESE,
        "job": JOB,
        "emd": EMD,
        "both": TRAINING | DISTILLATION,
        "nested": {"train_config": TRAINING, "distill_config": DISTILLATION, "lr": 1e-4},
    }
    for name, value in contents.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(value))
    (tmp_path / "script.py").write_text(SCRIPT)
    return tmp_path


@pytest.fixture
def run(capsys):
    """Runs the command; gives the exit code and all that was printed, lines joined."""

    def call(*argv):
        capsys.readouterr()
        code = main(list(map(str, argv)))
        printed = capsys.readouterr()
        return code, re.sub(r"\s+", " ", printed.out + printed.err)

    return call


# ----------------------------------------------------------------------------------- whole files


@pytest.mark.parametrize(
    ("name", "code", "expected"),
    [
        ("train.json", 0, "training config (TrainingConfig)"),
        ("distill.json", 0, "distillation config (DistillationConfig)"),
        ("matches.json", 0, "match 3: hidden T12 → S3 by hidden_mse, weight 1"),
        ("student.json", 0, "model config (BertConfig)"),
        ("chinese.json", 0, "pooler_fc_size"),
        ("job.json", 0, "several: MultiTeacherDistiller"),
        ("emd.json", 0, "EMDDistiller"),
        ("both.json", 0, "both.json: distillation config"),
        ("nested.json", 0, "'lr' not TextBrewer's; left to you"),
        ("script.py", 1, "args.output_dir is not a literal"),
    ],
)
def test_a_file_is_recognised_by_its_keys(files, run, name, code, expected):
    assert expected in run("port", name)[1]
    assert run("port", name)[0] == code


def test_what_is_written_is_the_config(files, run):
    code, printed = run("port", "train.json", "distill.json", "student.json", "--out", "new/er")
    assert code == 0
    assert "written to new/er/train.json" in printed
    assert TrainingConfig.from_json_file("new/er/train.json") == TrainingConfig(**TRAINING)
    assert DistillationConfig.from_json_file("new/er/distill.json") == DistillationConfig(
        **DISTILLATION
    )
    assert BertConfig.from_json_file("new/er/student.json") == BertConfig.from_dict(STUDENT)


def test_several_documents_of_a_file_get_names_of_their_own(files, run):
    run("port", "both.json", "nested.json", "script.py", "job.json", "emd.json", "--out", "new")
    written = sorted(path.name for path in (files / "new").iterdir())
    assert written == [
        "both.distillation.json",
        "both.training.json",
        "emd.json",
        "job.models.student.json",
        "job.models.teacher1.json",
        "job.models.teacher2.json",
        "nested.distillation.json",
        "nested.training.json",
        "script.distillation.2.json",
        "script.distillation.json",
        "script.training.json",
    ]
    assert json.loads((files / "new" / "emd.json").read_text()) == EMD


def test_files_of_one_name_do_not_overwrite_each_other(files, run):
    (files / "a").mkdir()
    (files / "a" / "train.json").write_text('{"ckpt_frequency": 7}')
    run("port", "train.json", "a/train.json", "--out", "new")
    assert TrainingConfig.from_json_file("new/train.json").ckpt_frequency == 4
    assert TrainingConfig.from_json_file("new/train.2.json").ckpt_frequency == 7


def test_an_input_is_never_overwritten(files, run):
    before = (files / "train.json").read_text()
    code, printed = run("port", "train.json", "--out", ".")
    assert code == 2
    assert "train.json is an input" in printed
    assert (files / "train.json").read_text() == before


@pytest.mark.torch
def test_textbrewer_reads_every_config_that_is_written(files, run):
    import textbrewer

    code, _ = run("port", "train.json", "distill.json", "student.json", "--out", "new")
    assert code == 0
    textbrewer.TrainingConfig.from_json_file(str(files / "new" / "train.json"))
    theirs = textbrewer.DistillationConfig.from_json_file(str(files / "new" / "distill.json"))
    ours = DistillationConfig.from_json_file(files / "new" / "distill.json")
    assert theirs.temperature == ours.temperature
    assert len(theirs.intermediate_matches) == len(ours.intermediate_matches) > 0


def test_an_invalid_config_is_not_written(files, run):
    (files / "bad.json").write_text('{"temperature": -1, "kd_loss_typ": "ce"}')
    code, printed = run("port", "bad.json", "--out", "new")
    assert code == 1
    assert "temperature is -1: expected a number above 0" in printed
    assert "did you mean 'kd_loss_type'?" in printed
    assert not list((files / "new").iterdir())


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("x.json", '{"temperature": 8,}', "line 1, column 19: not JSON"),
        ("x.json", '{"temperature": 8, "temperature": 4}', "'temperature' is there twice"),
        ("x.json", "[" * 100_000, "cannot be used as JSON"),
        ("x.json", "1" * 5000, "cannot be used as JSON"),
        ("x.json", '{"a": 1}', "nothing of TextBrewer's was found"),
        ("x.json", "[1, 2]", "nothing of TextBrewer's was found"),
        ("x.json", "null", "nothing of TextBrewer's was found"),
        ("x.json", b"\xff\xfe\x00", "cannot be read"),
        ("x.py", "def", "line 1: not Python"),
        ("x.py", "x = 1", "are written out in it"),
        ("x.py", "x = " + "(" * 5000, "x.py:"),
        ("x.py", "a\0b", "x.py:"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, run, name, content, expected):
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / name).write_bytes(data)
    code, printed = run("port", tmp_path / name)
    assert code == 2
    assert expected in printed


def test_missing_files_and_folders_are_told_apart(files, run):
    code, printed = run("port", "nowhere.json")
    assert code == 2
    assert printed.startswith("jaxbrewer: nowhere.json: there is no such file (")
    assert "is a folder" in run("port", files)[1]
    assert run("port", "train.json", "--out", "train.json/x")[0] == 2


# -------------------------------------------------------------------------------- field by field


def verdicts(ported):
    return {finding.name: finding.verdict for finding in ported.findings}


def test_every_training_field_has_something_to_say():
    values = TRAINING | {
        "device": "cuda:1",
        "fp16": True,
        "fp16_opt_level": "O2",
        "local_rank": 0,
        "seed": 1,
        "resume": True,
        "max_to_keep": 2,
        "mapping": "pmap",
    }
    ported = port.training_config(values)
    (parallel,) = verdicts(port.training_config({"data_parallel": True})).keys() & {"data_parallel"}
    assert set(verdicts(ported)) == {*values, "checkpoints"} - {parallel}
    assert all(finding.text for finding in ported.findings)
    assert ported.defaults == ["data_parallel=False"]
    assert ported.result == TrainingConfig(**values)


def test_every_distillation_field_has_something_to_say():
    ported = port.distillation_config(DISTILLATION)
    matches = {f"match {i}" for i in range(9)}
    assert set(verdicts(ported)) == set(DISTILLATION) - {"intermediate_matches"} | matches
    assert ported.defaults == []
    assert Verdict.BY_HAND not in verdicts(ported).values()


def test_defaults_are_summarised():
    assert verdicts(port.distillation_config({})) == {}
    assert "temperature=4" in port.distillation_config({}).defaults
    training = port.training_config({"ckpt_frequency": 1})
    assert set(verdicts(training)) == {"output_dir", "device", "checkpoints"}
    assert "ckpt_frequency=1" in training.defaults
    assert "seed=0" not in training.defaults


@pytest.mark.parametrize(("level", "word"), [("O0", "everything in float32"), ("O3", "without")])
def test_the_level_becomes_dtypes(level, word):
    ported = port.training_config({"fp16": True, "fp16_opt_level": level})
    assert word in next(f.text for f in ported.findings if f.name == "fp16")


def test_half_precision_is_ported():
    ported = port.training_config({"fp16": True, "half_dtype": "float16", "device": "cpu"})
    found = verdicts(ported)
    assert found["fp16"] is Verdict.CHANGED and found["half_dtype"] is Verdict.SAME
    assert "dynamic" in next(f.text for f in ported.findings if f.name == "fp16")


def test_a_level_without_fp16_has_no_meaning():
    ported = port.training_config({"fp16_opt_level": "O2"})
    assert verdicts(ported)["fp16_opt_level"] is Verdict.MEANINGLESS


@pytest.mark.parametrize(
    ("values", "run", "expected"),
    [
        ({"ckpt_frequency": 2}, Run(batches=10, epochs=2), "at step 5, 10, 15, 20"),
        ({"gradient_accumulation_steps": 3}, Run(batches=10), "1 in 3 optimizer steps: at step 3"),
        ({"ckpt_epoch_frequency": 2}, Run(batches=4, epochs=3), "at step 8, 12"),
        ({"ckpt_steps": 4}, Run(steps=10), "at step 4, 8, 10"),
        ({}, Run(steps=10), "1 in 10 optimizer steps: at step 10"),
        ({"gradient_accumulation_steps": 9}, Run(batches=8), "nothing would be trained"),
        ({"ckpt_frequency": 3}, None, "at step int(1·n/3), int(2·n/3) and n of an epoch"),
        ({"ckpt_steps": 4}, None, "every 4 steps and at the end"),
    ],
)
def test_checkpoints_become_steps(values, run, expected):
    ported = port.training_config(values, run)
    assert expected in next(f.text for f in ported.findings if f.name == "checkpoints")


@pytest.mark.parametrize(
    ("match", "verdict", "expected"),
    [
        ({"loss": "nst"}, Verdict.BY_HAND, "'layer_T': [1, 1], 'layer_S': [0, 0]"),
        (
            {"loss": "nst", "layer_T": [1, 1], "layer_S": [0, 0], "proj": ["relu", 4, 8]},
            Verdict.CHANGED,
            "relu projection of the student's 4 to the teacher's 8. With an inputs_mask",
        ),
        ({"loss": "mine"}, Verdict.BY_HAND, "MATCH_LOSS_MAP"),
        ({"loss": "hiden_mse"}, Verdict.BY_HAND, "did you mean 'hidden_mse'?"),
        ({"layer_T": [1, 1], "layer_S": [0, 0]}, Verdict.BY_HAND, "one layer a side"),
        ({"proj": ["relu", 4, 8]}, Verdict.SAME, "relu projection of the student's 4"),
        ({"proj": ["linear", 4, 8, {"lr": 1}]}, Verdict.CHANGED, "pass a factory"),
    ],
)
def test_each_match_is_looked_at(match, verdict, expected):
    whole = {"layer_T": 1, "layer_S": 0, "feature": "hidden", "loss": "cos", "weight": 1} | match
    (finding,) = port.matches([whole]).findings
    assert finding.verdict is verdict
    assert expected in finding.text


def test_registered_losses_are_known(monkeypatch):
    monkeypatch.setitem(presets.KD_LOSS_MAP, "mine", lambda S, T, temperature: 0)
    monkeypatch.setitem(presets.MATCH_LOSS_MAP, "mine", lambda S, T, mask=None: 0)
    two = {"layer_T": [1, 1], "layer_S": [0, 0], "feature": "hidden", "weight": 1}
    ported = port.distillation_config(
        {"kd_loss_type": "mine", "intermediate_matches": [two | {"loss": "mine"}]}
    )
    assert set(verdicts(ported).values()) == {Verdict.SAME}


def test_an_unknown_kd_loss_needs_a_hand():
    assert verdicts(port.distillation_config({"kd_loss_type": "kll"})) == {
        "kd_loss_type": Verdict.BY_HAND
    }


def test_a_name_that_is_only_ours_may_be_another_loss_there():
    match = {"layer_T": 1, "layer_S": 0, "feature": "hidden", "weight": 1, "loss": "cka"}
    ported = port.distillation_config({"kd_loss_type": "kl", "intermediate_matches": [match]})
    assert set(verdicts(ported).values()) == {Verdict.CHANGED}


def test_the_losses_of_textbrewer_are_told_from_ours():
    """What its tables hold, as the tests of the tables compare them live."""
    theirs = set(port._THEIR_KD_LOSSES) | set(port._THEIR_MATCH_LOSSES)
    everything = set(presets.KD_LOSS_MAP) | set(presets.MATCH_LOSS_MAP)
    assert everything - theirs == OURS["kd_loss"] | OURS["match_Loss"]


def test_attention_matches_say_how_layers_are_counted():
    match = {"layer_T": 3, "layer_S": 0, "feature": "attention", "loss": "attention_mse"}
    ported = port.matches([match | {"weight": 1}])
    assert "0 is the first layer" in ported.findings[-1].text


def test_a_model_of_another_kind_needs_a_hand():
    ported = porting.port_model(STUDENT | {"model_type": "xlnet"})
    assert "the zoo has bert" in ported.findings[0].text
    assert porting.port_model(STUDENT | {"hidden_sise": 3}).result is None


def test_a_job_says_what_to_do_with_its_files(files, run):
    members = [
        MEMBER | {"checkpoint": "gs500.pkl", "config_file": "nowhere.json"},
        MEMBER | {"num_hidden_layers": 2, "color": 3},
    ]
    (files / "job.json").write_text(json.dumps({"teachers": members[:1], "student": members[1]}))
    code, printed = run("port", "job.json", "--out", "new")
    assert code == 1
    assert "jaxbrewer port-weights gs500.pkl --config nowhere.json" in printed
    assert "there is no such file here" in printed
    assert "student: color unknown key" in printed
    written = BertConfig.from_json_file("new/job.models.student.json")
    assert written.num_hidden_layers == 2


@pytest.mark.parametrize(
    "job", [{"teachers": [], "student": None}, {"teachers": [3]}, {"student": {}, "pupil": 1}]
)
def test_a_broken_job_needs_a_hand(tmp_path, job):
    assert Verdict.BY_HAND in verdicts(porting.port_job(job, tmp_path)).values()


def test_a_broken_emd_needs_a_hand():
    assert "layer_num_T" in port.emd({"layer_num_S": 5}).findings[0].text
    assert "did you mean 'weight'?" in port.emd(EMD | {"weigth": 1}).findings[0].text


# ----------------------------------------------------------------------------------- Python files


def written(text):
    return written_configs(parse(text))


def only(text):
    (found,) = written(text)
    return found


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("3", 3),
        ("-2.5", -2.5),
        ("4 + 1", 5),
        ("1 / 2 * 3 - 1 // 2", 1.5),
        ("not True", False),
        ("'a'", "a"),
        ("None", None),
        ("(1, [2])", [1, [2]]),
        ("[1] + [2]", [1, 2]),
        ("{'a': {'b': 1}, **{'c': 2}}", {"a": {"b": 1}, "c": 2}),
        ("dict(a=1)", {"a": 1}),
        ("torch.device('cuda')", "cuda"),
        ("torch.device('cuda', 1)", "cuda:1"),
        ("NAME", 7),
        ("TABLE['x']", 7),
        ("ALIAS", 7),
    ],
)
def test_literals_are_read(expression, value):
    text = f"NAME = 7\nALIAS = NAME\nTABLE = {{'x': NAME}}\nc = DistillationConfig(temperature={expression})"
    found = only(text)
    assert found.values == {"temperature": value}
    assert found.unread == []


@pytest.mark.parametrize(
    ("before", "expression", "why"),
    [
        ("", "args.t", "args.t is not a literal"),
        ("", "f()", "f() is not a literal"),
        ("", "t", "t is not bound in this file"),
        ("t = 1\nt = 2", "t", "t is bound 2 times"),
        ("t = 1\nt += 1", "t", "t is bound 2 times"),
        ("t = []\nt.append(1)", "t", "t is changed after it is bound"),
        ("t = {}\nt['a'] = 1", "t", "t is changed after it is bound"),
        ("t = []\nu = t\nu.append(1)", "t", "t is changed after it is bound"),
        ("t = u = [1]", "t", "t is not bound to a literal"),
        ("if x:\n    t = 1", "t", "t is not bound to a literal"),
        ("for t in x: pass", "t", "t is not bound to a literal"),
        ("import t", "t", "t is not bound to a literal"),
        ("from x import *", "t", "t is not bound in this file"),
        ("t = t", "t", "without end"),
        ("t = [t]", "t", "too large or too deeply nested"),
        ("t = {**t}", "t", "too large or too deeply nested"),
        ("a = [1]" + "".join(f"\n{c} = [{b}] * 9" for b, c in ["ab"]), "b", "is not a literal"),
        ("", "1 / 0", "1 / 0: division by zero"),
        ("", "9 ** 9", "is not a literal"),
        ("", "b'x'", "is not a literal"),
        ("", "f'{x}'", "is not a literal"),
        ("", "10**30 * 2", "is not a literal"),
        ("", "[] + 1", "is not a literal"),
        ("", "-'a'", "is not a literal"),
        ("", "{[]: 1}", "cannot be a key"),
        ("T = {'a': 1}", "T['b']", "is not a literal"),
    ],
)
def test_what_is_not_literal_is_said_with_its_line(before, expression, why):
    text = (
        f"{before}\nc = DistillationConfig(\n    kd_loss_weight=2,\n    temperature={expression})"
    )
    found = only(text)
    assert found.values == {"kd_loss_weight": 2}
    (unread,) = found.unread
    assert unread.name == "temperature"
    assert why in unread.why
    assert 1 <= unread.line <= text.count("\n") + 1


def test_lists_that_double_end():
    lines = ["a0 = [1, 2]"] + [f"a{i + 1} = a{i} + a{i}" for i in range(39)]
    found = only("\n".join([*lines, "c = DistillationConfig(temperature=a39)"]))
    assert "too large" in found.unread[0].why


def test_numbers_that_square_end():
    lines = ["a0 = 99999999"] + [f"a{i + 1} = a{i} * a{i}" for i in range(9)]
    found = only("\n".join([*lines, "c = DistillationConfig(temperature=a9)"]))
    assert "is not a literal" in found.unread[0].why


@pytest.mark.parametrize(
    "text",
    [
        "x = TrainingConfig(2, ckpt_frequency=3)",
        "x = textbrewer.TrainingConfig(2, 3)",
        "import textbrewer.configurations as c\nx = c.TrainingConfig(2, 3)",
        "from textbrewer import TrainingConfig as T\nx = T(2, 3)",
        "x = TrainingConfig(**{'gradient_accumulation_steps': 2, 'ckpt_frequency': 3})",
        "d = dict(gradient_accumulation_steps=2)\nx = TrainingConfig(ckpt_frequency=3, **d)",
        "x = TrainingConfig.from_dict({'gradient_accumulation_steps': 2, 'ckpt_frequency': 3})",
        "d = {'gradient_accumulation_steps': 2, 'ckpt_frequency': 3}\n"
        "def f():\n    return textbrewer.TrainingConfig.from_dict(d)",
        "n = 2\ndef f():\n    n = 3\n    return TrainingConfig(2, n)",
        "if __name__ == '__main__':\n    n = 3\n    TrainingConfig(2, n)",
        "n = 3\nclass A:\n    n = 4\n    def f(self):\n        TrainingConfig(2, n)",
    ],
)
def test_calls_are_found_however_they_are_spelt(text):
    found = only(text)
    assert found.kind == "training"
    assert found.values == {"gradient_accumulation_steps": 2, "ckpt_frequency": 3}
    assert found.unread == []


@pytest.mark.parametrize(
    ("text", "unread"),
    [
        ("def f(n): TrainingConfig(2, n)", "ckpt_frequency"),
        ("TrainingConfig(2, **options)", "**"),
        ("TrainingConfig(2, *more)", "arguments"),
        ("TrainingConfig(2, **{k: 1})", "**"),
    ],
)
def test_arguments_that_cannot_be_read_are_named(text, unread):
    found = only(text)
    assert found.values == {"gradient_accumulation_steps": 2}
    assert [u.name for u in found.unread] == [unread]


def test_a_config_read_from_a_file_names_the_file(tmp_path, run):
    (tmp_path / "x.py").write_text("c = TrainingConfig.from_json_file('t.json')")
    code, printed = run("port", tmp_path / "x.py")
    assert code == 1
    assert "'t.json' run jaxbrewer port on that file too" in printed
    assert only("TrainingConfig.from_json_file(args.f)").unread[0].name == "from_json_file"


def test_the_examples_named_matches_are_pointed_to(tmp_path, run):
    text = "from matches import matches\n"
    text += "c = DistillationConfig(intermediate_matches=matches['L4t_hidden_mse'])"
    (tmp_path / "x.py").write_text(text)
    assert "presets.MATCHES has 'L4t_hidden_mse'" in run("port", tmp_path / "x.py")[1]


def test_loose_matches_are_found_by_name():
    text = f"L3 = {HIDDEN!r}\nL4t = {GRAM!r}\nmatches = {{'L3': L3, 'L4t': L4t}}\nemd = {EMD!r}"
    found = {item.name or item.kind: item.values for item in written(text)}
    assert found == {"L3": HIDDEN, "L4t": GRAM, "emd": EMD}


def test_matches_a_config_uses_are_not_told_twice():
    assert [item.kind for item in written(SCRIPT)] == ["training", "distillation", "distillation"]


def test_nothing_in_a_file_is_run(tmp_path, run):
    target = tmp_path / "made"
    text = f"open({str(target)!r}, 'w')\nc = TrainingConfig(ckpt_steps=open({str(target)!r}, 'w'))"
    (tmp_path / "x.py").write_text(text)
    assert run("port", tmp_path / "x.py")[0] == 1
    assert not target.exists()


def test_the_rest_of_a_script_is_spoken_of(files, run):
    _, printed = run("port", "script.py")
    for word in (
        "Mine.train_on_batch never called here, and refused",
        "config.replace(output_hidden_states=True)",
        "BertForSequenceClassification(config, rngs=nnx.Rngs(0))",
        "torch's default is 0.01",
        "jaxbrewer.schedulers has one of this name",
        "without dropout",
    ):
        assert word in printed


@pytest.mark.parametrize(
    ("text", "code", "expected"),
    [
        ("with d:\n    d.train(o, scheduler=None, x=1)\nd = AdamW(p)", 0, "AdamW"),
        ("d.train(o, scheduler=s)", 1, "pass scheduler_class"),
        ("class A(EMDDistiller):\n    def compute_loss(self): pass", 1, "a pure function here"),
        ("c = CustomMatch(a, b, 1, l)", 0, "it runs, which TextBrewer's does not"),
        ("m = torch.nn.DataParallel(m)", 0, "data_parallel=True"),
    ],
)
def test_calls_and_subclasses_are_spoken_of(tmp_path, run, text, code, expected):
    (tmp_path / "x.py").write_text(text)
    found, printed = run("port", tmp_path / "x.py")
    assert expected in printed
    assert found == code


# -------------------------------------------------------------------------------------- the guide

GUIDE = (Path(__file__).parents[2] / "docs" / "porting.md").read_text()
SCRIPTS = dict(re.findall(r"<!-- script: (\S+) -->\n```diff\n(.*?)```", GUIDE, re.DOTALL))
TINY = {
    "vocab_size": 40,
    "hidden_size": 12,
    "num_hidden_layers": 12,
    "num_attention_heads": 2,
    "intermediate_size": 8,
    "max_position_embeddings": 16,
    "id2label": {"0": "a", "1": "b", "2": "c"},
}


def half(script, mark):
    """The script before (``-``) or after (``+``): the lines with that mark, and those without."""
    lines = script.splitlines()
    assert all(line[:1] in ("-", "+", " ", "") for line in lines)
    return "\n".join(line[1:] for line in lines if line[:1] in (mark, " ", ""))


@pytest.fixture
def models(tmp_path, monkeypatch):
    """The folders and files that the guide's scripts read."""
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "teacher1", "teacher2", "teacher3"):
        config = zoo.BertConfig.from_dict(TINY)
        zoo.BertForSequenceClassification(config, rngs=nnx.Rngs(0)).save_pretrained(name)
    Path("student.json").write_text(json.dumps(TINY | {"num_hidden_layers": 3}))
    Path("tiny.json").write_text(json.dumps(TINY | {"num_hidden_layers": 4, "hidden_size": 8}))


@pytest.fixture
def preflight_only(monkeypatch):
    """Lets ``train`` check everything, and compile and train nothing; counts its calls."""
    calls = []

    def train(job, request, on_checkpoint):
        assert job.train_mode
        timeline = make_timeline(job.config, request)
        make_factor(request, timeline.total_steps)
        first = {}
        for task, feed in request.feeds.items():
            batch = next(iter(feed.loader))
            first[task] = own(feed.postprocess(batch) if feed.postprocess else batch)
        prepare(job, first, request.optimizer, max_grad_norm=request.max_grad_norm)
        calls.append(timeline.total_steps)
        return training.Outcome(job)

    monkeypatch.setattr(training, "train", train)
    return calls


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_guides_scripts_run(models, preflight_only, name):
    ids = np.zeros((4, 10), np.int32)
    batch = {"input_ids": ids, "attention_mask": ids + 1, "labels": np.zeros(4, np.int32)}
    given = {
        "dataloader": [batch] * 4,
        "tuple_loader": [(ids, ids + 1, ids, batch["labels"])] * 4,
    }
    after = half(SCRIPTS[name], "+").replace("312, 768", "8, 12")
    exec(compile(after, name, "exec"), given)
    assert len(preflight_only) == 1


@pytest.mark.torch
@pytest.mark.parametrize("name", SCRIPTS)
def test_the_guides_scripts_begin_as_textbrewers(name):
    imported = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(half(SCRIPTS[name], "-")))
        if isinstance(node, ast.ImportFrom) and node.module.startswith("textbrewer")
        for alias in node.names
    }
    assert imported
    for path in imported:
        module, _, attribute = path.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute)
    after = half(SCRIPTS[name], "+")
    assert "torch" not in after
    assert "textbrewer" not in after


def named_in_guide():
    """The guide's table of names: TextBrewer's → ours, or None."""
    table = GUIDE.partition("## Every public name")[2]
    rows = re.findall(r"^\| `([\w.]+)` \| (?:`([\w.]+)`|–) \|(.*)\|$", table, re.MULTILINE)
    assert all(ours or reason.strip() for _, ours, reason in rows)
    return {theirs: ours or None for theirs, ours, _ in rows}


def resolve(path):
    """The object a dotted path stands for."""
    module, attributes = path, []
    while True:
        try:
            found = importlib.import_module(module)
            break
        except ModuleNotFoundError:
            module, _, attribute = module.rpartition(".")
            attributes.insert(0, attribute)
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


def test_every_name_the_guide_gives_is_here():
    for path in filter(None, named_in_guide().values()):
        assert resolve(path) is not None


MODULES = ["", "configurations", "presets", "losses", "schedulers", "projections", "utils"]
MODULES += ["data_utils", "distiller_utils", "compatibility"]


@pytest.mark.torch
@pytest.mark.parametrize("name", MODULES)
def test_every_public_name_of_textbrewer_is_in_the_guide(name):
    known = {path.rpartition(".")[2] for path in named_in_guide()}
    module = importlib.import_module(f"textbrewer.{name}".rstrip("."))
    for attribute, value in vars(module).items():
        home = getattr(value, "__module__", None) or module.__name__
        theirs = home.startswith("textbrewer") or not callable(value)
        if not attribute.startswith("_") and not inspect.ismodule(value) and theirs:
            assert attribute in known, f"{module.__name__}.{attribute}"


@pytest.mark.torch
@pytest.mark.parametrize("name", ["BasicDistiller", "GeneralDistiller", "BasicTrainer"])
def test_every_method_of_textbrewers_distillers_is_in_the_guide(name):
    known = named_in_guide()
    for method in dir(getattr(importlib.import_module("textbrewer"), name)):
        if not method.startswith("_"):
            assert {f"{name}.{method}", f"BasicDistiller.{method}"} & set(known), method


def test_the_one_table_of_differences_is_well_formed():
    table = GUIDE.partition("## Every difference")[2].partition("## Every public name")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) > 80
    assert {line.count("|") for line in rows} == {5}


# ------------------------------------------------------------------------------------------- fuzz

ODD = (
    None, True, False, 0, -1, 1e400, float("nan"), 10**30, 0.5, "", "none", "hidden", "\ud800",
    "x" * 500, [], {}, [[]], [None], {"a": 1}, ["flsw"], ["flsw", 1], ["cwsm", {"beta": []}],
    [1, 2, 3], ["linear", 1, 2, 3, 4], {"layer_T": 1}, "cuda:99", "/", "\0",
)  # fmt: skip


def places(value, path=()):
    """Every place in a JSON value."""
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, item in items:
        yield from places(item, (*path, key))


def mutated(rng, value):
    """A copy of a JSON value with one thing changed."""
    value = json.loads(json.dumps(value))
    path = rng.choice(list(places(value))[1:])
    holder = value
    for key in path[:-1]:
        holder = holder[key]
    action, key = rng.randrange(5), path[-1]
    if action == 0:
        holder[key] = rng.choice(ODD)
    elif action == 1:
        del holder[key]
    elif action == 2 and isinstance(holder, dict):
        holder[key[:-1] + rng.choice("exyz ")] = holder.pop(key)
    elif action == 3:
        holder[key] = [holder[key]]
    else:
        other = rng.choice(list(places(value))[1:])
        item = value
        for part in other:
            item = item[part]
        holder[key] = json.loads(json.dumps(item))
    return value


def scrambled(rng, text):
    """A text with some characters changed, taken out or doubled, or a line moved."""
    for _ in range(rng.randrange(1, 4)):
        at = rng.randrange(len(text) or 1)
        action = rng.randrange(5)
        if action == 0:
            text = text[:at] + rng.choice("{}[]()\"',:.0-\\\n\0é#*=") + text[at + 1 :]
        elif action == 1:
            text = text[:at] + text[at + rng.randrange(1, 20) :]
        elif action == 2:
            text = text[:at] + text[at : at + 30] + text[at:]
        elif action == 3:
            text = text[: max(at, 1)]
        else:
            lines = text.splitlines(keepends=True)
            rng.shuffle(lines)
            text = "".join(lines)
    return text


SEEDS = [TRAINING, DISTILLATION, TRAINING | DISTILLATION, STUDENT, CHINESE, JOB, EMD, HIDDEN]
SEEDS += [{"train": TRAINING, "distill": {"config": DISTILLATION}}]


def test_a_thousand_mutated_files_give_an_exit_code_and_a_message(tmp_path, monkeypatch, run):
    monkeypatch.chdir(tmp_path)
    codes = {0: 0, 1: 0, 2: 0}
    for seed in range(1000):
        rng = random.Random(seed)
        if seed % 4 == 3:
            text = scrambled(rng, SCRIPT)
            name = "file.py"
        else:
            value = rng.choice(SEEDS)
            for _ in range(rng.randrange(1, 4)):
                value = mutated(rng, value) if len(list(places(value))) > 1 else value
            text, name = json.dumps(value, indent=1), "file.json"
            if seed % 4 == 2:
                text = scrambled(rng, text)
        (tmp_path / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        code, printed = run("port", name, *(["--out", "new"] if seed % 5 == 0 else []))
        codes[code] += 1
        assert printed.strip(), text
        assert code == 0 or "!" in printed or "jaxbrewer: " in printed, text
    assert min(codes.values()) > 50, codes
