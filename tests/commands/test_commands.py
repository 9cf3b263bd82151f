"""The command itself, and ``port-weights``, ``check`` and ``inspect``, in this process."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxbrewer import CallbackResult, zoo
from jaxbrewer.__main__ import main
from jaxbrewer.commands import CommandError, checking, weights, zoo_models
from jaxbrewer.commands.port.verdicts import Run
from jaxbrewer.training.position import sealed

from .. import nnx_job

SHAPE = {
    "vocab_size": 40,
    "hidden_size": 8,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}
TEACHER = SHAPE | {"hidden_size": 12, "num_hidden_layers": 2}
MATCH = {"layer_T": 2, "layer_S": 1, "feature": "hidden", "loss": "hidden_mse", "weight": 1}


@pytest.fixture
def run(capsys, tmp_path, monkeypatch):
    """Runs the command in an empty folder; gives the exit code and all that was printed."""
    monkeypatch.chdir(tmp_path)

    def call(*argv):
        capsys.readouterr()
        code = main(list(map(str, argv)))
        printed = capsys.readouterr()
        return code, re.sub(r"[ \n]+", " ", printed.out + printed.err)

    return call


def write(path, value):
    Path(path).write_text(json.dumps(value))
    return path


# ------------------------------------------------------------------------------------ the command


def test_the_module_runs_as_a_program():
    argv = [sys.executable, "-m", "jaxbrewer", "--help"]
    found = subprocess.run(argv, capture_output=True, text=True, check=True)
    for word in ("port", "port-weights", "check", "inspect", "exit codes:"):
        assert word in found.stdout


@pytest.mark.parametrize(
    "command", ["port", "port-weights", "check", "inspect", "export", "report", "suggest"]
)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    assert "exit codes:" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        ([], "required: COMMAND"),
        (["prot"], "invalid choice: 'prot'"),
        (["port"], "required: FILE"),
        (["port", "x.json", "--nothing"], "unrecognized arguments: --nothing"),
        (["port", "x.json", "--batches", "0"], "expected a whole number from 1"),
        (["port", "x.json", "--batches", "two"], "expected a whole number from 1"),
        (["port", "x.json", "--batches", "9" * 30], "expected a whole number from 1"),
        (["port", "x.json", "--epochs", "2"], "--epochs needs --batches"),
        (["port", "x.json", "--batches", "2", "--num-steps", "2"], "not both"),
        (["port", "x.json", "--batches", "9999999", "--epochs", "9"], "more than 10,000,000"),
        (["port-weights", "x.pkl"], "required: --config, --out"),
        (["check", "a", "b", "--teacher", "x"], "two configs need --teacher and --student"),
        (["check", "a", "b", "--teacher", "x", "--student", "y"], "a: there is no such file"),
        (["inspect", "nowhere"], "nowhere is not there"),
    ],
)
def test_wrong_usage_is_2_and_says_why(run, argv, expected):
    code, printed = run(*argv)
    assert code == 2
    assert expected in printed


# ----------------------------------------------------------------------------------- port-weights


def torch_model(kind="ForSequenceClassification", labels=3):
    import torch
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(**SHAPE, num_labels=labels)
    return getattr(transformers, f"Bert{kind}")(config).eval()


def ids():
    return np.random.default_rng(0).integers(0, SHAPE["vocab_size"], (3, 9))


@pytest.fixture
def bert(tmp_path):
    """A torch BERT, with its config written beside as TextBrewer's examples have it."""
    write(tmp_path / "bert_config.json", SHAPE)
    return torch_model()


def port_weights(run, state, *options):
    import torch

    torch.save(state, "student.pkl")
    return run(
        "port-weights", "student.pkl", "--config", "bert_config.json", "--out", "new", *options
    )


@pytest.mark.torch
def test_weights_give_the_same_logits(run, bert):
    import torch
    import transformers

    code, printed = port_weights(run, bert.state_dict())
    assert code == 0
    assert "BertForSequenceClassification.from_pretrained('new')" in printed
    ours = zoo.BertForSequenceClassification.from_pretrained("new")
    theirs = bert(torch.tensor(ids())).logits.detach().numpy()
    np.testing.assert_allclose(ours(ids()).logits, theirs, rtol=1e-5, atol=1e-5)
    again = transformers.BertForSequenceClassification.from_pretrained("new")
    np.testing.assert_allclose(again(torch.tensor(ids())).logits.detach(), theirs, rtol=1e-6)


