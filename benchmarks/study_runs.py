"""One run of `study.py`: a model is trained by jaxbrewer or by TextBrewer, then asked about held-out rows."""

import copy
import json
import shutil
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

BATCH = 32
EPOCHS = 3
STUDENT_LAYERS = (1, 3, 5)
JAXBREWER, TEXTBREWER = ENGINES = ("jaxbrewer", "textbrewer")


@dataclass(frozen=True)
class Task:
    """A data set as it lies in the data folder.

    Attributes:
        kind: the recipe's task.
        train, held_out: files.
        columns: the recipe's ``text`` and ``label``, where they are not the usual ones.
        max_length: tokens at most.
        buckets: lengths that batches are padded to; few, since jaxbrewer compiles each.
        rows: the first ones, which are trained on; whole batches, or the last would be compiled too.
    """

    kind: str
    train: str
    held_out: str
    columns: Mapping[str, Any]
    max_length: int
    buckets: tuple[int, ...]
    rows: int


TASKS = {
    "sst2": Task(
        "sequence-classification", "sst2/train.tsv", "sst2/dev.tsv",
        {"text": "sentence", "label": "label"}, 64, (16, 32, 64), 16_000,
    ),
    "mrpc": Task(
        "sequence-classification", "mrpc/train.tsv", "mrpc/dev.tsv",
        {"text": ["#1 String", "#2 String"], "label": "Quality"}, 128, (64, 128), 3_648,
    ),
    "wnut17": Task(
        "token-classification", "wnut17/wnut17train.conll", "wnut17/emerging.test.annotated",
        {}, 128, (48, 128), 3_392,
    ),
}  # fmt: skip


def _matches(loss: str, *, twice: bool) -> list[dict[str, Any]]:
    """The output of each student layer against that of the teacher layer it began with."""
    pairs = [(0, 0), *((layer + 1, i + 1) for i, layer in enumerate(STUDENT_LAYERS))]
    return [
        {
            "layer_T": [T, T] if twice else T,
            "layer_S": [S, S] if twice else S,
            "feature": "hidden",
            "loss": loss,
            "weight": 1,
        }
        for T, S in pairs
    ]


DISTILLED: dict[str, Any] = {
    "temperature": 8,
    "intermediate_matches": [*_matches("hidden_mse", twice=False), *_matches("nst", twice=True)],
}
"""The recipe of docs/recipes.md; tags are learnt with labels beside it, as the recipe's template has it."""


def _kd(name: str, **options: Any) -> dict[str, Any]:
    return {"kd_loss_type": [name, options], "kd_loss_weight": 1}


def _features(*matches: dict[str, Any]) -> dict[str, Any]:
    return {"kd_loss_weight": 0, "intermediate_matches": list(matches)}


def _of_last_layer(feature: str, loss: str, weight: float) -> dict[str, Any]:
    return {"layer_T": -1, "layer_S": -1, "feature": feature, "loss": loss, "weight": weight}


LOSSES_TASK, LOSSES_ROWS = "sst2", 8_000
"""What losses are compared on: of 872 held-out rows, MRPC's are 408, and so noisier by half."""

LOSSES: dict[str, dict[str, Any] | None] = {
    "labels": None,
    "ce": _kd("ce", scale_by_t2=True),
    "reverse_kl": _kd("reverse_kl", scale_by_t2=True),
    "minilm": _features(*(_of_last_layer(name, "relation", 1) for name in ("query", "key", "value"))),
    "jsd": _kd("jsd", scale_by_t2=True),
    "dkd": _kd("dkd"),
    "dist": _kd("dist"),
    "rkd": _features(
        {"feature": "embedding", "loss": "rkd_distance", "weight": 25, "layer_T": 0, "layer_S": 0},
        {"feature": "embedding", "loss": "rkd_angle", "weight": 50, "layer_T": 0, "layer_S": 0},
    ),
}  # fmt: skip
"""What is added to the loss on labels; all with the weights of their papers, T = 4 and the factor T²."""


@dataclass(frozen=True)
class Run:
    """What to train, or with the way ``speed`` what to time.

    Attributes:
        task: one of `TASKS`; of ``speed`` all there are.
        way: ``teacher``, ``alone``, ``distilled``, ``speed``, or one of `LOSSES`.
        seed: of the order of batches and of dropout.
        engine: one of `ENGINES`.
    """

    task: str
    way: str
    seed: int
    engine: str = JAXBREWER

    @property
    def name(self) -> str:
        """The name of its file and its folder."""
        return f"{self.task}-{self.way}-{self.engine}-{self.seed}"

    @property
    def teacher(self) -> "Run":
        """The run that its teacher comes from."""
        return Run(self.task, "teacher", 0)


