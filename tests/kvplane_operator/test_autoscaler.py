"""The autoscaler at work: it acts on what it reads, says why, keeps what it learned, and never lowers what it cannot see.

The law itself is tested in ``autoscaler/``; here is what stands around it, with a cluster in virtual time.
"""

import asyncio
import json
import re
from collections import Counter
from itertools import pairwise

import pytest

from kvplane_api import names
from kvplane_operator import metrics
from kvplane_operator.autoscaler.document import MOST_BYTES
from kvplane_operator.plan.snapshot import Kind, Ref, Scaler
from kvplane_operator.scaling import EVENT_SECONDS, EVENTS_AT_ONCE, SAVE_SECONDS, first_save_seconds
from kvplane_operator.scaling_metrics import Report
from tests.kvplane_operator.scaling_world import STATE, UID, Stage
from tests.kvplane_operator.world import HF, NATIVE

AT_MOST = {5: 4.76, 15: 14.76}
"""Seconds between two rounds, by those that are promised from a signal to its replicas: reading and writing take none here."""


@pytest.fixture
def stage() -> Stage:
    return Stage()


def time() -> float:
    return asyncio.get_running_loop().time()


def report(stage: Stage) -> Report:
    (found,) = stage.autoscaler.reports()
    return found


async def loaded(stage: Stage, load: float, *, seconds: float = 90.0) -> None:
    """So much demand, until there are replicas for it."""
    stage.load = load
    await asyncio.sleep(seconds)


