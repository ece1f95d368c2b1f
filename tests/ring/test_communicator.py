"""Rings of threads over real sockets: what arrives where, and that nobody waits for the dead."""

import threading
import time

import pytest
import torch

from kvplane_runtime.ring.communicator import Ring, RingBrokenError, connect
from tests.ring.world import HOST, Rings, on_ranks


@pytest.fixture(scope="module")
def rings() -> Rings:
    return Rings()


def test_tensors_go_round_while_nobody_waits(rings: Rings) -> None:
    ring = rings.form(3)

    def round_(rank: int) -> list[float]:
        mine, seen = torch.full((4,), float(rank)), []
        for _ in range(3):
            coming = torch.empty(4)
            pending = ring[rank].post(sends=[(mine, ring[rank].next)], receives=[(coming, ring[rank].previous)])
            pending.wait()
            mine = coming
            seen.append(float(mine[0]))
        return seen

    assert on_ranks(3, round_, rings=ring) == [[2, 1, 0], [0, 2, 1], [1, 0, 2]]
    for one in ring:
        assert one.traffic.operations == 3
        assert one.traffic.sent_bytes == 3 * 4 * 4
        assert one.traffic.waited_seconds > 0
        one.abort()


def test_messages_of_one_tag_keep_their_order_and_tags_do_not_mix(rings: Rings) -> None:
    ring = rings.form(2)

    def talk(rank: int) -> list[float]:
        other = 1 - rank
        got = [torch.empty(1) for _ in range(4)]
        later = ring[rank].post(receives=[(got[2], other), (got[3], other)], tag=7)
        sent = [
            ring[rank].post(sends=[(torch.tensor([float(value)]), other)], tag=tag)
            for value, tag in ((1, 3), (2, 3), (3, 7), (4, 7))
        ]
        ring[rank].post(receives=[(got[0], other), (got[1], other)], tag=3).wait()
        for pending in (later, *sent):
            pending.wait()
        return [float(value) for value in got]

    assert on_ranks(2, talk, rings=ring) == [[1, 2, 3, 4]] * 2
    for one in ring:
        one.abort()


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_gather_is_by_rank(rings: Rings, size: int) -> None:
    ring = rings.form(size)

    def gather(rank: int) -> torch.Tensor:
        everyone = torch.empty(size, 2, 3)
        ring[rank].all_gather(torch.full((2, 3), float(rank)), everyone)
        return everyone

    for everyone in on_ranks(size, gather, rings=ring):
        assert [float(part[0, 0]) for part in everyone] == list(range(size))
    for one in ring:
        one.abort()


def test_an_abort_wakes_who_waits_and_who_comes_later(rings: Rings) -> None:
    ring = rings.form(2)
    posted = threading.Event()

    def wait() -> None:
        pending = ring[0].post(receives=[(torch.empty(8), 1)])
        posted.set()
        pending.wait()

    def abort() -> None:
        posted.wait()
        time.sleep(0.05)  # the other thread may be waiting by then; both ways must end
        ring[0].abort("rank 1 sent no heartbeat for 1 s")

    calls = (wait, abort)
    with pytest.raises(RingBrokenError, match=r"The ring of epoch \d+ is broken: rank 1 sent no heartbeat for 1 s\."):
        on_ranks(2, lambda rank: calls[rank]())
    with pytest.raises(RingBrokenError, match="no heartbeat"):
        ring[0].all_gather(torch.ones(2), torch.empty(2, 2))
    with pytest.raises(RingBrokenError, match="no heartbeat"):
        ring[0].post(sends=[(torch.ones(2), 1)])
    assert ring[0].broken is not None
    ring[0].abort("again")
    assert "again" not in str(ring[0].broken)
    ring[1].abort()


def test_the_next_ring_works_beside_one_that_was_left_behind(rings: Rings) -> None:
    left = rings.form(3)
    stuck = left[0].post(receives=[(torch.empty(8), 1)])
    for one in left:
        one.abort()
    with pytest.raises(RingBrokenError):
        stuck.wait()
    ring = rings.form(2)
    everyone = [torch.empty(2, 1), torch.empty(2, 1)]
    on_ranks(2, lambda rank: ring[rank].all_gather(torch.tensor([float(rank)]), everyone[rank]), rings=ring)
    assert everyone[0].tolist() == everyone[1].tolist() == [[0], [1]]
    for one in ring:
        one.abort()


def test_a_ring_that_was_left_by_all_lets_go_of_its_connections(rings: Rings) -> None:
    """Also of what was posted and is waited for by nobody yet; whoever waits for it later hears that the ring is broken."""
    ring = rings.form(2)
    later = ring[0].post(receives=[(torch.empty(8), 1)], later=True)
    for one in ring:
        one.abort("it was left")
    for thread in threading.enumerate():
        if thread.name == f"ring-epoch-{ring[0].epoch}":
            thread.join(10)
            assert not thread.is_alive()
    with pytest.raises(RingBrokenError, match="it was left"):
        later.wait()


def test_a_silent_peer_is_named(rings: Rings) -> None:
    ring = on_ranks(2, lambda rank: rings.member(epoch=9001, rank=rank, size=2, quiet_seconds=0.2))
    with pytest.raises(RingBrokenError, match="is broken: rank 0 lost rank 1") as broken:
        ring[0].post(receives=[(torch.empty(8), 1)]).wait()
    assert broken.value.peers == (1,)
    ring[1].abort()


def test_a_peer_that_computes_alone_is_waited_for(rings: Rings) -> None:
    # Only who waits has a short limit: a busy machine may take longer than it even to send a few bytes.
    quiet = (0.2, 60.0)
    ring = on_ranks(2, lambda rank: rings.member(epoch=9003, rank=rank, size=2, quiet_seconds=quiet[rank]))
    got = torch.zeros(8)
    pending = ring[0].post(receives=[(got, 1)], patient=True)
    time.sleep(0.6)
    ring[1].post(sends=[(torch.ones(8), 0)]).wait()
    pending.wait()
    assert got.tolist() == [1] * 8
    for one in ring:
        one.abort()


def test_a_wait_counts_while_it_lasts(rings: Rings) -> None:
    ring = rings.form(2)
    assert ring[0].waited() == 0
    waiting = threading.Thread(target=lambda: ring[0].post(receives=[(torch.empty(8), 1)]).wait())
    waiting.start()
    end = time.monotonic() + 10
    while not (so_far := ring[0].waited()):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert ring[0].traffic.waited_seconds == 0
    ring[1].post(sends=[(torch.ones(8), 0)]).wait()
    waiting.join(10)
    assert ring[0].waited() == ring[0].traffic.waited_seconds >= so_far
    for one in ring:
        one.abort()


def test_a_ring_that_is_not_complete_does_not_form(rings: Rings) -> None:
    with pytest.raises(
        RingBrokenError, match=r"The ring of epoch 9002 did not form: rank 0 of 2 waited 0.3 s"
    ) as broken:
        rings.member(epoch=9002, rank=0, size=2, form_seconds=0.3)
    assert broken.value.peers == (1,), "it says who did not come"


def test_a_store_that_is_not_there_is_named() -> None:
    with pytest.raises(RingBrokenError, match=r"The rendezvous store at 127.0.0.1:1 did not answer in 0.5 s"):
        connect(host=HOST, port=1, seconds=0.5)


def test_a_ring_of_one_needs_nobody() -> None:
    ring = Ring.alone(epoch=3)
    everyone = torch.empty(1, 2)
    ring.all_gather(torch.ones(2), everyone)
    assert everyone.tolist() == [[1, 1]]
    ring.abort()