@dataclass(frozen=True)
class Settings:
    """What is the same in all runs.

    Attributes:
        model: the folder that teachers begin with.
        data: the folder with the data sets.
        out: the folder that everything is written to.
        device: ``cpu`` or ``gpu``.
        max_examples: rows to train and to be asked about at most; None: all.
        epochs: passes over the data.
    """

    model: Path
    data: Path
    out: Path
    device: str
    max_examples: int | None = None
    epochs: int = EPOCHS

    def shared(self) -> dict[str, Any]:
        """What all files of a study have in common."""
        return {"max_examples": self.max_examples, "epochs": self.epochs, "device": self.device}

    def folder(self, run: Run) -> Path:
        """Where a run's model is trained."""
        return self.out / "models" / run.name

    def student(self, run: Run) -> Path:
        """The folder of a trained model, in Hugging Face's format."""
        return self.folder(run) / "student"

    def beginning(self, run: Run) -> Path:
        """The folder that a student begins with: layers of its teacher, and its head."""
        return self.folder(run.teacher) / "beginning"

    def result(self, run: Run) -> Path:
        """The file that a run writes when it has ended."""
        return self.out / "runs" / f"{run.name}.json"


def perform(run: Run, settings: Settings) -> None:
    """Does what a run is, and writes its file."""
    began = time.monotonic()
    if run.way == "speed":
        found = {"sentences/s": _speeds(run, settings)}
    else:
        shutil.rmtree(settings.folder(run), ignore_errors=True)  # of a run that was stopped
        train = _by_textbrewer if run.engine == TEXTBREWER else _by_jaxbrewer
        predictions = train(run, settings)
        counts = _counts(predictions, _held_out(run.task, settings))
        size = (settings.student(run) / "model.safetensors").stat().st_size
        found = {"counts": counts, "predictions": predictions, "MB": size / 1e6}
    if run.way == "teacher":
        _begin_students(run, settings)
    seconds = time.monotonic() - began
    found |= {"run": asdict(run), "settings": settings.shared(), "seconds": seconds}
    path = settings.result(run)
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".tmp")
    whole.write_text(json.dumps(found) + "\n", encoding="utf-8")
    whole.replace(path)


# ---------------------------------------------------------------------------------------- recipes


def recipe(run: Run, settings: Settings) -> dict[str, Any]:
    """The run as a recipe."""
    task, seed = TASKS[run.task], run.seed
    made: dict[str, Any] = {
        "task": task.kind,
        "student": str(settings.model if run.way == "teacher" else settings.beginning(run)),
        "num_epochs": settings.epochs,
        "max_grad_norm": 1.0,
        "data": {
            "train": str(settings.data / task.train),
            **task.columns,
            "max_length": task.max_length,
            "batch_size": BATCH,
            "buckets": task.buckets,
        },
        "training": {
            "output_dir": str(settings.folder(run)),
            "device": settings.device,
            "seed": seed,
            "ckpt_epoch_frequency": settings.epochs,  # one at the end
            "max_to_keep": 1,
        },
        "optimizer": {
            "name": "adamw",
            "learning_rate": 5e-5 if run.way == "teacher" else 1e-4,
            "weight_decay": 0.01,
        },
        "scheduler": {"name": "get_linear_schedule_with_warmup", "num_warmup_steps": 0.1},
    }
    if (how := distillation(run)) is not None:
        made |= {"teacher": str(settings.student(run.teacher)), "distillation": how}
    return made


def distillation(run: Run) -> dict[str, Any] | None:
    """The fields of a run's `DistillationConfig`; None where there is no teacher."""
    if run.way == "distilled":
        has_tags = TASKS[run.task].kind == "token-classification"
        return copy.deepcopy(DISTILLED) | {"hard_label_weight": int(has_tags)}
    of_loss = LOSSES.get(run.way)
    return None if of_loss is None else of_loss | {"temperature": 4, "hard_label_weight": 1}


