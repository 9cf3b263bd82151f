"""Kills a training over and over, and counts the kills that left no finished checkpoint.

``python -m tests.training.killed FOLDER [KILLS] [SEED]`` prints ``KILLS kills, LOST lost``. Each training is
a fork of this process, which has imported everything and computed nothing.
"""

import logging
import os
import random
import signal
import sys
import time
from pathlib import Path

import optax

from jaxbrewer.training.folders import steps_in
from tests import fn_job

KEPT = 1
SPREAD = 0.3  # seconds after a new checkpoint within which the kill falls


def train(folder, epochs):
    """Trains to the end, from where the last one came."""
    distiller = fn_job.distiller(folder, resume=True, max_to_keep=KEPT)
    with distiller:
        distiller.train(optax.sgd(1e-3), fn_job.batches(2), num_epochs=epochs)


def start(folder, epochs):
    """Starts a training in a fork of this process; returns its id."""
    child = os.fork()
    if child:
        return child
    failed = 1
    try:
        train(folder, epochs)
        failed = 0
    except Exception:
        logging.exception("a training failed")
    finally:
        os._exit(failed)


def kill_after_a_checkpoint(child, folder, seconds):
    """Kills a training some time after it has written a checkpoint of its own.

    Raises:
        RuntimeError: it ended by itself.
    """
    before = steps_in(folder)
    while steps_in(folder) in ([], before):
        if os.waitpid(child, os.WNOHANG)[0]:
            raise RuntimeError("a training ended by itself, before it was killed")
        time.sleep(0.001)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


def main(folder, kills=6, seed=0):
    """Kills `kills` trainings, then lets one end; prints what was lost, and what is left."""
    folder = Path(folder)
    rng = random.Random(int(seed))
    lost = 0
    for _ in range(int(kills)):
        child = start(folder, epochs=100_000)
        kill_after_a_checkpoint(child, folder / "out", rng.uniform(0, SPREAD))
        lost += not steps_in(folder / "out")
    newest = max(steps_in(folder / "out"), default=0)
    _, status = os.waitpid(start(folder, epochs=newest // 2 + 2), 0)
    left = sorted(path.name for path in (folder / "out").glob("gs*"))
    print(
        f"{kills} kills, {lost} lost; the last ended with {status}; left: {left}, after gs{newest}"
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
