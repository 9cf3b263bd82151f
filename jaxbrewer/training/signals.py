"""SIGINT and SIGTERM during training: the window is finished and saved before they take effect."""

import contextlib
import logging
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from ..data.streams import Event, Micro

logger = logging.getLogger(__name__)

SWITCH = "JAXBREWER_SIGNALS"
WAITED_FOR = (signal.SIGINT, signal.SIGTERM)


class Request:
    """Whether this process has been asked to stop.

    Attributes:
        signum: the signal that asked, or None.
        elsewhere: the signal that asked another process of the same run, or None.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self.elsewhere: int | None = None
        self._before: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return self.signum is not None

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None:  # a second one leaves at once
            self._restore()
            signal.raise_signal(signum)
            return
        self.signum = signum
        logger.warning(
            "%s: the accumulation window is finished and saved first; once more to leave at once",
            signal.Signals(signum).name,
        )

    def _install(self) -> None:
        for signum in WAITED_FOR:
            before = signal.getsignal(signum)
            if before not in (signal.SIG_IGN, None):  # None: not set from Python
                self._before[signum] = signal.signal(signum, self._note)

    def _restore(self) -> None:
        while self._before:
            signal.signal(*self._before.popitem())


@contextlib.contextmanager
def waiting() -> Iterator[Request]:
    """While it is open, SIGINT and SIGTERM are noted, and take effect when it closes.

    They do so by being delivered once more, to whoever handled them before: by default Python raises
    KeyboardInterrupt, or the process ends. Where a handler returns, SystemExit ends the training.
    So does, in this process, a signal that another process of the run was sent. Signals that are
    ignored stay so. Only the main thread can do this; elsewhere, and with ``JAXBREWER_SIGNALS=off``
    in the environment, nothing is done.

    Raises:
        ValueError: ``JAXBREWER_SIGNALS`` is neither ``on`` nor ``off``.
    """
    request = Request()
    if not _is_wanted() or threading.current_thread() is not threading.main_thread():
        yield request
        return
    request._install()
    try:
        yield request
    finally:
        request._restore()
    signum = request.signum or request.elsewhere
    if signum is not None:
        signal.raise_signal(signum)
        raise SystemExit(128 + signum)


def heard(events: Iterator[Event], request: Request) -> Iterator[Event]:
    """The stream of several processes, of which `request` notes what another one was asked."""
    for event in events:
        if isinstance(event, Micro) and event.stop:
            request.elsewhere = event.stop
        yield event


def _is_wanted() -> bool:
    value = os.environ.get(SWITCH, "on")
    if value not in ("on", "off"):
        raise ValueError(f"{SWITCH}={value!r}: expected 'on' or 'off'")
    return value == "on"
