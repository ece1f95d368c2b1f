"""Which runs the replay study makes of its size, what it keeps, and the figures that it draws."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from bench.admission.policy import Engine
from bench.admission.replay import study as subject
from bench.admission.replay.contestants import FAMILIES, NONE, OURS
from bench.admission.replay.study import CODE, CONV, Cell, Key, Result, Results, Size, Study, run

KEY = Key(preset="8b-h100", trace=CONV, rate=4.0, seed=1, share=0.005, family=NONE, setting=0)
ENGINE = Engine(blocks=1000, block_size=16, max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=4096)


def result(goodput: float, *, recomputed: int = 0) -> Result:
    return Result(goodput, 0.0, 1.0, 0.04, 0, 1000, recomputed, 0.5)


def test_a_run_follows_from_its_key_alone() -> None:
    first = run(KEY)
    assert run(KEY) == first
    assert first.goodput_percent == 100.0
    assert run(replace(KEY, rate=400.0)).goodput_percent < 100.0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_policy_runs_with_each_of_its_settings(family: str) -> None:
    for setting in FAMILIES[family].settings:
        policy = FAMILIES[family].make(setting, subject.GOALS, ENGINE)
        assert policy.name
    assert run(replace(KEY, family=family, setting=FAMILIES[family].settings[-1])).goodput_percent > 90


def test_results_are_kept_and_found_again(tmp_path: Path) -> None:
    file = tmp_path / "runs" / "replay.jsonl"
    Results(file).add(KEY, result(91.5))
    assert Results(file).by_key == {KEY: result(91.5)}


def test_capacity_is_the_highest_rate_that_passes() -> None:
    asked: list[float] = []

    def replayed(keys: Sequence[Key]) -> list[Result]:
        asked.extend(key.rate for key in keys)
        assert all(key.family == NONE for key in keys)
        return [result(99.5 if key.rate < 5.0 else 95.0 if key.rate < 8.0 else 80.0) for key in keys]

    found = subject._capacity("8b-h100", CONV, Size(), replayed)
    assert 5.0 / 1.08 <= found < 5.0
    assert len(asked) == len(set(asked))
    asked.clear()
    assert subject._capacity("8b-h100", CODE, Size(), replayed) > 8.0 / 1.08, "90 % are enough there"


def test_a_setting_is_the_best_over_the_loads() -> None:
    def replayed(keys: Sequence[Key]) -> list[Result]:
        assert {key.seed for key in keys} <= {200}, "not the seeds that count"
        return [result({16: 80.0, 32: 90.0 if key.rate < 20 else 10.0}.get(key.setting, 20.0)) for key in keys]

    tuned = subject._tuned("8b-h100", CONV, 10.0, Size(), replayed)
    assert set(tuned) == set(FAMILIES)
    assert tuned["queue-cap"] == 16, "80 twice is more than 90 and 10"
    assert tuned[NONE] == tuned[OURS] == 0


def made(*, conv_low: float = 90.0) -> Study:
    def cell(ours: float, peer: float) -> dict[str, list[Result]]:
        return {
            NONE: [result(5.0, recomputed=100)] * 2,
            "queue-cap": [result(peer - 1), result(peer + 1)],
            OURS: [result(ours - 2, recomputed=4), result(ours + 2)],
        }

    return Study(
        capacity={("8b-h100", CONV): 10.0, ("8b-h100", CODE): 3.0},
        tuned={("8b-h100", CONV): {"queue-cap": 64}, ("8b-h100", CODE): {"queue-cap": 16}},
        runs={
            Cell("8b-h100", CONV, 1.6): cell(conv_low, 80.0),
            Cell("8b-h100", CONV, 2.4): cell(75.0, 50.0),
            Cell("8b-h100", CODE, 1.6): cell(60.0, 40.0),
        },
    )


def test_a_gain_is_over_the_best_peer_and_paired_by_seed() -> None:
    done = made()
    cell = Cell("8b-h100", CONV, 1.6)
    assert done.best_peer(cell) == "queue-cap"
    gain = done.gain(cell)
    assert gain.mean == 10.0
    assert gain.high - gain.mean == pytest.approx(12.706 * 1.0)
    figures = done.figures()
    assert (figures.gain_1_6_points, figures.gain_2_4_points) == (10.0, 25.0)
    assert figures.recomputed_percent == pytest.approx(0.2), "of two runs"
    assert figures.code_goodput_percent == 60.0


def test_of_all_engines_the_worst_one_counts() -> None:
    done = made()
    low = done.runs[Cell("8b-h100", CONV, 1.6)]
    worse = {**low, OURS: [result(84.0, recomputed=80), result(86.0)]}
    both = replace(done, runs={**done.runs, Cell("32b-h100", CONV, 1.6): worse})
    assert both.figures().gain_1_6_points == 5.0
    assert both.figures().recomputed_percent == pytest.approx(4.0)
    assert (both.figures().gain_2_4_points, both.figures().code_goodput_percent) == (25.0, 60.0)


def test_what_was_not_replayed_has_no_figure() -> None:
    done = made()
    rest = replace(done, runs={cell: runs for cell, runs in done.runs.items() if cell.trace == CODE})
    assert math.isnan(rest.figures().gain_1_6_points)


def test_the_table_marks_the_best_peer() -> None:
    rows = made(conv_low=70.0).rows()
    assert [row[1] for row in rows[:3]] == ["queue-cap 64 *", "kvplane", "none"]
    assert rows[1][3].startswith("-10.0 [")
    assert all(len(row) == len(subject.HEADER) for row in rows)
