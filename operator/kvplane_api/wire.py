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


class SidecarConfig(_Wire):
    """What the operator tells a sidecar. Every field can change without a pod restart."""

    schema_version: Literal[1] = 1
    served_name: str = Field(min_length=1)
    """Model name that clients use; the ``model_name`` label of every metric."""
    drain_seconds: int = Field(default=600, ge=0)
    """Longest time ``/drain`` waits for requests in flight."""
    max_body_bytes: int = Field(default=16 * 1024 * 1024, ge=1024)
    """Largest request body; a larger one is answered 413."""


class EngineSignals(_Wire):
    """The engine's own counters, normalised over its versions; ``None`` where the engine does not export one."""

    kv_cache_usage_ratio: float | None = None
    kv_cache_blocks: int | None = None
    kv_cache_block_size_tokens: int | None = None
    kv_cache_capacity_tokens: int | None = None
    requests_running: int | None = None
    requests_waiting: int | None = None
    preemptions_total: int | None = None
    prompt_tokens_total: int | None = None
    generation_tokens_total: int | None = None
    max_model_len_tokens: int | None = None
    """Longest prompt + output the engine accepts, from its ``/v1/models``."""


class SidecarState(_Wire):
    """Answer of ``GET /state``: one pod's truth at one moment."""

    schema_version: Literal[1] = 1
    pod: str
    """Name of the pod, so that a reader can tell that it reached the pod it meant."""
    served_name: str
    engine_ready: bool
    draining: bool
    in_flight: int = Field(ge=0)
    """Client requests the proxy holds now."""
    signal_age_seconds: float | None = None
    """Age of ``engine``; ``None`` before the first successful scrape."""
    startup_seconds: float | None = None
    """From the start of the sidecar to the engine's first healthy answer; ``None`` until then."""
    engine: EngineSignals = EngineSignals()
