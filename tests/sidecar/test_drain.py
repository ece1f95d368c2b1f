"""Readiness and drain, in virtual time."""

from dataclasses import dataclass

import pytest

from kvplane_api.names import DRAIN_GRACE_SECONDS
from kvplane_runtime.proxy.gate import End, Refusal
from kvplane_runtime.proxy.http1 import Request, RequestHead
from kvplane_runtime.sidecar.drain import LONGEST_GRACE_SECONDS, DrainGate, Visit
from tests.sidecar.clock import Clock

HEAD = RequestHead(b"GET", b"/", "1.1", (), 0, chunked=False, keep_alive=True, expects_continue=False)


@dataclass
class StubEngine:
    starts: int = 1
    is_ready: bool = True
    is_dead: bool = False

    def ready(self) -> bool:
        return self.is_ready

    def dead(self) -> bool:
        return self.is_dead


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def engine() -> StubEngine:
    return StubEngine()


@pytest.fixture
def gate(engine: StubEngine, clock: Clock) -> DrainGate:
    return DrainGate(engine=engine, clock=clock)


def entered(gate: DrainGate) -> Visit:
    visit = gate.enter(HEAD)
    assert isinstance(visit, Visit)
    return visit


def refused(gate: DrainGate) -> Refusal:
    refusal = gate.enter(HEAD)
    assert isinstance(refusal, Refusal)
    return refusal


def test_requests_inside_are_counted(gate: DrainGate) -> None:
    visits = [entered(gate) for _ in range(2)]
    assert (gate.in_flight, gate.empty.is_set()) == (2, False)
    for visit in visits:
        assert not visit.last_on_connection
        visit.leave(End.COMPLETED)
    assert (gate.in_flight, gate.empty.is_set()) == (0, True)


async def test_an_engine_that_is_not_ready_is_a_503_with_retry_after(gate: DrainGate, engine: StubEngine) -> None:
    visit = entered(gate)
    engine.is_ready = False
    refusal = refused(gate)
    assert (refusal.status, refusal.code, refusal.retry_after_seconds) == (503, "engine_not_ready", 5)
    request = Request(HEAD, b"id", b"")
    assert await visit.admit(request) == refusal
    engine.is_ready = True
    assert await visit.admit(request) is request


def test_a_drain_serves_for_a_while_then_refuses(gate: DrainGate, clock: Clock) -> None:
    before = entered(gate)
    gate.begin()
    assert gate.draining
    clock.pass_seconds(DRAIN_GRACE_SECONDS - 0.1)
    during = entered(gate)
    assert before.last_on_connection
    assert during.last_on_connection
    clock.pass_seconds(DRAIN_GRACE_SECONDS)
    refusal = refused(gate)
    assert (refusal.status, refusal.code, refusal.retry_after_seconds) == (503, "draining", 1)


def test_a_drain_serves_on_while_requests_still_come_but_not_for_ever(gate: DrainGate, clock: Clock) -> None:
    """Where endpoints are slow to change, a refusal would go to somebody who has no other replica yet."""
    gate.begin()
    served = 0.0
    while served + DRAIN_GRACE_SECONDS - 1 < LONGEST_GRACE_SECONDS:
        clock.pass_seconds(DRAIN_GRACE_SECONDS - 1)
        served += DRAIN_GRACE_SECONDS - 1
        entered(gate).leave(End.COMPLETED)
        assert not gate.drained(drain_seconds=600)
    clock.pass_seconds(LONGEST_GRACE_SECONDS - served)
    assert refused(gate).code == "draining"
    assert gate.drained(drain_seconds=600)


def test_a_drain_is_over_when_the_last_request_left_but_not_before_the_grace(gate: DrainGate, clock: Clock) -> None:
    visit = entered(gate)
    gate.begin()
    visit.leave(End.COMPLETED)
    assert not gate.drained(drain_seconds=600)
    late = entered(gate)
    clock.pass_seconds(DRAIN_GRACE_SECONDS)
    assert not gate.drained(drain_seconds=600)
    late.leave(End.COMPLETED)
    assert gate.drained(drain_seconds=600)


def test_a_drain_has_an_end_even_with_requests_in_flight(gate: DrainGate, clock: Clock) -> None:
    entered(gate)
    gate.begin()
    clock.pass_seconds(DRAIN_GRACE_SECONDS + 599)
    assert not gate.drained(drain_seconds=600)
    clock.pass_seconds(1)
    assert gate.drained(drain_seconds=600)


def test_nothing_is_waited_for_when_the_engine_is_dead(gate: DrainGate, engine: StubEngine) -> None:
    entered(gate)
    gate.begin()
    engine.is_dead = True
    assert gate.drained(drain_seconds=600)
    assert gate.draining


def test_a_second_call_does_not_start_the_drain_anew(gate: DrainGate, clock: Clock) -> None:
    gate.begin()
    clock.pass_seconds(DRAIN_GRACE_SECONDS)
    gate.begin()
    assert refused(gate).code == "draining"


def test_an_engine_that_comes_up_again_ends_the_drain(gate: DrainGate, engine: StubEngine, clock: Clock) -> None:
    gate.begin()
    clock.pass_seconds(DRAIN_GRACE_SECONDS + 1)
    assert refused(gate).code == "draining"
    engine.starts += 1
    assert gate.drained(drain_seconds=600)
    assert not entered(gate).last_on_connection
    gate.begin()
    assert gate.draining
