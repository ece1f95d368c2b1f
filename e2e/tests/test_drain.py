"""Replicas go, on purpose, while their service is in use: not one request is lost.

Lost is a request whose client reconnects a closed idle connection and obeys Retry-After once (client.py), and yet does not
get its whole answer. A stream that is cut counts as lost, and so does a 503: there is always another replica.
"""

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from e2e.stack import Images, Stack
from e2e.tests import sidecar
from e2e.tests.client import Load, address
from e2e.tests.conftest import chat_service
from e2e.times import PROGRESS
from kvplane_api import names

CALLERS = 4
LEAST_ANSWERS = 3 * CALLERS
OUTPUT_TOKENS = 100
PAUSE_SECONDS = 1.0
"""Of each caller: engines that start need the cores too."""
REPLICAS = 5
"""So that three can go, and one of the two that are left be evicted."""
RETRIES = 1
"""Of a request that found no room; refused again, it is lost."""


@pytest.mark.timeout(1200)
def test_a_rollout_a_node_drain_and_three_scale_downs_lose_nothing(stack: Stack, images: Images, chat: str) -> None:
    """Each engine that starts takes a core for half a minute, so the replicas start together, and without load.

    First a rollout of one replica; then scale-downs from five to two, and the drain of the node of one of these.
    """
    with PROGRESS.step("a rollout under load"), _load(stack, chat) as rollout:
        old = _pods(stack, chat)
        stack.apply(chat_service(chat, images, maxSequences=12))
        _until(lambda: not old & _pods(stack, chat))
        stack.wait_ready(chat, "chat")
        _until(lambda: rollout.done >= LEAST_ANSWERS)
        time.sleep(2)
    with PROGRESS.step(f"{REPLICAS} replicas"):
        _scale(stack, chat, REPLICAS)
        _until(lambda: _ready(stack, chat) == REPLICAS)

    with PROGRESS.step("scale-downs and a node drain under load"), _load(stack, chat) as rest:
        for replicas in (4, 3, 2):
            _scale(stack, chat, replicas)
            _until(partial(_staying_are, stack, chat, replicas))
            time.sleep(3)
        _until(lambda: len(_pods(stack, chat)) == 2)
        node = sidecar.pods(stack, chat, "chat")[0]["spec"]["nodeName"]
        going = _pods(stack, chat, node=node)
        stack.kubectl("cordon", node)
        try:
            stack.kubectl("drain", node, "--ignore-daemonsets", "--delete-emptydir-data", "--timeout=200s")
            _until(lambda: not going & _pods(stack, chat))
        finally:
            stack.kubectl("uncordon", node)
        _until(lambda: rest.done >= LEAST_ANSWERS)
        time.sleep(2)
    _scale(stack, chat, 1)
    _until(lambda: len(_pods(stack, chat)) == 1)
    for what, load in {"rollout": rollout, "drain and scale-downs": rest}.items():
        assert load.done >= LEAST_ANSWERS, f"{what}: answered {load.done}, in {load.seconds} s"
        assert load.lost == [], what
        assert load.got_in == load.came_back, f"{what}: refused twice, of {load.refusals}"


def test_a_replica_that_still_starts_goes_at_once(stack: Stack, chat: str) -> None:
    """vLLM heeds no signal for sure before it serves; without help it would stay for the ten minutes of its grace period."""
    before = _pods(stack, chat)
    _scale(stack, chat, len(before) + 1)
    _until(lambda: len(_engines_run(stack, chat)) > len(before))
    _scale(stack, chat, len(before))
    sidecar.eventually(
        lambda: _pods(stack, chat) == before,
        seconds=90,
        otherwise=lambda: f"still there: {_pods(stack, chat) - before}",
    )


def _engines_run(stack: Stack, namespace: str) -> set[str]:
    """UIDs of the pods whose engine has been started."""
    return {
        pod["metadata"]["uid"]
        for pod in sidecar.pods(stack, namespace, "chat")
        for container in pod["status"].get("containerStatuses", [])
        if container["name"] == names.CONTAINER_ENGINE and "running" in container["state"]
    }


def _load(stack: Stack, namespace: str) -> Load:
    where = address(stack, namespace, "chat")
    return Load(
        where,
        "chat",
        workers=CALLERS,
        max_tokens=OUTPUT_TOKENS,
        pause_seconds=PAUSE_SECONDS,
        retries=RETRIES,
    )


def _scale(stack: Stack, namespace: str, replicas: int) -> None:
    stack.kubectl("scale", "llms", "chat", "-n", namespace, f"--replicas={replicas}")


def _staying(stack: Stack, namespace: str) -> list[dict[str, Any]]:
    """Pods that are not about to go; status counts one that has just been told for a moment more."""
    return [p for p in sidecar.pods(stack, namespace, "chat") if "deletionTimestamp" not in p["metadata"]]


def _staying_are(stack: Stack, namespace: str, count: int) -> bool:
    return len(_staying(stack, namespace)) == count


def _ready(stack: Stack, namespace: str) -> int:
    """Those of them that are Ready."""
    conditions = [c for pod in _staying(stack, namespace) for c in pod["status"].get("conditions", [])]
    return sum(condition["type"] == "Ready" and condition["status"] == "True" for condition in conditions)


def _pods(stack: Stack, namespace: str, *, node: str | None = None) -> set[str]:
    """UIDs of the service's pods, of those on one node if given."""
    found = sidecar.pods(stack, namespace, "chat")
    return {pod["metadata"]["uid"] for pod in found if node in (None, pod["spec"].get("nodeName"))}


def _until(holds: Callable[[], bool]) -> None:
    sidecar.eventually(holds, seconds=400, otherwise=lambda: "not within 400 s")