class TestActing:
    async def test_demand_brings_replicas_and_an_event_says_why(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 3.2)
            assert stage.replicas == 4
            assert stage.condition() == ("True", "FollowsDemand")
        (message,) = stage.told("ScaledUp")
        assert message.startswith("From 1 to 4 replicas: demand")
        assert "demand 3.20 replicas (KV 3.20: held 1.18, queued 2.02, refused 0.00;" in message
        assert message.endswith("1 ready, 0 pending.")

    async def test_it_acts_within_a_tick_of_a_busy_service(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 0.6)
            changed = time()
            await loaded(stage, 3.2, seconds=6)
            assert stage.replicas == 4
            assert stage.asked[-1][0] - changed <= AT_MOST[5]

    async def test_it_acts_within_15_seconds_of_a_quiet_one(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 0.0)
            assert stage.replicas == 1
            changed = time()
            await loaded(stage, 3.2, seconds=16)
            assert next(at for at, _ in stage.asked if at >= changed) - changed <= AT_MOST[15]

    async def test_replicas_go_when_demand_has_gone(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 3.2)
            before = len(stage.asked)
            await loaded(stage, 0.5, seconds=1500)
            assert stage.replicas == 1
        downs = [count for _, count in stage.asked[before:]]
        assert downs == sorted(downs, reverse=True)
        assert stage.told("GlidingDown") or stage.told("ScaledDown")

    async def test_the_pods_that_go_were_told_before(self, stage: Stage) -> None:
        """Else the ReplicaSet would take the fullest as soon as any other."""
        costs: list[str] = []
        annotate = stage.annotate_pod

        async def noting(namespace: str, name: str, key: str, value: str, *, uid: str | None = None) -> None:
            if key == names.ANNOTATION_DELETION_COST:
                costs.append(name)
                assert stage.replicas > 1  # the Deployment still asks for all of them
            await annotate(namespace, name, key, value, uid=uid)

        stage.annotate_pod = noting  # type: ignore[method-assign]
        async with stage.running():
            await loaded(stage, 2.2)
            there = set(stage.pods)
            await loaded(stage, 0.5, seconds=1500)
            gone = there - set(stage.pods)
        assert len(gone) == 2
        assert gone == set(costs)

    async def test_at_the_maximum_it_says_so(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 20.0)
            assert stage.replicas == 8
            assert stage.condition() == ("True", "AtMaximum")
            await loaded(stage, 4.0, seconds=200)
            assert stage.condition() == ("True", "FollowsDemand")

    async def test_a_ready_service_costs_one_round_in_15_seconds_and_a_busy_one_in_5(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 0.0, seconds=120)
            stage.reads.clear()
            await asyncio.sleep(300)
            quiet = [after - before for before, after in pairwise(stage.reads)]
            assert all(14 <= gap <= AT_MOST[15] for gap in quiet)
            stage.load = 0.6
            await asyncio.sleep(20)
            stage.reads.clear()
            await asyncio.sleep(300)
            busy = [after - before for before, after in pairwise(stage.reads)]
        assert all(4.5 <= gap <= AT_MOST[5] for gap in busy)
        assert len(stage.asked) == 1  # and nothing was changed by it

    async def test_a_service_whose_requests_are_over_at_each_look_is_a_busy_one(self, stage: Stage) -> None:
        async with stage.running():
            stage.pausing = True
            await loaded(stage, 0.6, seconds=120)
            stage.reads.clear()
            await asyncio.sleep(300)
            assert max(after - before for before, after in pairwise(stage.reads)) <= AT_MOST[5]

    async def test_a_steady_service_is_never_written(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 0.6, seconds=100)
            events, asked = list(stage.events), list(stage.asked)
            await asyncio.sleep(900)
            assert (stage.events, stage.asked) == (events, asked)

    async def test_a_changed_spec_counts_at_once(self, stage: Stage) -> None:
        async with stage.running():
            await asyncio.sleep(100)
            changed = time()
            stage.autoscaling(minReplicas=3)
            await asyncio.sleep(2)
            assert stage.replicas == 3
            assert stage.asked[-1][0] - changed <= 1
        assert stage.told("RaisedToMinimum")

    async def test_a_pool_that_is_to_serve_after_a_change_of_mode_is_not_judged_by_its_idleness(
        self, stage: Stage
    ) -> None:
        """It would be scaled down, or to zero, before the first client comes to it."""
        async with stage.running():
            await loaded(stage, 3.2)
            stage.change({**NATIVE, "model": {"source": "pvc://models"}, "mode": "Ring", "ring": {"size": 2}})
            await asyncio.sleep(100)
            assert stage.replicas == 4
            assert list(stage.autoscaler.reports()) == []
            stage.change(NATIVE)
            await asyncio.sleep(60)
            assert (stage.replicas, report(stage).decision.desired) == (4, 4)


class TestZero:
    @pytest.fixture
    def stage(self) -> Stage:
        stage = Stage()
        stage.autoscaling(scaleToZeroAfterSeconds=60, scaleDownWindowSeconds=30)
        return stage

    async def test_there_and_back(self, stage: Stage) -> None:
        async with stage.running():
            await asyncio.sleep(300)
            assert (stage.replicas, stage.pods) == (0, [])
            why = re.match(r"From 1 to 0 replicas: no request came for (\d+) s;", stage.told("ScaledToZero")[0])
            assert why is not None
            assert 60 <= int(why[1]) <= 75  # a quiet service is looked at every 15 s
            called = time()
            stage.wake("a request")
            await asyncio.sleep(1)
            assert stage.replicas == 1
            assert stage.asked[-1][0] - called <= 1
            assert stage.told("Woken")
            await asyncio.sleep(300)
            assert stage.replicas == 0
            await asyncio.sleep(300)
            assert stage.replicas == 0  # the same value again is no new request
            stage.wake("another")
            await asyncio.sleep(1)
            assert stage.replicas == 1

    async def test_a_restart_wakes_nobody(self, stage: Stage) -> None:
        async with stage.running():
            await asyncio.sleep(300)
            stage.wake("a request")
            await asyncio.sleep(300)
            assert stage.replicas == 0
        stage.autoscaler = stage.restarted()
        async with stage.running():
            await asyncio.sleep(60)
            assert stage.replicas == 0
            stage.wake("another")
            await asyncio.sleep(1)
            assert stage.replicas == 1

    async def test_who_calls_while_it_goes_keeps_it(self, stage: Stage) -> None:
        async with stage.running():
            for second in range(30):
                stage.wake(str(second))
                await asyncio.sleep(10)
            assert stage.replicas == 1
            assert stage.told("ScaledToZero") == []

    async def test_a_service_that_is_used_stays(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 0.1, seconds=600)
            assert stage.replicas == 1


