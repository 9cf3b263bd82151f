"""The worse days in numbers: flipped bits, malformed batches, hostile folders; once, as a table.

``python -m tests.durability.census [FLIPS BATCHES FOLDERS]``, by default 1000 300 100. What is lost is a
checkpoint that was finished; silent, a run that went on with other numbers, or what was taken for
good; from inside, an error that is none of ours. Kills are counted by `tests.training.killed`.
"""

import logging
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax

from jaxbrewer import TrainingConfig
from jaxbrewer.errors import CheckpointError
from jaxbrewer.machine.processes import Processes
from jaxbrewer.training.resume import checkpoint_to_resume
from tests import fn_job
from tests.formats.jobs import read

from . import hostile, malformed

LARGE = 1024  # bytes of an array, or of a file


@dataclass
class Row:
    """What came of one kind of day."""

    what: str
    tries: int
    lost: int = 0
    silent: int = 0
    inside: int = 0
    note: str = ""
    seconds: float = 0.0

    def __str__(self):
        cells = (self.what, self.tries, self.lost, self.silent, self.inside, self.note)
        return f"| {' | '.join(map(str, cells))} | {self.seconds:.0f} |"


# ------------------------------------------------------------------------------------------ flips


def train(folder):
    """Leaves two checkpoints whose arrays are large, with moments and a random key."""
    distiller = fn_job.distiller(folder, student=fn_job.encoder(2, width=24), seed=3)
    with distiller:
        distiller.train(optax.adam(0.01), fn_job.batches(2), num_epochs=2)
    return folder / "out"


def flipped(path, rng):
    """Flips a bit of a checkpoint: in its large files, or in one of the others; says which."""
    files = [p for p in sorted(path.rglob("*")) if p.is_file() and p.stat().st_size]
    large = [p for p in files if p.stat().st_size > LARGE]
    file = [large, files][rng.integers(2)]
    file = file[rng.integers(len(file))]
    data = bytearray(file.read_bytes())
    at = int(rng.integers(8 * len(data)))
    data[at // 8] ^= 1 << at % 8
    file.write_bytes(data)
    return f"{file.relative_to(path)}, bit {at}"


def same(one, other):
    """Whether two checkpoints, as `read` gives them, are the same."""
    arrays = one[0].keys() == other[0].keys() and all(
        one[0][k].dtype == other[0][k].dtype and one[0][k].tobytes() == other[0][k].tobytes()
        for k in one[0]
    )
    return arrays and one[1] == other[1]


def flips(count, folder):
    """Bits flipped in the newest of two checkpoints, each time in a fresh copy."""
    out = train(folder)
    older, newest = sorted(out.glob("gs*"))
    wanted, kept = read(newest), folder / "kept"
    sizes = [x.nbytes for x in wanted[0].values()]
    shutil.copytree(newest, kept)
    config = TrainingConfig(output_dir=out, device="cpu", resume=True)
    row = Row(f"bits flipped, arrays up to {max(sizes):,} bytes", count)
    processes, rng, harmless = Processes(jax.devices()[:1]), np.random.default_rng(0), 0
    for _ in range(count):
        where = flipped(newest, rng)
        try:
            found = checkpoint_to_resume(config, processes)
            if found is None:
                row.lost += 1
                print(f"{where}: nothing to go on from", file=sys.stderr)
            elif found.path == newest:
                harmless += 1
                if not same(read(newest), wanted):
                    row.silent += 1
                    print(f"{where}: silent", file=sys.stderr)
            elif found.path != older:
                row.lost += 1
        except CheckpointError as error:
            row.lost += 1
            print(f"{where}: the older one is not taken: {error}", file=sys.stderr)
        except Exception as error:  # noqa: BLE001  that is what is looked for
            row.inside += 1
            print(f"{where}: {type(error).__name__}: {error}", file=sys.stderr)
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
    row.note = (
        f"{count - harmless} named, and the one before taken; {harmless} changed nothing read"
    )
    return row


# ------------------------------------------------------------------------- batches and folders


def batches(count, folder):
    """Malformed batches, each met on its way to the step, as training meets it."""
    table = malformed.tally(count, False, [*malformed.MALFORMED])
    of = {
        name: sum(each[name] for each in table.values()) for name in ("trained", "raw", "unnamed")
    }
    note = f"{len(malformed.MALFORMED)} kinds; {of['unnamed']} without batch, input and fix"
    return Row("malformed batches", count, silent=of["trained"], inside=of["raw"], note=note)


def folders(count, folder):
    """Hostile or odd folders of models."""
    table = hostile.tally(count)
    of = {name: sum(each[name] for each in table.values()) for name in ("silent", "raw", "unnamed")}
    note = f"{len(hostile.HOSTILE)} kinds; {of['unnamed']} without file and field"
    return Row("hostile folders", count, silent=of["silent"], inside=of["raw"], note=note)


def main(*counts):
    """Prints the table."""
    logging.disable(logging.WARNING)
    given = dict(zip((flips, batches, folders), counts or (1000, 300, 100), strict=True))
    print("| what | tries | lost | silent | from inside | | s |\n|---|---|---|---|---|---|---|")
    for part, count in given.items():
        if not count:
            continue
        began = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            row = part(count, Path(folder))
        row.seconds = time.monotonic() - began
        print(row, flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
