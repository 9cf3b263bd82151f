"""The usual adaptors, for models that return what those of the zoo and of transformers do."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxbrewer.errors import suggest
from jaxbrewer.zoo import heads

_ENDS = ("start", "end")
_TASKS = (
    "sequence-classification",
    "token-classification",
    "question-answering",
    "masked-lm",
    "sentence-embedding",
    "ranking",
)


def adaptor(task: str | None = None) -> Callable[[Any, Any], dict[str, Any]]:
    """The adaptor of a task, for a teacher or a student, with batches that are dicts.

    It hands on what is there, under a distiller's keys:

    * ``logits``: ``outputs.logits``; in question answering both ends' logits, as two.
    * ``logits_mask``: in token classification the batch's ``attention_mask``, so that padding does
      not count; of masked words the positions whose label is not −100, where the batch has labels.
    * ``losses``: ``outputs.loss``, which a model returns where the batch has the labels.
    * ``labels``: the batch's ``labels``, or ``start_positions`` and ``end_positions``.
    * ``hidden``, ``attention``: ``outputs.hidden_states`` and ``outputs.attentions``, which a model
      returns with ``output_hidden_states=True`` and ``output_attentions=True``.
    * ``query``, ``key``, ``value``: ``outputs.query`` and so on, which a model returns with
      ``output_qkv=True``.
    * ``embedding``: ``outputs.embedding``, of a sentence encoder.
    * ``inputs_mask``: the batch's ``attention_mask``; not in ranking, where each text has its own.

    Args:
        task: ``'sequence-classification'``, ``'token-classification'``, ``'question-answering'``,
            ``'masked-lm'``, ``'sentence-embedding'``, ``'ranking'`` (scores of candidates, of a
            `CrossEncoder` or a `BiEncoder`), or None for an encoder without a head.

    Raises:
        ValueError: another task.
    """
    if task is not None and task not in _TASKS:
        raise ValueError(f"no adaptor here is for the task {task!r}: {suggest(task, _TASKS)}")

    def adapt(batch: Mapping[str, Any], outputs: Any) -> dict[str, Any]:
        mask = None if task == "ranking" else batch.get("attention_mask")
        found = {
            "logits": getattr(outputs, "logits", None),
            "logits_mask": mask if task == "token-classification" else None,
            "losses": getattr(outputs, "loss", None),
            "labels": batch.get("labels"),
            "hidden": getattr(outputs, "hidden_states", None),
            "attention": getattr(outputs, "attentions", None),
            **{name: getattr(outputs, name, None) for name in ("query", "key", "value")},
            "embedding": getattr(outputs, "embedding", None),
            "inputs_mask": mask,
        }
        if task == "question-answering":
            found["logits"] = [getattr(outputs, f"{end}_logits") for end in _ENDS]
            ends = [batch.get(f"{end}_positions") for end in _ENDS]
            found["labels"] = None if ends[0] is None else ends
        if task == "masked-lm":
            labels = batch.get("labels")
            found["logits_mask"] = None if labels is None else labels != heads.IGNORE_INDEX
        return {key: value for key, value in found.items() if value is not None}

    return adapt