class TestBlind:
    async def test_without_any_signal_nothing_goes_down_and_it_says_so(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 3.2)
            stage.silent = {"*"}
            stage.load = 0.0
            await asyncio.sleep(1200)
            assert stage.replicas == 4
            assert stage.condition() == ("False", "ScalerBlind")
            assert "Signals of chat-1, chat-2, chat-3 and 1 more are missing" in stage.told("ScalerBlind")[0]
            stage.silent = set()
            await asyncio.sleep(60)
            assert stage.condition() == ("True", "FollowsDemand")
            assert stage.replicas == 4  # and not at once, now that it sees: what was is not known

    async def test_the_others_may_still_raise_while_half_are_silent(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 1.6)
            half = stage.pods[: len(stage.pods) // 2]
            stage.silent = set(half)
            await loaded(stage, 8.0, seconds=200)
            assert stage.replicas > 3
            assert all(after >= before for (_, before), (_, after) in pairwise(stage.asked))

    async def test_one_slow_poll_is_no_news(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 0.6)
            events = len(stage.events)
            stage.silent = {"*"}
            await asyncio.sleep(6)
            stage.silent = set()
            await asyncio.sleep(60)
            assert stage.condition() == ("True", "FollowsDemand")
            assert len(stage.events) == events


class TestFaults:
    async def test_a_restart_in_a_burst_lowers_nothing(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 6.0, seconds=60)
            before = stage.replicas
            assert before > 4
        stage.autoscaler = stage.restarted()
        stage.load = 0.2
        async with stage.running():
            await asyncio.sleep(250)
            assert stage.replicas == before

    async def test_a_restart_lowers_nothing_before_the_watches_have_brought_the_deployment(self, stage: Stage) -> None:
        """They bring the service and its pods sooner, perhaps, and the first word of a pod is a cause to plan."""
        async with stage.running():
            await loaded(stage, 3.2)
            assert stage.replicas == 4
        snapshot = stage.store.snapshot(UID)
        assert snapshot is not None
        unseen = snapshot.children[Ref(Kind.DEPLOYMENT, "chat")]
        stage.store.remove(Kind.DEPLOYMENT.value, unseen)
        stage.store.complete = False
        stage.autoscaler = stage.restarted()
        async with stage.running():
            await asyncio.sleep(60)
            assert stage.replicas == 4
            stage.store.put(Kind.DEPLOYMENT.value, unseen)
            stage.store.complete = True
            await asyncio.sleep(60)
            assert stage.replicas == 4

    async def test_a_burst_is_known_to_whoever_leads_next(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 6.0, seconds=45)
            assert report(stage).decision.panic
        stage.autoscaler = stage.restarted()
        async with stage.running():
            await asyncio.sleep(1)
            assert report(stage).decision.panic

    async def test_replicas_that_cannot_be_scheduled_ask_for_no_more(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 0.5)
            stage.unschedulable = True
            await loaded(stage, 2.5, seconds=600)
            assert stage.replicas == 3
            assert report(stage).signals.pending[0].refused

    async def test_a_quota_asks_for_no_more(self, stage: Stage) -> None:
        stage.quota = 2
        async with stage.running():
            await loaded(stage, 3.5, seconds=600)
            assert stage.replicas in (4, 5)
            assert len(stage.pods) == 2

    async def test_minimum_and_maximum_alike_stand_still(self, stage: Stage) -> None:
        stage.autoscaling(minReplicas=2, maxReplicas=2)
        async with stage.running():
            for load in (0.0, 9.0, 0.1):
                await loaded(stage, load, seconds=400)
                assert stage.replicas == 2

    async def test_a_maximum_below_what_there_is_is_an_order(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 4.5)
            assert stage.replicas >= 5
            stage.autoscaling(maxReplicas=2)
            await asyncio.sleep(2)
            assert stage.replicas == 2
            await asyncio.sleep(60)
            assert stage.condition() == ("True", "AtMaximum")
        assert stage.told("LoweredToMaximum")

    async def test_a_service_deleted_in_a_scale_up_is_forgotten(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 6.0, seconds=30)
            stage.remove()
            await asyncio.sleep(60)
            assert list(stage.autoscaler.reports()) == []
            reads = len(stage.reads)
            await asyncio.sleep(60)
            assert len(stage.reads) == reads

    async def test_what_fails_is_tried_again_and_counted(self, stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
        def failures() -> float:
            return metrics.REGISTRY.get_sample_value("kvplane_autoscaler_errors_total") or 0.0

        def broken(*_: object) -> None:
            raise ValueError("max_replicas must be at least min_replicas.")

        before = failures()
        async with stage.running():
            with monkeypatch.context() as patched:
                patched.setattr("kvplane_operator.scaling.decide", broken)
                await asyncio.sleep(40)
                assert 2 <= failures() - before <= 4
                assert stage.replicas == 1
            await loaded(stage, 3.2)
            assert stage.replicas == 4

    async def test_who_lost_the_lease_forgets_and_begins_with_what_is_there(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 3.2)
            stage.leading = False
            await asyncio.sleep(5)
            assert list(stage.autoscaler.reports()) == []
            reads = len(stage.reads)
            stage.load = 7.0
            await asyncio.sleep(60)
            assert (len(stage.reads), stage.replicas) == (reads, 4)
            stage.load = 0.0
            stage.leading = True
            await asyncio.sleep(60)
            assert len(stage.reads) > reads
            assert stage.replicas == 4

    async def test_nothing_is_decided_before_all_that_exists_is_known(self, stage: Stage) -> None:
        """A watch that has not brought the pods or the ConfigMap yet must not look as if there were none."""
        stage.leading = False
        async with stage.running():
            await loaded(stage, 3.2)
            stage.store.complete, stage.leading = False, True
            await asyncio.sleep(90)
            assert (stage.reads, stage.replicas) == ([], 1)
            stage.store.complete = True
            await asyncio.sleep(30)
            assert stage.replicas == 4
            assert report(stage).decision.history.starts.pulled == ()  # the first was there before anybody looked

    async def test_somebody_elses_scaler_of_the_deployment_is_followed(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 0.6)
            stage.store.put_scalers({("team", "chat"): (Scaler("theirs", "Deployment", "chat"),)})
            stage.scale_deployment(5)
            events = len(stage.told("ScaledUp"))
            for load in (0.0, 9.0):
                await loaded(stage, load, seconds=400)
                assert stage.replicas == 5
            assert stage.condition() == ("False", "ForeignScaler")
            assert len(stage.told("ScaledUp")) == events
            stage.store.put_scalers({})
            await loaded(stage, 9.0)
            assert stage.replicas == 8

    async def test_switched_off_it_lets_go(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 3.2)
            stage.change({**HF, "replicas": 2})
            await asyncio.sleep(5)
            assert stage.replicas == 2
            assert stage.condition() == ("Unknown", "ScalingOff")
            assert list(stage.autoscaler.reports()) == []


class TestEvents:
    async def test_are_not_more_than_somebody_can_read(self, stage: Stage) -> None:
        stage.autoscaling(maxReplicas=1000)
        async with stage.running():
            await asyncio.sleep(100)
            began = time()
            for least in range(2, 102):
                stage.autoscaling(minReplicas=least, maxReplicas=1000)
                await asyncio.sleep(1)
            told = stage.told("RaisedToMinimum")
            assert len(told) <= EVENTS_AT_ONCE + (time() - began) / EVENT_SECONDS
            await asyncio.sleep(60)
            stage.autoscaling(minReplicas=200, maxReplicas=1000)
            await asyncio.sleep(2)
        assert "events before this one were left out." in stage.told("RaisedToMinimum")[-1]


class TestExternal:
    async def test_it_says_what_it_would_do_and_does_nothing(self, stage: Stage) -> None:
        stage.autoscaling(policy="External", maxReplicas=6)
        async with stage.running():
            await loaded(stage, 3.2)
            assert stage.replicas == 1
            assert report(stage).decision.desired == 4
            assert stage.condition() == ("Unknown", "ScaledExternally")
            assert stage.told("ScaledUp") == []
            assert report(stage).counts.up == 1
            stage.change({**NATIVE, "replicas": 4, "autoscaling": {"policy": "External"}})
            await asyncio.sleep(60)
            assert (stage.replicas, report(stage).decision.desired) == (4, 4)

    async def test_native_takes_over_from_what_is_there(self, stage: Stage) -> None:
        stage.change({**NATIVE, "replicas": 3, "autoscaling": {"policy": "External"}})
        async with stage.running():
            await loaded(stage, 1.0)
            stage.autoscaling()
            await asyncio.sleep(60)
            assert stage.replicas == 3


class TestState:
    def test_services_found_together_are_not_written_together(self) -> None:
        seconds = [first_save_seconds(f"uid-{number}") for number in range(1000)]
        assert all(0 <= each < SAVE_SECONDS for each in seconds)
        tenths = Counter(int(10 * each / SAVE_SECONDS) for each in seconds)
        assert all(50 <= tenths[tenth] <= 150 for tenth in range(10))

    async def test_is_kept_every_few_minutes_small_and_owned(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 0.6, seconds=1000)
            times = [at for at, name in stage.written if name == STATE]
            assert all(SAVE_SECONDS <= after - before <= SAVE_SECONDS + 6 for before, after in pairwise(times))
            assert len(times) == 3
            kept = stage.kept()
            assert len(kept["state.json"]) <= MOST_BYTES
            assert json.loads(kept["state.json"])["starts_pulled"]
            assert kept["mode"] == "Paged"

    async def test_start_times_survive_a_restart(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 0.6, seconds=400)
            assert report(stage).decision.history.starts.pulled
        stage.autoscaler = stage.restarted()
        async with stage.running():
            await asyncio.sleep(1)
            assert report(stage).decision.history.starts.pulled
            assert report(stage).decision.horizon_seconds < 60

    async def test_that_cannot_be_kept_is_tried_again_after_a_minute(self, stage: Stage) -> None:
        def count(result: str) -> float:
            return metrics.REGISTRY.get_sample_value("kvplane_autoscaler_state_writes_total", {"result": result}) or 0.0

        async with stage.running():
            await loaded(stage, 0.6, seconds=200)  # the first write is after 136 s
            before = count("failed"), count("written")
            stage.broken = True
            await asyncio.sleep(400)  # the second is due after 436 s to 447 s
            assert count("failed") - before[0] == 3
            stage.broken = False
            await asyncio.sleep(70)
            assert count("written") - before[1] == 1
            assert stage.replicas == 1

    async def test_that_was_changed_by_hand_is_read_as_none(self, stage: Stage) -> None:
        async with stage.running():
            await loaded(stage, 0.6, seconds=400)
        stage.spoil('{"version": 1, "usable_share": "NaN"}')
        stage.autoscaler = stage.restarted()
        async with stage.running():
            await asyncio.sleep(1)
            assert report(stage).decision.history.starts.pulled == ()
            assert stage.replicas == 1
