"""Plans against a world that carries them out: idempotent, healing, and never rolling a pod without being asked."""

import copy
import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from kvplane_api import names
from kvplane_api.wire import EngineConfig, SidecarConfig
from kvplane_operator.plan import pods
from kvplane_operator.plan.engine_args import KV_EVENTS_FLAG
from kvplane_operator.plan.record import DATA_KEY, RING_DATA_KEY
from kvplane_operator.plan.snapshot import Blocked, Kind, Obstacle, Ref
from kvplane_operator.plan.status import status_patch
from tests.kvplane_operator.specs import specs
from tests.kvplane_operator.world import CONFIG_MAP, DEPLOYMENT, HF, PDB, World, engine, pod, settings, settled


def config(world: World) -> dict[str, Any]:
    held: dict[str, Any] = json.loads(world.children[CONFIG_MAP]["data"][names.FILE_SIDECAR_CONFIG])
    return held


class TestChildren:
    def test_of_the_smallest_service(self) -> None:
        assert sorted(map(str, settled().children)) == [
            "ConfigMap chat",
            "Deployment chat",
            "Service chat",
            "Service chat-pods",
        ]

    def test_all_are_owned_so_that_they_go_with_the_service(self) -> None:
        for child in settled({**HF, "replicas": 2}).children.values():
            (owner,) = child["metadata"]["ownerReferences"]
            assert (owner["uid"], owner["controller"]) == ("uid-of-chat", True)
            assert child["metadata"]["labels"][names.LABEL_SERVICE] == "chat"
            assert child["metadata"]["namespace"] == "team"

    def test_services_lead_to_the_sidecar(self) -> None:
        world = settled()
        for name, address in (("chat", None), ("chat-pods", "None")):
            spec = world.children[Ref(Kind.SERVICE, name)]["spec"]
            assert spec["ports"][0]["targetPort"] == names.PORT_SERVING
            assert spec.get("clusterIP") == address
            assert spec["selector"].items() <= world.template()["metadata"]["labels"].items()

    def test_deployment_selects_its_pods(self) -> None:
        world = settled()
        selector = world.children[DEPLOYMENT]["spec"]["selector"]["matchLabels"]
        assert selector.items() <= world.template()["metadata"]["labels"].items()

    def test_rollouts_outlast_the_start(self) -> None:
        world = settled({**HF, "engine": {"startupTimeoutSeconds": 7200}})
        assert world.children[DEPLOYMENT]["spec"]["progressDeadlineSeconds"] > 7200

    def test_rollout_never_lowers_capacity_by_default(self) -> None:
        strategy = settled().children[DEPLOYMENT]["spec"]["strategy"]["rollingUpdate"]
        assert strategy == {"maxSurge": 1, "maxUnavailable": 0}

    @pytest.mark.parametrize(
        ("replicas", "pdb", "made"), [(1, "Auto", False), (2, "Auto", True), (2, "Off", False), (0, "Auto", False)]
    )
    def test_disruption_budget(self, replicas: int, pdb: str, made: bool) -> None:
        world = settled({**HF, "replicas": replicas, "disruption": {"pdb": pdb}})
        assert (PDB in world.children) is made
        if made:
            spec = world.children[PDB]["spec"]
            assert (spec["maxUnavailable"], spec["unhealthyPodEvictionPolicy"]) == (1, "AlwaysAllow")

    def test_a_child_that_is_not_wanted_any_more_goes(self) -> None:
        world = settled({**HF, "replicas": 2})
        held = world.children[PDB]["metadata"]
        world.change(replicas=1)
        (deletion,) = world.plan().deletions
        assert (deletion.ref, deletion.uid, deletion.resource_version) == (PDB, held["uid"], held["resourceVersion"])

    def test_a_child_that_is_going_already_is_left_alone(self) -> None:
        world = settled({**HF, "replicas": 2})
        world.change(replicas=1)
        world.children[PDB]["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
        assert world.plan().deletions == ()


class TestNothingRollsUnasked:
    def changes(self, world: World) -> bool:
        before = world.template()
        world.settle()
        return world.template() != before

    def test_scaling_does_not_touch_the_template(self) -> None:
        world = settled()
        world.change(replicas=5)
        assert not self.changes(world)
        assert world.children[DEPLOYMENT]["spec"]["replicas"] == 5

    @pytest.mark.parametrize(
        "fields",
        [
            {"mode": "Paged"},
            {"slo": {"ttftMilliseconds": 500}},
            {"admission": {"maxBodyBytes": 2048, "policy": "Off", "queue": {"maxRequests": 1}}},
            {"rollout": {"maxSurge": 3}},
            {"autoscaling": {"policy": "Native", "maxReplicas": 8}},
            {"disruption": {"pdb": "Off"}},
            {"context": {"ringThresholdTokens": 200_000}},
            {"engine": {}},
        ],
    )
    def test_what_pods_do_not_depend_on(self, fields: dict[str, Any]) -> None:
        world = settled()
        world.change(**fields)
        assert not self.changes(world)

    @pytest.mark.parametrize(
        "fields",
        [
            {"model": {"source": "hf://acme/other"}},
            {"engine": {"image": "example.com/vllm:2"}},
            {"disruption": {"drainSeconds": 30}},
            {"podTemplate": {"metadata": {"labels": {"a": "b"}}}},
            {"context": {"maxTokens": 1024}},
        ],
    )
    def test_what_pods_depend_on_rolls(self, fields: dict[str, Any]) -> None:
        world = settled()
        world.change(**fields)
        assert self.changes(world)

    def test_facts_change_nothing_that_runs(self) -> None:
        world = settled()
        facts = {"layers": 1, "kvHeads": 1, "headDim": 64, "parameters": 1, "acceleratorMemory": "80Gi"}
        world.change(model={**HF["model"], "facts": facts})
        assert not self.changes(world)

    def upgrade(self, world: World, monkeypatch: pytest.MonkeyPatch, **values: Any) -> None:
        monkeypatch.setattr("kvplane_operator.plan.children.TEMPLATE_REVISION", pods.TEMPLATE_REVISION + 1)
        monkeypatch.setattr(pods, "_STARTUP_PERIOD_SECONDS", 7)
        world.settings = settings(sidecar_image="example.com/control:2", engine_image="example.com/vllm:2", **values)

    def test_an_operator_upgrade_keeps_every_pod(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = settled()
        self.upgrade(world, monkeypatch, accelerator="amd.com/gpu")
        assert world.plan().writes == ()

    def test_after_an_upgrade_the_next_change_of_the_spec_brings_the_new_template(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        world = settled()
        self.upgrade(world, monkeypatch)
        world.change(replicas=3)
        assert not self.changes(world)
        world.change(engine={"blockSize": 32})
        assert self.changes(world)
        assert engine(world)["image"] == "example.com/vllm:2"
        assert engine(world)["startupProbe"]["periodSeconds"] == 7

    def test_an_installation_may_ask_for_a_rollout_on_upgrade(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = settled(rollout_on_upgrade=True)
        assert world.plan().writes == ()
        self.upgrade(world, monkeypatch, rollout_on_upgrade=True)
        assert self.changes(world)
        assert world.plan().writes == ()

    def test_such_an_installation_rolls_out_every_default(self) -> None:
        world = settled(rollout_on_upgrade=True)
        world.settings = settings(rollout_on_upgrade=True, image_pull_policy="Always")
        assert self.changes(world)
        assert engine(world)["imagePullPolicy"] == "Always"

    def test_a_record_changed_by_hand_is_rendered_again_and_equal(self) -> None:
        world = settled()
        data = world.children[CONFIG_MAP]["data"]
        data[DATA_KEY] = data[DATA_KEY].replace("example.com/vllm:1", "example.com/evil:1")
        before = world.template()
        (write,) = world.settle().writes
        assert (write.ref, world.template()) == (CONFIG_MAP, before)

    def test_a_lost_config_map_comes_back_with_the_same_template(self) -> None:
        world = settled()
        del world.children[CONFIG_MAP]
        assert [write.ref for write in world.settle().writes] == [CONFIG_MAP]


class TestSidecarConfiguration:
    def test_of_the_smallest_service(self) -> None:
        assert SidecarConfig.model_validate(config(settled())) == SidecarConfig(
            served_name="chat", engine=EngineConfig(kv_events=True)
        )

    def test_what_is_set_reaches_the_config_map(self) -> None:
        spec = {
            **HF,
            "slo": {"ttftMilliseconds": 500, "tpotMilliseconds": 30},
            "admission": {
                "policy": "Observe",
                "reservation": "Worst",
                "kvHardCapPercent": 90,
                "kvPeakPercent": 95,
                "queue": {"maxRequests": 8, "maxWaitSeconds": 3},
                "fairness": {"header": "x-tenant", "tokensPerSecond": 1000},
                "priorities": ["interactive", "batch"],
                "maxBodyBytes": 4096,
            },
            "disruption": {"drainSeconds": 30},
            "engine": {"maxBatchedTokens": 2048, "maxSequences": 64, "speculative": {"method": "Ngram", "tokens": 3}},
        }
        assert config(settled(spec)) == {
            "schemaVersion": 1,
            "servedName": "chat",
            "drainSeconds": 30,
            "maxBodyBytes": 4096,
            "slo": {"ttftMilliseconds": 500, "tpotMilliseconds": 30},
            "admission": {
                "policy": "Observe",
                "reservation": "Worst",
                "kvHardCapPercent": 90,
                "kvPeakPercent": 95,
                "queue": {"maxRequests": 8, "maxWaitSeconds": 3},
                "fairness": {"header": "x-tenant", "tokensPerSecond": 1000},
                "priorities": ["interactive", "batch"],
            },
            "engine": {
                "maxBatchedTokens": 2048,
                "maxSequences": 64,
                "speculativeTokens": 3,
                "prefixCaching": True,
                "kvEvents": True,
            },
        }

    def test_a_change_touches_pods_once_the_config_map_has_it(self) -> None:
        world = settled()
        fresh = pod("chat-1", ready=True)
        fresh["metadata"]["annotations"] = {names.ANNOTATION_CONFIG_HASH: world.plan().config_hash}
        gone = pod("chat-2")
        gone["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
        world.pods = [fresh, gone]
        assert world.plan().touched_pods == ()
        world.change(admission={"maxBodyBytes": 4096})
        assert world.plan().touched_pods == ()  # the ConfigMap first, else the kubelet syncs the old one
        world.settle()
        assert world.plan().touched_pods == ("chat-1",)


class TestKVEvents:
    @staticmethod
    def of_an_earlier_version(monkeypatch: pytest.MonkeyPatch, **settings: Any) -> World:
        """A service whose pods were rendered before there were KV events."""
        with monkeypatch.context() as earlier:
            earlier.setattr("kvplane_operator.plan.engine_args.publishes_kv_events", lambda _: False)
            earlier.setattr("kvplane_operator.plan.children.TEMPLATE_REVISION", 1)
            return settled(**settings)

    def test_running_services_keep_what_they_have(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = self.of_an_earlier_version(monkeypatch)
        assert world.plan().writes == ()
        assert config(world)["engine"]["kvEvents"] is False  # what their sidecars are told is what their engines do
        world.change(replicas=3, admission={"policy": "Observe"})
        world.settle()
        assert KV_EVENTS_FLAG not in engine(world)["args"]
        assert config(world)["engine"]["kvEvents"] is False

    def test_their_next_rollout_brings_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = self.of_an_earlier_version(monkeypatch)
        world.change(engine={"blockSize": 32})
        world.settle()
        assert KV_EVENTS_FLAG in engine(world)["args"]
        assert config(world)["engine"]["kvEvents"] is True

    def test_an_upgrade_that_may_roll_brings_them(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = self.of_an_earlier_version(monkeypatch, rollout_on_upgrade=True)
        world.settle()
        assert KV_EVENTS_FLAG in engine(world)["args"]
        assert world.plan().writes == ()


class TestHealing:
    def test_a_deleted_child_is_written_again(self) -> None:
        world = settled()
        service = Ref(Kind.SERVICE, "chat")
        del world.children[service]
        (write,) = world.plan().writes
        assert (write.ref, write.exists, write.why) == (service, False, "missing")

    def test_a_changed_child_says_where(self) -> None:
        world = settled()
        world.children[DEPLOYMENT]["spec"]["replicas"] = 7
        (write,) = world.plan().writes
        assert (write.ref, write.exists, write.uid) == (DEPLOYMENT, True, world.children[DEPLOYMENT]["metadata"]["uid"])
        assert write.why == ".spec.replicas was changed by another writer"

    def test_what_others_add_is_theirs(self) -> None:
        world = settled()
        world.children[DEPLOYMENT]["metadata"]["annotations"]["deployment.kubernetes.io/revision"] = "1"
        world.children[DEPLOYMENT]["metadata"]["labels"]["team"] = "a"
        world.children[Ref(Kind.SERVICE, "chat")]["spec"]["clusterIPs"] = ["10.0.0.1"]
        assert world.plan().writes == ()

    @given(specs, st.data())
    def test_any_owned_value_that_changes_is_found(self, spec: dict[str, Any], data: st.DataObject) -> None:
        world = settled(spec)
        ref = data.draw(st.sampled_from(sorted(world.children)))
        path = data.draw(st.sampled_from(list(scalars(world.plan_of(ref)))))
        node: Any = world.children[ref]
        for part in path[:-1]:
            node = node[part]
        node[path[-1]] = "changed by hand" if isinstance(node[path[-1]], str) else 123_456_789
        assert [write.ref for write in world.plan().writes][:1] == [ref]


@given(specs)
def test_a_plan_carried_out_leaves_nothing_to_do(spec: dict[str, Any]) -> None:
    world = World(spec)
    assert {write.ref for write in world.settle().writes} == set(world.children)
    plan = world.plan()
    assert (plan.writes, plan.deletions, plan.touched_pods) == ((), (), ())
    world.settle()
    assert status_patch(world.status, world.plan().status) == {}


@hypothesis_settings(max_examples=25)
@given(st.lists(specs, min_size=2, max_size=4))
def test_children_depend_on_the_last_spec_only(history: list[dict[str, Any]]) -> None:
    world = World(history[0])
    world.settle()
    for spec in history[1:]:
        world.spec = copy.deepcopy(spec)
        world.generation += 1
        world.settle()
    fresh = settled(history[-1])
    assert {ref: _content(child) for ref, child in world.children.items()} == {
        ref: _content(child) for ref, child in fresh.children.items()
    }


@given(specs)
def test_a_plan_changes_nothing_it_was_given(spec: dict[str, Any]) -> None:
    world = settled(spec)
    snapshot = world.snapshot()
    before = copy.deepcopy(snapshot)
    world.plan()
    assert snapshot == before


class TestWakeUp:
    @pytest.mark.parametrize(("obstacle", "seconds"), [("conflict", 30.0), ("leftover", 1.0), ("rejected", 30.0)])
    def test_what_is_in_the_way_is_looked_at_again(self, obstacle: str, seconds: float) -> None:
        world = settled()
        world.blocked = (Blocked(DEPLOYMENT, Obstacle(obstacle), "in the way", generation=1),)
        assert world.plan().wake_after_seconds == seconds

    def test_else_only_events_matter(self) -> None:
        assert settled().plan().wake_after_seconds is None


def _content(child: dict[str, Any]) -> dict[str, Any]:
    """A child without bookkeeping: hashes, and the record, which keeps the template's first configuration hash."""
    content = {key: copy.deepcopy(child[key]) for key in child if key not in ("metadata", "status")}
    for key in (DATA_KEY, RING_DATA_KEY):
        content.get("data", {}).pop(key, None)
    if template := content.get("spec", {}).get("template"):
        del template["metadata"]["annotations"][names.ANNOTATION_CONFIG_HASH]
    return content


def scalars(node: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of values that can be changed in place, apart from those that identify an item of a keyed list."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from scalars(value, (*path, key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from scalars(value, (*path, index))
    else:
        yield path
