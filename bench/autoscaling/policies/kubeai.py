"""KubeAI: the mean of active requests over ten minutes, over a target for each replica.

Source: substratusai/kubeai, ``internal/modelautoscaler/autoscaler.go`` at 14fd17fee87a554a1feafc59bcb68545a05bde2c,
``internal/modelclient/scale.go`` at 1dbb67376bddb52a0a6ce8bb1e3aec4ea87c37b0 and ``internal/config/system.go`` at
09cf9badff8984b93ccfc1045e6f81c3fd9fc754. Examples in our tests: ``internal/movingaverage/simple_test.go`` at
9005ad7f554f5afbc18df1cf6ecf1b0760e757f8.

The mean begins as if there had been ten minutes without requests. Up at once; down after as many lower results in a row
as intervals fit into the delay, and then one more.
"""

import math
from dataclasses import dataclass

from bench.autoscaling.policy import Fleet


@dataclass(frozen=True)
class Memory:
    """Active requests at the last looks, a ring; and lower results in a row."""

    history: tuple[float, ...]
    lower: int = 0


def noted(history: tuple[float, ...], active: float) -> tuple[float, ...]:
    """The newest in place of the oldest."""
    return (*history[1:], active)


def settled(wanted: int, *, asked: int, lower: int, required: int) -> tuple[int, int]:
    """Replicas to ask for, and lower results in a row."""
    if wanted >= asked:
        return wanted, 0
    return (wanted, lower) if lower >= required else (asked, lower + 1)


@dataclass(frozen=True)
class KubeAI:
    """``target_requests``: active requests of one replica."""

    target_requests: float
    window_seconds: float = 600.0
    down_delay_seconds: float = 30.0
    tick_seconds: float = 10.0
    name: str = "kubeai"

    def start(self, fleet: Fleet, now: float) -> Memory:
        return Memory((0.0,) * math.ceil(self.window_seconds / self.tick_seconds))

    def decide(self, fleet: Fleet, memory: Memory, now: float) -> tuple[int, Memory]:
        if not fleet.seen:
            return fleet.asked, memory
        history = noted(memory.history, float(sum(engine.running + engine.waiting for engine in fleet.seen)))
        wanted = math.ceil(sum(history) / len(history) / self.target_requests)
        required = math.ceil(self.down_delay_seconds / self.tick_seconds)
        replicas, lower = settled(max(1, wanted), asked=fleet.asked, lower=memory.lower, required=required)
        return replicas, Memory(history, lower)
