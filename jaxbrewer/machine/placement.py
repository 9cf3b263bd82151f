"""Where a run's arrays lie, and how the step is compiled for that place.

The step is one function. On one device it is jitted; `Sharded` jits the same function over a mesh,
where it sees the whole batch; `Pmapped` maps it over the devices, where it sees each one's rows.
Axes of meshes are named here and nowhere else.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from ..configurations.configs import TrainingConfig
from ..data.batches import Batch, Whole
from ..errors import BatchError
from ..step.program import Program, TrainState
from .devices import resolve_device, resolve_devices
from .repeatable import compiler_options

logger = logging.getLogger(__name__)

AXIS = "data"

# What each `TrainingConfig.sharding` cuts into pieces.
_CUT: Mapping[str | None, tuple[str, ...]] = {
    None: (),
    "teacher": ("teacher",),
    "optimizer": ("optimizer",),
    "all": ("student", "optimizer", "teacher"),
}

# Leaves with fewer elements stay whole on every device: cutting them would cost more than it saves.
SMALLEST_CUT = 1024


class Placement(Protocol):
    """Where arrays lie.

    Attributes:
        devices: the devices, of all processes.
    """

    devices: tuple[jax.Device, ...]

    def start(self, program: Program, seed: int) -> TrainState:
        """The state before the first step, whole, as checkpoints hold it."""
        ...

    def enter(self, state: TrainState) -> TrainState:
        """From the state as checkpoints hold it to the one the step takes."""
        ...

    def leave(self, state: TrainState) -> TrainState:
        """The way back."""
        ...

    def local(self, tree: Any) -> Any:
        """Copies of arrays of a state that has left, whole, for this process alone."""
        ...

    def teacher(self, variables: Any) -> Any:
        """Places the teacher's arrays."""
        ...

    def batch(self, batch: Batch) -> Batch:
        """Places a batch, or this process's part of it."""
        ...

    def compile(self, program: Program) -> Callable:
        """The step: ``(state, teacher_variables, batch, row, frozen) -> (state, metrics)``."""
        ...

    def lower(self, program: Program, batch: Batch) -> jax.stages.Lowered:
        """The step as `compile` has it, by the shapes of a batch: nothing need lie on the devices."""
        ...

    def examine(self, program: Program, term: str | None) -> Callable:
        """`Program.examine`, as `compile` has the step: takes what it takes, and changes nothing."""
        ...

    def counter(self, program: Program) -> Callable:
        """`Program.counts`, compiled: ``(state, teacher_variables, batch, frozen) -> counts``."""
        ...

    def check(self, batch: Batch) -> None:
        """Refuses a first batch with fewer rows than this process has devices."""
        ...


def placement_for(config: TrainingConfig) -> Placement:
    """The placement a config asks for.

    Raises:
        ValueError: there is no such device; or `local_rank` is set and the processes have not been
            brought together.
    """
    if config.local_rank >= 0 and not jax.distributed.is_initialized():
        raise ValueError(
            f"local_rank={config.local_rank} means several processes, which must be brought together "
            "first: call jax.distributed.initialize(…) before anything else of JAX. In a single "
            "process, leave local_rank at -1"
        )
    if config.local_rank < 0 and not config.data_parallel:
        return OneDevice(resolve_device(config.device))
    devices = resolve_devices(config.device, rank=config.local_rank)
    return Pmapped(devices) if config.mapping == "pmap" else Sharded(devices, config.sharding)


def placement_on(devices: Sequence[jax.Device], config: TrainingConfig) -> Placement:
    """The placement of a config on these devices, which may be described ones: on all of them.

    Raises:
        ValueError: the config maps the step over devices, which are not there.
    """
    if len(devices) == 1:
        return OneDevice(devices[0])
    return Pmapped(devices) if config.mapping == "pmap" else Sharded(devices, config.sharding)


def placement_to_cache(placement: Placement) -> Placement:
    """Where a teacher runs whose results are kept in host memory: here, over this process's rows.

    Raises:
        ValueError: the teacher is cut into pieces that other processes hold.
    """
    if not isinstance(placement, _Mesh):
        return placement
    if isinstance(placement, Sharded) and not placement.several_processes:
        return placement
    if isinstance(placement, Sharded) and placement.cuts("teacher"):
        raise ValueError(
            f"is_caching_logits with sharding={placement.sharding!r} in several processes: each would "
            "need the whole teacher to cache its own part. Cache in one process with "
            "data_parallel=True, or leave one of the two out"
        )
    return OneDevice(placement.here[0])


