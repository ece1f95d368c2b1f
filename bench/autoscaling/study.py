"""Which runs are made, what is drawn from them, and the targets' figures.

Every cell is one variant of one trace at one start-up time; within a cell all contestants get the same arrivals of each
seed. Peers whose target depends on the engine get several and keep the one with the highest goodput on seeds that are not
reported; ours has one set of parameters for all cells. Static N for every N gives the line that hours are measured by.
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from typing import Final

from bench.admission.replay.traces import load
from bench.autoscaling.policies.aibrix import Apa
from bench.autoscaling.policies.dynamo import Dynamo
from bench.autoscaling.policies.fixed import Static
from bench.autoscaling.policies.hpa import HorizontalPodAutoscaler
from bench.autoscaling.policies.keda import Keda
from bench.autoscaling.policies.knative import Knative
from bench.autoscaling.policies.kthena import Kthena
from bench.autoscaling.policies.kubeai import KubeAI
from bench.autoscaling.policies.wva import WvaV1, WvaV2
from bench.autoscaling.policy import Policy
from bench.autoscaling.replica import engine_of
from bench.autoscaling.scalers import OurScaler, PeerScaler, Scaler
from bench.autoscaling.simulate import World, simulate
from bench.autoscaling.variants import STEP_SECONDS, VARIANTS
from bench.engine.presets import PRESETS
from kvplane_operator.autoscaler.settings import Settings

OURS: Final = "kvplane"
PEERS: Final[dict[str, tuple[Policy, ...]]] = {
    "hpa": (HorizontalPodAutoscaler(), HorizontalPodAutoscaler(kv_usage=None), HorizontalPodAutoscaler(waiting=None)),
    "keda": (Keda(), Keda(threshold=1.0)),
    "knative": tuple(Knative(concurrency=each) for each in (5, 10, 20, 40)),
    "kubeai": tuple(KubeAI(target_requests=each) for each in (5, 10, 20, 40)),
    "aibrix apa": tuple(Apa(kv_usage=each) for each in (0.3, 0.5, 0.7)),
    "kthena": (Kthena(), Kthena(kv_usage=None)),
    "wva v1": (WvaV1(),),
    "wva v2": (WvaV2(),),
    "dynamo throughput": (Dynamo("throughput"),),
    "dynamo latency": (Dynamo("latency"),),
}
"""Settings that are tried for each."""


@dataclass(frozen=True)
class Size:
    """How much is run."""

    preset: str = "32b-h100"
    rates: tuple[tuple[str, float], ...] = (("conv", 9.0), ("code", 6.0))
    """Requests a second on average, by trace: work for three replicas or so."""
    variants: tuple[str, ...] = ("raw", "stretched", "diurnal", "steps")
    startups: tuple[float, ...] = (60.0, 180.0)
    scrape_seconds: float = 5.0
    seeds: tuple[int, ...] = (1, 2, 3)
    tuning_seeds: tuple[int, ...] = (101,)
    highest: int = 10
    """maxReplicas; minReplicas is 1."""
    processes: int = 1


@dataclass(frozen=True, order=True)
class Cell:
    """What a contestant is set before."""

    trace: str
    variant: str
    startup: float


@dataclass(frozen=True)
class Run:
    """One run to be made."""

    cell: Cell
    seed: int
    contestant: str
    setting: int = 0
    """Which of the contestant's settings; of static, how many."""
    gated: bool = True


@dataclass(frozen=True)
class Result:
    """What a run gave."""

    run: Run
    goodput_percent: float
    hours: float
    lost_percent: float
    reversals_per_hour: float
    seconds_after_step: float | None
    """From the first step up to as many replicas as serve at its end; None: not a variant of steps."""


