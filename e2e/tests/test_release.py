"""The chart's whole life with a service running: upgrade, rollback, a killed operator, uninstall, install again."""

import time

from e2e.stack import RELEASE, SYSTEM_NAMESPACE, Images, Stack, cpu_service
from e2e.tests.client import address, complete
from e2e.tests.conftest import VALUES
from kvplane_api import names


def _pod_uids(stack: Stack, namespace: str) -> set[str]:
    return {pod["metadata"]["uid"] for pod in stack.get(namespace, "pods", "-l", names.LABEL_SERVICE)}


def test_helm_test_passes(stack: Stack) -> None:
    assert "Succeeded" in stack.helm("test", RELEASE, "--namespace", SYSTEM_NAMESPACE, "--timeout", "2m")


def test_engine_pods_survive_the_operator(stack: Stack, images: Images, chat: str) -> None:
    before = _pod_uids(stack, chat)
    assert before
    stack.kubectl("delete", "pods", "-n", SYSTEM_NAMESPACE, "--all", "--force", "--grace-period=0")
    stack.install(images, {**VALUES, "logLevel": "DEBUG", "defaults.engineImage": "localhost/kvplane/next:1"})
    _reconciled(stack, chat)
    assert _pod_uids(stack, chat) == before
    stack.helm("rollback", RELEASE, "1", "--namespace", SYSTEM_NAMESPACE, "--wait")
    _reconciled(stack, chat)
    assert _pod_uids(stack, chat) == before
    complete(address(stack, chat, "chat"), "chat")


def test_uninstall_leaves_services_running_and_deletable(
    stack: Stack, images: Images, chat: str, namespace: str
) -> None:
    stack.apply(cpu_service("gone", namespace, f"oci://{images.model}", replicas=0))
    _until(lambda: stack.get(namespace, "deployment", "gone") is not None)
    stack.helm("uninstall", RELEASE, "--namespace", SYSTEM_NAMESPACE, "--wait")
    try:
        complete(address(stack, chat, "chat"), "chat")
        stack.kubectl("delete", "llms", "gone", "-n", namespace, "--timeout=30s")
        _until(lambda: not stack.get(namespace, "deployments,services"))
        assert stack.get(chat, "llmservice", "chat"), "the CRD and its objects are kept"
    finally:  # other tests need it too
        stack.install(images, VALUES)
    _reconciled(stack, chat)


def _reconciled(stack: Stack, namespace: str) -> None:
    """An operator is at work: it acts on a change of the service that touches no pod."""
    service = stack.get(namespace, "llmservice", "chat")
    seconds = int(service["spec"].get("rollout", {}).get("maxSurge", 1)) + 1
    patch = f'{{"spec":{{"rollout":{{"maxSurge":{seconds}}}}}}}'
    stack.kubectl("patch", "llms", "chat", "-n", namespace, "--type=merge", "-p", patch)
    _until(
        lambda: stack.get(namespace, "deployment", "chat")["spec"]["strategy"]["rollingUpdate"]["maxSurge"] == seconds
    )


def _until(check: object, seconds: float = 120) -> None:
    assert callable(check)
    end = time.monotonic() + seconds
    while not check():
        assert time.monotonic() < end, "not in time"
        time.sleep(0.2)
