"""Small models with tokenizers, and a few generated rows, where the examples look for them."""

import functools
import shutil
import tempfile
import tomllib
from pathlib import Path

import numpy as np
from flax import nnx

from jaxbrewer import zoo

from .recipes.files import CONFIG, WORDS, write_conll, write_squad, write_tokenizer

EXAMPLES = Path(__file__).parent.parent / "examples"
ROWS = 32  # a batch of them: one step an epoch


def copied(folder):
    """The examples in a folder of their own, with what their READMEs ask for."""
    shutil.copytree(
        EXAMPLES, folder, ignore=shutil.ignore_patterns("out", "data", "pretrained", "teacher")
    )
    for name, write in DATA.items():
        (folder / name / "data").mkdir(parents=True)
        for number, part in enumerate(("train", "dev")):
            write(folder / name / "data", part, np.random.default_rng(number))
    for place, (cls, labels) in MODELS.items():
        words = WORDS[::-1] if place.startswith("two_tokenizers") else WORDS
        write_model(folder / place, cls, words, labels)
    return folder


def write_model(folder, cls, words, labels):
    """A model of two layers with its tokenizer."""
    Path(folder).mkdir(parents=True)
    for name, content in _model_files(cls, labels).items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    write_tokenizer(folder, words)


@functools.cache
def _model_files(cls, labels):
    """What a model is saved as: name → content; made once, since it takes a second."""
    names = {"num_labels": len(labels), "label_names": labels} if labels else {}
    encoder = zoo.BertModel if cls is zoo.SentenceEncoder else cls
    # A teacher is not what its student begins with: there would be nothing to learn.
    model = encoder(CONFIG.replace(**names), rngs=nnx.Rngs(1 if labels else 0))
    with tempfile.TemporaryDirectory() as folder:
        (model if encoder is cls else cls(model)).save_pretrained(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def sentence(rng, length=5):
    """Some words, and whether there is a good one."""
    words = [str(word) for word in rng.choice(WORDS, length)]
    return words, int("good" in words or "fine" in words)


def write_table(path, header, rows):
    lines = ["\t".join(map(str, row)) for row in (header, *rows)]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _sentiment(folder, part, rng):
    rows = [sentence(rng) for _ in range(ROWS)]
    named = [(" ".join(words), label) for words, label in rows]
    write_table(folder / f"{part}.tsv", ("sentence", "label"), named)


def _pairs(folder, part, rng):
    header = ("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String")
    texts = [" ".join(sentence(rng, 2)[0]) for _ in range(2 * ROWS)]
    rows = [(int(a[0] == b[0]), 1, 2, a, b) for a, b in zip(texts[::2], texts[1::2], strict=True)]
    write_table(folder / f"{part}.tsv", header, rows)


def _chinese(folder, part, rng):
    texts = ["".join(rng.choice([*"很好不错房间小服务"], 5)) for _ in range(ROWS)]
    rows = [(int("好" in text), text) for text in texts]
    write_table(folder / f"{part}.tsv", ("label", "text_a"), rows)


def _parallel(folder, part, rng):
    texts = [" ".join(sentence(rng)[0]) for _ in range(ROWS)]
    write_table(folder / f"{part}.tsv", texts[:2], zip(texts[::2], texts[1::2], strict=True))


DATA = {
    "sentiment": _sentiment,
    "pairs": _pairs,
    "tagging": lambda folder, part, rng: write_conll(folder / f"{part}.conll", ROWS),
    "questions": lambda folder, part, rng: write_squad(folder / f"{part}.json", ROWS),
    "chinese_sentiment": _chinese,
    "multilingual": _parallel,
}
"""Example → what writes its files."""

_CLASSES = (zoo.BertForSequenceClassification, ("0", "1"))
_TAGS = (zoo.BertForTokenClassification, ("O", "B-PER", "B-LOC"))
MODELS = {
    **{
        f"{name}/pretrained": (zoo.BertModel, None)
        for name in ("sentiment", "pairs", "tagging", "questions", "two_tokenizers")
    },
    **{f"multilingual/{name}": (zoo.SentenceEncoder, None) for name in ("teacher", "pretrained")},
    "sentiment/out/teacher/student": _CLASSES,
    "pairs/out/teacher/student": _CLASSES,
    "tagging/out/teacher/student": _TAGS,
    "questions/out/teacher/student": (zoo.BertForQuestionAnswering, None),
    "several_teachers/out/teacher1/student": _CLASSES,
    "several_teachers/out/teacher2/student": _CLASSES,
}
"""Folder → the class of the model there, and its labels."""


def smaller(path):
    """Settings that make a recipe one of a teacher of two layers, with one epoch of short batches.

    Of its matches those of the embeddings and of the last layers stay; see `test_matches_…`.
    """
    recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    settings = {"num_epochs": 1, "data.batch_size": ROWS, "data.buckets": [16]}
    settings["data.max_length"] = 16
    if "stride" in recipe["data"]:
        settings["data.stride"] = 4
    if "layers" in recipe["student"]:
        settings["student.layers"] = [1]
    matches = recipe.get("distillation", {}).get("intermediate_matches")
    if matches:
        settings["distillation.intermediate_matches"] = [*_ends(matches)]
    return settings


def _ends(matches):
    """The matches of layers 0, and of the last layers as those of two layers and of one."""
    layers = [np.max(match["layer_T"]) for match in matches]
    for match, layer in zip(matches, layers, strict=True):
        pair = isinstance(match["layer_T"], list)
        if layer == 0:
            yield match
        elif layer == max(layers):
            yield match | {"layer_T": [2, 2] if pair else 2, "layer_S": [1, 1] if pair else 1}
