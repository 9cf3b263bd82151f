"""Where processes wait for each other in the background of a save, and none for one that failed."""

import time
from collections import Counter
from typing import Any

_SECONDS_BETWEEN_LOOKS = 0.02


class Barrier:
    """A meeting point in the background, beside the steps that the processes run meanwhile.

    Unlike `jax`'s own, it is left by all as soon as one says that it will not come: its part of a
    save has failed.

    Args:
        client: the key-value store that the processes share.
        count: how many processes there are.
        rank: this one.
        name: of the run, the same in all processes and no other run's.
    """

    def __init__(self, client: Any, count: int, rank: int, name: str):
        self._client = client
        self._count = count
        self._rank = rank
        self._name = name
        self._met: Counter[str] = Counter()

    def __call__(self, *, key: str, timeout_ms: int) -> None:
        """Waits until all processes are here.

        Raises:
            RuntimeError: one of them will not come.
            TimeoutError: not all came in time.
        """
        self._met[key] += 1
        here = f"{self._name}/{key}/{self._met[key]}"
        self._client.key_value_set(f"{here}/{self._rank}", "here")
        until = time.monotonic() + timeout_ms / 1000
        for rank in range(self._count):
            while not self._has(f"{here}/{rank}"):
                failed = [r for r in range(self._count) if self._has(f"{self._name}/failed/{r}")]
                if failed:
                    raise RuntimeError(
                        f"process {', '.join(map(str, failed))} failed; its own error is in its output"
                    )
                if time.monotonic() > until:
                    raise TimeoutError(f"process {rank} did not come to {key!r} in time")
                time.sleep(_SECONDS_BETWEEN_LOOKS)

    def fail(self) -> None:
        """Tells all that this process will not come any more."""
        self._client.key_value_set(f"{self._name}/failed/{self._rank}", "", allow_overwrite=True)

    def _has(self, key: str) -> bool:
        try:
            self._client.key_value_try_get(key)
        except Exception as error:  # a bare runtime error, whose text is its kind
            if "NOT_FOUND" in str(error):
                return False
            raise
        return True