@pytest.mark.torch
@pytest.mark.parametrize("kind", ["ForTokenClassification", "ForQuestionAnswering", "Model"])
def test_every_head_is_told_by_its_tensors(run, bert, kind):
    import torch

    model = torch_model(kind, 2)
    assert port_weights(run, model.state_dict())[0] == 0
    ours = getattr(zoo, f"Bert{kind}").from_pretrained("new")(ids())[0]
    theirs = model(torch.tensor(ids()))[0].detach().numpy()
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.torch
def test_the_head_for_masked_words_is_ported_where_it_is_asked_for(run, bert):
    import torch

    model = torch_model("ForMaskedLM", 2)
    code, printed = port_weights(run, model.state_dict(), "--task", "masked-lm")
    count = sum(tensor.numel() for tensor in model.parameters())
    assert code == 0 and f"{count:,} parameters" in printed
    ours = zoo.from_pretrained("new")(ids()).logits
    np.testing.assert_allclose(ours, model(torch.tensor(ids()))[0].detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.torch
def test_old_names_prefixes_and_half_precision_are_understood(run, bert):
    import torch

    old = {}
    for name, tensor in bert.half().state_dict().items():
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        old["module." + name.replace("LayerNorm.bias", "LayerNorm.beta")] = tensor
    assert port_weights(run, old)[0] == 0
    ours = zoo.BertForSequenceClassification.from_pretrained("new")
    theirs = bert.float()(torch.tensor(ids())).logits.detach().numpy()
    np.testing.assert_allclose(ours(ids()).logits, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.torch
def test_a_bare_encoder_needs_no_pooler(run, bert):
    import torch

    state = {
        name: tensor
        for name, tensor in bert.state_dict().items()
        if "pooler" not in name and "classifier" not in name
    }
    assert port_weights(run, state)[0] == 0
    ours = zoo.BertModel.from_pretrained("new", add_pooling_layer=False)
    theirs = bert.bert(torch.tensor(ids())).last_hidden_state.detach().numpy()
    np.testing.assert_allclose(ours(ids()).last_hidden_state, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.torch
def test_tensors_that_are_not_needed_are_dropped_by_name(run, bert):
    import torch

    state = {**bert.state_dict(), "log_sigma": torch.ones(2)}
    code, printed = port_weights(run, state)
    assert code == 1
    assert "not in the model: log_sigma" in printed
    assert "--drop log_sigma" in printed
    assert (
        "has none: did you mean 'log_sigma'?" in port_weights(run, state, "--drop", "log_sigm")[1]
    )
    assert port_weights(run, state, "--drop", "log_sigma")[0] == 0


@pytest.mark.torch
def test_what_is_passed_over_is_named(run, bert):
    code, printed = port_weights(run, bert.state_dict(), "--task", "token-classification")
    assert code == 0
    assert "passed over, of no use to this model: bert.pooler.dense.weight" in printed


def zeros(*shape):
    import torch

    return torch.zeros(*shape)


@pytest.mark.torch
@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda s: s | {"extra.weight": zeros(3)}, "not in the model: extra.weight (3,)"),
        (lambda s: {k: v for k, v in s.items() if "query" not in k}, "self.query.weight"),
        (lambda s: s | {"classifier.bias": zeros(9)}, "classifier.bias: (9,) in the file"),
        (lambda s: {"state_dict": s, "epoch": {}}, "is a checkpoint with 'state_dict', 'epoch'"),
        (lambda s: s | {"step": 3}, "not tensors: 'step'"),
        (lambda s: {}, "there is nothing in it"),
        (lambda s: list(s.values()), "holds a list, not a state dict"),
        (lambda s: torch_model(), "reading it would run code: it refers to transformers.models"),
        (lambda s: s | {"module.classifier.bias": zeros(3)}, "is there twice"),
        (lambda s: s | {"a": zeros(2, 2).to_sparse()}, "sparse, quantized or complex"),
        (lambda s: s | {"a": zeros(2) * 1j}, "quantized or complex"),
    ],
)
def test_what_is_no_plain_state_dict_of_the_model_is_refused(run, bert, change, expected):
    code, printed = port_weights(run, change(dict(bert.state_dict())))
    assert code == 1
    assert expected in printed
    assert "new_head" not in printed
    assert not Path("new").exists()


