"""Which runs are made, what is drawn from them, and the targets' figures.

Every cell is one variant of one trace at one start-up time; within a cell all contestants get the same arrivals of each
seed. Peers whose target depends on the engine get several and keep the one with the highest goodput on seeds and on a part of
the traces that are not reported; ours has one set of parameters for all cells (``tuning`` tries others, on the same). Static N for
every N gives the line that hours are measured by. Seeds are the only chance in it, so intervals are of pairs of the same seed
(``bench.admission.intervals``).
"""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from typing import Final

from bench import report
from bench.admission.intervals import Interval, stratified
from bench.admission.replay.traces import load
from bench.admission.workload import Arrival
from bench.autoscaling.clairvoyant import needs
from bench.autoscaling.conditions import CONDITIONS, USUAL, changes
from bench.autoscaling.dynosim import DynoSim, Told, planner
from bench.autoscaling.policies.aibrix import Apa
from bench.autoscaling.policies.dynamo import Dynamo
from bench.autoscaling.policies.dynamo_model import Constant
from bench.autoscaling.policies.dynamo_sla import DynamoSla
from bench.autoscaling.policies.fixed import Clairvoyant, Static
from bench.autoscaling.policies.hpa import HorizontalPodAutoscaler
from bench.autoscaling.policies.keda import Keda
from bench.autoscaling.policies.knative import Knative
from bench.autoscaling.policies.kthena import Kthena
from bench.autoscaling.policies.kubeai import KubeAI
from bench.autoscaling.policies.wva import WvaV1, WvaV2
from bench.autoscaling.policy import Policy
from bench.autoscaling.replica import engine_of
from bench.autoscaling.scalers import OurScaler, PeerScaler, Scaler
from bench.autoscaling.simulate import Outcome, World, simulate
from bench.autoscaling.variants import FOLLOWED, STEP_SECONDS, VARIANTS, window
from bench.engine.presets import PRESETS
from kvplane_operator.autoscaler.settings import Settings

OURS: Final = "kvplane"
STATIC: Final = "static"
CLAIRVOYANT: Final = "clairvoyant"
SHARES: Final = (0.5, 0.6, 0.7, 0.8, 0.9)
"""Of a replica that the clairvoyant one may plan with."""
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
    "dynamo sla": (DynamoSla(), DynamoSla(forecast=Constant()), DynamoSla(forecast=None)),
}
"""Settings that are tried for each."""
_SETTINGS: Final = Settings(max_replicas=1)
"""As a service has them that sets nothing; each run has its own bounds."""
_BEGIN_SHARE: Final = 0.7
_BEGIN_SECONDS: Final = 60.0
"""All but static ones begin with what so long needs at first: nobody is judged by a beginning from nothing."""
_ENOUGH_PERCENT: Final = 99.0
"""Goodput beyond which the clairvoyant one saves hours."""
_SERVED_PERCENT: Final = 95.0
"""Goodput from which on a static count is enough for a step."""
_CODE_PERCENT: Final = 90.0
"""Goodput that is asked for on the raw code trace."""


@dataclass(frozen=True)
class Size:
    """How much is run."""

    preset: str = "32b-h100"
    rates: tuple[tuple[str, float], ...] = (("conv", 9.0), ("code", 1.0))
    """Requests a second on average, by trace. Conversation: work for three replicas or so. Code comes in bursts, in which
    promises can only be kept by replicas that are there already: by ``highest`` of these, for all but a few requests."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    startups: tuple[float, ...] = (60.0, 180.0)
    sensitive: tuple[tuple[str, str], ...] = (("conv", "stretched"), ("conv", "steps"))
    """(trace, variant) of the cells in which one condition is changed at a time."""
    other_startups: tuple[float, ...] = (30.0, 300.0)
    """Of those cells."""
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
    condition: str = USUAL
    """Of CONDITIONS."""


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
class Step:
    """The first step of a run, which trebles the load."""

    settled_goodput_percent: float
    """Of the requests of its second half."""
    ready: tuple[tuple[float, int], ...]
    """(seconds since the step, replicas ready) at the step and at each change until its end."""

    def seconds_to(self, replicas: int) -> float:
        """Until so many were ready; where that never came, the whole step."""
        return next((at for at, ready in self.ready if ready >= replicas), STEP_SECONDS)


@dataclass(frozen=True)
class Result:
    """What a run gave."""

    run: Run
    goodput_percent: float
    hours: float
    lost_percent: float
    reversals_per_hour: float
    step: Step | None
    """None: not the variant of steps."""


def execute(run: Run, size: Size, settings: Settings = _SETTINGS) -> Result:
    """One run, from the trace's file to its figures; ``settings`` are those of our law."""
    arrivals, condition = traffic(run, size), CONDITIONS[run.cell.condition]
    world = World(
        engine=engine_of(PRESETS[size.preset]),
        gated=run.gated,
        startup_seconds=run.cell.startup,
        scrape_seconds=condition.scrape_seconds,
        silent=condition.silent,
        cached_share=condition.cached_share,
    )
    world = replace(world, begin_replicas=at_first(run, size, arrivals, world))
    outcome = simulate(arrivals, world, scaler_of(run, size, arrivals, world, settings))
    return Result(
        run=run,
        goodput_percent=outcome.goodput_percent,
        hours=outcome.hours,
        lost_percent=outcome.lost_percent,
        reversals_per_hour=outcome.reversals_per_hour,
        step=_first_step(outcome) if run.cell.variant == "steps" else None,
    )


