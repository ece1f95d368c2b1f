"""Which runs answer the question, their results, and the figures drawn from them.

1. Capacity of each trace, by bisection: the highest rate at which no admission attains PASSING_PERCENT.
2. Each peer's setting, on seeds of their own: the best mean goodput over the loads, for each trace one setting.
3. Every policy at every load and seed. Runs are paired: a seed gives the same arrivals to all.

Runs are pure and independent, so they are spread over processes; each is one line in a file, and not done again.
"""

import json
import math
import os
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from functools import cache
from multiprocessing import get_context
from pathlib import Path
from typing import Final

from bench import report
from bench.admission import figures, intervals, search
from bench.admission.goals import Goals
from bench.admission.intervals import Interval
from bench.admission.policy import Engine
from bench.admission.replay import traces
from bench.admission.replay.contestants import FAMILIES, NONE, OURS
from bench.admission.replay.driver import replay
from bench.engine.presets import PRESETS

GOALS: Final = Goals(ttft_seconds=2.0, tpot_seconds=0.05)
CONV, CODE = traces.NAMES
PASSING_PERCENT: Final = {CONV: 99.0, CODE: 90.0}
"""Goodput that capacity means. Half of the code trace's answers have fewer than 14 tokens, so that one long prompt beside
them breaks their goal per token: 99 % hold only while the engine has next to nothing to do."""
LOADS: Final = (1.6, 2.4)
_CAPACITY_SEED: Final = 100
_TUNING_SEED: Final = 200
_FIRST_RATE: Final = 2.0


@dataclass(frozen=True)
class Key:
    """One run; the rate is in requests a second."""

    preset: str
    trace: str
    rate: float
    seed: int
    share: float
    family: str
    setting: int


@dataclass(frozen=True)
class Result:
    """Its figures."""

    goodput_percent: float
    refused_percent: float
    ttft_p99: float | None
    """Of what got a first token; None where nothing did."""
    tpot_p99: float | None
    preemptions: int
    computed_tokens: int
    recomputed_tokens: int
    peak_usage: float


@dataclass(frozen=True)
class Size:
    """How much is replayed."""

    pairs: tuple[tuple[str, str], ...] = (("8b-h100", CONV), ("8b-h100", CODE), ("32b-h100", CONV))
    """Presets and traces: an engine whose compute runs out first, then one whose KV memory does."""
    loads: tuple[float, ...] = LOADS
    seeds: tuple[int, ...] = (1, 2, 3)
    share: float = 1.0
    tuning_share: float = 0.3
    """Of a trace, for capacity and tuning."""
    processes: int = field(default_factory=lambda: os.cpu_count() or 1)


def run(key: Key) -> Result:
    """One run, from nothing but its key."""
    preset = PRESETS[key.preset]
    config = preset.config
    engine = Engine(
        blocks=config.num_gpu_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_num_batched_tokens=config.max_num_batched_tokens,
        max_model_len=config.max_model_len,
    )
    outcome = replay(
        traces.arrivals(_trace(key.trace), rate=key.rate, seed=key.seed, share=key.share),
        policy=FAMILIES[key.family].make(key.setting, GOALS, engine),
        config=config,
        step_time=preset.step_time,
    )
    started = [fate for fate in outcome.fates if fate.first_at is not None]
    return Result(
        goodput_percent=outcome.goodput_percent(ttft_seconds=GOALS.ttft_seconds, tpot_seconds=GOALS.tpot_seconds),
        refused_percent=outcome.refused_percent,
        ttft_p99=report.percentile([fate.ttft for fate in started], 0.99) if started else None,
        tpot_p99=report.percentile([fate.tpot for fate in started], 0.99) if started else None,
        preemptions=outcome.counters.num_preemptions,
        computed_tokens=outcome.counters.computed_tokens,
        recomputed_tokens=outcome.counters.recomputed_tokens,
        peak_usage=outcome.peak_usage,
    )


@cache
def _trace(name: str) -> list[traces.Line]:
    return traces.load(name)


