"""A ring whose ranks are threads of this process, over real sockets, and a conversation to run on it."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvplane_runtime.ring.communicator import Ring, connect, serve
from kvplane_runtime.ring.layout import Layout
from kvplane_runtime.ring.messages import Decode, Step, Window
from kvplane_runtime.ring.model import RingModel, StepResult
from kvplane_runtime.ring.recovery import reconcile

T = TypeVar("T")
HOST = "127.0.0.1"


def on_ranks(size: int, call: Callable[[int], T], *, rings: Sequence[Ring] = ()) -> list[T]:
    """What ``call`` gives on each rank, all at once; the first error of any, which ends the others."""
    results: dict[int, T] = {}
    errors: list[BaseException] = []

    def work(rank: int) -> None:
        torch.set_num_threads(1)
        try:
            results[rank] = call(rank)
        except BaseException as error:  # noqa: BLE001  # raised again below
            errors.append(error)
            for ring in rings:
                ring.abort("another rank failed")

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(size)]


class Rings:
    """Makes rings of any size, one epoch after another."""

    def __init__(self) -> None:
        self._store, self.port = serve(host=HOST)
        self._epoch = 0

    def form(self, size: int) -> list[Ring]:
        self._epoch += 1
        epoch = self._epoch
        return on_ranks(size, lambda rank: self.member(epoch=epoch, rank=rank, size=size))

    def member(self, *, epoch: int, rank: int, size: int, form_seconds: float = 20, quiet_seconds: float = 60) -> Ring:
        """This thread's side of a ring. One connection each: a client that waits lets no other thread of its process in."""
        return Ring.form(
            store=connect(host=HOST, port=self.port),
            epoch=epoch,
            rank=rank,
            size=size,
            address=HOST,
            form_seconds=form_seconds,
            quiet_seconds=quiet_seconds,
        )


def reformed(layouts: Mapping[int, Layout], living: Sequence[int], lost: Sequence[int] = ()) -> dict[int, Layout]:
    """The layouts after a re-form, as rank 0 writes them: by place among the ``living``, of which the ``lost`` come empty."""
    reports = [
        {} if rank in lost else {sequence: layout.runs(rank) for sequence, layout in layouts.items()} for rank in living
    ]
    lengths = {sequence: layout.length for sequence, layout in layouts.items()}
    return reconcile(lengths, reports, seniority=range(len(living)))


class World:
    """The same model on each rank of a ring."""

    def __init__(self, rings: Rings, model: Any, size: int) -> None:
        self._make = rings
        first = RingModel.of(model)
        self.models = [first, *(RingModel(model, first.architecture) for _ in range(size - 1))]
        self.rings: list[Ring] = []
        self._number = 0
        self.reform(range(size))

    @property
    def size(self) -> int:
        return len(self.rings)

    def close(self) -> None:
        for ring in self.rings:
            ring.abort("the test is over")

    def reform(self, living: Sequence[int], lost: Sequence[int] = ()) -> None:
        """A new ring of these ranks; what the ``lost`` among them held is gone."""
        layouts = reformed(self.models[0].layouts(), living, lost)
        self.close()
        self.models = [self.models[rank] for rank in living]
        self.rings = self._make.form(len(living))
        self._number = 0
        for model, ring in zip(self.models, self.rings, strict=True):
            model.bind(ring, layouts)

    def step(self, **what: Any) -> StepResult:
        step = Step(epoch=self.rings[0].epoch, number=self._number, **what)
        self._number += 1
        results = on_ranks(self.size, lambda rank: self.models[rank].run(step), rings=self.rings)
        assert all(result.logits is None for result in results[1:])
        assert [result.held_tokens for result in results] == [
            sum(layout.tokens(rank) for layout in self.models[0].layouts().values()) for rank in range(self.size)
        ]
        assert all(model.layouts() == self.models[0].layouts() for model in self.models)
        return results[0]

    def logits(self, **what: Any) -> Tensor:
        logits = self.step(**what).logits
        assert logits is not None
        return logits

    def prompt(
        self, sequence: int, tokens: Sequence[int], start: int, windows: Sequence[int], placement: Any = "zigzag"
    ) -> Tensor:
        """Prefills ``tokens`` from position ``start`` on in windows of these lengths; the last token's logits."""
        begin = 0
        for index, length in enumerate(windows):
            last = index == len(windows) - 1
            window = Window(
                sequence=sequence,
                start=start + begin,
                tokens=list(tokens[begin : begin + length]),
                placement=placement,
                logits=last,
            )
            result = self.step(window=window)
            begin += length
        assert begin == len(tokens)
        assert result.logits is not None
        return result.logits[0]

    def refill(self, sequence: int, tokens: Sequence[int], most: int) -> int:
        """Computes again what is missing of a sequence; how many tokens that were."""
        done = 0
        while missing := self.layout(sequence).missing():
            start = missing[0].first
            end = min(start + most, self.layout(sequence).length)
            before = sum(run.count for run in missing)
            self.step(window=Window(sequence, start, list(tokens[start:end]), "zigzag", False))
            done += before - sum(run.count for run in self.layout(sequence).missing())
        return done

    def decode(self, *tokens: tuple[int, int, int]) -> Tensor:
        """A decode batch of (sequence, position, token)."""
        return self.logits(decode=[Decode(*one) for one in tokens])

    def layout(self, sequence: int) -> Layout:
        return self.models[0].layouts()[sequence]
