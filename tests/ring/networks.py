"""Networks that behave otherwise than loopback does: one operation at a time, as NCCL's; or slow, for one rank."""

import random
import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue
from typing import Any

import torch

from kvplane_runtime.ring.communicator import Ring, RingBrokenError
from tests.ring.world import Rings, on_ranks


class Formed:
    """Makes rings as :class:`Rings` does, each rank's side wrapped by ``wrap``. A deadlock ends after the
    ``quiet_seconds`` of a rank.
    """

    def __init__(self, wrap: Callable[[Ring], Any], *, quiet_seconds: Callable[[int], float] = lambda _: 20.0) -> None:
        self._rings = Rings()
        self._wrap = wrap
        self._quiet_seconds = quiet_seconds
        self._epoch = 0

    def form(self, size: int) -> Sequence[Any]:
        self._epoch += 1
        epoch = self._epoch
        rings = on_ranks(
            size,
            lambda rank: self._rings.member(epoch=epoch, rank=rank, size=size, quiet_seconds=self._quiet_seconds(rank)),
        )
        return [self._wrap(ring) for ring in rings]


class InOrder:
    """A ring that carries out one operation after another, in the order in which they were posted, while its rank goes on.

    So does NCCL on its stream. An operation that waits for one that its own rank has posted later never ends.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self._turns: SimpleQueue[_Turn] = SimpleQueue()
        threading.Thread(target=self._carry_out, daemon=True).start()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ring, name)

    def post(self, **what: Any) -> "_Turn":
        return self._put(lambda: self._ring.post(**what).wait())

    def all_gather(self, mine: Any, everyone: Any) -> None:
        self._put(lambda: self._ring.all_gather(mine, everyone)).wait()

    def _put(self, call: Callable[[], None]) -> "_Turn":
        turn = _Turn(call)
        self._turns.put(turn)
        return turn

    def _carry_out(self) -> None:
        while True:
            self._turns.get().take()


class _Turn:
    def __init__(self, call: Callable[[], None]) -> None:
        self._call = call
        self._error: RingBrokenError | None = None
        self._over = threading.Event()

    def take(self) -> None:
        try:
            with torch.inference_mode():  # as in the thread that posts; torch keeps it for each thread
                self._call()
        except RingBrokenError as error:
            self._error = error
        self._over.set()

    def wait(self) -> None:
        self._over.wait()
        if self._error is not None:
            raise self._error


class Late:
    """A ring on one rank of which every message arrives late, by up to ``seconds``, some more and some less."""

    def __init__(self, ring: Ring, *, rank: int, seconds: float) -> None:
        self._ring = ring
        self._seconds = seconds if ring.rank == rank else 0.0
        self._draw = random.Random(rank)  # noqa: S311  (lateness, no secrets)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ring, name)

    def post(self, **what: Any) -> "_Late":
        return _Late(self._ring.post(**what), time.monotonic() + self._lateness())

    def all_gather(self, mine: Any, everyone: Any) -> None:
        self._ring.all_gather(mine, everyone)
        time.sleep(self._lateness())

    def _lateness(self) -> float:
        return self._seconds * self._draw.random()


class _Late:
    def __init__(self, pending: Any, until: float) -> None:
        self._pending = pending
        self._until = until

    def wait(self) -> None:
        self._pending.wait()
        time.sleep(max(0.0, self._until - time.monotonic()))
