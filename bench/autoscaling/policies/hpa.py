"""Kubernetes' HorizontalPodAutoscaler with its default behaviour, on per-pod KV usage and queue length.

Source: kubernetes/kubernetes, ``pkg/controller/podautoscaler/replica_calculator.go`` (``calcPlainMetricReplicas``) and
``horizontal.go`` (``stabilizeRecommendationWithBehaviors``, ``convertDesiredReplicasWithBehaviorRate``) at
00067268967ec95a40035bd666374a1caf48dd1a; default rules in ``pkg/apis/autoscaling/v2/defaults.go`` at
1adaa75345752d96375fae03334fa9ed3bf535a1. Examples in our tests: ``replica_calculator_test.go`` at
5f3bc7cdab9b2544f0389b9a83c88fa15b793b7a and ``horizontal_test.go`` at 003e86297d18a8538c9da3619871393f9703bf70.

The ratio is taken over the pods that report. Pods that do not report (a vLLM that loads runs, but exports nothing yet)
count as 0 where the others ask for more and as the target where they ask for less; a result that this turns round is no
change. Of several metrics the highest result counts. 15 s between decisions is ``--horizontal-pod-autoscaler-sync-period``.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.autoscaling.policy import Fleet

TOLERANCE: Final = 0.1
DOWN_WINDOW_SECONDS: Final = 300.0
UP_PERCENT: Final = 100
UP_PODS: Final = 4
UP_PERIOD_SECONDS: Final = 15.0


def recommended(values: Sequence[float], *, target: float, silent: int, current: int) -> int | None:
    """Replicas by one metric of the pods that report, beside ``silent`` ones that do not; None where none reports."""
    if not values:
        return None
    ratio = sum(values) / len(values) / target
    if not silent:
        return current if abs(1 - ratio) <= TOLERANCE else math.ceil(ratio * len(values))
    filled = sum(values) + (silent * target if ratio < 1 else 0.0)
    count = len(values) + silent
    refilled = filled / count / target
    turned = (ratio < 1 < refilled) or (refilled < 1 < ratio)
    return current if abs(1 - refilled) <= TOLERANCE or turned else math.ceil(refilled * count)


def up_limit(current: int, added: int) -> int:
    """Most replicas, where ``added`` of the current ones came within the period."""
    begin = current - added
    return max(current, begin + UP_PODS, math.ceil(begin * (1 + UP_PERCENT / 100)))


@dataclass(frozen=True)
class Memory:
    """Recommendations and additions, each with its time."""

    recommendations: tuple[tuple[float, int], ...] = ()
    additions: tuple[tuple[float, int], ...] = ()


def normalized(wanted: int, memory: Memory, *, current: int, now: float) -> tuple[int, Memory]:
    """The recommendation within stabilisation and rate limits."""
    recent = tuple(each for each in memory.recommendations if each[0] > now - DOWN_WINDOW_SECONDS)
    desired = wanted if wanted >= current else max(wanted, *(replicas for _, replicas in recent), 0)
    additions = tuple(each for each in memory.additions if each[0] > now - UP_PERIOD_SECONDS)
    if desired > current:
        desired = min(desired, up_limit(current, sum(added for _, added in additions)))
    if desired > current:
        additions = (*additions, (now, desired - current))
    return desired, Memory(recommendations=(*recent, (now, wanted)), additions=additions)


@dataclass(frozen=True)
class HorizontalPodAutoscaler:
    """Targets: mean KV usage and mean queue length; None: not used."""

    kv_usage: float | None = 0.7
    waiting: float | None = 5.0
    tick_seconds: float = 15.0
    name: str = "hpa"

    def start(self, fleet: Fleet, now: float) -> Memory:
        # A new controller begins with the replicas there are as its first recommendation.
        return Memory(recommendations=((now, fleet.asked),))

    def decide(self, fleet: Fleet, memory: Memory, now: float) -> tuple[int, Memory]:
        silent = fleet.asked - len(fleet.seen)
        results = []
        for target, values in (
            (self.kv_usage, [engine.kv_cache_usage for engine in fleet.seen]),
            (self.waiting, [float(engine.waiting) for engine in fleet.seen]),
        ):
            if target is not None:
                result = recommended(values, target=target, silent=max(0, silent), current=fleet.asked)
                if result is not None:
                    results.append(result)
        if not results:
            return fleet.asked, memory
        return normalized(max(1, *results), memory, current=fleet.asked, now=now)
