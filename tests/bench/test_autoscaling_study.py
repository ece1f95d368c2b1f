"""Traffic, and the arithmetic of what is reported."""

import math
from dataclasses import asdict, replace

import pytest

from bench.admission.replay.traces import Line
from bench.autoscaling.conditions import CONDITIONS, USUAL
from bench.autoscaling.study import (
    AGAINST_HEADER,
    CLAIRVOYANT,
    HEADER,
    OURS,
    PEERS,
    SENSITIVITY_HEADER,
    Cell,
    Result,
    Run,
    Size,
    Step,
    Study,
    against_rows,
    cells,
    chosen,
    line,
    reported_runs,
    sensitivity_rows,
    sensitivity_runs,
    tuning_runs,
)
from bench.autoscaling.variants import (
    STEP_SECONDS,
    STEPS,
    VARIANTS,
    diurnal,
    raw,
    steady,
    steps,
    stretched,
    wave,
    window,
)
from bench.report import last_line

TRACE = [Line(at=0.5 * number, prompt_tokens=100 + number, output_tokens=20) for number in range(4000)]


class TestVariants:
    def test_settings_are_chosen_on_another_part_than_they_are_judged_on(self) -> None:
        chosen_on, judged_on = window(TRACE, tuning=True), window(TRACE, tuning=False)
        assert len(chosen_on) + len(judged_on) == len(TRACE)
        assert {line.prompt_tokens for line in chosen_on}.isdisjoint(line.prompt_tokens for line in judged_on)
        assert chosen_on[0].at == judged_on[0].at == 0.0
        assert judged_on[-1].at == pytest.approx(2 * chosen_on[-1].at, rel=0.01)

    @pytest.mark.parametrize("name", sorted(VARIANTS))
    def test_in_order_and_the_same_again(self, name: str) -> None:
        made = VARIANTS[name](TRACE, rate=4.0, seed=1)
        assert [each.at for each in made] == sorted(each.at for each in made)
        assert made == VARIANTS[name](TRACE, rate=4.0, seed=1)
        assert made != VARIANTS[name](TRACE, rate=4.0, seed=2)

    def test_raw_keeps_the_traces_clock_at_any_rate(self) -> None:
        for rate in (0.5, 1.8, 4.0):
            made = raw(TRACE, rate=rate, seed=1)
            assert made[-1].at == pytest.approx(TRACE[-1].at, rel=0.05)
            assert len(made) / made[-1].at == pytest.approx(rate, rel=0.1)

    def test_stretched_lasts_four_times_as_long_at_the_same_rate(self) -> None:
        short, long = raw(TRACE, rate=4.0, seed=1), stretched(TRACE, rate=4.0, seed=1)
        assert long[-1].at == pytest.approx(4 * short[-1].at, rel=0.05)
        assert len(long) == pytest.approx(4 * len(short), rel=0.05)

    def test_a_day_has_a_night(self) -> None:
        made = diurnal(TRACE, rate=4.0, seed=1)
        length = made[-1].at
        night = sum(each.at < length / 8 for each in made)
        noon = sum(length * 7 / 16 < each.at < length * 9 / 16 for each in made)
        assert noon > 3 * night

    def test_the_wave(self) -> None:
        assert [wave(share) for share in (0.0, 0.5, 1.0)] == pytest.approx([0.2, 1.0, 0.2])

    def test_steps_have_their_levels(self) -> None:
        made = steps(TRACE, rate=6.0, seed=1)
        counts = [
            sum(number * STEP_SECONDS <= each.at < (number + 1) * STEP_SECONDS for each in made)
            for number in range(len(STEPS))
        ]
        assert [count / counts[0] for count in counts] == pytest.approx(list(STEPS), rel=0.15)
        assert len(made) / (STEP_SECONDS * len(STEPS)) == pytest.approx(6.0, rel=0.1)

    def test_steady_load_is_steady(self) -> None:
        made = steady(TRACE, rate=4.0, seed=1)
        counts = [sum(number * 600 <= each.at < (number + 1) * 600 for each in made) for number in range(6)]
        assert counts == pytest.approx([2400] * 6, rel=0.1)
        assert made[-1].at < 3600


