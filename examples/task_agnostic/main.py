"""A language model distilled into its own first half, on text without labels.

    python examples/task_agnostic/main.py TEACHER --text FILE… --held-out FILE

TEACHER is a folder with a model of masked words and its ``tokenizer.json``, such as
``bert-base-uncased``. The texts are lines of the files; long ones are cut into several examples. Lines
of the held-out file are not trained on: of words masked there, the share is told that the model tells
again.

Every second layer of the teacher begins the student, and its head. Words are then masked anew in each
batch, and the student learns three things of it: the teacher's scores of the masked words (the KD
loss), the words themselves (the hard labels), and the relations between positions in the teacher's
last layer (``relation``, of queries, keys and values). What is left in ``--out`` is a folder that
transformers reads, to be fine-tuned on any task.
"""

import argparse
import functools
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer

from jaxbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from jaxbrewer.data import bucket_by_length, mask_words
from jaxbrewer.schedulers import get_linear_schedule_with_warmup
from jaxbrewer.zoo import adaptor, from_pretrained, init_from_layers

MASKS = ("[MASK]", "<mask>")


def lines_of(paths: Sequence[str], limit: int) -> list[str]:
    """The lines of all files that are not empty, each once, the first `limit` of each file's."""
    found: dict[str, None] = {}
    for path in paths:
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        found |= dict.fromkeys([line.strip() for line in lines][:limit])
    return [line for line in found if line]


def tokenized(tokenizer: Tokenizer, lines: Sequence[str]) -> dict[str, list[list[int]]]:
    """The columns that the model takes; what is cut off a line is an example of its own."""
    whole = tokenizer.encode_batch(list(lines))
    encodings = [part for encoding in whole for part in (encoding, *encoding.overflowing)]
    return {
        "input_ids": [e.ids for e in encodings],
        "attention_mask": [e.attention_mask for e in encodings],
    }


def masking(tokenizer: Tokenizer, vocab_size: int) -> dict[str, Any]:
    """What `mask_words` needs to know of a tokenizer."""
    named = {name: tokenizer.token_to_id(name) for name in MASKS}
    mask_id = next((number for number in named.values() if number is not None), None)
    if mask_id is None:
        raise SystemExit(f"the tokenizer has none of {', '.join(MASKS)}: it is of no such model")
    added = tokenizer.get_added_tokens_decoder()
    special = [number for number, token in added.items() if token.special]
    return {"mask_id": mask_id, "vocab_size": vocab_size, "special_ids": special}


def told_again(model: Any, loader: Iterable[dict[str, np.ndarray]]) -> float:
    """The share of masked words that the model scores highest."""
    model.eval()
    run = nnx.jit(lambda model, batch: model(**batch).logits.argmax(-1))
    right = total = 0
    for batch in loader:
        labels = batch["labels"]
        best = jax.device_get(run(model, {k: v for k, v in batch.items() if k != "labels"}))
        right += int(np.sum((best == labels) & (labels >= 0)))
        total += int(np.sum(labels >= 0))
    return right / max(total, 1)


def student_of(teacher: Any, layers: Sequence[int]) -> Any:
    """A student begun from some of the teacher's layers, and its head."""
    depth = "n_layers" if hasattr(teacher.config, "n_layers") else "num_hidden_layers"
    student = type(teacher)(teacher.config.replace(**{depth: len(layers)}), rngs=nnx.Rngs(0))
    return init_from_layers(student, teacher, layers=layers)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="a folder with a model of masked words and tokenizer.json")
    parser.add_argument("--text", nargs="+", required=True, help="files to distil on, line by line")
    parser.add_argument("--held-out", required=True, help="a file of lines that are not trained on")
    parser.add_argument("--limit", type=int, default=100_000, help="lines of each file")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--max-length", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=4e-4)
    parser.add_argument("--device", default=jax.default_backend())
    parser.add_argument("--out", default="runs/task_agnostic")
    args = parser.parse_args(argv)

    teacher = from_pretrained(args.teacher, "masked-lm", output_qkv=True)
    tokenizer = Tokenizer.from_file(str(Path(args.teacher) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(args.max_length)
    depth = teacher.config.num_hidden_layers
    layers = list(range(1, depth, 2)) or [0]
    student = student_of(teacher, layers)
    how = masking(tokenizer, teacher.config.vocab_size)
    padding = {"input_ids": teacher.config.pad_token_id or 0}

    def loader(lines: Sequence[str]) -> Any:
        examples = tokenized(tokenizer, lines)
        return mask_words(bucket_by_length(examples, args.batch_size, padding=padding), **how)

    held_out = loader(lines_of([args.held_out], args.limit))
    lines = lines_of(args.text, args.limit)
    train = loader(lines)
    of_teacher, before = (told_again(model, held_out) for model in (teacher, student))
    steps = args.epochs * len(train)
    relations = [
        {"feature": name, "layer_T": -1, "layer_S": -1, "loss": "relation", "weight": 1}
        for name in ("query", "key", "value")
    ]
    distiller = GeneralDistiller(
        TrainingConfig(
            output_dir=f"{args.out}/checkpoints", log_dir=f"{args.out}/log", device=args.device
        ),
        DistillationConfig(temperature=2, hard_label_weight=0.5, intermediate_matches=relations),
        teacher,
        student,
        adaptor("masked-lm"),
        adaptor("masked-lm"),
    )
    began = time.time()
    with distiller:
        distiller.train(
            functools.partial(optax.adamw, learning_rate=args.learning_rate, weight_decay=0.01),
            train,
            num_epochs=args.epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={"num_warmup_steps": steps // 10, "num_training_steps": steps},
            max_grad_norm=1.0,
        )
    minutes = (time.time() - began) / 60
    after = told_again(student, held_out)
    student.save_pretrained(f"{args.out}/student")
    print(f"{len(lines):,} lines, {steps:,} steps, {minutes:.1f} minutes")
    print(f"layers {depth} → {len(layers)}")
    print(f"masked words told again: {before:.3f} → {after:.3f}; the teacher {of_teacher:.3f}")
    print(f"the student: {args.out}/student")
    return {"before": before, "after": after, "teacher": of_teacher, "minutes": minutes}


if __name__ == "__main__":
    main()