class Results:
    """What has been run, in a file of JSON lines."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.by_key: dict[Key, Result] = {}
        file.parent.mkdir(parents=True, exist_ok=True)
        if file.exists():
            for line in file.read_text().splitlines():
                document = json.loads(line)
                self.by_key[Key(**document["key"])] = Result(**document["result"])

    def add(self, key: Key, result: Result) -> None:
        self.by_key[key] = result
        with self._file.open("a") as file:
            file.write(json.dumps({"key": asdict(key), "result": asdict(result)}) + "\n")


@dataclass(frozen=True)
class Cell:
    """One trace at one load on one engine."""

    preset: str
    trace: str
    load: float

    def __str__(self) -> str:
        return f"{self.preset} {self.trace} {self.load:g}x"


@dataclass(frozen=True)
class Study:
    """Everything that was replayed, by cell and policy."""

    capacity: Mapping[tuple[str, str], float]
    """Requests a second, by preset and trace."""
    tuned: Mapping[tuple[str, str], Mapping[str, int]]
    runs: Mapping[Cell, Mapping[str, Sequence[Result]]]
    """By family; in the order of the seeds."""

    def goodput(self, cell: Cell, family: str) -> float:
        return statistics.fmean(result.goodput_percent for result in self.runs[cell][family])

    def best_peer(self, cell: Cell) -> str:
        """The family with the highest mean goodput in a cell, ours left out."""
        return max((name for name in self.runs[cell] if name != OURS), key=lambda name: self.goodput(cell, name))

    def gain(self, cell: Cell) -> Interval:
        """Our goodput above the best peer's there, in points."""
        ours, peers = self.runs[cell][OURS], self.runs[cell][self.best_peer(cell)]
        differences = [a.goodput_percent - b.goodput_percent for a, b in zip(ours, peers, strict=True)]
        return intervals.stratified({str(cell): differences})

    def recomputed_percent(self, cell: Cell, family: str) -> float:
        """Of all tokens computed."""
        runs = self.runs[cell][family]
        return 100 * sum(r.recomputed_tokens for r in runs) / max(1, sum(r.computed_tokens for r in runs))

    def figures(self) -> figures.Replay:
        """What the benchmark's last line says: of all engines the worst; nan for what was not replayed.

        Gains on the conversation trace, goodput on the code trace at the lower load; recomputed tokens of any cell.
        """
        low, high = ([self.gain(cell).mean for cell in self._of(CONV, load)] for load in LOADS)
        return figures.Replay(
            gain_1_6_points=min(low, default=math.nan),
            gain_2_4_points=min(high, default=math.nan),
            recomputed_percent=max((self.recomputed_percent(cell, OURS) for cell in self.runs), default=math.nan),
            code_goodput_percent=min((self.goodput(cell, OURS) for cell in self._of(CODE, LOADS[0])), default=math.nan),
        )

    def _of(self, trace: str, load: float) -> list[Cell]:
        return [cell for cell in self.runs if (cell.trace, cell.load) == (trace, load)]

    def rows(self) -> list[tuple[str, ...]]:
        """Lines of the table under HEADER; the best peer of each cell is marked."""
        found: list[tuple[str, ...]] = []
        for cell, families in self.runs.items():
            best = self.best_peer(cell)
            for name in sorted(families, key=lambda name: -self.goodput(cell, name)):
                runs = families[name]
                setting = self.tuned[cell.preset, cell.trace].get(name, 0)
                found.append(
                    (
                        str(cell),
                        f"{name}{f' {setting}' if setting else ''}{' *' if name == best else ''}",
                        f"{self.goodput(cell, name):.1f}",
                        f"{self.gain(cell)}" if name == OURS else "",
                        f"{statistics.fmean(run.refused_percent for run in runs):.1f}",
                        f"{self.recomputed_percent(cell, name):.2f}",
                        report.number(statistics.fmean(run.preemptions for run in runs)),
                        _longest(run.ttft_p99 for run in runs),
                        _longest(None if run.tpot_p99 is None else 1000 * run.tpot_p99 for run in runs),
                    )
                )
        return found


HEADER: Final = (
    "cell",
    "admission (* best peer)",
    "goodput %",
    "ours above it [95 %]",
    "refused %",
    "again %",
    "preempted",
    "TTFT p99, s",
    "TPOT p99, ms",
)


def _longest(values: Iterable[float | None]) -> str:
    known = [value for value in values if value is not None]
    return report.number(max(known)) if known else "none"


def study(size: Size, results: Results, say: Callable[[str], None]) -> Study:
    """Replays all that is not in ``results`` yet."""
    with ProcessPoolExecutor(size.processes, mp_context=get_context("spawn")) as pool:

        def replayed(keys: Sequence[Key]) -> list[Result]:
            missing = [key for key in dict.fromkeys(keys) if key not in results.by_key]
            for number, (key, result) in enumerate(zip(missing, pool.map(run, missing), strict=True), start=1):
                results.add(key, result)
                say(
                    f"{number}/{len(missing)} {key.preset} {key.trace} {key.rate:.2f}/s seed {key.seed} {key.family} "
                    f"{key.setting or ''}: goodput {result.goodput_percent:.1f} %"
                )
            return [results.by_key[key] for key in keys]

        capacity = {pair: _capacity(*pair, size, replayed) for pair in size.pairs}
        tuned = {pair: _tuned(*pair, capacity[pair], size, replayed) for pair in size.pairs}
        runs: dict[Cell, dict[str, list[Result]]] = {}
        for preset, trace in size.pairs:
            for load in size.loads:
                keys = {
                    family: [
                        Key(preset, trace, load * capacity[preset, trace], seed, size.share, family, setting)
                        for seed in size.seeds
                    ]
                    for family, setting in tuned[preset, trace].items()
                }
                replayed([key for each in keys.values() for key in each])
                runs[Cell(preset, trace, load)] = {family: replayed(each) for family, each in keys.items()}
    return Study(capacity=capacity, tuned=tuned, runs=runs)


Replayed = Callable[[Sequence[Key]], list[Result]]


def _capacity(preset: str, trace: str, size: Size, replayed: Replayed) -> float:
    probes: list[search.Probe] = []
    while (rate := search.next_rate(probes, first=_FIRST_RATE)) is not None:
        (result,) = replayed([Key(preset, trace, rate, _CAPACITY_SEED, size.tuning_share, NONE, 0)])
        probes.append(search.Probe(rate=rate, passed=result.goodput_percent >= PASSING_PERCENT[trace]))
    found = search.best(probes)
    assert found is not None, "the search ends with a rate that passed"
    return found


def _tuned(preset: str, trace: str, capacity: float, size: Size, replayed: Replayed) -> dict[str, int]:
    """The setting of each family."""
    keys = {
        (family, setting): [
            Key(preset, trace, load * capacity, _TUNING_SEED, size.tuning_share, family, setting) for load in size.loads
        ]
        for family, each in FAMILIES.items()
        for setting in each.settings
        if len(each.settings) > 1
    }
    replayed([key for each in keys.values() for key in each])
    found = {}
    for family, each in FAMILIES.items():
        best = max(
            each.settings,
            key=lambda setting: (
                statistics.fmean(r.goodput_percent for r in replayed(keys.get((family, setting), [])))
                if len(each.settings) > 1
                else 0.0
            ),
        )
        found[family] = best
    return found