class Bomb:
    def __reduce__(self):
        return open, ("exploded", "w")


@pytest.mark.torch
def test_code_in_a_file_is_never_run(run, bert):
    code, printed = port_weights(run, {"a": Bomb()})
    assert code == 1
    assert "would run code" in printed
    assert not Path("exploded").exists()


@pytest.mark.torch
@pytest.mark.parametrize("content", [b"", b"hello " * 9, b"PK\x03\x04" + b"\0" * 99, b"\x80\x02"])
def test_a_file_that_is_not_torchs_is_2(run, bert, content):
    Path("student.pkl").write_bytes(content)
    argv = ["port-weights", "student.pkl", "--config", "bert_config.json", "--out", "new"]
    code, printed = run(*argv)
    assert code in (1, 2)
    assert "student.pkl" in printed


@pytest.mark.torch
def test_other_mistakes_of_port_weights(run, bert, monkeypatch):
    state = bert.state_dict()
    assert "--num-labels?" in port_weights(run, state, "--num-labels", "2")[1]
    assert "qa_outputs" in port_weights(run, state, "--task", "question-answering")[1]
    write("bert_config.json", SHAPE | {"model_type": "xlnet"})
    assert "the zoo has bert" in port_weights(run, state)[1]
    write("bert_config.json", SHAPE | {"hidden_size": 7})
    assert "hidden_size=7 is not a multiple" in port_weights(run, state)[1]
    write("bert_config.json", SHAPE)
    monkeypatch.setitem(sys.modules, "torch", None)
    code, printed = run("port-weights", "student.pkl", "--config", "bert_config.json", "--out", "x")
    assert code == 2
    assert "needs torch, which is not installed" in printed
    monkeypatch.undo()


@pytest.mark.torch
def test_a_folder_with_weights_is_left_alone(run, bert):
    assert port_weights(run, bert.state_dict())[0] == 0
    before = Path("new/model.safetensors").read_bytes()
    code, printed = port_weights(run, bert.state_dict())
    assert code == 2
    assert "holds a model.safetensors already" in printed
    assert Path("new/model.safetensors").read_bytes() == before


def test_the_task_follows_from_the_names():
    def task(*names):
        return weights._task_of(dict.fromkeys(names, np.zeros(1)))

    assert task("bert.x") == "none"
    assert task("qa_outputs.weight") == "question-answering"
    assert task("classifier.weight", "bert.pooler.dense.weight") == "sequence-classification"
    assert task("classifier.weight") == "token-classification"
    assert task("pre_classifier.weight", "classifier.weight") == "sequence-classification"
    assert task("pooler.dense.weight", "classifier.weight") == "sequence-classification"
    with pytest.raises(CommandError, match="do not tell the task: give --task"):
        task("head.dense.weight", "classifier.weight")


# ------------------------------------------------------------------------------------------ check


@pytest.fixture
def job(tmp_path):
    """Config files of a small job, and the arguments that check it."""
    write(tmp_path / "train.json", {"ckpt_frequency": 2})
    write(
        tmp_path / "distill.json", {"intermediate_matches": [MATCH | {"proj": ["linear", 8, 12]}]}
    )
    (tmp_path / "teacher").mkdir()
    write(tmp_path / "teacher" / "config.json", TEACHER)
    write(tmp_path / "student.json", SHAPE)
    files = ["train.json", "distill.json", "--teacher", "teacher", "--student", "student.json"]
    return ["check", *files, "--length", "10", "--batch-size", "2"]


