"""The teacher's results, computed once and served each epoch, from host memory or from disk.

Only what the objective uses is kept: logits and their mask, and the matched layers. On disk a cache
is a folder of records, one safetensors file a batch, and a ``manifest.json``, which names the
teacher's weights, the data and the type by their digests. A batch's file is written whole or not at
all, and counts only if the manifest's digest of that batch is the batch's: an interrupted cache
goes on where it stopped, and one of another teacher or of other data is refused.

Every record carries, in its file's header, what it is a record of and a digest of both, which is
compared when it is served. ``records`` in the manifest says what a record is, so far a batch.
Caches of format 1 have no digests of their records; they are served as they are, with a line.
"""

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm.auto import tqdm

from ..data.batches import Batch, Served, Static, sides
from ..errors import CacheError
from ..files import UnreadableFileError, read_json_object, replacing, write_json
from ..machine.memory import kept_memory
from ..models.adaptors import Results
from ..models.teachers import Teacher
from . import digests
from .folders import space_left

logger = logging.getLogger(__name__)

FORMAT = 2
_MANIFEST = "manifest.json"
_CURE = "delete it, and it is computed again"


@dataclass(frozen=True)
class Record:
    """Where one batch's results lie, and of which batch they are.

    Attributes:
        path: the file.
        of: the digest of the batch; '' where the file does not say it (format 1).
    """

    path: Path
    of: str


