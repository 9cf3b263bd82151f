"""The job of `recipe.toml` written out: what to change where a recipe has no field for it.

    python main.py TEACHER --train FILE --eval FILE

TEACHER is a folder with a classifier of sentences and its ``tokenizer.json``; the files have the
columns ``sentence`` and ``label``, the number of a class.
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

from jaxbrewer import DistillationConfig, GeneralDistiller, TrainingConfig, load_student
from jaxbrewer.data import bucket_by_length
from jaxbrewer.data.tables import column, read_rows
from jaxbrewer.evaluation import Accuracy, Agreement
from jaxbrewer.schedulers import get_linear_schedule_with_warmup
from jaxbrewer.zoo import adaptor, from_config, from_pretrained, init_from_layers

TASK = "sequence-classification"


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("teacher", help="a folder with a classifier and its tokenizer.json")
    parser.add_argument("--train", required=True, help="a tsv file: sentence, label")
    parser.add_argument("--eval", required=True, help="likewise, to measure on")
    parser.add_argument("--max-examples", type=int, help="rows of each file, the first")
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


def objective(layers: Sequence[int]) -> DistillationConfig:
    """The teacher's logits, and each layer's output as that of the layer that it began with."""
    matches: list[dict[str, Any]] = []
    for mine, theirs in enumerate((0, *(layer + 1 for layer in layers))):  # 0: the embeddings'
        match = {"feature": "hidden", "weight": 1}
        matches += [
            match | {"layer_T": theirs, "layer_S": mine, "loss": "hidden_mse"},
            match | {"layer_T": [theirs] * 2, "layer_S": [mine] * 2, "loss": "nst"},
        ]
    return DistillationConfig(temperature=8, hard_label_weight=0, intermediate_matches=matches)


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    args = arguments(argv)
    teacher = from_pretrained(args.teacher, TASK, output_hidden_states=True)
    layers = range(1, teacher.config.num_hidden_layers, 2)  # of six layers 1, 3 and 5
    config = teacher.config.replace(num_hidden_layers=len(layers))
    student = init_from_layers(from_config(config, TASK, rngs=nnx.Rngs(0)), teacher, layers)

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
        objective(layers),
        teacher,
        student,
        adaptor(TASK),
        adaptor(TASK),
    )
    with distiller:  # train mode: dropout on
        distiller.train(
            functools.partial(optax.adamw, learning_rate=1e-4, weight_decay=0.01),
            train,
            num_epochs=args.epochs,
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={"num_warmup_steps": steps // 10, "num_training_steps": steps},
            eval_loader=dev,
            metrics=[Accuracy(), Agreement()],
            best_metric="accuracy",
        )
    load_student(distiller.best_checkpoint, student)
    found = distiller.evaluate(dev, [Accuracy(), Agreement()])
    student.save_pretrained(f"{args.out}/student")
    print(f"{args.out}/student: {found}")
    return found


if __name__ == "__main__":
    main()
