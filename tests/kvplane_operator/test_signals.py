"""From polls to readings, and from readings to SignalsFresh: patient, joined to the pods, and quiet while nothing changes."""

import math
from typing import Any

import pytest

from kvplane_operator.plan.signals import SILENT_POLLS, answered, failed, telling
from kvplane_operator.plan.snapshot import Reading
from tests.kvplane_operator.world import RUNNING, World, pod, settled, state

RENAMED = "kv_cache_usage_ratio (vllm:kv_cache_usage_perc)"
UNREAD = Reading(None, silent=SILENT_POLLS, error="refused")


def serving(**readings: Reading) -> World:
    """Pods chat-a, chat-b, ..., all ready, with these readings."""
    world = settled({"model": {"source": "hf://a/b"}, "replicas": len(readings)})
    world.counts(replicas=len(readings), ready=len(readings))
    world.pods = [pod(f"chat-{name}", ready=True, engine=RUNNING) for name in readings]
    world.readings = {f"chat-{name}": reading for name, reading in readings.items()}
    return world


def fresh(name: str, **fields: Any) -> Reading:
    return Reading(state(f"chat-{name}", **fields))


class TestReadings:
    def test_an_answer_ends_a_silence(self) -> None:
        assert answered(UNREAD, state(), at=9.0) == Reading(state(), at=9.0)

    def test_the_last_state_stands_for_a_few_polls(self) -> None:
        reading: Reading = Reading(state())
        states = []
        for _ in range(SILENT_POLLS):
            reading = failed(reading, "timeout")
            states.append(reading.state)
        assert states == [state(), state(), None]
        assert (reading.silent, reading.error) == (SILENT_POLLS, "timeout")

    def test_a_state_that_stands_is_as_old_as_it_is(self) -> None:
        assert failed(Reading(state(), at=9.0), "timeout").at == 9.0
        assert failed(Reading(state(), SILENT_POLLS, at=9.0), "timeout").at is None

    @pytest.mark.parametrize("lie", [math.nan, math.inf, -math.inf, -1.0])
    def test_what_cannot_be_is_not_known(self, lie: float) -> None:
        told = state(startupSeconds=lie, engine={"kvCacheUsageRatio": lie}, thrash={"wastedTokensPerSecond": lie})
        believed = answered(None, told).state
        assert believed == state(
            startupSeconds=None, engine={"kvCacheUsageRatio": None}, thrash={"wastedTokensPerSecond": None}
        )

    def test_counts_below_0_are_not_known(self) -> None:
        believed = answered(None, state(engine={"kvCacheCapacityTokens": -1, "maxModelLenTokens": -1})).state
        assert believed == state(engine={"kvCacheCapacityTokens": None, "maxModelLenTokens": None})

    def test_more_blocks_in_use_than_there_are_cannot_be(self) -> None:
        assert answered(None, state(engine={"kvCacheUsageRatio": 1.04})).state == state(
            engine={"kvCacheUsageRatio": 1.04}
        )
        assert answered(None, state(engine={"kvCacheUsageRatio": 1.5})).state == state(
            engine={"kvCacheUsageRatio": None}
        )

    @pytest.mark.parametrize("age", [math.nan, -5.0])
    def test_signals_of_an_age_that_cannot_be_count_as_silence(self, age: float) -> None:
        reading = answered(None, state(signalAgeSeconds=age))
        assert (reading.silent, reading.state) == (1, state(signalAgeSeconds=None))

    def test_an_answer_without_signals_counts_as_silence(self) -> None:
        """A sidecar that never gets to read its engine's metrics must not look as if it were starting for ever."""
        early = state(signalAgeSeconds=None)
        reading = None
        for silent in range(1, SILENT_POLLS + 1):
            reading = answered(reading, early)
            assert (reading.state, reading.silent) == (early, silent)


class TestPatience:
    @pytest.mark.parametrize("silent", range(1, SILENT_POLLS))
    def test_a_pod_that_does_not_answer_at_first_is_pending(self, silent: int) -> None:
        assert serving(a=Reading(None, silent, "refused")).condition("SignalsFresh") == ("Unknown", "SignalsPending")

    @pytest.mark.parametrize("silent", range(1, SILENT_POLLS))
    def test_signals_that_are_not_there_at_first_are_pending(self, silent: int) -> None:
        world = serving(a=Reading(state("chat-a", signalAgeSeconds=None), silent))
        assert world.condition("SignalsFresh") == ("Unknown", "SignalsPending")
        assert world.condition("Degraded") == ("False", "AsAsked")

    def test_signals_that_never_come_are_stale(self) -> None:
        world = serving(a=Reading(state("chat-a", signalAgeSeconds=None), SILENT_POLLS))
        assert world.condition("SignalsFresh") == ("False", "SignalsStale")
        assert "since its start" in world.wanted("SignalsFresh")["message"]

    def test_a_pod_that_begins_to_serve_changes_nothing_until_it_is_read(self) -> None:
        world = serving(a=fresh("a"))
        world.settle()
        world.pods.append(pod("chat-b", ready=True, engine=RUNNING))
        assert world.condition("SignalsFresh") == ("True", "SignalsRead")
        world.readings["chat-b"] = UNREAD
        assert world.condition("SignalsFresh") == ("False", "SidecarUnreachable")

    @pytest.mark.parametrize(
        "reading", [fresh("a"), fresh("a", missingSignals=[RENAMED]), fresh("a", signalAgeSeconds=60), UNREAD]
    )
    def test_a_restart_of_the_operator_changes_nothing(self, reading: Reading) -> None:
        world = serving(a=reading)
        world.settle()
        before = world.status
        world.readings = {}
        assert world.settle().status["conditions"] == before["conditions"]
        assert world.status == before

    def test_what_a_newer_operator_wrote_is_not_held(self) -> None:
        world = serving(a=fresh("a"))
        world.settle()
        for condition in world.status["conditions"]:
            condition["reason"] = "ReasonOfALaterVersion"
        world.readings = {}
        assert world.condition("SignalsFresh") == ("Unknown", "SignalsPending")


