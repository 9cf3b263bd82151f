"""What `distiller.check` prints: what is matched with what, how large, at what cost."""

from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from .batches import Batch, signature_of
from .plan import Plan
from .step import Program

if TYPE_CHECKING:
    from .distillers import Trainable


def describe(
    distiller: "Trainable", program: Program, batch: Batch, *, with_optimizer: bool
) -> str:
    """Describes a program in plain text; compiles the step to know its cost."""
    lines = [f"{type(distiller).__name__}: nothing wrong was found", ""]
    lines += [f"batch       {signature_of(batch)}"]
    student = _count(program.student.model.params)
    for side in program.teacher.sides:
        count = _count(side.model.params)
        ratio = f" ({count / student:.1f}× the student)" if student else ""
        lines.append(f"model_{side.role:6}{count:>13,} parameters{ratio}")
    lines.append(f"model_S     {student:>13,} parameters")
    for name, projection in program.projections.items():
        lines.append(f"proj {name:7}{_count(projection.params):>13,} parameters")
    lines += ["", "loss ="]
    plan: Plan | None = getattr(distiller, "_plan", None)
    lines += _terms(plan, program.names)
    lines += ["", *_cost(program, batch, with_optimizer)]
    return "\n".join(lines)


def _terms(plan: Plan | None, names: tuple[str, ...]) -> list[str]:
    if plan is None:
        return ["  + the sum of the losses the adaptor returns"]
    weights = {
        "unweighted_kd_loss": (
            plan.kd_weight,
            f"KD by {plan.kd.loss_name!r}, temperature {plan.kd.temperature}" if plan.kd else "",
        ),
        "unweighted_hard_label_loss": (plan.hard_label_weight, "the student's own losses"),
    }
    lines = []
    for name, (weight, what) in weights.items():
        if name in names:
            scheduled = ", then by its scheduler" if weight.scheduler else ""
            note = "  (logged only)" if weight.is_zero else ""
            lines.append(f"  + {weight.initial:g}{scheduled} × {what}{note}")
    for match in plan.matches:
        proj = (
            f", projected {match.proj[1]} → {match.proj[2]} ({match.proj[0]})" if match.proj else ""
        )
        note = "  (logged only)" if not match.weight else ""
        lines.append(f"  + {match.weight:g} × {match}{proj}{note}")
    other = [n for n in names if n not in weights and n not in {m.tag for m in plan.matches}]
    return lines + [f"  + {name}" for name in other]


def _cost(program: Program, batch: Batch, with_optimizer: bool) -> list[str]:
    state = jax.eval_shape(lambda: program.init(0))
    row = np.ones(3, np.float32)
    compiled = program.compile().lower(state, program.teacher.variables, batch, row).compile()
    lines = ["one step"]
    costs = compiled.cost_analysis()
    if costs and "flops" in costs:
        lines.append(f"  {costs['flops'] / 1e9:,.2f} GFLOP")
    memory = compiled.memory_analysis()
    if memory is not None:
        held = memory.argument_size_in_bytes / 2**20
        peak = (
            held
            + (memory.temp_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes)
            / 2**20
        )
        without = "" if with_optimizer else ", without an optimizer's state"
        lines.append(f"  {held:,.0f} MiB of arrays held{without}; {peak:,.0f} MiB at the peak")
    return lines


def _count(params: Any) -> int:
    return sum(int(np.size(leaf)) for leaf in jax.tree.leaves(params))
