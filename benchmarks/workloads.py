"""What is trained here: BERT-base to TextBrewer's students, in JAX and in torch.

Each student goes with the matches that TextBrewer's README lists for it. Weights and ids are
random: only shapes matter for speed.
"""

import copy
import functools
import tempfile
import warnings
import weakref
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

MATCHED = {
    "T6": ("L6_hidden_mse", "L6_hidden_smmd"),
    "T3": ("L3_hidden_mse", "L3_hidden_smmd"),
    "T3-small": ("L3n_hidden_mse", "L3_hidden_smmd"),
    "T4-tiny": ("L4t_hidden_mse", "L4_hidden_smmd"),
}
TEMPERATURE = 8.0
HARD_LABEL_WEIGHT = 0.5
LEARNING_RATE = 1e-4
WEIGHT_DECAY = 0.01

# How many of SST-2's 67,349 training sentences have 0, 1, 2… tokens of BERT's uncased vocabulary,
# the first and last token included.
SST2_LENGTHS = (
    0, 0, 0, 1978, 5322, 6065, 5345, 4749, 4155, 3713, 3267, 2947, 2650, 2413, 2138, 1950, 1777,
    1661, 1515, 1373, 1285, 1132, 1106, 1046, 909, 820, 806, 733, 692, 628, 538, 491, 442, 448, 400,
    337, 304, 286, 242, 195, 203, 192, 155, 148, 130, 89, 82, 85, 73, 55, 42, 50, 40, 36, 19, 21,
    22, 15, 8, 6, 3, 2, 5, 5, 1, 2, 2,
)  # fmt: skip


@dataclass(frozen=True)
class Work:
    """A teacher, a student, and how they are matched.

    ``teacher`` and ``student`` are fields of a BERT config under Hugging Face's names; ``matches``
    are TextBrewer's dicts.
    """

    name: str
    teacher: dict[str, Any]
    student: dict[str, Any]
    matches: tuple[dict[str, Any], ...]


def work(name: str, smoke: bool = False) -> Work:
    """BERT-base and a student by its name; with ``smoke`` two layers and one, and a sixteenth as wide."""
    from jaxbrewer.presets import MATCHES
    from jaxbrewer.zoo import student_config

    fields = (
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "vocab_size",
    )
    config = student_config(name, "bert-base-uncased")
    student = {field: getattr(config, field) for field in fields}
    teacher = dict(zip(fields, (768, 12, 12, 3072, 30522), strict=True))
    matches = [dict(match) for matched in MATCHED[name] for match in MATCHES[matched]]
    if smoke:
        matches = [dict(MATCHES[matched][-1]) for matched in MATCHED[name]]
        small = {768: 48, 384: 24, 312: 24}
        for sizes, layers in ((teacher, 2), (student, 1)):
            width = small[sizes["hidden_size"]]
            sizes |= {"hidden_size": width, "intermediate_size": 2 * width, "vocab_size": 100}
            sizes["num_hidden_layers"] = layers
        for match in matches:
            twice = isinstance(match["layer_T"], list)
            match |= (
                {"layer_T": [2, 2], "layer_S": [1, 1]} if twice else {"layer_T": 2, "layer_S": 1}
            )
            if "proj" in match:
                match["proj"] = ["linear", student["hidden_size"], teacher["hidden_size"]]
    return Work(name, teacher, student, tuple(matches))


def make_batch(
    vocab_size: int, size: int, length: int, lengths: np.ndarray | None = None, seed: int = 0
) -> dict[str, np.ndarray]:
    """A batch of random ids; sentences fill it, or are as long as ``lengths`` says."""
    rng = np.random.default_rng(seed)
    lengths = np.full(size, length) if lengths is None else lengths
    mask = np.arange(length) < np.asarray(lengths)[:, None]
    ids = rng.integers(1, vocab_size, (size, length))
    return {
        "input_ids": np.where(mask, ids, 0).astype(np.int32),
        "attention_mask": mask.astype(np.int32),
        "token_type_ids": np.zeros((size, length), np.int32),
        "labels": rng.integers(0, 2, size).astype(np.int32),
    }


def draw_lengths(count: int, longest: int, file: str | None = None, seed: int = 0) -> np.ndarray:
    """Sentence lengths drawn like SST-2's, or from a file with one length a line."""
    rng = np.random.default_rng(seed)
    if file is None:
        share = np.asarray(SST2_LENGTHS) / sum(SST2_LENGTHS)
        drawn = rng.choice(len(share), size=count, p=share)
    else:
        drawn = rng.choice(np.loadtxt(file, dtype=int, ndmin=1), size=count)
    return np.clip(drawn, 2, longest)


