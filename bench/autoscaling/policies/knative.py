"""Knative's pod autoscaler (KPA) on concurrency.

Source: knative/serving, ``pkg/autoscaler/scaling/autoscaler.go`` (``autoscaler.Scale``) at
00a4a55cd385aab53717b357aed7e1f9459b349e. Examples in our tests: ``autoscaler_test.go`` beside it, at
01f103ef3c892996e4803e0d6b5415c3da708438. Defaults are those of its ConfigMap ``config-autoscaler``: tick 2 s, windows of
60 s and 6 s, panic at twice the ready pods, at most 1,000 times up and half down, 70 % of the target.

Concurrency is requests in the engine and in its queue, as the queue-proxy in front of it would count them. Both windows
are means of what was scraped. No panic ends while a window's metric is missing: without data there is no decision.
"""

import math
from dataclasses import dataclass, replace

from bench.autoscaling.policy import Fleet


@dataclass(frozen=True)
class Spec:
    """Fields of ``DeciderSpec`` of the same names."""

    target: float
    max_scale_up_rate: float = 1000.0
    max_scale_down_rate: float = 2.0
    panic_threshold: float = 2.0
    stable_window: float = 60.0
    panic_window: float = 6.0


@dataclass(frozen=True)
class Memory:
    """State of the panic mode, and (time, concurrency) of the stable window."""

    panic_since: float | None = None
    panic_pods: int = 0
    samples: tuple[tuple[float, float], ...] = ()


def scale(stable: float, panic: float, *, ready: int, spec: Spec, memory: Memory, now: float) -> tuple[int, Memory]:
    """Pods for the mean concurrency of both windows."""
    pods = max(1, ready)
    highest = math.ceil(spec.max_scale_up_rate * pods)
    lowest = math.floor(pods / spec.max_scale_down_rate)
    by_stable, by_panic = math.ceil(stable / spec.target), math.ceil(panic / spec.target)
    desired = min(max(by_stable, lowest), highest)
    if by_panic / pods >= spec.panic_threshold:
        memory = replace(memory, panic_since=now)
    elif memory.panic_since is not None and memory.panic_since + spec.stable_window < now:
        memory = replace(memory, panic_since=None, panic_pods=0)
    if memory.panic_since is None:
        return desired, memory
    held = max(memory.panic_pods, desired, min(max(by_panic, lowest), highest))
    return held, replace(memory, panic_pods=held)


@dataclass(frozen=True)
class Knative:
    """``concurrency``: requests that one replica is meant to take."""

    concurrency: float
    utilization: float = 0.7
    tick_seconds: float = 2.0
    name: str = "knative"

    def start(self, fleet: Fleet, now: float) -> Memory:
        # More than one pod: it begins in a panic, to keep them until it has seen enough.
        return Memory(panic_since=now if fleet.ready > 1 else None, panic_pods=fleet.ready)

    def decide(self, fleet: Fleet, memory: Memory, now: float) -> tuple[int, Memory]:
        if not fleet.seen:
            return fleet.asked, memory
        spec = Spec(target=self.concurrency * self.utilization)
        concurrency = float(sum(engine.running + engine.waiting for engine in fleet.seen))
        samples = (*(each for each in memory.samples if each[0] > now - spec.stable_window), (now, concurrency))
        recent = [value for at, value in samples if at > now - spec.panic_window]
        stable = sum(value for _, value in samples) / len(samples)
        memory = replace(memory, samples=samples)
        panic = sum(recent) / len(recent)
        pods, memory = scale(stable, panic, ready=fleet.ready, spec=spec, memory=memory, now=now)
        return max(1, pods), memory
