"""A sentence encoder's vectors for other languages, from sentences and their translations.

    python main.py TEACHER STUDENT --parallel FILE --held-out FILE

TEACHER is a folder of sentence-transformers that knows the sentences, STUDENT one of the same width
that is to know the translations too; each has its own ``tokenizer.json``. A line of a file is a
sentence and its translations, in one language or several, with tabs between; there is no header.

Both the sentence and each translation are drawn to the teacher's vector of the sentence (Reimers &
Gurevych, 2020, https://arxiv.org/abs/2004.09813). On the held-out lines the share of translations is
told whose nearest sentence is their own.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax
from tokenizers import Tokenizer

from jaxbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from jaxbrewer.data import bucket_by_length
from jaxbrewer.evaluation import Evaluator
from jaxbrewer.schedulers import get_linear_schedule_with_warmup
from jaxbrewer.zoo import adaptor, from_pretrained


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="a folder of sentence-transformers")
    parser.add_argument("student", help="likewise, of the same width")
    parser.add_argument("--parallel", required=True, help="a file of lines to distil on")
    parser.add_argument("--held-out", required=True, help="likewise, to measure on")
    parser.add_argument("--max-examples", type=int, help="lines of each file, the first")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="out/main")
    return parser.parse_args(argv)


def parallel(path: str, most: int | None) -> list[tuple[str, str]]:
    """Pairs of a sentence and a translation."""
    lines = Path(path).read_text(encoding="utf-8-sig").splitlines()[:most]
    texts = [[text.strip() for text in line.split("\t")] for line in lines]
    pairs = [(first, other) for first, *others in texts for other in others if first and other]
    if not pairs:
        raise SystemExit(f"{path}: no line has a sentence and a translation with a tab between")
    return pairs


class Tokens:
    """The tokenizer of a folder, which cuts texts and does not pad them."""

    def __init__(self, folder: str, length: int = 64):
        self.tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        self.tokenizer.no_padding()
        self.tokenizer.enable_truncation(length)

    def of(self, texts: Sequence[str]) -> dict[str, list[list[int]]]:
        """The columns that a model takes."""
        encodings = self.tokenizer.encode_batch(list(texts))
        return {
            "input_ids": [encoding.ids for encoding in encodings],
            "attention_mask": [encoding.attention_mask for encoding in encodings],
        }


def matched(model: Any, tokens: Tokens, pairs: Sequence[tuple[str, str]]) -> float:
    """The share of translations whose nearest sentence, by cosine, is their own."""
    evaluator = Evaluator(model, adaptor("sentence-embedding"))
    sides = []
    for texts in zip(*pairs, strict=True):
        loader = bucket_by_length(tokens.of(texts), batch_size=32, shuffle=False)
        vectors = evaluator.predict(loader)["embedding"]
        sides.append(vectors / np.linalg.norm(vectors, axis=1, keepdims=True))
    nearest = (sides[1] @ sides[0].T).argmax(1)
    return float(np.mean([pairs[i][0] == pairs[n][0] for i, n in enumerate(nearest)]))


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    args = arguments(argv)
    teacher, student = from_pretrained(args.teacher), from_pretrained(args.student)
    tokens_T, tokens_S = Tokens(args.teacher), Tokens(args.student)
    pairs = parallel(args.parallel, args.max_examples)
    held_out = parallel(args.held_out, args.max_examples)

    sources = [source for source, _ in pairs]
    asked = tokens_T.of(sources * 2)
    told = tokens_S.of([*sources, *(translation for _, translation in pairs)])
    loader = bucket_by_length({"teacher": asked, "student": told}, batch_size=32)
    steps = args.epochs * len(loader)

    before = matched(student, tokens_S, held_out)
    match = {"feature": "embedding", "layer_T": 0, "layer_S": 0, "loss": "hidden_mse", "weight": 1}
    distiller = GeneralDistiller(
        TrainingConfig(
            output_dir=args.out, log_dir=f"{args.out}/log", device=jax.default_backend()
        ),
        DistillationConfig(intermediate_matches=[match]),
        teacher,
        student,
        adaptor("sentence-embedding"),
        adaptor("sentence-embedding"),
    )
    with distiller:
        distiller.train(
            functools.partial(optax.adamw, learning_rate=2e-5, weight_decay=0.01),
            loader,
            num_epochs=args.epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={"num_warmup_steps": steps // 10, "num_training_steps": steps},
        )
    found = {"before": before, "after": matched(student, tokens_S, held_out)}
    student.save_pretrained(f"{args.out}/student")
    print(f"{args.out}/student: {found}")
    return found


if __name__ == "__main__":
    main()
