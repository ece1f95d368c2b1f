"""Leader election: however requests, pauses and clocks interleave, two candidates never lead at once.

Candidates are coroutines that the test steps by hand on one fabricated clock: each request has a step before it reaches
the Lease and one before its answer arrives, and any of them can last for ever or be lost.
"""

import asyncio
import copy
from collections.abc import Coroutine, Generator
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import example, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvplane_operator.cluster import Cluster, ConflictError, UnreachableError
from kvplane_operator.leader import Leadership, NotLeadingError
from kvplane_operator.settings import OperatorSettings
from tests.kvplane_operator.world import settings

LEASE, DEADLINE, RENEW = 12.0, 6.0, 2.5


class _Step:
    """Awaited: hands control back to whoever steps the coroutine, who sees whether it rests between two rounds."""

    def __init__(self, *, rest: bool = False) -> None:
        self.rest = rest

    def __await__(self) -> Generator["_Step", None, None]:
        yield self


async def _sleep(_: float) -> None:
    await _Step(rest=True)


class Leases:
    """The Lease as the API server holds it: optimistic locking by resourceVersion."""

    def __init__(self) -> None:
        self.lease: dict[str, Any] | None = None
        self.writes = 0

    async def get_lease(self, _namespace: str, _name: str) -> dict[str, Any] | None:
        await _Step()
        answer = copy.deepcopy(self.lease)
        await _Step()
        return answer

    async def create_lease(self, _namespace: str, lease: dict[str, Any]) -> dict[str, Any]:
        await _Step()
        if self.lease is not None:
            raise ConflictError("exists")
        return await self._store(lease)

    async def replace_lease(self, _namespace: str, lease: dict[str, Any]) -> dict[str, Any]:
        await _Step()
        if self.lease is None or lease["metadata"]["resourceVersion"] != self.lease["metadata"]["resourceVersion"]:
            raise ConflictError("changed")
        return await self._store(lease)

    async def _store(self, lease: dict[str, Any]) -> dict[str, Any]:
        self.writes += 1
        metadata = {**lease["metadata"], "resourceVersion": str(self.writes)}
        self.lease = copy.deepcopy({**lease, "metadata": metadata})
        answer = copy.deepcopy(self.lease)
        await _Step()
        return answer


