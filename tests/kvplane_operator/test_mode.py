"""What mode Auto makes of a spec: from the spec alone, and with a reason."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvplane_api.service import LLMServiceSpec
from kvplane_operator.plan.mode import choose

HF = {"source": "hf://a/b"}
FACTS = {"layers": 80, "kvHeads": 8, "headDim": 128, "parameters": 70_000_000_000, "acceleratorMemory": "80Gi"}


def spec(**fields: Any) -> LLMServiceSpec:
    return LLMServiceSpec.parse({"model": HF, **fields})


@pytest.mark.parametrize(
    ("fields", "mode", "why"),
    [
        ({"mode": "Paged", "context": {"maxTokens": 10**6}}, "Paged", ""),
        ({"mode": "Ring"}, "Ring", ""),
        ({}, "Paged", "context.maxTokens is not set."),
        ({"context": {"maxTokens": 100_000}}, "Paged", "100000, not above context.ringThresholdTokens (100000)."),
        ({"context": {"maxTokens": 100_001}}, "Ring", "100001, above context.ringThresholdTokens (100000)."),
        ({"context": {"maxTokens": 2000, "ringThresholdTokens": 1000}}, "Ring", "2000, above"),
        (
            {"context": {"maxTokens": 65_536}, "model": {**HF, "facts": FACTS}},
            "Ring",
            "65536, and by model.facts one replica holds 0 tokens of KV cache.",
        ),
        (
            {"context": {"maxTokens": 65_536}, "model": {**HF, "facts": {**FACTS, "acceleratorMemory": "640Gi"}}},
            "Paged",
            "not above",
        ),
    ],
)
def test_auto_decides_by_the_context(fields: dict[str, Any], mode: str, why: str) -> None:
    choice = choose(spec(**fields))
    assert choice.mode == mode
    assert why in choice.why
    assert bool(choice.why) == ("mode" not in fields)


@given(
    st.integers(16, 10**6), st.integers(16, 10**6), st.integers(0, 10), st.sampled_from(["Enforce", "Observe", "Off"])
)
def test_a_longer_context_never_leaves_the_ring(wanted: int, threshold: int, replicas: int, policy: str) -> None:
    def mode(tokens: int) -> str:
        context = {"maxTokens": tokens, "ringThresholdTokens": threshold}
        return choose(spec(context=context, replicas=replicas, admission={"policy": policy})).mode

    assert (mode(wanted) == "Ring") == (wanted > threshold)
    assert mode(wanted) == "Paged" or mode(wanted + 1) == "Ring"
