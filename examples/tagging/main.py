"""The job of `recipe.toml` written out: how tags of words become labels of word pieces.

    python main.py TEACHER --train FILE --eval FILE

TEACHER is a folder with a tagger and its ``tokenizer.json``; the files have a word a line, its tag
last, and an empty line between sentences.
"""

import argparse
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from tokenizers import Tokenizer

from jaxbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from jaxbrewer.data import bucket_by_length
from jaxbrewer.data.tables import read_rows
from jaxbrewer.evaluation import Agreement, SpanF1
from jaxbrewer.zoo import adaptor, from_config, from_pretrained, init_from_layers, suggest_matches

TASK = "token-classification"
NO_TAG = -100  # no loss on labels and no metric counts such a position


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="a folder with a tagger and its tokenizer.json")
    parser.add_argument("--train", required=True, help="a file of words and tags")
    parser.add_argument("--eval", required=True, help="likewise, to measure on")
    parser.add_argument("--max-examples", type=int, help="sentences of each file, the first")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--out", default="out/main")
    return parser.parse_args(argv)


def aligned(word_ids: Sequence[int | None], tags: Sequence[int]) -> list[int]:
    """A label for each piece: its word's tag at the first piece of a word, none elsewhere.

    Args:
        word_ids: of each piece the number of its word; None of [CLS] and [SEP].
        tags: the class of each word's tag.
    """
    before = [None, *word_ids]
    return [
        NO_TAG if word is None or word == last else tags[word]
        for last, word in zip(before, word_ids, strict=False)
    ]


def examples(
    path: str, tokenizer: Tokenizer, classes: Mapping[str, int], most: int | None
) -> dict[str, list[Any]]:
    """The columns that the models take, and a label for each piece."""
    rows = read_rows(path, "conll", most)
    encodings = tokenizer.encode_batch([row["tokens"] for row in rows], is_pretokenized=True)
    tags = [[classes[tag] for tag in row["tags"]] for row in rows]
    return {
        "input_ids": [encoding.ids for encoding in encodings],
        "attention_mask": [encoding.attention_mask for encoding in encodings],
        "labels": [aligned(e.word_ids, tag) for e, tag in zip(encodings, tags, strict=True)],
    }


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    args = arguments(argv)
    teacher = from_pretrained(args.teacher, TASK, output_hidden_states=True)
    names = teacher.config.label_names
    layers = range(1, teacher.config.num_hidden_layers, 2)
    config = teacher.config.replace(num_hidden_layers=len(layers))
    student = init_from_layers(from_config(config, TASK, rngs=nnx.Rngs(0)), teacher, layers)

    tokenizer = Tokenizer.from_file(str(Path(args.teacher) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(128)
    classes = {name: number for number, name in enumerate(names)}
    train, dev = (
        bucket_by_length(
            examples(path, tokenizer, classes, args.max_examples),
            batch_size=32,
            padding={"labels": NO_TAG},
            shuffle=shuffle,
        )
        for path, shuffle in ((args.train, True), (args.eval, False))
    )
    matches = suggest_matches(teacher.config, student.config)  # spread evenly: 0, 2, 4 and 6 of six
    distiller = GeneralDistiller(
        TrainingConfig(
            output_dir=args.out,
            log_dir=f"{args.out}/log",
            device=jax.default_backend(),
            max_to_keep=1,
        ),
        DistillationConfig(temperature=8, hard_label_weight=1, intermediate_matches=matches),
        teacher,
        student,
        adaptor(TASK),  # the attention mask is its logits_mask: padding is not followed
        adaptor(TASK),
    )
    metrics = [SpanF1(names), Agreement()]
    with distiller:
        distiller.train(
            functools.partial(optax.adamw, learning_rate=1e-4, weight_decay=0.01),
            train,
            num_epochs=args.epochs,
            eval_loader=dev,
            metrics=metrics,
        )
    found = distiller.evaluate(dev, metrics)
    student.save_pretrained(f"{args.out}/student")
    print(f"{args.out}/student: {found}")
    return found


if __name__ == "__main__":
    main()
