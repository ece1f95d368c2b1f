"""Whose figure counts for the replicas: the user's, the autoscaler's, or that of somebody who scales a child."""

from typing import Any

import pytest

from kvplane_api import names
from kvplane_operator.plan.actions import DeletionCost
from kvplane_operator.plan.scaling import state_ref
from kvplane_operator.plan.snapshot import Kind, Manifest, Reading, Ref, Scaler, Scaling
from tests.kvplane_operator.ring_world import RING, RingWorld, formed
from tests.kvplane_operator.world import (
    DEPLOYMENT,
    HF,
    NATIVE,
    NOW,
    PDB,
    RUNNING,
    World,
    pod,
    settled,
    state,
)

HPA = Scaler("theirs", "Deployment", "chat")


def native(replicas: int | None = None, **scaling: Any) -> dict[str, Any]:
    """A service that scales itself up to 8, with these fields over it."""
    spec: dict[str, Any] = {**NATIVE, "autoscaling": {**NATIVE["autoscaling"], **scaling}}
    return spec if replicas is None else {**spec, "replicas": replicas}


def replicas(world: World) -> int:
    """What the Deployment asks for."""
    return int(world.children[DEPLOYMENT]["spec"]["replicas"])


def says(world: World, desired: int) -> None:
    """The autoscaler decides, and it is done."""
    world.scaling = Scaling(mode="Paged", desired=desired)
    world.settle()


class TestTheFirstReplicas:
    @pytest.mark.parametrize(
        ("spec", "first"),
        [
            (native(), 1),
            (native(3), 3),
            (native(0), 1),
            (native(20), 8),
            (native(minReplicas=2), 2),
            (native(0, scaleToZeroAfterSeconds=60), 0),
            (native(0, minReplicas=2, scaleToZeroAfterSeconds=60), 0),
        ],
    )
    def test_are_those_of_the_spec_within_the_bounds(self, spec: dict[str, Any], first: int) -> None:
        world = settled(spec)
        assert replicas(world) == first
        assert world.status["desiredReplicas"] == first
        assert world.plan().writes == ()


class TestNative:
    def test_the_autoscalers_figure_counts_and_the_specs_does_not(self) -> None:
        world = settled(native())
        says(world, 5)
        assert (replicas(world), world.status["desiredReplicas"]) == (5, 5)
        world.change(replicas=2)
        assert world.settle().writes == ()
        assert replicas(world) == 5

    def test_what_goes_with_the_number_goes_with_the_figure(self) -> None:
        world = settled(native())
        assert PDB not in world.children
        says(world, 2)
        assert PDB in world.children

    def test_a_restart_of_the_operator_changes_nothing(self) -> None:
        world = settled(native())
        says(world, 5)
        world.scaling = None
        assert world.plan().writes == ()
        assert world.condition("ScalingActive") == ("True", "FollowsDemand")

    def test_a_restart_at_zero_wakes_nobody(self) -> None:
        world = settled(native(scaleToZeroAfterSeconds=60))
        says(world, 0)
        world.scaling = None
        assert world.plan().writes == ()

    def test_at_zero_the_condition_does_not_say_that_replicas_run(self) -> None:
        world = settled(native(scaleToZeroAfterSeconds=60))
        says(world, 0)
        assert world.condition("ScalingActive") == ("True", "FollowsDemand")
        assert world.wanted("ScalingActive")["message"] == "Nothing runs, as nobody asks."

    def test_a_hand_at_the_deployment_is_undone(self) -> None:
        world = settled(native())
        says(world, 5)
        world.children[DEPLOYMENT]["spec"]["replicas"] = 1
        world.settle()
        assert replicas(world) == 5

    def test_a_deployment_that_was_deleted_comes_back_as_large_as_it_was(self) -> None:
        world = settled(native())
        says(world, 5)
        world.scaling = None
        del world.children[DEPLOYMENT]
        world.settle()
        assert replicas(world) == 5

    def test_switching_it_on_begins_with_what_is_there(self) -> None:
        world = settled({**HF, "replicas": 4})
        world.change(autoscaling=NATIVE["autoscaling"])
        assert world.settle().writes == ()
        assert replicas(world) == 4

    def test_switching_it_off_gives_the_replicas_back_to_the_spec(self) -> None:
        world = settled(native(2))
        says(world, 5)
        world.change(autoscaling={"policy": "Off"})
        world.settle()
        assert replicas(world) == 2

    def test_no_pod_is_rolled(self) -> None:
        world = settled(native())
        before = world.template()
        says(world, 5)
        assert world.template() == before

    def test_an_unreadable_spec_leaves_the_figure(self) -> None:
        world = settled(native())
        says(world, 5)
        world.change(hybrid={"size": 2})
        plan = world.plan()
        assert (plan.writes, plan.status["desiredReplicas"]) == ((), 5)
        assert world.condition("ScalingActive") == ("True", "FollowsDemand")

    def test_a_spec_that_is_refused_leaves_the_figure(self) -> None:
        world = settled(native())
        says(world, 5)
        world.change(context={"maxTokens": 200_000})
        assert world.condition("Accepted") == ("False", "UnsupportedByRing")
        world.scaling = Scaling(mode="Paged", desired=5)
        assert world.plan().writes == ()


