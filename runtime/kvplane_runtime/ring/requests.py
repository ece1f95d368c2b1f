"""What the scheduler is asked, and what it says: requests, the policy that they are served by, events, and the state.

Plain values; the scheduler makes the events, and the engine and the API pass them on.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from kvplane_runtime.ring.accounting import Reserve, Tokens
from kvplane_runtime.ring.admission import Refusal
from kvplane_runtime.ring.prefix import BLOCK_TOKENS
from kvplane_runtime.ring.sampling import Sampled, Sampling


@dataclass(frozen=True, slots=True)
class Policy:
    """How the ring is shared. Times in seconds."""

    slice_seconds: float = 1.0
    """Longest window: what a short prompt may have to wait for a long one. Longer hides more communication."""
    window_tokens: int = 1024
    """Least new tokens per rank and window while keys go round, whatever they take: below, communication is no longer hidden
    (docs: sizing)."""
    keys_per_query: float = math.inf
    """Of the model (:mod:`exchange`), by which keys go round or queries. Where it is not said, keys."""
    short_tokens: int = 1024
    """Prompts of fewer than 2N times this lie whole on one rank. 0: every prompt is cut."""
    ttft_seconds: float = 2.0
    """Promised time to the first token."""
    stretch: float = 2.0
    """A prompt whose prefill alone takes longer is promised so many times its own."""
    max_sequences: int = 64
    """Most outputs at a time: the size of the decode batch."""
    default_output_tokens: int = 4096
    """Longest output of a request that does not say: all of it is reserved, so it is not the whole context."""
    park_seconds: float = 600.0
    """How long a request that lost its room with a rank waits for the ring to be whole again."""
    reserve: Reserve = Reserve.OFF
    """Survive: admit only what the ring can hold without any one rank."""
    model_tokens: int | None = None
    """Longest prompt + output of the model; None: no bound."""
    context_tokens: int | None = None
    """Longest prompt + output that is to be served; None: no bound but the model's and the ring's."""
    prefix_block_tokens: int = BLOCK_TOKENS
    """Shortest prefix that is reused."""


@dataclass(frozen=True, slots=True)
class Request:
    """What a client wants."""

    id: str
    """Its own, unique among those in progress."""
    prompt: Sequence[int]
    """At least one token."""
    max_tokens: int | None = None
    """Most tokens of each output; None: the policy's default, or as many as fit."""
    sampling: Sampling = field(default_factory=Sampling)
    outputs: int = 1
    stop_ids: frozenset[int] = frozenset()
    """Tokens that end an output."""


@dataclass(frozen=True, slots=True)
class Accepted:
    """The request has room and will be served."""

    request: str
    cached_tokens: int
    """Of the prompt, found computed."""
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Progress:
    """So much is computed of the prompt, or after a loss of what there was; sent after each window but the last."""

    request: str
    computed: int
    prompt: int
    """Tokens in all."""


@dataclass(frozen=True, slots=True)
class Token:
    """One more token of an output; the one that ends it included."""

    request: str
    output: int
    sampled: Sampled


@dataclass(frozen=True, slots=True)
class Ended:
    """An output is complete."""

    request: str
    output: int
    reason: str
    """``stop`` (a stop token) or ``length``."""


@dataclass(frozen=True, slots=True)
class Failed:
    """The request cannot be served to its end; nothing follows."""

    request: str
    refusal: Refusal


Event = Accepted | Progress | Token | Ended | Failed


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What the scheduler holds and has done, for people and metrics."""

    waiting: int
    """Outputs whose prompt is not begun."""
    prefilling: int
    decoding: int
    parked: int
    kept: int
    """Finished sequences kept for their prefixes."""
    waiting_prompt_tokens: int
    """Still to be computed for the outputs that wait or are parked; what is under way is not in it."""
    waiting_kv_tokens: int
    """On all ranks, what parked outputs may come to hold beyond what they hold; the others have theirs in ``active``."""
    capacity_tokens: int
    """KV tokens of each rank."""
    limit_tokens: int
    """KV tokens of each rank that requests in progress may take; 0 where a lone rank is to be survived."""
    whole_tokens: int
    """KV tokens that requests in progress may take when no rank is lost, on all ranks together."""
    longest_tokens: int | None
    """Longest prompt + output that the model and the settings allow; None: no bound."""
    held: Tokens
    """KV tokens by rank, of sequences in progress and kept ones."""
    active: Tokens
    """By rank, what sequences in progress hold or may come to hold."""
    kept_tokens: Tokens
    """By rank, of kept sequences."""
    counts: Mapping[str, int]
    """What was done since the start: see ``COUNTS``."""


COUNTS: Final = (
    "admitted",
    "refused_never",
    "refused_kv",
    "refused_requests",
    "refused_reservation_tokens",
    "prompt_tokens",
    "cached_tokens",
    "computed_tokens",
    "refilled_tokens",
    "generated_tokens",
    "windows",
    "steps",
    "evicted_sequences",
    "parked_requests",
    "cancelled",
)
"""Counters of a snapshot. Prompt tokens are those of admitted requests; computed ones include what was refilled."""
