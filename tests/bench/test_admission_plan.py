"""What the admission benchmark runs, what it leaves out when it goes on after an end, and how it sums up."""

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from bench.admission import figures, plan
from bench.admission.__main__ import forget_replayed, open_records, said_plan
from bench.admission.contestants import CAPS, CONTESTANTS, NONE, OURS, VLLM_CAPS
from bench.admission.figures import Cell, Replay, Results
from bench.admission.goals import Goals, Summary
from bench.admission.plan import RunKey, Size, Stage
from bench.admission.records import Machine, Records, RunRecord
from bench.admission.search import Probe

SIZE = Size(mixes=("chat", "long"), loads=(0.8, 1.6, 2.4), seeds=(1, 2))
NAMES = [contestant.name for contestant in CONTESTANTS]


def _record(key: RunKey, goodput: float, *, recomputed: int = 0, preemptions: int = 0) -> RunRecord:
    return RunRecord(
        key=key,
        rate=5.0,
        summary=Summary(
            offered=100,
            good=round(100 * goodput),
            refused=10,
            unfinished=0,
            ttft_median=0.05,
            ttft_p99=0.2,
            tpot_median=None,
            tpot_p99=None,
        ),
        preemptions=preemptions,
        computed_tokens=10_000,
        recomputed_tokens=recomputed,
        machine=Machine(late_seconds=0.001, overrun_share=0.0),
        met="1",
    )


class TestPlan:
    def test_every_contestant_runs_every_cell_with_every_seed_once(self) -> None:
        steps = plan.main_runs(SIZE, {"chat": [9, 13], "long": [6, 9]})
        keys = [step.key for step in steps]
        assert len(keys) == len(set(keys))
        for mix in SIZE.mixes:
            for load in SIZE.loads:
                for seed in SIZE.seeds:
                    names = {k.contestant for k in keys if (k.mix, k.load, k.seed) == (mix, load, seed)}
                    assert names >= set(NAMES)
                    caps = {name for name in names if name.startswith("cap ")}
                    assert caps == (set() if load < 1 else {"cap 9", "cap 13"} if mix == "chat" else {"cap 6", "cap 9"})

    def test_a_mix_is_finished_before_the_next_begins(self) -> None:
        mixes = [step.key.mix for step in plan.main_runs(SIZE, {"chat": [9], "long": [6]})]
        assert mixes == sorted(mixes)

    def test_contestants_of_a_cell_follow_each_other_and_take_turns_at_being_first(self) -> None:
        steps = plan.main_runs(SIZE, {"chat": [], "long": []})
        groups = [steps[i : i + len(NAMES)] for i in range(0, len(steps), len(NAMES))]
        assert all(len({(s.key.mix, s.key.load, s.key.seed) for s in group}) == 1 for group in groups)
        assert len({group[0].key.contestant for group in groups}) == len(NAMES)

    def test_only_what_is_missing_is_done(self) -> None:
        steps = plan.tuning(SIZE)
        assert plan.still_to_do(steps, {steps[0].key: None, steps[3].key: None}) == [steps[1], steps[2], *steps[4:]]

    def test_the_tuned_cap_is_best_on_average_and_hindsight_looks_at_one_mix(self) -> None:
        best = {"chat": 28, "long": 6}
        goodputs = {
            step.key: 0.9 - abs(math.log(cap / best[step.key.mix])) / 10
            for step in plan.tuning(SIZE)
            for cap in [int(step.key.contestant.removeprefix("cap "))]
        }
        goodputs[RunKey(Stage.TUNING, "cap 13", "chat", plan.TUNING_LOAD, plan.TUNING_SEED)] = 0.99
        assert plan.tuned_cap(goodputs, SIZE) == 13
        assert plan.hindsight_caps(goodputs, SIZE, mix="chat", tuned=13) == [28, 19]
        assert plan.hindsight_caps(goodputs, SIZE, mix="long", tuned=13) == [6, 9]

    def test_tuning_uses_seeds_that_nothing_else_uses(self) -> None:
        seeds = {plan.TUNING_SEED, plan.CAPACITY_SEED, plan.UNLOADED_SEED, plan.WARM_UP_SEED}
        assert len(seeds) == 4
        assert not seeds & set(Size().seeds)

    def test_the_whole_is_within_three_hours_and_the_quick_one_within_twelve_minutes(self) -> None:
        assert sum(part.seconds for part in plan.estimate(Size())) <= 160 * 60  # the replay takes the rest
        assert sum(part.seconds for part in plan.estimate(plan.QUICK)) <= 9.5 * 60

    def test_the_estimate_counts_the_runs_that_will_be(self) -> None:
        size = Size()
        runs = {part.what: part.runs for part in plan.estimate(size)}
        hindsight = {mix: list(CAPS[: size.hindsight_caps]) for mix in size.mixes}
        assert runs["runs that count"] == len(plan.main_runs(size, hindsight))
        assert runs[f"tuning of {VLLM_CAPS}"] == len(plan.tuning(size))

    def test_no_more_than_five_values_are_tried(self) -> None:
        assert len(CAPS) <= 5

    def test_the_shift_needs_the_capacities_of_the_mixes_it_is_made_of(self) -> None:
        assert list(plan.needed_for_capacity(Size())) == ["chat", "mixed", "long", "shift"]
        assert list(plan.needed_for_capacity(plan.QUICK)) == list(plan.QUICK.mixes)

    def test_the_plan_is_said_with_its_minutes(self) -> None:
        assert "in all, without the replay" in said_plan(Size())