class CachedLoader:
    """Batches with the teacher's results, in an order drawn anew for each epoch.

    Args:
        batches: the students' batches, in host memory.
        results: for each, its results, or the record they are in.
        like: results by shape, whose structure and types files are read into.
        seed: of the order.
    """

    def __init__(self, batches: list[Batch], results: list[Any], like: Results, seed: int):
        self._batches = batches
        self._results = results
        self._like = like
        self._seed = seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._batches)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the epoch whose order the next iteration has."""
        self._epoch = epoch

    def order(self) -> np.ndarray:
        """The order of the chosen epoch."""
        return np.random.default_rng((self._seed, self._epoch)).permutation(len(self))

    def __iter__(self) -> Iterator[Served]:
        for i in self.order():
            results = self._results[i]
            if isinstance(results, Record):
                results = _unpack(_load(results), self._like, results.path)
            yield Served(self._batches[i], results)


def build(
    teacher: Teacher,
    variables: Any,
    batches: Iterable[Batch],
    reads: frozenset[str],
    *,
    folder: str | os.PathLike[str] | None,
    dtype: str,
    seed: int,
    place: Callable[[Batch], Batch] = lambda batch: batch,
    level: str = "",
) -> CachedLoader:
    """Runs a teacher once over all batches.

    Args:
        teacher: the teacher.
        variables: its arrays, on their devices.
        batches: all batches of an epoch, as `batches.own` gives them.
        reads: the results that the objective reads; see `step.Program`.
        folder: where the cache lies; None keeps it in host memory.
        dtype: the type floats are kept in: ``'float32'`` (as they are), ``'float16'`` or
            ``'bfloat16'``.
        seed: of the batches' order in each epoch.
        place: puts a batch where the variables are.
        level: the level of half precision the teacher runs at, in words; '' is float32.

    Raises:
        CacheError: the folder holds the cache of another teacher, other data or another type, or
            the disk has too little room.
    """
    kept = list(batches)
    if not kept:
        raise CacheError("the loader gave no batch to cache")

    def run(variables: Any, batch: Batch) -> Results:
        teacher_batch, _, cache = sides(batch)
        results = _prune(teacher(variables, teacher_batch, cache), reads)
        return results if dtype == "float32" else jax.tree.map(lambda x: _as(x, dtype), results)

    compiled = jax.jit(run)
    shapes = [jax.eval_shape(run, variables, batch) for batch in kept]
    size = sum(_bytes(shape) for shape in shapes)
    where = f"on disk in {folder}" if folder is not None else "in host memory"
    logger.info(
        "Caching the teacher's results for %d batches: %.1f MiB %s", len(kept), size / 2**20, where
    )
    students = [sides(batch)[1] for batch in kept]
    disk = None
    if folder is not None:
        disk = _DiskCache(Path(folder), variables, kept, dtype, shapes, size, level)
    results: list[Any] = []
    with kept_memory(jax.default_backend()) as bound_memory:
        for i, batch in enumerate(_bar(kept)):
            if disk is None:
                results.append(jax.tree.map(np.asarray, compiled(variables, place(batch))))
            elif not disk.has(i):
                disk.write(i, compiled(variables, place(batch)))
            bound_memory()
    return CachedLoader(students, results if disk is None else disk.records, shapes[0], seed)


def _bar(batches: list[Batch]) -> Any:
    return tqdm(batches, desc="Caching", unit="batch", disable=None)


def _prune(results: Results, reads: frozenset[str]) -> Results:
    """Keeps logits, their mask, and what else is read."""
    kept: Results = {}
    for name, value in results.items():
        if name in ("logits", "logits_mask"):
            kept[name] = value
        elif isinstance(value, tuple):
            layers = tuple(x if f"{name}/{i}" in reads else None for i, x in enumerate(value))
            if any(x is not None for x in layers):
                kept[name] = layers
        elif isinstance(value, dict):
            kept[name] = {path: x for path, x in value.items() if f"{name}/{path}" in reads}
        elif name in reads:
            kept[name] = value
    return kept


def _as(x: Any, dtype: str) -> Any:
    return x.astype(dtype) if jnp.issubdtype(x.dtype, jnp.floating) else x


def _bytes(shapes: Any) -> int:
    return sum(int(np.prod(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(shapes))


class _DiskCache:
    """The folder of a cache: what is in it, and whether it is ours."""

    def __init__(
        self,
        folder: Path,
        variables: Any,
        batches: list,
        dtype: str,
        shapes: list,
        size: int,
        level: str,
    ):
        self.folder = folder
        self.paths = [folder / f"batch-{i:06}.safetensors" for i in range(len(batches))]
        self._digests = [digest(batch) for batch in batches]
        described = [_describe(shape) for shape in shapes]
        self._manifest: dict[str, Any] = {
            "format": FORMAT,
            "records": "batch",
            "teacher": digests.digest(variables),
            "dtype": dtype,
            "contents": hashlib.sha256(json.dumps(described).encode()).hexdigest(),
            "batches": self._digests,
            **({"level": level} if level else {}),
        }
        folder.mkdir(parents=True, exist_ok=True)
        self._check(variables)
        missing = sum(not self.has(i) for i in range(len(batches)))
        needed = size * missing // len(batches)
        free = shutil.disk_usage(folder).free
        if needed > free:
            raise CacheError(
                f"the cache needs {needed / 2**20:,.0f} MiB more, and {folder} has "
                f"{free / 2**20:,.0f} MiB free. Free some, cache in half precision "
                "(cache_dtype='float16'), or match fewer layers"
            )
        if missing < len(batches):
            logger.info("%d of %d batches are cached already", len(batches) - missing, len(batches))

    @property
    def records(self) -> list[Record]:
        """What each batch's results are served from."""
        of = self._digests if self._manifest["format"] > 1 else [""] * len(self.paths)
        return [Record(path, each) for path, each in zip(self.paths, of, strict=True)]

    def _check(self, variables: Any) -> None:
        path = self.folder / _MANIFEST
        if path.exists():
            try:
                there = read_json_object(path, most=2**30)  # 70 bytes for each batch
            except UnreadableFileError as error:
                raise CacheError(
                    f"{path} is damaged; delete {self.folder} to start anew"
                ) from error
            if there.get("format") == 1:  # its records have no digests, nor will those it lacks
                self._manifest |= {"format": 1, "teacher": digest(variables)}
                del self._manifest["records"]
                logger.warning(
                    "the cache in %s is of format 1, whose files have no digests: whether they are as "
                    "they were written cannot be verified",
                    self.folder,
                )
            names = {
                "format": "was written by another version",
                "records": f"holds one record for each {there.get('records')}, not for each batch",
                "teacher": "was made by other teacher weights",
                "dtype": f"holds {there.get('dtype')}, not {self._manifest['dtype']}",
                "contents": "holds other results: other layers or shapes were matched",
                "batches": "was made from other batches (another order, batch size or data)",
                "level": f"was made at another level of precision ({there.get('level', 'float32')})",
            }
            wrong = [what for k, what in names.items() if there.get(k) != self._manifest.get(k)]
            if wrong:
                raise CacheError(
                    f"the cache in {self.folder} {'; it '.join(wrong)}. Give another cache_dir, or "
                    "delete that folder"
                )
            return
        if any(not file.name.startswith(".") for file in self.folder.iterdir()):
            raise CacheError(
                f"cache_dir {self.folder} is not empty and holds no cache; give another"
            )
        write_json(path, self._manifest)

    def has(self, i: int) -> bool:
        return self.paths[i].is_file()

    def write(self, i: int, results: Any) -> None:
        arrays = _pack(jax.tree.map(np.asarray, results))
        record = self.records[i]
        told = {"metadata": {"of": record.of, "digest": _digest_of(arrays, record.of)}}
        try:
            with replacing(record.path) as file:
                save_file(arrays, file, **(told if record.of else {}))
        except (SafetensorError, OSError) as error:
            raise CacheError(
                f"{record.path} could not be written ({error}); {space_left(self.folder)}. What is "
                "cached stays: make room, and the same run goes on where this one stopped"
            ) from error


