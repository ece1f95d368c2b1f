"""One service on the real vLLM: what a newcomer sees, and what users of it must never see."""

import json
import socket
import time
from typing import Any, get_args

import pytest
import yaml

from e2e.cluster.cluster import Cluster
from e2e.stack import REPOSITORY, Stack
from e2e.tests.client import address, complete, stream
from e2e.tests.fleet import reachable
from e2e.tests.sidecar import eventually, pod_ip, pods, value
from e2e.tests.sidecar import state as sidecar_state
from kvplane_api import names
from kvplane_api.service import LLMServiceSpec, Speculative
from kvplane_operator.plan.engine_args import engine_args

_FIGURES_SECONDS = 120.0
"""The capacity in a status changes once a minute at most, and is read every ten seconds."""


def test_streams_and_counts_tokens(stack: Stack, chat: str) -> None:
    where = address(stack, chat, "chat")
    pieces = list(stream(where, "chat", max_tokens=16))
    assert len(pieces) >= 4  # with speculative decoding a piece is up to four tokens
    answer = complete(where, "chat", max_tokens=8)
    assert answer["usage"]["completion_tokens"] <= 8
    ip = pod_ip(stack, chat, "chat")
    eventually(
        lambda: value(ip, "kvplane_generation_tokens_total") >= 16,
        seconds=10,
        otherwise=lambda: "16 tokens were streamed and not counted",
    )
    state = sidecar_state(ip)
    assert state["engineReady"]
    assert state["inFlight"] == 0
    assert state["engine"]["kvCacheBlocks"] > 0
    assert state["engine"]["maxModelLenTokens"] == 2048


def test_nothing_goes_round_the_sidecar(stack: Stack, chat: str) -> None:
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection((pod_ip(stack, chat, "chat"), names.PORT_ENGINE), timeout=5)


def test_kubectl_tells_what_is_going_on(stack: Stack, chat: str) -> None:
    words = {"MinimumReplicasAvailable", "Serving", "Stable", "AsAsked", "Events:"}

    def missing() -> set[str]:
        described = stack.kubectl("describe", "llms", "chat", "-n", chat)
        return {word for word in words if word not in described}

    # A change of the service, as the last test may have made one, is under way for a moment.
    eventually(lambda: not missing(), seconds=60, otherwise=missing)
    table = stack.kubectl("get", "llms", "-n", chat)
    assert table.splitlines()[0].split() == ["NAME", "MODE", "READY", "REPLICAS", "DESIRED", "ENDPOINT", "AGE"]
    assert table.splitlines()[1].split()[:5] == ["chat", "Paged", "True", "1", "1"]

    def wide() -> list[str]:
        return stack.kubectl("get", "llms", "-n", chat, "-o", "wide").splitlines()

    def shows_an_empty_cache() -> bool:
        head, row = wide()
        return row[head.index("KV-USED%") :].split()[:1] == ["0"]

    eventually(shows_an_empty_cache, seconds=_FIGURES_SECONDS, otherwise=wide)
    manual = stack.kubectl("explain", "llmservice.spec", "--recursive")
    assert "ringThresholdTokens" in manual
    assert "maxTokens: longest prompt + output" in stack.kubectl("explain", "llmservice.spec.context")


def test_what_the_sidecar_says_reaches_the_status(stack: Stack, chat: str) -> None:
    def status() -> dict[str, Any]:
        found: dict[str, Any] = stack.get(chat, "llmservice", "chat")["status"]
        return found

    told = status()

    def is_of_now() -> bool:
        nonlocal told
        told = status()
        return bool(told.get("capacity", {}).get("kvUsedPercent") == 0)

    eventually(is_of_now, seconds=_FIGURES_SECONDS, otherwise=lambda: told)
    (fresh,) = [condition for condition in told["conditions"] if condition["type"] == "SignalsFresh"]
    assert fresh["status"] == "True"
    kv_tokens = int(value(pod_ip(stack, chat, "chat"), "kvplane_kv_cache_capacity_tokens"))
    capacity, pool = told["capacity"], told["pools"][0]
    assert capacity["kvTokens"] == pool["kvTokensPerReplica"] == kv_tokens
    assert 0 < capacity["headroomTokens"] <= 0.95 * kv_tokens
    assert capacity["startupSecondsP90"] > 0
    assert pool["maxContextTokens"] == 2048


def test_vllms_own_parser_takes_every_flag(stack: Stack, chat: str) -> None:
    """What the operator renders from each sample and from specs with every engine field, asked in the engine's own image."""
    script = (REPOSITORY / "e2e" / "check_engine_args.py").read_text()
    lists = [engine_args(LLMServiceSpec.parse(spec), served_name="any") for spec in _specs()]
    pod = pods(stack, chat, "chat")[0]["metadata"]
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
    every_field: dict[str, Any] = {
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
            "kvOffload": {"cpuMemory": "1536Mi"},
            "kvTransfer": {"kv_connector": "LMCacheConnectorV1", "kv_role": "kv_both"},
            "extraArgs": ["--enforce-eager"],
        },
    }
    methods = [
        {"method": "Ngram", "tokens": 3},
        {"method": "Draft", "tokens": 3, "model": "acme/small"},
        {"method": "Eagle3", "tokens": 3, "model": "/models/head"},
    ]
    assert {each["method"] for each in methods} == set(get_args(Speculative.model_fields["method"].annotation))
    return [*samples, *(every_field | {"engine": every_field["engine"] | {"speculative": each}} for each in methods)]


def test_engine_that_dies_comes_back(stack: Stack, cluster: Cluster, chat: str) -> None:
    """kill -9 of the engine: the pod stays, the container restarts, the status tells."""
    pod = pods(stack, chat, "chat")[0]["metadata"]
    cluster.kill_pod_process(chat, pod["name"], container=names.CONTAINER_ENGINE)
    seen = set()
    end = time.monotonic() + 60
    while time.monotonic() < end and "EngineCrashed" not in seen:
        seen.add(stack.conditions(chat, "chat")["Available"]["reason"])
        time.sleep(0.2)
    assert "EngineCrashed" in seen
    stack.wait_ready(chat, "chat")
    after = pods(stack, chat, "chat")[0]["metadata"]
    assert after["uid"] == pod["uid"]
    reachable(stack, chat, "chat")
    complete(address(stack, chat, "chat"), "chat")
