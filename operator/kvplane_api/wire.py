"""Wire models between the operator and the sidecar.

``SidecarConfig`` goes from the operator to the sidecar, as one JSON file in a ConfigMap volume, and is read again when
the file changes. ``SidecarState`` goes the other way, as the answer of ``GET :8001/state``. Both are versioned by
``schema``; unknown fields of a newer peer are ignored, a missing signal is ``None``: absent means unknown, never 0.
"""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field
from pydantic.alias_generators import to_camel


class _Wire(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, populate_by_name=True, extra="ignore", frozen=True)


class SloConfig(_Wire):
    """What users were promised."""

    ttft_milliseconds: int = Field(default=2000, ge=1)
    """Longest time to the first token, queueing included."""
    tpot_milliseconds: int = Field(default=50, ge=1)
    """Longest mean time between two output tokens of one request."""


class QueueConfig(_Wire):
    """Bounds of the queue in front of the engine."""

    max_requests: int = Field(default=256, ge=0)
    """Requests that may wait; 0 refuses what cannot start at once."""
    max_wait_seconds: int | None = Field(default=None, ge=1)
    """Longest wait; ``None``: ``slo.ttft_milliseconds``."""


class FairnessConfig(_Wire):
    """How tenants share an engine."""

    header: str | None = None
    """Name of the request header whose value is the tenant; ``None``: all requests are one tenant's."""
    tokens_per_second: int | None = Field(default=None, ge=1)
    """Refill of each tenant's token bucket (prompt + output); it holds a minute's worth. ``None``: no bucket."""


class AdmissionConfig(_Wire):
    """What the sidecar lets through to the engine."""

    policy: Literal["Enforce", "Observe", "Off"] = "Enforce"
    """Enforce holds and refuses; Observe decides and counts, and lets everything pass; Off does not decide."""
    reservation: Literal["Expected", "Worst"] = "Expected"
    """KV memory held for a request: its expected output, or all that it may generate."""
    kv_hard_cap_percent: int = Field(default=95, ge=50, le=99)
    """Share of the engine's KV blocks up to which requests are let in: those in use then, and the new prompt's. Never learned."""
    kv_peak_percent: int | None = Field(default=None, ge=50, le=200)
    """Upper bound of the learned factor on the predicted KV peak; ``None``: learned too."""
    queue: QueueConfig = QueueConfig()
    fairness: FairnessConfig = FairnessConfig()
    priorities: tuple[str, ...] = ()
    """Names of the classes, highest first; empty: one class."""


class EngineConfig(_Wire):
    """What the operator told the engine and the engine does not export."""

    max_batched_tokens: int | None = Field(default=None, ge=1)
    """Tokens of one step; ``None``: the engine's own default, unknown here."""
    max_sequences: int | None = Field(default=None, ge=1)
    """Requests of one step; ``None``: the engine's own default, unknown here."""
    speculative_tokens: int = Field(default=0, ge=0)
    """Slots per sequence that speculative decoding needs beyond the tokens there are."""
    prefix_caching: bool = True
    kv_events: bool = False
    """Whether the engine publishes its KV events on the socket in ``names.PATH_KV_EVENTS``. Read once, when the sidecar starts: it
    follows from the engine's arguments, which change with the pod."""


class SidecarConfig(_Wire):
    """What the operator tells a sidecar. Every field but ``engine.kv_events`` can change without a pod restart."""

    schema_version: Literal[1] = 1
    served_name: str = Field(min_length=1)
    """Model name that clients use; the ``model_name`` label of every metric."""
    drain_seconds: int = Field(default=600, ge=0)
    """Longest time ``/drain`` waits for requests in flight."""
    max_body_bytes: int = Field(default=16 * 1024 * 1024, ge=1024)
    """Largest request body; a larger one is answered 413."""
    slo: SloConfig = SloConfig()
    admission: AdmissionConfig = AdmissionConfig()
    engine: EngineConfig = EngineConfig()


