"""Services that cannot start say why, in their conditions, and do not spin."""

import time
from typing import Any

import pytest

from e2e.stack import Images, Stack, cpu_service


@pytest.mark.timeout(600)
def test_engines_that_cannot_start(stack: Stack, images: Images, namespace: str) -> None:
    model = f"oci://{images.model}"
    stack.apply(
        # A path below the image that does not exist would be refused by the kubelet; a model without weights is vLLM's.
        cpu_service("bad-argument", namespace, model, engine={"extraArgs": ["--no-such-flag"]}),
        cpu_service("bad-model", namespace, f"oci://{images.control}"),
        cpu_service(
            "too-small",
            namespace,
            model,
            engine={"resources": {"requests": {"cpu": "200m"}, "limits": {"memory": "200Mi"}}},
        ),
        cpu_service("no-image", namespace, model, engine={"image": "localhost/kvplane/none:1"}),
        cpu_service("no-secret", namespace, "hf://acme/tiny", model={
            "source": "hf://acme/tiny", "tokenSecretRef": {"name": "missing"}
        }),
        cpu_service("no-claim", namespace, "pvc://missing/tiny"),
        cpu_service("no-node", namespace, model, podTemplate={"spec": {"nodeSelector": {"no": "where"}}}),
    )  # fmt: skip
    expected = {
        "bad-argument": ("EngineCrashed", "no-such-flag"),
        "bad-model": ("EngineCrashed", "Last log lines"),
        "too-small": ("OOMKilled", "killed for memory"),
        "no-image": ("ImagePullFailed", "localhost/kvplane/none:1"),
        "no-secret": ("ContainerConfigError", "missing"),
        "no-claim": ("VolumeNotReady", "missing"),
        "no-node": ("Unschedulable", "waits for a node"),
    }
    waiting = dict(expected)
    end = time.monotonic() + 420  # two of them load most of vLLM first, on cores that they share
    last: dict[str, Any] = {}
    while waiting and time.monotonic() < end:
        for name in list(waiting):
            available = last[name] = stack.conditions(namespace, name).get("Available", {})
            reason, text = waiting[name]
            if available.get("reason") == reason and text in available["message"]:
                assert available["status"] == "False"
                del waiting[name]
        time.sleep(0.5)
    assert not waiting, {name: last[name] for name in waiting}
    writes = {name: stack.get(namespace, "deployment", name)["metadata"]["generation"] for name in expected}
    assert set(writes.values()) == {1}, "no hot loop: every Deployment was written once"


def test_pods_that_pod_security_refuses(stack: Stack, images: Images, namespace: str) -> None:
    stack.apply(
        cpu_service("privileged", namespace, f"oci://{images.model}", podTemplate={"spec": {"hostIPC": True}}),
    )
    end = time.monotonic() + 60
    available: dict[str, Any] = {}
    while time.monotonic() < end and available.get("reason") != "PodsRefused":
        available = stack.conditions(namespace, "privileged").get("Available", {})
        time.sleep(0.2)
    assert available["reason"] == "PodsRefused"
    assert "hostIPC" in available["message"] or "host namespaces" in available["message"]
