"""The resource as kubectl shows it: names, columns, scale, the manual; and the generated files as they must be."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.cluster.controlplane import ControlPlane
from kvplane_api import crd, names

REPOSITORY = Path(__file__).resolve().parents[2]
SAMPLES = sorted((REPOSITORY / "docs" / "samples").glob("*.yaml"))
COLUMNS = ["NAME", "MODE", "READY", "REPLICAS", "DESIRED", "ENDPOINT", "AGE"]


@pytest.fixture(scope="module")
def service(control_plane: ControlPlane, make_namespace: Callable[..., str]) -> str:
    """The namespace of a service ``chat`` with a status as the operator writes it."""
    namespace = make_namespace()
    control_plane.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(_chat()))
    status = {
        "mode": "Paged",
        "readyReplicas": 1,
        "replicas": 1,
        "desiredReplicas": 2,
        "endpoint": "http://chat.test.svc:8000/v1",
        "selector": "kvplane.dev/service=chat",
        "capacity": {"kvTokens": 1600, "kvUsedPercent": 40, "headroomTokens": 880, "startupSecondsP90": 42},
        "conditions": [
            {
                "type": "Ready",
                "status": "False",
                "reason": "ReplicasMissing",
                "message": "1 of 2 replicas serve.",
                "observedGeneration": 1,
                "lastTransitionTime": "2026-01-01T00:00:00Z",
            }
        ],
    }
    control_plane.kubectl(
        "patch",
        "llms",
        "chat",
        "-n",
        namespace,
        "--subresource=status",
        "--type=merge",
        "-p",
        json.dumps({"status": status}),
    )
    return namespace


def _chat() -> dict[str, Any]:
    return {
        "apiVersion": names.API_VERSION,
        "kind": names.KIND,
        "metadata": {"name": "chat"},
        "spec": {"model": {"source": "hf://acme/tiny"}},
    }


def test_the_crd_is_what_the_models_say() -> None:
    generated = crd.HEADER + crd.to_yaml(crd.custom_resource_definition())
    assert (REPOSITORY / "crds" / "llmservices.yaml").read_text() == generated, "run `make generate`"


def test_the_crd_is_yaml_of_what_was_meant() -> None:
    """The writer of YAML is our own."""
    text = (REPOSITORY / "crds" / "llmservices.yaml").read_text()
    assert yaml.safe_load(text) == crd.custom_resource_definition()


@pytest.mark.parametrize("name", ["llmservices", "llmservice", "llms", "kvplane"])
def test_get_by_name_short_name_and_category(control_plane: ControlPlane, service: str, name: str) -> None:
    assert "chat" in control_plane.kubectl("get", name, "-n", service)


def test_columns_say_something(control_plane: ControlPlane, service: str) -> None:
    head, row = control_plane.kubectl("get", "llms", "-n", service).splitlines()
    assert head.split() == COLUMNS
    assert row.split()[:6] == ["chat", "Paged", "False", "1", "2", "http://chat.test.svc:8000/v1"]


def test_wide_columns_name_the_model_its_memory_and_the_reason(control_plane: ControlPlane, service: str) -> None:
    head, row = control_plane.kubectl("get", "llms", "-n", service, "-o", "wide").splitlines()
    assert head.split() == [*COLUMNS, "MODEL", "KV-USED%", "REASON"]
    assert row.split()[-3:] == ["hf://acme/tiny", "40", "ReplicasMissing"]


def test_scale_is_the_subresource(control_plane: ControlPlane, service: str) -> None:
    control_plane.kubectl("scale", "llms/chat", "-n", service, "--replicas=3")
    scale = json.loads(
        control_plane.kubectl("get", "--raw", f"/apis/{names.API_VERSION}/namespaces/{service}/llmservices/chat/scale")
    )
    assert scale["spec"] == {"replicas": 3}
    assert scale["status"] == {"replicas": 1, "selector": "kvplane.dev/service=chat"}


def test_an_object_shows_what_its_user_wrote(control_plane: ControlPlane, service: str) -> None:
    """Only what others write (replicas) or what must never change by itself (mode) is filled in."""
    control_plane.kubectl(
        "apply", "-n", service, "-f", "-", stdin=json.dumps({**_chat(), "metadata": {"name": "bare"}})
    )
    bare = control_plane.get("llms", "bare", "-n", service)
    assert isinstance(bare, dict)
    assert bare["spec"] == {"model": {"source": "hf://acme/tiny"}, "mode": "Auto", "replicas": 1}


def test_status_is_not_written_by_users(control_plane: ControlPlane, make_namespace: Callable[..., str]) -> None:
    namespace = make_namespace()
    forged = {**_chat(), "status": {"mode": "Paged"}}
    control_plane.kubectl("apply", "-n", namespace, "-f", "-", stdin=json.dumps(forged))
    held = control_plane.get("llms", "chat", "-n", namespace)
    assert isinstance(held, dict)
    assert "status" not in held


def test_explain_is_a_manual(control_plane: ControlPlane) -> None:
    """Every field of the spec has a description that kubectl shows."""
    schema = crd.custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    shown = control_plane.kubectl("explain", "llmservice.spec", "--recursive")
    fields = list(_described(schema["properties"]["spec"], "spec"))
    assert len(fields) > 60
    for path, description in fields:
        assert path.rsplit(".", 1)[-1] in shown, path
        assert description, path
    assert "ringThresholdTokens\t<integer>" in shown
    maximum = control_plane.kubectl("explain", "llmservice.spec.context.maxTokens")
    assert "longest prompt + output, in tokens" in " ".join(maximum.split())


def test_descriptions_begin_with_the_fields_name() -> None:
    schema = crd.custom_resource_definition()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    for part in ("spec", "status"):
        for path, description in _described(schema["properties"][part], part):
            assert description.startswith(path.rsplit(".", 1)[-1]), path


def _described(schema: dict[str, Any], path: str) -> Iterator[tuple[str, str]]:
    """Path and description of each field; what is below a free-form part is Kubernetes' own."""
    for name, child in schema.get("properties", {}).items():
        yield f"{path}.{name}", child.get("description", "")
        if not child.get("x-kubernetes-preserve-unknown-fields"):
            yield from _described(child, f"{path}.{name}")
            yield from _described(child.get("items", {}), f"{path}.{name}")


@pytest.mark.parametrize("sample", SAMPLES, ids=[sample.name for sample in SAMPLES])
def test_samples_are_taken_by_the_api_server(
    control_plane: ControlPlane, make_namespace: Callable[..., str], sample: Path
) -> None:
    answer = control_plane.kubectl(
        "apply", "-n", make_namespace(), "--dry-run=server", "--validate=strict", "-f", str(sample)
    )
    assert "llmservice.kvplane.dev/" in answer
    assert all("(server dry run)" in line for line in answer.strip().splitlines())


def test_there_are_samples() -> None:
    assert {sample.stem for sample in SAMPLES} >= {
        "8b-one-gpu",
        "70b-tensor-parallel",
        "model-in-a-volume",
        "model-in-an-image",
        "gated-model-shared-cache",
        "cpu",
        "ring",
        "ring-cpu",
        "autoscaled",
        "external-hpa",
    }
