"""What admission is asked, what it answers, and what it is told of the engine: values without behaviour.

Tokens are KV-cache tokens. The clock is the caller's: seconds, monotonic, any origin. ``None`` always means unknown or
not yet, never 0.
"""

from dataclasses import dataclass
from enum import StrEnum


class Reason(StrEnum):
    """Why a request waits or is refused; the values of ``x-kvplane-reason`` and of the metrics' label."""

    KV = "kv"
    """The expected KV peak, or the KV known to be in use, would exceed its limit."""
    PREFILL = "prefill"
    """Too many prompt tokens are under way to the engine that have no first token yet."""
    SEQUENCES = "sequences"
    """As many sequences run as the engine takes, or as it can give the promised time per token."""
    QUEUE_FULL = "queue-full"
    """The queue holds as many requests or bytes as it may; or the engine's own queue is full."""
    DEADLINE = "deadline"
    """The first token could not come in time any more."""
    TENANT = "tenant"
    """The tenant's token bucket is empty."""
    CONTEXT = "context-length"
    """It never fits this engine, however long it waits."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What one request asks for. Raises ValueError, with a sentence, for a field out of its bounds."""

    prompt_tokens: int
    outputs: int = 1
    """Sequences generated from the one prompt (OpenAI's ``n``)."""
    max_output_tokens: int | None = None
    """Of each output; ``None``: up to the context limit."""
    tenant: str = ""
    priority: int = 0
    """Index into ``config.admission.priorities``; 0 is the highest, and the only one where there are no names."""
    prompt_bytes: int = 0
    """Bytes that the request holds while it waits."""
    least_prompt_tokens: int | None = None
    """Tokens that the longest of its prompts has for certain, by which alone it may be called too long for the engine; None:
    ``prompt_tokens``. Less than that where tokens are estimated, or where several prompts are one request."""

    def __post_init__(self) -> None:
        _at_least("prompt_tokens", self.prompt_tokens, 1)
        _at_least("outputs", self.outputs, 1)
        if self.max_output_tokens is not None:
            _at_least("max_output_tokens", self.max_output_tokens, 1)
        _at_least("priority", self.priority, 0)
        _at_least("prompt_bytes", self.prompt_bytes, 0)
        if self.least_prompt_tokens is not None:
            _at_least("least_prompt_tokens", self.least_prompt_tokens, 0)


@dataclass(frozen=True, slots=True)
class Refused:
    """Why a request is not served now, for its client."""

    reason: Reason
    retry_after_seconds: int | None
    """From 1 to 30; ``None`` where another try cannot help (``Reason.CONTEXT``)."""
    message: str
    """A sentence with the numbers and the cure."""


@dataclass(slots=True, eq=False)
class Entry:
    """One request's stay, from :meth:`Admission.offer` to :meth:`Admission.end`; only admission writes to it.

    Undecided while both ``admitted_at`` and ``refusal`` are None.
    """

    demand: Demand
    arrived_at: float
    admitted_at: float | None = None
    refusal: Refused | None = None
    would_refuse: Reason | None = None
    """Why policy Enforce would have refused it; set only with policy Observe."""
    first_token_at: float | None = None
    generated: int = 0
    """Output tokens so far, over all outputs."""


@dataclass(frozen=True, slots=True)
class Feedback:
    """One scrape of the engine; each field is None where the engine does not export it."""

    kv_blocks: int | None = None
    """Blocks that requests can use: vLLM's null block is not among them."""
    block_size_tokens: int | None = None
    max_model_len_tokens: int | None = None
    """Longest prompt + output of one sequence."""
    kv_blocks_used: int | None = None
    """Blocks that running requests hold; cached blocks that nobody holds are free."""
    preemptions_total: int | None = None
    preempted_tokens_total: float | None = None
    """Tokens whose KV was thrown away by preemptions and has to be computed again."""
    requests_running: int | None = None
    requests_waiting: int | None = None
    generation_tokens_total: int | None = None
    prefix_hit_ratio: float | None = None
    """Share of prompt tokens found in the prefix cache, over a recent window."""
    thrashing: bool = False


def _at_least(field: str, value: int, bound: int) -> None:
    if value < bound:
        raise ValueError(f"{field} must be at least {bound}; it is {value}.")
