"""One run for each ``output_dir``: a lock that ends with its process, and names it meanwhile."""

import contextlib
import datetime
import json
import logging
import os
import socket
import weakref
from pathlib import Path

from ..errors import CheckpointError
from ..files import UnreadableFileError, read_json_object

try:
    import fcntl
except ImportError:  # not on Windows
    fcntl = None  # type: ignore[assignment]

logger = logging.getLogger(__name__)

LOCK = "run.lock"

_held: weakref.WeakSet["RunLock"] = weakref.WeakSet()


class RunLock:
    """The lock of an ``output_dir``.

    It is the system's lock on a file, not the file: what holds it is an open file of the run's
    process, so that it is gone with the process, however that ended. The file's content only says
    who holds it.

    Args:
        folder: the ``output_dir``.
    """

    def __init__(self, folder: str | os.PathLike[str]):
        self.path = Path(folder).absolute() / LOCK
        self._file: int | None = None
        self._tried = False

    def take(self) -> None:
        """Takes the lock, unless it is held by this object already; the folder must be there.

        Raises:
            CheckpointError: another run holds it, or its file cannot be written.
        """
        if self._tried:
            return
        if fcntl is None:
            self._warn("this system has no flock")
            return
        while not self._took():
            pass

    def _took(self) -> bool:
        """Tries once; False if the file was deleted meanwhile by a run that has ended."""
        file = None
        try:
            file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise CheckpointError(
                    f"{self.path.parent} is in use by another run: {self._holder()}. Two runs in one "
                    "folder would destroy each other's checkpoints: wait until that one has ended, or "
                    "end it, or give another output_dir"
                ) from None
            except OSError as error:
                self._warn(str(error))
                return True
            if not _is_still(file, self.path):
                return False
            os.ftruncate(file, 0)
            os.pwrite(file, json.dumps(_me()).encode(), 0)
            self._file, self._tried, file = file, True, None
            _held.add(self)
            return True
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be written: {error}") from error
        finally:
            if file is not None:
                os.close(file)

    def _warn(self, why: str) -> None:
        self._tried = True
        logger.warning(
            "%s cannot be locked (%s): see to it that no other run uses this output_dir",
            self.path.parent,
            why,
        )

    def _holder(self) -> str:
        try:
            said = read_json_object(self.path)
        except UnreadableFileError:
            return "it has not said which"
        return f"process {said.get('pid')} on {said.get('host')}, started {said.get('started')}"

    def release(self) -> None:
        """Gives the lock back, and deletes its file."""
        if self._file is not None:
            with contextlib.suppress(OSError):
                self.path.unlink()  # while it is held: what another run then makes is another file
            self.forget()

    def forget(self) -> None:
        """Closes the file; a lock that a forked process shares stays its parent's."""
        if self._file is not None:
            os.close(self._file)
        self._file = None
        _held.discard(self)


def _me() -> dict[str, object]:
    now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
    return {"pid": os.getpid(), "host": socket.gethostname(), "started": now}


def _is_still(file: int, path: Path) -> bool:
    """Whether an open file is the one that has this name."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _forget_all() -> None:
    for lock in list(_held):
        lock.forget()


# A forked worker of a loader may outlive the run, and would hold the lock on.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_all)
