"""Drills on real processes whose network is slow, or cut: who is slow stays a member, who is cut off is lost and comes back.

The control connections of the workers go through relays: steps, answers and heartbeats of a rank are as late as a test says.
With both workers' it is rank 0 whose network it is. That what ranks exchange in a step is late, test_networks.py has.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from tests.ring.processes import LIMIT_SECONDS, Processes, Stream
from tests.ring.relay import Relay
from tests.ring.tiny import SERVED, VOCABULARY, build, wrong

SIZE = 3
SLOW_SECONDS = 0.25
"""Each way. Between two heartbeats, 0.2 s apart, it adds so much silence once, when it begins."""


@dataclass(frozen=True)
class Net:
    """A ring, its workers' relays by rank, and the same model here."""

    ring: Processes
    relays: dict[int, Relay]
    model: Any

    def all(self, ranks: tuple[int, ...], what: Callable[[Relay], None]) -> None:
        for rank in ranks:
            what(self.relays[rank])

    def under_way(self, stream: Stream) -> None:
        self.ring.until(lambda: len(stream.tokens) >= 5 or stream.over.is_set(), seconds=60)
        assert not stream.over.is_set(), (stream.error, stream.broken)

    def check(self, stream: Stream, tokens: list[int], count: int) -> None:
        """The answer came to its end, and is what the unsharded model says."""
        assert stream.over.wait(120)
        assert (stream.error, stream.broken) == (None, None)
        assert len(stream.tokens) == count
        assert wrong(self.model, tokens, stream.tokens) == []


@pytest.fixture(scope="module")
def net(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Net]:
    model = build(SERVED[0])
    folder = tmp_path_factory.mktemp("tiny")
    model.save_pretrained(folder)
    ring = Processes(SIZE, folder, tmp_path_factory.mktemp("logs"))
    relays = {rank: Relay(ring.control_port) for rank in range(1, SIZE)}
    try:
        ring.start(0)
        for rank, relay in relays.items():
            ring.start(rank, KVPLANE_RING_CONTROL_PORT=str(relay.port))
        ring.formed()
        yield Net(ring, relays, model)
    finally:
        ring.close()
        for relay in relays.values():
            relay.close()


def prompt(length: int, seed: int) -> list[int]:
    return torch.randint(3, VOCABULARY, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


SLOW = pytest.mark.parametrize("ranks", [(1,), (1, 2)], ids=["a worker", "rank 0"])


@SLOW
def test_a_slow_network_makes_an_answer_late_and_loses_nobody(net: Net, ranks: tuple[int, ...]) -> None:
    def slow(relay: Relay) -> None:
        relay.delay = SLOW_SECONDS

    tokens = prompt(300, len(ranks))
    epoch = net.ring.ring()["epoch"]
    net.all(ranks, slow)
    try:
        net.check(net.ring.ask(tokens, 15), tokens, 15)
    finally:
        net.all(ranks, Relay.mend)
    assert (net.ring.ring()["epoch"], net.ring.ring()["formed"]) == (epoch, True)


def test_a_worker_that_is_cut_off_in_generation_is_lost_and_comes_back_with_its_kv(net: Net) -> None:
    tokens = prompt(500, 11)
    stream = net.ring.ask(tokens, 200)
    net.under_way(stream)
    net.relays[1].cut()
    try:
        net.ring.formed(0, 2)
        time.sleep(LIMIT_SECONDS)  # a cut has no virtual time; the rank has found out for itself by then
    finally:
        net.relays[1].mend()
    net.check(stream, tokens, 200)
    net.ring.formed()
    assert net.ring.ranks[1].poll() is None


def test_rank_0_is_cut_off_and_goes_on_where_it_was(net: Net) -> None:
    tokens = prompt(500, 12)
    stream = net.ring.ask(tokens, 200)
    net.under_way(stream)
    net.all((1, 2), Relay.cut)
    try:
        net.ring.until(lambda: net.ring.ring().get("formed") is False, seconds=20)
        assert not stream.over.is_set()
        assert (net.ring.state() or {})["engineReady"] is False
    finally:
        net.all((1, 2), Relay.mend)
    net.check(stream, tokens, 200)
    net.ring.formed()


def test_a_network_that_comes_and_goes(net: Net) -> None:
    tokens = prompt(400, 13)
    stream = net.ring.ask(tokens, 150)
    net.under_way(stream)
    for rank in (1, 2):
        net.relays[rank].cut()
        net.ring.formed(0, 3 - rank)
        net.relays[rank].mend()
        net.ring.formed()
    net.check(stream, tokens, 150)
    net.ring.until(lambda: (net.ring.state() or {})["admission"]["reservedTokens"] == 0)
