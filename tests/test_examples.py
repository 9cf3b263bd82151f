"""The examples: each does what its README says, on a few generated rows."""

import functools
import importlib.util
import json
import re
import shlex
import sys
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from jaxbrewer import KD_LOSS_MAP, MATCH_LOSS_MAP, zoo
from jaxbrewer.__main__ import main as jaxbrewer
from jaxbrewer.recipes.reading import read_recipe

from .example_files import EXAMPLES, ROWS, copied, smaller

# --- Those whose README begins with a cd ----------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A copy of the examples, with small models and rows."""
    return copied(tmp_path_factory.mktemp("examples") / "examples")


@pytest.fixture
def run(place, monkeypatch, capsys):
    """Runs the commands of an example's README; returns what they print."""

    def commands_of(example):
        monkeypatch.chdir(place / example)
        for command in commands(example):
            if "teacher.toml" in command and example not in ("sentiment", "chinese_sentiment"):
                read_recipe("teacher.toml")  # its teacher is there already
            else:
                called(command)
        return capsys.readouterr().out

    # No number is compared here, and most of the time would go into compiling.
    jax.config.update("jax_disable_most_optimizations", True)
    yield commands_of
    jax.config.update("jax_disable_most_optimizations", False)


def commands(example):
    """The commands in the first block of an example's README, after the ``cd`` into its folder."""
    text = (EXAMPLES / example / "README.md").read_text(encoding="utf-8")
    block = re.search(r"```bash\n(.*?)```", text, re.DOTALL).group(1).replace("\\\n", " ")
    first, *others = (shlex.split(line, comments=True) for line in block.splitlines())
    assert first == ["cd", f"examples/{example}"]
    return [command for command in others if command]


def called(command):
    """A command in this process; what it trains is small and trained for an epoch."""
    program, *arguments = command
    recipe = next((Path(name) for name in arguments if name.endswith(".toml")), None)
    if recipe is not None:
        arguments += [x for k, v in smaller(recipe).items() for x in (f"--{k}", json.dumps(v))]
    if program == "jaxbrewer":
        assert jaxbrewer(arguments) == 0
        return
    assert program == "python"
    path, *arguments = arguments
    module = loaded(path)
    if recipe is not None:
        assert module.main(arguments) == 0
        return
    less = ["--layers", "2", "--width", "8"] if "--text" in arguments else ["--epochs", "1"]
    found = module.main([*arguments, *less])
    assert found and all(np.isfinite(value) for value in found.values())