@pytest.mark.torch
def test_check_reports_what_would_be_trained(run, job):
    code, printed = run(*job, "--batches", "10", "--epochs", "2")
    assert code == 0
    assert "hidden T2 → S1 by hidden_mse, projected 8 → 12 (linear)" in printed
    teacher = torch_model_count(TEACHER)
    student = torch_model_count(SHAPE)
    assert f"model_T {teacher:,} parameters" in printed
    assert f"model_S {student:,} parameters" in printed
    assert "GFLOP" in printed
    assert "MiB at the peak" in printed
    assert "checkpoints: 4 in 20 optimizer steps: at step 5, 10, 15, 20" in printed


def torch_model_count(config):
    import transformers

    model = transformers.BertForSequenceClassification(transformers.BertConfig(**config))
    return sum(parameter.numel() for parameter in model.parameters())


def test_check_puts_nothing_on_disk_or_on_a_device(run, job, monkeypatch):
    before = sorted(path for path in Path().rglob("*"))
    arrays = len(jax.live_arrays())
    monkeypatch.setattr(checking, "describe", lambda *a, **k: "")
    assert run(*job)[0] == 0
    assert sorted(path for path in Path().rglob("*")) == before
    assert len(jax.live_arrays()) - arrays < 20  # keys and the projection, not the models


@pytest.fixture
def quick(monkeypatch):
    """Leaves out the cost of a step, which has to be compiled."""
    monkeypatch.setattr(checking, "describe", lambda program, batch, **k: f"{sorted(batch)}")


@pytest.mark.parametrize(
    ("options", "batch"),
    [
        ([], "'attention_mask', 'input_ids', 'labels', 'token_type_ids'"),
        (["--task", "question-answering"], "'end_positions', 'input_ids', 'start_positions'"),
        (["--task", "token-classification", "--num-labels", "5"], "'labels'"),
        (["--task", "masked-lm"], "'labels'"),
        (["--task", "none"], "['attention_mask', 'input_ids', 'token_type_ids']"),
        (["--num-labels", "1"], "'labels'"),
    ],
)
def test_check_knows_every_task(run, job, quick, options, batch):
    code, printed = run(*job, *options)
    assert code == 0, printed
    assert batch in printed


def test_check_takes_the_task_from_the_configs(run, job, quick):
    write("teacher/config.json", TEACHER | {"architectures": ["BertForTokenClassification"]})
    assert "checking for token-classification" in run(*job)[1]


@pytest.mark.parametrize(
    ("file", "values", "expected"),
    [
        ("distill.json", {"intermediate_matches": [MATCH]}, "Add 'proj': ['linear', 8, 12]"),
        ("distill.json", {"intermediate_matches": [MATCH | {"layer_S": 2}]}, "layer_S=2 is not"),
        ("distill.json", {"kd_loss_type": "kll"}, "kd_loss_type='kll' is not a known loss"),
        ("distill.json", {"temperature": 0}, "expected a number above 0"),
        ("train.json", {"ckpt_freq": 1}, "did you mean 'ckpt_frequency'?"),
        ("student.json", SHAPE | {"num_labels": 5}, "the student has 5 classes"),
        ("student.json", SHAPE | {"max_position_embeddings": 4}, "a sequence of 10 is longer"),
        ("student.json", SHAPE | {"model_type": "xlnet"}, "the zoo has bert"),
        ("student.json", SHAPE | {"hidden_size": 0}, "hidden_size is 0: expected an integer"),
    ],
)
def test_check_finds_what_would_go_wrong(run, job, quick, file, values, expected):
    write(file, values)
    code, printed = run(*job)
    assert code == 1
    assert expected in printed


def test_check_runs_at_the_level(run, job, monkeypatch):
    monkeypatch.setattr(checking, "describe", lambda program, batch, **k: str(program.precision))
    write("train.json", {"fp16": True, "fp16_opt_level": "O2", "half_dtype": "float16"})
    code, printed = run(*job)
    assert code == 0
    assert "O2: float32 master parameters, the forward pass in float16" in printed


def test_check_warns_and_speaks_of_caching(run, job, quick):
    match = MATCH | {"layer_T": 0, "proj": ["linear", 8, 12]}
    write("distill.json", {"is_caching_logits": True, "intermediate_matches": [match]})
    code, printed = run(*job)
    assert code == 0
    assert "warning: match hidden T0 → S1" in printed
    assert "is_caching_logits" in printed


