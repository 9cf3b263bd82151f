"""What trains, and is rarely what was meant: of two models that are fed one batch, and of padding."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .. import losses
from ..configurations.configs import TrainingConfig
from ..data.batches import Batch, sides
from ..errors import Findings, PreflightWarning, warn
from ..models.adaptors import Results, Side, model_name
from ..objective.objectives import Extension, Objective, Overridden
from ..objective.plan import Plan, without_options
from ..objective.terms import trains_beside_kd
from .job import Task

# Inputs that count something else than words: a model may know more of them than another.
_NO_WORDS = ("position_ids", "token_type_ids")
_A_MODEL = 100_000  # parameters
# What compares a position's classes as if each excluded the others.
_DISTRIBUTIONS = tuple(
    getattr(losses, name)
    for name in losses.__all__
    if name.startswith("kd_") and name not in ("kd_mse_loss", "kd_bce_loss", "kd_margin_mse_loss")
)


def doubt(
    task: Task,
    objective: Objective,
    config: TrainingConfig,
    results_S: Results,
    batch: Batch,
    found: Findings,
) -> None:
    """Looks at a task whose models run.

    Args:
        task: its two sides.
        objective: what is minimised.
        config: how it is trained.
        results_S: the student's results by shape.
        batch: its first batch.
        found: gets what is found.
    """
    teacher_batch, student_batch, cache = sides(batch)
    if cache is None and teacher_batch is student_batch and isinstance(batch, dict):
        for side in task.teacher.sides:
            _doubt_vocabularies(side, task.student, batch, found)
    _doubt_sizes(task, found)
    plan = plan_of(objective)
    if plan is not None:
        _doubt_softmax(task.student, plan, results_S, found)
        _doubt_coupling(plan, config, found)


def plan_of(objective: Objective) -> Plan | None:
    """The plan that an objective evaluates; None for one of the user's own."""
    if isinstance(objective, Overridden):
        return None
    if isinstance(objective, Extension):
        return plan_of(objective.base)
    plan = getattr(objective, "plan", None)
    return plan if isinstance(plan, Plan) else None


def _doubt_vocabularies(teacher: Side, student: Side, batch: Any, found: Findings) -> None:
    mine, its = student.model.id_limits, teacher.model.id_limits
    for name in sorted(batch.keys() & mine.keys() & its.keys() - set(_NO_WORDS), key=str):
        if mine[name] != its[name]:
            found.warnings.append(
                f"{model_name(teacher.role)} knows {its[name]} ids of {name}, {model_name('S')} "
                f"{mine[name]}, and both get the same. If that is not the same vocabulary, padded at "
                "its end, give each its own tokenizer's batch: {'teacher': {…}, 'student': {…}}"
            )


def _doubt_sizes(task: Task, found: Findings) -> None:
    """A model that is much smaller than its student is rarely the teacher; where something is wrong
    besides, one that is smaller at all.

    Very small ones are: they hand on what was computed elsewhere, or try something out.
    """
    if len(task.teacher.sides) != 1:
        return
    size_T, size_S = _size(task.teacher.sides[0]), _size(task.student)
    if size_T >= _A_MODEL and (1 if found.problems else 2) * size_T < size_S:
        found.warnings.append(
            f"model_T has {size_T:,} parameters, model_S {size_S:,}: are the two swapped? The "
            "distillers take model_T first, then model_S"
        )


def _size(side: Side) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(side.model.params))


def _doubt_softmax(student: Side, plan: Plan, results_S: Results, found: Findings) -> None:
    """Labels that exclude one another not are no softmax."""
    config = getattr(getattr(student.model, "module", None), "config", None)
    is_multi = getattr(config, "problem_type", None) == "multi_label_classification"
    if plan.kd is None or plan.kd_weight.is_zero:
        return
    loss = without_options(plan.kd.loss)
    if is_multi and loss in _DISTRIBUTIONS:
        report = found.warnings if trains_beside_kd(plan, results_S) else found.problems
        report.append(
            "the student has problem_type='multi_label_classification', and "
            f"kd_loss_type={plan.kd.loss_name!r} compares its labels by a softmax, as if each excluded the "
            "others: set kd_loss_type='bce'"
        )


def _doubt_coupling(plan: Plan, config: TrainingConfig, found: Findings) -> None:
    """Losses that compare the examples of a batch with each other depend on how it is cut."""
    used = [] if plan.kd is None or plan.kd_weight.is_zero else [(plan.kd.loss_name, plan.kd.loss)]
    used += [(m.loss_name, m.loss) for m in plan.matches if not m.weight.is_zero]
    names = {repr(name): None for name, loss in used if without_options(loss) in losses.COUPLING}
    cuts = []
    if config.gradient_accumulation_steps > 1:
        cuts.append("each of the accumulated micro-batches")
    if config.mapping == "pmap":
        cuts.append("each device's part of a batch (mapping='pmap')")
    if names and cuts:
        one = len(names) == 1
        found.warnings.append(
            f"{', '.join(names)} {'compares' if one else 'compare'} the examples of a batch with each "
            f"other, and {' and '.join(cuts)} is compared by itself: not the loss of all examples "
            "together. Where that matters, use larger batches, without accumulation"
        )


def counts_padding(objective: Objective, results_S: Results) -> bool:
    """Whether logits are compared at every position, padding or not."""
    plan = plan_of(objective)
    if plan is None or plan.kd is None or plan.kd_weight.is_zero:
        return False
    return "logits_mask" not in results_S and any(x.ndim == 3 for x in results_S.get("logits", ()))


def padding_watch() -> Callable[[Batch], None]:
    """A look at each batch, which warns at the first one whose ``attention_mask`` has a zero."""
    has_warned = False

    def look(batch: Batch) -> None:
        nonlocal has_warned
        part = sides(batch)[1]
        mask = part.get("attention_mask") if isinstance(part, dict) else None
        if has_warned or not isinstance(mask, np.ndarray) or mask.ndim != 2 or mask.all():
            return
        has_warned = True
        warn(
            "the KD loss compares logits [batch, length, classes] at every position, padding too, "
            "and a batch has padding (a 0 in attention_mask). Have both adaptors return "
            "'logits_mask': batch['attention_mask']",
            PreflightWarning,
        )

    return look
