"""How fast this machine is while something is measured.

A virtual machine shares its processors with others, and may lose half of its speed for seconds without any steal time to
show for it. A thread hashes a fixed block four times a second and takes the processor time of that: waiting for a turn
does not count, and hashing lets the interpreter go on meanwhile. It costs half a per cent of one processor.
"""

import hashlib
import statistics
import threading
import time
from collections.abc import Sequence
from typing import Final, Self

BLOCK: Final = bytes(2**20)
EVERY_SECONDS: Final = 0.25
STEADY: Final = (0.85, 1.2)
"""Speeds, as shares of a reference, that are taken for the same machine."""


class SpeedWatch:
    """Samples while its context lasts; the figure is there from the first on."""

    def __init__(self) -> None:
        self._samples: list[float] = []
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()

    @property
    def seconds(self) -> float:
        """Mean processor time of one block; the mean, since a slow tenth of a run slows a tenth of its requests."""
        return statistics.fmean(self._samples)

    def _watch(self) -> None:
        while True:
            before = time.thread_time()
            hashlib.blake2b(BLOCK)
            self._samples.append(time.thread_time() - before)
            if self._end.wait(EVERY_SECONDS):
                return


def steady(speed: float) -> bool:
    """Whether a run at this speed, as a share of the reference, says what one at the reference would."""
    return STEADY[0] <= speed <= STEADY[1]


def steadiest(speeds: Sequence[float]) -> int:
    """Index of the speed nearest to the reference's; raises ValueError where there is none."""
    return min(range(len(speeds)), key=lambda index: abs(speeds[index] - 1))
