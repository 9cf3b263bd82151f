"""For tests of your own: that a job's numbers do not depend on how it is run."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from .data.batches import Batch, own
from .distillers.base import Trainable
from .machine.devices import resolve_devices
from .machine.placement import OneDevice, Placement, Sharded, has_rows, rows_of
from .objective.counted import with_shares
from .preflight.job import Job
from .preflight.prepare import prepare
from .step.program import Program


def assert_invariant(
    distiller: Trainable,
    batch: Any,
    *,
    devices: Sequence[int] = (1, 2, 8),
    sharding: bool = True,
    padding: Mapping[str, float] | None = None,
    accumulation: int = 1,
    task: str = "",
    rtol: float = 1e-5,
    **args: Any,
) -> None:
    """Asserts that a step's loss, its terms and its gradients do not depend on how it is run.

    The same batch is trained on as it is and as asked for below; the gradients of the student and
    of all projections must agree to `rtol`, relative to the largest entry of each array (arrays
    far smaller than the largest of all are compared with that), and so must the loss and its terms.

    Args:
        distiller: any distiller or trainer. Inside ``with distiller:`` dropout is on
            where devices are compared; padding and accumulation are compared with dropout off,
            for it falls elsewhere in arrays of other shapes.
        batch: as the loader would give it.
        devices: numbers of devices over which the batch is sharded.
        sharding: whether to compare sharded parameters, optimizer and teacher too, on the largest
            number of devices.
        padding: input → value: the second axis of these inputs is lengthened by eight positions of
            that value, such as ``{'input_ids': 0, 'attention_mask': 0}``. None: not compared.
        accumulation: the batch is cut into so many micro-batches of equal size, whose accumulated
            gradient is compared. With ``gradient_accumulation='exact'`` they must agree however much
            each selects. By default, of means over unmasked positions, all micro-batches must select
            equally many: otherwise the mean of their means is another number, here as in torch; and
            losses that compare examples with each other are others in each micro-batch.
        task: of a `MultiTaskDistiller`, the task the batch is for.
        rtol: relative tolerance; double precision allows a far smaller one.
        **args: further keyword arguments for the models, as for ``train``.

    Raises:
        AssertionError: names what was changed, and the arrays that differ and by how much.
        ValueError: there are fewer devices than asked for; an input to pad is not there; the batch
            cannot be cut as asked.
    """
    batch = own(batch)
    here = resolve_devices(distiller.t_config.device)
    most = max(devices, default=1)
    if most > len(here):
        raise ValueError(
            f"devices={tuple(devices)}, but there are {len(here)} here. On a CPU, more are had by "
            f"jax.config.update('jax_num_cpu_devices', {most}) before JAX is first used"
        )
    job = distiller.job(**args)
    program = _program(job, task, batch)
    wanted = _run(program, OneDevice(here[0]), [batch])
    for count in devices:
        _compare(f"on {count} devices", wanted, _run(program, Sharded(here[:count]), [batch]), rtol)
    if sharding:
        placement = Sharded(here[:most], "all")
        found = _run(program, placement, [batch])
        _compare(f"sharded over {most} devices", wanted, found, rtol)
    if padding is None and accumulation == 1:
        return
    job = replace(job, train_mode=False)
    quiet = _program(job, task, batch)
    wanted = _run(quiet, OneDevice(here[0]), [batch])
    if padding is not None:
        found = _run(quiet, OneDevice(here[0]), [_padded(batch, padding)])
        _compare(f"with padding {dict(padding)}", wanted, found, rtol)
    if accumulation > 1:
        parts = _cut(batch, accumulation)
        found = _run(_program(job, task, parts[0], accumulation), OneDevice(here[0]), parts)
        _compare(f"in {accumulation} accumulated micro-batches", wanted, found, rtol)


def _keep_gradients() -> optax.GradientTransformation:
    """Changes nothing, and has the last gradients as its state."""

    def update(grads: Any, state: Any, params: Any = None) -> Any:
        return jax.tree.map(jnp.zeros_like, grads), grads

    return optax.GradientTransformation(lambda params: jax.tree.map(jnp.zeros_like, params), update)


def _program(job: Job, task: str, batch: Batch, accumulation: int = 1) -> Program:
    keep = lambda **options: _keep_gradients()  # noqa: E731
    prepared = prepare(
        job,
        {task: batch},
        keep,
        accumulation=accumulation,
        device=resolve_devices(job.config.device)[0],
    )
    return prepared.programs[task]


def _run(program: Program, placement: Placement, batches: list[Batch]) -> dict[str, Any]:
    """The loss, its terms and the gradients after some micro-batches, by name."""
    state, frozen = program.parted(placement.enter(placement.start(program, 0)))
    teacher = placement.teacher(program.teacher.variables)
    step = placement.compile(program)
    placed = [placement.batch(batch) for batch in batches]
    rows = [program.row] * len(batches)
    if program.objective.scheduled.parts:
        count = placement.counter(program)
        counts = [count(state, teacher, batch, frozen) for batch in placed]
        rows = with_shares(program.objective.scheduled.row, counts, ("",) * len(counts))
    seen = []
    for batch, row in zip(placed, rows, strict=True):
        state, metrics = step(state, teacher, batch, row, frozen)
        seen.append(np.asarray(metrics))
    held = placement.leave(state).opt_state
    held = placement.local(held.inner_opt_state if len(batches) > 1 else held)
    named = jax.tree_util.tree_flatten_with_path(held)[0]
    total, _, _, *terms = np.mean(seen, axis=0)
    return {
        "the total": total,
        **dict(zip(program.names, terms, strict=True)),
        **{
            "gradient of " + jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
            for path, x in named
        },
    }


def _compare(how: str, wanted: dict[str, Any], found: dict[str, Any], rtol: float) -> None:
    largest = max(np.abs(x).max() for name, x in wanted.items() if name.startswith("gradient"))
    wrong = []
    for name, x in wanted.items():
        scale = max(np.abs(x).max(), 1e-2 * largest if name.startswith("gradient") else 1e-7)
        difference = np.abs(found[name] - x).max() / scale
        if not difference <= rtol:
            wrong.append(f"  - {name}: {difference:.1e} relative")
    if wrong:
        shown = "\n".join(wrong[:20])
        raise AssertionError(f"{how}, the step differs by more than {rtol}:\n{shown}")


def _padded(batch: Batch, padding: Mapping[str, float]) -> Batch:
    missing = [name for name in padding if name not in batch]
    if missing:
        raise ValueError(f"padding names {missing}, and the batch has {list(batch)}")
    longer = {}
    for name, value in padding.items():
        widths = [(0, 0)] * np.ndim(batch[name])
        widths[1] = (0, 8)
        longer[name] = np.pad(np.asarray(batch[name]), widths, constant_values=value)
    return {**batch, **longer}


def _cut(batch: Batch, parts: int) -> list[Batch]:
    rows = rows_of(batch)
    if rows % parts:
        raise ValueError(
            f"accumulation={parts}, but the batch has {rows} rows, not a multiple of it"
        )
    size = rows // parts

    def part(i: int) -> Batch:
        return jax.tree.map(
            lambda x: x[i * size : (i + 1) * size] if has_rows(x, rows) else x, batch
        )

    return [part(i) for i in range(parts)]
