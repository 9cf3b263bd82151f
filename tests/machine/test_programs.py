"""The compilation cache: where it is, who may overrule it, and that a second run reads it."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from jaxbrewer.machine import programs as compilation
from tests import fn_job

ROOT = Path(__file__).parents[2]
OPTIONS = ("jax_compilation_cache_dir", "jax_enable_compilation_cache", *compilation._DEFAULTS)


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder of its own, the cache switched on, and JAX's options put back afterwards."""
    before = {option: getattr(jax.config, option) for option in OPTIONS}
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(compilation.SWITCH, raising=False)
    for option, value in {OPTIONS[0]: None, **compilation._DEFAULTS}.items():
        jax.config.update(option, value)
    compilation_cache.reset_cache()
    yield tmp_path
    compilation_cache.reset_cache()
    for option, value in before.items():
        jax.config.update(option, value)


def test_the_folder_is_in_the_users_cache(home, monkeypatch):
    folder = compilation.keep_programs()
    assert folder == home / ".cache" / "jaxbrewer" / "xla"
    assert folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.jax_compilation_cache_dir == str(folder)
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 0.05
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == -1
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", str(home / "elsewhere"))
    assert compilation.keep_programs() == home / "elsewhere" / "jaxbrewer" / "xla"
    jax.config.update("jax_compilation_cache_dir", None)
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert compilation.keep_programs() == folder


@pytest.mark.parametrize("chosen", ["/some/folder", ""])
def test_a_folder_the_user_has_set_stays(home, chosen):
    jax.config.update("jax_compilation_cache_dir", chosen)
    assert compilation.keep_programs() is None
    assert jax.config.jax_compilation_cache_dir == chosen
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 1.0
    assert not (home / ".cache").exists()


def test_limits_the_user_has_set_stay(home):
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 3.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 100)
    assert compilation.keep_programs() is not None
    assert jax.config.jax_persistent_cache_min_compile_time_secs == 3.0
    assert jax.config.jax_persistent_cache_min_entry_size_bytes == 100


@pytest.mark.parametrize("switch", ["off", "OFF "])
def test_it_can_be_turned_off(home, monkeypatch, switch):
    monkeypatch.setenv(compilation.SWITCH, switch)
    assert compilation.keep_programs() is None
    assert jax.config.jax_compilation_cache_dir is None
    assert not (home / ".cache").exists()


def test_jaxs_own_switch_turns_it_off(home):
    jax.config.update("jax_enable_compilation_cache", False)
    assert compilation.keep_programs() is None
    assert jax.config.jax_compilation_cache_dir is None


def test_another_value_of_the_switch_is_refused(home, monkeypatch):
    monkeypatch.setenv(compilation.SWITCH, "/scratch/cache")
    with pytest.raises(
        ValueError, match=r"'/scratch/cache': expected 'on' or 'off'.*JAX_COMPILATION"
    ):
        compilation.keep_programs()


def broken_homes(home, monkeypatch):
    """Homes where no folder can be: a file in its way, somebody else's, one that is read-only."""
    (home / "file").write_text("")
    yield home / "file", "file"
    theirs = home / "theirs" / ".cache" / "jaxbrewer" / "xla"
    theirs.mkdir(parents=True)
    with monkeypatch.context() as patch:
        patch.setattr(os, "getuid", lambda: theirs.stat().st_uid + 1)
        yield home / "theirs", "belongs to another user"
    with monkeypatch.context() as patch:
        patch.setattr(os, "access", lambda path, mode: False)
        yield home / "read-only", "cannot be written"


def test_without_a_folder_training_goes_on(home, monkeypatch, caplog):
    caplog.set_level("INFO", "jaxbrewer")
    seen = 0
    for place, why in broken_homes(home, monkeypatch):
        monkeypatch.setenv("HOME", str(place))
        assert compilation.keep_programs() is None
        assert jax.config.jax_compilation_cache_dir is None
        seen += 1
        assert len(caplog.records) == seen
        assert "not kept for the next run" in caplog.records[-1].getMessage()
        assert why in caplog.records[-1].getMessage()
    assert seen == 3


def test_what_was_not_used_for_longest_makes_room(home, monkeypatch):
    folder = compilation.keep_programs()
    for age, name in enumerate(("d", "c", "b", "a")):
        path = folder / f"{name}-cache"
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    (folder / "other").write_bytes(bytes(1000))
    os.utime(folder / "a-cache", (2e9, 1e9))  # read of late
    monkeypatch.setattr(compilation, "MOST_BYTES", 250)
    jax.config.update("jax_compilation_cache_dir", None)
    compilation.keep_programs()
    assert sorted(path.name for path in folder.iterdir()) == ["a-cache", "d-cache", "other"]


def test_training_keeps_what_it_compiles(home):
    distiller = fn_job.distiller(home / "run")
    with distiller:
        distiller.train(fn_job.SGD, fn_job.batches(2), num_epochs=1)
    kept = [path.name for path in (home / ".cache" / "jaxbrewer" / "xla").iterdir()]
    assert any(name.startswith("jit_step-") for name in kept)


RUN = """
import jax
from jax.numpy import ones
from jaxbrewer.machine import programs
ones(2).block_until_ready()  # JAX has compiled before training starts
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append("cache_hit" in event))
print("folder", programs.keep_programs())
print(float(jax.jit(lambda x: (x @ x).sum())(ones((8, 8)))))
print("hits", sum(hits))
"""


def run(home, **environment):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("JAX")}
    environment = {**clean, "HOME": str(home), "JAX_PLATFORMS": "cpu", **environment}
    environment.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env=environment, cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stderr == ""
    return done.stdout


def test_a_second_process_reads_what_the_first_compiled(tmp_path):
    folder = tmp_path / ".cache" / "jaxbrewer" / "xla"
    assert run(tmp_path) == f"folder {folder}\n512.0\nhits 0\n"
    assert any("lambda" in path.name for path in folder.iterdir())
    assert run(tmp_path) == f"folder {folder}\n512.0\nhits 2\n"


def test_the_environment_decides(tmp_path):
    mine = str(tmp_path / "mine")
    assert run(tmp_path, JAX_COMPILATION_CACHE_DIR=mine).startswith("folder None")
    assert any("lambda" in path.name for path in Path(mine).iterdir())
    assert run(tmp_path, JAXBREWER_COMPILATION_CACHE="off") == "folder None\n512.0\nhits 0\n"
    assert not (tmp_path / ".cache").exists()