def execute(run: Run, size: Size) -> Result:
    """One run, from the trace's file to its figures."""
    rate = dict(size.rates)[run.cell.trace]
    arrivals = VARIANTS[run.cell.variant](load(run.cell.trace), rate=rate, seed=run.seed)
    world = World(
        engine=engine_of(PRESETS[size.preset]),
        gated=run.gated,
        startup_seconds=run.cell.startup,
        scrape_seconds=size.scrape_seconds,
        begin_replicas=run.setting if run.contestant == "static" else 1,
    )
    outcome = simulate(arrivals, world, scaler_of(run, size))
    after = None
    if run.cell.variant == "steps":
        needed = outcome.ready_at(2 * STEP_SECONDS)
        after = outcome.seconds_to(needed, since=STEP_SECONDS)
    return Result(
        run=run,
        goodput_percent=outcome.goodput_percent,
        hours=outcome.hours,
        lost_percent=outcome.lost_percent,
        reversals_per_hour=outcome.reversals_per_hour,
        seconds_after_step=after,
    )


def scaler_of(run: Run, size: Size) -> Scaler:
    """The contestant, made anew."""
    if run.contestant == OURS:
        return OurScaler(Settings(max_replicas=size.highest))
    policy: Policy = Static(run.setting) if run.contestant == "static" else PEERS[run.contestant][run.setting]
    return PeerScaler(policy, lowest=1, highest=size.highest)


def cells(size: Size) -> list[Cell]:
    """All that are run."""
    return [
        Cell(trace, variant, startup)
        for trace, _ in size.rates
        for variant in size.variants
        for startup in size.startups
    ]


def tuning_runs(size: Size) -> list[Run]:
    """Of peers with several settings."""
    return [
        Run(cell, seed, name, setting)
        for cell in cells(size)
        for seed in size.tuning_seeds
        for name, settings in PEERS.items()
        if len(settings) > 1
        for setting in range(len(settings))
    ]


def chosen(results: Iterable[Result]) -> dict[str, int]:
    """The setting of each peer with the highest mean goodput over all cells; of equals, the fewest hours."""
    by: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        by.setdefault((result.run.contestant, result.run.setting), []).append(result)
    ranked = sorted(by, key=lambda each: (mean(by[each], "goodput_percent"), -mean(by[each], "hours")))
    return dict(ranked)  # the best of each name comes last


def reported_runs(size: Size, settings: dict[str, int]) -> list[Run]:
    """Of all contestants, and static for every N."""
    return [
        run
        for cell in cells(size)
        for seed in size.seeds
        for run in (
            *(Run(cell, seed, OURS, gated=gated) for gated in (True, False)),
            *(Run(cell, seed, name, settings.get(name, 0), gated=gated) for name in PEERS for gated in (True, False)),
            *(Run(cell, seed, "static", replicas) for replicas in range(1, size.highest + 1)),
        )
    ]


def run_all(runs: Sequence[Run], size: Size) -> list[Result]:
    """In as many processes as the size says."""
    if size.processes == 1:
        return [execute(run, size) for run in runs]
    with ProcessPoolExecutor(size.processes) as pool:
        return list(pool.map(execute, runs, [size] * len(runs), chunksize=1))


def mean(results: Iterable[Result], field: str) -> float:
    """Of one field of the results."""
    return statistics.fmean(getattr(result, field) for result in results)


def line(static: Sequence[tuple[float, float]], goodput: float) -> float:
    """Hours on the line between static Ns, (goodput, hours) each, at a goodput; beyond the best, that one's hours."""
    points = sorted(static)
    below = (0.0, 0.0)
    for point in points:
        if point[0] >= goodput:
            span = point[0] - below[0]
            share = (goodput - below[0]) / span if span else 1.0
            return below[1] + share * (point[1] - below[1])
        if point[1] >= below[1]:
            below = point
    best = points[-1][0]
    return min(hours for met, hours in points if met == best)


