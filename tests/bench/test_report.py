"""What every benchmark writes: percentiles that were really measured, a line that scripts can read, a whole JSON file."""

import json
import math
from datetime import UTC, datetime
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench import report

MACHINE = report.Machine(cpus=2, cpu_model="EPYC", memory_gib=24.0, kernel="6.18", python="3.11.7", load_average=0.25)


def _report(**changes: object) -> report.Report:
    values: dict[str, object] = {
        "bench": "operator",
        "machine": MACHINE,
        "started": datetime(2026, 11, 21, 3, 4, 5, tzinfo=UTC),
        "settings": {"small": 200},
        "header": ("", "kvplane"),
        "rows": [("create, ms", "7.50")],
        "last_line": {"create_median_ms": 7.5},
        **changes,
    }
    return report.Report(**values)  # type: ignore[arg-type]


@given(st.lists(st.floats(0, 1e6), min_size=1), st.floats(0, 1))
def test_a_percentile_is_a_sample_that_the_fraction_does_not_exceed(samples: list[float], fraction: float) -> None:
    value = report.percentile(samples, fraction)
    assert value in samples
    assert sum(sample <= value for sample in samples) >= math.floor(fraction * len(samples))


def test_the_p99_of_a_hundred_samples_is_the_second_largest() -> None:
    assert report.percentile([float(n) for n in range(1, 101)], 0.99) == 99.0


def test_a_distribution_needs_samples() -> None:
    with pytest.raises(ValueError, match="nothing was measured"):
        report.distribution([])


def test_a_distribution_keeps_its_extremes() -> None:
    found = report.distribution([3.0, 1.0, 2.0])
    assert found == report.Distribution(count=3, median=2.0, p99=3.0, smallest=1.0, largest=3.0)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (7.456, "7.46"),
        (23.44, "23.4"),
        (234.4, "234"),
        (0.0, "0"),
        (-0.001, "0"),
        (-0.25, "-0.25"),
        (3, "3"),
        (math.nan, "none"),
        ("LeaderWorkerSet v1", "LeaderWorkerSet-v1"),
    ],
)
def test_numbers_are_short_and_have_no_spaces(value: report.Value, text: str) -> None:
    assert report.number(value) == text


def test_the_last_line_keeps_the_order_and_splits_at_spaces() -> None:
    line = report.last_line("operator", {"b_ms": 1.0, "a_s": 20.0, "peer": "KubeAI 0.22"})
    assert line == "bench operator: b_ms=1.00 a_s=20.0 peer=KubeAI-0.22"


def test_the_text_ends_with_the_last_line() -> None:
    lines = _report().text().splitlines()
    assert lines[0].startswith("2026-11-21 03:04 UTC; 2 CPUs (EPYC), 24 GiB")
    assert "load average 0.25" in lines[0]
    assert lines[-1] == "bench operator: create_median_ms=7.50"


def test_the_table_is_markdown_with_aligned_columns() -> None:
    assert report.table(("", "a"), [("name", "1"), ("x", "200")]).splitlines() == [
        "|      |   a |",
        "|------|----:|",
        "| name |   1 |",
        "| x    | 200 |",
    ]


def test_the_file_has_everything(tmp_path: Path) -> None:
    path = _report(samples={"kvplane": {"idle": [1, 2]}}).write(tmp_path / "results")
    assert path.name == "operator-20261121T030405Z.json"
    document = json.loads(path.read_text())
    assert document["machine"]["cpus"] == 2
    assert document["started"] == "2026-11-21T03:04:05+00:00"
    assert document["last_line"] == {"create_median_ms": 7.5}
    assert document["samples"] == {"kvplane": {"idle": [1, 2]}}


def test_the_file_is_json_also_where_a_figure_is_not_known(tmp_path: Path) -> None:
    unknown = {"seconds": math.nan, "runs": [(1.5, math.inf)]}
    text = _report(last_line={"error_percent": math.nan}, samples=unknown).write(tmp_path).read_text()

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is no JSON")

    document = json.loads(text, parse_constant=refuse)
    assert document["last_line"] == {"error_percent": None}
    assert document["samples"] == {"seconds": None, "runs": [[1.5, None]]}


def test_the_machine_is_read_from_proc(tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text("processor\t: 0\nmodel name\t: AMD EPYC 9B14\n")
    (tmp_path / "meminfo").write_text("MemTotal:       25165824 kB\nMemFree: 1 kB\n")
    (tmp_path / "loadavg").write_text("4.91 3.0 2.0 1/300 4242\n")
    found = report.machine(tmp_path)
    assert (found.cpu_model, found.memory_gib, found.load_average) == ("AMD EPYC 9B14", 24.0, 4.91)
    assert found.cpus >= 1