class Race:
    """Two candidates at one Lease, on one clock."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.leases = Leases()
        self.candidates = [Leadership(_settings(f"candidate-{n}"), clock=lambda: self.now) for n in range(2)]
        cluster: Any = self.leases
        self._campaigns: list[Coroutine[_Step, None, None]] = [c.campaign(cluster) for c in self.candidates]
        self._at = [_Step(rest=True) for _ in self.candidates]

    def step(self, candidate: int, *, lost: bool = False) -> None:
        """Let a candidate go on to its next step; ``lost``: the request that it waits for fails instead."""
        campaign = self._campaigns[candidate]
        with patch("kvplane_operator.leader.asyncio.sleep", _sleep):
            if lost and not self._at[candidate].rest:
                self._at[candidate] = campaign.throw(UnreachableError("no answer"))
            else:
                self._at[candidate] = campaign.send(None)

    def renew(self, candidate: int) -> None:
        """Let a candidate go on to the end of its round."""
        self.step(candidate)
        while not self._at[candidate].rest:
            self.step(candidate)

    def leading(self) -> list[int]:
        return [n for n, candidate in enumerate(self.candidates) if candidate.held()]

    def close(self) -> None:
        for campaign in self._campaigns:
            campaign.close()


def _settings(identity: str) -> OperatorSettings:
    return settings(identity=identity, lease_seconds=LEASE, renew_deadline_seconds=DEADLINE, renew_seconds=RENEW)


@pytest.fixture
def race() -> Generator[Race]:
    race = Race()
    yield race
    race.close()


_who = st.integers(0, 1)
actions = st.one_of(
    st.tuples(st.just("step"), _who),
    st.tuples(st.just("round"), _who),
    st.tuples(st.just("lost"), _who),
    st.tuples(st.just("wait"), st.sampled_from([2.5, 5.9, 12.0])),
)
ANSWER_AFTER_THE_LEASE = [
    *(("round", 0), ("round", 1), ("step", 0), ("step", 0)),  # renewed; the answer is on its way
    *(("round", 1), ("wait", 12.0), ("round", 1), ("step", 0)),
]
TAKEN_EARLY = [("round", 0), ("round", 1), ("wait", 5.9), ("round", 1)]


@hypothesis_settings(max_examples=200)
@example(ANSWER_AFTER_THE_LEASE)
@example(TAKEN_EARLY)
@given(st.lists(actions, min_size=30, max_size=60))
def test_two_never_lead_at_once(history: list[tuple[str, Any]]) -> None:
    race = Race()
    try:
        for action, value in history:
            if action == "wait":
                race.now += value
            elif action == "round":
                race.renew(value)
            else:
                race.step(value, lost=action == "lost")
            assert len(race.leading()) <= 1
    finally:
        race.close()


def test_the_first_one_leads(race: Race) -> None:
    race.renew(0)
    race.renew(1)
    assert race.leading() == [0]
    race.candidates[0].check()
    with pytest.raises(NotLeadingError, match="does not hold the leader Lease"):
        race.candidates[1].check()


def test_a_leader_that_renews_goes_on(race: Race) -> None:
    for _ in range(100):
        race.renew(0)
        race.renew(1)
        race.now += RENEW
    assert race.leading() == [0]


def test_a_standby_takes_over_within_15_seconds(race: Race) -> None:
    race.renew(0)
    race.renew(1)
    waited = 0.0
    while race.leading() != [1]:
        race.now += RENEW
        waited += RENEW
        race.renew(1)
    assert waited <= 15


def test_a_leader_stopped_past_its_deadline_does_not_write(race: Race) -> None:
    """SIGSTOP, SIGCONT: the very next write is refused, before any request."""
    race.renew(0)
    race.now += DEADLINE
    with pytest.raises(NotLeadingError):
        race.candidates[0].check()


def test_a_leader_stopped_past_its_lease_comes_back_as_a_candidate(race: Race) -> None:
    race.renew(0)
    race.renew(1)
    race.now += LEASE
    race.renew(1)
    assert race.leading() == [1]
    race.renew(0)
    race.renew(0)
    assert race.leading() == [1]
    race.now += LEASE
    race.renew(0)
    assert race.leading() == [0]


def test_a_renewal_stopped_in_the_middle_counts_from_before_it(race: Race) -> None:
    race.renew(0)
    race.now += RENEW
    race.step(0)  # the request is under way
    race.now += DEADLINE
    race.renew(0)
    assert race.leading() == []


def test_an_unchanged_lease_is_measured_by_the_candidates_own_clock(race: Race) -> None:
    """A Lease seen for the first time is never free at once, however old it says it is."""
    race.renew(0)
    race.now += 1000
    race.renew(1)
    assert race.leading() == []


def test_a_lost_answer_is_made_good_by_the_next_round(race: Race) -> None:
    race.renew(0)
    race.now += RENEW
    race.step(0)
    race.step(0)
    assert race.leases.writes == 2
    race.step(0, lost=True)  # the write arrived, its answer did not
    race.now += DEADLINE
    assert race.leading() == []
    race.renew(0)
    assert race.leading() == [0]


async def test_a_released_lease_is_taken_at_once() -> None:
    now = asyncio.get_running_loop().time
    leases = _Immediate()
    first, second = (Leadership(_settings(name), clock=now) for name in ("first", "second"))
    campaigns = [asyncio.create_task(first.campaign(leases.cluster))]
    await asyncio.sleep(1)
    campaigns.append(asyncio.create_task(second.campaign(leases.cluster)))
    await asyncio.sleep(1)
    assert (first.held(), second.held()) == (True, False)
    campaigns[0].cancel()
    await first.release(leases.cluster)
    await asyncio.wait_for(second.wait(), RENEW)
    assert (first.held(), second.held()) == (False, True)
    assert leases.holder == "second"
    campaigns[1].cancel()


class _Immediate:
    """The Lease without steps."""

    def __init__(self) -> None:
        self._held: dict[str, Any] | None = None

    @property
    def cluster(self) -> Cluster:
        found: Any = self
        return found  # type: ignore[no-any-return]

    @property
    def holder(self) -> str:
        assert self._held is not None
        return str(self._held["spec"]["holderIdentity"])

    async def get_lease(self, _namespace: str, _name: str) -> dict[str, Any] | None:
        return copy.deepcopy(self._held)

    async def create_lease(self, _namespace: str, lease: dict[str, Any]) -> dict[str, Any]:
        return await self.replace_lease(_namespace, lease)

    async def replace_lease(self, _namespace: str, lease: dict[str, Any]) -> dict[str, Any]:
        version = int(self._held["metadata"]["resourceVersion"]) if self._held else 0
        self._held = {**lease, "metadata": {**lease["metadata"], "resourceVersion": str(version + 1)}}
        return copy.deepcopy(self._held)
