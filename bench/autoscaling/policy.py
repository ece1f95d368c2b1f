"""What a scaling law is to the benchmark: a pure function from what it may see, and what it remembers, to replicas.

A law sees what the engines' ``/metrics`` showed at the last scrape, and how many replicas are asked for. It never reads a
clock; ``now`` is in seconds from any fixed start. Its memory is a value that it returns with each decision.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol


@dataclass(frozen=True, slots=True)
class ForwardPass:
    """One step of an engine: how long it took, and what was in it."""

    seconds: float
    prompt_tokens: float
    prompts: int
    decode_kv_tokens: float
    """KV of the requests that decode."""
    decodes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Engine:
    """One ready replica as last scraped; figures are called as vLLM's."""

    name: str
    kv_cache_usage: float
    """From 0 to 1."""
    running: int
    waiting: int
    """In the engine's queue, and in the queue of whatever admits requests in front of it."""
    waiting_prompt_tokens: int = 0
    """Prompt tokens of those."""
    kv_tokens: int
    """That the KV cache holds."""
    mean_prompt_tokens: float = 0.0
    """Of recent requests; 0: there were none."""
    peak_kv_cache_usage: float | None = None
    """Highest of the last minute; None: as now."""
    peak_waiting: int | None = None
    max_batched_tokens: int = 2048
    """vLLM's argument, as the next one."""
    max_sequences: int = 256
    forward_pass: ForwardPass | None = None
    """The last step; None: nothing ran."""
    admitted_total: float = 0.0
    refused_total: float = 0.0
    prompt_tokens_total: float = 0.0
    generation_tokens_total: float = 0.0

    @property
    def tokens_in_use(self) -> float:
        return self.kv_cache_usage * self.kv_tokens


@dataclass(frozen=True, slots=True)
class Fleet:
    """One service as its autoscaler sees it."""

    asked: int
    """Replicas asked for (``spec.replicas``)."""
    engines: Sequence[Engine | None]
    """One for each ready replica; None: it could not be scraped."""

    @property
    def ready(self) -> int:
        return len(self.engines)

    @property
    def pending(self) -> int:
        """Asked for and not ready yet."""
        return max(0, self.asked - self.ready)

    @property
    def seen(self) -> list[Engine]:
        """Those that could be scraped."""
        return [engine for engine in self.engines if engine is not None]


class Policy(Protocol):
    """A scaling law. Results are not yet cut to the service's bounds."""

    @property
    def name(self) -> str: ...

    @property
    def tick_seconds(self) -> float:
        """Between two decisions."""

    def start(self, fleet: Fleet, now: float) -> Any:
        """What it remembers before its first decision."""

    def decide(self, fleet: Fleet, memory: Any, now: float) -> tuple[int, Any]:
        """Replicas to ask for, and what to remember."""
