"""production-stack's recipe for KEDA: the queue length of vLLM against a threshold of 5 per replica.

Source: vllm-project/production-stack, ``docs/source/use_cases/autoscaling-keda.rst`` (poll 15 s, cooldown 360 s) and
``helm/templates/scaledobject-vllm.yaml``, both at 183a136abb5f7d3a41e2ee9e96b2c33cd20aad30. KEDA hands the figure to an
HPA as an external metric with a target per replica (``GetExternalPerPodMetricReplicas``, see ``hpa``); its cooldown
matters only for the last replica, on the way to zero. Examples in our tests: kubernetes/kubernetes,
``replica_calculator_test.go`` at 5f3bc7cdab9b2544f0389b9a83c88fa15b793b7a.

The recipe's query does not add the pods up, and KEDA's Prometheus scaler refuses an answer of several series
(kedacore/keda, ``pkg/scalers/prometheus_scaler.go``, ``ExecutePromQuery``): taken at its word it stops with the second
replica. That is ``aggregated=False``; runs use the sum, which favours it.
"""

import math
from dataclasses import dataclass

from bench.autoscaling.policies.hpa import TOLERANCE, Memory, normalized
from bench.autoscaling.policy import Fleet


def recommended(total: float, *, per_replica: float, current: int) -> int:
    """Replicas for a total of which each takes ``per_replica``."""
    if current and abs(1 - total / (per_replica * current)) <= TOLERANCE:
        return current
    return math.ceil(total / per_replica)


@dataclass(frozen=True)
class Keda:
    """``threshold``: waiting requests per replica."""

    threshold: float = 5.0
    aggregated: bool = True
    tick_seconds: float = 15.0

    @property
    def name(self) -> str:
        return "keda" if self.aggregated else "keda, as written"

    def start(self, fleet: Fleet, now: float) -> Memory:
        return Memory(recommendations=((now, fleet.asked),))

    def decide(self, fleet: Fleet, memory: Memory, now: float) -> tuple[int, Memory]:
        if not fleet.seen or (len(fleet.seen) > 1 and not self.aggregated):
            return fleet.asked, memory
        total = sum(engine.waiting for engine in fleet.seen)
        wanted = max(1, recommended(total, per_replica=self.threshold, current=fleet.asked))
        return normalized(wanted, memory, current=fleet.asked, now=now)
