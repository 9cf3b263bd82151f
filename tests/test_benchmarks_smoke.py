"""Every benchmark runs, at sizes that say nothing of speed, and writes what it should."""

import functools
import json
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxbrewer.objective.loss import Weights
from jaxbrewer.preflight import prepare

FOLDER = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script's ``main`` in this process; returns its rows, with all else it saved."""
    monkeypatch.syspath_prepend(str(FOLDER))
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))

    def run(name, *arguments):
        given = [f"{name}.py", "--smoke", "--out", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", given)
        __import__(name).main()
        assert "|--" in capsys.readouterr().out
        return json.loads((tmp_path / f"{name}.json").read_text())

    return run


def test_overhead(run):
    rows = run("overhead", "--only", "tiny")["rows"]
    assert [(row["work"], row["log_dir"]) for row in rows] == [
        ("tiny", "none"),
        ("tiny", "tensorboard"),
    ]
    assert rows[1]["loss gap"] < 1e-5
    assert rows[0]["loss gap"] is None


@pytest.mark.torch
def test_exported(run):
    rows = run("exported")["rows"]
    assert [row["by"] for row in rows] == [
        "transformers",
        "onnxruntime",
        "StableHLO",
        "jaxbrewer.predict",
    ]
    assert {row["same labels"] for row in rows} == {1.0}
    assert {row["rows"] for row in rows} == {20}


def test_the_bert_by_hand_has_the_same_objective(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(FOLDER))
    import bare
    import turns
    import workloads

    work = workloads.without_dropout(turns.tiny_bert())
    job = turns.bert_job(work)
    batch = workloads.make_batch(job.vocab_size, 2, 8, np.array([3, 8]))
    by_hand = bare.bert(work, [batch])
    expected = jax.jit(by_hand.objective)(*by_hand.arguments, jax.random.key(0), batch)
    distiller = job.distiller(output_dir=tmp_path / "out", device="cpu")
    with distiller:
        programs = prepare(distiller.job(), {"": batch}, workloads.jax_optimizer()).programs

    def loss(program, params, state, teacher):
        results_T = program.teacher(teacher, batch, None)
        weights = Weights(kd=1.0, hard_label=workloads.HARD_LABEL_WEIGHT)
        return program.loss(params, state, jax.random.key(0), batch, results_T, weights)[0]

    program = programs[""]
    got = jax.jit(functools.partial(loss, program))(*program.variables, program.teacher.variables)
    np.testing.assert_allclose(got, expected, rtol=1e-6)


def test_cache(run):
    rows = run("cache")["rows"]
    assert [row["cache"] for row in rows] == ["none", "memory float16", "disk float32"]
    plain, memory, disk = rows
    assert plain["MiB a batch"] == 0
    positions = 2 * 8 * 8  # batch, length and width; one hidden layer is matched
    assert memory["MiB a batch"] * 2**20 == 2 * (positions + 2 * 2)
    assert disk["MiB a batch"] * 2**20 > 4 * positions


@pytest.mark.torch
def test_buckets(run):
    found = run("buckets")
    assert [row["program"] for row in found["rows"]] == [
        "jaxbrewer, buckets", "jaxbrewer", "TextBrewer"
    ]  # fmt: skip
    assert [rows for rows, _ in found["shapes"]] == [3, 4]


def test_compile(run):
    found = run("compile")
    assert [row["cache"] for row in found["rows"]] == ["cold", "warm"]
    assert found["same_losses"]
    assert found["ratios"][0] > 1


def test_scaling(run):
    rows = run("scaling", "--grow", "matches", "pmap")["rows"]
    assert [(row["grows"], row["to"]) for row in rows] == [
        ("matches", 0), ("matches", 1), ("pmap", 1), ("pmap", 2)
    ]  # fmt: skip
    assert [row["compiled"] for row in rows] == [1, 1, 1, 1]
    assert rows[-1]["loss gap"] < 1e-5


def test_loading(run):
    rows = run("loading")["rows"]
    assert [row["loader"] for row in rows] == [
        "ready", "waiting", "computing", "waiting, threaded"
    ]  # fmt: skip
    assert rows[2]["ms"] > 0.5  # what its loader computes for


def test_described(run):
    """Rows that are there are kept; of one device, no sharding is asked for."""
    asked = ["--works", "large", "--levels", "O2", "--shardings", "all"]
    (one,) = run("described", *asked, "--on", "cpu:1")["rows"]
    assert one["sharding"] == "none" and one["sends"] == {} and one["fits"]
    assert one["peak GiB"] > one["held GiB"] > one["updated in place GiB"] > 0
    kept, cut = run("described", *asked, "--on", "cpu:1", "cpu:2", "--add")["rows"]
    assert kept == one
    assert cut["sharding"] == "all" and cut["held GiB"] < 0.6 * one["held GiB"]
    assert cut["sends"]["all-gather"][1] > 0


def test_durability(run):
    """The guard is in one step and not in the other; both kinds of saves were made."""
    guard, digests = run("durability")["rows"]
    assert guard["bytes %"] > 0
    assert digests["digests ms"] > 0
    assert digests["state MB"] > 0


def test_attention(run):
    (row,) = run("attention")["rows"]
    assert row["loss gap"] == 0
    assert row["cudnn ms"] > 0


def test_same_bits(run):
    rows = run("same_bits")["rows"]
    assert [(row["what"], row["level"]) for row in rows] == [
        ("agree", "O0"), ("repeat", "O2"), ("resume", "O2")
    ]  # fmt: skip
    assert rows[0]["largest relative gap"] == 0
    assert [row["differ"] for row in rows[1:]] == [0, 0]
    assert all(row["arrays"] > 20 for row in rows[1:])


def test_all_of_a_gpu(tmp_path, monkeypatch, capsys):
    """A part that is done, one that fails, and one for which no time is left."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    parts = {
        "attention": gpu.PARTS["attention"],
        "broken": ["attention.py", "--no-such-flag"],
        "late": ["attention.py"],
    }
    monkeypatch.setattr(gpu, "PARTS", parts)
    left = iter([600.0, 600.0, 1.0])
    monkeypatch.setattr(gpu, "time_left", lambda args, start: next(left))
    given = [
        "gpu.py",
        "--smoke",
        "--device",
        "cpu",
        "--out",
        str(tmp_path),
        "--wheels",
        str(tmp_path),
    ]
    monkeypatch.setattr(sys, "argv", given)
    assert gpu.main() == 1
    told = json.loads((tmp_path / "parts.json").read_text())
    assert [(part["part"], part["ended"]) for part in told] == [
        ("attention", "done"),
        ("broken", "failed with code 2, see broken.log"),
        ("late", "not started: no time left"),
    ]
    assert json.loads((tmp_path / "attention.json").read_text())["rows"]
    assert "| student" in capsys.readouterr().out


def test_the_parts_of_a_gpu_name_scripts_and_flags_that_there_are(monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(FOLDER))
    import gpu

    for script, *given in gpu.PARTS.values():
        monkeypatch.setattr(sys, "argv", [script, *given, "--help"])
        with pytest.raises(SystemExit) as ended:
            __import__(script.removesuffix(".py")).main()
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert all(flag in text for flag in given if flag.startswith("--"))


class Played:
    """A process that is not one: it ends when looked at for the second time."""

    pid = -1

    def __init__(self, code, file):
        self.looks, self.code, self.file = 0, code, file

    def poll(self):
        self.looks += 1
        if self.looks < 2:
            return None
        if self.code == 0:
            self.file.parent.mkdir(exist_ok=True)
            self.file.write_text("{}")
        return self.code


@pytest.fixture
def study(tmp_path, monkeypatch):
    """The modules of the study, and what its command would do with some arguments."""
    monkeypatch.syspath_prepend(str(FOLDER))
    import study
    import study_runs

    def asked(*arguments):
        given = ["--model", "model", "--data", "data", "--out", str(tmp_path), *arguments]
        monkeypatch.setattr(sys, "argv", ["study.py", *given])
        args = study.arguments()
        return study.runs(args), study.settings_of(args)

    study.asked, study.each = asked, study_runs
    return study


def test_a_study_trains_teachers_first_and_speed_is_taken_alone(study, monkeypatch):
    monkeypatch.setattr(study.time, "sleep", lambda seconds: None)
    wanted, settings = study.asked("--seeds", "1", "--tasks", "mrpc", "wnut17")
    started, beside = [], []

    def start(run):
        beside.append([other.name for other in started if not settings.result(other).exists()])
        started.append(run)
        return Played(3 if run.name == "wnut17-teacher-jaxbrewer-0" else 0, settings.result(run))

    told = study.work_through(wanted, settings, start, 2, 60)
    assert {run.name: told[run.name] for run in started} == {
        "mrpc-teacher-jaxbrewer-0": "done",
        "wnut17-teacher-jaxbrewer-0": "failed with code 3",
        "mrpc-distilled-textbrewer-1": "done",
        "mrpc-distilled-jaxbrewer-1": "done",
        "mrpc-alone-jaxbrewer-1": "done",
        "all-speed-jaxbrewer-0": "done",
        "all-speed-textbrewer-0": "done",
    }
    assert told["wnut17-alone-jaxbrewer-1"] == "not started: no teacher"

    wanted = [run for run in wanted if run.task != "wnut17"]
    for again in (wanted[2], *wanted[-2:]):
        settings.result(again).unlink()
    started.clear()
    beside.clear()
    told = study.work_through(wanted, settings, start, 2, 60)
    assert set(told.values()) == {"done"}
    assert [run.name for run in started] == [
        wanted[2].name, "all-speed-jaxbrewer-0", "all-speed-textbrewer-0"
    ]  # fmt: skip
    assert beside == [[], [], []]


def test_a_study_stops_when_the_time_is_up(study, monkeypatch):
    ended = []
    monkeypatch.setattr(study.gpu, "end", ended.append)
    wanted, settings = study.asked("--seeds", "1", "--tasks", "mrpc")
    seconds = iter([0.0, 1.0, 99.0])
    monkeypatch.setattr(study.time, "monotonic", lambda: next(seconds))
    told = study.work_through(wanted, settings, lambda run: Played(0, Path()), 1, 60)
    assert told.pop("mrpc-teacher-jaxbrewer-0") == "out of time"
    assert len(ended) == 1 and set(told.values()) == {"not started: no time left"}


def test_a_study_compares_the_same_seeds_and_rows(study):
    Run = study.Run
    rng = np.random.default_rng(0)
    right = {run: rng.random(400) < share for run, share in (
        (Run("mrpc", "alone", 1), 0.8), (Run("mrpc", "alone", 2), 0.8), (Run("mrpc", "distilled", 1), 0.9),
    )}  # fmt: skip
    found = {
        run: {"counts": [[int(one), 1, 1] for one in ones], "seconds": 60.0, "MB": 1.0}
        for run, ones in right.items()
    }
    found[Run("all", "speed", 0)] = {"sentences/s": {"mrpc student": 7.0}}
    alone, distilled = study.tables(found)["beside TextBrewer"]
    mine = right[Run("mrpc", "distilled", 1)] * 1.0 - right[Run("mrpc", "alone", 1)]
    gain, low, high = (
        float(x.strip("()")) for x in distilled["− alone (95%)"].split() if x != "to"
    )
    assert gain == pytest.approx(100 * mine.mean(), abs=0.051)
    half = 196 * mine.std() / 20  # the usual interval of a mean
    assert [low, high] == pytest.approx([gain - half, gain + half], abs=0.6)
    assert alone["seeds"] == 2 and alone["− alone (95%)"] is None
    assert distilled["sentences/s"] == 7.0 and distilled["minutes"] == 1.0
    assert study.score(np.array([[2, 4, 3], [0, 0, 0]])).tolist() == [4 / 7, 0]  # F1 of spans


def test_a_study_has_all_of_its_losses_and_seeds(study):
    names = [run.name for run in study.asked()[0]]
    assert len(names) == len(set(names)) == 3 + 2 * 9 + 3 + 8 * 3 + 2
    assert [study.run_named(name).name for name in names] == names
    assert names[:3] == [f"{task}-teacher-jaxbrewer-0" for task in study.TASKS]
    only = study.asked("--only", "mrpc-*brewer-2", "--parts", "losses", "textbrewer")[0]
    assert [run.name for run in only] == [
        "mrpc-teacher-jaxbrewer-0",
        "mrpc-distilled-textbrewer-2",
        "mrpc-distilled-jaxbrewer-2",
        "mrpc-alone-jaxbrewer-2",
    ]


def tiny_study(folder, zoo, nnx):
    """A model of six layers, and data of a few rows, as the study reads them."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "town"]
    sizes = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 8}
    config = zoo.BertConfig(
        vocab_size=len(words), num_hidden_layers=6, max_position_embeddings=128, **sizes
    )
    zoo.BertModel(config, rngs=nnx.Rngs(0)).save_pretrained(folder / "model")
    (folder / "model" / "vocab.txt").write_text("\n".join(words) + "\n")
    (folder / "data" / "wnut17").mkdir(parents=True)
    tags = "good\tO\ntown\tB-location\n\nbad\tO\n\n" * 16
    for name in ("wnut17train.conll", "emerging.test.annotated"):
        (folder / "data" / "wnut17" / name).write_text(tags)