def loaded(path):
    """The module of a script, read anew."""
    spec = importlib.util.spec_from_file_location("example", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measured(told, who="student"):
    """The numbers that `jaxbrewer train` has told of the teacher, or of the student, last."""
    line = [line for line in told.splitlines() if line.split()[:1] == [who]][-1]
    names = line.split()[1:]
    return {name: float(value) for name, value in zip(names[::2], names[1::2], strict=True)}


def student_of(place, example, folder):
    """The student that an example has written."""
    return zoo.from_pretrained(place / example / "out" / folder / "student")


def test_sentiment(run, place):
    told = run("sentiment")
    assert measured(told).keys() == {"accuracy", "agreement"}
    assert told.count('"probability"') == ROWS
    for folder in ("distilled", "main"):
        assert student_of(place, "sentiment", folder).config.num_hidden_layers == 1


def test_pairs(run, place):
    told = run("pairs")
    assert measured(told).keys() == {"accuracy", "f1", "precision", "recall", "agreement"}
    assert student_of(place, "pairs", "distilled").config.num_hidden_layers == 1


def test_tagging(run, place):
    told = run("tagging")
    assert "span_f1" in measured(told) and told.count('"tags"') == ROWS
    for folder in ("distilled", "main"):
        student = student_of(place, "tagging", folder)
        assert student.task == "token-classification" and student.config.num_hidden_layers == 1


def test_a_word_has_its_tag_at_its_first_piece():
    aligned = loaded(EXAMPLES / "tagging" / "main.py").aligned
    assert aligned([None, 0, 0, 1, 2, 2, None], [3, 1, 4]) == [-100, 3, -100, 1, 4, -100, -100]


def test_questions(run, place):
    told = run("questions")
    assert measured(told).keys() == {"exact_match", "f1"} and told.count('"answer"') == ROWS
    assert student_of(place, "questions", "distilled").task == "question-answering"


def test_several_tasks(run, place):
    told = run("several_tasks")
    assert "sentiment/accuracy" in told and "pairs/accuracy" in told
    models = [
        zoo.from_pretrained(place / "several_tasks" / "out" / "main" / task)
        for task in ("sentiment", "pairs")
    ]
    encoders, heads = ([getattr(m, part) for m in models] for part in ("bert", "classifier"))
    assert jax.tree.all(jax.tree.map(lambda a, b: (a == b).all(), *map(nnx.state, encoders)))
    assert (heads[0].kernel[...] != heads[1].kernel[...]).any()


def test_several_teachers(run, place):
    assert measured(run("several_teachers")).keys() == {"accuracy"}
    assert student_of(place, "several_teachers", "distilled").config.num_hidden_layers == 1


def test_emd(run, place):
    assert "accuracy" in run("emd")
    assert student_of(place, "emd", "main").config.num_hidden_layers == 1


def test_own_loss(run, place, request):
    for losses, name in ((KD_LOSS_MAP, "focal_kl"), (MATCH_LOSS_MAP, "huber")):
        request.addfinalizer(functools.partial(losses.pop, name, None))
    assert measured(run("own_loss")).keys() == {"accuracy", "agreement"}
    assert student_of(place, "own_loss", "distilled").config.num_hidden_layers == 1


def test_the_losses_of_ones_own_are_what_they_say(request):
    for losses, name in ((KD_LOSS_MAP, "focal_kl"), (MATCH_LOSS_MAP, "huber")):
        request.addfinalizer(functools.partial(losses.pop, name, None))
    own = loaded(EXAMPLES / "own_loss" / "main.py")
    rng = np.random.default_rng(0)
    S, T = rng.normal(size=(2, 4, 3)).astype(np.float32)
    plain = KD_LOSS_MAP["kl"](S, T, 2.0)
    assert own.focal_kl(S, T, 2.0, gamma=0) == pytest.approx(float(plain), rel=1e-5)
    assert 0 < own.focal_kl(S, T, 2.0) < plain and own.focal_kl(S, S, 2.0) == 0
    S, T = S[:, None] * 9, T[:, None]
    whole = own.huber(S, T, np.array([[1], [1], [0], [0]]))
    assert whole == pytest.approx(float(own.huber(S[:2], T[:2])), rel=1e-5)
    assert own.huber(S, T) < MATCH_LOSS_MAP["hidden_mse"](S, T) / 2


def test_own_objective(run, place):
    assert "accuracy" in run("own_objective")
    assert student_of(place, "own_objective", "main").config.num_hidden_layers == 1


def test_lora(run, place):
    assert "accuracy" in run("lora")
    began = zoo.from_pretrained(place / "sentiment" / "pretrained")
    ended = student_of(place, "lora", "main")
    before, after = began.encoder.layer[0].attention, ended.bert.encoder.layer[0].attention
    assert (before.value.kernel[...] != after.value.kernel[...]).any()
    assert (before.key.kernel[...] == after.key.kernel[...]).all()


def test_two_tokenizers(run, place):
    told = run("two_tokenizers")
    assert measured(told).keys() == {"accuracy", "agreement"}
    assert told.count('"probability"') == ROWS
    words = (
        place / "two_tokenizers" / "out" / "distilled" / "student" / "tokenizer.json"
    ).read_text()
    assert words == (place / "two_tokenizers" / "pretrained" / "tokenizer.json").read_text()


def test_chinese_sentiment(run, place):
    told = run("chinese_sentiment")
    assert measured(told).keys() == {"accuracy", "agreement"}
    tokens = json.loads(
        (
            place / "chinese_sentiment" / "out" / "distilled" / "student" / "tokenizer.json"
        ).read_text()
    )
    assert {"很", "好", "房", "[MASK]"} <= tokens["model"]["vocab"].keys()


def test_multilingual(run, place):
    assert "'before'" in run("multilingual")
    assert type(student_of(place, "multilingual", "main")) is zoo.SentenceEncoder


def test_all_examples_are_in_the_table():
    table = (EXAMPLES / "README.md").read_text(encoding="utf-8")
    names = {path.parent.name for path in EXAMPLES.glob("*/*.py")}
    names |= {path.parent.name for path in EXAMPLES.glob("*/*.toml")}
    assert set(re.findall(r"\]\((\w+)/", table)) == names


RECIPES = sorted(EXAMPLES.glob("*/recipe.toml"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.parent.name)
def test_matches_are_of_the_layers_that_the_student_begins_with(path):
    recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    matches = recipe["distillation"].get("intermediate_matches", [])
    begun = [0, *(layer + 1 for layer in recipe["student"].get("layers", []))]
    for match in matches:
        ours, theirs = (np.ravel(match[side]).tolist() for side in ("layer_S", "layer_T"))
        assert [begun[layer] for layer in ours] == theirs
    assert matches or "layers" not in recipe["student"] or isinstance(recipe["teacher"], list)


# --- The others -----------------------------------------------------------------------------------


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLES / "quickstart"))
    yield importlib.import_module("quickstart")
    for name in ("quickstart", "corpus"):
        sys.modules.pop(name, None)