CELL = Cell("conv", "stretched", 60.0)
CODE = Cell("code", "raw", 60.0)
STEPPED = Cell("conv", "steps", 60.0)
STEADY = Cell("conv", "steady", 60.0)


def result(
    name: str,
    goodput: float,
    hours: float,
    *,
    cell: Cell = CELL,
    setting: int = 0,
    seed: int = 1,
    reversals: float = 0.5,
    step: Step | None = None,
) -> Result:
    return Result(Run(cell, seed, name, setting), goodput, hours, 0.0, reversals, step)


class TestLine:
    POINTS = ((50.0, 4.0), (80.0, 8.0), (100.0, 12.0), (100.0, 16.0))

    @pytest.mark.parametrize(
        ("goodput", "hours"), [(50.0, 4.0), (65.0, 6.0), (90.0, 10.0), (100.0, 12.0), (25.0, 2.0), (101.0, 12.0)]
    )
    def test_between_two_counts(self, goodput: float, hours: float) -> None:
        assert line(self.POINTS, goodput) == pytest.approx(hours)

    @pytest.mark.parametrize(("goodput", "hours"), [(99.85, 4.0 + 4.0 * 9.85 / 9.9), (99.95, 10.0)])
    def test_a_count_that_a_smaller_one_beats_is_no_point_of_it(self, goodput: float, hours: float) -> None:
        points = ((90.0, 4.0), (99.9, 8.0), (99.8, 9.0), (100.0, 12.0))
        assert line(points, goodput) == pytest.approx(hours)


def test_a_peers_best_setting_is_the_one_with_the_most_goodput() -> None:
    tried = [
        result("knative", 80.0, 4.0, setting=0),
        result("knative", 90.0, 9.0, setting=1),
        result("knative", 90.0, 7.0, setting=2),
        result("hpa", 70.0, 1.0, setting=1),
        result("hpa", 60.0, 1.0, setting=0),
    ]
    assert chosen(tried) == {"knative": 2, "hpa": 1}


def test_who_knows_all_saves_hours_once_goodput_is_enough() -> None:
    tried = [
        result(CLAIRVOYANT, goodput, hours, setting=setting)
        for setting, (goodput, hours) in enumerate(((100.0, 9.0), (99.2, 7.0), (90.0, 5.0)))
    ]
    assert chosen(tried) == {CLAIRVOYANT: 1}


def test_every_contestant_runs_in_every_cell_with_the_same_seeds() -> None:
    size = Size()
    runs = reported_runs(size, {"knative": 3})
    per = 2 * (len(PEERS) + 1) + 1 + size.highest
    assert len(runs) == len(cells(size)) * len(size.seeds) * per
    assert {run.setting for run in runs if run.contestant == "knative"} == {3}
    assert {run.seed for run in tuning_runs(size)}.isdisjoint(size.seeds)


def stepped(settled: float, *ready: tuple[float, int]) -> Step:
    return Step(settled, ready)


