"""kthena: a recommendation as a HorizontalPodAutoscaler's, corrected by windows, and a panic mode.

Source: volcano-sh/kthena, under ``pkg/autoscaler``: ``algorithm/recommendation.go`` at
3ac46ac6d3ae38e5b76b684f0b9779323f9cec4e, ``algorithm/revision.go`` at 00d9c98bd2b287fa2fc8eb512d9145ed26feaadb,
``autoscaler/scaler.go`` at 0e83a0c9365800ed51df1e4b26a3126479c31df4 and ``autoscaler/status.go`` at
009abf2e416de5a6f925a7164aeef28df87c0d13; defaults in ``pkg/apis/workload/v1alpha1/autoscalingpolicy_types.go`` at
084841ac2a79330cd9184c90999cd17be4f9a479. Examples in our tests: ``algorithm/recommendation_test.go`` at
0250f2c75ade4d9d435831ef4e4462192abfbfde and ``algorithm/revision_test.go`` at 2513a525bef16c96e67c705a239de651efe4ba5d.

Choices that favour it: a stabilisation window of 300 s for going down, where the resource has no default and none would
follow each moment; 15 s as the period of the panic's limit, which the resource demands; and the window that limits going
down keeps the highest value, as its name there says and its algorithm expects (``status.go`` makes it of the lowest).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from bench.autoscaling.policy import Fleet

TOLERANCE: Final = 0.1
DOWN_WINDOW_SECONDS: Final = 300.0
PERIOD_SECONDS: Final = 15.0
PANIC_PERCENT: Final = 200
PANIC_HOLD_SECONDS: Final = 60.0
_MOST: Final = 1_000_000_000


def recommended(
    values: Sequence[float], *, target: float, unready: int = 0, missing: int = 0, current: int, tolerance: float
) -> int | None:
    """Replicas by one metric of those that report, beside unready ones and ready ones that do not; None without any."""
    if not values:
        return None
    ratio = _over(sum(values) / len(values), target)
    grows = ratio >= 1
    filled_up = unready if grows else 0
    if not filled_up and not missing:
        return current if abs(ratio - 1) <= tolerance else _ceil(ratio * len(values))
    count = len(values) + missing + filled_up
    refilled = _over((sum(values) + (0.0 if grows else missing * target)) / count, target)
    if abs(refilled - 1) <= tolerance or grows != (refilled >= 1):
        return current
    desired = _ceil(refilled * count)
    turned = desired < current if grows else desired > current
    return current if turned else desired


@dataclass(frozen=True)
class Step:
    """Limit of a change within a period: by the larger (``either``) or the smaller of both."""

    instances: int = 1
    percent: int = 100
    either: bool = True


def corrected_up(wanted: int, *, current: int, lowest_recommended: int | None, lowest: int, step: Step) -> int:
    """Up, from the lowest count within the period, to the lowest recommendation within the window."""
    if lowest_recommended is not None:
        wanted = min(wanted, lowest_recommended)
    limits = (lowest + step.instances, lowest + lowest * step.percent // 100)
    return max(min(wanted, max(limits) if step.either else min(limits)), current)


def corrected_down(wanted: int, *, current: int, highest_recommended: int | None, highest: int, step: Step) -> int:
    """Down, from the highest count within the period, to the highest recommendation within the window."""
    if highest_recommended is not None:
        wanted = max(wanted, highest_recommended)
    limits = (highest - step.instances, highest - highest * step.percent // 100)
    return min(max(wanted, min(limits) if step.either else max(limits)), current)


def corrected_in_panic(wanted: int, *, current: int, lowest: int, percent: int = 1000) -> int:
    """Only up, from the lowest count within the panic's period; from nothing without a limit."""
    if lowest > 0:
        wanted = min(wanted, lowest + lowest * percent // 100)
    return max(wanted, current)


@dataclass(frozen=True)
class Memory:
    """Recommendations and corrected counts, each with its time, and the end of the panic."""

    recommended: tuple[tuple[float, int], ...] = ()
    corrected: tuple[tuple[float, int], ...] = ()
    panic_until: float | None = None


@dataclass(frozen=True)
class Kthena:
    """Targets: mean queue length and mean KV usage; None: not used."""

    waiting: float | None = 5.0
    kv_usage: float | None = 0.7
    step: Step = Step()
    tick_seconds: float = 15.0
    name: str = "kthena"

    def start(self, fleet: Fleet, now: float) -> Memory:
        return Memory(recommended=((now, fleet.asked),))

    def decide(self, fleet: Fleet, memory: Memory, now: float) -> tuple[int, Memory]:
        wanted = self._recommended(fleet)
        if wanted is None:
            return fleet.asked, memory
        panic_until = memory.panic_until
        if wanted * 100 >= fleet.asked * PANIC_PERCENT:
            panic_until = now + PANIC_HOLD_SECONDS
        within = [replicas for at, replicas in memory.corrected if at > now - PERIOD_SECONDS]
        window = tuple(each for each in memory.recommended if each[0] > now - DOWN_WINDOW_SECONDS)
        if panic_until is not None and now <= panic_until:
            desired = corrected_in_panic(wanted, current=fleet.asked, lowest=min([fleet.asked, *within]))
        elif wanted > fleet.asked:
            lowest = min([fleet.asked, *within])
            desired = corrected_up(wanted, current=fleet.asked, lowest_recommended=None, lowest=lowest, step=self.step)
        elif wanted < fleet.asked:
            desired = corrected_down(
                wanted,
                current=fleet.asked,
                highest_recommended=max((replicas for _, replicas in window), default=None),
                highest=max([fleet.asked, *within]),
                step=self.step,
            )
        else:
            desired = wanted
        corrected = tuple(each for each in memory.corrected if each[0] > now - PERIOD_SECONDS)
        return desired, Memory((*window, (now, wanted)), (*corrected, (now, desired)), panic_until)

    def _recommended(self, fleet: Fleet) -> int | None:
        results = []
        for target, values in (
            (self.waiting, [float(engine.waiting) for engine in fleet.seen]),
            (self.kv_usage, [engine.kv_cache_usage for engine in fleet.seen]),
        ):
            if target is not None:
                result = recommended(
                    values,
                    target=target,
                    unready=fleet.pending,
                    missing=fleet.ready - len(fleet.seen),
                    current=fleet.asked,
                    tolerance=TOLERANCE,
                )
                if result is not None:
                    results.append(result)
        return max(1, *results) if results else None


def _over(value: float, target: float) -> float:
    if target == 0:
        return math.inf if value else math.nan
    return value / target


def _ceil(value: float) -> int:
    if math.isnan(value):
        return 0
    return max(0, math.ceil(min(value, _MOST)))