def test_passages_are_the_same_each_time_and_never_on_both_sides(quickstart):
    corpus = sys.modules["corpus"]
    everything = corpus.passages()
    assert everything == corpus.passages()
    train, dev = corpus.split(everything)
    assert len(train) > 4 * len(dev) / 2 > 500
    assert not {p.group for p in train} & {p.group for p in dev}
    assert {p.label for p in dev} == set(range(len(corpus.PACKAGES)))
    assert not any(name in p.text for p in everything for name in ("asyncio", "unittest"))


def test_the_few_labels_are_a_fifth_of_each_class_and_the_order_is_the_epochs(quickstart):
    data = {
        "input_ids": np.arange(1200).reshape(600, 2),
        "labels": np.repeat(np.arange(12), 50),
    }
    few = quickstart.a_fifth(data, seed=0)
    assert np.bincount(few["labels"]).tolist() == [10] * 12
    loader = quickstart.Loader(data, seed=1)
    first, again = ([b["input_ids"] for b in loader] for _ in range(2))
    np.testing.assert_array_equal(first, again)
    loader.set_epoch(1)
    assert (np.stack([b["input_ids"] for b in loader]) != np.stack(first)).any()
    assert len(first) == len(loader) == 18


def test_the_objective_is_a_config(quickstart):
    losses = [match.loss for match in quickstart.objective().intermediate_matches]
    assert losses == ["hidden_mse", "hidden_mse", "nst"]


@pytest.fixture
def sentence_encoder():
    return loaded(EXAMPLES / "sentence_encoder" / "main.py")


def test_a_sentence_encoder_is_distilled_from_a_folder_and_files(
    sentence_encoder, tmp_path, monkeypatch, capsys
):
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    words = ["the", "dog", "sleeps", "under", "a", "table", "and", "plays", "guitar", "on", "stage"]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["[UNK]", *words])}, "[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = zoo.BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
    )
    encoder = zoo.BertModel(config, rngs=nnx.Rngs(0))
    zoo.SentenceEncoder(encoder).save_pretrained("teacher")
    tokenizer.save("teacher/tokenizer.json")
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(48)]
    Path("plain.txt").write_text("\n".join(lines[:20]) + "\n\n")
    pairs = zip(lines[20:34], lines[34:], strict=True)
    Path("pairs.tsv").write_text(
        "Quality\t#1 String\t#2 String\n" + "".join(f"1\t{a}\t{b}\n" for a, b in pairs)
    )
    command = "teacher --sentences plain.txt pairs.tsv --pairs pairs.tsv --batch-size 8 --epochs 2"
    found = sentence_encoder.main(command.split())
    assert -1 <= found["before"] <= 1 and -1 <= found["after"] <= 1
    printed = capsys.readouterr().out
    assert "layers 2 → 1; 14 held-out pairs" in printed and "48 sentences" in printed
    student = zoo.from_pretrained("runs/sentence_encoder/student")
    assert student.config.num_hidden_layers == 1
    assert Path("runs/sentence_encoder/student/tokenizer.json").is_file()


def test_the_columns_of_a_file_are_found(sentence_encoder, tmp_path):
    file = tmp_path / "x.tsv"
    file.write_text(
        '\ufeffQuality\t#1 String\t#2 String\n1\tHe said "no\tShe did\n', encoding="utf-8"
    )
    assert sentence_encoder.columns(file) == [['He said "no'], ["She did"]]
    file.write_text("sentence\tlabel\nfine\t1\n")
    assert sentence_encoder.columns(file) == [["fine"]]
    file.write_text("one line\n\nanother\n")
    assert sentence_encoder.columns(file) == [["one line", "another"]]
    assert sentence_encoder.sentences_of([file, file], 1) == ["one line"]


@pytest.fixture
def reranker():
    return loaded(EXAMPLES / "reranker" / "main.py")


