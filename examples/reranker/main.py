"""A cross-encoder distilled into a bi-encoder: its scores of candidates, for the price of vectors.

    python examples/reranker/main.py TEACHER STUDENT --groups FILE… --held-out FILE

TEACHER is a folder with a classifier of one label for pairs of texts, such as
``ms-marco-MiniLM-L6-v2``; STUDENT a folder of sentence-transformers, such as ``all-MiniLM-L6-v2``. Each
has its own ``tokenizer.json``. A line of a file is a group: in ``.jsonl`` an object with ``query``,
``positive`` and ``negatives``, in any other the query, the positive and the negatives with tabs between.
Of each group the first ``--negatives`` are taken; shorter groups are left out.

The student's scores follow the teacher's: their margins (``margin_mse``), or their distribution over
the candidates (``listwise_kl``). On the held-out groups the share is told whose best candidate is the
teacher's. What is left in ``--out`` is a folder that sentence-transformers reads.
"""

import argparse
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from flax import nnx
from tokenizers import Tokenizer

from jaxbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from jaxbrewer.data import bucket_by_length
from jaxbrewer.schedulers import get_linear_schedule_with_warmup
from jaxbrewer.zoo import BiEncoder, CrossEncoder, SentenceEncoder, adaptor, from_pretrained


def groups_of(paths: Sequence[str], negatives: int, limit: int) -> list[list[str]]:
    """Each group's query, positive and negatives; the first `limit` lines of each file."""
    found = []
    for path in paths:
        for line in Path(path).read_text(encoding="utf-8-sig").split("\n")[:limit]:
            texts = line.rstrip("\r").split("\t")
            if path.endswith(".jsonl") and line.strip():
                group = json.loads(line)
                texts = [group["query"], group["positive"], *group["negatives"]]
            if len(texts) >= 2 + negatives:
                found.append(texts[: 2 + negatives])
    if not found:
        raise SystemExit(f"{', '.join(paths)}: no group has a positive and {negatives} negatives")
    return found


def tokenizer_of(folder: str, length: int) -> Tokenizer:
    """The tokenizer of a folder, which cuts texts and does not pad them."""
    tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(length)
    return tokenizer


def texts_of(tokenizer: Tokenizer, texts: Sequence[Any], types: bool = False) -> dict[str, tuple]:
    """The inputs of several texts, or pairs of texts: a tuple with a list for each."""
    encodings = tokenizer.encode_batch(list(texts))
    columns = {
        "input_ids": tuple(e.ids for e in encodings),
        "attention_mask": tuple(e.attention_mask for e in encodings),
    }
    return columns | ({"token_type_ids": tuple(e.type_ids for e in encodings)} if types else {})


class Examples:
    """Groups as each side's inputs."""

    def __init__(self, args: argparse.Namespace, teacher: CrossEncoder, student: BiEncoder):
        self.for_teacher = tokenizer_of(args.teacher, args.max_length)
        self.for_student = tokenizer_of(args.student, args.max_length)
        self.for_query = tokenizer_of(args.student, args.query_length)
        self.for_query.enable_padding(length=args.query_length)
        self.types = "token_type_ids" in teacher.id_limits
        self.prompts = student.encoder.sentence.prompts

    def of(self, group: Sequence[str]) -> dict[str, Any]:
        """A group: its pairs for the teacher, the query and its candidates for the student."""
        query, *candidates = group
        asked = texts_of(self.for_query, [self.prompts.get("query", "") + query])
        before = self.prompts.get("passage", "")
        of_query = {f"query_{name}": texts[0] for name, texts in asked.items()}
        of_candidates = texts_of(self.for_student, [before + text for text in candidates])
        pairs = [(query, text) for text in candidates]
        return {
            "teacher": texts_of(self.for_teacher, pairs, self.types),
            "student": of_query | of_candidates,
        }


def best(model: nnx.Module, batches: Sequence[dict[str, Any]], side: str) -> np.ndarray:
    """The number of each group's candidate with the highest score."""
    model.eval()
    run = nnx.jit(lambda model, batch: model(**batch).logits.argmax(-1))
    return np.concatenate([np.asarray(run(model, batch[side])) for batch in batches])


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="a folder of a cross-encoder, with a tokenizer.json")
    parser.add_argument("student", help="a folder of sentence-transformers, with a tokenizer.json")
    parser.add_argument("--groups", nargs="+", required=True, help="files to distil on")
    parser.add_argument("--held-out", required=True, help="a file of groups not trained on")
    parser.add_argument("--negatives", type=int, default=4, help="of each group")
    parser.add_argument("--limit", type=int, default=100_000, help="lines of each file")
    parser.add_argument("--loss", choices=("margin_mse", "listwise_kl"), default="margin_mse")
    parser.add_argument("--scale", type=float, default=20.0, help="of the student's cosines")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--query-length", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=5e-5)
    parser.add_argument("--device", default=jax.default_backend())
    parser.add_argument("--out", default="runs/reranker")
    args = parser.parse_args(argv)

    teacher = CrossEncoder(from_pretrained(args.teacher))
    encoder = from_pretrained(args.student)
    if not isinstance(encoder, SentenceEncoder):
        raise SystemExit(f"{args.student} is no folder of sentence-transformers: no modules.json")
    student = BiEncoder(encoder, similarity="cosine", scale=args.scale)
    examples = Examples(args, teacher, student)
    train, held_out = (
        [examples.of(group) for group in groups_of(files, args.negatives, args.limit)]
        for files in (args.groups, [args.held_out])
    )
    held_out_batches = list(bucket_by_length(held_out, args.batch_size, shuffle=False))
    loader = bucket_by_length(train, args.batch_size)

    truth = best(teacher, held_out_batches, "teacher")
    before = np.mean(best(student, held_out_batches, "student") == truth)
    steps = args.epochs * len(loader)
    distiller = GeneralDistiller(
        TrainingConfig(
            output_dir=f"{args.out}/checkpoints", log_dir=f"{args.out}/log", device=args.device
        ),
        DistillationConfig(temperature=1, kd_loss_type=args.loss),
        teacher,
        student,
        adaptor("ranking"),
        adaptor("ranking"),
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
    after = np.mean(best(student, held_out_batches, "student") == truth)
    student.encoder.save_pretrained(f"{args.out}/student")
    print(f"{len(train):,} groups, {steps:,} steps, {minutes:.1f} minutes")
    print(f"the teacher's best of {1 + args.negatives}, in {len(held_out):,} held-out groups:")
    print(f"{before:.3f} → {after:.3f}")
    print(f"the student: {args.out}/student")
    return {"before": float(before), "after": float(after), "minutes": minutes}


if __name__ == "__main__":
    main()