class OneDevice:
    """Everything on one device.

    Args:
        device: the device.
    """

    def __init__(self, device: jax.Device):
        self.devices: tuple[jax.Device, ...] = (device,)

    def start(self, program: Program, seed: int) -> TrainState:
        """See `Placement.start`."""
        return jax.device_put(program.init(seed), self.devices[0])

    def enter(self, state: TrainState) -> TrainState:
        """See `Placement.enter`."""
        return state

    def leave(self, state: TrainState) -> TrainState:
        """See `Placement.leave`."""
        return state

    def local(self, tree: Any) -> Any:
        """See `Placement.local`."""
        return _copy(tree)

    def teacher(self, variables: Any) -> Any:
        """See `Placement.teacher`."""
        return jax.device_put(variables, self.devices[0])

    def batch(self, batch: Batch) -> Batch:
        """See `Placement.batch`: the compiled step takes numpy arrays as they are."""
        return batch

    def compile(self, program: Program) -> Callable:
        """See `Placement.compile`."""
        options = compiler_options(self.devices)
        if options is None:
            return program.compiled
        return jax.jit(program.step, donate_argnums=0, compiler_options=options)

    def lower(self, program: Program, batch: Batch) -> jax.stages.Lowered:
        """See `Placement.lower`."""
        here = SingleDeviceSharding(self.devices[0])
        state = jax.eval_shape(lambda: program.init(0))
        arguments = state, program.teacher.variables, batch, program.row
        state, teacher, batch, row = jax.tree.map(partial(_shape, sharding=here), arguments)
        state, frozen = program.parted(state)
        step: Any = self.compile(program)
        return step.lower(state, teacher, batch, row, frozen)

    def examine(self, program: Program, term: str | None) -> Callable:
        """See `Placement.examine`."""
        return jax.jit(partial(program.examine, term=term))

    def counter(self, program: Program) -> Callable:
        """See `Placement.counter`."""
        return jax.jit(program.counts)

    def check(self, batch: Batch) -> None:
        """See `Placement.check`: any batch will do."""


class _Mesh:
    """What placements over several devices share.

    Args:
        devices: the devices of all processes, those of a process next to each other.
    """

    def __init__(self, devices: Sequence[jax.Device]):
        self.devices: tuple[jax.Device, ...] = tuple(devices)
        self.mesh = Mesh(np.array(self.devices), (AXIS,))
        self.cut = NamedSharding(self.mesh, PartitionSpec(AXIS))
        self.whole = NamedSharding(self.mesh, PartitionSpec())
        self.here = [d for d in self.devices if d.process_index == jax.process_index()]
        self.several_processes = len(self.here) < len(self.devices)
        self._told = False

    def check(self, batch: Batch) -> None:
        """See `Placement.check`."""
        rows = rows_of(batch)
        if rows < len(self.here):
            raise BatchError(
                f"the first batch has {rows} rows for {len(self.here)} devices, which leaves some "
                f"with nothing to do. Use a batch of {len(self.here)} or more, best a multiple of it; "
                "or train on one device (data_parallel=False)"
            )

    def _parted(self, batch: Batch) -> tuple[Batch, int, bool]:
        """The batch without its mark, its rows, and whether each device can get its share of them."""
        everyone = isinstance(batch, Whole)
        if everyone:
            batch = batch.batch
        rows = rows_of(batch)
        even = not everyone and rows % len(self.here) == 0
        if not even and not self._told:
            self._told = True
            logger.warning(
                "a batch of %d rows does not divide by %d devices: each of them trains on the whole "
                "of it. The numbers are exact, but that step takes as long as on one device; batches "
                "of a multiple of %d rows (or drop_last) avoid it. This is said once",
                rows,
                len(self.devices),
                len(self.devices),
            )
        return batch, rows, even

    def _put(self, array: Any, sharding: NamedSharding) -> jax.Array:
        """Places this process's part of an array; under `whole`, all of it."""
        if not self.several_processes:
            return jax.device_put(array, sharding)
        return jax.make_array_from_process_local_data(sharding, np.asarray(array))


