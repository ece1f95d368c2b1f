"""What pods, groups and readings of a service say to the law."""

import math
from datetime import timedelta
from typing import Any

import pytest

from kvplane_api.service import Autoscaling
from kvplane_operator.autoscaler.settings import Settings, Tuning
from kvplane_operator.autoscaler.signals import Replica, Signals
from kvplane_operator.autoscaler.view import MOST_AGE_SECONDS, Images, settings, signals
from kvplane_operator.plan.mode import Mode
from kvplane_operator.plan.ring.groups import number_of
from kvplane_operator.plan.signals import answered
from kvplane_operator.plan.snapshot import Manifest, NodeView, Reading
from tests.kvplane_operator.ring_world import RING, formed
from tests.kvplane_operator.world import NATIVE, NOW, RUNNING, World, crashed, pod, settled, state

NOW_SECONDS = NOW.timestamp()
BUSY = {"kvCacheUsageRatio": 0.5, "requestsRunning": 4, "requestsWaiting": 0}


def seen(world: World, *, mode: Mode = "Paged", asked: int = 1, images: Images | None = None) -> Signals:
    """What the law gets to see now."""
    cached = (images or Images()).cached
    return signals(world.snapshot(), mode, asked=asked, wake=False, cached=cached, now=world.now.timestamp())


def only(world: World) -> Replica:
    (found,) = seen(world).replicas
    return found


def serving(name: str = "chat-1", *, age: float = 0.0, **fields: Any) -> World:
    """One pod serves, and told this so many seconds ago."""
    world = settled(NATIVE)
    world.pods = [made(pod(name, ready=True), seconds_ago=600)]
    told = state(name, **{"engine": BUSY, **fields})
    world.readings = {name: answered(None, told, at=NOW_SECONDS - age)}
    return world


def made(found: Manifest, *, seconds_ago: float) -> Manifest:
    at = NOW - timedelta(seconds=seconds_ago)
    found["metadata"]["creationTimestamp"] = at.strftime("%Y-%m-%dT%H:%M:%SZ")
    return found