def test_check_needs_an_epoch_longer_than_a_window(run, job, quick):
    write("train.json", {"gradient_accumulation_steps": 4})
    code, printed = run(*job, "--batches", "3")
    assert code == 1
    assert "nothing would be trained" in printed


def test_base_models_take_no_memory(run):
    config = zoo.BertConfig()
    model = zoo_models.by_shape(zoo.BertForSequenceClassification, config)
    kernel = model.bert.encoder.layer[0].intermediate.kernel.get_value()
    assert kernel.shape == (768, 3072)
    assert set(kernel.strides) == {0}


def test_a_run_knows_its_steps():
    config = checking.TrainingConfig(gradient_accumulation_steps=2)
    assert Run().timeline(config) is None
    assert Run(batches=7, epochs=3).timeline(config).total_steps == 9
    assert Run(steps=5).timeline(config).total_steps == 5


# ---------------------------------------------------------------------------------------- inspect


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The output_dir of a short run with two checkpoints and scores."""
    folder = tmp_path_factory.mktemp("trained")
    distiller = nnx_job.distiller(folder, dropout=0.0, log=False)
    with distiller:
        distiller.train(
            nnx_job.SGD,
            nnx_job.loader(2),
            num_epochs=2,
            callback=lambda model, step: CallbackResult(score=1 / step),
        )
    return folder / "out"


@pytest.fixture
def output(trained, tmp_path):
    """A copy of it, to be damaged."""
    return shutil.copytree(trained, tmp_path / "out")


def test_inspect_shows_an_output_dir(run, output):
    code, printed = run("inspect", output)
    assert code == 0
    assert "gs2 (score 0.5, the best) gs4 (score 0.25, the newest)" in printed
    assert "step: 4" in printed


def test_inspect_shows_a_checkpoint(run, output):
    code, printed = run("inspect", output / "gs2")
    assert code == 0
    for word in (
        "step: 2",
        "epoch: 1, after its batch 2; 2 batches in all",
        "score: 0.5",
        "written by: GeneralDistiller",
        "train_config.gradient_accumulation_steps: 1",
        "holds: projections, student, training, position; all of it can be read",
        "--embed",
        f"--model: \t {sum(w.size for w in nnx_job.weights(nnx_job.Encoder(2, 4)).values())}",
    ):
        assert word in printed
    assert "--kernel" not in run("inspect", output / "gs2", "--max-level", "1")[1]


def test_inspect_does_not_change_what_it_reads(run, output):
    before = {path: path.stat().st_mtime_ns for path in output.rglob("*")}
    run("inspect", output)
    assert {path: path.stat().st_mtime_ns for path in output.rglob("*")} == before


def test_unfinished_checkpoints_are_told(run, output):
    (output / "gs6").mkdir()
    (output / "gs8.orbax-checkpoint-tmp").mkdir()
    (output / "earlier-1").mkdir()
    code, printed = run("inspect", output)
    assert code == 1
    assert "! gs6: unfinished" in printed
    assert "! gs8.orbax-checkpoint-tmp: unfinished" in printed
    assert "earlier-1: of an earlier run" in printed
    assert "step: 4" in printed
    assert run("inspect", output / "gs6")[0] == 1
    shutil.rmtree(output / "gs2")
    shutil.rmtree(output / "gs4")
    assert run("inspect", output)[0] == 1


def test_what_a_terminal_would_obey_is_shown_escaped(run, output):
    """In the JSON of a checkpoint, in a model's config, and in the names of folders."""
    hidden, evil = "\x1b[2J\x9b31m\b", "\r\u202egnp\x7f"
    file = output / "gs4" / "position" / "metadata"
    position = json.loads(file.read_text())
    del position["digest"]
    position["class"] = hidden
    position["train_config"][f"a{evil}"] = evil
    file.write_text(json.dumps(sealed(position)))
    code, printed = run("inspect", output)
    assert code == 0
    assert r"written by: \x1b[2J\x9b31m\x08, format" in printed
    assert r"train_config.a\r\u202egnp\x7f: '\r\u202egnp\x7f'" in printed
    (output / f"gs6.{hidden}").mkdir()
    model = output / f"model{evil}"
    model.mkdir()
    write(model / "config.json", {f"b{hidden}\n": 1})
    printed += run("inspect", output)[1] + run("inspect", model)[1]
    printed += run("inspect", output / f"no{hidden}")[1]
    for text in (
        r"! gs6.\x1b[2J\x9b31m\x08: unfinished",
        r"model\r\u202egnp\x7f: a model's folder b\x1b[2J\x9b31m\x08\n: 1",
        r"no\x1b[2J\x9b31m\x08 is not there",
    ):
        assert text in printed
    assert not {*hidden, *evil} & {*printed} - {*"[2J31mgnp"}