def _digest_of(arrays: Mapping[str, np.ndarray], of: str) -> str:
    """The digest of a record: its arrays, by name, and what it is of."""
    return digests.json_digest([of, digest(dict(arrays))])


def _load(record: Record) -> dict[str, np.ndarray]:
    try:
        arrays = load_file(record.path)
        said = _header(record.path)
    except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
        raise CacheError(f"{record.path} cannot be read ({error}); {_CURE}") from error
    if not record.of:
        return arrays
    if said.get("of") != record.of:
        raise CacheError(f"{record.path} holds the results of another batch; {_CURE}")
    if said.get("digest") != _digest_of(arrays, record.of):
        raise CacheError(f"{record.path} is damaged: it is not what was written; {_CURE}")
    return arrays


def _header(path: Path) -> Mapping[str, str]:
    """What a safetensors file says of itself."""
    with open(path, "rb") as file:
        size = int.from_bytes(file.read(8), "little")
        return json.loads(file.read(size)).get("__metadata__") or {}


def _pack(results: Any) -> dict[str, np.ndarray]:
    leaves = jax.tree_util.tree_flatten_with_path(results)[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.ascontiguousarray(leaf)
        for path, leaf in leaves
    }


def _unpack(arrays: Mapping[str, np.ndarray], like: Any, path: Path) -> Any:
    leaves, structure = jax.tree_util.tree_flatten_with_path(like)
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    wanted = {name: leaf.dtype for name, (_, leaf) in zip(names, leaves, strict=True)}
    wrong = [f"it lacks {name}" for name in wanted if name not in arrays]
    wrong += [
        f"it has {name} in {arrays[name].dtype}, not in {dtype}"
        for name, dtype in wanted.items()
        if name in arrays and arrays[name].dtype != dtype
    ]
    if wrong:
        raise CacheError(f"{path} is damaged: {'; '.join(wrong)}; {_CURE}")
    return jax.tree.unflatten(structure, [arrays[name] for name in names])


def _describe(shape: Any) -> list:
    leaves = jax.tree_util.tree_flatten_with_path(shape)[0]
    return [[jax.tree_util.keystr(path), str(x.dtype), list(x.shape)] for path, x in leaves]


def digest(tree: Any) -> str:
    """The SHA-256 of a pytree: its structure, and every array's type, shape and bytes."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        array = _plain_array(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode())
        total.update(np.ascontiguousarray(array).tobytes())
    flags = jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, Static))
    total.update(repr([x.value for x in flags if isinstance(x, Static)]).encode())
    return total.hexdigest()


def _plain_array(leaf: Any) -> np.ndarray:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf)
