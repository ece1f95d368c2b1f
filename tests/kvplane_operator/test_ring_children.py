"""The children of rings: what the ring engine expects of the pods it runs in."""

from typing import Any

import pytest

from kvplane_api import capacity, names
from kvplane_operator.plan.snapshot import Kind, Manifest, Ref
from kvplane_runtime.ring import settings as engine_settings
from kvplane_runtime.sidecar.__main__ import parse
from kvplane_runtime.sidecar.leader import rank_0
from tests.kvplane_operator.ring_world import RING, RingWorld, with_ring
from tests.kvplane_operator.world import CONFIG_MAP, PDB


def made(spec: dict[str, Any] | None = None, **values: Any) -> RingWorld:
    world = RingWorld(spec or RING, **values)
    world.step()
    return world


def template(world: RingWorld, number: int = 0) -> dict[str, Any]:
    return dict(world.stateful_set(number)["spec"]["template"])


def container(world: RingWorld, name: str, kind: str = "containers") -> dict[str, Any]:
    (found,) = (c for c in template(world)["spec"][kind] if c["name"] == name)
    return dict(found)


def environment(world: RingWorld) -> dict[str, str]:
    """The engine's variables, as the kubelet of rank 1 of group 0 would fill them in."""
    fields = {"status.podIP": "10.0.0.7", "metadata.uid": "uid-7"}
    return {
        v["name"]: fields[v["valueFrom"]["fieldRef"]["fieldPath"]] if "valueFrom" in v else v["value"]
        for v in container(world, "engine")["env"]
    }


def labels(child: Manifest) -> dict[str, str]:
    return dict(child["spec"]["template"]["metadata"]["labels"])


class TestChildren:
    def test_of_two_groups(self) -> None:
        assert sorted(map(str, made({**RING, "replicas": 2}).children)) == [
            "ConfigMap chat",
            "PodDisruptionBudget chat",
            "Service chat",
            "Service chat-pods",
            "Service chat-ring-0",
            "Service chat-ring-1",
            "StatefulSet chat-ring-0",
            "StatefulSet chat-ring-1",
        ]

    def test_a_group_starts_all_ranks_at_once_and_changes_only_when_told(self) -> None:
        spec = made().stateful_set(0)["spec"]
        assert (spec["replicas"], spec["podManagementPolicy"]) == (3, "Parallel")
        assert spec["updateStrategy"] == {"type": "OnDelete"}

    def test_a_group_selects_its_own_pods(self) -> None:
        world = made({**RING, "replicas": 2})
        selectors = [world.stateful_set(n)["spec"]["selector"]["matchLabels"] for n in (0, 1)]
        assert selectors[0] != selectors[1]
        for number, selector in enumerate(selectors):
            assert selector.items() <= labels(world.stateful_set(number)).items()

    def test_ranks_find_rank_0_long_before_it_is_ready(self) -> None:
        world = made()
        service = world.children[Ref(Kind.SERVICE, "chat-ring-0")]["spec"]
        assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
        assert service["selector"].items() <= labels(world.stateful_set(0)).items()
        assert world.stateful_set(0)["spec"]["serviceName"] == "chat-ring-0"

    @pytest.mark.parametrize("name", ["chat", "chat-pods"])
    def test_clients_are_led_to_rank_0_of_each_group(self, name: str) -> None:
        selector = made().children[Ref(Kind.SERVICE, name)]["spec"]["selector"]
        assert selector == {
            names.LABEL_SERVICE: "chat",
            names.LABEL_POOL: "ring",
            "apps.kubernetes.io/pod-index": "0",
        }

    def test_one_budget_over_all_ranks(self) -> None:
        world = made({**RING, "replicas": 2})
        spec = world.children[PDB]["spec"]
        assert spec["maxUnavailable"] == 1
        assert spec["selector"]["matchLabels"].items() <= labels(world.stateful_set(0)).items()
        assert spec["selector"]["matchLabels"].items() <= labels(world.stateful_set(1)).items()

    def test_a_rank_of_a_ring_that_forms_anew_is_no_free_game(self) -> None:
        """It is not Ready for some seconds, and holds KV: AlwaysAllow would let a drain take it."""
        assert made().children[PDB]["spec"]["unhealthyPodEvictionPolicy"] == "IfHealthyBudget"

    @pytest.mark.parametrize(
        ("fields", "there"), [({}, True), ({"disruption": {"pdb": "Off"}}, False), ({"replicas": 0}, False)]
    )
    def test_budget(self, fields: dict[str, Any], there: bool) -> None:
        assert (PDB in made({**RING, **fields}).children) is there

    def test_all_belong_to_the_service(self) -> None:
        for child in made().children.values():
            assert child["metadata"]["ownerReferences"][0]["uid"] == "uid-of-chat"
            assert child["metadata"]["labels"][names.LABEL_SERVICE] == "chat"


