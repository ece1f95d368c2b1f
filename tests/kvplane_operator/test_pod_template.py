"""What every engine pod keeps to, whatever the spec says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.cluster.controlplane import ControlPlane
from kvplane_api import names
from tests.kvplane_operator.world import World, engine, settled, sidecar

SAMPLES = Path(__file__).resolve().parents[2] / "docs" / "samples"
SOURCES = {
    "hf": {"model": {"source": "hf://acme/tiny@v1"}},
    "pvc": {"model": {"source": "pvc://models/tiny"}},
    "oci": {"model": {"source": "oci://example.com/models/tiny:1"}},
    "path": {"model": {"source": "path:///srv/models/tiny"}},
}
SPECS: dict[str, dict[str, Any]] = {
    **SOURCES,
    **{
        sample.stem: next(o["spec"] for o in yaml.safe_load_all(sample.read_text()) if o["kind"] == names.KIND)
        for sample in sorted(SAMPLES.glob("*.yaml"))
        if not sample.stem.startswith("ring")  # test_ring_children
    },
    "hub with token and claim": {
        "model": {
            "source": "hf://acme/tiny",
            "tokenSecretRef": {"name": "hub"},
            "cache": {"claimName": "models"},
        }
    },
    "overlay": {
        "model": {"source": "hf://acme/tiny"},
        "podTemplate": {"spec": {"containers": [{"name": "logger", "image": "logger:1"}], "nodeSelector": {"a": "b"}}},
    },
}


@pytest.fixture(params=sorted(SPECS))
def world(request: pytest.FixtureRequest) -> World:
    return settled(SPECS[request.param], allow_path_sources=True)


def argument(world: World, flag: str) -> str:
    args = engine(world)["args"]
    return str(args[args.index(flag) + 1])


def volumes(world: World) -> dict[str, Any]:
    return {volume["name"]: volume for volume in world.template()["spec"]["volumes"]}


def test_samples_are_accepted() -> None:
    for sample in SAMPLES.glob("*.yaml"):
        for document in yaml.safe_load_all(sample.read_text()):
            if document["kind"] == names.KIND:
                assert World(document["spec"]).condition("Accepted") == ("True", "Valid"), sample.stem


def test_engine_listens_on_loopback_only(world: World) -> None:
    args = engine(world)["args"]
    assert argument(world, "--host") == "127.0.0.1"
    assert argument(world, "--port") == str(names.PORT_ENGINE)
    assert [args.count(flag) for flag in ("--host", "--port")] == [1, 1]
    assert "ports" not in engine(world)


def test_sidecar_is_native_and_first(world: World) -> None:
    first = world.template()["spec"]["initContainers"][0]
    assert (first["name"], first["restartPolicy"]) == (names.CONTAINER_SIDECAR, "Always")
    assert {port["containerPort"] for port in first["ports"]} == {names.PORT_SERVING, names.PORT_ADMIN}


def test_sidecar_never_waits_for_the_engine(world: World) -> None:
    assert sidecar(world)["startupProbe"]["httpGet"]["path"] == "/healthz"
    assert sidecar(world)["readinessProbe"]["httpGet"]["path"] == "/ready"


def test_the_engines_stop_asks_the_sidecar_to_drain(world: World) -> None:
    hook = engine(world)["lifecycle"]["preStop"]["httpGet"]
    assert (hook["path"], hook["port"]) == ("/drain", names.PORT_ADMIN)


def test_grace_covers_the_drain() -> None:
    world = settled({"model": {"source": "hf://a/b"}, "disruption": {"drainSeconds": 90}})
    assert world.template()["spec"]["terminationGracePeriodSeconds"] == 5 + 90 + 15


def test_an_engine_that_starts_can_be_told_to_stop(world: World) -> None:
    """By its sidecar, which sees it then; e2e/tests/test_drain.py shows that it goes."""
    assert world.template()["spec"]["shareProcessNamespace"] is True


def test_engine_probes_go_through_the_sidecar_with_a_grace_of_their_own(world: World) -> None:
    for probe, path in (("startupProbe", "/engine/startup"), ("livenessProbe", "/engine/live")):
        found = engine(world)[probe]
        assert (found["httpGet"]["path"], found["httpGet"]["port"]) == (path, names.PORT_ADMIN)
        assert found["terminationGracePeriodSeconds"] == 10  # else a hung engine would wait for a whole drain
    assert "readinessProbe" not in engine(world)


@pytest.mark.parametrize("seconds", [10, 11, 3600])
def test_startup_probe_lasts_as_long_as_asked(seconds: int) -> None:
    probe = engine(settled({"model": {"source": "hf://a/b"}, "engine": {"startupTimeoutSeconds": seconds}}))[
        "startupProbe"
    ]
    assert seconds <= probe["periodSeconds"] * probe["failureThreshold"] < seconds + probe["periodSeconds"]


def test_liveness_outlasts_a_restart_of_the_sidecar(world: World) -> None:
    probe = engine(world)["livenessProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] >= 60


def test_last_log_lines_reach_the_status(world: World) -> None:
    for container in (engine(world), sidecar(world)):
        assert container["terminationMessagePolicy"] == "FallbackToLogsOnError"


def test_pods_hold_no_token(world: World) -> None:
    assert world.template()["spec"]["automountServiceAccountToken"] is False


def test_shared_memory_is_memory(world: World) -> None:
    mount = next(m for m in engine(world)["volumeMounts"] if m["mountPath"] == "/dev/shm")
    assert volumes(world)[mount["name"]]["emptyDir"] == {"medium": "Memory"}


def test_sidecar_sees_its_configuration_only(world: World) -> None:
    """The recorded template lies in the same ConfigMap; and a subPath would never be updated."""
    mounted = volumes(world)["sidecar-config"]["configMap"]
    assert [item["key"] for item in mounted["items"]] == [names.FILE_SIDECAR_CONFIG]
    mount = next(m for m in sidecar(world)["volumeMounts"] if m["name"] == "sidecar-config")
    assert "subPath" not in mount


def test_engine_and_sidecar_share_the_sockets_of_kv_events(world: World) -> None:
    """A socket is written to by who connects, so both have the same user."""
    mounts = [
        mount for c in (engine(world), sidecar(world)) for mount in c["volumeMounts"] if mount["name"] == "kv-events"
    ]
    assert [mount["mountPath"] for mount in mounts] == [names.PATH_KV_EVENTS] * 2
    assert volumes(world)["kv-events"]["emptyDir"] == {}
    assert world.template()["spec"]["securityContext"]["runAsUser"] == 65532
    assert not any("runAsUser" in c["securityContext"] for c in (engine(world), sidecar(world)))


def test_without_kv_events_there_is_no_volume_for_them() -> None:
    world = settled({"model": {"source": "hf://a/b"}, "engine": {"prefixCaching": "Disabled"}})
    assert "kv-events" not in json.dumps(world.template())


# Pod security "restricted", as the Kubernetes documentation lists it; hostPath is what the path source is about.
VOLUME_TYPES = {"configMap", "emptyDir", "image", "persistentVolumeClaim", "secret", "projected", "downwardAPI", "csi"}


def test_restricted_rules(world: World) -> None:
    spec = world.template()["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["runAsUser"] > 0
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert not {"hostNetwork", "hostPID", "hostIPC"} & spec.keys()
    for container in (engine(world), sidecar(world)):
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert not context.get("privileged")
    kinds = {kind for volume in spec["volumes"] for kind in volume if kind != "name"}
    if not world.spec["model"]["source"].startswith("path://"):
        assert kinds <= VOLUME_TYPES


@pytest.fixture(scope="module")
def admit(control_plane: ControlPlane, make_namespace: Callable[..., str]) -> Callable[[dict[str, Any]], None]:
    """Asks the API server to make a pod of a template in a namespace that enforces ``restricted``."""
    namespace = make_namespace(**{"pod-security.kubernetes.io/enforce": "restricted"})
    api = control_plane.api
    # Without the controller manager nobody else makes it, and admission wants it.
    api.create(f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": {"name": "default"}})

    def admit(template: dict[str, Any]) -> None:
        body = {**template, "metadata": {**template["metadata"], "name": "chat-1"}}
        path = f"/api/v1/namespaces/{namespace}/pods?dryRun=All&fieldValidation=Strict"
        api.request("POST", path, {"apiVersion": "v1", "kind": "Pod", **body})

    return admit


class TestOnARealApiServer:
    """Admission is what counts; the rules above only say early what is wrong."""

    @pytest.mark.parametrize("name", sorted(set(SPECS) - {"path", "overlay"}))
    def test_restricted_namespace_takes_the_pod(self, admit: Callable[[dict[str, Any]], None], name: str) -> None:
        admit(settled(SPECS[name]).template())

    def test_restricted_namespace_refuses_path_sources(self, admit: Callable[[dict[str, Any]], None]) -> None:
        with pytest.raises(Exception, match='volume "model" uses restricted volume type "hostPath"'):
            admit(settled(SPECS["path"], allow_path_sources=True).template())

    def test_every_child_is_taken_strictly(
        self, control_plane: ControlPlane, make_namespace: Callable[..., str]
    ) -> None:
        """No misspelt field, no duplicate key of a keyed list."""
        namespace = make_namespace()
        world = settled({**SPECS["70b-tensor-parallel"], "replicas": 2})
        for child in world.children.values():
            metadata = {k: child["metadata"][k] for k in ("name", "labels", "annotations")}
            control_plane.kubectl(
                "apply", "--server-side", "--dry-run=server", "--validate=strict", "-n", namespace, "-f", "-",
                stdin=json.dumps({**child, "metadata": metadata}),
            )  # fmt: skip


class TestSources:
    def test_hub(self) -> None:
        world = settled(SPECS["hub with token and claim"])
        assert engine(world)["args"][0] == "acme/tiny"
        assert volumes(world)["model-cache"]["persistentVolumeClaim"] == {"claimName": "models"}
        env = {e["name"]: e for e in engine(world)["env"]}
        assert env["HF_HOME"]["value"] == names.PATH_MODEL_CACHE
        assert env["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
        assert "HF_HUB_OFFLINE" not in env

    def test_hub_revision_is_the_tokenizers_too(self) -> None:
        world = settled(SOURCES["hf"])
        assert (argument(world, "--revision"), argument(world, "--tokenizer-revision")) == ("v1", "v1")

    def test_hub_cache_without_a_claim_is_the_pods_own(self) -> None:
        world = settled({"model": {"source": "hf://a/b", "cache": {"sizeLimit": "40Gi"}}})
        assert volumes(world)["model-cache"]["emptyDir"] == {"sizeLimit": "40Gi"}
        assert volumes(settled(SOURCES["hf"]))["model-cache"]["emptyDir"] == {}

    @pytest.mark.parametrize(
        ("name", "volume", "path"),
        [
            ("pvc", {"persistentVolumeClaim": {"claimName": "models", "readOnly": True}}, "/models/tiny"),
            ("oci", {"image": {"reference": "example.com/models/tiny:1", "pullPolicy": "IfNotPresent"}}, "/models"),
            ("path", {"hostPath": {"path": "/srv/models/tiny", "type": "Directory"}}, "/models"),
        ],
    )
    def test_mounted(self, name: str, volume: dict[str, Any], path: str) -> None:
        world = settled(SOURCES[name], allow_path_sources=True)
        assert engine(world)["args"][0] == path
        assert volumes(world)["model"] == {"name": "model", **volume}
        assert {"name": "model", "mountPath": "/models", "readOnly": True} in engine(world)["volumeMounts"]
        assert {"name": "HF_HUB_OFFLINE", "value": "1"} in engine(world)["env"]

    def test_a_whole_claim(self) -> None:
        assert engine(settled({"model": {"source": "pvc://models/"}}))["args"][0] == "/models"


class TestResources:
    @staticmethod
    def limits(accelerator: str = "nvidia.com/gpu", **of_engine: Any) -> dict[str, str]:
        world = settled({"model": {"source": "hf://a/b"}, "engine": of_engine}, accelerator=accelerator)
        found: dict[str, str] = engine(world).get("resources", {}).get("limits", {})
        return found

    def test_one_accelerator_by_default(self) -> None:
        assert self.limits() == {"nvidia.com/gpu": "1"}

    def test_as_many_as_share_a_layer(self) -> None:
        assert self.limits(tensorParallelSize=4) == {"nvidia.com/gpu": "4"}

    def test_added_to_other_limits(self) -> None:
        assert self.limits(resources={"limits": {"memory": "1Gi"}}) == {"memory": "1Gi", "nvidia.com/gpu": "1"}

    def test_what_the_user_says_stands(self) -> None:
        assert self.limits(resources={"limits": {"nvidia.com/gpu": 0}}) == {"nvidia.com/gpu": "0"}

    def test_the_installations_own(self) -> None:
        assert self.limits("amd.com/gpu", tensorParallelSize=2) == {"amd.com/gpu": "2"}

    def test_none_on_cpu(self) -> None:
        assert self.limits("") == {}


class TestOverlay:
    @staticmethod
    def overlaid(**spec: Any) -> World:
        return settled({"model": {"source": "hf://a/b"}, "podTemplate": {"spec": spec}})

    def test_maps_are_merged(self) -> None:
        world = self.overlaid(nodeSelector={"disk": "fast"}, securityContext={"fsGroup": 1000})
        assert world.template()["spec"]["nodeSelector"] == {"disk": "fast"}
        assert world.template()["spec"]["securityContext"]["fsGroup"] == 1000
        assert world.template()["spec"]["securityContext"]["runAsNonRoot"] is True

    def test_a_container_of_the_same_name_is_merged(self) -> None:
        world = self.overlaid(containers=[{"name": "engine", "volumeMounts": [{"name": "x", "mountPath": "/x"}]}])
        assert engine(world)["image"] == "example.com/vllm:1"
        assert {"/x", "/dev/shm", "/tmp"} <= {mount["mountPath"] for mount in engine(world)["volumeMounts"]}

    def test_other_containers_are_added(self) -> None:
        world = self.overlaid(
            containers=[{"name": "logger", "image": "l"}], initContainers=[{"name": "chown", "image": "c"}]
        )
        assert [c["name"] for c in world.template()["spec"]["containers"]] == ["engine", "logger"]
        assert [c["name"] for c in world.template()["spec"]["initContainers"]] == ["kvplane-sidecar", "chown"]

    def test_selector_labels_win(self) -> None:
        """The API server refuses them in the overlay; if it did not, the Deployment would lose its pods."""
        labels = {"kvplane.dev/service": "other", "team": "a"}
        world = settled({"model": {"source": "hf://a/b"}, "podTemplate": {"metadata": {"labels": labels}}})
        assert world.template()["metadata"]["labels"]["kvplane.dev/service"] == "chat"
        assert world.template()["metadata"]["labels"]["team"] == "a"

    def test_an_overlay_is_tried_out_first(self) -> None:
        assert World({"model": {"source": "hf://a/b"}, "podTemplate": {"spec": {"nodeName": "x"}}}).plan().dry_run_first
        assert not World().plan().dry_run_first

    def test_a_variable_of_the_user_replaces_the_operators(self) -> None:
        env = engine(settled({"model": {"source": "pvc://m"}, "engine": {"env": [{"name": "HOME", "value": "/h"}]}}))[
            "env"
        ]
        assert [e["value"] for e in env if e["name"] == "HOME"] == ["/h"]
