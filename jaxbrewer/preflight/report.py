"""What `distiller.check` prints: what is matched with what, how large, at what cost."""

from typing import Any

import jax
import numpy as np

from ..data.batches import Batch, signature_of
from ..step.program import Program


def describe(program: Program, batch: Batch, *, with_optimizer: bool) -> str:
    """Describes a program in plain text; compiles the step to know its cost."""
    lines = [f"batch       {signature_of(batch)}"]
    student = _count(program.student.model.params)
    for side in program.teacher.sides:
        count = _count(side.model.params)
        ratio = f" ({count / student:.1f}× the student)" if student else ""
        lines.append(f"model_{side.role:6}{count:>13,} parameters{ratio}")
    name = "model_S" if program.teacher.sides else "model"
    lines.append(f"{name:12}{student:>13,} parameters")
    if program.parting is not None:
        trained = program.trained(program.variables[0])["student"]
        arrays = f"{len(trained)} of {len(program.parting.names)} arrays"
        lines.append(f"  trained   {_count(trained):>13,} parameters in {arrays}")
    for name, projection in program.projections.items():
        lines.append(f"proj {name:7}{_count(projection.params):>13,} parameters")
    if program.precision.level != "O0":
        lines.append(f"precision   {program.precision}")
    lines += ["", "loss ="]
    lines += [f"  + {term}" for term in program.objective.terms(program.names)]
    lines += ["", *_cost(program, batch, with_optimizer)]
    return "\n".join(lines)


def _cost(program: Program, batch: Batch, with_optimizer: bool) -> list[str]:
    state, frozen = program.parted(jax.eval_shape(lambda: program.init(0)))
    arguments = state, program.teacher.variables, batch, program.row, frozen
    compiled = program.compiled.lower(*arguments).compile()
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