class TestFigures:
    STATIC = tuple(
        result("static", goodput, hours, cell=cell, setting=number)
        for cell in (CELL, CODE)
        for number, (goodput, hours) in enumerate(((50.0, 4.0), (90.0, 8.0), (100.0, 12.0)), start=1)
    )
    STUDY = Study(
        [
            *STATIC,
            result(OURS, 95.0, 6.0),
            result("hpa", 92.0, 8.0),
            result("knative", 85.0, 5.0),
            result(CLAIRVOYANT, 99.5, 5.0),
            result(OURS, 90.0, 6.0, cell=CODE),
            result("hpa", 52.0, 4.0, cell=CODE),
            result("knative", 50.0, 4.0, cell=CODE),
        ]
    )

    def test_against_the_peer_with_the_highest_goodput(self) -> None:
        figures = self.STUDY.figures()
        assert figures.best_peer == "hpa"
        assert figures.hours_vs_best_peer == pytest.approx(0.75)
        assert figures.goodput_vs_best_peer_points == pytest.approx(3.0)

    def test_against_the_line_of_static_counts(self) -> None:
        figures = self.STUDY.figures()
        assert figures.hours_vs_static_line == pytest.approx(6 / 10)
        assert figures.code_hours_vs_static_line == pytest.approx(6 / 8)
        assert figures.code_goodput_percent == pytest.approx(90.0)

    def test_goodput_on_code_beyond_what_is_asked_for_buys_no_hours(self) -> None:
        ours = [result(OURS, 95.0, 6.0), result(OURS, 95.0, 9.0, cell=CODE)]
        figures = Study([*self.STATIC, *ours, result("hpa", 92.0, 8.0)]).figures()
        assert figures.hours_vs_static_line == pytest.approx(6 / 10)
        assert figures.code_hours_vs_static_line == pytest.approx(9 / 8)

    def test_reversals_are_those_of_steady_load(self) -> None:
        steady_ = result(OURS, 100.0, 6.0, cell=STEADY, reversals=0.0)
        others = [result("hpa", 92.0, 8.0), result(OURS, 95.0, 6.0, reversals=7.0)]
        static = [each for each in self.STATIC if each.run.cell == CELL]
        assert Study([*static, *others, steady_]).figures().reversals_per_h == 0.0

    def test_what_was_not_run_is_not_known(self) -> None:
        figures = self.STUDY.figures()
        assert math.isnan(figures.capacity_after_step_minus_startup_s)
        assert math.isnan(figures.reversals_per_h)
        assert math.isnan(figures.dynosim_error_percent)

    def test_the_last_line(self) -> None:
        text = last_line("autoscaling", asdict(self.STUDY.figures()))
        assert text == (
            "bench autoscaling: hours_vs_best_peer=0.75 goodput_vs_best_peer_points=3.00 best_peer=hpa "
            "code_goodput_percent=90.0 reversals_per_h=none hours_vs_static_line=0.60 code_hours_vs_static_line=0.75 "
            "capacity_after_step_minus_startup_s=none dynosim_error_percent=none"
        )

    def test_rows_have_the_headers_columns(self) -> None:
        rows = self.STUDY.rows()
        assert {len(row) for row in rows} == {len(HEADER)}
        assert rows[0][:3] == ("code", "raw", "60")
        assert len([row for row in rows if row[0] == "code"]) == 6
        told = [dict(zip(HEADER, row, strict=True)) for row in rows if row[0] == "conv"]
        assert [row["scaler"] for row in told] == [
            OURS,
            "hpa",
            "knative",
            CLAIRVOYANT,
            "static 1",
            "static 2",
            "static 3",
        ]
        assert [row["hours"] for row in told[-3:]] == ["4.00", "8.00", "12.00"]
        assert [row["vs_static"] for row in told[-3:]] == ["1.00"] * 3
        assert {row["late_s"] for row in told} == {"none"}


class TestCapacityAfterAStep:
    """Two static replicas serve the step of this seed, and one does not."""

    STATIC = tuple(
        result("static", 90.0, 4.0, cell=STEPPED, setting=number, step=stepped(settled, (0.0, number)))
        for number, settled in ((1, 40.0), (2, 96.0), (3, 100.0))
    )

    def study(self, *ready: tuple[float, int]) -> Study:
        ours = result(OURS, 95.0, 6.0, cell=STEPPED, step=stepped(97.0, *ready))
        peer = result("hpa", 92.0, 8.0, cell=STEPPED, step=stepped(97.0, (0.0, 1), (90.0, 3)))
        return Study([*self.STATIC, ours, peer])

    def late(self, *ready: tuple[float, int]) -> float:
        return self.study(*ready).figures().capacity_after_step_minus_startup_s

    def test_counted_from_a_start(self) -> None:
        assert self.late((0.0, 1), (68.0, 2), (300.0, 3)) == pytest.approx(8.0)

    def test_what_is_there_before_is_early(self) -> None:
        assert self.late((0.0, 2)) == pytest.approx(-60.0)

    def test_what_never_comes_takes_the_whole_step(self) -> None:
        assert self.late((0.0, 1)) == pytest.approx(STEP_SECONDS - 60.0)

    def test_of_every_contestant_in_the_table(self) -> None:
        rows = [dict(zip(HEADER, row, strict=True)) for row in self.study((0.0, 1), (68.0, 2)).rows()]
        assert {row["scaler"]: row["late_s"] for row in rows} == {
            OURS: "8.00",
            "hpa": "30.0",
            "static 1": "1140",
            "static 2": "-60.0",
            "static 3": "-60.0",
        }


