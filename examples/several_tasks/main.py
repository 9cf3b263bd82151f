"""Two teachers of two tasks into one student: an encoder with a head for each.

    python main.py --sentiment TEACHER TRAIN EVAL --pairs TEACHER TRAIN EVAL

The teachers are folders with a BERT that tells classes and its ``tokenizer.json``, the files those of
SST-2 and MRPC. Nothing is learnt from labels; they are there to measure with.
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

from jaxbrewer import DistillationConfig, MultiTaskDistiller, TrainingConfig
from jaxbrewer.data import bucket_by_length
from jaxbrewer.data.tables import column, read_rows
from jaxbrewer.evaluation import Accuracy
from jaxbrewer.schedulers import get_linear_schedule_with_warmup
from jaxbrewer.zoo import adaptor, from_config, from_pretrained, init_from_layers

TASK = "sequence-classification"
COLUMNS = {  # of each task: the texts, and the label
    "sentiment": (("sentence",), "label"),
    "pairs": (("#1 String", "#2 String"), "Quality"),
}


def arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for task in COLUMNS:
        names = ("TEACHER", "TRAIN", "EVAL")
        parser.add_argument(f"--{task}", nargs=3, required=True, metavar=names)
    parser.add_argument("--max-examples", type=int, help="rows of each file, the first")
    parser.add_argument("--epochs", type=float, default=3, help="of both tasks' batches together")
    parser.add_argument("--out", default="out/main")
    return parser.parse_args(argv)


def loader(task: str, path: str, tokenizer: Tokenizer, most: int | None, shuffle: bool) -> Any:
    """The batches of a task's file."""
    texts, label = COLUMNS[task]
    rows = read_rows(path, most=most)
    given = [*zip(*(column(rows, name, path) for name in texts), strict=True)]
    encodings = tokenizer.encode_batch([t if len(t) > 1 else t[0] for t in given])
    columns = {
        "input_ids": [encoding.ids for encoding in encodings],
        "attention_mask": [encoding.attention_mask for encoding in encodings],
        "token_type_ids": [encoding.type_ids for encoding in encodings],
        "labels": [int(each) for each in column(rows, label, path)],
    }
    return bucket_by_length(columns, batch_size=32, shuffle=shuffle)


class Student(nnx.Module):
    """Classifiers of several tasks that share the encoder of the first."""

    def __init__(self, models: dict[str, Any]):
        first, *others = models.values()
        for model in others:
            setattr(model, model.tensor_names.prefix, first.base_model)
        self.models = nnx.Dict(models)

    def __call__(
        self, input_ids: Any, attention_mask: Any, token_type_ids: Any, labels: Any = None
    ) -> dict[str, Any]:
        """The logits of all tasks; what a task's adaptor leaves out is not computed."""
        first = next(iter(self.models.values()))
        pooled = first.base_model(input_ids, attention_mask, token_type_ids).pooler_output
        return {task: m.classifier(m.dropout(pooled)) for task, m in self.models.items()}


def main(argv: Sequence[str] | None = None) -> dict[str, float]:
    """Runs the example; returns what it prints."""
    args = arguments(argv)
    of_task = {task: getattr(args, task) for task in COLUMNS}
    teachers = {task: from_pretrained(folder, TASK) for task, (folder, _, _) in of_task.items()}

    def begun(teacher: Any) -> Any:
        """Every second layer of a teacher, with its head."""
        layers = range(1, teacher.config.num_hidden_layers, 2)
        config = teacher.config.replace(num_hidden_layers=len(layers))
        return init_from_layers(from_config(config, TASK, rngs=nnx.Rngs(0)), teacher, layers)

    student = Student({task: begun(teacher) for task, teacher in teachers.items()})
    train, dev = {}, {}
    for task, (folder, path, held_out) in of_task.items():
        tokenizer = Tokenizer.from_file(str(Path(folder) / "tokenizer.json"))
        tokenizer.no_padding()
        tokenizer.enable_truncation(128)
        train[task] = loader(task, path, tokenizer, args.max_examples, shuffle=True)
        dev[task] = loader(task, held_out, tokenizer, args.max_examples, shuffle=False)
    steps = max(1, round(args.epochs * sum(map(len, train.values()))))

    def of_student(task: str) -> Any:
        return lambda batch, outputs: {"logits": outputs[task]}

    distiller = MultiTaskDistiller(
        TrainingConfig(
            output_dir=args.out, log_dir=f"{args.out}/log", device=jax.default_backend()
        ),
        DistillationConfig(temperature=4),
        teachers,
        student,
        dict.fromkeys(teachers, adaptor(TASK)),
        {task: of_student(task) for task in teachers},
    )
    with distiller:
        distiller.train(
            functools.partial(optax.adamw, learning_rate=1e-4, weight_decay=0.01),
            train,
            num_steps=steps,  # each step's task is drawn by how many batches it has
            scheduler_class=get_linear_schedule_with_warmup,
            scheduler_args={"num_warmup_steps": steps // 10, "num_training_steps": steps},
        )
    found = distiller.evaluate(dev, [Accuracy()])
    for task, model in student.models.items():
        model.save_pretrained(f"{args.out}/{task}")
    print(f"{args.out}: {found}")
    return found


if __name__ == "__main__":
    main()