def adaptor(batch: Any, outputs: Any) -> dict[str, Any]:
    """The adaptor of both sides, in both packages."""
    return {
        "logits": outputs.logits,
        "hidden": outputs.hidden_states,
        "inputs_mask": batch["attention_mask"],
        "losses": outputs.loss,
    }


# --- JAX ------------------------------------------------------------------------------------------


def jax_distiller(work: Work, device: str = "cpu", remat: bool = False, **config: Any) -> Any:
    """A `GeneralDistiller`; ``config`` are further fields of its `TrainingConfig`."""
    from flax import nnx

    import jaxbrewer
    from jaxbrewer.zoo import BertConfig, BertForSequenceClassification

    changes: dict[str, Any] = {"gradient_checkpointing": True} if remat else {}
    teacher, student = (
        BertForSequenceClassification(
            BertConfig(**sizes, output_hidden_states=True, **extra), rngs=nnx.Rngs(seed)
        )
        for seed, (sizes, extra) in enumerate([(work.teacher, {}), (work.student, changes)])
    )
    return jaxbrewer.GeneralDistiller(
        jaxbrewer.TrainingConfig(device=device, **config),
        jaxbrewer.DistillationConfig(
            temperature=TEMPERATURE,
            hard_label_weight=HARD_LABEL_WEIGHT,
            intermediate_matches=work.matches,
        ),
        teacher,
        student,
        adaptor,
        adaptor,
    )


