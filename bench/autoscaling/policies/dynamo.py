"""NVIDIA Dynamo's planner, load-based, for engines that do both prefill and decode.

Source: ai-dynamo/dynamo, ``components/src/dynamo/planner/core/load_scaling.py`` (``_advance_load_agg``,
``_agg_easy_decision``) at 0c6da1ec762c848fe31cef804e70d171eef4d622. Examples in our tests:
``planner/tests/unit/test_easy_scaling.py`` at 165e9c4368f60cba989d1b7b3c386f71c0c2917b.

One engine above the upper threshold: one more; all below the lower one: one less. Utilisation is KV in use and queued
prompts over the cache. Nothing is decided while a replica is under way, or while one does not report. The mode for goals,
which predicts latencies by regression, is ``dynamo_sla``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

from bench.autoscaling.policy import Fleet

THRESHOLDS: Final = {"throughput": (1.0, 0.6), "latency": (0.4, 0.1)}
"""Above the first of them more, below the second less."""


def decided(utilizations: Sequence[float], *, workers: int, target: Literal["throughput", "latency"]) -> int:
    """Workers after one decision."""
    above, below = THRESHOLDS[target]
    if any(utilization > above for utilization in utilizations):
        return workers + 1
    if workers > 1 and all(utilization < below for utilization in utilizations):
        return workers - 1
    return workers


@dataclass(frozen=True)
class Dynamo:
    """``target``: its ``optimization_target``."""

    target: Literal["throughput", "latency"] = "throughput"
    tick_seconds: float = 5.0

    @property
    def name(self) -> str:
        return f"dynamo {self.target}"

    def start(self, fleet: Fleet, now: float) -> None:
        return None

    def decide(self, fleet: Fleet, memory: None, now: float) -> tuple[int, None]:
        if not fleet.seen or len(fleet.seen) != fleet.asked:
            return fleet.asked, None
        utilizations = [
            (engine.tokens_in_use + engine.waiting_prompt_tokens) / engine.kv_tokens for engine in fleet.seen
        ]
        return decided(utilizations, workers=fleet.asked, target=self.target), None
