"""llm-d's workload variant autoscaler (WVA): one variant, both saturation analyzers.

Source: V1: llm-d-incubation/workload-variant-autoscaler, ``internal/saturation/analyzer.go`` at
36587f8c5d7b140ecb179dadfeb895362e6826bc. V2: llm-d/llm-d-workload-variant-autoscaler,
``internal/engines/analyzers/saturation_v2/analyzer.go`` at b28a4f661b5f10ca950b5d85ddd194453e253a54 and
``internal/engines/pipeline/cost_aware_optimizer.go`` at 74afe4ced9fb0175c45020f72d89babf05cccc34. Examples in our tests:
``internal/saturation/analyzer_test.go`` of red-hat-data-services/workload-variant-autoscaler at
9278cbc194275f2ec7a12a9a97918ee6cf4ec733 and ``saturation_v2/analyzer_test.go`` of llm-d/llm-d-autoscaling at
88d68329896d6d78c18882a7fca879d3df041f26.

V1 looks at each replica's highest KV usage and queue of the last minute, adds or takes one, and does nothing while any
replica is under way. V2 counts tokens, and what is under way as capacity. Of V2's four sources for the compute-bound
capacity the one from the engine's arguments is left out, as it only matters before the first full queue; and history is
not kept apart by output length, as each run here has one mix. Both decide each 30 s.
"""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.autoscaling.policy import Engine, Fleet

KV_THRESHOLD: Final = 0.80
QUEUE_THRESHOLD: Final = 5.0
KV_SPARE: Final = 0.10
QUEUE_SPARE: Final = 3.0
UP_THRESHOLD: Final = 0.85
DOWN_BOUNDARY: Final = 0.70
HISTORY: Final = 10
"""Full queues over which V2 averages."""
TICK_SECONDS: Final = 30.0


@dataclass(frozen=True)
class Saturation:
    """What V1 concludes from KV usage and queue length of each replica."""

    not_saturated: int
    spare_kv: float
    """Mean over those that are not saturated; 0 where all are."""
    spare_queue: float

    @property
    def up(self) -> bool:
        return self.spare_kv < KV_SPARE or self.spare_queue < QUEUE_SPARE

    @property
    def down_is_safe(self) -> bool:
        """Whether both margins stay with one replica less and the same load."""
        if self.not_saturated < 2:
            return False
        more = self.not_saturated / (self.not_saturated - 1)
        kv = KV_THRESHOLD - (KV_THRESHOLD - self.spare_kv) * more
        queue = QUEUE_THRESHOLD - (QUEUE_THRESHOLD - self.spare_queue) * more
        return kv >= KV_SPARE and queue >= QUEUE_SPARE


def saturation(replicas: Sequence[tuple[float, float]]) -> Saturation:
    """Of (KV usage, queue length) of each replica."""
    spare = [
        (KV_THRESHOLD - kv, QUEUE_THRESHOLD - queue)
        for kv, queue in replicas
        if kv < KV_THRESHOLD and queue < QUEUE_THRESHOLD
    ]
    if not spare:
        return Saturation(0, 0.0, 0.0)
    return Saturation(
        len(spare), statistics.fmean(kv for kv, _ in spare), statistics.fmean(queue for _, queue in spare)
    )


@dataclass(frozen=True)
class WvaV1:
    """Percentages of KV, lengths of queues."""

    tick_seconds: float = TICK_SECONDS
    name: str = "wva v1"

    def start(self, fleet: Fleet, now: float) -> None:
        return None

    def decide(self, fleet: Fleet, memory: None, now: float) -> tuple[int, None]:
        if not fleet.seen or len(fleet.seen) != fleet.asked:
            return fleet.asked, None
        found = saturation([_peaks(engine) for engine in fleet.seen])
        if found.up:
            return fleet.asked + 1, None
        if found.down_is_safe and fleet.asked > 1:
            return fleet.asked - 1, None
        return fleet.asked, None


def _peaks(engine: Engine) -> tuple[float, float]:
    kv, queue = engine.peak_kv_cache_usage, engine.peak_waiting
    return engine.kv_cache_usage if kv is None else kv, float(engine.waiting if queue is None else queue)


def effective_capacity(
    *, kv_tokens: int, in_use: float, waiting: int, full_queues: tuple[float, ...]
) -> tuple[float, tuple[float, ...]]:
    """Tokens that a replica can serve, and the history of tokens in use at full queues.

    The smaller of what memory allows and what compute does: tokens in use while the queue is full, else their mean so far.
    """
    by_memory = float(int(kv_tokens * KV_THRESHOLD))
    if waiting >= QUEUE_THRESHOLD and in_use > 0:
        return min(by_memory, in_use), (*full_queues, in_use)[-HISTORY:]
    if full_queues:
        return min(by_memory, float(int(statistics.fmean(full_queues)))), full_queues
    return by_memory, full_queues


def required(demand: float, *, replicas: int, capacity: float) -> int:
    """Replicas to add, where ``replicas`` are there or under way."""
    return max(0, math.ceil((demand / UP_THRESHOLD - replicas * capacity) / capacity))


def spare(demand: float, *, ready: int, capacity: float) -> int:
    """Replicas to take."""
    return max(0, math.floor((ready * capacity - demand / DOWN_BOUNDARY) / capacity))


@dataclass(frozen=True)
class WvaV2:
    """Tokens."""

    tick_seconds: float = TICK_SECONDS
    name: str = "wva v2"

    def start(self, fleet: Fleet, now: float) -> tuple[float, ...]:
        return ()

    def decide(self, fleet: Fleet, memory: tuple[float, ...], now: float) -> tuple[int, tuple[float, ...]]:
        if not fleet.seen:
            return fleet.asked, memory
        capacities, demand = [], 0.0
        for engine in fleet.seen:
            capacity, memory = effective_capacity(
                kv_tokens=engine.kv_tokens, in_use=engine.tokens_in_use, waiting=engine.waiting, full_queues=memory
            )
            capacities.append(capacity)
            demand += engine.tokens_in_use + engine.waiting * int(engine.mean_prompt_tokens)
        capacity = statistics.median(capacities)
        if capacity <= 0:
            return fleet.asked, memory
        if add := required(demand, replicas=fleet.asked, capacity=capacity):
            return fleet.asked + add, memory
        return max(1, fleet.asked - spare(demand, ready=fleet.ready, capacity=capacity)), memory