class TestJoinedToThesePods:
    def test_a_pod_that_does_not_serve_is_not_asked_about(self) -> None:
        world = serving(a=fresh("a"))
        world.pods.append(pod("chat-b"))
        world.readings["chat-b"] = UNREAD
        assert world.condition("SignalsFresh") == ("True", "SignalsRead")

    def test_a_reading_of_a_pod_that_is_gone_does_not_count(self) -> None:
        world = serving(a=fresh("a"))
        world.readings["chat-gone"] = fresh("gone", missingSignals=[RENAMED])
        assert world.condition("SignalsFresh") == ("True", "SignalsRead")

    def test_a_pod_that_does_not_say_its_name_is_not_believed(self) -> None:
        world = serving(a=Reading(state("")))
        assert "answers pod without a name" in world.wanted("SignalsFresh")["message"]

    def test_the_worst_is_told_and_how_many_there_are(self) -> None:
        world = serving(a=UNREAD, b=fresh("b", missingSignals=[RENAMED]), c=fresh("c"))
        found = world.wanted("SignalsFresh")
        assert (found["reason"], found["message"][:11]) == ("SignalMissing", "Pod chat-b:")
        assert found["message"].endswith("Such faults have 2 of 3 pods that serve.")


class TestImpairedAdmission:
    @pytest.mark.parametrize(
        ("reading", "impaired"),
        [
            (fresh("a", missingSignals=[RENAMED]), True),
            (fresh("a", missingSignals=[RENAMED], admission={"policy": "Observe"}), True),
            (fresh("a", missingSignals=[RENAMED], admission={"policy": "Off"}), False),
            (fresh("a", missingSignals=[RENAMED], admission=None), False),  # a sidecar of an earlier version
            (fresh("a", signalAgeSeconds=60), True),
            (fresh("a", signalAgeSeconds=60, admission={"policy": "Off"}), False),
            (UNREAD, False),  # the pod may be well
            (fresh("b"), False),
            (fresh("a"), False),
        ],
    )
    def test_only_where_it_runs_without_its_signals(self, reading: Reading, impaired: bool) -> None:
        world = serving(a=reading)
        assert (world.condition("Degraded") == ("True", "AdmissionImpaired")) is impaired
        assert world.condition("Available") == ("True", "MinimumReplicasAvailable")

    def test_the_first_pod_that_is_impaired_is_told(self) -> None:
        world = serving(a=fresh("a", missingSignals=[RENAMED], admission=None), b=fresh("b", signalAgeSeconds=60))
        assert world.wanted("Degraded")["message"].startswith("Pod chat-b:")

    def test_missing_replicas_come_first(self) -> None:
        world = serving(a=fresh("a", signalAgeSeconds=60))
        world.change(replicas=2)
        world.settle()
        assert world.condition("Degraded") == ("True", "ReplicasMissing")


class TestWhatIsWorthANewPlan:
    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (fresh("a"), fresh("a", missingSignals=[RENAMED])),
            (fresh("a"), fresh("a", signalAgeSeconds=60)),
            (fresh("a"), fresh("b")),
            (fresh("a"), UNREAD),
            (fresh("a"), fresh("a", engine={"kvCacheCapacityTokens": 3200})),
            (fresh("a"), fresh("a", engine={"maxModelLenTokens": None})),
            (Reading(None, 1, "refused"), fresh("a")),
            (fresh("a", signalAgeSeconds=None), fresh("a", engine={"maxModelLenTokens": None})),
        ],
    )
    def test_changes(self, one: Reading, other: Reading) -> None:
        assert telling("chat-a", one) != telling("chat-a", other)
        assert telling("chat-a", one) == telling("chat-a", one)

    @pytest.mark.parametrize(
        ("one", "other"),
        [
            (fresh("a"), fresh("a", engine={"kvCacheUsageRatio": 0.9}, inFlight=90)),
            (fresh("a"), failed(fresh("a"), "timeout")),
            (fresh("a", signalAgeSeconds=11), fresh("a", signalAgeSeconds=21)),
            (fresh("a", signalAgeSeconds=0.1), fresh("a", signalAgeSeconds=9.9)),
            (Reading(None, SILENT_POLLS, "refused"), Reading(None, SILENT_POLLS + 1, "refused")),
        ],
    )
    def test_no_changes(self, one: Reading, other: Reading) -> None:
        assert telling("chat-a", one) == telling("chat-a", other)
