"""A pretrained student of which a small part is trained: LoRA on queries and values, and the head.

    python main.py TEACHER STUDENT --train FILE --eval FILE

TEACHER is a folder with a classifier of sentences and its ``tokenizer.json``, STUDENT one with a
pretrained BERT of the same tokenizer; the files have the columns ``sentence`` and ``label``.
"""

import argparse
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import optax
from flax import nnx
from tokenizers import Tokenizer

from jaxbrewer import DistillationConfig, GeneralDistiller, TrainingConfig
from jaxbrewer.data import bucket_by_length
from jaxbrewer.data.tables import column, read_rows
from jaxbrewer.evaluation import Accuracy, Agreement
from jaxbrewer.schedulers import get_linear_schedule_with_warmup
from jaxbrewer.zoo import adaptor, from_pretrained

TASK = "sequence-classification"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="a folder with a classifier and its tokenizer.json")
    parser.add_argument("student", help="a folder with a pretrained encoder")
    parser.add_argument("--train", required=True, help="a tsv file: sentence, label")
    parser.add_argument("--eval", required=True, help="likewise, to measure on")
    parser.add_argument("--max-examples", type=int, help="rows of each file, the first")
    parser.add_argument("--rank", type=int, default=8, help="of what LoRA adds to a matrix")
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--out", default="out/main")
    return parser.parse_args(argv)


def examples(path: str, tokenizer: Tokenizer, most: int | None) -> dict[str, list[Any]]:
    """The columns that the models take, and the label of each sentence."""
    rows = read_rows(path, most=most)
    encodings = tokenizer.encode_batch(column(rows, "sentence", path))
    return {
        "input_ids": [encoding.ids for encoding in encodings],
        "attention_mask": [encoding.attention_mask for encoding in encodings],
        "labels": [int(label) for label in column(rows, "label", path)],
    }


def add_lora(student: Any, rank: int, rngs: nnx.Rngs) -> list[tuple[nnx.Module, str]]:
    """Puts LoRA around the queries and values of all layers; returns where."""
    places = [
        (layer.attention, name)
        for layer in student.base_model.encoder.layer
        for name in ("query", "value")
    ]
    for attention, name in places:
        base = getattr(attention, name)
        sizes = (base.in_features, rank, base.out_features)
        setattr(attention, name, nnx.LoRA(*sizes, base_module=base, rngs=rngs))
    return places


def merge_lora(places: Sequence[tuple[nnx.Module, str]]) -> None:
    """Adds what was trained to the matrices, and takes LoRA away again."""
    for attention, name in places:
        lora = getattr(attention, name)
        lora.base_module.kernel[...] += lora.lora_a[...] @ lora.lora_b[...]
        setattr(attention, name, lora.base_module)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    args = arguments(argv)
    teacher = from_pretrained(args.teacher, TASK)
    classes = {"num_labels": teacher.config.num_labels, "label_names": teacher.config.label_names}
    student = from_pretrained(args.student, TASK, new_head=True, rngs=nnx.Rngs(0), **classes)
    added = add_lora(student, args.rank, nnx.Rngs(1))

    tokenizer = Tokenizer.from_file(str(Path(args.teacher) / "tokenizer.json"))
    tokenizer.no_padding()
    tokenizer.enable_truncation(64)
    train, dev = (
        bucket_by_length(examples(path, tokenizer, args.max_examples), 32, shuffle=shuffle)
        for path, shuffle in ((args.train, True), (args.eval, False))
    )
    steps = args.epochs * len(train)

    distiller = GeneralDistiller(
        TrainingConfig(
            output_dir=args.out,
            log_dir=f"{args.out}/log",
            device=jax.default_backend(),
            max_to_keep=1,
        ),
        DistillationConfig(temperature=8),
        teacher,
        student,
        adaptor(TASK),
        adaptor(TASK),
    )
    with distiller:
        distiller.train(
            functools.partial(optax.adamw, learning_rate=1e-3, weight_decay=0.01),
            train,
            num_epochs=args.epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={"num_warmup_steps": steps // 10, "num_training_steps": steps},
            trainable=[nnx.LoRAParam, "classifier"],
            eval_loader=dev,
            metrics=[Accuracy(), Agreement()],
        )
    found = distiller.evaluate(dev, [Accuracy(), Agreement()])
    merge_lora(added)  # a plain BERT again
    student.save_pretrained(f"{args.out}/student")
    print(f"{args.out}/student: {found}")
    return found


if __name__ == "__main__":
    main()
