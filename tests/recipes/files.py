"""Small models with tokenizers, and files of generated rows."""

import functools
import json
import tempfile
from pathlib import Path

import numpy as np
from flax import nnx

from jaxbrewer import zoo

WORDS = ["good", "fine", "bad", "poor", "film", "book", "the", "a", "very", "Anna", "Oslo"]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
CONFIG = zoo.BertConfig(
    vocab_size=32,
    hidden_size=8,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=8,
    max_position_embeddings=32,
    hidden_dropout_prob=0.0,
    attention_probs_dropout_prob=0.0,
)
HEADS = {
    "sequence-classification": (zoo.BertForSequenceClassification, ("bad", "good")),
    "token-classification": (zoo.BertForTokenClassification, ("O", "B-PER", "B-LOC")),
    "question-answering": (zoo.BertForQuestionAnswering, None),
}


def write_tokenizer(folder, words=WORDS):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    vocabulary = {w: i for i, w in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, vocabulary[name]) for name in ("[SEP]", "[CLS]")]
    tokenizer.post_processor = processors.BertProcessing(*ends)
    Path(folder).mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(Path(folder) / "tokenizer.json"))


def write_model(folder, task, seed=0):
    for name, content in model_files(task, seed).items():
        Path(folder).mkdir(parents=True, exist_ok=True)
        (Path(folder) / name).write_bytes(content)
    write_tokenizer(folder)
    return str(folder)


@functools.cache
def model_files(task, seed):
    """What a model is saved as: name → content; made once, since it takes a second."""
    cls, names = HEADS[task]
    config = CONFIG.replace(label_names=names, num_labels=len(names or "12"))
    with tempfile.TemporaryDirectory() as folder:
        cls(config, rngs=nnx.Rngs(seed)).save_pretrained(folder)
        return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def sentences(count, seed=0):
    """Words, and whether they hold a good one."""
    rng = np.random.default_rng(seed)
    rows = [list(rng.choice(WORDS, rng.integers(2, 9))) for _ in range(count)]
    return [([*map(str, words)], bool({"good", "fine"} & {*words})) for words in rows]


def write_tsv(path, count, seed=0):
    lines = [f"{' '.join(w)}\t{'good' if good else 'bad'}" for w, good in sentences(count, seed)]
    Path(path).write_text("\n".join(["text\tlabel", *lines]) + "\n")


def write_conll(path, count, seed=0):
    tags = {"Anna": "B-PER", "Oslo": "B-LOC"}
    blocks = [
        "\n".join(f"{w}\t{tags.get(w, 'O')}" for w in words) for words, _ in sentences(count, seed)
    ]
    Path(path).write_text("\n\n".join(blocks) + "\n")


def write_squad(path, count, seed=0, impossible=False):
    rows = []
    for i, (words, _) in enumerate(sentences(count, seed)):
        context = " ".join(words * 2)
        word, lacks = words[-1], impossible and i % 3 == 0
        answer = {"text": word, "answer_start": context.index(word)}
        asked = {"id": str(i), "question": f"the {word}", "answers": [] if lacks else [answer]}
        rows.append({"paragraphs": [{"context": context, "qas": [asked]}]})
    Path(path).write_text(json.dumps({"version": "v2.0", "data": rows}))


WRITERS = {
    "sequence-classification": ("tsv", write_tsv),
    "token-classification": ("conll", write_conll),
    "question-answering": ("json", write_squad),
}


def recipe(folder, task, **changes):
    """A recipe of a task over files that are written into a folder."""
    suffix, write = WRITERS[task]
    for name, count in (("train", 20), ("dev", 10)):
        write(folder / f"{name}.{suffix}", count, seed=count)
    data = {
        "train": str(folder / f"train.{suffix}"),
        "eval": str(folder / f"dev.{suffix}"),
        "max_length": 16,
        "batch_size": 10,
        "buckets": [16],
    }
    if task == "sequence-classification":
        data["text"] = "text"
    if task == "question-answering":
        data["stride"] = 4
    return {
        "task": task,
        "teacher": write_model(folder / "teacher", task),
        "student": {"layers": [1]},
        "data": data,
        "training": {"output_dir": str(folder / "out"), "device": "cpu"},
        "distillation": {
            "temperature": 2,
            "hard_label_weight": 1,
            "intermediate_matches": [
                {
                    "layer_T": 2,
                    "layer_S": 1,
                    "feature": "hidden",
                    "loss": "hidden_mse",
                    "weight": 1,
                }
            ],
        },
        "optimizer": {"name": "adamw", "learning_rate": 1e-2},
        "num_epochs": 1,
    } | changes
