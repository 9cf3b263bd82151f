"""A plan's terms, checked by shape before anything compiles.

Nothing is raised for what is found: problems and warnings are gathered, so that one report names
them all.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from .. import losses
from ..data.batches import Batch
from ..errors import Findings, explained
from ..models.adaptors import Results
from ..models.handle import Model
from .loss import kd_term, match_term, project_by_shape, takes_mask, wants_labels
from .plan import KD, Match, Plan, without_options
from .probes import heeds_mask, is_position_mean, is_positionwise

# Models of the zoo, and transformers', return these only when asked.
_MODEL_RETURNS = {
    "hidden": ". Does the model return them? For one of the zoo: from_pretrained(folder, "
    "output_hidden_states=True), or config.replace(output_hidden_states=True)",
    "attention": ". Does the model return them? For one of the zoo: from_pretrained(folder, "
    "output_attentions=True), or config.replace(output_attentions=True)",
    **dict.fromkeys(
        ("query", "key", "value"),
        ". Does the model return them? For one of the zoo: from_pretrained(folder, "
        "output_qkv=True), or config.replace(output_qkv=True)",
    ),
}
_BUILT_IN = tuple(getattr(losses, name) for name in losses.__all__)
# A softmax over one class says nothing. (Where it takes two at least, the loss itself refuses one.)
_OF_ONE_SOFTMAX = (
    losses.kd_ce_loss,
    losses.kd_kl_loss,
    losses.kd_reverse_kl_loss,
    losses.kd_jsd_loss,
    losses.kd_skew_kl_loss,
    losses.kd_skew_reverse_kl_loss,
    losses.kd_tvd_loss,
)


def check_plan(
    plan: Plan,
    results_S: Results,
    results_T: Results,
    batch: Batch,
    projections: Mapping[str, Model],
    found: Findings,
) -> None:
    """Checks a plan against the results' shapes, term by term.

    Args:
        plan: the plan.
        results_S: the student's results by shape.
        results_T: the teacher's.
        batch: the student's first batch.
        projections: name → projection.
        found: gets what is wrong.
    """
    _check_kd(plan, results_S, results_T, batch, found)
    good = [m for m in plan.matches if _check_match(m, results_S, results_T, projections, found)]
    if not plan.hard_label_weight.is_zero and "losses" not in results_S:
        scheduled = ", then scheduled" if plan.hard_label_weight.scheduler else ""
        report = found.problems if plan.losses_required else found.warnings
        report.append(
            f"hard_label_weight is {plan.hard_label_weight.initial}{scheduled}, but adaptor_S "
            "returns no 'losses'. Return the student's loss under 'losses' (does the batch hold "
            "the labels?), or set hard_label_weight=0 without a scheduler"
        )
    if plan.is_balanced and "losses" not in results_S:
        found.problems.append(
            "balance='hard_label' scales the terms to the student's own losses, and adaptor_S returns no "
            "'losses'. Return them (does the batch hold the labels?), or leave balance out"
        )
    if not found.problems:
        _check_something_to_train(plan, results_S, results_T, found)
    _warn_of_layers(good, results_S, results_T, found)
    has_positions = any(match.feature != "embedding" for match in plan.matches)
    if "inputs_mask" in results_T and "inputs_mask" not in results_S and has_positions:
        found.warnings.append(
            "only adaptor_T returns an 'inputs_mask', and only the student's is used: features are "
            "matched on padding too. Return it from adaptor_S"
        )


def trains_beside_kd(plan: Plan, results_S: Results) -> bool:
    """Whether a plan has another term than the KD loss that teaches anything."""
    learns = "losses" in results_S and not plan.hard_label_weight.is_zero
    return learns or any(not match.weight.is_zero for match in plan.matches)


def _check_something_to_train(
    plan: Plan, results_S: Results, results_T: Results, found: Findings
) -> None:
    both = "logits" in results_S and "logits" in results_T
    if (both and not plan.kd_weight.is_zero) or trains_beside_kd(plan, results_S):
        return
    if both or plan.matches or "losses" in results_S:
        found.problems.append(
            "every weight is zero: set kd_loss_weight, hard_label_weight or a match's weight"
        )
    else:
        found.problems.append(
            f"nothing to optimise: adaptor_S returns {_keys(results_S)} and adaptor_T "
            f"{_keys(results_T)}; return 'logits' from both, 'losses' from adaptor_S, or features "
            "and intermediate_matches"
        )


def _keys(results: Results) -> str:
    return ", ".join(map(repr, results)) or "nothing"


def _check_kd(
    plan: Plan, results_S: Results, results_T: Results, batch: Batch, found: Findings
) -> None:
    kd = plan.kd
    if kd is None:
        return
    before = len(found.problems)
    missing = [r for r, results in (("S", results_S), ("T", results_T)) if "logits" not in results]
    if missing:
        if kd.required:
            found.problems.extend(
                f"adaptor_{role} returns no 'logits', which this distiller compares; it returns "
                f"{_keys(results_S if role == 'S' else results_T)}"
                for role in missing
            )
        elif len(missing) == 1:
            found.warnings.append(
                f"adaptor_{missing[0]} returns no 'logits' while the other side does: there will "
                "be no KD loss"
            )
        return
    masked = _check_logits(kd, results_S, results_T, found)
    _check_classes(plan, results_S, found)
    if wants_labels(kd):
        _check_labels(kd, results_S, found)
    if kd.probability_shift:
        _check_shifted_padding(results_S, masked, batch, found)
    if masked:
        _check_under_mask(kd, found)
    if len(found.problems) == before:
        _trace(
            lambda s, t: kd_term(kd, s, t)[0],
            results_S,
            results_T,
            f"the KD loss {kd.loss_name!r}",
            found,
        )


def _check_classes(plan: Plan, results_S: Results, found: Findings) -> None:
    """A softmax over one class is 1 whatever the logits are, and one over the batch means nothing."""
    kd = plan.kd
    if kd is None or without_options(kd.loss) not in _OF_ONE_SOFTMAX or plan.kd_weight.is_zero:
        return
    name = kd.loss_name
    learns = trains_beside_kd(plan, results_S)
    for i, logits in enumerate(results_S["logits"]):
        if logits.ndim < 2:
            found.problems.append(
                f"logits[{i}] are {list(logits.shape)}, without an axis of classes, over which "
                f"kd_loss_type={name!r} takes a softmax: return [batch, classes]; of one number an "
                "example, [batch, 1] with kd_loss_type='mse'"
            )
        elif logits.shape[-1] == 1:
            (found.warnings if learns else found.problems).append(
                f"logits[{i}] are {list(logits.shape)}: a softmax over one class is always 1, so "
                f"the KD loss {name!r} and its gradient are 0. For regression and scores set "
                "kd_loss_type='mse', for a single yes or no 'bce'"
            )


def _check_logits(kd: KD, results_S: Results, results_T: Results, found: Findings) -> bool:
    """Checks logits and their masks; returns whether masks are in use."""
    logits_S, logits_T = results_S["logits"], results_T["logits"]
    if len(logits_S) != len(logits_T):
        found.problems.append(
            f"adaptor_S returns {len(logits_S)} logits and adaptor_T {len(logits_T)}; they are "
            "compared one by one, so return as many"
        )
        return False
    for i, (l_S, l_T) in enumerate(zip(logits_S, logits_T, strict=True)):
        # A loss of the user's own may know what to do: it is traced.
        if l_S.shape[-1:] != l_T.shape[-1:] and without_options(kd.loss) in _BUILT_IN:
            fewer = min(l_S.shape[-1], l_T.shape[-1])
            found.problems.append(
                f"logits[{i}]: the student has {l_S.shape[-1]} classes {list(l_S.shape)}, the "
                f"teacher {l_T.shape[-1]} {list(l_T.shape)}. Give both models the same num_labels, "
                "or for language-model logits the same vocabulary; where the longer one is the same "
                f"with padding at its end, cut it in its adaptor: logits[..., :{fewer}]"
            )
    masks = {"S": results_S.get("logits_mask"), "T": results_T.get("logits_mask")}
    if masks["S"] is None and masks["T"] is None:
        return False
    if all(x.ndim != 3 for x in (*logits_S, *logits_T)):
        found.warnings.append("logits_mask has no effect on logits without a length dimension")
        return False
    for role, results in (("S", results_S), ("T", results_T)):
        mask = masks[role]
        if mask is None:
            found.problems.append(
                f"adaptor_{role} returns no 'logits_mask' while the other side does: each side is "
                "selected by its own. Return it from both adaptors"
            )
            continue
        if len(mask) not in (1, len(logits_S)):
            found.problems.append(
                f"adaptor_{role} returns {len(mask)} logits_mask for {len(logits_S)} logits; return "
                "one for all, or one each"
            )
            continue
        for i, logits in enumerate(results["logits"]):
            one = mask[0] if len(mask) == 1 else mask[i]
            if logits.ndim == 3 and one.shape != logits.shape[:2]:
                found.problems.append(
                    f"adaptor_{role}: logits_mask is {list(one.shape)}, but the logits are "
                    f"{list(logits.shape)}: it must be [batch, length] = {list(logits.shape[:2])}"
                )
    return True


def _check_labels(kd: KD, results_S: Results, found: Findings) -> None:
    labels, logits = results_S.get("labels"), results_S["logits"]
    what = "probability_shift" if kd.probability_shift else f"the KD loss {kd.loss_name!r}"
    if labels is None:
        found.problems.append(
            f"{what} needs the labels: return them from adaptor_S under 'labels' "
            f"(it returns {_keys(results_S)})"
        )
        return
    if len(labels) != len(logits):
        found.problems.append(
            f"adaptor_S returns {len(labels)} labels for {len(logits)} logits; return one each"
        )
        return
    for i, (label, l_S) in enumerate(zip(labels, logits, strict=True)):
        if label.shape != l_S.shape[:-1] or not jax.numpy.issubdtype(
            label.dtype, jax.numpy.integer
        ):
            found.problems.append(
                f"labels[{i}] is {label.dtype}{list(label.shape)}; {what} needs integers "
                f"of shape {list(l_S.shape[:-1])} for logits {list(l_S.shape)}"
            )


def _check_shifted_padding(results_S: Results, masked: bool, batch: Batch, found: Findings) -> None:
    has_length = any(x.ndim == 3 for x in results_S["logits"])
    if "labels" in results_S and not masked and has_length and not _has_negatives(batch):
        found.warnings.append(
            "probability_shift on logits with a length, without logits_mask: unless padding has "
            "negative labels, the teacher's logits there are shifted to a padding label too"
        )


def _has_negatives(batch: Batch) -> bool:
    """Whether some integers in a batch are negative: labels that mark what to leave alone."""
    return any(
        isinstance(x, np.ndarray) and x.dtype.kind == "i" and x.size and x.min() < 0
        for x in jax.tree.leaves(batch)
    )


def _check_under_mask(kd: KD, found: Findings) -> None:
    """Functions that take a mask must heed it; those that take none must not need one."""
    tries: list[tuple[str, Callable | None, Callable, str]] = [
        (
            f"the KD loss {kd.loss_name!r}",
            kd.loss,
            is_position_mean,
            "the mean of its positions' losses",
        ),
        (
            "the temperature scheduler",
            kd.temperature_scheduler,
            is_positionwise,
            "decided by each position alone",
        ),
    ]
    for what, function, holds, wanted in tries:
        if function is None or _is_ours(function):
            continue  # our own heed their mask
        is_masked = takes_mask(function)
        try:
            fine = heeds_mask(function) if is_masked else holds(function)
        except Exception as error:  # noqa: BLE001  the user's function may raise anything
            found.problems.append(f"{what} failed when tried: {explained(error)}")
            continue
        if fine:
            continue
        found.problems.append(
            f"{what} is used with logits_mask and takes mask=, but unselected positions change "
            "what it gives. Let it look at positions where mask is not 0 only"
            if is_masked
            else f"{what} is used with logits_mask, but it is not {wanted}, so unselected positions "
            "would change it. Give it a keyword mask=None ([positions], nonzero = selected) "
            "and let it look at selected positions only"
        )


def _is_ours(function: Callable) -> bool:
    function = without_options(function)
    return str(getattr(function, "__module__", "")).startswith("jaxbrewer.")


def _check_match(
    match: Match,
    results_S: Results,
    results_T: Results,
    projections: Mapping[str, Model],
    found: Findings,
) -> bool:
    before = len(found.problems)
    for role, results, layers in (("S", results_S, match.layer_S), ("T", results_T, match.layer_T)):
        if match.feature not in results:
            found.problems.append(
                f"match {match}: adaptor_{role} returns no {match.feature!r}, only {_keys(results)}"
                + _MODEL_RETURNS.get(match.feature, "")
            )
            continue
        there = results[match.feature]
        if isinstance(there, dict):  # submodules, which were found before
            continue
        usable = [i for i, x in enumerate(there) if x is not None]
        for layer in _as_tuple(layers):
            if not -len(there) <= layer < len(there) or there[layer] is None:
                found.problems.append(
                    f"match {match}: layer_{role}={layer} is not there. adaptor_{role} returns "
                    f"{match.feature!r} for {_ranges(usable)}"
                    + _hint(match.feature, len(there), layer)
                )
    if len(found.problems) == before and match.projection is not None:
        _check_projection(match, results_S, found)
    if len(found.problems) == before:
        _trace_match(match, results_S, results_T, projections, found)
    return len(found.problems) == before


def _hint(feature: str, count: int, layer: int) -> str:
    if feature == "hidden" and layer >= count:
        return " (hidden 0 is the embeddings' output, so the last layer of n is n)"
    if feature in ("attention", "query", "key", "value") and layer == count:
        return f" ({feature} is counted from 0: the last layer of n is n-1)"
    return ""


def _ranges(indices: Sequence[int]) -> str:
    if not indices:
        return "no layer at all"
    runs: list[list[int]] = []
    for i in indices:
        if runs and i == runs[-1][-1] + 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    parts = [f"{r[0]}–{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs]
    return ("layers " if len(indices) > 1 else "layer ") + ", ".join(parts)


def _check_projection(match: Match, results_S: Results, found: Findings) -> None:
    name, dim_S, dim_T = match.proj or ("", 0, 0)
    layers = _as_tuple(match.layer_S)
    for layer in layers:
        shape = results_S[match.feature][layer].shape
        if shape[-1] != dim_S:
            found.problems.append(
                f"match {match}: proj=[{name!r}, {dim_S}, {dim_T}] takes {dim_S} features, but the "
                f"student's {match.feature}[{layer}] is {list(shape)}: use "
                f"'proj': [{name!r}, {shape[-1]}, {dim_T}] (the student's width first)"
            )
            return


def _trace_match(
    match: Match,
    results_S: Results,
    results_T: Results,
    projections: Mapping[str, Model],
    found: Findings,
) -> None:
    project = project_by_shape(projections)

    def run(results_S: Results, results_T: Results) -> Any:
        return match_term(match, results_S, results_T, project)

    before = len(found.problems)
    _trace(run, results_S, results_T, f"match {match}", found)
    if match.proj is None or len(found.problems) == before:
        return
    name, dim_S, dim_T = match.proj
    for layer in _as_tuple(match.layer_T):
        shape = results_T[match.feature][layer].shape
        if shape[-1:] != (dim_T,):
            found.problems[before:] = [
                f"match {match}: proj=[{name!r}, {dim_S}, {dim_T}] gives {dim_T} features, but the "
                f"teacher's {match.feature}[{layer}] is {list(shape)}: use 'proj': [{name!r}, "
                f"{dim_S}, {shape[-1]}] (the teacher's width last)"
            ]
            return


def _trace(
    run: Callable, results_S: Results, results_T: Results, what: str, found: Findings
) -> None:
    try:
        value = jax.eval_shape(run, results_S, results_T)
    except Exception as error:  # noqa: BLE001  a user's loss may raise anything
        said = str(error) if isinstance(error, ValueError) else explained(error)
        found.problems.append(f"{what}: {said}")
        return
    if getattr(value, "shape", None) != ():
        shape = list(value.shape) if hasattr(value, "shape") else type(value).__name__
        found.problems.append(f"{what} gives {shape}, not a scalar: a loss returns one number")


def _warn_of_layers(
    matches: Sequence[Match], results_S: Results, results_T: Results, found: Findings
) -> None:
    """Equal widths hide a slip in counting layers; these are its usual traces."""
    matches = [match for match in matches if match.feature != "captured"]
    for match in matches:
        pairs = zip(
            *(x if isinstance(x, tuple) else (x,) for x in (match.layer_S, match.layer_T)),
            strict=False,
        )
        if match.feature == "hidden" and any((s == 0) != (t == 0) for s, t in pairs):
            found.warnings.append(
                f"match {match} pairs the embeddings' output (hidden 0) with the output of a block; "
                "hidden states are counted from the embeddings, so block n is hidden n"
            )
    for feature in {m.feature: None for m in matches}:
        uses_last = {}
        for role, results in (("S", results_S), ("T", results_T)):
            count = len(results[feature])
            used = {
                layer % count
                for m in matches
                if m.feature == feature
                for layer in _as_tuple(m.layer_S if role == "S" else m.layer_T)
            }
            uses_last[role] = count - 1 in used
        if uses_last["S"] != uses_last["T"]:
            has, lacks = ("student", "teacher") if uses_last["S"] else ("teacher", "student")
            start = "0 is the embeddings' output" if feature == "hidden" else "0 is the first layer"
            found.warnings.append(
                f"the {feature} matches use the {has}'s last layer but not the {lacks}'s; if that "
                f"is not meant, the indices are off ({start})"
            )


def _as_tuple(layers: Any) -> tuple:
    return layers if isinstance(layers, tuple) else (layers,)