class Sharded(_Mesh):
    """One program over a mesh that sees the batch whole: the numbers of one device.

    Args:
        devices: the devices of all processes, those of a process next to each other.
        sharding: what is cut into pieces, see `TrainingConfig`.
    """

    def __init__(self, devices: Sequence[jax.Device], sharding: str | None = None):
        super().__init__(devices)
        self.sharding = sharding

    def cuts(self, part: str) -> bool:
        """Whether the ``'student'``, the ``'optimizer'`` or the ``'teacher'`` is cut into pieces."""
        return part in _CUT[self.sharding]

    def shardings(self, shapes: Any, *, cut: bool) -> Any:
        """The one rule: an array is cut along its longest axis that divides by the devices.

        Args:
            shapes: a pytree of arrays or of their shapes.
            cut: whether anything is cut at all; keys and small arrays never are.
        """
        count = len(self.devices)

        def rule(x: Any) -> NamedSharding:
            fitting = [axis for axis, size in enumerate(x.shape) if size % count == 0]
            is_key = jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key)
            if not cut or is_key or not fitting or np.prod(x.shape) < SMALLEST_CUT:
                return self.whole
            longest = max(fitting, key=lambda axis: x.shape[axis])
            return NamedSharding(self.mesh, PartitionSpec(*[None] * longest, AXIS))

        return jax.tree.map(rule, shapes)

    def _place(self, tree: Any, *, cut: bool) -> Any:
        shardings = self.shardings(jax.eval_shape(lambda: tree), cut=cut)
        return jax.tree.map(_placed, tree, shardings)

    def _state_shardings(self, program: Program) -> Any:
        state = jax.eval_shape(lambda: program.init(0))
        places = self.shardings(state, cut=self.cuts("student"))
        if self.cuts("student") or not self.cuts("optimizer"):
            return places
        return replace(places, opt_state=self.shardings(state.opt_state, cut=True))

    def start(self, program: Program, seed: int) -> TrainState:
        """See `Placement.start`: each array is made in its place, never whole on one device."""
        variables = self._place(program.variables, cut=self.cuts("student"))
        make = jax.jit(program.init, static_argnums=0, out_shardings=self._state_shardings(program))
        return make(seed, variables)

    def enter(self, state: TrainState) -> TrainState:
        """See `Placement.enter`."""
        return state

    def leave(self, state: TrainState) -> TrainState:
        """See `Placement.leave`."""
        return state

    def local(self, tree: Any) -> Any:
        """See `Placement.local`: arrays that lie in pieces come as numpy arrays in host memory."""

        def whole(x: jax.Array) -> Any:
            if x.is_fully_replicated:
                return _copy(x.addressable_data(0))
            return np.asarray(_gathered(x, self.whole))

        return jax.tree.map(whole, tree)

    def teacher(self, variables: Any) -> Any:
        """See `Placement.teacher`."""
        return self._place(variables, cut=self.cuts("teacher"))

    def batch(self, batch: Batch) -> Batch:
        """See `Placement.batch`: rows are shared out where they can be, and repeated elsewhere."""
        batch, rows, even = self._parted(batch)

        def place(x: Any) -> jax.Array:
            return self._put(x, self.cut if even and has_rows(x, rows) else self.whole)

        return jax.tree.map(place, batch)

    def compile(self, program: Program) -> Callable:
        """See `Placement.compile`."""
        out = (program.parted(self._state_shardings(program))[0], self.whole)
        options = compiler_options(self.devices)
        if self.sharding is not None:
            program = replace(program, together=self._together)
        return jax.jit(program.step, donate_argnums=0, out_shardings=out, compiler_options=options)

    def _together(self, side: str, arrays: Any, types: Any) -> Any:
        """A side's arrays whole on every device, in a step; their gradients come back in pieces.

        What is sent is rounded to the `types` in which arrays are used: on GPUs XLA sends what it is
        told to, and rounds afterwards.

        Left to itself, the compiler may cut what is computed of a parameter as the parameter is cut,
        within the heads of attention too, and send more than that is.
        """

        def gathered(x: Any, place: NamedSharding, dtype: Any) -> Any:
            if place is self.whole:
                return x

            def whole(x: jax.Array) -> jax.Array:
                sent = jax.lax.with_sharding_constraint(x.astype(dtype), self.whole)
                return sent.astype(x.dtype)

            gather = jax.custom_vjp(whole)
            gather.defvjp(
                lambda x: (whole(x), None),
                lambda _, g: (jax.lax.with_sharding_constraint(g, place),),
            )
            return gather(x)

        places = self.shardings(arrays, cut=self.cuts(side))
        return jax.tree.map(gathered, arrays, places, types)

    def lower(self, program: Program, batch: Batch) -> jax.stages.Lowered:
        """See `Placement.lower`: rows are shared out where they can be, and repeated elsewhere."""
        rows = rows_of(batch)
        even = rows % len(self.devices) == 0
        state = jax.tree.map(
            _shape, jax.eval_shape(lambda: program.init(0)), self._state_shardings(program)
        )
        variables = program.teacher.variables
        cut = self.shardings(variables, cut=self.cuts("teacher"))
        places = jax.tree.map(
            lambda x: self.cut if even and has_rows(x, rows) else self.whole, batch
        )
        state, frozen = program.parted(state)
        step: Any = self.compile(program)
        return step.lower(
            state,
            jax.tree.map(_shape, variables, cut),
            jax.tree.map(_shape, batch, places),
            _shape(program.row, self.whole),
            frozen,
        )

    def examine(self, program: Program, term: str | None) -> Callable:
        """See `Placement.examine`."""
        return jax.jit(partial(program.examine, term=term), out_shardings=self.whole)

    def counter(self, program: Program) -> Callable:
        """See `Placement.counter`."""
        return jax.jit(program.counts, out_shardings=self.whole)