def largest(folder):
    return max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: shutil.rmtree(path / "position"),
        lambda path: shutil.rmtree(path / "student"),
        lambda path: largest(path / "student").write_bytes(b""),
        lambda path: largest(path / "training").write_bytes(b"\0"),
        lambda path: next((path / "position").glob("*")).write_text("{"),
        lambda path: next((path / "position").glob("meta*")).write_text("[1]"),
        lambda path: (path / "student" / "_METADATA").write_text("{}"),
        lambda path: (path / "student" / "_METADATA").write_text("[]"),
        lambda path: (path.parent / "scores.json").write_text('{"a": []}'),
    ],
)
def test_damaged_checkpoints_are_told(run, output, damage):
    damage(output / "gs4")
    code, printed = run("inspect", output / "gs4")
    assert code in (1, 2), printed
    assert "damaged" in printed or "cannot" in printed


@pytest.mark.torch
def test_inspect_shows_a_models_folder(run, tmp_path):
    config = zoo.BertConfig(**SHAPE)
    model = zoo.BertForSequenceClassification(config, rngs=zoo_models.nnx.Rngs(0))
    model.save_pretrained("model")
    code, printed = run("inspect", "model")
    assert code == 0
    assert "num_hidden_layers: 1" in printed
    assert f"--model: \t {torch_model_count(SHAPE):,}" in printed


@pytest.mark.parametrize(
    ("damage", "code", "expected"),
    [
        (lambda f: (f / "model.safetensors").unlink(), 1, "there is no model.safetensors"),
        (lambda f: (f / "config.json").unlink(), 1, "there is no config.json"),
        (lambda f: (f / "config.json").write_text("{"), 2, "not JSON"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x"), 1, "damaged"),
        (lambda f: write(f / "config.json", SHAPE | {"model_type": "x"}), 1, "not for jaxbrewer"),
    ],
)
def test_a_broken_models_folder_is_told(run, tmp_path, damage, code, expected):
    config = zoo.BertConfig(**SHAPE)
    zoo.BertModel(config, rngs=zoo_models.nnx.Rngs(0)).save_pretrained("model")
    damage(tmp_path / "model")
    found, printed = run("inspect", "model")
    assert found == code
    assert expected in printed


def test_pickled_and_sharded_folders(run, tmp_path):
    write(tmp_path / "config.json", SHAPE)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "jaxbrewer port-weights makes one" in run("inspect", ".")[1]
    write(tmp_path / "model.safetensors.index.json", {"weight_map": {"a": "b.safetensors"}})
    code, printed = run("inspect", ".")
    assert code == 1
    assert "names b.safetensors, which is not in the folder" in printed
    write(tmp_path / "model.safetensors.index.json", {"weight_map": 3})
    assert "no 'weight_map'" in run("inspect", ".")[1]


def test_any_other_folder_is_2(run, tmp_path):
    (tmp_path / "x").mkdir()
    assert run("inspect", "x")[0] == 2
    write("file", 1)
    assert "file is a file" in run("inspect", "file")[1]


def test_all_zoo_models_are_known():
    for cls in zoo_models.models():
        task = zoo_models.task_of(cls.architecture) or "none"
        assert zoo_models.model_class(cls.config_class.model_type, task) is cls
        assert dataclasses.is_dataclass(cls.config_class)
