"""A recipe to fill in, with comments."""

from ..errors import suggest
from .schema import TASKS

_HEAD = """\
# Run it:          jaxbrewer train {file}
# Look first:      jaxbrewer check {file}
# A short trial:   jaxbrewer train {file} --max-examples 200 --num_epochs 1 --data.buckets 2
# After a kill:    jaxbrewer train {file} --resume
# Any field can be set on the command line: --distillation.temperature 4
# Paths are relative to this file.

task = "{task}"

{teacher}num_epochs = 3          # or num_steps, optimizer steps
max_grad_norm = 1.0     # -1: gradients are not clipped
{metrics}
best_metric = "{best}"{space}# the best checkpoint by it becomes the student; without it the last one

{student}
[data]
train = "train.{suffix}"
eval = "dev.{suffix}"      # {forms}
{columns}
max_length = {length}       # tokens; longer texts are cut
batch_size = 32
buckets = 8             # lengths that batches are padded to, chosen from the data; each is compiled once

# TextBrewer's TrainingConfig, or the path of its JSON: training = "train.json" above the first table.
[training]
output_dir = "{out}"    # checkpoints, and the student in {out}/student
log_dir = "{out}/log"   # tensorboard files
device = "{device}"
max_to_keep = 2
# gradient_accumulation_steps = 2
# gradient_accumulation = "exact"   # as one batch, whatever padding falls where
# fp16 = true           # half precision by fp16_opt_level, "O1" or "O2"

{distillation}# By optax's names and arguments. "decay_mask" leaves biases and norms undecayed.
[optimizer]
name = "adamw"
learning_rate = {rate}
weight_decay = 0.01
mask = "decay_mask"

# A factor of the learning rate, by its name in jaxbrewer.schedulers; num_training_steps is the run's.
[scheduler]
name = "get_linear_schedule_with_warmup"
num_warmup_steps = 0.1  # steps, or below 1 a part of the run
"""

_FROM_TEACHER = """\
# A folder in Hugging Face's format, with a head that was trained for the task, and tokenizer.json.
# jaxbrewer init {task} --teacher writes the recipe that makes one.
teacher = "out/teacher/student"

"""

_LAYERS = """\
# One of: layers of the teacher, counted from 0, that it begins with; folder, a pretrained model;
# shape, such as "T3", with random weights.
[student]
layers = [1, 3, 5]
"""

_PRETRAINED = """\
# A pretrained encoder, a folder in Hugging Face's format with tokenizer.json; a head is begun anew. There is
# no teacher and no [distillation]: this student learns from labels, and is a teacher then.
[student]
folder = "pretrained"
"""

_DISTILLATION = """\
# TextBrewer's DistillationConfig, or its JSON likewise.
[distillation]
temperature = 8
{hard}
# The output of each student layer is drawn to that of the teacher layer it began with; layer 0 is the
# embeddings' output. Where widths differ, add proj = ["linear", width of the student, of the teacher].
intermediate_matches = [
    {{ layer_T = 0, layer_S = 0, feature = "hidden", loss = "hidden_mse", weight = 1 }},
    {{ layer_T = 2, layer_S = 1, feature = "hidden", loss = "hidden_mse", weight = 1 }},
    {{ layer_T = 4, layer_S = 2, feature = "hidden", loss = "hidden_mse", weight = 1 }},
    {{ layer_T = 6, layer_S = 3, feature = "hidden", loss = "hidden_mse", weight = 1 }},
]

"""

_OF_TASK = {
    "sequence-classification": {
        "metrics": 'metrics = ["accuracy"]  # f1, matthews, pearson, spearman, agreement, kl',
        "best": "accuracy",
        "suffix": "tsv",
        "forms": "csv, tsv, jsonl, json, parquet, by the suffix or by form",
        "columns": 'text = "sentence"       # the column of the text, or two for pairs: ["s1", "s2"]\n'
        'label = "label"         # of its names or numbers; labels = ["no", "yes"] sets the order',
        "length": "128",
        "hard": "hard_label_weight = 0   # of the loss on labels; 0: train needs none",
    },
    "token-classification": {
        "metrics": 'metrics = ["span_f1"]   # accuracy, f1, agreement, kl',
        "best": "span_f1",
        "suffix": "conll",
        "forms": "conll, jsonl, json, parquet, by the suffix or by form",
        "columns": 'text = "tokens"         # the column of the words; of CoNLL files it is this\n'
        'label = "tags"          # and of their tags',
        "length": "128",
        "hard": "hard_label_weight = 1   # of the loss on labels; 0: train needs none",
    },
    "question-answering": {
        "metrics": 'metrics = ["answers"]   # exact_match and f1, by SQuAD\'s rules',
        "best": "f1",
        "suffix": "json",
        "forms": "SQuAD's JSON, or jsonl with id, question, context and answers",
        "columns": "stride = 128            # tokens that two windows of a long context share",
        "length": "384",
        "hard": "hard_label_weight = 1   # of the loss on answers; 0: train needs none",
    },
}


_DISTILLED = {
    "teacher": _FROM_TEACHER,
    "student": _LAYERS,
    "distillation": _DISTILLATION,
    "out": "out",
    "rate": "1e-4",
}
_OF_LABELS = {
    "teacher": "",
    "student": _PRETRAINED,
    "distillation": "",
    "out": "out/teacher",
    "rate": "5e-5",
}


def template(
    task: str, *, file: str = "recipe.toml", device: str = "cpu", teacher: bool = False
) -> str:
    """A recipe of a task in TOML, with comments.

    Args:
        task: one of `TASKS`.
        file: its name, for the comments.
        device: as of `TrainingConfig`.
        teacher: whether it trains a teacher on labels; otherwise it distils one.

    Raises:
        ValueError: there is no such task.
    """
    if task not in TASKS:
        raise ValueError(f"there is no task {task!r} of recipes: {suggest(task, TASKS)}")
    words = {"task": task, "file": file, "device": device, **_OF_TASK[task]}
    words["space"] = " " * max(1, 24 - len(f'best_metric = "{words["best"]}"'))
    if teacher:  # with which nothing can be compared
        words["metrics"] = words["metrics"].replace(", agreement, kl", "")
        words["hard"] = ""
    parts = _OF_LABELS if teacher else _DISTILLED
    return _HEAD.format(**words, **{name: text.format(**words) for name, text in parts.items()})