class TestOtherConditions:
    def test_one_thing_is_changed_at_a_time(self) -> None:
        size = Size()
        runs = sensitivity_runs(size, {"hpa": 2}, (OURS, "hpa"))
        changed = {(run.cell.startup, run.cell.condition) for run in runs}
        assert changed == {
            (30.0, USUAL),
            (300.0, USUAL),
            *((60.0, name) for name in CONDITIONS if name != USUAL),
        }
        assert len(runs) == len(size.sensitive) * len(changed) * len(size.seeds) * 2
        assert {run.setting for run in runs if run.contestant == "hpa"} == {2}
        assert {run.cell for run in runs}.isdisjoint(cells(size))

    def test_what_is_not_run_as_usual_is_not_run_otherwise(self) -> None:
        runs = sensitivity_runs(Size(variants=("raw", "steps")), {}, (OURS,))
        assert {run.cell.variant for run in runs} == {"steps"}

    def test_the_usual_stands_beside_it(self) -> None:
        blind = replace(CELL, condition="blind for 2 of 10 minutes")
        results = [
            result(OURS, 95.0, 6.0),
            result("hpa", 92.0, 8.0),
            result("knative", 85.0, 5.0),
            result(OURS, 94.0, 7.0, cell=blind),
            result("hpa", 60.0, 8.0, cell=blind),
        ]
        rows = sensitivity_rows(results, Size(), (OURS, "hpa"))
        assert [dict(zip(SENSITIVITY_HEADER, row, strict=True))["goodput_%"] for row in rows] == [
            "95.0",
            "92.0",
            "94.0",
            "60.0",
        ]
        assert rows[2][:5] == ("conv", "stretched", "60", "blind for 2 of 10 minutes", OURS)

    def test_blind_means_two_minutes_of_ten(self) -> None:
        silent = CONDITIONS["blind for 2 of 10 minutes"].silent
        assert silent[:2] == ((480.0, 600.0), (1080.0, 1200.0))
        assert silent[-1][1] > 4 * 40 * 60


class TestAgainst:
    """Three seeds: the differences are told apart from the seeds' own."""

    STUDY = Study(
        [
            *(
                result(name, goodput + shift, hours * factor, seed=seed)
                for name, shift, factor in ((OURS, 2.0, 0.8), ("hpa", 0.0, 1.0), ("knative", -5.0, 0.7))
                for seed, goodput, hours in ((1, 80.0, 10.0), (3, 90.0, 14.0), (2, 85.0, 12.0))
            ),
        ]
    )

    def test_pairs_of_the_same_seed(self) -> None:
        best, other = self.STUDY.against()
        assert (best.peer, other.peer) == ("hpa", "knative")
        assert (best.goodput_points.mean, best.goodput_points.low) == pytest.approx((2.0, 2.0))
        assert (best.hours_ratio.mean, best.hours_ratio.high) == pytest.approx((0.8, 0.8))
        assert other.goodput_points.mean == pytest.approx(7.0)

    def test_rows(self) -> None:
        rows = against_rows(self.STUDY.against())
        assert rows[0] == ("hpa", "+2.0 [+2.0, +2.0]", "0.80 [0.80, 0.80]")
        assert {len(row) for row in rows} == {len(AGAINST_HEADER)}