def test_a_cross_encoder_is_distilled_from_folders_and_groups(
    reranker, tmp_path, monkeypatch, capsys
):
    from tokenizers import Tokenizer, models, pre_tokenizers

    monkeypatch.chdir(tmp_path)
    words = ["the", "dog", "sleeps", "under", "a", "table", "and", "plays", "guitar", "on", "stage"]
    tokenizer = Tokenizer(
        models.WordLevel({w: i for i, w in enumerate(["[PAD]", "[UNK]", *words])}, "[UNK]")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    config = zoo.BertConfig(
        vocab_size=16,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=8,
        num_labels=1,
    )
    teacher = zoo.BertForSequenceClassification(config, rngs=nnx.Rngs(0))
    teacher.save_pretrained("teacher")
    zoo.SentenceEncoder(zoo.BertModel(config, rngs=nnx.Rngs(1))).save_pretrained("student")
    for folder in ("teacher", "student"):
        tokenizer.save(f"{folder}/tokenizer.json")
    rng = np.random.default_rng(0)
    groups = [
        [" ".join(rng.choice(words, rng.integers(2, 7))) for _ in range(4)] for _ in range(16)
    ]
    lines = [
        json.dumps({"query": query, "positive": positive, "negatives": negatives})
        for query, positive, *negatives in groups[:8]
    ]
    Path("train.jsonl").write_text("\n".join(lines) + "\n\n")
    Path("held.tsv").write_text("\n".join(map("\t".join, groups[8:])) + "\nshort\tgroup\n")
    command = (
        "teacher student --groups train.jsonl --held-out held.tsv --negatives 2 --batch-size 4 "
        "--max-length 16 --query-length 8"
    )
    found = reranker.main(command.split())
    assert 0 <= found["before"] <= 1 and 0 <= found["after"] <= 1
    printed = capsys.readouterr().out
    assert "8 groups, 2 steps" in printed and "best of 3, in 8 held-out groups" in printed
    assert type(zoo.from_pretrained("runs/reranker/student")) is zoo.SentenceEncoder
    assert Path("runs/reranker/student/tokenizer.json").is_file()
    with pytest.raises(SystemExit, match="no group has a positive and 3 negatives"):
        reranker.groups_of(["held.tsv"], 3, 9)


@pytest.fixture
def task_agnostic():
    return loaded(EXAMPLES / "task_agnostic" / "main.py")


def test_a_language_model_is_distilled_from_a_folder_and_lines_of_text(
    task_agnostic, tmp_path, monkeypatch, capsys
):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    monkeypatch.chdir(tmp_path)
    words = ["the", "dog", "sleeps", "under", "a", "table", "and", "plays", "guitar", "on", "stage"]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    config = zoo.BertConfig(
        vocab_size=18,
        hidden_size=8,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=8,
    )
    zoo.BertForMaskedLM(config, rngs=nnx.Rngs(0)).save_pretrained("teacher")
    tokenizer.save("teacher/tokenizer.json")
    assert task_agnostic.masking(tokenizer, 18) == {
        "mask_id": 4, "vocab_size": 18, "special_ids": [0, 1, 2, 3, 4]
    }  # fmt: skip
    rng = np.random.default_rng(0)
    lines = [" ".join(rng.choice(words, rng.integers(2, 9))) for _ in range(48)]
    Path("text.txt").write_text("\n".join([*lines[:40], "", lines[0]]))
    Path("held.txt").write_text("\n".join(lines[40:]))
    command = "teacher --text text.txt --held-out held.txt --batch-size 8 --max-length 6"
    found = task_agnostic.main(command.split())
    assert all(0 <= found[name] <= 1 for name in ("before", "after", "teacher"))
    printed = capsys.readouterr().out
    assert "layers 2 → 1" in printed and "40 lines" in printed
    student = zoo.from_pretrained("runs/task_agnostic/student")
    assert type(student) is zoo.BertForMaskedLM and student.config.num_hidden_layers == 1
    assert Path("runs/task_agnostic/student/tokenizer.json").is_file()


def test_what_is_cut_off_a_line_is_an_example_too(task_agnostic):
    from tokenizers import Tokenizer, models, pre_tokenizers

    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_truncation(2)
    columns = task_agnostic.tokenized(tokenizer, ["a b a", "b"])
    assert columns["input_ids"] == [[1, 2], [1], [2]]
    assert columns["attention_mask"] == [[1, 1], [1], [1]]
    with pytest.raises(SystemExit, match="has none of"):
        task_agnostic.masking(tokenizer, 3)