def traffic(run: Run, size: Size) -> list[Arrival]:
    """The requests of a run."""
    trace = window(load(run.cell.trace), tuning=run.seed in size.tuning_seeds)
    return VARIANTS[run.cell.variant](trace, rate=dict(size.rates)[run.cell.trace], seed=run.seed)


def at_first(run: Run, size: Size, arrivals: Sequence[Arrival], world: World) -> int:
    """Replicas that a run begins with."""
    if run.contestant == STATIC:
        return run.setting
    needed = needs(arrivals, world.engine, world.goals, share=_BEGIN_SHARE)
    return min(needed(0.0, _BEGIN_SECONDS), size.highest)


def _first_step(outcome: Outcome) -> Step:
    begin, end = STEP_SECONDS, 2 * STEP_SECONDS
    return Step(outcome.goodput_between((begin + end) / 2, end), outcome.ready_between(begin, end))


def scaler_of(run: Run, size: Size, arrivals: Sequence[Arrival], world: World, settings: Settings) -> Scaler:
    """The contestant, made anew."""
    policy: Policy
    if run.contestant == OURS:
        return OurScaler(replace(settings, max_replicas=size.highest))
    if run.contestant == STATIC:
        policy = Static(run.setting)
    elif run.contestant == CLAIRVOYANT:
        needed = needs(arrivals, world.engine, world.goals, share=SHARES[run.setting])
        policy = Clairvoyant(needed, startup_seconds=world.startup_seconds)
    else:
        policy = PEERS[run.contestant][run.setting]
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
    """Of those with several settings."""
    settings = {name: len(each) for name, each in PEERS.items()} | {CLAIRVOYANT: len(SHARES)}
    return [
        Run(cell, seed, name, setting)
        for cell in cells(size)
        for seed in size.tuning_seeds
        for name, count in settings.items()
        if count > 1
        for setting in range(count)
    ]


def chosen(results: Iterable[Result]) -> dict[str, int]:
    """The setting of each with the highest mean goodput over all cells; of equals, the fewest hours."""
    by: dict[tuple[str, int], list[Result]] = {}
    for result in results:
        by.setdefault((result.run.contestant, result.run.setting), []).append(result)

    def merit(each: tuple[str, int]) -> tuple[float, float]:
        goodput = mean(by[each], "goodput_percent")
        # Who knows all can have any goodput: the one with the fewest hours is wanted.
        return min(goodput, _ENOUGH_PERCENT) if each[0] == CLAIRVOYANT else goodput, -mean(by[each], "hours")

    return dict(sorted(by, key=merit))  # the best of each name comes last


def reported_runs(size: Size, settings: dict[str, int]) -> list[Run]:
    """Of all contestants, and static for every N."""
    return [
        run
        for cell in cells(size)
        for seed in size.seeds
        for run in (
            *(Run(cell, seed, OURS, gated=gated) for gated in (True, False)),
            *(Run(cell, seed, name, settings.get(name, 0), gated=gated) for name in PEERS for gated in (True, False)),
            Run(cell, seed, CLAIRVOYANT, settings.get(CLAIRVOYANT, 0)),
            *(Run(cell, seed, STATIC, replicas) for replicas in range(1, size.highest + 1)),
        )
    ]


