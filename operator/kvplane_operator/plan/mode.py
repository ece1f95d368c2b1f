"""Paged or ring: what mode Auto makes of a spec, and why.

It decides from the spec alone, never from what was learned, so that it decides anew only when the spec changes.
"""

from dataclasses import dataclass
from typing import Literal

from kvplane_api import capacity
from kvplane_api.service import LLMServiceSpec
from kvplane_operator.plan import quantities

Mode = Literal["Paged", "Ring"]


def other(mode: Mode) -> Mode:
    """The mode that it is not."""
    return "Paged" if mode == "Ring" else "Ring"


@dataclass(frozen=True)
class Choice:
    """The mode of a service."""

    mode: Mode
    why: str = ""
    """A sentence, where Auto chose; empty where the user did."""


def choose(spec: LLMServiceSpec) -> Choice:
    """The mode of a service with that spec."""
    if spec.mode != "Auto":
        return Choice(spec.mode)
    wanted, threshold = spec.context.max_tokens, spec.context.ring_threshold_tokens
    if wanted is None:
        return Choice("Paged", "Mode Auto chose Paged: context.maxTokens is not set.")
    if wanted > threshold:
        why = f"context.maxTokens is {wanted}, above context.ringThresholdTokens ({threshold})."
        return Choice("Ring", f"Mode Auto chose Ring: {why}")
    fit = replica_fit(spec)
    if fit is not None and not fit.fits:
        why = f"context.maxTokens is {wanted}, and by model.facts one replica holds {fit.capacity_tokens} tokens of KV cache."
        return Choice("Ring", f"Mode Auto chose Ring: {why}")
    why = f"context.maxTokens is {wanted}, not above context.ringThresholdTokens ({threshold})."
    return Choice("Paged", f"Mode Auto chose Paged: {why}")


def replica_fit(spec: LLMServiceSpec) -> capacity.Fit | None:
    """Whether context.maxTokens fits one paged replica; None where it, or model.facts, is not given."""
    facts, wanted, engine = model_facts(spec), spec.context.max_tokens, spec.engine
    if facts is None or wanted is None:
        return None
    return capacity.fit(
        facts,
        context_tokens=wanted,
        accelerator_bytes=accelerator_bytes(spec),
        accelerators=engine.tensor_parallel_size,
        memory_percent=engine.gpu_memory_percent,
        dtype=engine.dtype,
        kv_cache_dtype=engine.dtype if engine.kv_cache_dtype == "auto" else engine.kv_cache_dtype,
        block_size=engine.block_size or 16,
    )


def model_facts(spec: LLMServiceSpec) -> capacity.ModelFacts | None:
    """model.facts as the capacity arithmetic takes them."""
    facts = spec.model.facts
    if facts is None:
        return None
    return capacity.ModelFacts(
        layers=facts.layers, kv_heads=facts.kv_heads, head_dim=facts.head_dim, parameters=facts.parameters
    )


def accelerator_bytes(spec: LLMServiceSpec) -> int:
    """model.facts.acceleratorMemory in bytes; 0 without facts."""
    return int(quantities.parse(spec.model.facts.accelerator_memory)) if spec.model.facts else 0