class TestPods:
    def test_a_pod_is_a_replica_with_what_was_read_of_it(self) -> None:
        found = only(serving())
        assert (found.name, found.created_at) == ("chat-1", NOW_SECONDS - 600)
        assert (found.ready, found.draining, found.refused) == (True, False, False)
        assert found.reading is not None
        assert (found.reading.at, found.reading.capacity_tokens, found.reading.held_tokens) == (NOW_SECONDS, 1600, 800)

    @pytest.mark.parametrize(
        "missing",
        [
            {"age": MOST_AGE_SECONDS + 1},
            {"age": -MOST_AGE_SECONDS - 1},  # the operator's clock was set back
            {"pod": "mail-7"},
            {"signalAgeSeconds": 11},
            {"signalAgeSeconds": None},
            {"signalAgeSeconds": -1},
            {"signalAgeSeconds": math.nan},
            {"engine": {**BUSY, "kvCacheUsageRatio": math.nan}},
            {"engine": {**BUSY, "kvCacheUsageRatio": -0.5}},
            {"engine": {**BUSY, "kvCacheUsageRatio": 7.0}},
            {"engine": {**BUSY, "kvCacheCapacityTokens": -1600}},
            {"engine": {**BUSY, "requestsRunning": None}},
        ],
        ids=str,
    )
    def test_what_is_stale_or_a_lie_is_missing(self, missing: dict[str, Any]) -> None:
        world = serving(**missing)
        assert only(world).reading is None
        assert seen(world).unread == ("chat-1",)

    def test_a_pod_that_was_never_read_is_missing(self) -> None:
        world = serving()
        world.readings = {}
        assert seen(world).unread == ("chat-1",)
        world.readings = {"chat-1": Reading(None, 3, "refused")}
        assert seen(world).unread == ("chat-1",)

    def test_one_that_goes_drains(self) -> None:
        world = serving()
        world.pods[0]["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
        found = only(world)
        assert (found.ready, found.draining) == (False, True)

    def test_one_that_fits_no_node_is_refused(self) -> None:
        world = settled(NATIVE)
        world.pods = [pod(unscheduled="0/2 nodes are available")]
        assert only(world).refused

    @pytest.mark.parametrize(
        ("engine", "refused"),
        [
            ({"state": {"waiting": {"reason": "ImagePullBackOff"}}}, True),
            ({"state": {"waiting": {"reason": "CreateContainerConfigError", "message": "no secret"}}}, True),
            (crashed(), False),
            (RUNNING, False),
        ],
    )
    def test_one_whose_image_cannot_be_had_is_refused_and_one_that_crashed_is_not(
        self, engine: dict[str, Any], refused: bool
    ) -> None:
        """Else an image that is gone would scale the service to its maximum; while a crash may be the node's."""
        world = settled(NATIVE)
        world.pods = [pod(engine=engine)]
        assert only(world).refused is refused

    @pytest.mark.parametrize("phase", ["Failed", "Succeeded"])
    def test_one_that_is_over_is_none(self, phase: str) -> None:
        world = serving()
        world.pods.append(pod("evicted", phase=phase))
        assert only(world).name == "chat-1"

    def test_one_without_a_time_has_just_come(self) -> None:
        world = settled(NATIVE)
        world.pods = [pod()]
        assert only(world).created_at == NOW_SECONDS

    def test_one_that_falters_starts_when_it_ceased_to_serve(self) -> None:
        world = settled(NATIVE)
        falters = made(pod(), seconds_ago=3600)
        falters["status"]["conditions"][0]["lastTransitionTime"] = "2026-01-01T11:59:30Z"
        world.pods = [falters]
        assert (only(world).created_at, only(world).changed_at) == (NOW_SECONDS - 3600, NOW_SECONDS - 30)
        world.nodes = {"node-1": NodeView(ready=False, since=NOW)}
        assert only(world).changed_at is None

    def test_pods_that_a_quota_forbids_are_refused_replicas(self) -> None:
        world = serving()
        failure = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}
        world.counts(replicas=1, ready=1, conditions=[failure])
        found = seen(world, asked=3)
        assert [(replica.ready, replica.refused) for replica in found.pending] == [(False, True)] * 2
        world.counts(replicas=1, ready=1, conditions=[{**failure, "status": "False"}])
        assert seen(world, asked=3).pending == ()


class TestGroups:
    def test_a_group_is_a_replica_and_its_rank_0_speaks(self) -> None:
        world = formed({**RING, "replicas": 2})
        for name, reading in list(world.readings.items()):
            assert reading.state is not None
            told = state(name, engine=BUSY, admission=None)
            world.readings[name] = answered(None, told, at=world.now.timestamp())
        found = seen(world, mode="Ring", asked=2)
        assert [(each.name, each.ready) for each in found.replicas] == [("chat-ring-0", True), ("chat-ring-1", True)]
        assert all(each.reading is not None for each in found.replicas)
        assert seen(world, mode="Paged").replicas == ()

    def test_one_that_was_given_up_is_refused(self) -> None:
        world = formed()
        world.crash(0, 0, times=6)
        world.run(8)
        (found,) = seen(world, mode="Ring").replicas
        assert (found.ready, found.refused) == (False, True)

    def test_one_whose_pods_are_kept_away_is_refused(self) -> None:
        """Else a quota would have one empty group made after the other."""
        world = formed({**RING, "replicas": 2})
        world.pods = [each for each in world.pods if number_of(each) != 1]
        for seconds, refused in ((30, False), (90, True)):
            at = world.now - timedelta(seconds=seconds)
            world.stateful_set(1)["metadata"]["creationTimestamp"] = at.strftime("%Y-%m-%dT%H:%M:%SZ")
            one, other = seen(world, mode="Ring", asked=2).replicas
            assert (one.refused, other.ready, other.refused) == (False, False, refused)

    def test_one_that_is_renewed_starts_with_its_pods(self) -> None:
        """Else it would count as one that starts for hours and is lost, and each rollout would ask for another group."""
        world = formed({**RING, "replicas": 2})
        world.rank(1, 0)["metadata"]["deletionTimestamp"] = "2026-01-01T12:01:00Z"
        assert [each.draining for each in seen(world, mode="Ring", asked=2).replicas] == [False, True]
        world.pods = [each for each in world.pods if number_of(each) != 1]
        world.down = {(1, 0), (1, 1), (1, 2)}
        world.step()
        made(world.stateful_set(1), seconds_ago=7200)
        _, other = seen(world, mode="Ring", asked=2).replicas
        assert (other.ready, other.draining, other.refused) == (False, False, False)
        assert other.created_at == world.now.timestamp()

    def test_one_that_forms_anew_starts_when_it_ceased_to_serve(self) -> None:
        world = formed()
        world.down = {(0, 1), (0, 2)}
        world.step()
        (found,) = seen(world, mode="Ring").replicas
        assert (found.ready, found.changed_at) == (False, world.now.timestamp())
        world.nodes = {world.rank(0, 0)["spec"]["nodeName"]: NodeView(ready=False, since=NOW)}
        (found,) = seen(world, mode="Ring").replicas
        assert found.changed_at is None

    def test_one_that_is_drained_counts_no_more(self) -> None:
        world = formed({**RING, "replicas": 2})
        world.held = {0: 1, 1: 1}
        world.change(replicas=1)
        world.run(1)
        assert [each.draining for each in seen(world, mode="Ring").replicas] == [False, True]


