"""Ranks as processes of their own, each pinned to a processor and with one thread, that do what they are told over pipes.

Each has the same model twice: unsharded, with transformers' own attention, and on the ring. What is compared so alternates
in the same processes, and a barrier starts all ranks of an order at once.
"""

import contextlib
import itertools
import multiprocessing
import os
import random
import time
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.synchronize import Barrier
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Self, cast
from unittest import mock

import torch

from kvplane_runtime.ring import attention, communicator
from kvplane_runtime.ring.architectures import Architecture
from kvplane_runtime.ring.cache import Shard
from kvplane_runtime.ring.communicator import Pending, Ring
from kvplane_runtime.ring.layout import Layout
from kvplane_runtime.ring.messages import Decode, Step, Window
from kvplane_runtime.ring.model import RingModel, StepResult
from tests.ring.tiny import Tiny, build

HOST: Final = "127.0.0.1"
LONGEST_SECONDS: Final = 1800.0
"""Of one order; then something hangs."""
_SHARE: Final = 1
"""Sequence of a rank alone that is as long as its share of the ring's."""
_POLL_SECONDS: Final = 0.05


def processors() -> list[int]:
    """Those that this process may use."""
    return sorted(os.sched_getaffinity(0))


def prompt(tokens: int, *, vocabulary: int, seed: int) -> list[int]:
    """Random tokens; the same from the same seed."""
    draw = random.Random(seed)
    return [draw.randrange(3, vocabulary) for _ in range(tokens)]


@dataclass(frozen=True)
class Ran:
    """What a prefill was on one rank."""

    seconds: float
    waited_seconds: float
    held_tokens: int
    token: int | None
    """The likeliest next one; on rank 0."""


class Link:
    """A ring whose messages take longer, without taking processor time: what a slower network would do.

    ``hidden``: they are under way while the model computes, as the ring does it; else the model stands still for them.
    """

    def __init__(self, ring: Ring) -> None:
        self._ring = ring
        self.delay_seconds = 0.0
        self.hidden = True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ring, name)

    def post(self, **what: Any) -> "Pending | _Late":
        if self.delay_seconds and not self.hidden:
            time.sleep(self.delay_seconds)
        return _Late(self._ring.post(**what), time.perf_counter() + (self.delay_seconds if self.hidden else 0.0))


@dataclass(frozen=True)
class _Late:
    pending: Pending
    until: float

    def wait(self) -> None:
        self.pending.wait()
        time.sleep(max(0.0, self.until - time.perf_counter()))


