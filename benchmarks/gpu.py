"""Every figure of one GPU, by one command, the most important first.

Runs the scripts beside this one as parts, each in processes of its own and with a limit of time, and
stops when the time is up. What a part measured is in ``--out`` as soon as it ends, with its output
beside it, so nothing is lost when the machine goes away. Needs no network: wheels found in
``--wheels`` are installed into a folder of this run's own first (tensorboardX and textbrewer, where
an image has JAX and torch and not these).

    python benchmarks/gpu.py                     # some nine minutes on one GPU
    python benchmarks/gpu.py --only against_T3   # one part
    python benchmarks/gpu.py --smoke --device cpu    # tiny sizes: do all parts run?
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
HALF = ["--half", "bfloat16"]
AGAINST = [*HALF, "--levels", "O1", "O2", "--batch", "32", "128", "--compile",
           "--rounds", "7", "--steps", "10", "--lead", "3", "--warmup", "5"]  # fmt: skip
TIMED = ["--rounds", "7", "--steps", "10"]

# The name of a part → its script and arguments, the most important first.
PARTS: dict[str, list[str]] = {
    "against_T3": ["against_textbrewer.py", "--students", "T3", *AGAINST],
    "against_T4-tiny": ["against_textbrewer.py", "--students", "T4-tiny", *AGAINST],
    "roofline": ["roofline.py", "--students", "T3", "--batch", "128", *HALF, "--level", "O2", *TIMED],
    "attention": ["attention.py", "--batch", "32", "--length", "128", "512", *TIMED],
    "memory": ["memory.py", "--batch", "128", "--accumulation", "1", "--levels", "O0", "O1", "O2", "O3",
               "--at-once", "4"],
    "overhead": ["overhead.py", "--only", "bert", "--batch", "32", *TIMED],
    "cache": ["cache.py", "--batch", "32", "--ways", "memory float16", "disk float16", *HALF, "--level", "O2",
              "--rounds", "5", "--steps", "6"],
    "buckets": ["buckets.py", "--batch", "32", *HALF, "--level", "O2", "--steps", "6"],
    "same_bits": ["same_bits.py", "--batch", "32"],
    "same_bits_free": ["same_bits.py", "--batch", "32", "--only", "repeat", "--free"],
    "durability": ["durability.py", "--batch", "32", "--saves", "3", *TIMED],
    "against_float32": ["against_textbrewer.py", "--students", "T3", "--batch", "32", *TIMED, "--lead", "3"],
}  # fmt: skip


def main() -> int:
    args = arguments()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    told = []
    with tempfile.TemporaryDirectory() as folder:
        environment = prepared(args, Path(folder))
        for name in args.only or PARTS:
            left = time_left(args, start)
            began = time.monotonic()
            ended = run(args, name, environment, left) if left > 5 else "not started: no time left"
            told.append({"part": name, "ended": ended, "seconds": round(time.monotonic() - began)})
            print(f"{name}: {ended}, {told[-1]['seconds']} s", flush=True)
            (args.out / "parts.json").write_text(json.dumps(told, indent=1) + "\n")
    return 0 if all(part["ended"] == "done" for part in told) else 1


def time_left(args: argparse.Namespace, start: float) -> float:
    """The seconds until all is to end."""
    return args.minutes * 60 - (time.monotonic() - start)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    add = parser.add_argument
    add("--only", nargs="+", choices=PARTS, help="these parts, in this order")
    add("--minutes", type=float, default=9.0, help="when to stop")
    add("--out", type=Path, default=HERE / "results" / "gpu", help="folder for JSON and output")
    add("--wheels", type=Path, default=HERE / "wheels", help="folder with wheels to install")
    add("--device", default="gpu", choices=("cpu", "gpu"))
    add("--smoke", action="store_true", help="tiny sizes: do the parts run at all?")
    return parser.parse_args()


def prepared(args: argparse.Namespace, folder: Path) -> dict[str, str]:
    """The environment of the parts, with the wheels installed and compiled programs kept."""
    site = folder / "site"
    if wheels := sorted(args.wheels.glob("*.whl")):
        quiet = ["--quiet", "--no-index", "--no-deps", "--no-cache-dir", "--target", str(site)]
        subprocess.run(
            [sys.executable, "-m", "pip", "install", *quiet, *map(str, wheels)], check=True
        )
    paths = [str(HERE.parent), str(site), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
        "JAX_COMPILATION_CACHE_DIR": str(folder / "programs"),
        "PYTHONUNBUFFERED": "1",
    }


def run(args: argparse.Namespace, name: str, environment: dict[str, str], limit: float) -> str:
    """Runs a part, with its output into a file; how it ended."""
    script, *given = PARTS[name]
    given += ["--device", args.device, *(["--smoke"] if args.smoke else [])]
    command = [sys.executable, str(HERE / script), *given, "--name", name, "--out", str(args.out)]
    path = args.out / f"{name}.log"
    with path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
        )
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            end(process)
    print(table(path.read_text(encoding="utf-8", errors="replace")), flush=True)
    return {0: "done", None: "out of time"}.get(code, f"failed with code {code}, see {path.name}")


def end(process: "subprocess.Popen[bytes]") -> None:
    """Ends a part and all the processes it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def table(output: str) -> str:
    """The tables in a script's output; without one, its last lines."""
    lines = output.splitlines()
    return "\n".join([line for line in lines if line.startswith("|")] or lines[-5:])


if __name__ == "__main__":
    sys.exit(main())
