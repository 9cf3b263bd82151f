"""Teacher caching: the same numbers, the cache's identity, what is kept, what is refused."""

import json

import numpy as np
import pytest

import jaxbrewer
from jaxbrewer.errors import CacheError, ConfigError
from jaxbrewer.training import teacher_cache as caching
from tests import nnx_job
from tests.nnx_job import read_events

MATCHES = [
    {"layer_T": 3, "layer_S": 2, "feature": "hidden", "loss": "hidden_mse", "weight": 1.0},
    {"layer_T": [1, 1], "layer_S": [1, 1], "feature": "hidden", "loss": "nst", "weight": 1.0},
]


def make(folder, cache_dir=None, teacher_seed=1, matches=MATCHES, **distillation):
    return jaxbrewer.GeneralDistiller(
        jaxbrewer.TrainingConfig(
            output_dir=str(folder / "out"), log_dir=str(folder / "log"), device="cpu"
        ),
        jaxbrewer.DistillationConfig(
            **{"is_caching_logits": True, "intermediate_matches": matches, **distillation},
            cache_dir=cache_dir,
        ),
        nnx_job.Encoder(3, 4, seed=teacher_seed),
        nnx_job.Encoder(2, 4, seed=2),
        nnx_job.adaptor,
        nnx_job.adaptor,
    )


def run(distiller, loader=None, num_epochs=2):
    with distiller:
        distiller.train(nnx_job.SGD, loader or nnx_job.loader(5), num_epochs=num_epochs)
    return distiller


class Same(list):
    """A loader with the order the cache will serve."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng((0, self.epoch)).permutation(len(self))
        return (self[i] for i in order)


def test_cached_features_train_as_the_teacher_would(tmp_path):
    """The general distiller too, with features; in memory, on disk, and read again from disk."""
    plain = make(tmp_path / "plain", is_caching_logits=False)
    run(plain, Same(nnx_job.loader(5)))
    expected = read_events(tmp_path / "plain" / "log")
    for name, cache_dir in (("memory", None), ("disk", tmp_path / "c"), ("again", tmp_path / "c")):
        run(make(tmp_path / name, cache_dir))
        for tag, curve in read_events(tmp_path / name / "log").items():
            np.testing.assert_allclose(curve, expected[tag], rtol=1e-5, err_msg=f"{name} {tag}")


def test_cached_teacher_runs_once_for_each_batch_and_only_its_used_layers_are_kept(
    tmp_path, monkeypatch
):
    run(make(tmp_path, tmp_path / "cache"))
    from safetensors.numpy import load_file

    files = sorted((tmp_path / "cache").glob("*.safetensors"))
    assert len(files) == 5
    assert set(load_file(files[0])) == {"hidden/1", "hidden/3", "logits/0"}

    def refuse(*_):
        raise AssertionError("the teacher ran although all is cached")

    monkeypatch.setattr(caching._DiskCache, "write", refuse)
    run(make(tmp_path, tmp_path / "cache"))
    (tmp_path / "cache" / "batch-000002.safetensors").unlink()
    with pytest.raises(AssertionError):
        run(make(tmp_path, tmp_path / "cache"))


def test_half_precision_halves_the_cache(tmp_path):
    run(make(tmp_path / "a", tmp_path / "full"))
    for dtype in ("float16", "bfloat16"):
        run(make(tmp_path / dtype, tmp_path / f"cache-{dtype}", cache_dtype=dtype))
        full, half = (
            sum(p.stat().st_size for p in folder.glob("*.safetensors"))
            for folder in (tmp_path / "full", tmp_path / f"cache-{dtype}")
        )
        assert half < 0.7 * full
        loss, expected = (
            read_events(tmp_path / name / "log")["scalar/total_loss"] for name in (dtype, "a")
        )
        np.testing.assert_allclose(loss, expected, rtol=0.05)


def test_cache_of_another_teacher_data_or_type_is_refused(tmp_path):
    cache = tmp_path / "cache"
    run(make(tmp_path, cache))
    fewer = [*MATCHES[:1], MATCHES[0] | {"layer_T": 2, "layer_S": 1}]
    for message, distiller, loader in (
        ("other teacher weights", make(tmp_path, cache, teacher_seed=9), None),
        ("other batches", make(tmp_path, cache), nnx_job.loader(5, seed=4)),
        ("holds float32, not float16", make(tmp_path, cache, cache_dtype="float16"), None),
        ("other layers", make(tmp_path, cache, matches=fewer), None),
    ):
        with pytest.raises(CacheError, match=message):
            run(distiller, loader)


def test_interrupted_cache_goes_on_and_never_serves_half(tmp_path, monkeypatch):
    original = caching.save_file
    written = []

    def fail_at_third(arrays, path, **options):
        if len(written) == 2:
            path.write_bytes(b"half")
            raise KeyboardInterrupt
        written.append(path)
        original(arrays, path, **options)

    monkeypatch.setattr(caching, "save_file", fail_at_third)
    with pytest.raises(KeyboardInterrupt):
        run(make(tmp_path / "a", tmp_path / "cache"))
    assert len(list((tmp_path / "cache").glob("*.safetensors"))) == 2
    monkeypatch.setattr(caching, "save_file", original)
    run(make(tmp_path / "a", tmp_path / "cache"))
    run(make(tmp_path / "b"))
    assert read_events(tmp_path / "a" / "log") == read_events(tmp_path / "b" / "log")


def test_folders_that_are_no_cache(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").touch()
    with pytest.raises(CacheError, match="not empty and holds no cache"):
        run(make(tmp_path, tmp_path / "other"))
    run(make(tmp_path, tmp_path / "cache"), num_epochs=1)
    manifest = tmp_path / "cache" / "manifest.json"
    assert json.loads(manifest.read_text())["dtype"] == "float32"
    manifest.write_text("{")
    with pytest.raises(CacheError, match="damaged"):
        run(make(tmp_path, tmp_path / "cache"), num_epochs=1)


def test_no_room_on_the_disk_is_told_before_the_teacher_runs(tmp_path, monkeypatch):
    import shutil

    usage = shutil.disk_usage(tmp_path)._replace(free=10)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CacheError, match=r"has 0 MiB free.*cache_dtype"):
        run(make(tmp_path, tmp_path / "cache"))


def test_caching_needs_epochs_and_a_cache_dir_needs_caching(tmp_path):
    distiller = make(tmp_path)
    with distiller, pytest.raises(ValueError, match="goes with num_epochs"):
        distiller.train(nnx_job.SGD, nnx_job.loader(5), num_steps=3)
    with pytest.raises(ConfigError, match="is_caching_logits is False"):
        jaxbrewer.DistillationConfig(cache_dir="somewhere")