class TestEngine:
    def test_takes_the_environment_as_it_is(self) -> None:
        """The engine's own reader says what it makes of a pod of ours."""
        found = engine_settings.from_environment(environment(made()), hostname="chat-ring-0-1")
        assert (found.world_size, found.ordinal) == (3, 1)
        assert found.leader == "chat-ring-0-0.chat-ring-0"
        assert (found.address, found.pod) == ("10.0.0.7", "uid-7")
        assert (str(found.model), found.served_name) == ("/models", "chat")
        assert (found.host, found.port) == ("127.0.0.1", names.PORT_ENGINE)
        assert found.worker_port == names.PORT_ENGINE
        assert (found.store_port, found.control_port) == (names.PORT_RING_STORE, names.PORT_RING_CONTROL)
        assert found.kv_percent == capacity.RING_KV_PERCENT  # by which the operator plans the ring
        assert found.context_tokens is None

    def test_reads_the_promised_time_where_the_sidecar_does(self) -> None:
        found = engine_settings.from_environment(environment(made()), hostname="chat-ring-0-1")
        sidecar = container(made(), names.CONTAINER_SIDECAR, "initContainers")
        assert str(found.config_file) in {v.get("value") for v in sidecar["env"]}
        mounts = container(made(), "engine")["volumeMounts"]
        assert [m for m in mounts if m["name"] == "sidecar-config"] == [
            {"name": "sidecar-config", "mountPath": "/etc/kvplane/sidecar", "readOnly": True}
        ]

    def test_is_told_what_the_spec_says(self) -> None:
        spec = with_ring(size=4, windowTokens=4096, recovery={"reserve": "Survive"})
        spec |= {
            "engine": {"dtype": "bfloat16", "maxSequences": 8},
            "model": {"source": "pvc://m/qwen", "servedName": "q"},
            "context": {"maxTokens": 90_000},
        }
        found = engine_settings.from_environment(environment(made(spec)), hostname="chat-ring-0-1")
        assert (found.world_size, found.window_tokens, found.reserve) == (4, 4096, "Survive")
        assert (found.dtype, found.max_sequences, found.context_tokens) == ("bfloat16", 8, 90_000)
        assert (str(found.model), found.served_name) == ("/models/qwen", "q")

    def test_stops_within_the_margin_after_the_drain(self) -> None:
        found = engine_settings.from_environment(environment(made()), hostname="chat-ring-0-1")
        assert found.drain_seconds < names.TERMINATION_MARGIN_SECONDS

    def test_is_the_ring_engine(self) -> None:
        engine = container(made(), "engine")
        assert (engine["command"], engine["args"]) == (["kvplane-ring"], ["serve"])
        assert engine["image"] == "example.com/ring:1"
        assert container(made(with_ring(image="me/ring:2")), "engine")["image"] == "me/ring:2"

    def test_a_users_variable_never_changes_which_ring_it_is(self) -> None:
        world = made({**RING, "engine": {"env": [{"name": "NCCL_DEBUG", "value": "WARN"}]}})
        assert environment(world)["NCCL_DEBUG"] == "WARN"
        assert environment(world)["WORLD_SIZE"] == "3"

    @pytest.mark.parametrize(
        ("spec", "limits", "device"),
        [
            (RING, {"nvidia.com/gpu": "1"}, "cuda"),
            (
                {**RING, "engine": {"resources": {"limits": {"memory": "9Gi"}}}},
                {"memory": "9Gi", "nvidia.com/gpu": "1"},
                "cuda",
            ),
            (
                with_ring(resources={"limits": {"nvidia.com/gpu": 0, "cpu": 2}}),
                {"nvidia.com/gpu": "0", "cpu": "2"},
                "cpu",
            ),
        ],
    )
    def test_asks_for_one_accelerator_and_computes_on_it(
        self, spec: dict[str, Any], limits: dict[str, str], device: str
    ) -> None:
        world = made(dict(spec))
        assert container(world, "engine")["resources"]["limits"] == limits
        assert engine_settings.from_environment(environment(world), hostname="chat-ring-0-1").device == device

    def test_has_the_same_sidecar_in_every_rank(self) -> None:
        sidecar = container(made(), names.CONTAINER_SIDECAR, "initContainers")
        assert sidecar["restartPolicy"] == "Always"
        engine = container(made(), "engine")
        assert engine["lifecycle"]["preStop"]["httpGet"]["path"] == "/drain"
        assert "ports" not in engine

    def test_the_sidecar_knows_that_it_fronts_a_rank_and_where_rank_0_is(self) -> None:
        """The sidecar's own reader says what it makes of rank 1 of group 0."""
        sidecar = container(made(), names.CONTAINER_SIDECAR, "initContainers")
        fields = {"metadata.name": "chat-ring-0-1", "metadata.namespace": "team"}
        told = {
            v["name"]: fields[v["valueFrom"]["fieldRef"]["fieldPath"]] if "valueFrom" in v else v["value"]
            for v in sidecar["env"]
        }
        found = parse([], told)
        assert found.ring
        assert rank_0(found.pod) == "chat-ring-0-0.chat-ring-0"

    def test_publishes_no_kv_events(self) -> None:
        assert '"kvEvents": false' in made().children[CONFIG_MAP]["data"][names.FILE_SIDECAR_CONFIG]


