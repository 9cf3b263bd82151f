"""Orbax, which nothing else here knows: items of a checkpoint written in the background, and read."""

import contextlib
import functools
import logging
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..errors import CheckpointError, told
from ..machine.barrier import Barrier
from .folders import damaged

POSITION = "position"


@functools.cache
def _orbax() -> Any:
    """Orbax, which takes half a second to import, once there is a checkpoint to write or to read.

    Importing it puts a handler on the root logger, after which a user's logging.basicConfig would do
    nothing, in silence; so that is taken off again.
    """
    handlers = logging.root.handlers[:]
    import orbax.checkpoint

    logging.root.handlers[:] = handlers
    return orbax.checkpoint


class Writer:
    """Writes checkpoints in the background, one after the other.

    Args:
        barrier: where several processes wait for each other while one is written.
    """

    def __init__(self, barrier: Barrier | None):
        _quieten()
        ocp = _orbax()
        self._checkpointer = ocp.AsyncCheckpointer(
            _handler(), async_options=ocp.options.AsyncOptions(barrier_sync_fn=barrier)
        )

    def write(self, path: Path, items: Mapping[str, Any], position: Mapping[str, Any]) -> None:
        """Starts to write a checkpoint; returns once its arrays are copied."""
        ocp = _orbax()
        args: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args[POSITION] = ocp.args.JsonSave(position)
        self._checkpointer.save(path, args=ocp.args.Composite(**args))

    def check(self) -> None:
        """Raises what has gone wrong in the background so far."""
        self._checkpointer.check_for_errors()

    def wait(self) -> None:
        """Waits until all is written; raises what went wrong."""
        self._checkpointer.wait_until_finished()

    def close(self) -> None:
        """Ends the background threads."""
        self._checkpointer.close()


class _Quiet(logging.Filter):
    """Leaves out Orbax's account of its work, some dozens of lines a save, unless it was asked for.

    To see it, give its logger a level: ``logging.getLogger("orbax").setLevel(logging.INFO)``.
    """

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether a record is shown."""
        if f"{os.sep}orbax{os.sep}" not in record.pathname:
            return True
        return record.levelno >= (logging.getLogger("orbax").level or logging.WARNING)


_QUIET = _Quiet()


def _quieten() -> None:
    logging.getLogger("absl").addFilter(_QUIET)  # Orbax logs by it; added twice, it counts once


def _handler() -> Any:
    ocp = _orbax()
    return ocp.CompositeCheckpointHandler(
        student=ocp.StandardCheckpointHandler(),
        projections=ocp.StandardCheckpointHandler(),
        training=ocp.StandardCheckpointHandler(),
        position=ocp.JsonCheckpointHandler(),
    )


@contextlib.contextmanager
def _reader(path: Path) -> Iterator[Any]:
    """Opens a checkpoint; whatever goes wrong with the files is one kind of error."""
    _quieten()
    checkpointer = _orbax().Checkpointer(_handler())
    try:
        yield checkpointer
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # Orbax and what it reads with raise all kinds, bare ones too
        raise damaged(path, f"cannot be read ({told(error)})") from error
    finally:
        checkpointer.close()


def read_items(path: Path, **targets: Any) -> dict[str, Any]:
    """Reads items as the arrays of their targets are: shapes, types and placement.

    Raises:
        DamagedCheckpointError: they cannot be read.
    """
    ocp = _orbax()
    args = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
    with _reader(path) as checkpointer:
        return dict(checkpointer.restore(path, args=ocp.args.Composite(**args)))


def read_json_item(path: Path) -> Any:
    """Reads the JSON part.

    Raises:
        DamagedCheckpointError: it cannot be read.
    """
    try:
        with _reader(path) as checkpointer:
            ocp = _orbax()
            args = ocp.args.Composite(**{POSITION: ocp.args.JsonRestore()})
            return checkpointer.restore(path, args=args)[POSITION]
    except RecursionError as error:
        raise damaged(path, "is damaged: its position is nested without end") from error


def shapes_of(path: Path) -> dict[str, Any]:
    """Item → its arrays, by shape; what is not there is missing.

    Raises:
        DamagedCheckpointError: its metadata cannot be read.
    """
    with _reader(path) as checkpointer:
        items = checkpointer.metadata(path).item_metadata
        return {name: item.tree for name, item in items.items() if item is not None}