class TestImages:
    @staticmethod
    def running(name: str, *, node: str = "node-1", image: str = "vllm", ready: bool = True) -> Manifest:
        return pod(name, node=node, ready=ready, engine={"image": image})

    def test_the_first_on_its_node_had_to_pull_as_far_as_anybody_knows(self) -> None:
        images = Images()
        images.note((self.running("a"),))
        assert images.cached(self.running("a")) is None

    def test_the_next_finds_it_there_also_when_the_first_is_gone(self) -> None:
        images = Images()
        images.note((self.running("a"),))
        images.note(())
        assert images.cached(self.running("b", ready=False)) is True

    @pytest.mark.parametrize("other", [{"node": "node-2"}, {"image": "vllm:2"}])
    def test_elsewhere_or_of_another_kind_it_says_nothing(self, other: dict[str, str]) -> None:
        images = Images()
        images.note((self.running("a"),))
        assert images.cached(self.running("b", **other)) is None

    def test_one_that_is_not_ready_yet_may_be_pulling(self) -> None:
        images = Images()
        images.note((self.running("a", ready=False),))
        assert images.cached(self.running("b")) is None

    def test_what_is_remembered_is_bounded(self) -> None:
        images = Images()
        for number in range(10_001):
            images.note((self.running("a", node=f"node-{number}"),))
        assert images.cached(self.running("b", node="node-0")) is None
        assert images.cached(self.running("b", node="node-10000")) is True

    def test_the_law_is_told(self) -> None:
        world = serving()
        images = Images()
        images.note((self.running("earlier", image="e"),))
        (found,) = seen(world, images=images).replicas
        assert found.image_cached is True


class TestSettings:
    def test_every_field_reaches_the_law(self) -> None:
        spec = Autoscaling(
            policy="Native",
            min_replicas=2,
            max_replicas=9,
            scale_to_zero_after_seconds=60,
            scale_down_window_seconds=120,
            cost_of_miss=7,
        )
        assert settings(spec, Tuning()) == Settings(
            min_replicas=2,
            max_replicas=9,
            scale_to_zero_after_seconds=60,
            scale_down_window_seconds=120,
            cost_of_miss=7.0,
        )

    def test_unset_fields_are_the_laws_defaults(self) -> None:
        assert settings(Autoscaling(policy="Native", max_replicas=9), Tuning()) == Settings(max_replicas=9)

    def test_external_without_a_bound_has_none(self) -> None:
        assert settings(Autoscaling(policy="External"), Tuning()).max_replicas == 10_000
