"""``python -m bench.admission.simulated``: the benchmark's cells on the simulated engine, for development and not for claims.

The same mixes, loads and pace as on the real engine, and the goals and capacities that follow from them there, but many
seeds: what a change of admission does shows here first.
"""

import argparse
import os
import statistics
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

from bench import report
from bench.admission import goals, plan, search, workload
from bench.admission.__main__ import FIRST_RATES, PASSING
from bench.admission.arena import FACTS, PACE
from bench.admission.goals import Goals
from bench.admission.plan import Size
from bench.admission.replay.contestants import FAMILIES, NONE, OURS
from bench.admission.replay.driver import Outcome, replay
from bench.admission.workload import Arrival
from bench.engine.model import EngineConfig

CONTESTANTS = ((NONE, 0), ("gateway utilization", 80), *(("queue-cap", cap) for cap in Size().caps), (OURS, 0))
"""Families and settings."""
WARM_UP_EVERY_SECONDS = 0.4
"""Between the requests from which a policy learns before the window."""
_CONFIG = EngineConfig(
    num_gpu_blocks=FACTS.blocks,
    block_size=FACTS.block_size,
    max_num_seqs=FACTS.max_num_seqs,
    max_num_batched_tokens=FACTS.max_num_batched_tokens,
    max_model_len=FACTS.max_model_len,
)


@dataclass(frozen=True)
class Key:
    """One run."""

    family: str
    setting: int
    mix: str
    load: float
    seed: int


@dataclass(frozen=True)
class Result:
    """Its figures, those of the warm-up left out but for the tokens."""

    goodput: float
    refused: float
    computed_tokens: int
    recomputed_tokens: int


def _replay(arrivals: list[Arrival], family: str, setting: int, targets: Goals) -> Outcome:
    policy = FAMILIES[family].make(setting, targets, FACTS)
    return replay(arrivals, policy=policy, config=_CONFIG, step_time=PACE)


def unloaded(mix: str, size: Size) -> Goals:
    """What requests get one by one, and so what is promised."""
    requests = workload.one_by_one(mix, count=size.unloaded, seed=plan.UNLOADED_SEED)
    nothing = Goals(ttft_seconds=1.0, tpot_seconds=1.0)
    fates = [_replay([request], NONE, 0, nothing).fates[0] for request in requests]
    return Goals(
        ttft_seconds=goals.TTFT_FACTOR * statistics.median(fate.ttft for fate in fates),
        tpot_seconds=goals.TPOT_FACTOR * statistics.median(fate.tpot for fate in fates),
    )


def capacity(mix: str, known: Mapping[str, float], targets: Goals, size: Size) -> float:
    """Requests a second; of the shift a factor."""
    probes: list[search.Probe] = []
    while (rate := search.next_rate(probes, first=FIRST_RATES[mix])) is not None:
        phases = workload.phases(
            mix, load=1.0, seconds=plan.probe_seconds(size, mix), capacity={**known, mix: rate}, seed=0
        )
        outcome = _replay(workload.arrivals(phases, seed=plan.CAPACITY_SEED), NONE, 0, targets)
        probes.append(search.Probe(rate=rate, passed=_goodput(outcome, targets) >= PASSING))
    found = search.best(probes)
    assert found is not None, "the search ends with a rate that passed"
    return found


def run(key: Key, known: Mapping[str, float], targets: Goals, size: Size) -> Result:
    """One window behind a warm-up."""
    begin = WARM_UP_EVERY_SECONDS * size.warm_up + 3.0
    first = workload.one_by_one(key.mix, count=size.warm_up, seed=plan.WARM_UP_SEED)
    phases = workload.phases(key.mix, load=key.load, seconds=size.window(key.mix), capacity=known, seed=key.seed)
    arrivals = [replace(each, at=WARM_UP_EVERY_SECONDS * number) for number, each in enumerate(first)]
    arrivals += [replace(each, at=begin + each.at) for each in workload.arrivals(phases, seed=key.seed)]
    outcome = _replay(arrivals, key.family, key.setting, targets)
    window = replace(outcome, fates=outcome.fates[size.warm_up :])
    return Result(
        goodput=_goodput(window, targets),
        refused=window.refused_percent / 100,
        computed_tokens=outcome.counters.computed_tokens,
        recomputed_tokens=outcome.counters.recomputed_tokens,
    )


def _goodput(outcome: Outcome, targets: Goals) -> float:
    return outcome.goodput_percent(ttft_seconds=targets.ttft_seconds, tpot_seconds=targets.tpot_seconds) / 100


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.admission.simulated", description=__doc__)
    parser.add_argument("--seeds", type=int, default=8)
    parser.add_argument("--first-seed", type=int, default=500)
    parser.add_argument("--window", type=float, help="seconds of a run, instead of the benchmark's")
    arguments = parser.parse_args()
    size = Size()
    window = size if arguments.window is None else _windows(size, arguments.window)
    known: dict[str, float] = {}
    targets = {mix: unloaded(mix, size) for mix in size.mixes}
    for mix in plan.needed_for_capacity(size):
        known[mix] = capacity(mix, known, targets[mix], size)
    seeds = range(arguments.first_seed, arguments.first_seed + arguments.seeds)
    means: dict[tuple[str, int], list[float]] = {}
    rows = []
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        for mix in size.mixes:
            for load in size.loads:
                for family, setting in CONTESTANTS:
                    waiting = [
                        pool.submit(run, Key(family, setting, mix, load, seed), known, targets[mix], window)
                        for seed in seeds
                    ]
                    results = [each.result() for each in waiting]
                    goodput = 100 * statistics.fmean(result.goodput for result in results)
                    if load > 1:
                        means.setdefault((family, setting), []).append(goodput)
                    again = sum(r.recomputed_tokens for r in results) / sum(r.computed_tokens for r in results)
                    refused = 100 * statistics.fmean(result.refused for result in results)
                    name = _named(family, setting)
                    rows.append((f"{mix} {load:g}x", name, f"{goodput:.1f}", f"{refused:.1f}", f"{100 * again:.2f}"))
    print(report.table(("cell", "admission", "goodput %", "refused %", "again %"), rows))
    above = [(_named(family, setting), f"{statistics.fmean(each):.1f}") for (family, setting), each in means.items()]
    print(f"\n{report.table(('admission', 'mean goodput above 1x, %'), above)}")


def _windows(size: Size, seconds: float) -> Size:
    return replace(size, window_seconds=seconds, shift_window_seconds=seconds)


def _named(family: str, setting: int) -> str:
    return f"{family} {setting}" if setting else family


if __name__ == "__main__":
    main()