def sensitivity_runs(size: Size, settings: dict[str, int], names: Sequence[str]) -> list[Run]:
    """Of these contestants behind our admission, where one condition is changed; the usual ones are among the reported runs."""
    return [
        Run(Cell(trace, variant, startup, condition), seed, name, settings.get(name, 0))
        for trace, variant in size.sensitive
        if variant in size.variants
        for startup, condition in changes(size.startups, size.other_startups)
        if condition != USUAL or startup not in size.startups
        for seed in size.seeds
        for name in names
    ]


def sensitivity_rows(results: Iterable[Result], size: Size, names: Sequence[str]) -> list[tuple[str, ...]]:
    """Of SENSITIVITY_HEADER: what became of the comparison as each condition changed."""
    by: dict[tuple[Cell, str], list[Result]] = {}
    for result in results:
        if result.run.gated:
            by.setdefault((result.run.cell, result.run.contestant), []).append(result)
    return [
        (
            trace,
            variant,
            f"{startup:.0f}",
            condition,
            name,
            _spread(by[cell, name], "goodput_percent", digits=1),
            _spread(by[cell, name], "hours", digits=2),
            f"{mean(by[cell, name], 'reversals_per_hour'):.1f}",
        )
        for trace, variant in size.sensitive
        for startup, condition in changes(size.startups, size.other_startups)
        for name in names
        if (cell := Cell(trace, variant, startup, condition), name) in by
    ]


def run_all(
    runs: Sequence[Run], size: Size, *, known: Mapping[Run, Result], keep: Callable[[Result], None]
) -> list[Result]:
    """Results of all: the ``known`` ones, and the others in as many processes as the size says; ``keep`` gets each of these."""
    missing = [run for run in runs if run not in known]
    found = dict(known)
    # Not forked: who says how far it is does so in a thread.
    with ProcessPoolExecutor(size.processes, mp_context=get_context("spawn")) as pool:
        try:
            for result in pool.map(execute, missing, [size] * len(missing), chunksize=1):
                found[result.run] = result
                keep(result)
        except BaseException:
            pool.shutdown(cancel_futures=True)  # else its end would wait for all runs
            raise
    return [found[run] for run in runs]


REFEREED: Final = ((STATIC, 2), (STATIC, 3), (STATIC, 4), ("dynamo throughput", 0), ("dynamo latency", 0))
"""Contestants that DynoSim has too, with their settings."""


def refereed(size: Size, simulator: DynoSim) -> list[tuple[str, Told, Told]]:
    """Each of REFEREED on the raw conversation trace behind vLLM's own queue: its name, our simulation's figures, DynoSim's."""
    cell, preset = Cell("conv", "raw", size.startups[0]), PRESETS[size.preset]
    world = World(
        engine=engine_of(preset),
        gated=False,
        startup_seconds=cell.startup,
        scrape_seconds=CONDITIONS[USUAL].scrape_seconds,
    )
    found = []
    for name, setting in REFEREED:
        run = Run(cell, size.seeds[0], name, setting, gated=False)
        ours, arrivals = execute(run, size), traffic(run, size)
        theirs = simulator.run(
            arrivals,
            preset,
            goals=world.goals,
            startup_seconds=cell.startup,
            workers=at_first(run, size, arrivals, world),
            scaled_by=None if name == STATIC else planner(name.removeprefix("dynamo "), highest=size.highest),
        )
        label = f"{name} {setting}" if name == STATIC else name
        found.append((label, Told(ours.goodput_percent, ours.hours), theirs))
    return found


def mean(results: Iterable[Result], field: str) -> float:
    """Of one field of the results."""
    return statistics.fmean(getattr(result, field) for result in results)


def line(static: Sequence[tuple[float, float]], goodput: float) -> float:
    """Hours on the line between static Ns, (goodput, hours) each, at a goodput; beyond the best, that one's hours.

    An N that has no more goodput than a smaller one, as happens where both meet nearly all, is no point of the line.
    """
    points: list[tuple[float, float]] = []
    for point in sorted(static, key=lambda each: (-each[0], each[1])):
        if not points or point[1] < points[-1][1]:
            points.append(point)
    below = (0.0, 0.0)
    for point in reversed(points):
        if point[0] >= goodput:
            span = point[0] - below[0]
            share = (goodput - below[0]) / span if span else 1.0
            return below[1] + share * (point[1] - below[1])
        below = point
    return points[0][1]