@pytest.mark.torch
def test_study(study, tmp_path, capsys):
    from flax import nnx

    from jaxbrewer import zoo

    tiny_study(tmp_path, zoo, nnx)
    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    wanted, settings = study.asked("--smoke", *given, "--only", "wnut17-distilled-textbrewer-1")
    for run in wanted:
        study.each.perform(run, settings)
    teacher, student = study.read(wanted, settings).values()
    for result in (teacher, student):
        assert [len(tags) for tags in result["predictions"]] == [2, 1] * 16
        assert sum(there for _, _, there in result["counts"]) == 16
    other = study.other_settings(study.read(wanted, settings), study.asked(*given)[1])
    assert "'max_examples': 32" in other and "name another folder by --out" in other
    study.asked("--smoke", *given, "--only", "wnut17-distilled-textbrewer-1")
    assert study.main() == 0  # both are there, and only shown
    shown = capsys.readouterr().out
    assert "beside TextBrewer" in shown and "| wnut17 | distilled " in shown
    rows = json.loads((tmp_path / "study.json").read_text())["rows"]
    assert [row["by"] for row in rows] == ["jaxbrewer", "textbrewer"]
    assert 0 < rows[1]["MB"] < rows[0]["MB"] < 1

    speed = study.Run("all", "speed", 0)
    study.each.perform(speed, settings)
    told = study.read([*wanted, speed], settings)
    assert set(told[speed]["sentences/s"]) == {"wnut17 teacher", "wnut17 teacher by onnxruntime"}
    assert study.tables(told)["beside TextBrewer"][0]["by ONNX"] > 0


