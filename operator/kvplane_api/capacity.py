"""Capacity arithmetic: how much KV cache a context needs and how much an accelerator holds. Pure, integers only.

Used by the operator (does the context fit before anything starts?) and by the docs. Symbols follow the papers: a token's
KV cache is 2 (K and V) x layers x KV heads x head dimension x bytes per element (PagedAttention, arXiv 2309.06180, 2).
"""

from dataclasses import dataclass

_BYTES_PER_ELEMENT = {
    "auto": 2,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "fp8": 1,
    "fp8_e4m3": 1,
    "fp8_e5m2": 1,
}


RING_KV_PERCENT = 60
"""Share of a rank's memory left after the weights that the ring engine takes for KV, unless it is told otherwise: the rest
is for activations and for blocks on their way."""

SMALLEST_RING = 2


class CapacityError(ValueError):
    """An argument is out of its bounds; the message names it, its bound and its value."""


@dataclass(frozen=True)
class ModelFacts:
    """What the arithmetic needs to know of a model."""

    layers: int
    kv_heads: int
    head_dim: int
    parameters: int
    """Number of weights; their bytes follow from the dtype."""


@dataclass(frozen=True)
class Fit:
    """Whether a context fits one replica, with the numbers that say why."""

    fits: bool
    needed_tokens: int
    capacity_tokens: int
    kv_bytes_per_token: int
    kv_bytes: int
    """Bytes left for KV cache over all accelerators of the replica; 0 where the weights alone do not fit."""
    weight_bytes: int


@dataclass(frozen=True)
class RingFit:
    """The smallest ring that holds a context, with the numbers that say why."""

    size: int | None
    """None where no ring does: the weights leave a rank no room."""
    rank_tokens: int
    """Tokens whose KV one rank holds."""
    kv_bytes_per_token: int
    kv_bytes: int
    """Bytes of one rank for KV cache."""
    weight_bytes: int
    """Of the whole model: every rank holds it."""


def bytes_per_element(dtype: str, *, default: int = 2) -> int:
    """Bytes of one element of ``dtype``; ``auto`` is taken as 16 bit, unknown names as ``default``."""
    return _BYTES_PER_ELEMENT.get(dtype, default)


def kv_bytes_per_token(facts: ModelFacts, *, kv_cache_dtype: str = "auto") -> int:
    """Bytes of KV cache of one token over all layers. Llama-3.1-8B in 16 bit: 131,072."""
    return 2 * facts.layers * facts.kv_heads * facts.head_dim * bytes_per_element(kv_cache_dtype)


def fit(
    facts: ModelFacts,
    *,
    context_tokens: int,
    accelerator_bytes: int,
    accelerators: int = 1,
    memory_percent: int = 90,
    dtype: str = "auto",
    kv_cache_dtype: str = "auto",
    block_size: int = 16,
    activation_percent: int = 5,
) -> Fit:
    """Does one request of ``context_tokens`` fit the KV cache of one replica?

    Left for KV = accelerator_bytes x memory_percent - weights / accelerators - activations, on each accelerator; KV heads
    are split over accelerators, or repeated where there are fewer heads than accelerators. ``activation_percent`` of
    the accelerator is held back for activations and graphs (vLLM profiles the true figure at start; 5 % is on the safe
    side of what it reports for 8B to 70B models).
    """
    _positive("context_tokens", context_tokens)
    _positive("accelerator_bytes", accelerator_bytes)
    _positive("accelerators", accelerators)
    _positive("block_size", block_size)
    weight_bytes = facts.parameters * bytes_per_element(dtype)
    usable = accelerator_bytes * (memory_percent - activation_percent) // 100 - -(-weight_bytes // accelerators)
    per_token = kv_bytes_per_token(facts, kv_cache_dtype=kv_cache_dtype)
    # The accelerator with the most heads fills up first.
    heads_of_one = -(-facts.kv_heads // accelerators)
    kv_bytes = max(0, usable) * facts.kv_heads // heads_of_one
    capacity = kv_bytes // per_token // block_size * block_size
    return Fit(
        fits=context_tokens <= capacity,
        needed_tokens=context_tokens,
        capacity_tokens=capacity,
        kv_bytes_per_token=per_token,
        kv_bytes=kv_bytes,
        weight_bytes=weight_bytes,
    )


def ring_fit(
    facts: ModelFacts,
    *,
    context_tokens: int,
    rank_bytes: int,
    dtype: str = "auto",
    kv_percent: int = RING_KV_PERCENT,
    spare_ranks: int = 0,
) -> RingFit:
    """The smallest ring for one request of ``context_tokens``, by what the ring engine does at its start.

    Left for KV on a rank = (rank_bytes - weights) x kv_percent; each rank holds all weights and 1/N of a sequence, K and V
    in the dtype of the weights. ``spare_ranks`` of the ring may be lost and the context still fits.
    """
    _positive("context_tokens", context_tokens)
    _positive("rank_bytes", rank_bytes)
    _not_negative("spare_ranks", spare_ranks)
    weight_bytes = facts.parameters * bytes_per_element(dtype)
    per_token = kv_bytes_per_token(facts, kv_cache_dtype=dtype)
    kv_bytes = max(0, rank_bytes - weight_bytes) * kv_percent // 100
    rank_tokens = kv_bytes // per_token
    needed = -(-context_tokens // rank_tokens) + spare_ranks if rank_tokens else None
    return RingFit(
        size=None if needed is None else max(SMALLEST_RING, needed),
        rank_tokens=rank_tokens,
        kv_bytes_per_token=per_token,
        kv_bytes=kv_bytes,
        weight_bytes=weight_bytes,
    )


def _positive(name: str, value: int) -> None:
    if value < 1:
        raise CapacityError(f"{name} must be at least 1; it is {value}.")


def _not_negative(name: str, value: int) -> None:
    if value < 0:
        raise CapacityError(f"{name} must not be negative; it is {value}.")
