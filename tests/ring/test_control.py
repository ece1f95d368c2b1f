"""Control connections: what is said arrives, who is silent is found out, and what is no rank does no harm."""

import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import pytest

from kvplane_runtime.ring import control, messages
from kvplane_runtime.ring.control import FormOrder, Hub, Left, Severed, Tether
from kvplane_runtime.ring.membership import BUILT, SELF, Fence, Formed, Limits, Lost

HOST = "127.0.0.1"
LIMITS = Limits(heartbeat=2.0, stop=5.0, form=5.0, gather=5.0)
"""On a busy machine a thread may not run for half a second now and then, and that is no silence."""


def joins(ordinal: int, size: int) -> messages.Join:
    return messages.Join(messages.Member(ordinal, f"pod-{ordinal}", f"p{ordinal}", HOST), size, "1/c", 100)


class Side:
    """One end, and what it was told."""

    def __init__(self) -> None:
        self.told: SimpleQueue[Any] = SimpleQueue()
        self.fences: SimpleQueue[tuple[int, str]] = SimpleQueue()

    def fence(self, epoch: int, reason: str) -> None:
        self.fences.put((epoch, reason))

    def next(self, kind: type) -> Any:
        """The next thing of a kind that it was told."""
        while True:
            found = self.told.get(timeout=10)
            if isinstance(found, kind):
                return found


class Leader(Side):
    def __init__(self, size: int, limits: Limits = LIMITS) -> None:
        super().__init__()
        self.hub = Hub(join=joins(0, size), host=HOST, port=0, limits=limits, tell=self.told.put, fence=self.fence)
        self.hub.start()

    def form(self, order: FormOrder, tables: Sequence[messages.Table] = ()) -> bool:
        members = [seat.member for seat in order.seats]
        return self.hub.form(
            order.epoch,
            {
                seat.link: messages.Form(order.epoch, rank, members, "s:1", list(tables))
                for rank, seat in enumerate(order.seats)
            },
        )


class Worker(Side):
    def __init__(self, leader: Leader, ordinal: int, size: int, limits: Limits = LIMITS) -> None:
        super().__init__()
        self.tether = Tether(host=HOST, port=leader.hub.port, limits=limits, deliver=self.told.put, fence=self.fence)
        self.tether.start()
        self.tether.join(joins(ordinal, size))

    def build(self) -> messages.Form:
        form = self.next(messages.Form)
        assert isinstance(form, messages.Form)
        self.tether.send(messages.Formed(form.epoch, form.rank))
        return form


@pytest.fixture
def sides() -> Iterator[tuple[Leader, Worker, Worker]]:
    """A ring of three, formed."""
    leader = Leader(3)
    workers = Worker(leader, 1, 3), Worker(leader, 2, 3)
    order = leader.next(FormOrder)
    assert leader.form(order)
    for worker in workers:
        worker.build()
    leader.hub.answer(messages.Formed(order.epoch, 0))
    leader.next(Formed)
    yield leader, *workers
    for worker in workers:
        worker.tether.stop()
    leader.hub.stop()


