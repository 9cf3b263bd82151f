"""What each of two processes runs, scenario after scenario: see `test_two_processes`.

Run as ``python -m tests.devices.two_processes PORT RANK FOLDER``.
"""

import json
import signal
import sys
import time
from pathlib import Path

import jax
import numpy as np

import jaxbrewer
from jaxbrewer.evaluation import Divergence
from jaxbrewer.training.folders import steps_in

from .. import nnx_job
from ..durability import test_nonfinite as nonfinite
from . import every

DEVICES = 2  # of each process


def part(rank, batch, first):
    """The first `first` rows for process 0, the others for process 1."""
    rows = slice(0, first) if rank == 0 else slice(first, None)
    return jax.tree.map(lambda value: value[rows], batch)


def parts(rank, batches):
    """Half of each batch; of an odd one, process 0 has one row more."""
    return [part(rank, batch, (len(batch["labels"]) + 1) // 2) for batch in batches]


def trainer(config):
    """No dropout and no masks: the mean of the devices' means is the mean of all."""
    return jaxbrewer.BasicTrainer(config, nnx_job.Encoder(1, 32), nnx_job.adaptor)


def uneven(rank):
    """Process 0 has two batches more than process 1."""
    mine = parts(rank, every.batches(3))
    return mine + (every.batches(2, size=8, seed=5) if rank == 0 else [])


class Sampler:
    """Notes the epochs it is told."""

    def __init__(self):
        self.epochs = []

    def set_epoch(self, epoch):
        self.epochs.append(epoch)


class Shuffled(list):
    """Draws its order from numpy's global state."""

    def __init__(self, batches):
        super().__init__(batches)
        self.sampler = Sampler()

    def __iter__(self):
        return iter([self[i] for i in np.random.permutation(len(self))])


def even(rank, config):
    distiller = every.JOBS["general"](config(log=True))
    every.train(distiller, parts(rank, every.batches(4)))
    return distiller


def ragged(rank, config):
    distiller = every.JOBS["general"](config(log=True))
    every.train(
        distiller,
        parts(rank, [*every.batches(2), *every.batches(1, size=13, seed=3)]),
    )
    return distiller


def one_runs_out(rank, config):
    distiller = every.JOBS["general"](config(log=True))
    with distiller:
        distiller.train(nnx_job.SGD, uneven(rank), num_epochs=2)
    return distiller


def tasks(rank, config):
    distiller = every.JOBS["tasks"](config())
    every.train(distiller, parts(rank, every.batches(4)))
    return distiller


def pmapped(rank, config):
    distiller = trainer(config(mapping="pmap"))
    every.train(
        distiller,
        parts(rank, [*every.batches(2), *every.batches(1, size=13, seed=3)]),
    )
    return distiller


def sharded(rank, config):
    distiller = every.JOBS["general"](config(sharding="all"))
    every.train(distiller, parts(rank, every.batches(4)))
    return distiller


EXACT = {"gradient_accumulation_steps": 2, "gradient_accumulation": "exact"}


def exact(rank, config):
    distiller = every.by_example(config(**EXACT))
    every.train(distiller, parts(rank, every.batches(4)))
    return distiller


def cached(rank, config):
    distiller = jaxbrewer.BasicDistiller(
        config(),
        every.distillation(is_caching_logits=True),
        every.teacher(),
        every.student(),
        nnx_job.adaptor,
        nnx_job.adaptor,
    )
    every.train(distiller, parts(rank, every.batches(4)))
    return distiller


def whole(rank, config, stop_in=None, **options):
    """Two epochs in an order of the process's own; perhaps stopped by one process in the first."""
    np.random.seed(rank)
    distiller = every.JOBS["general"](config(ckpt_frequency=2, **options))
    loader = Shuffled(parts(rank, every.batches(4)))

    def callback(model, step):
        return jaxbrewer.CallbackResult(stop=rank == stop_in, score=float(step))

    with distiller:
        distiller.train(nnx_job.SGD, loader, num_epochs=2, callback=callback)
    return distiller, loader.sampler.epochs


def uninterrupted(rank, config):
    distiller, epochs = whole(rank, config)
    if epochs != [0, 1]:
        raise RuntimeError(f"set_epoch was called with {epochs}")
    return distiller


def interrupted(rank, config):
    return whole(rank, config, stop_in=1)[0]


def resumed(rank, config):
    return whole(rank, config, resume=True)[0]


def changed(rank, config):
    """Process 1 alone comes back with another teacher."""
    every.train(every.JOBS["general"](config()), parts(rank, every.batches(4)))
    distiller = every.JOBS["general"](config(resume=True))
    distiller.model_T = every.teacher(1 if rank == 0 else 9)
    with distiller:
        distiller.train(nnx_job.SGD, parts(rank, every.batches(4)), num_epochs=2)


def other_data(rank, config):
    """One of the processes goes on with other data."""
    checkpoint = Path(config().output_dir).parents[1] / "resumed" / "out" / "gs2"
    distiller = every.JOBS["general"](config(resume=str(checkpoint)))
    every.train(distiller, Shuffled(parts(rank, every.batches(4, seed=9 * rank))))


def best(rank, config):
    return {"best": whole(rank, config)[0].best_checkpoint.name}


class Failing(Divergence):
    def compute(self):
        raise RuntimeError("no numbers")


class Written:
    """What a writer is given."""

    def __init__(self):
        self.steps, self.closed = [], 0

    def write(self, step, values):
        self.steps.append(step)

    def close(self):
        self.closed += 1


def evaluated(rank, config):
    """As `even`, with evaluations: the first process's loader is another than the second's."""
    distiller = every.JOBS["general"](config(log=True, ckpt_frequency=2))
    dev = every.batches(2 + rank, size=5, seed=8 + rank)
    asked = {"eval_loader": dev, "metrics": [Divergence()], "best_metric": "-kl", "eval_steps": 3}
    written = Written()
    every.train(distiller, parts(rank, every.batches(4)), writers=[written], **asked)
    said = {"evaluations": distiller.evaluations, "best": distiller.best_checkpoint.name}
    said["written"] = vars(written)
    folder = Path(distiller.t_config.output_dir).parents[1]
    (folder / f"numbers-{rank}.json").write_text(json.dumps(said))
    return distiller


def evaluates_badly(rank, config):
    """The evaluation of process 1 fails, where no checkpoint is due."""
    metric = Failing() if rank == 1 else Divergence()
    asked = {"eval_loader": every.batches(1, size=5), "metrics": [metric], "eval_steps": 1}
    every.train(every.JOBS["general"](config()), parts(rank, every.batches(4)), **asked)


def evaluates_alone(rank, config):
    asked = {"eval_loader": every.batches(1), "metrics": [Divergence()]} if rank == 1 else {}
    every.train(every.JOBS["general"](config()), parts(rank, every.batches(4)), **asked)


def disagree(rank, config):
    loader = parts(rank, every.batches(3))
    if rank == 1:
        loader[2] = {
            key: value[:, :5] if value.ndim == 2 else value for key, value in loader[2].items()
        }
    every.train(trainer(config()), loader)


def fails(rank, config):
    def postprocess(batch):
        postprocess.seen += 1
        if rank == 1 and postprocess.seen == 3:
            raise RuntimeError("the disk is gone")
        return batch

    postprocess.seen = 0
    every.train(trainer(config()), parts(rank, every.batches(4)), batch_postprocessor=postprocess)


def cannot_begin(rank, config):
    """When the second checkpoint is due, a file is where the output_dir was."""
    out = Path(config().output_dir)

    def callback(model, step):
        while rank == 0 and steps_in(out) != [2]:
            time.sleep(0.01)
        if rank == 0:
            out.rename(out.with_name("moved"))
            out.touch()

    distiller = every.JOBS["general"](config(ckpt_frequency=2))
    every.train(distiller, parts(rank, every.batches(4)), callback=callback)


NOT_FINITE = 3  # the batch, in its epoch, of which process 1 has a label that is NaN


def guarded(rank, config, *, is_bad, **options):
    """Two epochs of a job whose labels may be bad; returns its student and its error."""
    data = [part(rank, batch, nonfinite.ROWS // 2) for batch in nonfinite.batches(6)]
    if is_bad and rank == 1:
        data[nonfinite.ORDER[NOT_FINITE]]["student"]["label"][-1] = np.nan
    folder = Path(config().output_dir).parent
    distiller, error = nonfinite.train(folder, data, local_rank=rank, **options)
    return distiller.model_S, error


def sound(rank, config):
    return guarded(rank, config, is_bad=False)[0]


def stopped(rank, config):
    raise guarded(rank, config, is_bad=True)[1]


def gone_on(rank, config):
    return guarded(rank, config, is_bad=False, resume=True)[0]


def dropped(rank, config):
    """A window that is not finite in either epoch, which is not too many."""
    options = {"gradient_accumulation_steps": 2, "max_nonfinite_steps": 2}
    return guarded(rank, config, is_bad=True, **options)[0]


def asked(rank, config):
    """Process 1 alone is sent SIGTERM, while it prepares its second batch."""
    heard, seen = [], []

    def postprocess(batch):
        seen.append(batch)
        if rank == 1 and len(seen) == 2:
            signal.raise_signal(signal.SIGTERM)
        return batch

    before = signal.signal(signal.SIGTERM, lambda *signum: heard.append(signum))
    try:
        distiller = every.JOBS["general"](config(log=True))
        every.train(distiller, parts(rank, every.batches(4)), batch_postprocessor=postprocess)
    except SystemExit as ended:
        return {"code": ended.code, "heard": len(heard)}
    finally:
        signal.signal(signal.SIGTERM, before)


def went_on(rank, config):
    distiller = every.JOBS["general"](config(log=True, resume=True))
    every.train(distiller, parts(rank, every.batches(4)))
    return distiller


def has_nothing(rank, config):
    class Nothing(list):
        def __len__(self):
            return 2

    every.train(trainer(config()), Nothing() if rank == 1 else parts(rank, every.batches(2)))


def too_small(rank, config):
    every.train(trainer(config()), parts(rank, every.batches(2, size=2)))


SCENARIOS = [
    even,
    ragged,
    one_runs_out,
    tasks,
    pmapped,
    sharded,
    exact,
    cached,
    uninterrupted,
    interrupted,
    resumed,
    other_data,
    best,
    evaluated,
    evaluates_badly,
    evaluates_alone,
    changed,
    disagree,
    fails,
    cannot_begin,
    sound,
    stopped,
    gone_on,
    dropped,
    asked,
    went_on,
    has_nothing,
    too_small,
]
IN = {
    "interrupted": "resumed",
    "stopped": "gone_on",
    "asked": "went_on",
}  # whose folder a scenario writes to, if not its own


def weights(found):
    """Name → numpy array, of a distiller's student or a student that is a function."""
    if isinstance(found, jaxbrewer.FunctionModel):
        return {name: np.asarray(value) for name, value in found.params.items()}
    return nnx_job.weights(found.model_S)


def main(port, rank, folder):
    """Runs all scenarios, and leaves weights or errors as files."""
    jax.config.update("jax_num_cpu_devices", DEVICES)
    jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=rank)
    for scenario in SCENARIOS:
        name = scenario.__name__
        where = folder / IN.get(name, name)

        def config(log=False, where=where, **options):
            made = every.config(where, local_rank=rank, **options)
            return made if log else jaxbrewer.TrainingConfig(**{**vars(made), "log_dir": None})

        said = {"error": None}
        try:
            found = scenario(rank, config)
        except Exception as error:  # noqa: BLE001  the test looks at it
            said["error"] = f"{type(error).__name__}: {error}"
        else:
            if isinstance(found, dict):
                said |= found
            else:
                np.savez(folder / f"{name}-{rank}.npz", **weights(found))
        (folder / f"{name}-{rank}.json").write_text(json.dumps(said))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]))