class Rank:
    """One process. Its public methods are the orders; all ranks of a crew get the same, unless a method says otherwise."""

    def __init__(self, tiny: Tiny, *, rank: int, size: int, port: int, start: Barrier) -> None:
        self._rank, self._size, self._start = rank, size, start
        self._plain = build(tiny)
        self._vocabulary: int = self._plain.config.vocab_size
        model = build(tiny)
        self._model = RingModel.of(model)
        self._alone = RingModel(model, self._model.architecture)
        self._alone.bind(Ring.alone())
        store = communicator.connect(host=HOST, port=port)
        self._link = Link(Ring.form(store=store, epoch=1, rank=rank, size=size, address=HOST))
        self._model.bind(cast(Ring, self._link))
        self._sequence = 0

    def whole(self, tokens: int, seed: int) -> float:
        """Seconds of an unsharded prefill on this rank's processor."""
        ids = torch.tensor([prompt(tokens, vocabulary=self._vocabulary, seed=seed)])
        self._start.wait(LONGEST_SECONDS)
        began = time.perf_counter()
        with torch.inference_mode():
            self._plain(ids, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - began

    def prefill(self, tokens: int, window: int, seed: int) -> Ran:
        """The same prefill by the ring, in windows of so many tokens."""
        ids = prompt(tokens, vocabulary=self._vocabulary, seed=seed)
        self._sequence += 1
        self._start.wait(LONGEST_SECONDS)
        began, waited = time.perf_counter(), 0.0
        for start in range(0, tokens, window):
            part = ids[start : start + window]
            result = self._run(
                self._model, window=Window(self._sequence, start, part, "zigzag", start + window >= tokens)
            )
            waited += result.waited_seconds
        seconds = time.perf_counter() - began
        held, logits = self._model.held_tokens(), result.logits
        self._run(self._model, release=[self._sequence])
        return Ran(seconds, waited, held, None if logits is None else int(logits[0].argmax()))

    def slow_down(self, delay_seconds: float, hidden: bool) -> None:
        """From now on every message takes so much longer."""
        self._link.delay_seconds, self._link.hidden = delay_seconds, hidden

    def attention_seconds(self, tokens: int, window: int, seed: int) -> float:
        """Time in attention's kernel during such a prefill."""
        spent = 0.0
        kernel = attention.block  # type: ignore[attr-defined]  # it is replaced where attention finds it

        def timed(*given: Any, **options: Any) -> Any:
            nonlocal spent
            began = time.perf_counter()
            found = kernel(*given, **options)
            spent += time.perf_counter() - began
            return found

        with mock.patch.object(attention, "block", timed):
            self.prefill(tokens, window, seed)
        return spent

    def fill(self, tokens: int, room: int) -> None:
        """Random KV as a prefill of so many tokens would leave it: on the ring, all of it on rank 0 alone as well, and on each
        rank alone as much as its share.

        There is room for so many more before a shard has to grow.
        """
        self._fill(self._model, self._rank, self._size, tokens, room)
        self._fill(self._alone, 0, 1, tokens // self._size, room, sequence=_SHARE)
        if self._rank == 0:
            self._fill(self._alone, 0, 1, tokens, room)

    def decode(self, count: int) -> list[float]:
        """Seconds of each of the next ``count`` tokens after what was filled, on the ring."""
        self._start.wait(LONGEST_SECONDS)
        return self._decode(self._model, count)

    def decode_alone(self, count: int) -> list[float]:
        """The same by this rank alone; for rank 0."""
        return self._decode(self._alone, count)

    def decode_apart(self, count: int) -> list[float]:
        """The same by this rank alone of its share, while the others do so with theirs: as if to exchange cost nothing."""
        self._start.wait(LONGEST_SECONDS)
        return self._decode(self._alone, count, sequence=_SHARE)

    def drop(self) -> None:
        """Forgets what was filled."""
        self._run(self._model, release=[0])
        self._run(self._alone, release=[0, _SHARE])

    def resident_bytes(self) -> int:
        """The most memory that this process has had."""
        return most_resident_bytes()

    @staticmethod
    def _fill(model: RingModel, rank: int, ranks: int, tokens: int, room: int, *, sequence: int = 0) -> None:
        model._layouts[sequence], model._shards[sequence] = random_kv(
            model.architecture, rank=rank, ranks=ranks, tokens=tokens, room=room
        )

    def _decode(self, model: RingModel, count: int, *, sequence: int = 0) -> list[float]:
        seconds = []
        for _ in range(count):
            began = time.perf_counter()
            self._run(model, decode=[Decode(sequence, model.layouts()[sequence].length, 5)])
            seconds.append(time.perf_counter() - began)
        return seconds

    def _run(self, model: RingModel, **what: Any) -> StepResult:
        epoch = self._link.epoch if model is self._model else 0
        return model.run(Step(epoch=epoch, number=0, **what))


def random_kv(shape: Architecture, *, rank: int, ranks: int, tokens: int, room: int) -> tuple[Layout, Shard]:
    """A sequence of so many tokens, and what this rank holds of it; ``room``: slots behind, which nobody counts yet."""
    layout, shard = Layout(ranks), Shard(shape.layers)
    layout.append_window(0, tokens)
    for layer in range(shape.layers):
        key = torch.randn(shape.key_heads, layout.tokens(rank) + room, shape.head_dim)
        shard.write(layer, 0, key, torch.randn_like(key))
    return layout, shard


def most_resident_bytes() -> int:
    """The most memory that this process has had, of itself: getrusage would count what had it before its exec, too."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) * 1024


@dataclass(frozen=True)
class _Failure:
    text: str


def _serve(tiny: Tiny, *, rank: int, size: int, port: int, start: Barrier, pipe: Connection, processor: int) -> None:
    os.sched_setaffinity(0, {processor})
    torch.set_num_threads(1)
    try:
        mine = Rank(tiny, rank=rank, size=size, port=port, start=start)
        pipe.send(None)
        while True:
            order, arguments = pipe.recv()
            pipe.send(getattr(mine, order)(**arguments))
    except EOFError:
        pass  # the crew is dismissed
    except Exception:  # noqa: BLE001  (the other end raises it)
        pipe.send(_Failure(traceback.format_exc()))


class Crew:
    """The ranks of one model, as long as the context lasts."""

    def __init__(self, tiny: Tiny, size: int) -> None:
        self._tiny, self._size = tiny, size
        self._pipes: list[Connection] = []
        self._processes: list[Any] = []

    def __enter__(self) -> Self:
        context = multiprocessing.get_context("spawn")
        self._store, port = communicator.serve(host=HOST)
        start = context.Barrier(self._size)
        for rank, processor in zip(range(self._size), itertools.cycle(processors()), strict=False):
            mine, its = context.Pipe()
            process = context.Process(
                target=_serve,
                args=(self._tiny,),
                kwargs={
                    "rank": rank,
                    "size": self._size,
                    "port": port,
                    "start": start,
                    "pipe": its,
                    "processor": processor,
                },
                daemon=True,
            )
            process.start()
            its.close()
            self._pipes.append(mine)
            self._processes.append(process)
        try:
            self._answers(self._pipes)
        except BaseException:
            self._dismiss()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, t: TracebackType | None) -> None:
        self._dismiss()

    def all(self, order: str, **arguments: Any) -> list[Any]:
        """What every rank answers; raises RuntimeError with the traceback of the first that fails."""
        for pipe in self._pipes:
            pipe.send((order, arguments))
        return self._answers(self._pipes)

    def first(self, order: str, **arguments: Any) -> Any:
        """What rank 0 answers; the others rest."""
        self._pipes[0].send((order, arguments))
        return self._answers(self._pipes[:1])[0]

    def _answers(self, pipes: list[Connection]) -> list[Any]:
        found: dict[int, Any] = {}
        while len(found) < len(pipes):
            for at, pipe in enumerate(pipes):
                if at not in found and pipe.poll(_POLL_SECONDS):
                    found[at] = self._answer(pipe)
        return [found[at] for at in range(len(pipes))]

    @staticmethod
    def _answer(pipe: Connection) -> Any:
        try:
            answer = pipe.recv()
        except EOFError:
            raise RuntimeError("A rank ended without a word; was it short of memory?") from None
        match answer:
            case _Failure():
                raise RuntimeError(f"A rank failed:\n{answer.text}")
        return answer

    def _dismiss(self) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()


@contextlib.contextmanager
def slowed(crew: Crew, delay_seconds: float, *, hidden: bool) -> Iterator[None]:
    """Every message of the crew takes so much longer within the context."""
    crew.all("slow_down", delay_seconds=delay_seconds, hidden=hidden)
    try:
        yield
    finally:
        crew.all("slow_down", delay_seconds=0.0, hidden=True)