def until(what: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not what():
        assert time.monotonic() < end
        time.sleep(0.01)


def stands_still(loop: control._Loop) -> threading.Event:
    """Nothing of a side runs until the event is set, or until its test has failed."""
    goes_on = threading.Event()
    loop.post(goes_on.wait, 30)
    return goes_on


def test_steps_go_down_and_answers_up(sides: tuple[Leader, Worker, Worker]) -> None:
    leader, *workers = sides
    step = messages.Step(0, 0, decode=[messages.Decode(1, 2, 3)])
    leader.hub.step(step)
    for rank, worker in enumerate(workers, 1):
        assert worker.next(messages.Step) == step
        worker.tether.send(messages.Done(0, rank, 0, messages.Traffic(1.0, 0.5, 0.5, 9)))
    assert {leader.next(messages.Done).rank for _ in workers} == {1, 2}


def test_a_busy_model_misses_no_heartbeat(sides: tuple[Leader, Worker, Worker]) -> None:
    leader, *_ = sides
    end = time.monotonic() + 1.5 * LIMITS.heartbeat
    while time.monotonic() < end:  # as a model's thread between its kernels
        sum(range(10_000))
    assert leader.told.empty()


def test_a_silent_worker_is_fenced_out_and_its_work_is_void(sides: tuple[Leader, Worker, Worker]) -> None:
    leader, silent, other = sides
    leader.hub.step(messages.Step(0, 0))
    other.next(messages.Step)
    goes_on = stands_still(silent.tether._loop)
    assert leader.next(Lost).ordinal == 1
    assert leader.next(Fence) == Fence(1, leader.fences.get(timeout=5)[1], abort=True, lost=True)
    assert other.fences.get(timeout=5) == (1, "rank 0 fenced it")
    leader.hub.stopped(1)
    other.tether.send(messages.Fault(0, 2, 0, "fenced"))
    order = leader.next(FormOrder)
    assert [(seat.member.ordinal, seat.rank_before, seat.finished) for seat in order.seats] == [
        (0, 0, BUILT),
        (2, 2, BUILT),
    ]
    assert leader.form(order)
    assert other.build().epoch == order.epoch
    leader.hub.answer(messages.Formed(order.epoch, 0))
    leader.next(Formed)
    # It comes back: its own ring is void, it asks again, and says what it holds.
    goes_on.set()
    assert silent.next(Severed)
    silent.tether.join(joins(1, 3))
    leader.hub.stopped(leader.next(Fence).epoch)
    order = leader.next(FormOrder)
    assert [(seat.member.ordinal, seat.rank_before) for seat in order.seats] == [(0, 0), (1, None), (2, 1)]


def test_a_silent_rank_0_is_left_and_looked_for_again(sides: tuple[Leader, Worker, Worker]) -> None:
    leader, *workers = sides
    goes_on = stands_still(leader.hub._loop)
    for worker in workers:
        assert "rank 0 was silent" in worker.next(Severed).reason
        assert worker.fences.get(timeout=5)[0] > 1_000_000
    goes_on.set()
    for ordinal, worker in enumerate(workers, 1):
        worker.tether.join(joins(ordinal, 3))
    leader.hub.stopped(leader.next(Fence).epoch)
    while not isinstance(order := leader.told.get(timeout=10), FormOrder) or order.seats[-1].member.ordinal != 2:
        if isinstance(order, Fence):  # another one, where one of them came a little later
            leader.hub.stopped(order.epoch)


def test_forms_of_an_order_that_is_out_of_date_are_not_sent(sides: tuple[Leader, Worker, Worker]) -> None:
    leader, first, second = sides
    first.tether.stop()
    leader.hub.stopped(leader.next(Fence).epoch)
    stale = leader.next(FormOrder)
    second.tether.stop()
    until(lambda: not leader.told.empty())
    assert not leader.form(stale)


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", struct.pack(">I", 3) + b"abc", b"\0"])
def test_what_is_no_rank_is_sent_away(sides: tuple[Leader, Worker, Worker], said: bytes) -> None:
    leader, *workers = sides
    with socket.create_connection((HOST, leader.hub.port)) as stranger:
        stranger.sendall(said)
        stranger.shutdown(socket.SHUT_WR)
        stranger.settimeout(10)
        while stranger.recv(4096):
            pass
    leader.hub.step(messages.Step(0, 0))
    for worker in workers:
        worker.next(messages.Step)


def until_closed(stranger: socket.socket) -> bytes:
    """What rank 0 says until it closes the connection, which has to be soon."""
    stranger.settimeout(10)
    said, end = b"", time.monotonic() + 10
    while part := stranger.recv(4096):  # heartbeats, for as long as it is open
        assert time.monotonic() < end
        said += part
    return said


def test_who_connects_and_does_not_ask_to_be_a_member_is_not_kept(
    sides: tuple[Leader, Worker, Worker], monkeypatch: pytest.MonkeyPatch
) -> None:
    leader, *workers = sides
    monkeypatch.setattr(control, "_UNKNOWN_SECONDS", 0.3)
    with socket.create_connection((HOST, leader.hub.port)) as silent:
        until_closed(silent)
    with socket.create_connection((HOST, leader.hub.port)) as slow:
        slow.sendall(struct.pack(">I", 100) + b"x")
        until_closed(slow)
    leader.hub.step(messages.Step(0, 0))
    for worker in workers:
        worker.next(messages.Step)


def test_who_has_not_asked_to_be_a_member_may_not_say_more_than_a_ring_holds(
    sides: tuple[Leader, Worker, Worker],
) -> None:
    leader, *_ = sides
    most = 1024 * 1024 + 16 * 3 * 100
    with socket.create_connection((HOST, leader.hub.port)) as stranger:
        stranger.sendall(struct.pack(">I", most + 1))
        assert f"A message of {most + 1} bytes is announced".encode() in until_closed(stranger)


def test_who_goes_away_while_it_loads_its_weights_is_told_to_be_gone(sides: tuple[Leader, Worker, Worker]) -> None:
    leader, *_ = sides
    data = messages.encode(messages.Loading(2, 5, 10))
    with socket.create_connection((HOST, leader.hub.port)) as first:
        first.sendall(struct.pack(">I", len(data)) + data)
        assert leader.next(messages.Loading).loaded_bytes == 5
        with socket.create_connection((HOST, leader.hub.port)) as second:
            second.sendall(struct.pack(">I", len(data)) + data)
            assert leader.next(messages.Loading).loaded_bytes == 5
            first.close()
            until(lambda: len(leader.hub._loading) == 1)
            assert leader.told.empty()
        assert leader.next(control.Gone).ordinal == 2


def test_ranks_hear_of_rank_0_while_it_sends_forms_to_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each form has all tokens of the ring: to send it takes a while, and to send it to all takes longer than the limit."""
    limits = Limits(heartbeat=2.0, gather=10.0)
    send = control._send_encoded

    def slow(writer: Any, head: bytes, rest: bytes = b"") -> None:
        if len(rest) > 4000:
            time.sleep(0.4)
        send(writer, head, rest)

    monkeypatch.setattr(control, "_send_encoded", slow)
    leader = Leader(8, limits)
    workers = [Worker(leader, ordinal, 8, limits) for ordinal in range(1, 8)]
    try:
        order = leader.next(FormOrder)
        assert leader.form(order, [messages.Table.of(1, range(1000), [])])
        for worker in workers:
            worker.build()
        leader.hub.answer(messages.Formed(order.epoch, 0))
        leader.next(Formed)
        assert [worker for worker in workers if not worker.told.empty()] == []
    finally:
        for worker in workers:
            worker.tether.stop()
        leader.hub.stop()


def test_who_asks_twice_over_one_connection_is_sent_away_and_rank_0_goes_on() -> None:
    leader = Leader(2)
    data = messages.encode(joins(1, 2))
    try:
        with socket.create_connection((HOST, leader.hub.port)) as twice:
            twice.sendall(2 * (struct.pack(">I", len(data)) + data))
            assert leader.next(Lost).ordinal == 1
            leader.hub.stopped(leader.next(Fence).epoch)
            twice.settimeout(10)
            while twice.recv(4096):
                pass
        worker = Worker(leader, 1, 2)
        order = leader.next(FormOrder)
        assert leader.form(order)
        assert worker.build().epoch == order.epoch
        worker.tether.stop()
    finally:
        leader.hub.stop()


def test_a_rank_0_that_stops_leaves_workers_that_look_for_the_next_one(sides: tuple[Leader, Worker, Worker]) -> None:
    leader, *workers = sides
    leader.hub.stop()
    for worker in workers:
        worker.next(Severed)


def test_workers_know_whether_their_ring_works(sides: tuple[Leader, Worker, Worker]) -> None:
    leader, first, second = sides
    until(lambda: first.tether.formed == second.tether.formed == 0)
    first.tether.stop()
    until(lambda: second.tether.formed == -1)
    assert second.tether.connected
    leader.hub.stop()
    until(lambda: not second.tether.connected)


def test_a_worker_that_leaves_is_let_go_between_two_steps(sides: tuple[Leader, Worker, Worker]) -> None:
    leader, first, second = sides
    leader.hub.step(messages.Step(0, 0))
    for worker in (first, second):
        worker.next(messages.Step)
    first.tether.leave()
    assert leader.next(Fence) == Fence(1, "rank 1 leaves", abort=False)
    leader.hub.stopped(1)
    leader.hub.answer(messages.Done(0, 0, 0, messages.Traffic(1.0, 1.0, 0.0, 0)))
    second.tether.send(messages.Done(0, 2, 0, messages.Traffic(1.0, 1.0, 0.0, 0)))
    assert leader.next(messages.Done).rank in (0, 2)
    assert first.told.empty(), "the step is not done everywhere"
    first.tether.send(messages.Done(0, 1, 0, messages.Traffic(1.0, 1.0, 0.0, 0)))
    first.next(Left)
    assert leader.next(Lost).ordinal == 1
    assert [seat.member.ordinal for seat in leader.next(FormOrder).seats] == [0, 2]
    assert second.fences.empty(), "nobody was cut short"


def test_a_worker_that_is_in_no_ring_leaves_at_once() -> None:
    told: SimpleQueue[Any] = SimpleQueue()
    tether = Tether(host=HOST, port=1, limits=LIMITS, deliver=told.put, fence=lambda epoch, reason: None)
    tether.start()
    tether.leave()
    assert isinstance(told.get(timeout=10), Left)
    assert tether.leaving
    tether.stop()


def test_a_port_that_is_taken_is_said_to_be() -> None:
    with socket.create_server((HOST, 0)) as taken, pytest.raises(OSError, match="in use"):
        Hub(
            join=joins(0, 1),
            host=HOST,
            port=taken.getsockname()[1],
            limits=LIMITS,
            tell=print,
            fence=lambda epoch, reason: None,
        ).start()


def test_rank_0_alone_forms_at_once() -> None:
    leader = Leader(1)
    try:
        order = leader.next(FormOrder)
        assert [seat.link for seat in order.seats] == [SELF]
        assert leader.form(order)
        leader.hub.answer(messages.Formed(order.epoch, 0))
        assert leader.next(Formed).ordinals == (0,)
    finally:
        leader.hub.stop()


def test_threads_end(sides: tuple[Leader, Worker, Worker]) -> None:
    leader, *workers = sides
    for worker in workers:
        worker.tether.stop()
    leader.hub.stop()
    threads = [side._loop._thread for side in (leader.hub, *(worker.tether for worker in workers))]
    assert [thread.name for thread in threads] == ["ring-hub", "ring-tether", "ring-tether"]
    assert not any(thread.is_alive() for thread in threads)