@dataclass(frozen=True)
class Figures:
    """The last line; nan where a run lacks what a figure is made of."""

    hours_vs_best_peer: float
    goodput_vs_best_peer_points: float
    best_peer: str
    code_goodput_percent: float
    reversals_per_h: float
    """On steady load."""
    hours_vs_static_line: float
    code_hours_vs_static_line: float
    """Goodput beyond _CODE_PERCENT, which is what is asked for, buys no hours."""
    capacity_after_step_minus_startup_s: float
    """The longest of all runs, from the first step to as many replicas as static ones would have to be."""
    dynosim_error_percent: float
    """nan: NVIDIA's simulator was not asked."""


@dataclass(frozen=True)
class Against:
    """Ours less a peer's, over the variants that can be followed, seed by seed."""

    peer: str
    goodput_points: Interval
    hours_ratio: Interval
    """Geometric mean."""


class Study:
    """All results, by cell and contestant."""

    def __init__(self, results: Sequence[Result]) -> None:
        self._by: dict[tuple[Cell, str, int, bool], list[Result]] = {}
        for result in sorted(results, key=lambda result: result.run.seed):
            run = result.run
            setting = run.setting if run.contestant == STATIC else 0
            self._by.setdefault((run.cell, run.contestant, setting, run.gated), []).append(result)
        self.cells = sorted({cell for cell, _, _, _ in self._by})
        self.followed = [cell for cell in self.cells if cell.variant in FOLLOWED]
        self.names = [name for name in (OURS, *PEERS, CLAIRVOYANT) if any(name == each for _, each, _, _ in self._by)]
        self.peers = [name for name in self.names if name in PEERS]

    def mean(self, field: str, name: str, cells: Iterable[Cell]) -> float:
        """Over these cells, each cell the same weight; nan without one."""
        means = [mean(self._by[cell, name, 0, True], field) for cell in cells]
        return statistics.fmean(means) if means else math.nan

    def against_line(self, name: str, cells: Iterable[Cell], *, enough: float = 100.0) -> float:
        """Hours over those of the static line at the same goodput, or at ``enough`` where that is less, mean over cells; nan
        without one."""
        ratios = [self._over_line(cell, self._by[cell, name, 0, True], enough=enough) for cell in cells]
        return statistics.fmean(ratios) if ratios else math.nan

    def best_peer(self) -> str:
        """The dynamic peer with the highest goodput on the variants that can be followed, all behind our admission."""
        return max(self.peers, key=lambda name: self.mean("goodput_percent", name, self.followed))

    def figures(self, *, dynosim_error_percent: float = math.nan) -> Figures:
        """Against the best peer, both behind our admission."""
        best, followed = self.best_peer(), self.followed
        code = [cell for cell in self.cells if cell.trace == "code" and cell.variant == "raw"]
        steady = [cell for cell in self.cells if cell.variant == "steady"]
        return Figures(
            hours_vs_best_peer=self.mean("hours", OURS, followed) / self.mean("hours", best, followed),
            goodput_vs_best_peer_points=self.mean("goodput_percent", OURS, followed)
            - self.mean("goodput_percent", best, followed),
            best_peer=best,
            code_goodput_percent=self.mean("goodput_percent", OURS, code),
            reversals_per_h=self.mean("reversals_per_hour", OURS, steady),
            hours_vs_static_line=self.against_line(OURS, followed),
            code_hours_vs_static_line=self.against_line(OURS, code, enough=_CODE_PERCENT),
            capacity_after_step_minus_startup_s=max(
                (late for cell in self.cells for late in self._late(cell, self._by.get((cell, OURS, 0, True), ()))),
                default=math.nan,
            ),
            dynosim_error_percent=dynosim_error_percent,
        )

    def ranked(self) -> list[str]:
        """The peers, the best one first."""
        return sorted(self.peers, key=lambda name: -self.mean("goodput_percent", name, self.followed))

    def against(self) -> list[Against]:
        """Ours against each peer, the best one first."""
        return [self._against(peer) for peer in self.ranked()]

    def rows(self) -> list[tuple[str, ...]]:
        """The Pareto table: one line for each cell, contestant and admission; static N is a contestant for each N."""
        return [
            (
                cell.trace,
                cell.variant,
                f"{cell.startup:.0f}",
                name,
                "kvplane" if gated else "vllm",
                _spread(results, "goodput_percent", digits=1),
                _spread(results, "hours", digits=2),
                f"{self._over_line(cell, results):.2f}",
                self._regret(cell, results),
                f"{mean(results, 'lost_percent'):.1f}",
                f"{mean(results, 'reversals_per_hour'):.1f}",
                report.number(max(self._late(cell, results), default=math.nan)),
            )
            for cell in self.cells
            for name, gated, results in self._contestants(cell)
        ]

    def _contestants(self, cell: Cell) -> Iterator[tuple[str, bool, list[Result]]]:
        """What stands in the table, whether behind our admission, and its results."""
        for name in self.names:
            for gated in (True, False):
                if (results := self._by.get((cell, name, 0, gated))) is not None:
                    yield name, gated, results
        for count, results in self._static(cell):
            yield f"{STATIC} {count}", True, results

    def _against(self, peer: str) -> Against:
        pairs = {
            str(cell): list(zip(self._by[cell, OURS, 0, True], self._by[cell, peer, 0, True], strict=True))
            for cell in self.followed
        }
        ratio = stratified({cell: [math.log(a.hours / b.hours) for a, b in each] for cell, each in pairs.items()})
        return Against(
            peer=peer,
            goodput_points=stratified(
                {cell: [a.goodput_percent - b.goodput_percent for a, b in each] for cell, each in pairs.items()}
            ),
            hours_ratio=Interval(math.exp(ratio.mean), math.exp(ratio.low), math.exp(ratio.high)),
        )

    def _over_line(self, cell: Cell, results: Sequence[Result], *, enough: float = 100.0) -> float:
        """Hours over those of the static line at the same goodput, or at ``enough`` where that is less."""
        static = [(mean(each, "goodput_percent"), mean(each, "hours")) for _, each in self._static(cell)]
        on_line = line(static, min(enough, mean(results, "goodput_percent")))
        return mean(results, "hours") / on_line if on_line else math.inf

    def _regret(self, cell: Cell, results: Sequence[Result]) -> str:
        """Hours over those of who knows all."""
        if (cell, CLAIRVOYANT, 0, True) not in self._by:
            return "none"
        return f"{mean(results, 'hours') / self.mean('hours', CLAIRVOYANT, [cell]):.2f}"

    def _late(self, cell: Cell, results: Iterable[Result]) -> list[float]:
        """Seconds beyond a start from each first step until enough replicas were ready."""
        return [
            result.step.seconds_to(self._enough(cell, result.run.seed)) - cell.startup
            for result in results
            if result.step is not None
        ]

    def _enough(self, cell: Cell, seed: int) -> int:
        """Fewest static replicas that serve the first step; all, where none do."""
        counts = [(count, each) for count, results in self._static(cell) for each in results if each.run.seed == seed]
        enough = [
            count
            for count, each in counts
            if each.step is not None and each.step.settled_goodput_percent >= _SERVED_PERCENT
        ]
        return min(enough, default=max(count for count, _ in counts))

    def _static(self, cell: Cell) -> list[tuple[int, list[Result]]]:
        return [
            (count, results)
            for (of, name, count, _), results in sorted(self._by.items(), key=lambda each: each[0])
            if of == cell and name == STATIC
        ]


