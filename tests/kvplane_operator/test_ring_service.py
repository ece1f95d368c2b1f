"""Services of rings in a world that makes their pods: they form, lose ranks, are renewed, scaled and given up."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvplane_api import names
from kvplane_operator.plan.record import DATA_KEY, RING_DATA_KEY
from kvplane_operator.plan.snapshot import Kind, NodeView, Ref
from kvplane_operator.plan.status import status_patch
from tests.kvplane_operator.ring_groups import ago
from tests.kvplane_operator.ring_world import RING, RingWorld, formed
from tests.kvplane_operator.world import CONFIG_MAP, DEPLOYMENT, HF, pod


def sets(world: RingWorld) -> list[str]:
    return sorted(ref.name for ref in world.children if ref.kind is Kind.STATEFUL_SET)


def uids(world: RingWorld, *numbers: int) -> set[str]:
    return {p["metadata"]["uid"] for p in world.pods if p["metadata"]["labels"][names.LABEL_GROUP] in map(str, numbers)}


class TestForming:
    def test_a_service_becomes_ready(self) -> None:
        world = formed({**RING, "replicas": 2})
        assert world.condition("Ready") == ("True", "Serving")
        assert world.wanted("Available")["message"] == "2 of 2 rings serve."
        status = world.status
        assert (status["mode"], status["replicas"], status["readyReplicas"], status["desiredReplicas"]) == (
            "Ring",
            2,
            2,
            2,
        )

    def test_replicas_are_groups_for_an_autoscaler_too(self) -> None:
        world = formed()
        selector = dict(part.split("=") for part in world.status["selector"].split(","))
        chosen = [p for p in world.pods if selector.items() <= p["metadata"]["labels"].items()]
        assert len(chosen) == world.status["replicas"] == 1

    def test_what_was_carried_out_leaves_nothing_to_do(self) -> None:
        world = formed({**RING, "replicas": 3})
        plan = world.plan()
        assert not plan.acts
        assert status_patch(world.status, plan.status) == {}

    def test_the_size_is_planned_from_facts(self) -> None:
        facts = {"layers": 32, "kvHeads": 8, "headDim": 128, "parameters": 8_000_000_000, "acceleratorMemory": "80Gi"}
        spec = {"model": {"source": "pvc://m", "facts": facts}, "context": {"maxTokens": 1_000_000}}
        world = formed(spec)
        # (80 GiB - 16 GB) x 60 % / 131,072 bytes = 319,973 tokens a rank
        assert world.stateful_set(0)["spec"]["replicas"] == 4
        assert world.ring_pool()["size"] == 4
        assert "Mode Auto chose Ring: context.maxTokens is 1000000, above" in world.wanted("Accepted")["message"]

    def test_workers_are_not_asked_for_signals(self) -> None:
        world = formed()
        assert world.condition("SignalsFresh") == ("True", "SignalsRead")

    def test_without_nodes_it_is_said_that_nothing_is_forced(self) -> None:
        assert "chart value rbac.nodes" in formed().wanted("Accepted")["message"]
        assert "rbac.nodes" not in formed(read_nodes=True).wanted("Accepted")["message"]

    def test_a_set_that_somebody_else_scaled_is_healed_and_its_ring_goes_on(self) -> None:
        world = formed()
        world.stateful_set(0)["spec"]["replicas"] = 7
        plan = world.plan()
        assert [str(write.ref) for write in plan.writes] == ["StatefulSet chat-ring-0"]
        assert (plan.drains, plan.pod_deletions) == ((), ())

    def test_a_set_that_is_lost_comes_back_under_its_number(self) -> None:
        """Also one that could not be written at first, beside its Service that could."""
        world = formed({**RING, "replicas": 2})
        lost = Ref(Kind.STATEFUL_SET, "chat-ring-0")
        del world.children[lost]
        plan = world.plan()
        assert ([write.ref for write in plan.writes], plan.deletions) == ([lost], ())

    def test_a_number_is_given_again_once_its_pods_are_gone(self) -> None:
        world = formed()
        del world.children[Ref(Kind.STATEFUL_SET, "chat-ring-0")]
        for rank in world.pods:
            rank["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
        assert Ref(Kind.STATEFUL_SET, "chat-ring-1") in {write.ref for write in world.plan().writes}


class TestLosingARank:
    def test_the_ring_serves_on_and_status_says_so(self) -> None:
        world = formed()
        world.crash(0, 2)
        world.step()
        assert world.condition("Available") == ("True", "MinimumReplicasAvailable")
        degraded = world.wanted("Degraded")
        assert degraded["reason"] == "RingDegraded"
        assert degraded["message"].startswith(
            "Ring group 0 serves with 2 of 3 ranks. Pod chat-ring-0-2, container engine"
        )
        assert world.condition("Progressing") == ("True", "ReForming")
        assert world.ring_pool()["degradedGroups"] == [0]

    def test_it_heals(self) -> None:
        world = formed()
        world.crash(0, 2)
        world.run(2)
        world.down.clear()
        world.run(2)
        assert world.condition("Ready") == ("True", "Serving")
        assert "degradedGroups" not in world.ring_pool()

    def test_no_pod_is_touched(self) -> None:
        """Peers recreate the group; here the others keep their KV."""
        world = formed()
        before = uids(world, 0)
        world.crash(0, 2, times=3)
        assert not any(plan.pod_deletions or plan.writes for plan in (world.step() for _ in range(20)))
        assert uids(world, 0) == before

    def test_a_pod_on_a_lost_node_is_ended(self) -> None:
        world = formed(read_nodes=True)
        lost = world.rank(0, 1)
        lost["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
        world.nodes = {lost["spec"]["nodeName"]: NodeView(ready=False, since=world.now)}
        early = world.plan()
        assert (early.pod_deletions, early.wake_after_seconds) == ((), 30)
        world.nodes = {lost["spec"]["nodeName"]: NodeView(ready=False, since=ago(3600))}
        (deletion,) = world.plan().pod_deletions
        assert (deletion.pod, deletion.force) == ("chat-ring-0-1", True)
        # One that may write to a claim waits, also where its service's template has none any more.
        lost["spec"] |= {
            "volumes": [{"name": "state", "persistentVolumeClaim": {"claimName": "state"}}],
            "containers": [{"volumeMounts": [{"name": "state", "mountPath": "/state"}]}],
        }
        assert world.plan().pod_deletions == ()

    @pytest.mark.parametrize(
        "fields",
        [{"model": {"source": "path:///models"}}, {"hybrid": {"size": 2}}, {"mode": "Paged"}],
        ids=["not accepted", "of a newer CRD", "Paged"],
    )
    def test_a_pod_on_a_lost_node_is_ended_whatever_the_spec_says(self, fields: dict[str, Any]) -> None:
        """Nothing else is done about a spec that is not accepted; a rank that waits for its pod is no part of it."""
        world = formed(read_nodes=True)
        lost = world.rank(0, 1)
        lost["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
        if "mode" in fields:
            del world.spec["ring"]
        world.change(**fields)
        world.nodes = {lost["spec"]["nodeName"]: NodeView(ready=False, since=world.now)}
        early = world.plan()
        assert (early.pod_deletions, early.wake_after_seconds) == ((), 30)
        world.nodes = {lost["spec"]["nodeName"]: NodeView(ready=False, since=ago(3600))}
        assert [(deletion.pod, deletion.force) for deletion in world.plan().pod_deletions] == [("chat-ring-0-1", True)]


class TestVerdict:
    def crash_loop(self, world: RingWorld, *ordinals: int, times: int = 6) -> None:
        world.log = "OSError: no such model"
        for ordinal in ordinals:
            world.crash(0, ordinal, times=times)

    def test_a_ring_that_serves_keeps_its_crashing_rank(self) -> None:
        world = formed()
        self.crash_loop(world, 1)
        world.run(20)
        assert world.stateful_set(0)["spec"]["replicas"] == 3
        degraded = world.wanted("Degraded")
        assert degraded["reason"] == "RestartBudgetExhausted"
        assert "serves with a rank less" in degraded["message"]
        assert "no such model" in degraded["message"]

    def test_a_group_that_can_form_no_ring_is_given_up(self) -> None:
        world = formed({**RING, "replicas": 2})
        others = uids(world, 1)
        self.crash_loop(world, 0)
        world.run(10)
        assert world.stateful_set(0)["spec"]["replicas"] == 0
        assert uids(world, 0) == set()
        assert uids(world, 1) == others
        assert world.ring_pool()["failedGroups"] == [0]
        degraded = world.wanted("Degraded")
        assert degraded["reason"] == "RestartBudgetExhausted"
        assert "was given up" in degraded["message"]
        assert "no such model" in degraded["message"]  # long after the pods are gone
        assert sets(world) == ["chat-ring-0", "chat-ring-1"]  # and nobody takes its place
        assert world.wanted("Progressing")["message"] == "Nothing is being changed."

    def test_status_tells_before_anything_is_done(self) -> None:
        world = formed()
        self.crash_loop(world, 0)
        while "failedGroups" not in world.ring_pool():
            plan = world.step()
        assert plan.wake_after_seconds == 0.0
        assert world.stateful_set(0)["spec"]["replicas"] == 3
        world.step()
        assert world.stateful_set(0)["spec"]["replicas"] == 0

    def test_the_verdict_outlives_the_window(self) -> None:
        world = formed()
        self.crash_loop(world, 0)
        world.run(10)
        world.seconds = 4000.0
        world.run(3)
        assert world.condition("Available") == ("False", "RestartBudgetExhausted")
        assert "no such model" in world.wanted("Available")["message"]

    def test_a_verdict_whose_message_was_not_kept_is_a_sentence(self) -> None:
        world = formed()
        self.crash_loop(world, 0)
        world.run(10)
        world.status["pools"][0]["restarts"][0]["message"] = ""
        assert world.wanted("Available")["message"].endswith("with a new value of kvplane.dev/retry.")

    @pytest.mark.parametrize("way", ["spec", "annotation"])
    def test_a_user_gives_it_another_budget(self, way: str) -> None:
        world = formed()
        self.crash_loop(world, 0)
        world.run(10)
        world.down.clear()
        if way == "spec":
            world.change(slo={"ttftMilliseconds": 500})
        else:
            world.annotations = {names.ANNOTATION_RETRY: "1"}
        world.run(6)
        assert world.condition("Ready") == ("True", "Serving")
        assert "failedGroups" not in world.ring_pool()

    def test_a_spec_that_is_not_accepted_does_not(self) -> None:
        """Nothing is done about it, so status must not say that the group is starting."""
        world = formed()
        self.crash_loop(world, 0)
        world.run(10)
        world.down.clear()
        world.change(model={"source": "path:///srv/m"})
        world.annotations = {names.ANNOTATION_RETRY: "1"}
        world.run(2)
        assert world.ring_pool()["failedGroups"] == [0]
        assert world.condition("Available") == ("False", "RestartBudgetExhausted")
        world.change(model={"source": "pvc://models"})
        world.run(6)
        assert world.condition("Ready") == ("True", "Serving")

    def test_scaling_does_not(self) -> None:
        """Else an autoscaler would start a crash loop anew, each time it moves."""
        world = formed()
        self.crash_loop(world, 0)
        world.run(10)
        world.change(replicas=2)
        world.run(4)
        assert world.ring_pool()["failedGroups"] == [0]
        assert uids(world, 0) == set()
        assert world.group(1).whole
        assert world.condition("Degraded") == ("True", "RestartBudgetExhausted")

    def test_an_annotation_counts_once(self) -> None:
        world = formed()
        world.annotations = {names.ANNOTATION_RETRY: "1"}
        world.run(2)
        self.crash_loop(world, 0)
        world.run(20)
        assert world.ring_pool()["failedGroups"] == [0]
        assert world.ring_pool()["retry"] == "1"

    def test_within_the_budget_nobody_is_given_up(self) -> None:
        world = formed()
        self.crash_loop(world, 0, times=5)
        world.run(30)
        assert "failedGroups" not in world.ring_pool()


class TestScaling:
    def test_the_emptiest_group_is_drained_and_then_deleted(self) -> None:
        world = formed({**RING, "replicas": 3})
        world.held = {0: 4, 1: 2, 2: 7}
        world.run(2)
        world.change(replicas=2)
        world.run(3)
        assert sets(world) == ["chat-ring-0", "chat-ring-1", "chat-ring-2"]  # it still holds requests
        assert not world.group(1).formed
        world.held[1] = 0
        world.run(3)
        assert sets(world) == ["chat-ring-0", "chat-ring-2"]
        assert world.condition("Ready") == ("True", "Serving")

    def test_a_drain_ends_after_its_time(self) -> None:
        world = formed({**RING, "replicas": 2, "disruption": {"drainSeconds": 60}})
        world.held = {0: 1, 1: 1}
        world.run(2)
        world.change(replicas=1)
        world.run(12)
        assert sets(world) == ["chat-ring-0"]

    def test_holes_are_filled(self) -> None:
        world = formed({**RING, "replicas": 3})
        world.held = {0: 4, 1: 0, 2: 7}
        world.run(2)
        world.change(replicas=2)
        world.run(4)
        world.change(replicas=3)
        world.run(4)
        assert sets(world) == ["chat-ring-0", "chat-ring-1", "chat-ring-2"]

    def test_a_scale_down_taken_back_ends_with_all_groups(self) -> None:
        world = formed({**RING, "replicas": 2})
        world.held = {0: 4, 1: 2}
        world.run(2)
        world.change(replicas=1)
        world.run(2)
        world.change(replicas=2)
        world.held = {}
        world.run(6)
        assert world.condition("Ready") == ("True", "Serving")
        assert world.wanted("Available")["message"] == "2 of 2 rings serve."

    def test_to_zero(self) -> None:
        world = formed()
        world.change(replicas=0)
        world.run(4)
        assert sets(world) == []
        assert world.condition("Available") == ("False", "ScaledToZero")


class TestRollout:
    def roll(self, world: RingWorld) -> None:
        world.change(engine={"startupTimeoutSeconds": 60})

    def test_goes_group_by_group_and_ends(self) -> None:
        world = formed({**RING, "replicas": 3})
        before = uids(world, 0, 1, 2)
        self.roll(world)
        for _ in range(40):
            world.step()
            assert sum(not group.whole for group in world.groups()) <= 1
        assert world.condition("Ready") == ("True", "Serving")
        assert not before & uids(world, 0, 1, 2)
        assert len({group.template for group in world.groups()}) == 1

    def test_a_rank_that_fails_meanwhile_comes_back_as_it_was(self) -> None:
        """A new template in a set whose turn has not come would bring ranks that refuse each other."""
        world = formed({**RING, "replicas": 2})
        world.held = {0: 1, 1: 1}
        self.roll(world)
        world.run(3)
        turn = next(group.number for group in world.groups() if group.draining)
        waiting = 1 - turn
        old = world.group(waiting).template
        world.pods.remove(world.rank(waiting, 2))
        world.run(2)
        assert {rank.template for rank in world.group(waiting).ranks} == {old}

    def test_a_template_that_does_not_come_up_takes_one_group_only(self) -> None:
        world = formed({**RING, "replicas": 3})
        self.roll(world)
        world.step()
        turn = next(group.number for group in world.groups() if group.draining)
        world.down = {(turn, ordinal) for ordinal in range(3)}
        world.run(40)
        assert sum(group.formed for group in world.groups()) == 2
        assert world.condition("Available") == ("True", "MinimumReplicasAvailable")
        assert world.condition("Progressing")[1] == "RollingOut"

    def test_a_template_that_a_group_was_given_up_with_stalls_the_rollout(self) -> None:
        world = formed({**RING, "replicas": 2})
        self.roll(world)
        world.step()
        world.down = {(0, ordinal) for ordinal in range(3)}
        world.run(3)
        world.crash(0, 0, times=6)
        world.run(10)
        assert world.ring_pool()["failedGroups"] == [0]
        assert world.group(1).formed
        assert world.condition("Progressing") == ("False", "RolloutStalled")
        assert "Ring group 0 was given up with the new one" in world.wanted("Progressing")["message"]

    def test_rings_whose_nodes_do_not_answer_are_left_alone(self) -> None:
        """They are not Ready by the cluster's word alone, and all of them at once."""
        world = formed({**RING, "replicas": 2}, read_nodes=True)
        world.down = {(number, ordinal) for number in (0, 1) for ordinal in range(3)}
        world.nodes = {p["spec"]["nodeName"]: NodeView(ready=False, since=world.now) for p in world.pods}
        world.step()
        self.roll(world)
        assert not any(world.step().pod_deletions for _ in range(20))
        world.nodes = {node: NodeView(ready=True, since=world.now) for node in world.nodes}
        world.down.clear()
        for _ in range(40):
            world.step()
            assert sum(not group.whole for group in world.groups()) <= 1
        assert world.condition("Ready") == ("True", "Serving")
        assert len({group.template for group in world.groups()}) == 1

    def test_another_size(self) -> None:
        world = formed({**RING, "replicas": 2})
        world.change(ring={"size": 4})
        world.run(30)
        assert [(group.size, group.members) for group in world.groups()] == [(4, 4), (4, 4)]

    def test_an_operator_upgrade_rolls_nothing(self) -> None:
        world = formed({**RING, "replicas": 2})
        before = uids(world, 0, 1)
        world.settings = world.settings.model_copy(update={"ring_image": "example.com/ring:2"})
        world.run(5)
        assert uids(world, 0, 1) == before

    def test_an_installation_may_ask_for_it(self) -> None:
        world = formed({**RING, "replicas": 2}, rollout_on_upgrade=True)
        before = uids(world, 0, 1)
        world.settings = world.settings.model_copy(update={"ring_image": "example.com/ring:2"})
        world.run(30)
        assert not before & uids(world, 0, 1)

    def test_a_group_that_was_given_up_with_the_last_template_is_in_nobodys_way(self) -> None:
        world = formed({**RING, "replicas": 2}, rollout_on_upgrade=True)
        world.crash(0, 0, times=6)
        world.run(10)
        assert world.ring_pool()["failedGroups"] == [0]
        before = uids(world, 1)
        world.settings = world.settings.model_copy(update={"ring_image": "example.com/ring:2"})
        world.run(30)
        assert world.group(1).whole
        assert not before & uids(world, 1)

    @hypothesis_settings(max_examples=10, deadline=None)
    @given(
        st.integers(1, 3),
        st.lists(st.tuples(st.sampled_from(["roll", "scale", "kill", "mend"]), st.integers(0, 3)), max_size=6),
    )
    def test_whatever_happens_it_settles(self, replicas: int, history: list[tuple[str, int]]) -> None:
        world = formed({**RING, "replicas": replicas})
        for n, (deed, which) in enumerate(history):
            if deed == "roll":
                world.change(engine={"startupTimeoutSeconds": 60 + n})
            elif deed == "scale":
                world.change(replicas=which)
            elif deed == "kill" and any(group.number == which and group.ranks for group in world.groups()):
                world.down.add((which, 1))
            else:
                world.down.clear()
            world.run(2)
        world.down.clear()
        world.run(40)
        assert not world.plan().acts
        assert all(group.whole for group in world.groups())
        assert len(world.groups()) == world.spec["replicas"]