@dataclass(frozen=True)
class Figures:
    """The last line."""

    hours_vs_best_peer: float
    goodput_vs_best_peer_points: float
    best_peer: str
    code_goodput_percent: float
    reversals_per_h: float
    hours_vs_static_line: float
    code_hours_vs_static_line: float
    capacity_after_step_minus_startup_s: float


class Study:
    """All results, by cell and contestant."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._by: dict[tuple[Cell, str, int, bool], list[Result]] = {}
        for result in results:
            setting = result.run.setting if result.run.contestant == "static" else 0
            run = result.run
            self._by.setdefault((run.cell, run.contestant, setting, run.gated), []).append(result)
        self.cells = sorted({cell for cell, _, _, _ in self._by})
        self.names = list(dict.fromkeys(name for _, name, _, _ in self._by if name != "static"))

    def mean(self, field: str, name: str, cells: Iterable[Cell], *, gated: bool = True) -> float:
        """Over these cells, each cell the same weight."""
        return statistics.fmean(mean(self._by[cell, name, 0, gated], field) for cell in cells)

    def against_line(self, name: str, cells: Iterable[Cell]) -> float:
        """Hours over those of the static line at the same goodput, mean over cells."""
        return statistics.fmean(self._against(name, cell) for cell in cells)

    def figures(self) -> Figures:
        """Against the dynamic peer with the highest goodput on the variants that can be followed, all behind our admission."""
        followed = [cell for cell in self.cells if cell.variant != "raw"]
        code = [cell for cell in self.cells if cell.trace == "code" and cell.variant == "raw"] or followed
        peers = [name for name in self.names if name != OURS]
        best = max(peers, key=lambda name: self.mean("goodput_percent", name, followed))
        late = [
            result.seconds_after_step - cell.startup
            for cell in followed
            for result in self._by[cell, OURS, 0, True]
            if result.seconds_after_step is not None
        ]
        return Figures(
            hours_vs_best_peer=self.mean("hours", OURS, followed) / self.mean("hours", best, followed),
            goodput_vs_best_peer_points=self.mean("goodput_percent", OURS, followed)
            - self.mean("goodput_percent", best, followed),
            best_peer=best,
            code_goodput_percent=self.mean("goodput_percent", OURS, code),
            reversals_per_h=self.mean("reversals_per_hour", OURS, followed),
            hours_vs_static_line=self.against_line(OURS, followed),
            code_hours_vs_static_line=self.against_line(OURS, code),
            capacity_after_step_minus_startup_s=max(late, default=float("nan")),
        )

    def rows(self) -> list[tuple[str, ...]]:
        """The Pareto table: one line for each cell, contestant and admission."""
        return [
            (
                cell.trace,
                cell.variant,
                f"{cell.startup:.0f}",
                name,
                "kvplane" if gated else "vllm",
                f"{self.mean('goodput_percent', name, [cell], gated=gated):.1f}",
                f"{self.mean('hours', name, [cell], gated=gated):.2f}",
                f"{self._against(name, cell, gated=gated):.2f}",
                f"{self.mean('lost_percent', name, [cell], gated=gated):.1f}",
                f"{self.mean('reversals_per_hour', name, [cell], gated=gated):.1f}",
            )
            for cell in self.cells
            for name in self.names
            for gated in (True, False)
            if (cell, name, 0, gated) in self._by
        ]

    def _against(self, name: str, cell: Cell, *, gated: bool = True) -> float:
        static = [
            (mean(results, "goodput_percent"), mean(results, "hours"))
            for (of, contestant, _, _), results in self._by.items()
            if of == cell and contestant == "static"
        ]
        hours = self.mean("hours", name, [cell], gated=gated)
        on_line = line(static, self.mean("goodput_percent", name, [cell], gated=gated))
        return hours / on_line if on_line else math.inf


HEADER: Final = (
    "trace",
    "variant",
    "startup_s",
    "scaler",
    "admission",
    "goodput_%",
    "hours",
    "vs_static",
    "lost_%",
    "reversals/h",
)
