"""What does a step take on TPUs and H100s, by the account of the compiler that would serve them?

None of them need be there: what is told is what compiles, what a device holds at the peak, what is
sent between devices, and for TPUs the cycles that the compiler estimates, which are good to compare
two programs with and no time. Each row is compiled in a process of its own; the JSON is written after
each. A row of T3 takes some two minutes of a core, one of the large teacher several times as long.

    pip install '.[tpu,cuda12]'
    python benchmarks/described.py
    python benchmarks/described.py --on tpu:v5e:1x1 --works T3 --levels O2 --add
"""

import argparse
import copy
import json
import multiprocessing
import os
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ["JAX_PLATFORMS"] = "cpu"  # an installed plugin is to compile, and not to be the default

import harness
import workloads

DEVICES = ("tpu:v5e:1x1", "tpu:v5e:2x4", "gpu:h100:1", "gpu:h100:8")
LEVELS = ("O0", "O1", "O2")
SHARDINGS = ("none", "teacher", "optimizer", "all")
KEY = ("work", "on", "level", "sharding")
BUSY_FOR = 900  # seconds that another process's libtpu is waited for


def large(smoke: bool = False) -> workloads.Work:
    """BERT-large and a student of six layers as wide, matched as T6 is with BERT-base."""
    base = workloads.work("T6", smoke)
    if smoke:
        return replace(base, name="large")
    sizes = {"hidden_size": 1024, "num_attention_heads": 16, "intermediate_size": 4096}
    matches = [
        match | {"layer_T": _doubled(match["layer_T"])} for match in copy.deepcopy(base.matches)
    ]
    teacher = base.teacher | sizes | {"num_hidden_layers": 24}
    return workloads.Work("large", teacher, base.student | sizes, tuple(matches))


def wide(smoke: bool = False) -> workloads.Work:
    """Two layers of a billion weights on both sides: student, moments and gradient pass 16 GiB."""
    if smoke:
        return replace(workloads.work("T3", smoke), name="wide")
    sizes = {
        "hidden_size": 6144,
        "num_attention_heads": 48,
        "intermediate_size": 24576,
        "num_hidden_layers": 2,
    }
    base = workloads.work("T3")
    match = {"layer_T": 2, "layer_S": 2, "feature": "hidden", "loss": "hidden_mse", "weight": 1.0}
    return workloads.Work("wide", base.teacher | sizes, base.student | sizes, (match,))


def _doubled(layer: Any) -> Any:
    return [2 * each for each in layer] if isinstance(layer, list) else 2 * layer


WORKS = {"large": large, "wide": wide}


def main() -> None:
    parser = harness.parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--works", nargs="+", default=["T3", "large"], choices=[*workloads.MATCHED, *WORKS])
    add("--on", nargs="+", default=DEVICES, metavar="DEVICES")
    add("--levels", nargs="+", default=LEVELS, choices=LEVELS, help="O1 and O2 in bfloat16")
    add("--shardings", nargs="+", default=SHARDINGS, choices=SHARDINGS, help="of several devices")
    add("--batch", type=int, default=32, help="of all devices together")
    add("--length", type=int, default=128, help="sequence length")
    add("--add", action="store_true", help="keep the rows that the JSON has, measure the others")
    args = parser.parse_args()
    if args.smoke:
        args.batch, args.length = 8, 16
    path = args.out / f"{args.name or 'described'}.json"
    found = _rows_in(path) if args.add else {}
    for case in cases(args):
        if case in found:
            continue
        # Compiling leaves gigabytes behind, and libtpu is held until its process ends.
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found[case] = pool.submit(measure, args, *case).result()
        harness.save(args, list(found.values()))
        print(*(f"{key}={value}" for key, value in found[case].items()), flush=True)
    harness.show([_cells(row) for row in found.values()])


def cases(args: argparse.Namespace) -> list[tuple[str, str, str, str]]:
    """``(work, devices, level, sharding)`` of each row; one device has no sharding."""
    return [
        (work, on, level, sharding)
        for work in args.works
        for on in args.on
        for level in args.levels
        for sharding in (args.shardings if _is_several(on) else ("none",))
    ]


def _is_several(on: str) -> bool:
    return any(int(size) > 1 for size in on.split(":")[-1].split("x") if size.isdecimal())


def _rows_in(path: Path) -> dict[tuple[str, ...], harness.Row]:
    rows = json.loads(path.read_text())["rows"] if path.exists() else []
    return {tuple(row[key] for key in KEY): row for row in rows}


def measure(args: argparse.Namespace, name: str, on: str, level: str, sharding: str) -> harness.Row:
    """One row."""
    import jax

    from jaxbrewer.machine.compiled import account_of
    from jaxbrewer.machine.placement import placement_on
    from jaxbrewer.preflight import prepare

    if on.startswith("cpu:"):
        jax.config.update("jax_num_cpu_devices", int(on.removeprefix("cpu:")))
    place = _devices(on)
    work = WORKS[name](args.smoke) if name in WORKS else workloads.work(name, args.smoke)
    config: dict[str, Any] = {}
    if level != "O0":
        config |= {"fp16": True, "fp16_opt_level": level, "half_dtype": "bfloat16"}
    if sharding != "none":
        config |= {"data_parallel": True, "sharding": sharding}
    distiller = workloads.jax_distiller(work, **config)
    batch = workloads.make_batch(work.teacher["vocab_size"], args.batch, args.length)
    with distiller, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        job, optimizer = distiller.job(), workloads.jax_optimizer()
        program = prepare(job, {"": batch}, optimizer, device=place.devices[0]).programs[""]
    lowered = placement_on(place.devices, distiller.t_config).lower(program, batch)
    row: harness.Row = dict(zip(KEY, (name, on, level, sharding), strict=True))
    began = time.monotonic()
    try:
        compiled = lowered.compile(compiler_options=dict(place.options))
    except jax.errors.JaxRuntimeError as error:
        return row | {"compiles": " ".join(str(error).split())[:300]}
    account = account_of(compiled)
    gib = 2**30
    return row | {
        "compiles": True,
        "fits": place.memory is None or account.peak <= place.memory,
        "compiled in s": time.monotonic() - began,
        "peak GiB": account.peak / gib,
        "held GiB": account.arguments / gib,
        "updated in place GiB": account.donated / gib,
        "scratch GiB": account.temporaries / gib,
        "GFLOP": account.flops and account.flops / 1e9,
        "cycles": account.cycles,
        "sends": {kind: [n, size / 2**20] for kind, (n, size) in account.collectives.items()},
    }


def _devices(on: str) -> Any:
    """The described devices, once no other process holds libtpu."""
    from jaxbrewer.machine.described import BusyError, described

    until = time.monotonic() + BUSY_FOR
    while True:
        try:
            return described(on)
        except BusyError:
            if time.monotonic() > until:
                raise
            time.sleep(5)


def _cells(row: harness.Row) -> harness.Row:
    """A row as the table has it."""
    sends = {kind: f"{n}: {size:.3g}" for kind, (n, size) in row.get("sends", {}).items()}
    shown = {key: value for key, value in row.items() if key not in ("sends", "compiled in s")}
    shown["cycles"] = None if not row.get("cycles") else f"{row['cycles'] / 1e6:.3g} M"
    for kind in ("all-gather", "all-reduce", "reduce-scatter", "all-to-all"):
        shown[f"{kind} MiB"] = sends.get(kind)
    return shown


if __name__ == "__main__":
    main()