class TestRecords:
    def test_a_restart_finds_what_was_measured(self, tmp_path: Path) -> None:
        records = Records(tmp_path)
        run = _record(RunKey(Stage.MAIN, OURS, "chat", 1.6, 1), 0.9)
        records.add_probe("chat", Probe(6.0, passed=True))
        records.add_run(run)
        records.write_goals({"chat": Goals(0.2, 0.03)})
        again = Records(tmp_path)
        assert again.runs == {run.key: run}
        assert again.probes == {"chat": [Probe(6.0, passed=True)]}
        assert again.goals == {"chat": Goals(0.2, 0.03)}

    def test_a_line_that_was_cut_is_dropped_and_written_over(self, tmp_path: Path) -> None:
        records = Records(tmp_path)
        first, second = (_record(RunKey(Stage.MAIN, OURS, "chat", 1.6, seed), 0.9) for seed in (1, 2))
        records.add_run(first)
        with (tmp_path / "runs.jsonl").open("a") as file:
            file.write('{"run": {"key": {"sta')
        again = Records(tmp_path)
        assert list(again.runs) == [first.key]
        again.add_run(second)
        assert list(Records(tmp_path).runs) == [first.key, second.key]

    def test_one_contestant_can_be_forgotten(self, tmp_path: Path) -> None:
        records = Records(tmp_path)
        records.add_probe("chat", Probe(6.0, passed=True))
        for contestant in (OURS, NONE):
            records.add_run(_record(RunKey(Stage.MAIN, contestant, "chat", 1.6, 1), 0.9))
        records.forget(OURS)
        again = Records(tmp_path)
        assert [key.contestant for key in again.runs] == [NONE]
        assert again.probes

    def test_its_replays_too(self, tmp_path: Path) -> None:
        file = tmp_path / "replay.jsonl"
        forget_replayed(file, OURS)  # nothing has been replayed yet
        file.write_text("".join(json.dumps({"key": {"family": family}}) + "\n" for family in (OURS, NONE)))
        forget_replayed(file, OURS)
        assert [json.loads(line) for line in file.read_text().splitlines()] == [{"key": {"family": NONE}}]

    def test_results_under_other_settings_are_not_mixed(self, tmp_path: Path) -> None:
        open_records(tmp_path, SIZE)
        open_records(tmp_path, SIZE)
        with pytest.raises(ValueError, match="under other settings"):
            open_records(tmp_path, plan.QUICK)