class TestChangeOfMode:
    def serving_paged(self) -> RingWorld:
        world = RingWorld({"model": {"source": "pvc://models"}, "mode": "Paged"})
        world.settle()
        world.counts(replicas=1, ready=1)
        paged = pod("chat-1", ready=True)
        paged["metadata"]["annotations"] = {names.ANNOTATION_CONFIG_HASH: world.plan().config_hash}
        world.pods = [paged]
        world.settle()
        return world

    def test_the_old_pool_serves_until_the_new_one_does(self) -> None:
        world = self.serving_paged()
        client = Ref(Kind.SERVICE, "chat")
        world.change(mode="Ring", ring={"size": 3})
        world.down = {(0, 0)}
        world.run(3)
        assert DEPLOYMENT in world.children
        assert world.children[client]["spec"]["selector"][names.LABEL_POOL] == "paged"
        assert world.condition("Progressing") == ("True", "ChangingMode")
        assert world.condition("Ready") == ("True", "Serving")
        assert [p["kind"] for p in world.status["pools"]] == ["Paged", "Ring"]
        world.down.clear()
        world.run(3)
        assert DEPLOYMENT not in world.children
        assert world.children[client]["spec"]["selector"][names.LABEL_POOL] == "ring"
        assert world.status["mode"] == "Ring"

    def between_three_pods_and_three_rings(self) -> RingWorld:
        """Two of the rings have formed."""
        world = self.serving_paged()
        world.change(replicas=3)
        world.settle()
        world.counts(replicas=3, ready=3)
        world.change(mode="Ring", ring={"size": 3})
        world.down = {(2, 0)}
        world.run(3)
        assert [group.formed for group in world.groups()] == [True, True, False]
        return world

    def test_all_that_is_asked_for_takes_over_not_the_first(self) -> None:
        world = self.between_three_pods_and_three_rings()
        assert DEPLOYMENT in world.children
        text = "Mode Paged serves until mode Ring has its replicas ready: 2 of 3."
        assert world.wanted("Progressing")["message"] == text
        world.down.clear()
        world.run(2)
        assert DEPLOYMENT not in world.children
        assert (world.status["mode"], world.status["readyReplicas"]) == ("Ring", 3)

    def test_as_many_as_the_old_pool_has_left_take_over(self) -> None:
        world = self.between_three_pods_and_three_rings()
        world.counts(replicas=3, ready=2)
        world.settle()
        assert DEPLOYMENT not in world.children
        assert (world.status["mode"], world.status["readyReplicas"]) == ("Ring", 2)

    def test_fewer_that_are_asked_for_take_over_from_more(self) -> None:
        world = self.between_three_pods_and_three_rings()
        world.change(replicas=2)
        world.settle()
        assert DEPLOYMENT not in world.children

    def test_and_back(self) -> None:
        world = formed()
        del world.spec["ring"]
        world.change(mode="Paged")
        world.run(2)
        assert sets(world) == ["chat-ring-0"]
        assert world.condition("Progressing") == ("True", "ChangingMode")
        world.counts(replicas=1, ready=1)
        world.run(2)
        assert sets(world) == []
        assert world.status["mode"] == "Paged"

    def test_ranks_find_rank_0_until_the_last_of_them_is_gone(self) -> None:
        """Those that are told to go wait for its drain, and ask for it by the name that their Service gives."""
        world = formed()
        del world.spec["ring"]
        world.change(mode="Paged")
        world.settle()
        world.counts(replicas=1, ready=1)
        headless = Ref(Kind.SERVICE, "chat-ring-0")
        assert Ref(Kind.STATEFUL_SET, "chat-ring-0") in {deletion.ref for deletion in world.settle().deletions}
        world.pods.clear()
        assert [deletion.ref for deletion in world.plan().deletions] == [headless]

    def test_the_disruption_budget_is_of_the_pods_that_serve(self) -> None:
        world = formed({**RING, "replicas": 2})
        budget = Ref(Kind.PDB, "chat")
        rings = world.children[budget]["spec"]["selector"]
        del world.spec["ring"]
        world.change(mode="Paged")
        world.run(2)
        assert world.children[budget]["spec"]["selector"] == rings
        world.counts(replicas=2, ready=2)
        world.run(2)
        assert world.children[budget]["spec"]["selector"] != rings

    def test_one_that_is_taken_back_rolls_no_pods_that_an_earlier_operator_made(self) -> None:
        world = self.serving_paged()
        before = world.template()
        world.settings = world.settings.model_copy(update={"engine_image": "example.com/vllm:2"})
        world.change(mode="Ring", ring={"size": 3})
        world.down = {(0, 0)}
        world.run(3)
        del world.spec["ring"]
        world.change(mode="Paged")
        world.run(3)
        assert world.template() == before
        assert RING_DATA_KEY not in world.children[CONFIG_MAP]["data"]  # the next ring is made by what there is then

    def test_nor_ranks(self) -> None:
        world = formed()
        before = uids(world, 0)
        world.settings = world.settings.model_copy(update={"ring_image": "example.com/ring:2"})
        del world.spec["ring"]
        world.change(mode="Paged")
        world.run(2)
        world.change(mode="Ring", ring={"size": 3})
        world.run(6)
        assert uids(world, 0) == before
        assert world.group(0).whole
        assert DATA_KEY not in world.children[CONFIG_MAP]["data"]

    def test_what_cannot_come_up_is_told_and_the_old_pool_stays(self) -> None:
        world = self.serving_paged()
        world.change(mode="Ring", ring={"size": 3})
        world.down = {(0, ordinal) for ordinal in range(3)}
        world.run(2)
        world.crash(0, 0)
        world.run(2)
        assert world.condition("Progressing") == ("False", "RolloutStalled")
        assert world.condition("Available") == ("True", "MinimumReplicasAvailable")

    def test_a_paged_service_never_sees_a_ring(self) -> None:
        world = RingWorld(HF)
        world.settle()
        assert sorted(map(str, world.children)) == [
            "ConfigMap chat",
            "Deployment chat",
            "Service chat",
            "Service chat-pods",
        ]
        assert world.children[CONFIG_MAP]["data"]


