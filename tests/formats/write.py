"""Writes the checkpoints and caches that `test_formats` reads, with the code as it is.

    python -m tests.formats.write            (at the root of the repository)
    python -m tests.formats.write NAME …     (only these)

What is there is never written again: it says what an older version wrote. A change of the format
gets files of its own, beside those; see `FOLDER`. Of each NAME there are then

- NAME.tar.xz: the checkpoint in its output_dir, or the cache;
- NAME.json: the arrays it holds, those in the user's objects when it was written, and those at the
  end of a run that was not stopped; its position; the versions of the libraries that wrote it.
"""

import os

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["JAXBREWER_COMPILATION_CACHE"] = "off"
os.environ["NPROC"] = "16"

import importlib.metadata
import json
import socket
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import jax
import numpy as np
from safetensors.numpy import load_file

from . import jobs

ROOT = Path(__file__).parents[2]
FOLDER = Path(__file__).parent / "2"  # the checkpoints' format and the caches'
LIBRARIES = ("jax", "flax", "optax", "orbax-checkpoint", "numpy", "safetensors")


def share(data, rank, count):
    """A process's rows of every batch."""
    return [{name: np.split(value, count)[rank] for name, value in batch.items()} for batch in data]


def stopped_and_whole(job, rank=0):
    """Runs a job to its checkpoint, in ``out``, and to its end, in ``whole``."""
    found = {}
    for prefix, folder, stop in (("saved", "out", job.stop), ("final", "whole", None)):
        options = dict(job.writing)
        data = job.data()
        if job.processes > 1:
            options["local_rank"] = rank
            data = share(data, rank, job.processes)
        distiller = jobs.run(job, data, stop, output_dir=folder, **options)
        found |= {f"{prefix}/{name}": x for name, x in jobs.trained(distiller).items()}
    return found


def in_processes(name, count):
    """`stopped_and_whole` in processes of one device each."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", __spec__.name, "--process", name, str(port)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    started = [subprocess.Popen([*command, str(rank)], env=environment) for rank in range(count)]
    if any([process.wait(timeout=600) for process in started]):
        raise SystemExit(f"{name}: a process failed")
    return dict(np.load("found.npz"))


def one_process(name, port, rank):
    """What each of several processes does."""
    job = jobs.ALL[name]
    jax.distributed.initialize(f"localhost:{port}", job.processes, int(rank))
    found = stopped_and_whole(job, int(rank))
    if int(rank) == 0:
        np.savez("found.npz", **found)


def write_checkpoint(name):
    """Writes the files of a checkpoint."""
    job = jobs.ALL[name]
    found = in_processes(name, job.processes) if job.processes > 1 else stopped_and_whole(job)
    kept = {path.name for path in Path("out").iterdir()} - {"scores.json"}
    if kept != {f"gs{job.stop}"}:
        raise SystemExit(f"{name}: {kept} were saved, and one checkpoint is wanted")
    checkpoint, position = jobs.read(Path("out", f"gs{job.stop}").absolute())
    found |= {f"checkpoint/{key}": x for key, x in checkpoint.items()}
    save(name, "out", found, {"position": jobs.without_states(position)})
    resumed = jobs.trained(jobs.run(job, output_dir="out", resume=True))
    for key, value in resumed.items():
        np.testing.assert_allclose(value, found[f"final/{key}"], atol=1e-6, rtol=0, err_msg=key)


def write_cache(name):
    """Writes the files of a cache."""
    dtype = jobs.CACHES[name]
    found = {
        f"final/{key}": x for key, x in jobs.trained(jobs.run_cached("cache", dtype, "out")).items()
    }
    for path in sorted(Path("cache").glob("*.safetensors")):
        for key, x in load_file(path).items():
            found[f"cache/{path.name}/{key}"] = x.astype(np.float32)  # exact, and .npz knows it
    save(name, "cache", found, {})


def save(name, folder, found, described):
    """Packs a folder, and lays beside it what it holds, an array a line."""

    def anonymous(entry):
        entry.uid = entry.gid = entry.mtime = 0
        entry.uname = entry.gname = ""
        return entry

    for path in Path(folder).rglob("commit_success.txt"):  # Orbax says there where it was written
        path.write_text(path.read_text().replace(f"{Path.cwd()}/", ""))
    with tarfile.open(FOLDER / f"{name}.tar.xz", "w:xz") as archive:
        archive.add(folder, filter=anonymous)
    described["versions"] = {each: importlib.metadata.version(each) for each in LIBRARIES}
    parts = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in described.items()]
    lines = [f"{json.dumps(key)}: {json.dumps(jobs.as_json(x))}" for key, x in found.items()]
    parts.append('"arrays": {\n' + ",\n".join(lines) + "\n}")
    (FOLDER / f"{name}.json").write_text("{\n" + ",\n".join(parts) + "\n}\n")


def main(names):
    """Writes what is named, or all; refuses if any of it is there."""
    names = names or [*jobs.ALL, *jobs.CACHES]
    there = sorted(path.name for name in names for path in FOLDER.glob(f"{name}.*"))
    if there:
        raise SystemExit(f"{FOLDER} has {', '.join(there)} already; nothing was written")
    jax.config.update("jax_num_cpu_devices", 8)
    FOLDER.mkdir(exist_ok=True)
    for name in names:
        with tempfile.TemporaryDirectory() as empty:
            os.chdir(empty)
            write_checkpoint(name) if name in jobs.ALL else write_cache(name)
            os.chdir(ROOT)
        print(f"{name}: {sum(p.stat().st_size for p in FOLDER.glob(f'{name}.*')):,} bytes")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--process"]:
        one_process(*sys.argv[2:])
    else:
        main(sys.argv[1:])
