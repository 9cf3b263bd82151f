"""``metrics.jsonl``: the numbers of a training as text, one JSON object a line."""

import json
import logging
import math
import os
from collections.abc import Iterator, Sequence, Set
from pathlib import Path
from typing import Any, BinaryIO

from ..files import replacing
from .writers import Point, Sink

logger = logging.getLogger(__name__)

NAME = "metrics.jsonl"


class JsonLines(Sink):
    """Writes ``{"step": 12, "time": 1732533011.25, "scalar/total_loss": 1.25}``, a line for each point.

    A number that is not finite is null, since JSON has none. Points are in the order of steps.

    Args:
        folder: where; made if it is not there.
        is_new: whether a run begins: the file of an earlier one is moved to ``metrics-1.jsonl`` (2, …).

    Raises:
        OSError: the file cannot be opened or written.
    """

    def __init__(self, folder: str | os.PathLike[str], *, is_new: bool):
        self.path = Path(folder) / NAME
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if is_new and self.path.exists():
            _set_aside(self.path)
        self._file: BinaryIO = open(self.path, "ab")  # noqa: SIM115  closed by `close`

    def write(self, points: Sequence[Point]) -> None:
        """See `Sink.write`. The lines are the system's at once: only its own end loses them."""
        lines = "".join(f"{json.dumps(_record(point))}\n" for point in points)
        try:
            self._file.write(lines.encode())
            self._file.flush()
        except OSError as error:
            raise OSError(error.errno, error.strerror, str(self.path)) from error

    def flush(self) -> None:
        """See `Sink.flush`."""
        os.fsync(self._file.fileno())

    def go_on(self, checkpoint: str, step: int, tags: Set[str]) -> None:
        """See `Sink.go_on`. The file is exchanged for one that holds what stands."""
        self._file.close()
        with (
            replacing(self.path) as path,
            open(self.path, "rb") as old,
            open(path, "wb") as new,
        ):
            new.writelines(_standing(old, step, tags))
        self._file = open(self.path, "ab")  # noqa: SIM115

    def close(self) -> None:
        """See `Sink.close`."""
        self._file.close()


def _record(point: Point) -> dict[str, Any]:
    numbers = (x if math.isfinite(x) else None for x in point.values.tolist())
    named = zip(point.tags, numbers, strict=True)
    return {"step": point.step, "time": round(point.time, 3), **dict(named)}


def _set_aside(path: Path) -> None:
    n = 1
    while (aside := path.with_name(f"{path.stem}-{n}{path.suffix}")).exists():
        n += 1
    path.rename(aside)
    logger.info("%s is of an earlier run: moved to %s", path, aside.name)


def _standing(lines: BinaryIO, start: int, tags: Set[str]) -> Iterator[bytes]:
    """The lines that stand once a run goes on from micro-step `start`.

    What was cut off while it was written is left out. Of the last micro-batch before the start, an
    evaluation that is made anew goes.
    """
    damaged = 0
    for line in lines:
        try:
            record = json.loads(line)
            step = int(record["step"])
        except (ValueError, TypeError, KeyError):
            damaged += line.endswith(b"\n")
            continue
        is_anew = step == start - 1 and tags.isdisjoint(record)
        if step < start and not is_anew:
            yield line.rstrip(b"\n") + b"\n"
    if damaged:
        logger.warning("%s: %d damaged lines are left out", lines.name, damaged)
