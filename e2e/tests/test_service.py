"""One service on the real vLLM: what a newcomer sees, and what users of it must never see."""

import json
import socket
import time
import urllib.request
from typing import Any

import pytest
import yaml

from e2e.cluster.cluster import Cluster
from e2e.stack import REPOSITORY, Images, Stack, cpu_service
from e2e.tests.client import Load, address, complete, stream
from kvplane_api import names
from kvplane_api.service import LLMServiceSpec
from kvplane_operator.plan.engine_args import engine_args


def _pods(stack: Stack, namespace: str, service: str) -> list[dict[str, object]]:
    found: list[dict[str, object]] = stack.get(namespace, "pods", "-l", f"{names.LABEL_SERVICE}={service}")
    return found


def _pod_ip(stack: Stack, namespace: str) -> str:
    return str(stack.get(namespace, "pods", "-l", f"{names.LABEL_SERVICE}=chat")[0]["status"]["podIP"])


def _admin(stack: Stack, namespace: str, path: str) -> str:
    url = f"http://{_pod_ip(stack, namespace)}:{names.PORT_ADMIN}{path}"
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def _generated(metrics: str) -> float:
    line = next(line for line in metrics.splitlines() if line.startswith("kvplane_generation_tokens_total"))
    return float(line.rsplit(" ", 1)[1])


def test_streams_and_counts_tokens(stack: Stack, chat: str) -> None:
    where = address(stack, chat, "chat")
    pieces = list(stream(where, "chat", max_tokens=16))
    assert len(pieces) >= 8
    answer = complete(where, "chat", max_tokens=8)
    assert answer["usage"]["completion_tokens"] <= 8
    end = time.monotonic() + 10
    while _generated(_admin(stack, chat, "/metrics")) < 16:  # the sidecar looks at the engine's counters each second
        assert time.monotonic() < end
        time.sleep(0.2)
    state = json.loads(_admin(stack, chat, "/state"))
    assert state["engineReady"]
    assert state["inFlight"] == 0
    assert state["engine"]["kvCacheBlocks"] > 0
    assert state["engine"]["maxModelLenTokens"] == 2048


def test_nothing_goes_round_the_sidecar(stack: Stack, chat: str) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((_pod_ip(stack, chat), names.PORT_ENGINE), timeout=5)


def test_kubectl_tells_what_is_going_on(stack: Stack, chat: str) -> None:
    table = stack.kubectl("get", "llms", "-n", chat)
    assert table.splitlines()[0].split() == ["NAME", "MODE", "READY", "REPLICAS", "DESIRED", "ENDPOINT", "AGE"]
    assert table.splitlines()[1].split()[:5] == ["chat", "Paged", "True", "1", "1"]
    described = stack.kubectl("describe", "llms", "chat", "-n", chat)
    for word in ("MinimumReplicasAvailable", "Serving", "Stable", "AsAsked", "Events:"):
        assert word in described
    manual = stack.kubectl("explain", "llmservice.spec", "--recursive")
    assert "ringThresholdTokens" in manual
    assert "maxTokens: longest prompt + output" in stack.kubectl("explain", "llmservice.spec.context")


def test_vllms_own_parser_takes_every_flag(stack: Stack, chat: str) -> None:
    """What the operator renders from each sample, and from a spec with every engine field, in the engine's own image."""
    script = (REPOSITORY / "e2e" / "check_engine_args.py").read_text()
    lists = [engine_args(LLMServiceSpec.parse(spec), served_name="any") for spec in _specs()]
    pod = _pods(stack, chat, "chat")[0]["metadata"]
    assert isinstance(pod, dict)
    where = ("-n", chat, "-i", pod["name"], "-c", names.CONTAINER_ENGINE)
    answer = stack.kubectl("exec", *where, "--", "python3", "-c", script, stdin=json.dumps(lists))
    assert len(answer.splitlines()) == len(lists)


def _specs() -> list[dict[str, Any]]:
    documents = [
        d for path in sorted(REPOSITORY.glob("docs/samples/*.yaml")) for d in yaml.safe_load_all(path.read_text())
    ]
    samples = [
        document["spec"]
        for document in documents
        if document["kind"] == names.KIND and document["spec"].get("mode") != "Ring"
    ]
    assert samples
    every_field = {
        "model": {"source": "hf://acme/tiny@v1", "servedName": "tiny"},
        "context": {"maxTokens": 2048},
        "engine": {
            "dtype": "bfloat16",
            "kvCacheDtype": "fp8",
            "tensorParallelSize": 2,
            "blockSize": 32,
            "gpuMemoryPercent": 80,
            "maxBatchedTokens": 4096,
            "maxSequences": 16,
            "prefixCaching": "Disabled",
            "speculative": {"method": "Ngram", "tokens": 3},
            "kvOffload": {"cpuMemory": "1536Mi"},
            "kvTransfer": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"},
            "extraArgs": ["--enforce-eager"],
        },
    }
    return [*samples, every_field]


def test_engine_that_dies_comes_back(stack: Stack, cluster: Cluster, chat: str) -> None:
    """kill -9 of the engine: the pod stays, the container restarts, the status tells."""
    pod = _pods(stack, chat, "chat")[0]["metadata"]
    assert isinstance(pod, dict)
    cluster.kill_pod_process(chat, pod["name"], container=names.CONTAINER_ENGINE)
    seen = set()
    end = time.monotonic() + 60
    while time.monotonic() < end and "EngineCrashed" not in seen:
        seen.add(stack.conditions(chat, "chat")["Available"]["reason"])
        time.sleep(0.2)
    assert "EngineCrashed" in seen
    stack.wait_ready(chat, "chat")
    after = _pods(stack, chat, "chat")[0]["metadata"]
    assert isinstance(after, dict)
    assert after["uid"] == pod["uid"]
    complete(address(stack, chat, "chat"), "chat")


def test_rollout_loses_nothing(stack: Stack, images: Images, chat: str) -> None:
    """A change of the spec under load: the new pod first, then the old one drains; not one request fails."""
    before = _pods(stack, chat, "chat")[0]["metadata"]
    changed = cpu_service("chat", chat, f"oci://{images.model}", engine={"maxSequences": 12})
    with Load(address(stack, chat, "chat"), "chat") as load:
        stack.apply(changed)
        end = time.monotonic() + 300
        while [p["metadata"] for p in _pods(stack, chat, "chat")] == [before] or len(_pods(stack, chat, "chat")) > 1:
            assert time.monotonic() < end, stack.kubectl("get", "pods", "-n", chat)
            time.sleep(1)
        stack.wait_ready(chat, "chat")
        time.sleep(2)
    assert load.done > 10
    assert load.lost == []