@pytest.mark.torch
def test_same_weights(run, tmp_path):
    from flax import nnx

    from jaxbrewer import zoo

    tiny_study(tmp_path, zoo, nnx)
    given = ["--model", str(tmp_path / "model"), "--data", str(tmp_path / "data")]
    found = run("same_weights", *given, "--task", "wnut17", "--rows", "32")
    moved = [row for row in found["rows"] if not row["arrays"].endswith("key.bias")]
    assert {row["arrays"] for row in moved} > {"classifier.weight"}
    for row in moved:
        assert row["apart"] < 1e-3 * row["moved by jaxbrewer"]
    assert found["same_labels"] == [32, 32]


@pytest.mark.torch
def test_a_study_gives_textbrewer_the_nst_that_is_jaxbrewers(study):
    import torch

    from jaxbrewer.presets import MATCH_LOSS_MAP

    rng = np.random.default_rng(0)
    S, T = ([rng.normal(size=(2, 5, width)).astype(np.float32)] * 2 for width in (8, 12))
    mask = np.array([[1, 1, 1, 0, 0], [1] * 5])
    theirs = study.each.nst_by_width(
        *([torch.tensor(x) for x in two] for two in (S, T)), torch.tensor(mask)
    )
    assert float(theirs) == pytest.approx(float(MATCH_LOSS_MAP["nst"](S, T, mask)), rel=1e-6)


def test_the_recipes_of_a_study_can_be_read(study):
    from jaxbrewer.recipes.schema import Recipe, from_table

    wanted, settings = study.asked("--max-examples", "100")
    made = {run: study.each.recipe(run, settings) for run in wanted if run.way != "speed"}
    for recipe in made.values():
        from_table(Recipe, recipe)
    without = {run.way for run, recipe in made.items() if "distillation" not in recipe}
    assert without == {"teacher", "alone", "labels"}
    assert {study.each.rows_of(run, settings) for run in made} == {96}


def test_exact(run):
    (row,) = run("exact")["rows"]
    assert row["means ms"] > 0
    assert row["exact ms"] > 0
