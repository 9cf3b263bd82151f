"""``jaxbrewer suggest``, on two small folders and some lines of text."""

import json

import pytest
from flax import nnx
from tokenizers import Tokenizer, models, pre_tokenizers

from jaxbrewer import DistillationConfig, zoo
from jaxbrewer.__main__ import main

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "a", "lazy", "dog", "and", "runs"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A teacher, a student and a file of sentences."""
    folder = tmp_path_factory.mktemp("models")
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    for name, layers, width in (("teacher", 3, 12), ("student", 1, 8)):
        config = zoo.BertConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=2,
            intermediate_size=8,
            max_position_embeddings=16,
        )
        zoo.BertModel(config, rngs=nnx.Rngs(0)).save_pretrained(folder / name)
        tokenizer.save(str(folder / name / "tokenizer.json"))
    lines = [" ".join(WORDS[i:]) for i in range(8)]
    lines.append(" ".join(WORDS * 3))  # longer than there are positions
    (folder / "lines.txt").write_text("\n".join(lines))
    return folder


@pytest.fixture
def suggest(made, capsys, monkeypatch):
    monkeypatch.chdir(made)

    def call(*options, **changes):
        given = {"--teacher": "teacher", "--student": "student", "--data": "lines.txt"} | changes
        code = main(["suggest", *(word for pair in given.items() for word in pair), *options])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return call


def test_matches_and_likeness_are_told(suggest, made):
    code, told = suggest("--plot", "alike.png")
    assert code == 0
    count = sum(
        min(len(line.split()), 16) for line in (made / "lines.txt").read_text().splitlines()
    )
    assert f"linear CKA over {count} positions" in told
    assert "S0: by depth T0, most alike T" in told and "S1: by depth T3, most alike T" in told
    assert "What it does not" in told
    found = json.loads(told.partition("by depth:\n")[2])
    assert found == zoo.suggest_matches(
        *(zoo.read_config(made / name) for name in ("teacher", "student"))
    )
    assert found[0]["proj"] == ["linear", 8, 12]
    DistillationConfig(intermediate_matches=found)
    assert (made / "alike.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("loss", "layers"), [("nst", [0, 0]), ("attention_ce_mean", 0)], ids=["twice", "attention"]
)
def test_other_losses(suggest, loss, layers):
    code, told = suggest("--loss", loss)
    assert code == 0 and "S1: by depth T3" in told
    assert json.loads(told.partition("by depth:\n")[2])[0]["layer_S"] == layers


def test_mistakes(suggest, made):
    for changes, said in (
        ({"--teacher": "nowhere"}, "no folder 'nowhere'"),
        ({"--data": "nowhere.txt"}, "there is no such file"),
        ({"--text": "sentence"}, "lines.txt has no column 'sentence': there is text"),
        ({"--loss": "pkd"}, "loss='pkd': expected one of"),
        ({"--teacher": "student", "--student": "teacher"}, "the student has 3 layers"),
        ({"--plot": "lines.txt/x.png"}, "cannot be written"),
    ):
        code, told = suggest(**changes)
        assert code == 2 and said in told, told
    tokenizer = Tokenizer(models.WordLevel({"[PAD]": 0, "[UNK]": 1}, "[UNK]"))
    file = made / "student" / "tokenizer.json"
    kept = file.read_text()
    try:
        tokenizer.save(str(file))
        assert "have other tokens" in suggest()[1]
        tokenizer.add_tokens([f"word{i}" for i in range(30)])
        tokenizer.save(str(file))
        both = {"--teacher": "student", "--student": "student"}
        assert "the tokenizer has 32 tokens, and a model has vocab_size=13" in suggest(**both)[1]
        file.write_text("{")
        assert "cannot be read" in suggest()[1]
    finally:
        file.write_text(kept)
