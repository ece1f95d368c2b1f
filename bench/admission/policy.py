"""What an admission policy is to the benchmarks: decides on each request, and sees no more than it would in production.

Two drivers speak this protocol: the load generator in front of the real engine (wall clock) and the trace replay in
front of the simulated one (virtual time). A policy never reads a clock and never sleeps; ``now`` is an argument, in
seconds from any fixed start. It sees requests as they come, tokens as they pass, and the engine only through
``View.scrape``, which is as old as the policy's own scrape interval makes it: a request's true output length, the
engine's queue between scrapes or its block table are no part of the view.

What a driver owes to a policy:

- ``on_arrival`` once for each request, in order of arrival; what is held stays with the policy until a ruling;
- ``on_tick`` after every other callback, and at ``next_tick_at`` at the latest;
- ``on_first_token``, ``on_progress`` and ``on_finish`` only for requests that passed;
- ``on_scrape`` each ``scrape_seconds`` with a new ``View.scrape``; a failed scrape leaves the old one, and no call.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Protocol


class Verdict(Enum):
    """What happens to a request."""

    PASS = "pass"  # noqa: S105
    """It goes to the engine at once."""
    HOLD = "hold"
    """The policy keeps it and rules later."""
    REFUSE = "refuse"
    """It is answered 429 or 503 at once, and counts as failed."""


@dataclass(frozen=True)
class Request:
    """A request as a proxy knows it before the engine has seen it."""

    id: int
    arrived: float
    """Seconds, on the clock of ``now``."""
    prompt_tokens: int
    max_tokens: int | None
    """What the client allows as output; ``None``: as much as the context has room for."""
    tenant: str = ""
    priority: str = ""


@dataclass(frozen=True)
class Ruling:
    """The end of a hold."""

    request: int
    verdict: Verdict
    """PASS or REFUSE."""


@dataclass(frozen=True)
class Engine:
    """What an engine says of itself once: its arguments and ``vllm:cache_config_info``."""

    blocks: int
    """``num_gpu_blocks``, the null block included."""
    block_size: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int


@dataclass(frozen=True)
class Scrape:
    """One reading of the engine's ``/metrics``."""

    taken_at: float
    kv_cache_usage: float
    """``vllm:kv_cache_usage_perc``, 0 to 1."""
    running: int
    waiting: int
    preemptions: int
    """Counters count from the engine's start."""
    prompt_tokens: int
    generation_tokens: int


@dataclass(frozen=True)
class View:
    """All that a policy may see of the engine."""

    engine: Engine
    scrape: Scrape | None
    """The newest successful scrape; ``None`` before the first."""


class Policy(Protocol):
    """One policy in front of one engine; made anew for each run."""

    @property
    def name(self) -> str:
        """Name with its setting, as the report shows it: ``queue-cap 64``."""

    @property
    def scrape_seconds(self) -> float | None:
        """Time between scrapes; ``None``: this policy never looks at the engine's metrics."""

    @property
    def progress_seconds(self) -> float | None:
        """Longest time between two ``on_progress``; ``None``: this policy does not count tokens."""

    def on_arrival(self, request: Request, view: View, now: float) -> Verdict:
        """What to do with a new request."""

    def on_first_token(self, request: Request, view: View, now: float) -> None:
        """The engine has sent the first token of a request."""

    def on_progress(self, generated: Mapping[int, int], view: View, now: float) -> None:
        """Output tokens so far of requests whose count has changed, by request id."""

    def on_finish(self, request: Request, output_tokens: int, view: View, now: float) -> None:
        """A request is over: complete, aborted by its client, or failed by the engine."""

    def on_scrape(self, view: View, now: float) -> None:
        """``view.scrape`` is new."""

    def on_tick(self, view: View, now: float) -> Sequence[Ruling]:
        """Rulings on held requests, in the order in which the engine shall get them."""

    def next_tick_at(self, now: float) -> float | None:
        """When ``on_tick`` is wanted at the latest; ``None``: only after other callbacks."""