class TestSomebodyElse:
    @pytest.mark.parametrize("policy", ["Off", "External", "Native"])
    def test_who_scales_the_deployment_is_followed(self, policy: str) -> None:
        world = settled(native(policy=policy))
        world.scaling = Scaling(mode="Paged", desired=1)
        world.scalers = (HPA,)
        world.children[DEPLOYMENT]["spec"]["replicas"] = 4
        world.settle()
        assert (replicas(world), world.status["desiredReplicas"]) == (4, 4)
        assert world.plan().writes == ()
        assert world.condition("ScalingActive") == ("False", "ForeignScaler")
        assert world.condition("Ready") == ("False", "Starting")  # its own reasons are told as ever

    def test_a_deployment_of_the_same_name_that_is_not_ours_is_not_our_business(self) -> None:
        world = World(HF)
        world.scalers = (HPA,)
        assert world.condition("ScalingActive") == ("Unknown", "ScalingOff")

    def test_without_it_the_autoscaler_goes_on(self) -> None:
        world = settled(native())
        world.scaling = Scaling(mode="Paged", desired=3)
        world.settle()
        assert replicas(world) == 3

    def test_external_replicas_are_the_specs(self) -> None:
        world = settled(native(2, policy="External"))
        says(world, 7)
        assert replicas(world) == 2

    def test_of_a_ring_nothing_is_followed_since_its_sets_count_ranks(self) -> None:
        world = formed()
        world.scalers = (Scaler("theirs", "StatefulSet", "chat-ring-0"),)
        world.stateful_set(0)["spec"]["replicas"] = 7
        world.settle()
        assert world.stateful_set(0)["spec"]["replicas"] == 3
        assert world.condition("ScalingActive") == ("False", "ForeignScaler")


class TestRings:
    def ring(self, **fields: Any) -> RingWorld:
        return formed({**RING, **fields, "autoscaling": {"policy": "Native", "maxReplicas": 4}})

    def test_replicas_are_groups(self) -> None:
        world = self.ring()
        world.scaling = Scaling(mode="Ring", desired=2)
        world.run(4)
        assert [group.number for group in world.groups()] == [0, 1]
        assert world.status["desiredReplicas"] == 2

    def test_a_restart_of_the_operator_changes_nothing(self) -> None:
        world = self.ring(replicas=2)
        world.scaling = None
        assert world.plan().writes == ()
        assert world.plan().status["desiredReplicas"] == 2

    def test_a_leader_that_dies_before_it_could_tell_takes_no_group_with_it(self) -> None:
        """The sets of a scale-up are there before status says so."""
        world = self.ring()
        world.scaling = Scaling(mode="Ring", desired=2)
        world.run(8)
        world.status["desiredReplicas"] = 1
        world.scaling = None
        plan = world.plan()
        assert (plan.drains, plan.deletions, plan.status["desiredReplicas"]) == ((), (), 2)

    def test_a_group_that_is_drained_to_go_is_asked_for_no_more(self) -> None:
        world = self.ring(replicas=2)
        world.held[1] = 1
        world.scaling = Scaling(mode="Ring", desired=1)
        world.run(2)
        assert len(world.groups()) == 2
        world.scaling = None
        assert world.plan().status["desiredReplicas"] == 1

    def test_a_restart_while_a_group_is_renewed_loses_none(self) -> None:
        """A group that is drained for a rollout is asked for all the same."""
        world = self.ring(replicas=2)
        world.scaling = None
        world.change(engine={"env": [{"name": "A", "value": "b"}]})
        world.run(20)
        assert len(world.groups()) == 2
        assert all(group.whole for group in world.groups())

    def test_a_restart_at_zero_wakes_nobody(self) -> None:
        world = formed({**RING, "autoscaling": {"policy": "Native", "maxReplicas": 4, "scaleToZeroAfterSeconds": 60}})
        world.scaling = Scaling(mode="Ring", desired=0)
        world.run(6)
        assert world.groups() == ()
        world.scaling = None
        assert world.run(2).groups() == ()

    def test_a_change_of_mode_that_is_taken_back_takes_no_figure_along(self) -> None:
        """While rings serve until pods do, status tells of rings, not how many pods are to come."""
        world = self.ring()
        del world.spec["ring"]
        world.change(mode="Paged")
        world.scaling = Scaling(mode="Paged", desired=4)
        world.run(2)
        assert replicas(world) == 4
        assert (world.status["mode"], world.status["desiredReplicas"]) == ("Ring", 1)
        world.scaling = None
        world.change(mode="Ring", ring={"size": 3})
        world.run(2)
        assert [group.number for group in world.groups()] == [0]
        assert world.status["desiredReplicas"] == 1

    def test_nor_does_one_that_is_not_accepted(self) -> None:
        world = self.ring()
        del world.spec["ring"]
        world.change(mode="Paged", model={"source": "path:///models"})
        world.scaling = Scaling(mode="Paged", desired=4)
        plan = world.plan()
        assert plan.writes == ()
        assert (plan.status["mode"], plan.status["desiredReplicas"]) == ("Ring", 1)

    def test_a_figure_of_pods_is_none_of_groups(self) -> None:
        world = self.ring()
        world.scaling = Scaling(mode="Paged", desired=4)
        world.run(2)
        assert len(world.groups()) == 1

    def test_scaling_gives_no_group_a_new_restart_budget(self) -> None:
        world = formed({**RING, "ring": {"size": 3, "recovery": {"restartBudget": 2}}})
        world.crash(0, 1)
        world.run(2)
        (entry,) = world.ring_pool()["restarts"]
        world.change(autoscaling={"policy": "Native", "maxReplicas": 4})
        world.run(2)
        assert world.ring_pool()["restarts"][0]["count"] == entry["count"] == 1


