"""What a job would take on devices that are not there, by the compiler's account."""

import time
from collections.abc import Mapping
from dataclasses import replace

import jax

from ..data.batches import Batch
from ..errors import PreflightError
from ..machine.buffers import Buffer
from ..machine.compiled import Account, account_of
from ..machine.described import GIB, Described, described
from ..machine.placement import placement_on
from ..preflight.job import Job
from ..preflight.prepare import prepare
from ..step.optimizer import Optimizer
from ..step.program import Program

_WAYS_OUT = (
    "Smaller batches with gradient_accumulation_steps keep the window; sharding='all' cuts parameters, "
    "moments and teacher over the devices; the zoo's gradient_checkpointing keeps fewer activations; "
    "fp16 with fp16_opt_level='O2' halves most of them"
)


def account_on(
    name: str, job: Job, batches: Mapping[str, Batch], optimizer: Optimizer
) -> list[str]:
    """Compiles each task's step for described devices, and tells what it takes there.

    Args:
        name: see `machine.described.described`.
        job: what to train. On several devices the batch is shared out, as with ``data_parallel=True``.
        batches: a batch of each task.
        optimizer: as for ``train``.

    Returns:
        Lines of text.

    Raises:
        ValueError: there are no such devices, or nothing here compiles for them.
        PreflightError: what is wrong with the job, or it does not fit.
    """
    place = described(name)
    placement = placement_on(place.devices, job.config)
    if place.devices[0].platform != "cpu":
        job = replace(job, config=replace(job.config, device="cpu"))  # nothing is put on one
    prepared = prepare(job, batches, optimizer, device=place.devices[0])
    kind = place.devices[0].device_kind
    each = "" if place.memory is None else f", {place.memory / GIB:.0f} GiB each"
    lines = [f"on {name}: {len(place.devices)} × {kind}{each}"]
    for task, program in prepared.programs.items():
        began = time.monotonic()
        account = _compiled(place, placement.lower(program, batches[task]), program)
        seconds = time.monotonic() - began
        lines += [f"  task {task!r}"] if task else []
        lines += _lines(account, place, seconds)
    return lines


def _compiled(place: Described, lowered: jax.stages.Lowered, program: Program) -> Account:
    try:
        account = account_of(lowered.compile(compiler_options=dict(place.options)))
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        said = " ".join(str(error).split())[:300]
        raise PreflightError(
            [f"the step does not fit on {place.name}: {said}. {_WAYS_OUT}"]
        ) from error
    if place.memory is not None and account.peak > place.memory:
        raise PreflightError(
            [
                f"the step does not fit on {place.name}: {account.peak / GIB:.1f} GiB at the peak, of "
                f"{place.memory / GIB:.0f}. {_largest(account)}. {_WAYS_OUT}"
            ]
        )
    return account


def _lines(account: Account, place: Described, seconds: float) -> list[str]:
    of = "" if place.memory is None else f", of {_size(place.memory)}"
    lines = [
        f"  compiled in {seconds:.0f} s",
        f"  a device: {_size(account.peak)} at the peak{of}: {_size(account.arguments)} of arrays held "
        f"({_size(account.donated)} of them updated in place), {_size(account.temporaries)} of scratch",
    ]
    if account.flops:
        lines.append(f"  {account.flops / 1e9:,.2f} GFLOP a device")
    if account.cycles:
        lines.append(
            f"  {account.cycles:,} cycles by the compiler's estimate: to compare programs, no time"
        )
    sent = [
        f"{count} {kind} of {_size(size)}"
        for kind, (count, size) in sorted(account.collectives.items())
    ]
    lines.append(f"  sends {', '.join(sent) or 'nothing'}")
    for what, buffers in (("held", account.held), ("made on the way", account.made)):
        lines += [f"  the largest {what}:", *(f"    {_named(each)}" for each in buffers)]
    return lines


def _largest(account: Account) -> str:
    buffers = sorted((*account.held, *account.made), key=lambda each: -each.array.size)[:3]
    return f"The largest: {'; '.join(map(_named, buffers))}"


def _named(buffer: Buffer) -> str:
    return f"{buffer.count} × {_size(buffer.array.size)}, {buffer.array.shape}, {buffer.name}"


def _size(count: float) -> str:
    return f"{count / GIB:,.2f} GiB" if count >= GIB else f"{count / 2**20:,.2f} MiB"
