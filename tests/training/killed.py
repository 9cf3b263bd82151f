"""Kills a training over and over inside its saves, and counts the kills that lost anything.

``python -m tests.training.killed FOLDER [KILLS] [SEED]`` goes on until so many kills fell inside a save,
and prints them, and whether the run ends in the bits of one that was not killed. Each training is
a fork of this process, which has imported everything and computed nothing. Trainings differ in how
many checkpoints they keep, and in whether a callback gives scores.
"""

import itertools
import logging
import os
import random
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import optax

import jaxbrewer
from jaxbrewer.training.folders import step_folders, steps_in
from tests import fn_job

# What spares each training its compiling, beside a JAX_COMPILATION_CACHE_DIR.
QUICKLY = {
    "XLA_FLAGS": "",
    "NPROC": "1",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}
KINDS = [{"kept": 1}, {"kept": 1, "is_scored": True}, {"kept": 2, "is_scored": True}]
SPREAD = 0.3  # seconds after a new checkpoint within which a save is chosen
WITHIN = 0.03  # seconds after a moment inside that save within which the kill falls
ENDLESS = 100_000  # epochs of two steps


def score(model, step):
    """Now better, now worse than before."""
    return jaxbrewer.CallbackResult(score=step * 37 % 101)


def train(folder, epochs, resume, *, kept=None, is_scored=False, **config):
    """Trains to the end, and leaves the weights beside the checkpoints."""
    distiller = fn_job.distiller(folder, resume=resume, max_to_keep=kept, **config)
    with distiller:
        distiller.train(
            optax.sgd(1e-3),
            fn_job.batches(2),
            num_epochs=epochs,
            callback=score if is_scored else None,
        )
    np.savez(folder / "weights.npz", *map(np.asarray, jax.tree.leaves(distiller.model_S.params)))


def start(*args, **options):
    """Starts a training in a fork of this process; returns its id."""
    child = os.fork()
    if child:
        return child
    failed = 1
    try:
        train(*args, **options)
        failed = 0
    except Exception:
        logging.exception("a training failed")
    finally:
        os._exit(failed)


def is_in_a_save(folder):
    """Whether a checkpoint is being written or deleted."""
    return len(step_folders(folder)) > len(steps_in(folder)) or any(folder.glob("gs*tmp*"))


def kill_after_a_checkpoint(child, folder, rng):
    """Kills a training in a save after it has written a checkpoint of its own.

    Returns:
        The newest checkpoint there was just before, and whether it was writing or deleting one.

    Raises:
        RuntimeError: it ended by itself.
    """
    before = steps_in(folder)
    while steps_in(folder) in ([], before):
        if os.waitpid(child, os.WNOHANG)[0]:
            raise RuntimeError("a training ended by itself, before it was killed")
        time.sleep(0.001)
    time.sleep(rng.uniform(0, SPREAD))
    while not is_in_a_save(folder):
        time.sleep(0.001)
    time.sleep(rng.uniform(0, WITHIN))
    newest = max(steps_in(folder), default=0)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return newest, is_in_a_save(folder)


def lost(folder, newest):
    """What a kill has cost, in words, or ''."""
    there = steps_in(folder)
    if not there:
        return "no checkpoint is left"
    return "" if there[-1] >= newest else f"gs{newest} was there, and gs{there[-1]} is the newest"


def same_weights(one, other):
    """Whether two trainings have left the same bits."""
    a, b = (np.load(folder / "weights.npz") for folder in (one, other))
    return all((a[name] == b[name]).all() for name in a)


@dataclass(frozen=True)
class Killed:
    """What became of a run that was killed many times.

    Attributes:
        kills: how many.
        inside: those that fell inside a save.
        losses: what each kill that cost something has cost.
        status: the exit status of the last training, which was let end.
        is_same: whether it ended in the bits of a run that was not killed.
        left: the folders of checkpoints that are left.
        newest: the step that the last training went on from.
    """

    kills: int
    inside: int
    losses: list[str]
    status: int
    is_same: bool
    left: list[str]
    newest: int

    def __str__(self):
        bits = "the same" if self.is_same else "other"
        said = (
            f"{self.kills} kills, {self.inside} inside a save, {len(self.losses)} lost; the last ended "
            f"with {self.status} in {bits} bits; left: {self.left}, after gs{self.newest}"
        )
        return "\n".join([said, *self.losses])


def run(folder, inside, seed):
    """Kills until so many kills fell inside a save, then lets the last training end.

    Raises:
        RuntimeError: a training ended by itself: what a kill left could not be gone on from.
    """
    out, rng, kinds = folder / "out", random.Random(seed), itertools.cycle(KINDS)
    kills, found, losses = 0, 0, []
    while found < inside:
        newest = max(steps_in(out), default=0)
        # By its name: a damaged one would be an error, and none before it be taken for it.
        child = start(folder, ENDLESS, f"gs{newest}" if newest else True, **next(kinds))
        newest, is_inside = kill_after_a_checkpoint(child, out, rng)
        kills, found = kills + 1, found + is_inside
        losses += [text for text in [lost(out, newest)] if text]
    newest = max(steps_in(out), default=0)
    epochs = newest // 2 + 2
    _, status = os.waitpid(start(folder, epochs, True, kept=1), 0)
    os.waitpid(start(folder / "whole", epochs, False, ckpt_epoch_frequency=epochs), 0)
    is_same = same_weights(folder, folder / "whole")
    left = sorted(path.name for path in out.glob("gs*"))
    return Killed(kills, found, losses, status, is_same, left, newest)


def main(folder, inside=12, seed=0):
    """Prints what became of it."""
    print(run(Path(folder), int(inside), int(seed)))


if __name__ == "__main__":
    main(*sys.argv[1:])
