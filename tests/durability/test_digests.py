"""Digests: any flipped bit is noticed, wherever the arrays lie, in a checkpoint and in a cache."""

import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jaxbrewer
from jaxbrewer.errors import CacheError, DamagedCheckpointError
from jaxbrewer.training import checkpoints, stored, teacher_cache
from jaxbrewer.training.digests import differing, digest, digests, json_digest
from jaxbrewer.training.stored import examine
from tests import fn_job

RNG = np.random.default_rng(0)
DTYPES = [
    "float32", "float16", "bfloat16", "float8_e4m3fn", "int32", "uint8", "int8", "uint32", "float64",
    "int64", "complex64",
]  # fmt: skip


def bits_of(x):
    """The bytes of an array, which change it when they are changed."""
    return x.reshape(-1).view(np.uint8)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_flipped_bit_changes_the_digest(dtype):
    with jax.enable_x64(True):
        x = RNG.normal(0, 3, (3, 2)).astype(jnp.dtype(dtype))
        flipped = []
        for bit in range(8 * x.nbytes):
            changed = x.copy()
            bits_of(changed)[bit // 8] ^= 1 << bit % 8
            flipped.append(changed)
        found = digests({"x": x, "flipped": flipped})
        wanted = found.pop("x")
        assert wanted.startswith(f"{dtype}[3,2] ")
        assert len({wanted, *found.values()}) == len(flipped) + 1
        assert digests({"x": jnp.asarray(x)})["x"] == wanted


def test_places_count():
    """Elements exchanged, moved by one, or repeated are another array."""
    x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    exchanged = x.copy()
    exchanged[0, 0, :2] = exchanged[0, 0, 1::-1]
    changed = [x, exchanged, np.roll(x, 1), x[::-1], x.reshape(3, 2, 4), x.astype(np.int32)]
    zeros = [np.zeros(n, np.float32) for n in range(4)]
    found = digests([*changed, *zeros])
    assert len(set(found.values())) == len(found)


def test_arrays_of_every_kind_have_a_digest():
    kinds = {
        "key": jax.random.key(3),
        "keys": jax.random.split(jax.random.key(3, impl="rbg"), 4),
        "bool": np.array([True, False]),
        "none": np.zeros((0, 3), np.float32),
        "scalar": jnp.float32(2),
        "int4": jnp.arange(5, dtype=jnp.int4),
        "nothing": None,
        "nested": {"a/b": np.int8(1), "a": {"b": np.int8(2)}},
    }
    found = digests(kinds)
    assert found["key"].startswith("key<fry>[] ")
    assert found["keys"].startswith("key<rbg>[4] ")
    assert found["none"] == "float32[0,3] 0000000000000000"
    assert len(found) == 8  # both of the nested ones, whose names are alike
    assert digests({"key": jax.random.key(4)})["key"] != found["key"]
    assert digests({}) == {}
    assert digest(kinds) == digest(kinds) != digest(kinds | {"bool": np.array([True, True])})


def test_devices_and_shardings_make_no_difference():
    mesh = jax.make_mesh((len(jax.devices()),), ("data",), axis_types=(AxisType.Auto,))
    x = {"x": RNG.normal(size=(16, 24)).astype(np.float32), "key": jax.random.key(1)}
    wanted = digests(x)
    for spec in (PartitionSpec(), PartitionSpec("data"), PartitionSpec(None, "data")):
        placed = {
            "x": jax.device_put(x["x"], NamedSharding(mesh, spec)),
            "key": jax.device_put(x["key"], NamedSharding(mesh, PartitionSpec())),
        }
        assert digests(placed) == wanted


def test_what_differs_is_named():
    old = {"a": "float32[2] 01", "b": "float32[2] 01", "c": "float32[2] 01"}
    new = {"a": "float32[2] 02", "b": "int32[2] 01", "d": "float32[2] 01"}
    assert differing(old, old) == []
    assert differing(old, new) == [
        "a: float32[2] has the digest 02, was saved with 01",
        "b: is int32[2], was saved as float32[2]",
        "c: is missing",
        "d: was not saved",
    ]


def test_json_has_a_digest_that_outlives_the_file():
    value = {"b": (1, 0.1), "a": {1: None, "x": "é"}}
    assert json_digest(value) == json_digest(json.loads(json.dumps(value, indent=3)))
    assert json_digest(value) != json_digest(value | {"b": (1, 0.10000000000000002)})


# -------------------------------------------------------------------------------- of a checkpoint


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with arrays larger than 1 KB."""
    folder = tmp_path_factory.mktemp("saved")
    distiller = fn_job.distiller(folder, student=fn_job.encoder(2, width=24), seed=3)
    with distiller:
        distiller.train(fn_job.SGD, fn_job.batches(2), num_epochs=1)
    return folder / "out" / "gs2"


def test_a_whole_checkpoint_is_verified(saved):
    found = examine(saved)
    assert found.is_verified
    names = found.position["digests"]
    assert {name.split("/")[0] for name in names} == {"student", "training"}
    assert names["training/key"].startswith("key<fry>[] ")


def flip(path, rng):
    """Flips a random bit of a file; returns what undoes it."""
    data = path.read_bytes()
    at = int(rng.integers(8 * len(data)))
    changed = bytearray(data)
    changed[at // 8] ^= 1 << at % 8
    path.write_bytes(changed)
    return lambda: path.write_bytes(data)


def values(model):
    return [np.asarray(x) for x in jax.tree.leaves(model.params)]


def test_a_flipped_bit_anywhere_is_named_or_harmless(saved):
    """In every file of a checkpoint; what is loaded all the same is what was saved."""
    rng = np.random.default_rng(1)
    student = jaxbrewer.load_student(saved, fn_job.encoder(5, width=24))
    wanted = values(student)
    files = sorted(p for p in saved.rglob("*") if p.is_file() and p.stat().st_size)
    named = 0
    for path in files:
        undo = flip(path, rng)
        try:
            loaded = jaxbrewer.load_student(saved, fn_job.encoder(5, width=24))
        except DamagedCheckpointError as error:
            assert str(saved) in str(error)
            named += 1
        else:
            for x, y in zip(values(loaded), wanted, strict=True):
                np.testing.assert_array_equal(x, y, err_msg=str(path))
        finally:
            undo()
    assert named
    assert examine(saved).is_verified
    gc.collect()  # Orbax's reads that were cut off end with a warning, which this test may see


def test_an_array_changed_in_the_files_is_named(saved, monkeypatch):
    """As if the files' own checks had seen nothing."""
    read = stored.read_items

    def other(path, **items):
        found = read(path, **items)
        if "student" not in items:
            return found
        changed = jax.tree.map(lambda x: x, found["student"])
        changed["params"]["head"] = changed["params"]["head"].at[3, 1].multiply(1 + 2**-23)
        return {"student": changed}

    for module in (stored, checkpoints):
        monkeypatch.setattr(module, "read_items", other)
    with pytest.raises(DamagedCheckpointError, match=r"student/params/head: float32\[24,3\] has"):
        jaxbrewer.load_student(saved, fn_job.encoder(5, width=24))


# ------------------------------------------------------------------------------------ of a cache


def cached(folder, cache, epochs=1, **config):
    """Trains from a cache."""
    distiller = fn_job.distiller(
        folder, config={"is_caching_logits": True, "cache_dir": cache, **config}
    )
    with distiller:
        distiller.train(fn_job.SGD, fn_job.batches(3), num_epochs=epochs)


def test_a_flipped_bit_in_a_cache_is_named(tmp_path):
    """Wherever it lies in a file: in its header or in its arrays."""
    cached(tmp_path, tmp_path / "cache")
    path = tmp_path / "cache" / "batch-000001.safetensors"
    manifest = json.loads((tmp_path / "cache" / "manifest.json").read_text())
    record = teacher_cache.Record(path, manifest["batches"][1])
    rng = np.random.default_rng(2)
    wanted = teacher_cache._load(record)
    for _ in range(60):
        undo = flip(path, rng)
        try:
            found = teacher_cache._load(record)
        except CacheError as error:
            assert str(path) in str(error)
            assert "delete it" in str(error)
        else:  # a space in the header, say
            assert found.keys() == wanted.keys()
            assert all((found[name] == wanted[name]).all() for name in wanted)
        undo()
    at = path.stat().st_size - 3
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(CacheError, match=r"batch-000001.safetensors is damaged.*delete it"):
        cached(tmp_path, tmp_path / "cache")
    path.unlink()
    cached(tmp_path, tmp_path / "cache")


def test_files_of_a_cache_that_were_exchanged_or_cast_are_named(tmp_path):
    from safetensors import safe_open
    from safetensors.numpy import load_file, save_file

    cached(tmp_path, tmp_path / "cache")
    first, second = (tmp_path / "cache" / f"batch-00000{i}.safetensors" for i in (0, 1))
    one, other = first.read_bytes(), second.read_bytes()
    first.write_bytes(other)
    second.write_bytes(one)
    with pytest.raises(CacheError, match="the results of another batch; delete it"):
        cached(tmp_path, tmp_path / "cache")
    first.write_bytes(one)
    second.write_bytes(other)
    with safe_open(first, "numpy") as file:
        said = file.metadata()
    save_file({k: x.astype(np.float16) for k, x in load_file(first).items()}, first, said)
    with pytest.raises(CacheError, match=r"batch-000000\.safetensors is damaged"):
        cached(tmp_path, tmp_path / "cache")


def test_a_cache_of_format_1_is_served_with_a_line(tmp_path, caplog, monkeypatch):
    """The names and types of its arrays are compared with what is wanted all the same."""
    from safetensors.numpy import load_file, save_file

    cache, teachers, of_arrays = tmp_path / "cache", [], digest

    def seen(variables):
        teachers.append(teacher_cache.digest(variables))  # as format 1 has it
        return of_arrays(variables)

    monkeypatch.setattr(teacher_cache.digests, "digest", seen)
    cached(tmp_path, cache)
    manifest = json.loads((cache / "manifest.json").read_text())
    assert (manifest["format"], manifest["records"]) == (2, "batch")
    del manifest["records"]
    old = manifest | {"format": 1, "teacher": teachers[0]}
    for path in cache.glob("*.safetensors"):
        save_file(load_file(path), path)
    for teacher, message in ((old["teacher"], None), ("0", "other teacher weights")):
        (cache / "manifest.json").write_text(json.dumps(old | {"teacher": teacher}))
        if message is None:
            cached(tmp_path, cache)
            assert "of format 1, whose files have no digests" in caplog.text
        else:
            with pytest.raises(CacheError, match=message):
                cached(tmp_path, cache)
    (cache / "manifest.json").write_text(json.dumps(old))
    path = cache / "batch-000002.safetensors"
    kept = load_file(path)
    first, *_ = kept
    save_file({k: x for k, x in kept.items() if k != first}, path)
    with pytest.raises(CacheError, match=rf"{path.name} is damaged: it lacks {first}; delete it"):
        cached(tmp_path, cache)
    save_file({k: x.astype(np.float16) for k, x in kept.items()}, path)
    with pytest.raises(CacheError, match=rf"it has {first} in float16, not in float32; delete it"):
        cached(tmp_path, cache)
    (cache / "manifest.json").write_text(json.dumps(manifest | {"records": "example"}))
    with pytest.raises(CacheError, match="one record for each example, not for each batch"):
        cached(tmp_path, cache)