def jax_optimizer() -> Any:
    """AdamW with torch's constants."""
    import optax

    return functools.partial(optax.adamw, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


class JaxStep:
    """The compiled step of a distiller, as ``distiller.train`` runs it, without its loop.

    Attributes:
        program: the `jaxbrewer.step.Program`.
        compiled: the executable for this batch's shape.
        state: after the steps run so far.
    """

    def __init__(self, distiller: Any, batch: dict[str, np.ndarray]):
        import jax

        from jaxbrewer.machine.devices import resolve_device
        from jaxbrewer.machine.memory import kept_memory
        from jaxbrewer.machine.placement import OneDevice
        from jaxbrewer.preflight import prepare

        device = resolve_device(distiller.t_config.device)
        with distiller, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            programs = prepare(distiller.job(), {"": batch}, jax_optimizer()).programs
        self.program = programs[""]
        self.state = jax.device_put(self.program.init(0), device)
        self.teacher = jax.device_put(self.program.teacher.variables, device)
        self.batch = jax.device_put(batch, device)
        self.row = np.ones(3, np.float32)
        step = OneDevice(device).compile(self.program)
        self.compiled = step.lower(*self.arguments).compile()
        self.metrics: Any = None
        # As in ``train``, for as long as this object lives.
        memory = ExitStack()
        self._bound_memory = memory.enter_context(kept_memory(device.platform))
        weakref.finalize(self, memory.close)

    @property
    def arguments(self) -> tuple[Any, ...]:
        """What the step is called with."""
        return self.state, self.teacher, self.batch, self.row

    def run(self, steps: int) -> None:
        """Trains so many steps on the batch and waits for the last."""
        for _ in range(steps):
            self.state, self.metrics = self.compiled(*self.arguments)
            self._bound_memory()
        self.metrics.block_until_ready()


# --- torch ----------------------------------------------------------------------------------------


def torch_models(work: Work, device: str) -> tuple[Any, Any]:
    """Teacher and student of transformers, with its default attention."""
    import transformers

    transformers.utils.logging.set_verbosity_error()
    models = [
        transformers.BertForSequenceClassification(
            transformers.BertConfig(**sizes, num_labels=2, output_hidden_states=True)
        ).to(device)
        for sizes in (work.teacher, work.student)
    ]
    return models[0].eval(), models[1].train()


def torch_attention() -> str:
    """The attention that transformers' BERT takes unless told: ``sdpa``, ``eager``."""
    import torch
    import transformers

    with torch.device("meta"):
        sizes = {"hidden_size": 8, "num_attention_heads": 1, "num_hidden_layers": 1}
        model = transformers.BertModel(transformers.BertConfig(**sizes))
    return model.config._attn_implementation


def torch_batch(batch: dict[str, np.ndarray], device: str) -> dict[str, Any]:
    """The batch as torch takes it."""
    import torch

    return {
        name: torch.as_tensor(value.astype(np.int64)).to(device) for name, value in batch.items()
    }


def torch_optimizer(parameters: Any, fused: bool) -> Any:
    """AdamW with the same constants."""
    import torch

    return torch.optim.AdamW(parameters, LEARNING_RATE, weight_decay=WEIGHT_DECAY, fused=fused)


class TextBrewerStep:
    """TextBrewer's own loop over one batch, without checkpoints.

    With ``half`` (a torch dtype) both models run under autocast, as its users do today where it
    would want Apex; with ``compiled`` both are compiled.
    """

    def __init__(
        self,
        work: Work,
        batch: dict[str, np.ndarray],
        device: str,
        half: Any = None,
        compiled: bool = False,
    ):
        import textbrewer
        import torch

        class WithoutCheckpoints(textbrewer.GeneralDistiller):
            def save_and_callback(self, *args: Any) -> None:
                return None

        teacher, student = torch_models(work, device)
        for model in (teacher, student):
            if compiled:
                model.forward = torch.compile(model.forward)
            if half is not None:
                model.forward = torch.autocast(device, half)(model.forward)
        self.distiller = WithoutCheckpoints(
            # TextBrewer makes the folder at once.
            textbrewer.TrainingConfig(
                device=device, ckpt_steps=10**9, output_dir=tempfile.gettempdir()
            ),
            textbrewer.DistillationConfig(
                temperature=TEMPERATURE,
                hard_label_weight=HARD_LABEL_WEIGHT,
                # TextBrewer appends to a match's projection.
                intermediate_matches=copy.deepcopy(list(work.matches)),
            ),
            teacher,
            student,
            adaptor,
            adaptor,
        )
        optimizer = torch_optimizer(student.parameters(), fused=False)
        self.optimizer = self.distiller.initialize_training(optimizer, None, None, None)[0]
        self.loader = [torch_batch(batch, "cpu")]
        self.synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def run(self, steps: int) -> None:
        """Trains so many steps in TextBrewer's loop."""
        with self.distiller:
            self.distiller.train_with_num_steps(
                self.optimizer, None, True, self.loader, -1.0, steps, None, None
            )
        self.synchronize()


class TorchStep:
    """A torch loop written by hand for this one objective, as fast as torch makes it."""

    def __init__(
        self, work: Work, batch: dict[str, np.ndarray], device: str, half: Any, compiled: bool
    ):
        import torch

        self.teacher, self.student = torch_models(work, device)
        projected = [match["proj"] for match in work.matches if "proj" in match]
        self.projections = torch.nn.ModuleList(
            torch.nn.Linear(width_in, width_out) for _, width_in, width_out in projected
        ).to(device)
        parameters = [*self.student.parameters(), *self.projections.parameters()]
        self.optimizer = torch_optimizer(parameters, fused=True)
        self.work, self.device, self.half = work, device, half
        self.batch = torch_batch(batch, device)
        self.loss = torch.compile(self._loss) if compiled else self._loss
        self.synchronize = torch.cuda.synchronize if device == "cuda" else lambda: None

    def _loss(self, batch: dict[str, Any]) -> Any:
        import torch
        from torch.nn.functional import log_softmax, softmax

        with torch.autocast(self.device, self.half, enabled=self.half is not None):
            with torch.no_grad():
                outputs_T = self.teacher(**batch)
            outputs_S = self.student(**batch)
        T, S = outputs_T.logits.float() / TEMPERATURE, outputs_S.logits.float() / TEMPERATURE
        loss = -(softmax(T, -1) * log_softmax(S, -1)).sum(-1).mean()
        loss = loss + HARD_LABEL_WEIGHT * outputs_S.loss
        mask = batch["attention_mask"].float()
        projections = iter(self.projections)
        for match in self.work.matches:
            if match["loss"] == "mmd":
                T, S = (
                    outputs.hidden_states[match[layers][0]].float()
                    for outputs, layers in ((outputs_T, "layer_T"), (outputs_S, "layer_S"))
                )
                gram_T, gram_S = (x @ x.mT / x.shape[-1] for x in (T, S))
                pairs = mask[:, :, None] * mask[:, None]
                squares = pairs * (gram_S - gram_T).square()
                loss = loss + match["weight"] * squares.sum() / pairs.sum()
            else:
                T = outputs_T.hidden_states[match["layer_T"]].float()
                S = outputs_S.hidden_states[match["layer_S"]].float()
                S = next(projections)(S) if "proj" in match else S
                squares = mask[..., None] * (S - T).square()
                loss = loss + match["weight"] * squares.sum() / (T.shape[-1] * mask.sum())
        return loss

    def run(self, steps: int) -> None:
        """Trains so many steps on the batch and waits for the last."""
        for _ in range(steps):
            self.optimizer.zero_grad(set_to_none=True)
            self.loss(self.batch).backward()
            self.optimizer.step()
        self.synchronize()


def without_dropout(work: Work) -> Work:
    """The same work with every dropout off."""
    off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return replace(work, student=work.student | off)
