"""What a benchmark that was ended finds of its runs, and when it finds none."""

from dataclasses import replace
from pathlib import Path

import pytest

from bench.autoscaling.records import Records, digest
from bench.autoscaling.study import OURS, Cell, Result, Run, Size, Step

STEPPED = Result(
    Run(Cell("conv", "steps", 60.0), 1, OURS, gated=False), 95.5, 6.25, 0.5, 1.0, Step(97.0, ((0.0, 1), (68.5, 2)))
)
OTHER = Result(Run(Cell("code", "raw", 180.0, "scraped every 15 s"), 3, "static", 7), 90.0, 4.0, 0.0, 0.0, None)


def test_results_are_found_as_they_were(tmp_path: Path) -> None:
    path = tmp_path / "autoscaling" / "a.jsonl"
    records = Records(path)
    assert records.results == {}
    for result in (STEPPED, OTHER):
        records.add(result)
    assert Records(path).results == {STEPPED.run: STEPPED, OTHER.run: OTHER}


def test_half_a_line_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    Records(path).add(STEPPED)
    whole = path.read_text()
    path.write_text(whole + whole[:40])
    records = Records(path)
    assert list(records.results) == [STEPPED.run]
    records.add(OTHER)
    assert list(Records(path).results) == [STEPPED.run, OTHER.run]


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in (
        "bench/autoscaling/policies/hpa.py",
        "operator/kvplane_operator/autoscaler/law.py",
        "bench/traces/a.csv",
    ):
        path = tmp_path / name
        path.parent.mkdir(parents=True)
        path.write_text("1")
    return tmp_path


@pytest.mark.parametrize("name", ["bench/autoscaling/policies/hpa.py", "bench/traces/a.csv", "bench/engine/model.py"])
def test_other_code_has_other_results(repository: Path, name: str) -> None:
    before = digest(Size(), repository)
    path = repository / name
    path.parent.mkdir(exist_ok=True)
    path.write_text("2")
    assert digest(Size(), repository) != before


def test_another_size_too_but_not_other_processes(repository: Path) -> None:
    before = digest(Size(processes=2), repository)
    assert digest(Size(processes=8), repository) == before
    assert digest(replace(Size(), highest=6), repository) != before


def test_the_code_is_found() -> None:
    assert digest(Size()) != digest(Size(), Path("/nowhere"))
