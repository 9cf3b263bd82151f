"""A sentence encoder distilled into its own first half, on sentences without labels.

    python examples/sentence_encoder/main.py TEACHER --sentences FILE… --pairs FILE

TEACHER is a folder of sentence-transformers, such as ``all-MiniLM-L6-v2``. The sentences are lines of
text files, or the columns of tab-separated files named in a header (``sentence``, ``#1 String``,
``#2 String``: GLUE's SST-2 and MRPC as they are). The pairs, a file with two such columns, are held
out: on them, the student's cosine similarities are compared with the teacher's.

Every second layer of the teacher begins the student. Each sentence's vector is then pulled towards
the teacher's (``cos``), and so are the last hidden states (``hidden_mse``). What is left in ``--out``
is a folder that sentence-transformers reads.
"""

import argparse
import csv
import functools
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from scipy.stats import spearmanr
from tokenizers import Tokenizer

from jaxbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from jaxbrewer.data import bucket_by_length
from jaxbrewer.schedulers import get_linear_schedule_with_warmup
from jaxbrewer.zoo import SentenceEncoder, adaptor, from_pretrained, init_from_layers

COLUMNS = ("sentence", "#1 String", "#2 String")


def columns(path: str | Path) -> list[list[str]]:
    """The columns of text in a file: those named in its header, or all of its lines as one."""
    text = Path(path).read_text(encoding="utf-8-sig")
    lines = text.splitlines()
    names = lines[0].split("\t") if lines else []
    if not any(name in COLUMNS for name in names):
        return [[line.strip() for line in lines if line.strip()]]
    rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [[row[name].strip() for row in rows] for name in names if name in COLUMNS]


def sentences_of(paths: Sequence[str], limit: int) -> list[str]:
    """The sentences of all files, each once, the first `limit` of each file's."""
    found: dict[str, None] = {}
    for path in paths:
        for column in columns(path):
            found |= dict.fromkeys(column[:limit])
    return [sentence for sentence in found if sentence]


def tokenized(tokenizer: Tokenizer, sentences: Sequence[str]) -> dict[str, list[list[int]]]:
    """The columns that the encoder takes, each sentence as long as it is."""
    encodings = tokenizer.encode_batch(list(sentences))
    return {
        "input_ids": [e.ids for e in encodings],
        "attention_mask": [e.attention_mask for e in encodings],
    }


def embeddings(
    model: SentenceEncoder, tokenizer: Tokenizer, sentences: Sequence[str]
) -> np.ndarray:
    """A vector for each sentence, in their order: padded to one length, a hundred at a time."""
    model.eval()
    run = nnx.jit(lambda model, batch: model(**batch).embedding)
    parts = [run(model, batch) for batch in padded(tokenized(tokenizer, sentences), 100)]
    return np.concatenate(jax.device_get(parts))[: len(sentences)]


def padded(encodings: dict[str, list[list[int]]], size: int) -> Iterator[dict[str, np.ndarray]]:
    """Batches of one shape; the last is filled up with its first row."""
    length = max(map(len, encodings["input_ids"]))
    for start in range(0, len(encodings["input_ids"]), size):
        batch = {}
        for name, rows in encodings.items():
            some = rows[start : start + size]
            some += some[:1] * (size - len(some))
            batch[name] = np.array([row + [0] * (length - len(row)) for row in some])
        yield batch


def similarities(model: SentenceEncoder, tokenizer: Tokenizer, pairs: Any) -> np.ndarray:
    """The cosine of each pair."""
    first, second = (embeddings(model, tokenizer, side) for side in pairs)
    lengths = np.linalg.norm(first, axis=1) * np.linalg.norm(second, axis=1)
    return np.sum(first * second, axis=1) / lengths


def student_of(teacher: SentenceEncoder, layers: Sequence[int]) -> SentenceEncoder:
    """A student begun from some of the teacher's layers, with its pooling."""
    config = teacher.config.replace(num_hidden_layers=len(layers))
    kind = type(teacher.encoder)
    student = SentenceEncoder(kind(config, rngs=nnx.Rngs(0)), teacher.sentence)
    return init_from_layers(student, teacher, layers=layers)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="a folder of sentence-transformers, with a tokenizer.json")
    parser.add_argument("--sentences", nargs="+", required=True, help="files to distil on")
    parser.add_argument("--pairs", required=True, help="a file of pairs that are held out")
    parser.add_argument("--limit", type=int, default=16000, help="lines of each file")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=64)
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--device", default=jax.default_backend())
    parser.add_argument("--out", default="runs/sentence_encoder")
    args = parser.parse_args(argv)

    teacher = from_pretrained(args.teacher, output_hidden_states=True)
    tokenizer = Tokenizer.from_file(str(Path(args.teacher) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(args.max_length)
    depth = teacher.config.num_hidden_layers
    layers = list(range(1, depth, 2)) or [0]
    student = student_of(teacher, layers)
    pairs = columns(args.pairs)[:2]
    sentences = sentences_of(args.sentences, args.limit)

    truth = similarities(teacher, tokenizer, pairs)
    before = spearmanr(similarities(student, tokenizer, pairs), truth).statistic
    loader = bucket_by_length(
        tokenized(tokenizer, sentences), batch_size=args.batch_size, padding={"input_ids": 0}
    )
    steps = args.epochs * len(loader)
    match = {"layer_T": 0, "layer_S": 0, "feature": "embedding", "loss": "cos", "weight": 1}
    last = {"layer_T": depth, "layer_S": len(layers), "feature": "hidden", "loss": "hidden_mse"}
    distiller = GeneralDistiller(
        TrainingConfig(
            output_dir=f"{args.out}/checkpoints", log_dir=f"{args.out}/log", device=args.device
        ),
        DistillationConfig(intermediate_matches=[match, last | {"weight": 1}]),
        teacher,
        student,
        adaptor("sentence-embedding"),
        adaptor("sentence-embedding"),
    )
    began = time.time()
    with distiller:
        distiller.train(
            functools.partial(optax.adamw, learning_rate=args.learning_rate, weight_decay=0.01),
            loader,
            num_epochs=args.epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={"num_warmup_steps": steps // 10, "num_training_steps": steps},
            max_grad_norm=1.0,
        )
    minutes = (time.time() - began) / 60
    after = spearmanr(similarities(student, tokenizer, pairs), truth).statistic
    student.save_pretrained(f"{args.out}/student")
    print(f"{len(sentences):,} sentences, {steps:,} steps, {minutes:.1f} minutes")
    print(f"layers {depth} → {len(layers)}; {len(pairs[0]):,} held-out pairs")
    print(f"Spearman correlation with the teacher's similarities: {before:.3f} → {after:.3f}")
    print(f"the student: {args.out}/student")
    return {"before": float(before), "after": float(after), "minutes": minutes}


if __name__ == "__main__":
    main()
