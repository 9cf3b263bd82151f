"""SIGINT and SIGTERM: the window is finished, saved and logged before they take effect."""

import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxbrewer.training import read_scalars, signals
from jaxbrewer.training.folders import steps_in

from .. import nnx_job

ROOT = Path(__file__).parents[2]
BATCHES = 12  # in accumulation windows of 2: 6 updates, saved at the end only


@pytest.fixture(autouse=True)
def heeded():
    """A shell that starts the tests in the background lets them ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def run(folder, at=None, signum=signal.SIGINT, times=1, **config):
    """A training that sends itself a signal while its batch number `at` is prepared."""
    distiller = nnx_job.distiller(folder, gradient_accumulation_steps=2, **config)
    seen = []

    def postprocess(batch):
        if len(seen) == at:
            for _ in range(times):
                signal.raise_signal(signum)
        seen.append(1)
        return batch

    with distiller:
        distiller.train(
            nnx_job.SGD, nnx_job.loader(BATCHES), num_epochs=1, batch_postprocessor=postprocess
        )
    return distiller


@pytest.mark.parametrize("at", [5, BATCHES - 1])  # in a middle window and in the last
def test_an_interrupted_run_is_saved_and_ends_as_one_that_was_not(at, tmp_path):
    whole = run(tmp_path / "whole")
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "cut", at)
    assert signal.getsignal(signal.SIGINT) is before
    step = at // 2 + 1
    assert steps_in(tmp_path / "cut" / "out") == [step]
    assert len(read_scalars(tmp_path / "cut" / "log")["scalar/total_loss"]) == 2 * step
    resumed = run(tmp_path / "cut", resume=True)
    for name, value in nnx_job.weights(whole.model_S).items():
        np.testing.assert_array_equal(value, nnx_job.weights(resumed.model_S)[name])
    curves = [read_scalars(tmp_path / name / "log") for name in ("whole", "cut")]
    assert curves[0] == curves[1]


def test_a_second_one_leaves_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, at=3, times=2)
    assert steps_in(tmp_path / "out") == []


def test_sigterm_goes_to_who_handled_it_before(tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *signum: heard.append(signum))
    try:
        with pytest.raises(SystemExit) as ended:
            run(tmp_path, at=3, signum=signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert len(heard) == 1
    assert ended.value.code == 128 + signal.SIGTERM
    assert steps_in(tmp_path / "out") == [2]


TERMINATED = """
import signal, sys, pathlib
sys.path.insert(0, {root!r})
from tests.durability.test_signals import run
run(pathlib.Path(sys.argv[1]), at=3, signum=signal.SIGTERM)
"""


def test_sigterm_ends_the_process_once_all_is_saved(tmp_path):
    code = TERMINATED.format(root=str(ROOT))
    ended = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, check=False, cwd=ROOT
    )
    assert ended.returncode == -signal.SIGTERM, ended.stderr.decode()
    assert steps_in(tmp_path / "out") == [2]
    assert len(read_scalars(tmp_path / "log")["scalar/total_loss"]) == 4


def test_what_is_ignored_stays_so_and_the_switch_is_heeded(monkeypatch):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        with signals.waiting() as asked:
            signal.raise_signal(signal.SIGTERM)
            assert not asked
    finally:
        signal.signal(signal.SIGTERM, before)
    monkeypatch.setenv(signals.SWITCH, "off")
    with pytest.raises(KeyboardInterrupt), signals.waiting():
        signal.raise_signal(signal.SIGINT)
    monkeypatch.setenv(signals.SWITCH, "perhaps")
    with pytest.raises(ValueError, match="expected 'on' or 'off'"), signals.waiting():
        pass


def test_another_thread_leaves_signals_alone():
    before, seen = signal.getsignal(signal.SIGINT), []

    def work():
        with signals.waiting():
            seen.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [before]
