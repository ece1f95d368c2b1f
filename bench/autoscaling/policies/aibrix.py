"""AIBrix's application-specific pod autoscaler (APA): the mean of a metric over its target, within a dead band.

Source: vllm-project/aibrix, ``pkg/controller/podautoscaler/algorithm/apa.go`` (``computeTargetReplicas``) at
4148b7a1640a40a9674b0b07885693bb75bf3dd0. Examples in our tests: ``apa_test.go`` beside it, at
2aff67a4cb999de0995f44a6b213acd93526ac47.

The metric is KV usage, as in its samples for vLLM. It multiplies the replicas asked for, those that still start included,
by a ratio of those that report.
"""

import math
from dataclasses import dataclass

from bench.autoscaling.policy import Fleet


def target_replicas(
    current: int,
    *,
    use: float,
    target: float,
    up_tolerance: float = 0.1,
    down_tolerance: float = 0.1,
    max_up_rate: float = 2.0,
    max_down_rate: float = 2.0,
) -> int:
    """Replicas for a mean use per pod."""
    ratio = use / target
    wanted = math.ceil(current * ratio)
    if ratio > 1 + up_tolerance:
        return min(wanted, math.ceil(max_up_rate * current))
    if ratio < 1 - down_tolerance:
        return max(wanted, math.floor(current / max_down_rate))
    return current


@dataclass(frozen=True)
class Apa:
    """``kv_usage``: mean that is aimed at."""

    kv_usage: float = 0.5
    tick_seconds: float = 10.0
    name: str = "aibrix apa"

    def start(self, fleet: Fleet, now: float) -> None:
        return None

    def decide(self, fleet: Fleet, memory: None, now: float) -> tuple[int, None]:
        seen = fleet.seen
        if not seen:
            return fleet.asked, None
        use = sum(engine.kv_cache_usage for engine in seen) / len(seen)
        return max(1, target_replicas(fleet.asked, use=use, target=self.kv_usage)), None