class EngineSignals(_Wire):
    """The engine's own counters, normalised over its versions; ``None`` where the engine does not export one."""

    kv_cache_usage_ratio: float | None = None
    kv_cache_blocks: int | None = None
    kv_cache_block_size_tokens: int | None = None
    kv_cache_capacity_tokens: int | None = None
    requests_running: int | None = None
    requests_waiting: int | None = None
    waiting_prompt_tokens: int | None = None
    """Still to be computed for the requests that wait, what is cached left out. Only a ring tells it."""
    waiting_kv_tokens: int | None = None
    """KV tokens that these may come to hold, as far as the usage does not count them yet. Only a ring tells it."""
    preemptions_total: int | None = None
    prompt_tokens_total: int | None = None
    """Once per prompt, whether they were computed or found in the prefix cache."""
    prefix_hits_tokens_total: int | None = None
    """Of these, found in the prefix cache."""
    generation_tokens_total: int | None = None
    max_model_len_tokens: int | None = None
    """Longest prompt + output the engine accepts, from its ``/v1/models``."""


class AdmissionState(_Wire):
    """What admission holds and decides now; everything but the policy is 0 with policy Off."""

    policy: Literal["Enforce", "Observe", "Off"]
    running: int = Field(ge=0)
    """Requests that were let through and are not over."""
    queued: int = Field(ge=0)
    queued_prompt_tokens: int = Field(ge=0)
    queued_reservation_tokens: int = Field(ge=0)
    """KV tokens that the queued requests would reserve."""
    reserved_tokens: int = Field(ge=0)
    """KV tokens held now plus those expected of the requests that run: the predicted peak M."""
    kv_peak_ratio: float | None = None
    """The predicted peak over the engine's capacity; ``None`` while the capacity is unknown, and in front of a ring, which
    decides on its KV itself."""
    kappa: float
    """Learned factor: requests are admitted while the predicted peak is at most kappa x capacity. 1 in front of a ring."""
    admitted_total: int = Field(ge=0)
    refused_total: int = Field(ge=0)
    """Requests refused for want of room: not those that fit no engine, nor those over a tenant's own limit."""
    shed_reservation_tokens_total: int = Field(ge=0)
    """KV tokens that these would have reserved: demand that admission hides from the engine. Each attempt counts: no request says
    that it was there before."""


class ThrashState(_Wire):
    """What the thrash detector says now."""

    kind: Literal["preemption", "prefix", "offload"] | None = None
    """``None``: the engine does not thrash, as far as can be told."""
    wasted_tokens_per_second: float | None = None
    """Tokens computed again; ``None`` while it cannot be told."""


class PromisesState(_Wire):
    """What became of the promises in ``spec.slo``, of answers that came whole; those that nothing can be said of are left out."""

    kept_total: int = Field(ge=0)
    broken_total: int = Field(ge=0)
    """The first token was late, or the others were slow."""


class SidecarState(_Wire):
    """Answer of ``GET /state``: one pod's truth at one moment."""

    schema_version: Literal[1] = 1
    pod: str
    """Name of the pod, so that a reader can tell that it reached the pod it meant."""
    served_name: str
    engine_ready: bool
    draining: bool
    drained: bool = False
    """Whether the drain is over: nothing is waited for any more. The other ranks of a ring go only then."""
    in_flight: int = Field(ge=0)
    """Client requests the proxy holds now."""
    signal_age_seconds: float | None = None
    """Age of ``engine``; ``None`` before the first successful scrape."""
    missing_signals: tuple[str, ...] = ()
    """Signals that admission needs and the last scrape lacked, each with the engine's names that were looked for:
    ``kv_cache_usage_ratio (vllm:kv_cache_usage_perc, vllm:gpu_cache_usage_perc)``."""
    startup_seconds: float | None = None
    """From the start of the sidecar to the engine's first healthy answer; ``None`` until then."""
    engine: EngineSignals = EngineSignals()
    admission: AdmissionState | None = None
    """``None`` only from a sidecar that has no admission yet."""
    promises: PromisesState | None = None
    """``None`` only from a sidecar that does not judge answers yet."""
    thrash: ThrashState = ThrashState()
