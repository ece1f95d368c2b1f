"""The policies that are replayed, each with the settings that it may be tuned to.

A peer family's best setting is chosen on seeds of its own, one for both loads of a trace; what has no setting of
consequence runs with its defaults. What a peer leaves open is settled in its favour, as ``policies`` says.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from bench.admission.goals import Goals
from bench.admission.policies.kaito import QueueDepthGuard
from bench.admission.policies.llmd import ConcurrencyDetector, FlowControl, UtilizationDetector
from bench.admission.policies.reservations import reserve_fixed, reserve_maximum, reserve_ratio
from bench.admission.policies.unlimited import Unlimited
from bench.admission.policies.vllm_caps import QueueCaps
from bench.admission.policy import Engine, Policy
from bench.admission.replay.ours import Kvplane

NONE: Final = "none"
OURS: Final = "kvplane"

_STALE_SECONDS: Final = 5.0
"""Between two scrapes of a gateway that reads a monitoring system instead of the engine."""

Make = Callable[[int, Goals, Engine], Policy]
"""A policy by its setting; families without one ignore it."""


@dataclass(frozen=True)
class Family:
    """One way of admission and its settings."""

    make: Make
    settings: tuple[int, ...] = (0,)


def _share(percent: int, of: int) -> int:
    return max(1, percent * of // 100)


FAMILIES: Final[dict[str, Family]] = {
    NONE: Family(lambda setting, goals, engine: Unlimited()),
    "queue-cap": Family(
        lambda setting, goals, engine: QueueCaps(max_num_queued_reqs=setting), (8, 16, 32, 64, 128, 256, 512)
    ),
    "queued-tokens-cap": Family(
        lambda setting, goals, engine: QueueCaps(max_num_queued_tokens=setting), (1024, 2048, 4096, 8192, 16384, 32768)
    ),
    "kaito": Family(lambda setting, goals, engine: QueueDepthGuard()),
    "gateway utilization": Family(
        lambda setting, goals, engine: FlowControl(
            UtilizationDetector(kv_cache_utilization=setting / 100), limit_seconds=goals.ttft_seconds
        ),
        (10, 20, 40, 60, 80, 95),
    ),
    "gateway, 5 s stale": Family(
        lambda setting, goals, engine: FlowControl(
            UtilizationDetector(staleness_seconds=2 * _STALE_SECONDS, scrape_seconds=_STALE_SECONDS),
            limit_seconds=goals.ttft_seconds,
        )
    ),
    "gateway requests": Family(
        lambda setting, goals, engine: FlowControl(
            ConcurrencyDetector(mode="requests", max_concurrency=setting), limit_seconds=goals.ttft_seconds
        ),
        (8, 16, 32, 64, 128, 256, 512),
    ),
    "gateway tokens": Family(
        lambda setting, goals, engine: FlowControl(
            ConcurrencyDetector(
                mode="tokens",
                max_token_concurrency=_share(setting, (engine.blocks - 1) * engine.block_size),
                add_estimated_output_tokens=True,
            ),
            limit_seconds=goals.ttft_seconds,
        ),
        (5, 10, 20, 40, 80, 120),
    ),
    "prompt x 1.5": Family(lambda setting, goals, engine: reserve_ratio(limit_seconds=goals.ttft_seconds)),
    "prompt + 1024": Family(lambda setting, goals, engine: reserve_fixed(limit_seconds=goals.ttft_seconds)),
    "prompt + max_tokens": Family(lambda setting, goals, engine: reserve_maximum(limit_seconds=goals.ttft_seconds)),
    OURS: Family(
        lambda setting, goals, engine: Kvplane(
            ttft_seconds=goals.ttft_seconds, tpot_seconds=goals.tpot_seconds, engine=engine
        )
    ),
}
"""By name. The gateway's utilization and tokens are in percent of the KV cache; vLLM's caps are in its own units."""