def test_what_a_ring_cannot_do_is_not_accepted_from_auto() -> None:
    spec: dict[str, Any] = {**HF, "context": {"maxTokens": 200_000}, "engine": {"blockSize": 16}, "ring": {"size": 2}}
    world = RingWorld(spec)
    accepted = world.wanted("Accepted")
    assert accepted["reason"] == "UnsupportedByRing"
    assert "engine.blockSize, an hf:// model.source" in accepted["message"]


@pytest.mark.parametrize("bound", [{"reservation": "Worst"}, {"kvHardCapPercent": 90}, {"kvPeakPercent": 100}])
def test_bounds_on_kv_memory_that_no_ring_keeps_are_not_accepted(bound: dict[str, Any]) -> None:
    accepted = RingWorld({**RING, "admission": {"policy": "Enforce", **bound}}).wanted("Accepted")
    assert accepted["reason"] == "UnsupportedByRing"
    assert f"does not take admission.{next(iter(bound))}: remove that" in accepted["message"]
    assert RingWorld({**RING, "admission": {"policy": "Observe"}}).wanted("Accepted")["reason"] == "Valid"


def test_what_a_ring_takes_is_told_without_the_cap_of_paged_replicas() -> None:
    assert formed().ring_pool()["maxContextTokens"] == 4096  # as its engine says


@pytest.mark.parametrize(
    ("ring", "reason", "text"),
    [
        ({"size": 2}, "ContextExceedsCapacity", "needs 4 ranks, and ring.size is 2. Set ring.size to 4"),
        ({"size": 4}, "Valid", ""),
        ({"size": 4, "recovery": {"reserve": "Survive"}}, "ContextExceedsCapacity", "needs 5 ranks"),
    ],
)
def test_a_ring_that_is_too_small_is_not_accepted(ring: dict[str, Any], reason: str, text: str) -> None:
    facts = {"layers": 32, "kvHeads": 8, "headDim": 128, "parameters": 8_000_000_000, "acceleratorMemory": "80Gi"}
    spec = {
        "model": {"source": "pvc://m", "facts": facts},
        "context": {"maxTokens": 1_000_000},
        "mode": "Ring",
        "ring": ring,
    }
    accepted = RingWorld(spec).wanted("Accepted")
    assert accepted["reason"] == reason
    assert text in accepted["message"]
