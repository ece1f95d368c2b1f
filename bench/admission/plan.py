"""What is run, in which order, and what is still to do: pure, over the records of what has been done.

Four stages, each needing the one before: goals (an idle engine), capacity (bisection without admission), tuning of the
in-flight cap (on a seed that is used for nothing else), and the runs that count. In these, all contestants of one
(mix, load, seed) follow each other, first a different one each time, so that a machine that slows down slows all alike;
a mix is finished before the next begins, as our sidecar lives as long as its mix.
"""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

from bench.admission import workload
from bench.admission.contestants import CAPS, CONTESTANTS, VLLM_CAPS, Contestant, capped

OVERHEAD_SECONDS = 3.5
"""Of a run beyond its window: the last answers, and the engine becoming idle."""
ENGINE_START_SECONDS = 25.0
PROBES = 5
"""Of one bisection, as a rule."""
TUNING_LOAD = 1.6
TUNING_SEED = 101
CAPACITY_SEED = 201
UNLOADED_SEED = 301
WARM_UP_SEED = 401


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    mixes: tuple[str, ...] = workload.MIXES
    loads: tuple[float, ...] = (0.8, 1.2, 1.6, 2.4)
    seeds: tuple[int, ...] = (1, 2, 3)
    window_seconds: float = 20.0
    """Of a plain mix; it begins with an idle engine, and overload has to last for a queue to grow and the cache to fill. Two
    bursts."""
    shift_window_seconds: float = 24.0
    """The shift comes after ten of them."""
    probe_seconds: float = 20.0
    """Of a plain mix: longer than a window, as all loads are shares of what it finds."""
    shift_probe_seconds: float = 50.0
    """Long enough for all three mixes."""
    caps: tuple[int, ...] = CAPS
    hindsight_caps: int = 2
    """Caps run in each overloaded cell besides the tuned one: the best of the same mix in the tuning."""
    unloaded: int = 24
    """Requests sent one by one for the goals."""
    warm_up: int = 40
    """Requests sent to our sidecar before a mix, as it is never as new as that in a pod that serves."""

    def window(self, mix: str) -> float:
        return self.shift_window_seconds if mix == workload.SHIFT else self.window_seconds


QUICK = Size(
    mixes=("mixed", "long"),
    loads=(0.8, 1.6),
    seeds=(1,),
    window_seconds=8.0,
    probe_seconds=8.0,
    caps=(6, 13),
    hindsight_caps=1,
    unloaded=10,
    warm_up=20,
)


class Stage(StrEnum):
    """What a run is for."""

    TUNING = "tuning"
    MAIN = "main"


@dataclass(frozen=True)
class RunKey:
    """Names one run; the same key is never run twice."""

    stage: Stage
    contestant: str
    mix: str
    load: float
    seed: int


@dataclass(frozen=True)
class Step:
    """A run to do."""

    key: RunKey
    contestant: Contestant


def tuning(size: Size) -> list[Step]:
    """Every cap on every mix."""
    return [
        Step(RunKey(Stage.TUNING, capped(cap).name, mix, TUNING_LOAD, TUNING_SEED), capped(cap))
        for mix in size.mixes
        for cap in size.caps
    ]


def tuned_cap(goodputs: Mapping[RunKey, float], size: Size) -> int:
    """The cap with the best mean over the mixes of the tuning runs."""
    return max(size.caps, key=lambda cap: statistics.fmean(_tuned(goodputs, cap, mix) for mix in size.mixes))


def hindsight_caps(goodputs: Mapping[RunKey, float], size: Size, *, mix: str, tuned: int) -> list[int]:
    """Caps that may be the best for this mix, the tuned one left out: it runs as the engine's own flag."""
    others = [cap for cap in size.caps if cap != tuned]
    return sorted(others, key=lambda cap: -_tuned(goodputs, cap, mix))[: size.hindsight_caps]


def _tuned(goodputs: Mapping[RunKey, float], cap: int, mix: str) -> float:
    return goodputs[RunKey(Stage.TUNING, capped(cap).name, mix, TUNING_LOAD, TUNING_SEED)]


def main_runs(size: Size, hindsight: Mapping[str, Sequence[int]]) -> list[Step]:
    """The runs that count, in order. ``hindsight``: caps by mix; they run where the load is beyond capacity only,
    since below it no cap is the best one."""
    steps = []
    for mix in size.mixes:
        for turn, (seed, load) in enumerate((seed, load) for seed in size.seeds for load in size.loads):
            caps = [capped(cap) for cap in hindsight[mix]] if load > 1 else []
            steps += [
                Step(RunKey(Stage.MAIN, contestant.name, mix, load, seed), contestant)
                for contestant in _rotated([*CONTESTANTS, *caps], turn)
            ]
    return steps


def _rotated(contestants: Sequence[Contestant], turn: int) -> list[Contestant]:
    by = turn % len(contestants)
    return [*contestants[by:], *contestants[:by]]


def still_to_do(steps: Sequence[Step], done: Mapping[RunKey, object]) -> list[Step]:
    return [step for step in steps if step.key not in done]


@dataclass(frozen=True)
class Part:
    """A line of the plan that is printed before anything runs."""

    what: str
    runs: int
    seconds: float


def estimate(size: Size) -> list[Part]:
    """What a whole run takes, the replay left out."""
    windows = {mix: size.window(mix) + OVERHEAD_SECONDS for mix in size.mixes}
    overloaded = sum(load > 1 for load in size.loads)
    per_mix = len(size.seeds) * (len(size.loads) * len(CONTESTANTS) + overloaded * size.hindsight_caps)
    return [
        Part("engine starts", 3, 3 * ENGINE_START_SECONDS),
        Part("goals: one request at a time", len(size.mixes), len(size.mixes) * size.unloaded * 0.7),
        Part(
            "capacity: bisection without admission",
            PROBES * len(size.mixes),
            sum(PROBES * (probe_seconds(size, mix) + OVERHEAD_SECONDS) for mix in size.mixes),
        ),
        Part(f"tuning of {VLLM_CAPS}", len(size.caps) * len(size.mixes), len(size.caps) * sum(windows.values())),
        Part("runs that count", per_mix * len(size.mixes), per_mix * sum(windows.values()) + 15.0 * len(size.mixes)),
    ]


def probe_seconds(size: Size, mix: str) -> float:
    """How long one probe of the bisection is."""
    return size.shift_probe_seconds if mix == workload.SHIFT else size.probe_seconds


def needed_for_capacity(size: Size) -> Iterator[str]:
    """Mixes whose capacity is searched: the shift's phases need the plain mixes' too."""
    if workload.SHIFT in size.mixes:
        yield from (mix.name for mix in workload.PLAIN)
        yield workload.SHIFT
    else:
        yield from size.mixes
