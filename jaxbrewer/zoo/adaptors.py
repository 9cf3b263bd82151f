"""The usual adaptors, for models that return what those of the zoo and of transformers do."""

from collections.abc import Callable, Mapping
from typing import Any

from jaxbrewer.errors import suggest
from jaxbrewer.zoo import heads

_BY_EXAMPLE = (
    "sequence-classification",
    "token-classification",
    "question-answering",
    "masked-lm",
)
_ENDS = ("start", "end")
_TASKS = (
    "sequence-classification",
    "token-classification",
    "question-answering",
    "masked-lm",
    "sentence-embedding",
    "ranking",
)


def adaptor(
    task: str | None = None, *, each: bool = False, problem_type: str | None = None
) -> Callable[[Any, Any], dict[str, Any]]:
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
    * ``sample_weight``: the batch's, where it has one.

    Args:
        task: ``'sequence-classification'``, ``'token-classification'``, ``'question-answering'``,
            ``'masked-lm'``, ``'sentence-embedding'``, ``'ranking'`` (scores of candidates, of a
            `CrossEncoder` or a `BiEncoder`), or None for an encoder without a head.
        each: ``losses`` are each example's, or each position's, with their ``losses_mask``, in place of
            their mean: for exact accumulation and ``sample_weight``. The first four tasks have them.
        problem_type: of sequence classification with `each`, as the model's config has it.

    Raises:
        ValueError: another task; or `each` with one that has no losses by example.
    """
    if task is not None and task not in _TASKS:
        raise ValueError(f"no adaptor here is for the task {task!r}: {suggest(task, _TASKS)}")

    if each and task not in _BY_EXAMPLE:
        raise ValueError(
            f"adaptor({task!r}, each=True): only {', '.join(map(repr, _BY_EXAMPLE))} have losses by example"
        )

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
            "sample_weight": batch.get("sample_weight"),
        }
        if task == "question-answering":
            found["logits"] = [getattr(outputs, f"{end}_logits") for end in _ENDS]
            ends = [batch.get(f"{end}_positions") for end in _ENDS]
            found["labels"] = None if ends[0] is None else ends
        if task == "masked-lm":
            labels = batch.get("labels")
            found["logits_mask"] = None if labels is None else labels != heads.IGNORE_INDEX
        if each and found["labels"] is not None:
            losses = _losses(task, found["logits"], found["labels"], problem_type)
            found["losses"] = [loss for loss, _ in losses]
            masks = [mask for _, mask in losses if mask is not None]
            found["losses_mask"] = masks or None
        return {key: value for key, value in found.items() if value is not None}

    return adapt


def _losses(
    task: str | None, logits: Any, labels: Any, problem_type: str | None
) -> list[tuple[Any, Any]]:
    """Each loss of a task by example or position, and which of its entries count."""
    if task == "question-answering":  # the mean of both ends, as the sum of two halves
        ends = [heads.each_end(*end) for end in zip(logits, labels, strict=True)]
        return [(loss / 2, kept) for loss, kept in ends]
    if task == "sequence-classification":
        return [heads.each_sequence_classification(logits, labels, problem_type)]
    return [heads.each_cross_entropy(logits, labels)]
