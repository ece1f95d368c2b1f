"""The engine's command line. Whether vLLM takes it is asked of vLLM itself, in its image: e2e/check_engine_args.py."""

import json
from typing import Any

import pytest

from kvplane_api.service import OWNED_ENGINE_FLAGS, LLMServiceSpec
from kvplane_operator.plan.engine_args import engine_args


def args(context: dict[str, Any] | None = None, **engine: Any) -> list[str]:
    spec = LLMServiceSpec.parse({"model": {"source": "hf://acme/tiny@v1"}, "context": context or {}, "engine": engine})
    return engine_args(spec, served_name="chat")


def value(of: list[str], flag: str) -> str | None:
    return of[of.index(flag) + 1] if flag in of else None


def test_the_model_comes_first() -> None:
    assert args()[0] == "acme/tiny"
    assert value(args(), "--served-model-name") == "chat"


@pytest.mark.parametrize(
    ("fields", "flag", "expected"),
    [
        ({}, "--max-model-len", "auto"),
        ({"context": {"maxTokens": 4096}}, "--max-model-len", "4096"),
        ({}, "--gpu-memory-utilization", "0.90"),
        ({"gpuMemoryPercent": 10}, "--gpu-memory-utilization", "0.10"),
        ({}, "--block-size", None),
        ({"blockSize": 32}, "--block-size", "32"),
        ({}, "--max-num-batched-tokens", None),
        ({"maxBatchedTokens": 8192}, "--max-num-batched-tokens", "8192"),
        ({"maxSequences": 64}, "--max-num-seqs", "64"),
        ({"tensorParallelSize": 4}, "--tensor-parallel-size", "4"),
        ({"kvCacheDtype": "fp8"}, "--kv-cache-dtype", "fp8"),
        ({"kvOffload": {"cpuMemory": "20Gi"}}, "--kv-offloading-size", "20"),
        ({"kvOffload": {"cpuMemory": "512Mi"}}, "--kv-offloading-size", "0.5"),
        ({"kvOffload": {"cpuMemory": "100Gi"}}, "--kv-offloading-size", "100"),
        ({"kvOffload": {"cpuMemory": "20Gi"}}, "--kv-offloading-backend", "native"),
        ({"kvTransfer": {"b": 1, "a": {"c": True}}}, "--kv-transfer-config", '{"a":{"c":true},"b":1}'),
        ({}, "--shutdown-timeout", "10"),
    ],
)
def test_fields_become_flags(fields: dict[str, Any], flag: str, expected: str | None) -> None:
    assert value(args(**fields), flag) == expected


@pytest.mark.parametrize(
    ("speculative", "config"),
    [
        ({"method": "Ngram"}, {"method": "ngram", "num_speculative_tokens": 4}),
        (
            {"method": "Draft", "tokens": 2, "model": "a/b"},
            {"method": "draft_model", "num_speculative_tokens": 2, "model": "a/b"},
        ),
        ({"method": "Eagle3", "model": "a/e"}, {"method": "eagle3", "num_speculative_tokens": 4, "model": "a/e"}),
    ],
)
def test_speculative_decoding(speculative: dict[str, Any], config: dict[str, Any]) -> None:
    assert json.loads(value(args(speculative=speculative), "--speculative-config") or "") == config


def test_prefix_caching_is_said_either_way() -> None:
    assert "--enable-prefix-caching" in args()
    assert "--no-enable-prefix-caching" in args(prefixCaching="Disabled")


def test_kv_events_stay_inside_the_pod() -> None:
    """Checked by vLLM's own parser on the real engine; here, that nothing of it is a port."""
    assert json.loads(value(args(), "--kv-events-config") or "") == {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "ipc:///run/kvplane/kv-events.sock",
        "replay_endpoint": "ipc:///run/kvplane/kv-replay.sock",
    }


@pytest.mark.parametrize(
    "fields",
    [
        {"prefixCaching": "Disabled"},  # nothing is cached, so nothing is told
        {"extraArgs": ["--data-parallel-size=2"]},  # the second rank would refuse the endpoint
        {"extraArgs": ["--data_parallel_size", "2"]},
        {"extraArgs": ["--enforce-eager", "-dp", "2"]},
    ],
)
def test_no_kv_events_where_the_engine_has_none(fields: dict[str, Any]) -> None:
    assert "--kv-events-config" not in args(**fields)


def test_the_users_arguments_come_last_and_as_they_are() -> None:
    assert args(extraArgs=["--enforce-eager", "--x={a b}"])[-2:] == ["--enforce-eager", "--x={a b}"]


def test_every_flag_that_is_written_is_refused_in_extra_args() -> None:
    everything = args(
        blockSize=16,
        maxBatchedTokens=1,
        maxSequences=1,
        speculative={"method": "Ngram"},
        kvOffload={"cpuMemory": "1Gi"},
        kvTransfer={"kv_connector": "A"},
    )
    assert {a for a in everything if a.startswith("--")} <= set(OWNED_ENGINE_FLAGS)