def _spread(results: Sequence[Result], field: str, *, digits: int) -> str:
    """The mean and half of its 95 % interval."""
    found = stratified({"all": [getattr(result, field) for result in results]})
    half = (found.high - found.low) / 2
    return f"{found.mean:.{digits}f}" + (f" ± {half:.{digits}f}" if math.isfinite(half) else "")


HEADER: Final = (
    "trace",
    "variant",
    "startup_s",
    "scaler",
    "admission",
    "goodput_%",
    "hours",
    "vs_static",
    "vs_clairvoyant",
    "lost_%",
    "reversals/h",
    "late_s",
)
SENSITIVITY_HEADER: Final = (
    "trace",
    "variant",
    "startup_s",
    "condition",
    "scaler",
    "goodput_%",
    "hours",
    "reversals/h",
)
AGAINST_HEADER: Final = ("kvplane against", "goodput, points", "hours, ratio")


def against_rows(found: Iterable[Against]) -> list[tuple[str, ...]]:
    """Of AGAINST_HEADER; in brackets the 95 % interval."""
    return [
        (
            each.peer,
            str(each.goodput_points),
            f"{each.hours_ratio.mean:.2f} [{each.hours_ratio.low:.2f}, {each.hours_ratio.high:.2f}]",
        )
        for each in found
    ]
