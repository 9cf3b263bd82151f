"""Memory kept between steps: that it is, and what leaves the allocator as the user has it."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxbrewer.evaluation import Accuracy
from jaxbrewer.machine import memory as allocation
from tests import fn_job

ROOT = Path(__file__).parents[2]
WIDTH = 4096  # the program's scratch memory is a matrix as wide and as high
PROGRAM = f"""
import resource
import jaxbrewer
import jax, jax.numpy as jnp
from jaxbrewer.machine.memory import kept_memory

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(1.0).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

numbers = jnp.arange({WIDTH}, dtype=jnp.float32)
run = jax.jit(lambda x: jnp.sin(jnp.outer(numbers, numbers) * x) @ numbers @ numbers)
run = run.lower(1.0).compile()
assert run.memory_analysis().temp_size_in_bytes >= {4 * WIDTH**2}
with kept_memory("cpu"):
    print(*(faults() for _ in range(24)))
print(*(faults() for _ in range(3)))
"""
PAGES = 4 * WIDTH**2 // os.sysconf("SC_PAGE_SIZE")


def faults(**environment):
    """The page faults of each call within `kept_memory`, and of each after it."""
    kept = {k: v for k, v in os.environ.items() if k != "GLIBC_TUNABLES" and k[:7] != "MALLOC_"}
    environment = {**kept, "JAX_PLATFORMS": "cpu", **environment}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [[int(each) for each in line.split()] for line in done.stdout.splitlines()]


needs_glibc = pytest.mark.skipif(not allocation._has_glibc(), reason="the C library is not glibc")


@needs_glibc
def test_a_program_gets_the_memory_it_had_before_and_gives_it_back():
    within, after = faults()
    assert min(within) < PAGES / 20
    assert after[0] > PAGES / 2  # a later one may find a hole in the heap


@needs_glibc
@pytest.mark.parametrize(
    "environment",
    [{"JAXBREWER_KEEP_MEMORY": "off"}, {"MALLOC_TOP_PAD_": "131072"}],
    ids=["off", "chosen"],
)
def test_it_is_left_alone(environment):
    assert min(min(calls) for calls in faults(**environment)) > PAGES / 2


@pytest.fixture
def calls(monkeypatch):
    """What the C library was called with, as if it were glibc; nothing is chosen."""
    made = []

    class Library:
        @staticmethod
        def mallopt(parameter, value):
            made.append((parameter, value))
            return 1

        @staticmethod
        def malloc_trim(pad):
            made.append("trim")
            return 1

    for name in list(os.environ):
        if name == "GLIBC_TUNABLES" or name.startswith("MALLOC_"):
            monkeypatch.delenv(name)
    monkeypatch.delenv(allocation.SWITCH, raising=False)
    monkeypatch.setattr(allocation, "_has_glibc", lambda: True)
    monkeypatch.setattr(allocation.ctypes, "CDLL", lambda name: Library)
    return made


def test_what_is_set(calls):
    assert allocation.share_heap()
    assert calls == [(-8, 1)]
    calls.clear()
    with pytest.raises(KeyError), allocation.kept_memory("cpu"):
        assert calls == [(-4, 0), (-1, -1)]
        calls.clear()
        raise KeyError
    assert calls == [(-4, 65536), (-3, 2**25), (-1, 2**26), "trim"]


def test_the_last_to_close_returns_it(calls):
    with allocation.kept_memory("cpu"):
        calls.clear()
        with allocation.kept_memory("cpu"), allocation.kept_memory("cpu"):
            pass
        assert not calls
    assert calls == [(-4, 65536), (-3, 2**25), (-1, 2**26), "trim"]


def test_an_accelerators_host_is_left_alone(calls):
    with allocation.kept_memory("gpu") as bound_memory:
        bound_memory()
    assert not calls


def test_a_process_that_grows_returns_what_is_free(calls, monkeypatch):
    sizes = iter([10, 10 + allocation.MOST_GROWTH, 11 + allocation.MOST_GROWTH, 20, 21])
    monkeypatch.setattr(allocation, "_resident", lambda: next(sizes))
    with allocation.kept_memory("cpu") as bound_memory:
        calls.clear()
        for _ in range(2 * allocation.LOOK_EVERY):
            bound_memory()
        assert not calls
        for _ in range(2 * allocation.LOOK_EVERY):
            bound_memory()
        assert calls == ["trim"]
    assert list(sizes) == []


def test_training_calls_it_after_each_step(calls, monkeypatch, tmp_path):
    looks = []
    monkeypatch.setattr(allocation, "_resident", lambda: looks.append(1) or 0)
    distiller = fn_job.distiller(tmp_path)
    with distiller:
        distiller.train(fn_job.SGD, fn_job.batches(allocation.LOOK_EVERY), num_epochs=2)
    assert len(looks) == 2
    assert calls[:2] == [(-4, 0), (-1, -1)]
    assert calls[-1] == "trim"


def test_filling_a_cache_calls_it_after_each_batch(calls, monkeypatch, tmp_path):
    looks = []
    monkeypatch.setattr(allocation, "_resident", lambda: looks.append(1) or 0)
    distiller = fn_job.distiller(tmp_path, config={"is_caching_logits": True})
    with distiller:
        distiller.train(fn_job.SGD, fn_job.batches(allocation.LOOK_EVERY), num_epochs=1)
    assert len(looks) == 2  # of the cache, and of the training
    assert calls.count((-4, 0)) == calls.count("trim") == 2


@pytest.mark.parametrize("ask", ["evaluate", "predict"])
def test_evaluation_calls_it_after_each_batch(calls, monkeypatch, tmp_path, ask):
    looks = []
    monkeypatch.setattr(allocation, "_resident", lambda: looks.append(1) or 0)
    given = {"evaluate": [[Accuracy()]], "predict": []}[ask]
    distiller = fn_job.distiller(tmp_path, keys=("logits", "labels"))
    with distiller:
        getattr(distiller, ask)(fn_job.batches(allocation.LOOK_EVERY + 1), *given)
    assert len(looks) == 1
    assert calls == [(-4, 0), (-1, -1), (-4, 65536), (-3, 2**25), (-1, 2**26), "trim"]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=1"),
        ("MALLOC_ARENA_MAX", "4"),
        ("MALLOC_CONF", "narenas:1"),
        ("JAXBREWER_KEEP_MEMORY", "off"),
        ("JAXBREWER_KEEP_MEMORY", " OFF "),
    ],
)
def test_the_environment_overrules(calls, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert not allocation.share_heap()
    with allocation.kept_memory("cpu") as bound_memory:
        bound_memory()
    assert not calls


def test_other_tunables_do_not(calls, monkeypatch):
    monkeypatch.setenv("GLIBC_TUNABLES", "glibc.elision.enable=0")
    assert allocation.share_heap()


def test_another_c_library(calls, monkeypatch):
    monkeypatch.setattr(allocation, "_has_glibc", lambda: False)
    assert not allocation.share_heap()
    assert not calls


@pytest.mark.parametrize(
    ("platforms", "plugins", "expected"),
    [
        ("cpu", ["cuda"], True),
        ("cpu,cuda", ["cuda"], True),
        ("cuda,cpu", ["cuda"], False),
        (None, ["cuda"], False),
        ("", [], True),
        (None, [], True),
    ],
)
def test_machines_with_accelerators(calls, monkeypatch, platforms, plugins, expected):
    before = jax.config.jax_platforms
    monkeypatch.setattr(allocation.metadata, "entry_points", lambda group: plugins)
    try:
        jax.config.update("jax_platforms", platforms)
        assert allocation.share_heap() is expected
    finally:
        jax.config.update("jax_platforms", before)
    assert bool(calls) is expected


def test_a_switch_that_is_neither(calls, monkeypatch):
    monkeypatch.setenv(allocation.SWITCH, "yes")
    with pytest.raises(ValueError, match="JAXBREWER_KEEP_MEMORY='yes': expected 'on' or 'off'"):
        allocation.share_heap()
    assert not calls