def test_a_change_of_mode_puts_no_service_to_sleep() -> None:
    """One that was to begin asleep serves by now: its clients would find nobody, and nobody would wake it."""
    scaled = {"policy": "Native", "minReplicas": 2, "maxReplicas": 8, "scaleToZeroAfterSeconds": 60}
    world = settled({"model": {"source": "pvc://models"}, "mode": "Paged", "replicas": 0, "autoscaling": scaled})
    says(world, 5)
    world.counts(replicas=5, ready=5)
    world.change(mode="Ring", ring={"size": 3})
    world.settle()
    assert replicas(world) == 5
    assert sum(ref.kind is Kind.STATEFUL_SET for ref in world.children) == 2


class TestState:
    def holds_state(self, spec: dict[str, Any]) -> World:
        """A service whose autoscaler has kept something."""
        world = settled(spec)
        metadata = {"name": "chat.autoscaler", "uid": "s", "resourceVersion": "7"}
        world.children[state_ref("chat")] = {"metadata": metadata, "data": {}}
        return world

    @pytest.mark.parametrize("policy", ["Native", "External"])
    def test_is_left_to_the_autoscaler(self, policy: str) -> None:
        plan = self.holds_state(native(policy=policy)).plan()
        assert (plan.writes, plan.deletions) == ((), ())

    @pytest.mark.parametrize("spec", [dict(HF), native(policy="Off")])
    def test_goes_where_nothing_is_decided(self, spec: dict[str, Any]) -> None:
        (deletion,) = self.holds_state(spec).plan().deletions
        assert str(deletion.ref) == "ConfigMap chat.autoscaler"

    def test_has_a_name_that_no_service_has(self) -> None:
        assert "." in state_ref("chat").name


class TestVictims:
    """Of a Deployment's pods the emptiest go first."""

    def serving(self, **used: float) -> World:
        """Pods chat-NAME with so much of their KV memory in use; all ready and read."""
        world = settled({**HF, "replicas": len(used)})
        world.counts(replicas=len(used), ready=len(used))
        world.pods = [pod(f"chat-{name}", ready=True, engine=RUNNING) for name in used]
        for name, ratio in used.items():
            told = state(
                f"chat-{name}", engine={"kvCacheUsageRatio": ratio, "requestsRunning": 1, "requestsWaiting": 0}
            )
            world.readings[f"chat-{name}"] = Reading(told, at=NOW.timestamp())
        return world

    def costs(self, world: World, *, stay: int) -> dict[str, int]:
        world.change(replicas=stay)
        return {told.pod: told.cost for told in world.plan().deletion_costs}

    def test_the_emptiest_are_told(self) -> None:
        world = self.serving(full=0.9, empty=0.0, half=0.5)
        assert self.costs(world, stay=1) == {"chat-empty": -2, "chat-half": -1}
        assert world.plan().deletion_costs[0] == DeletionCost("chat-empty", "uid-of-chat-empty", -2)

    def test_what_was_told_before_is_not_told_again_and_taken_back_where_it_is_wrong(self) -> None:
        world = self.serving(full=0.9, empty=0.0, half=0.5)
        annotate(world.pods[1], "-1")
        annotate(world.pods[0], "-1")
        assert self.costs(world, stay=2) == {"chat-full": 0}

    def test_a_pod_that_was_not_read_stays(self) -> None:
        world = self.serving(full=0.9, unread=0.0)
        world.readings["chat-unread"] = Reading(None, 3, "refused")
        assert self.costs(world, stay=1) == {"chat-full": -1}

    @pytest.mark.parametrize("stay", [0, 3, 4])
    def test_nobody_is_told_where_there_is_no_choice(self, stay: int) -> None:
        assert self.costs(self.serving(a=0.1, b=0.2, c=0.3), stay=stay) == {}

    def test_a_pod_that_goes_already_is_left_alone(self) -> None:
        world = self.serving(a=0.1, b=0.2, c=0.3)
        world.pods[0]["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
        assert self.costs(world, stay=2) == {"chat-b": -1}


def annotate(found: Manifest, cost: str) -> None:
    found["metadata"]["annotations"][names.ANNOTATION_DELETION_COST] = cost


def test_children_of_the_name_are_found_by_kind() -> None:
    assert Ref(Kind.CONFIG_MAP, "chat.autoscaler") == state_ref("chat")
