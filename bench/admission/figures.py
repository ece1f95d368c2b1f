"""What the runs say: goodput by cell, gains over the best peer, the worst cell, and what is computed twice. Pure.

A cell is a mix at a load. All differences are between runs of the same seed, in points (100 x share of requests).
"""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench import report
from bench.admission.contestants import CONTESTANTS, NONE, OURS, VLLM_CAPS
from bench.admission.intervals import Interval, stratified
from bench.admission.plan import Stage
from bench.admission.records import RunRecord

LIGHT_LOAD = 0.8
PEERS = tuple(contestant.name for contestant in CONTESTANTS if contestant.name != OURS)


@dataclass(frozen=True, order=True)
class Cell:
    """A mix at a load."""

    mix: str
    load: float

    def __str__(self) -> str:
        return f"{self.mix} {self.load:g}x"


@dataclass(frozen=True)
class Worst:
    """The cell in which we are furthest behind (or least ahead of) the best in-flight cap of that cell."""

    cell: Cell
    cap: str
    points: float


class Results:
    """The runs that count, by cell and contestant."""

    def __init__(self, records: Iterable[RunRecord]) -> None:
        self._runs: dict[Cell, dict[str, dict[int, RunRecord]]] = {}
        for record in records:
            if record.key.stage is Stage.MAIN:
                cell = self._runs.setdefault(Cell(record.key.mix, record.key.load), {})
                cell.setdefault(record.key.contestant, {})[record.key.seed] = record

    @property
    def cells(self) -> list[Cell]:
        """In the order of the runs."""
        return list(self._runs)

    def contestants(self, cell: Cell) -> list[str]:
        """Contestants first, in their order, then caps."""
        order = [contestant.name for contestant in CONTESTANTS]
        return sorted(self._runs[cell], key=lambda name: order.index(name) if name in order else len(order))

    def runs(self, cell: Cell, contestant: str) -> list[RunRecord]:
        """By seed."""
        return [record for _, record in sorted(self._runs[cell][contestant].items())]

    def goodput(self, cell: Cell, contestant: str) -> float:
        """Mean over seeds, %."""
        return statistics.fmean(100 * run.summary.goodput for run in self.runs(cell, contestant))

    def differences(self, cells: Iterable[Cell], contestant: str, other: str) -> dict[str, list[float]]:
        """Goodput of one minus that of the other, by cell and seed, in points."""
        return {
            str(cell): [
                100 * (mine.summary.goodput - theirs.summary.goodput)
                for mine, theirs in zip(self.runs(cell, contestant), self.runs(cell, other), strict=True)
            ]
            for cell in cells
        }

    def overloaded(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.load > 1]

    def best_peer(self) -> str:
        """The peer with the highest mean goodput over the overloaded cells, each with one setting for all of them."""
        return max(PEERS, key=lambda peer: statistics.fmean(self.goodput(cell, peer) for cell in self.overloaded()))

    def gain(self) -> Interval:
        """Ours minus the best peer, mean over the overloaded cells."""
        return stratified(self.differences(self.overloaded(), OURS, self.best_peer()))

    def cost(self) -> Interval:
        """Ours minus no admission, mean over the cells below capacity: negative is what admission loses there."""
        return stratified(self.differences([cell for cell in self.cells if cell.load == LIGHT_LOAD], OURS, NONE))

    def worst(self) -> Worst:
        """No admission counts as a cap that never binds."""
        return min((self._behind(cell) for cell in self.cells), key=lambda worst: worst.points)

    def recomputed_max_percent(self, contestant: str = OURS) -> float:
        """The largest share of any cell, all its seeds together."""
        return max(self.recomputed_percent(cell, contestant) for cell in self.cells)

    def recomputed_percent(self, cell: Cell, contestant: str) -> float:
        runs = self.runs(cell, contestant)
        computed = sum(run.computed_tokens for run in runs)
        return 100 * sum(run.recomputed_tokens for run in runs) / computed if computed else 0.0

    def apart_seconds(self) -> float | None:
        """The longest time between two runs that are compared: of one mix, load and seed; None where one was not noted."""
        groups: dict[tuple[Cell, int], list[float | None]] = {}
        for cell, contestants in self._runs.items():
            for runs in contestants.values():
                for seed, run in runs.items():
                    groups.setdefault((cell, seed), []).append(run.at)
        known = [[at for at in group if at is not None] for group in groups.values()]
        if [len(group) for group in known] != [len(group) for group in groups.values()]:
            return None
        return max((max(group) - min(group) for group in known), default=0.0)

    def _behind(self, cell: Cell) -> Worst:
        caps = [name for name in self.contestants(cell) if name.startswith("cap ") or name in (NONE, VLLM_CAPS)]
        best = max(caps, key=lambda cap: self.goodput(cell, cap))
        return Worst(cell, best, self.goodput(cell, OURS) - self.goodput(cell, best))