def rows_of(run: Run, settings: Settings) -> int:
    """How many rows a run is trained on: whole batches."""
    rows = LOSSES_ROWS if run.way in LOSSES else TASKS[run.task].rows
    rows = min(rows, settings.max_examples or rows)
    return max(rows // BATCH, 1) * BATCH


def _by_jaxbrewer(run: Run, settings: Settings) -> list[Any]:
    """Trains by a recipe, and predicts with the student's folder."""
    import jaxbrewer

    rows, made = rows_of(run, settings), recipe(run, settings)
    features = [
        match["feature"] for match in made.get("distillation", {}).get("intermediate_matches", ())
    ]
    if "embedding" in features:
        _with_embeddings(made, rows, settings.student(run))
    else:
        jaxbrewer.run_recipe(made, max_examples=rows)
    for checkpoint in settings.folder(run).glob("gs*"):
        shutil.rmtree(checkpoint)  # three times the student, and not needed again
    task = TASKS[run.task]
    held_out = _held_out(run.task, settings)
    found = jaxbrewer.predict(
        settings.student(run), held_out, text=task.columns.get("text"), task=task.kind,
        max_length=task.max_length, batch_size=BATCH,
    )  # fmt: skip
    if task.kind == "token-classification":
        return [row["tags"] for row in found]
    return [int(np.argmax(list(row["probabilities"].values()))) for row in found]


def _with_embeddings(made: dict[str, Any], rows: int, folder: Path) -> None:
    """Trains with a vector for each example, the output at its first token, which no recipe names."""
    from jaxbrewer import DistillationConfig, GeneralDistiller
    from jaxbrewer.recipes import jobs
    from jaxbrewer.recipes.models import save
    from jaxbrewer.recipes.reading import read_recipe
    from jaxbrewer.zoo import adaptor

    how = made["distillation"]
    hidden = how | {"intermediate_matches": _matches("hidden_mse", twice=False)}
    job = jobs.prepared(read_recipe(made | {"distillation": hidden}), rows)
    usual = adaptor(made["task"])

    def adapt(batch: Any, outputs: Any) -> dict[str, Any]:
        return usual(batch, outputs) | {"embedding": outputs.hidden_states[-1][:, 0]}

    distiller = GeneralDistiller(
        job.recipe.training, DistillationConfig(**how), job.teachers[0], job.student, adapt, adapt
    )
    with distiller:
        distiller.train(
            jobs.optimizer_of(job.recipe),
            job.train,
            **jobs.length_of(job.recipe),
            **jobs.schedule_of(job.recipe, job.total_steps),
            max_grad_norm=job.recipe.max_grad_norm,
        )
    save(job.student, folder)


def _begin_students(run: Run, settings: Settings) -> None:
    """Writes the folder that all students of a teacher begin with, whoever trains them."""
    from flax import nnx

    from jaxbrewer import zoo

    teacher = zoo.from_pretrained(settings.student(run), TASKS[run.task].kind)
    config = teacher.config.replace(num_hidden_layers=len(STUDENT_LAYERS))
    student = zoo.from_config(config, teacher.task, rngs=nnx.Rngs(0))
    zoo.init_from_layers(student, teacher, STUDENT_LAYERS)
    folder = settings.beginning(run)
    shutil.copytree(settings.student(run), folder, dirs_exist_ok=True)  # the tokenizer's files
    student.save_pretrained(folder)


# ------------------------------------------------------------------------------------- TextBrewer


class TorchBatches:
    """A loader's batches as torch's tensors; each pass is the next epoch."""

    def __init__(self, loader: Any):
        self._loader, self._epoch = loader, 0

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        import torch

        self._loader.set_epoch(self._epoch)
        self._epoch += 1
        for batch in self._loader:
            yield {
                name: torch.as_tensor(np.asarray(values).astype(np.int64))
                for name, values in batch.items()
            }


def _by_textbrewer(run: Run, settings: Settings) -> list[Any]:
    """Trains by TextBrewer on transformers' models: the same beginning, batches, losses and rates.

    Its batches are jaxbrewer's, in their order. Its package on PyPI divides a masked ``nst`` by the
    length, which makes it (width / length)² times as large; so it is given the rule of its repository,
    which is jaxbrewer's.
    """
    import textbrewer
    import torch
    import transformers

    from jaxbrewer.recipes import jobs
    from jaxbrewer.recipes.reading import read_recipe

    made = recipe(run, settings)
    job = jobs.prepared(read_recipe(made), rows_of(run, settings))
    task = TASKS[run.task]
    device = torch_device(settings)
    textbrewer.presets.MATCH_LOSS_MAP["nst"] = nst_by_width
    torch.manual_seed(run.seed)
    teacher = torch_model(settings.student(run.teacher), task, device, hidden=True).eval()
    student = torch_model(settings.beginning(run), task, device, hidden=True).train()

    def adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
        mask = batch["attention_mask"]
        found = {"logits": outputs.logits, "hidden": outputs.hidden_states, "losses": outputs.loss}
        tags = {"logits_mask": mask} if task.kind == "token-classification" else {}
        return found | tags | {"inputs_mask": mask}

    class WithoutCheckpoints(textbrewer.GeneralDistiller):
        def save_and_callback(self, *args: Any) -> None:
            return None

    distiller = WithoutCheckpoints(
        textbrewer.TrainingConfig(device=device, output_dir=str(settings.folder(run))),
        textbrewer.DistillationConfig(**(distillation(run) or {})),
        teacher,
        student,
        adaptor,
        adaptor,
    )
    rates = made["optimizer"]
    optimizer = torch.optim.AdamW(
        student.parameters(), rates["learning_rate"], weight_decay=rates["weight_decay"]
    )
    total = job.total_steps
    with distiller:
        distiller.train(
            optimizer,
            TorchBatches(job.train),
            num_epochs=settings.epochs,
            scheduler_class=transformers.get_linear_schedule_with_warmup,
            scheduler_args={"num_warmup_steps": round(total * 0.1), "num_training_steps": total},
            max_grad_norm=made["max_grad_norm"],
        )
    student.save_pretrained(settings.student(run))
    return _torch_predictions(student.eval(), run.task, settings)


def nst_by_width(state_S: Any, state_T: Any, mask: Any) -> Any:
    """TextBrewer's ``nst`` as in its repository: each Gram matrix divided by its own width."""
    gram_S, gram_T = (one @ other.mT / other.shape[-1] for one, other in (state_S, state_T))
    pairs = (mask[:, :, None] * mask[:, None, :]).to(gram_S)
    return (pairs * (gram_S - gram_T) ** 2).sum() / pairs.sum()


def torch_device(settings: Settings) -> str:
    """The device as torch calls it."""
    return "cuda" if settings.device == "gpu" else "cpu"


def torch_model(folder: Path, task: Task, device: str, *, hidden: bool = False) -> Any:
    """A model of transformers, in float32."""
    import torch
    import transformers

    kinds = {
        "sequence-classification": transformers.AutoModelForSequenceClassification,
        "token-classification": transformers.AutoModelForTokenClassification,
    }
    model = kinds[task.kind].from_pretrained(
        folder, dtype=torch.float32, output_hidden_states=hidden
    )
    return model.to(device)


def _torch_predictions(model: Any, name: str, settings: Settings) -> list[Any]:
    """The class of each held-out row, or the tag of each of its words."""
    loader, firsts, order = _held_out_loader(
        name, settings, settings.beginning(Run(name, "alone", 1))
    )
    logits = torch_logits(model, loader)
    best = {row: each.argmax(-1) for row, each in zip(order, logits, strict=True)}
    if firsts is None:
        return [int(best[i]) for i in range(len(order))]
    names = model.config.id2label
    found = []
    for i, (row, places) in enumerate(zip(_held_out(name, settings), firsts, strict=True)):
        tags = ["O"] * len(row["tokens"])
        for position, word in enumerate(places):
            if word is not None:
                tags[word] = names[int(best[i][position])]
        found.append(tags)
    return found


def torch_logits(model: Any, loader: Any) -> list[np.ndarray]:
    """The logits of each of a loader's rows in its order, at its batch's length where it has tags."""
    import torch

    found: list[np.ndarray] = []
    with torch.no_grad():
        for batch in TorchBatches(loader):
            inputs = {
                name: value.to(model.device) for name, value in batch.items() if name != "labels"
            }
            found.extend(model(**inputs).logits.cpu().numpy())
    return found


# ---------------------------------------------------------------------------------- held-out rows


def _held_out(name: str, settings: Settings) -> list[dict[str, Any]]:
    """The rows that models are asked about."""
    from jaxbrewer.data.tables import read_rows

    return read_rows(settings.data / TASKS[name].held_out, most=settings.max_examples)


def _held_out_loader(name: str, settings: Settings, folder: Path) -> tuple[Any, Any, np.ndarray]:
    """The held-out rows in batches, the words of each position of tagged ones, and their order."""
    from jaxbrewer.recipes import examples
    from jaxbrewer.recipes.tokens import Tokens

    task, rows = TASKS[name], _held_out(name, settings)
    tokens = Tokens(folder, task.max_length)
    firsts = None
    if task.kind == "token-classification":
        columns, firsts = examples.tagged(rows, "tokens", None, task.held_out, tokens)
    else:
        text = task.columns["text"]
        texts = [text] if isinstance(text, str) else text
        columns = examples.classified(rows, texts, None, task.held_out, tokens)
    loader = examples.loader(columns, {"input_ids": 0}, BATCH, task.buckets, seed=None)
    return loader, firsts, loader.order


def _counts(predictions: Sequence[Any], rows: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Of each row how many were right, how many were said and how many there are.

    Of a class that is 1 or 0, 1 and 1; of tags they are spans. The score of rows is
    ``2 · right / (said + there)`` of the sums: the accuracy, or F1.
    """
    from jaxbrewer.evaluation.metrics import spans

    found = []
    for said, row in zip(predictions, rows, strict=True):
        if "tags" in row:
            mine, there = set(spans(said)), set(spans(row["tags"]))
            found.append([len(mine & there), len(mine), len(there)])
        else:
            label = next(row[name] for name in ("label", "Quality") if name in row)
            found.append([int(said == int(label)), 1, 1])
    return found


# ------------------------------------------------------------------------------------------ speed


BY_ONNX = "by onnxruntime"


def _speeds(run: Run, settings: Settings) -> dict[str, float]:
    """Held-out rows a second of teachers and students, tokens ready, in batches of `BATCH`.

    On a CPU jaxbrewer's are asked by onnxruntime too.
    """
    asking = {"": _asking_torch if run.engine == TEXTBREWER else _asking_jaxbrewer}
    if run.engine == JAXBREWER and settings.device == "cpu":
        asking[f" {BY_ONNX}"] = _asking_onnx
    found = {}
    for name in TASKS:
        models = {
            "teacher": Run(name, "teacher", 0),
            "student": Run(name, "distilled", 1, run.engine),
        }
        for what, of in models.items():
            if not settings.result(of).exists():
                continue
            folder = settings.student(of)
            loader, _, order = _held_out_loader(name, settings, settings.beginning(of))
            for how, prepared in asking.items():
                ask = prepared(folder, TASKS[name], loader, settings)
                found[f"{name} {what}{how}"] = len(order) / _seconds(ask)
    return found


def _asking_jaxbrewer(
    folder: Path, task: Task, loader: Any, settings: Settings
) -> Callable[[], Any]:
    from jaxbrewer import zoo
    from jaxbrewer.evaluation import Evaluator

    model = zoo.from_pretrained(folder, task.kind)
    evaluator = Evaluator(model, zoo.adaptor(task.kind))
    return lambda: evaluator.predict(loader)


def _asking_onnx(folder: Path, task: Task, loader: Any, settings: Settings) -> Callable[[], Any]:
    import onnxruntime

    from jaxbrewer import zoo

    path = folder.parent / "model.onnx"
    zoo.export_onnx(zoo.from_pretrained(folder, task.kind), path)
    session = onnxruntime.InferenceSession(str(path))
    names = [each.name for each in session.get_inputs()]

    def ask() -> None:
        for batch in loader:
            session.run(None, {name: np.asarray(batch[name]) for name in names})

    return ask


def _asking_torch(folder: Path, task: Task, loader: Any, settings: Settings) -> Callable[[], Any]:
    model = torch_model(folder, task, torch_device(settings)).eval()
    return lambda: torch_logits(model, loader)


def _seconds(ask: Callable[[], Any], times: int = 3) -> float:
    """The median of some times, after one that is not timed."""
    ask()
    taken = []
    for _ in range(times):
        began = time.monotonic()
        ask()
        taken.append(time.monotonic() - began)
    return statistics.median(taken)


def quiet(run: Run, settings: Settings) -> dict[str, str]:
    """What the environment of a run's process says, beside what all have."""
    is_torch = run.engine == TEXTBREWER  # which prepares its batches by JAX
    platforms = {"JAX_PLATFORMS": "cpu"} if is_torch or settings.device == "cpu" else {}
    return platforms | {
        "JAX_DEFAULT_MATMUL_PRECISION": "highest",  # float32, as torch has it
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "TOKENIZERS_PARALLELISM": "false",
    }