class TestPlacement:
    def test_ranks_of_one_ring_keep_apart(self) -> None:
        (rule,) = template(made())["spec"]["topologySpreadConstraints"]
        assert rule["whenUnsatisfiable"] == "ScheduleAnyway"
        assert rule["labelSelector"]["matchLabels"][names.LABEL_GROUP] == "0"

    def test_required_never_puts_two_on_a_node(self) -> None:
        pod = template(made(with_ring(spread="Required")))["spec"]
        (rule,) = pod["affinity"]["podAntiAffinity"]["requiredDuringSchedulingIgnoredDuringExecution"]
        assert rule["topologyKey"] == "kubernetes.io/hostname"
        assert rule["labelSelector"]["matchLabels"][names.LABEL_GROUP] == "0"
        assert "topologySpreadConstraints" not in pod

    def test_a_lost_node_is_waited_for_as_long_as_asked(self) -> None:
        pod = template(made(with_ring(recovery={"reformGraceSeconds": 7})))["spec"]
        assert {(t["key"], t["effect"], t["tolerationSeconds"]) for t in pod["tolerations"]} == {
            ("node.kubernetes.io/not-ready", "NoExecute", 7),
            ("node.kubernetes.io/unreachable", "NoExecute", 7),
        }

    def test_a_users_tolerations_come_beside_them(self) -> None:
        gpu = {"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoSchedule"}
        pod = template(made({**RING, "podTemplate": {"spec": {"tolerations": [gpu]}}}))["spec"]
        assert gpu in pod["tolerations"]
        assert len(pod["tolerations"]) == 3

    @pytest.mark.parametrize(
        "overlay",
        [
            {"affinity": None},
            {"affinity": {"podAntiAffinity": None}},
            {"affinity": {"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": None}}},
            {"topologySpreadConstraints": None},
        ],
    )
    def test_a_null_of_the_user_takes_a_rule_away(self, overlay: dict[str, Any]) -> None:
        """As charts write it that render a value which is not set."""
        world = made({**RING, "podTemplate": {"spec": overlay}})
        kept = "affinity" in overlay  # ranks are kept apart by the other one here
        assert bool(template(world)["spec"]["topologySpreadConstraints"]) == kept
        assert template(world)["metadata"]["labels"][names.LABEL_GROUP] == "0"


class TestTemplate:
    def hash(self, world: RingWorld, number: int = 0) -> str:
        return str(template(world, number)["metadata"]["annotations"][names.ANNOTATION_TEMPLATE_HASH])

    def test_all_groups_have_one(self) -> None:
        world = made({**RING, "replicas": 2})
        assert self.hash(world, 0) == self.hash(world, 1)

    @pytest.mark.parametrize(
        "spec",
        [
            with_ring(size=4),
            with_ring(windowTokens=2048),
            with_ring(recovery={"reserve": "Survive"}),
            with_ring(recovery={"reformGraceSeconds": 60}),
            with_ring(spread="Required"),
            {**RING, "engine": {"startupTimeoutSeconds": 60}},
            {**RING, "context": {"maxTokens": 90_000}},
        ],
    )
    def test_changes_with_what_ranks_depend_on(self, spec: dict[str, Any]) -> None:
        assert self.hash(made(spec)) != self.hash(made())

    @pytest.mark.parametrize(
        "spec",
        [
            with_ring(recovery={"restartBudget": 9, "budgetWindowSeconds": 60}),
            {**RING, "replicas": 2},
            {**RING, "slo": {"ttftMilliseconds": 500}},
            {**RING, "disruption": {"pdb": "Off"}},
        ],
    )
    def test_is_the_same_where_they_do_not(self, spec: dict[str, Any]) -> None:
        assert self.hash(made(spec)) == self.hash(made())