@dataclass(frozen=True)
class Replay:
    """Figures of the replay of recorded traffic on the simulated engine."""

    gain_1_6_points: float
    gain_2_4_points: float
    recomputed_percent: float
    code_goodput_percent: float


def last_line(results: Results, replay: Replay) -> dict[str, report.Value]:
    """The figures of the last line, in its order; ``cost`` is the lower end of its interval, its mean where there is none."""
    cost = results.cost()
    return {
        "gain_points": results.gain().mean,
        "worst_cell_points": results.worst().points,
        "recomputed_max_percent": results.recomputed_max_percent(),
        "cost_0_8_points": cost.mean if math.isnan(cost.low) else cost.low,
        "best_peer": results.best_peer(),
        "replay_gain_1_6_points": replay.gain_1_6_points,
        "replay_gain_2_4_points": replay.gain_2_4_points,
        "replay_recomputed_percent": replay.recomputed_percent,
        "code_goodput_percent": replay.code_goodput_percent,
    }


HEADER = (
    "cell",
    "admission",
    "goodput %",
    "refused %",
    "preempted",
    "again %",
    "TTFT ms p50 / p99",
    "TPOT ms p50 / p99",
)


def rows(results: Results) -> list[tuple[str, ...]]:
    """One row for each contestant in each cell: means over seeds; preemptions are their sum."""
    lines: list[tuple[str, ...]] = []
    for cell in results.cells:
        for name in results.contestants(cell):
            runs = results.runs(cell, name)
            refused = statistics.fmean(100 * run.summary.refused / run.summary.offered for run in runs)
            lines.append(
                (
                    str(cell),
                    name,
                    f"{results.goodput(cell, name):.1f}",
                    f"{refused:.1f}",
                    str(sum(run.preemptions for run in runs)),
                    f"{results.recomputed_percent(cell, name):.2f}",
                    _pair([run.summary.ttft_median for run in runs], [run.summary.ttft_p99 for run in runs], ".0f"),
                    _pair([run.summary.tpot_median for run in runs], [run.summary.tpot_p99 for run in runs], ".1f"),
                )
            )
    return lines


def comparison(results: Results) -> str:
    """Ours against each peer, with intervals: a Markdown table and the sentences that the last line is short for."""
    overloaded = results.overloaded()
    lines = [
        (
            peer,
            f"{statistics.fmean(results.goodput(cell, peer) for cell in overloaded):.1f}",
            str(stratified(results.differences(overloaded, OURS, peer))),
        )
        for peer in (*PEERS, OURS)
    ]
    worst = results.worst()
    return "\n".join(
        [
            report.table(
                ("mean over the cells beyond capacity", "goodput %", f"{OURS} minus it, points [95 %]"), lines
            ),
            "",
            f"Worst cell against the best in-flight cap of that cell: {worst.cell}, {worst.points:+.1f} points "
            f"(best: {worst.cap}).",
            f"Below capacity ({LIGHT_LOAD:g}x), {OURS} minus no admission: {results.cost()} points.",
            _said_apart(results.apart_seconds()),
        ]
    )


def _said_apart(seconds: float | None) -> str:
    if seconds is None:
        return "When each run was made is not known of all: some that are compared may lie hours apart."
    return f"Runs of the same traffic lie {seconds / 60:.0f} minutes apart at most."


def _pair(medians: Sequence[float | None], tails: Sequence[float | None], form: str) -> str:
    return f"{_milliseconds(medians, form)} / {_milliseconds(tails, form)}"


def _milliseconds(values: Sequence[float | None], form: str) -> str:
    known = [value for value in values if value is not None]
    return format(1000 * statistics.fmean(known), form) if known else "-"