class TestFigures:
    def _runs(self) -> Iterator[RunRecord]:
        """Ours: 90 % everywhere; the gateway 80, the cap 70 but 95 in hindsight for one cell."""
        level = {OURS: 0.90, "gateway": 0.80, "kaito": 0.50, VLLM_CAPS: 0.70, NONE: 0.40}
        for step in plan.main_runs(SIZE, {"chat": [9], "long": [6]}):
            key = step.key
            goodput = level.get(key.contestant, 0.85)
            if key.load < 1:
                goodput = {OURS: 0.99 if key.seed == 1 else 1.0, NONE: 1.0}.get(key.contestant, 0.98)
            if (key.contestant, key.mix, key.load) == ("cap 6", "long", 2.4):
                goodput = 0.95
            yield _record(key, goodput, recomputed=300 if key.mix == "long" and key.load == 2.4 else 10, preemptions=2)

    def test_what_the_last_line_says(self) -> None:
        line = figures.last_line(Results(self._runs()), Replay(9.0, 16.0, 0.2, 64.0))
        assert list(line) == [
            "gain_points",
            "worst_cell_points",
            "recomputed_max_percent",
            "cost_0_8_points",
            "best_peer",
            "replay_gain_1_6_points",
            "replay_gain_2_4_points",
            "replay_recomputed_percent",
            "code_goodput_percent",
        ]
        assert line["gain_points"] == pytest.approx(10.0)
        assert line["worst_cell_points"] == pytest.approx(-5.0)
        assert line["recomputed_max_percent"] == pytest.approx(3.0)
        assert line["cost_0_8_points"] == pytest.approx(-0.5 - 4.303 * math.sqrt(2 * 0.5 / 2) / 2)  # the lower end
        assert line["best_peer"] == "gateway"

    def test_the_worst_cell_and_the_cap_that_was_better(self) -> None:
        worst = Results(self._runs()).worst()
        assert (worst.cell, worst.cap) == (Cell("long", 2.4), "cap 6")

    def test_without_a_second_seed_the_cost_is_a_mean(self) -> None:
        results = Results(record for record in self._runs() if record.key.seed == 1)
        assert figures.last_line(results, Replay(1, 1, 1, 1))["cost_0_8_points"] == pytest.approx(-1.0)

    def test_tuning_runs_are_no_results(self) -> None:
        tuning = [_record(step.key, 0.1) for step in plan.tuning(SIZE)]
        assert Results(tuning).cells == []

    def test_every_cell_has_a_row_for_each_contestant(self) -> None:
        results = Results(self._runs())
        rows = figures.rows(results)
        assert len(rows) == 2 * (len(NAMES) + 2 * (len(NAMES) + 1))
        assert [row[1] for row in rows[: len(NAMES)]] == NAMES
        assert all(len(row) == len(figures.HEADER) for row in rows)
        assert rows[0][-1] == "- / -"  # no request had two tokens

    def test_the_comparison_names_the_worst_cell(self) -> None:
        text = figures.comparison(Results(self._runs()))
        assert "long 2.4x, -5.0 points (best: cap 6)" in text
        assert "+10.0 [+10.0, +10.0]" in text

    def test_the_comparison_says_how_far_apart_in_time_its_runs_lie(self) -> None:
        noted = [
            replace(run, at=1000.0 + (600.0 if run.key == RunKey(Stage.MAIN, OURS, "chat", 1.6, 1) else 0.0))
            for run in self._runs()
        ]
        assert "of the same traffic lie 10 minutes apart at most" in figures.comparison(Results(noted))
        assert "may lie hours apart" in figures.comparison(Results([*noted[1:], replace(noted[0], at=None)]))