class Pmapped(_Mesh):
    """The step under `jax.pmap`: each device computes the loss of its own rows.

    Gradients, metrics and float state are averaged over the devices (`step.average`), as torch's
    DistributedDataParallel does. Where a loss is not a plain mean over rows (a mask, say), the
    average of the devices' losses is not the loss of the whole batch.
    """

    # Between `enter` and `leave` arrays belong to this process alone, as `jax.pmap` wants them, with
    # an axis for its devices; random keys are plain numbers, which it need not fetch to look at.

    def __init__(self, devices: Sequence[jax.Device]):
        super().__init__(devices)
        self._here = Mesh(np.array(self.here), (AXIS,))

    def start(self, program: Program, seed: int) -> TrainState:
        """See `Placement.start`."""
        return Sharded(self.devices).start(program, seed)

    def enter(self, state: TrainState) -> TrainState:
        """See `Placement.enter`: every array gets an axis for the devices, without being moved."""
        mine = _regrouped(_without_keys(state), NamedSharding(self._here, PartitionSpec()))
        return self._map(lambda x: x[None], PartitionSpec(), PartitionSpec(AXIS))(mine)

    def leave(self, state: TrainState) -> TrainState:
        """See `Placement.leave`."""
        mine = self._map(lambda x: x[0], PartitionSpec(AXIS), PartitionSpec())(state)
        return _with_keys(_regrouped(mine, self.whole))

    def _map(self, change: Callable, before: PartitionSpec, after: PartitionSpec) -> Callable:
        # One program for all arrays: taking x[0] of each on the host takes a slow path.
        return jax.jit(
            jax.shard_map(
                lambda tree: jax.tree.map(change, tree),
                mesh=self._here,
                in_specs=before,
                out_specs=after,
                check_vma=False,
            )
        )

    def local(self, tree: Any) -> Any:
        """See `Placement.local`."""
        return Sharded(self.devices).local(tree)

    def teacher(self, variables: Any) -> Any:
        """See `Placement.teacher`."""
        return self.enter(Sharded(self.devices).teacher(variables))

    def batch(self, batch: Batch) -> Batch:
        """See `Placement.batch`: ``[devices, rows of each, …]``, or the whole batch for each."""
        batch, rows, even = self._parted(batch)
        count = len(self.here)

        def split(x: Any) -> np.ndarray:
            x = np.asarray(x)
            if even and has_rows(x, rows):
                return x.reshape(count, rows // count, *x.shape[1:])
            return np.broadcast_to(x, (count, *x.shape))

        return jax.device_put(
            jax.tree.map(split, batch), NamedSharding(self._here, PartitionSpec(AXIS))
        )

    def compile(self, program: Program) -> Callable:
        """See `Placement.compile`."""
        mapped = replace(program, axis=AXIS)

        def step(
            state: Any, teacher: Any, batch: Batch, row: jax.Array, frozen: Any
        ) -> tuple[Any, jax.Array]:
            state, metrics = mapped.step(_with_keys(state), _with_keys(teacher), batch, row, frozen)
            return _without_keys(state), metrics

        return jax.pmap(
            step,
            axis_name=AXIS,
            in_axes=(0, 0, 0, None, 0),
            out_axes=(0, None),
            donate_argnums=0,
            devices=list(self.devices),
        )

    def lower(self, program: Program, batch: Batch) -> jax.stages.Lowered:
        """See `Placement.lower`.

        Raises:
            ValueError: always: what is mapped is lowered with arrays alone.
        """
        raise ValueError(
            "mapping='pmap' cannot be looked at for devices that are not there: use mapping='sharded'"
        )

    def counter(self, program: Program) -> Callable:
        """See `Placement.counter`.

        Raises:
            ValueError: always: each device has the loss of its own rows, whatever the window has.
        """
        raise ValueError("gradient_accumulation='exact' needs mapping='sharded'")

    def examine(self, program: Program, term: str | None) -> Callable:
        """See `Placement.examine`."""
        mapped = replace(program, axis=AXIS)

        def look(state: Any, teacher: Any, batch: Batch, row: jax.Array, frozen: Any) -> Any:
            return mapped.examine(_with_keys(state), _with_keys(teacher), batch, row, frozen, term)

        return jax.pmap(
            look,
            axis_name=AXIS,
            in_axes=(0, 0, 0, None, 0),
            out_axes=None,
            devices=list(self.devices),
        )


def rows_of(batch: Batch) -> int:
    """How many examples a batch holds: the first size that most of its arrays have (1 if none)."""
    sizes = [np.shape(x)[0] for x in jax.tree.leaves(batch) if np.ndim(x)]
    return max(Counter(sizes).items(), key=lambda item: (item[1], item[0]))[0] if sizes else 1


def has_rows(x: Any, rows: int) -> bool:
    """Whether an array of a batch holds something for each of its `rows` examples."""
    return np.ndim(x) > 0 and np.shape(x)[0] == rows


def _shape(x: Any, sharding: Any) -> jax.ShapeDtypeStruct:
    """An array's shape and type, in its place."""
    dtype = jax.dtypes.canonicalize_dtype(x.dtype, allow_extended_dtype=True)
    return jax.ShapeDtypeStruct(np.shape(x), dtype, sharding=sharding)


def _placed(x: Any, sharding: NamedSharding) -> jax.Array:
    """Places an array that every process holds whole."""
    if sharding.is_fully_addressable:
        return jax.device_put(x, sharding)
    if jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
        data = _placed(jax.random.key_data(x), sharding)
        return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class _KeyData:
    """The numbers of a random key, and what kind of key they are."""

    data: jax.Array
    kind: str = field(metadata={"static": True})


def _without_keys(tree: Any) -> Any:
    def open_key(x: Any) -> Any:
        if not jax.numpy.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x
        return _KeyData(jax.random.key_data(x), str(jax.random.key_impl(x)))

    return jax.tree.map(open_key, tree)


def _with_keys(tree: Any) -> Any:
    def close_key(x: Any) -> Any:
        return jax.random.wrap_key_data(x.data, impl=x.kind) if isinstance(x, _KeyData) else x

    return jax.tree.map(close_key, tree, is_leaf=lambda x: isinstance(x, _KeyData))


def _regrouped(tree: Any, sharding: NamedSharding) -> Any:
    """The same buffers as arrays of more processes, or of fewer."""
    if sharding.is_fully_addressable and all(x.is_fully_addressable for x in jax.tree.leaves(tree)):
        return tree

    def regroup(x: jax.Array) -> jax.Array:
        buffers = [shard.data for shard in x.addressable_shards]
        return jax.make_array_from_single_device_arrays(x.shape, sharding, buffers)

    return jax.tree.map(regroup, tree)


def _gathered(x: jax.Array, whole: NamedSharding) -> jax.Array:
    return jax.jit(lambda x: x, out_shardings=whole)(x).addressable_data(0)


def _copy(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.numpy.array(x, copy=True), tree)
