"""From measurements to the ring benchmark's table and last line, and the file that keeps them."""

import json
from dataclasses import asdict, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from bench import report
from bench.ring import figures
from bench.ring.figures import (
    Beside,
    Decode,
    Exactness,
    Exposed,
    Fault,
    Faults,
    FirstToken,
    Long,
    Prefill,
    Results,
    paired,
)
from bench.ring.records import Records, code
from bench.ring.sizes import QUICK, Size

MACHINE = report.Machine(cpus=2, cpu_model="EPYC", memory_gib=24.0, kernel="6.18", python="3.11.7", load_average=0.25)
NOW = datetime(2026, 11, 21, 3, 4, 5, tzinfo=UTC)

EXACTNESS = Exactness(
    {f"a{number}": {"2": 1e-6, "4": 2e-6 if number else 4e-5} for number in range(21)},
    {f"a{number}": f"type{max(number, 1)}" for number in range(21)},
)
PREFILL = Prefill(4, 8192, whole=[10.0, 20.0, 11.0], ring=[2.5, 5.2, 2.8], waited=[0.1, 0.1, 0.1])
EXPOSED = Exposed(0.8, free=[1.0, 2.0, 1.0], overlapped=[1.01, 2.02, 0.99], waiting=[1.2, 2.4, 1.2])
LONG = Long(
    4,
    1000,
    ring=[10.0],
    whole=[10.0],
    held=[250, 252, 249, 249],
    resident_bytes=[2**30, 2**30, 2**30, 3 * 2**29],
    equal=True,
)
DECODE = Decode(
    one={"1024": [0.010], "65536": [0.2, 0.2], "262144": [0.5, 0.6]},
    two={"1024": [0.015], "65536": [0.1, 0.1], "262144": [0.25, 0.3]},
    apart={"1024": [0.010], "65536": [0.1, 0.1], "262144": [0.20, 0.24]},
    judged="262144",
)
FIRST = FirstToken(
    8000, ring=[1.3, 1.4], unsharded=[1.3, 1.3], vllm=[2.2, 2.0], products={"torch": 185.0, "oneDNN": 433.0}
)
FAULTS = Faults(
    4,
    [
        Fault("kill", 0.05, 0.2, refilled=260, placed=1000, equal=True),
        Fault("hang", 1.1, 1.3, refilled=250, placed=1000, equal=True),
    ],
)
BESIDE = Beside(100_000, 1.0, idle=[0.1] * 100, beside=[0.3] * 98 + [0.9, 1.0])
RESULTS = Results(EXACTNESS, PREFILL, EXPOSED, LONG, DECODE, FIRST, FAULTS, BESIDE)


def met(results: Results) -> dict[str, bool]:
    return {row[0]: row[3] == "yes" for row in results.rows()}


def test_the_last_line_is_that_of_the_issue() -> None:
    assert report.last_line("ring", RESULTS.last_line()) == (
        "bench ring: architectures=20 max_diff=4.0e-05 kv_scaling=0.99 prefill_efficiency_n4=0.98 exposed_percent=1.00 "
        "long100k_ratio=1.00 decode_gain_256k=2.00 ttft8k_vs_vllm=0.65 ttft8k_vs_hf=1.04 detect_s=1.10 reform_s=1.30 "
        "refill_share_times_n=1.04 tokens_equal=yes short_ttft_p99_over_slice=0.80"
    )


def test_every_target_is_met_by_these() -> None:
    assert all(met(RESULTS).values())
    assert len(RESULTS.rows()) == 14
    assert all(len(row) == len(figures.HEADER) for row in RESULTS.rows())


@pytest.mark.parametrize(
    "missed",
    [
        {"exactness": replace(EXACTNESS, errors={**EXACTNESS.errors, "a3": {"2": 6e-5, "4": 0.0}})},
        {"exactness": Exactness({"a": {"2": 0.0}}, {"a": "llama"})},
        {"prefill": replace(PREFILL, ring=[3.0, 6.0, 3.0])},
        {"exposed": replace(EXPOSED, overlapped=[1.05, 2.1, 1.05])},
        {"long": replace(LONG, held=[400, 200, 200, 200])},
        {"long": replace(LONG, ring=[11.0])},
        {"decode": replace(DECODE, two={**DECODE.two, "262144": [0.4, 0.5]})},
        {"decode": replace(DECODE, two={**DECODE.two, "65536": [0.22, 0.22]})},
        {"first_token": replace(FIRST, vllm=[1.5, 1.5])},
        {"first_token": replace(FIRST, unsharded=[1.0, 1.0])},
        {"faults": replace(FAULTS, drills=[replace(FAULTS.drills[0], detect_seconds=1.6)])},
        {"faults": replace(FAULTS, drills=[replace(FAULTS.drills[0], reform_seconds=2.1)])},
        {"faults": replace(FAULTS, drills=[replace(FAULTS.drills[0], refilled=400)])},
        {"faults": replace(FAULTS, drills=[*FAULTS.drills, replace(FAULTS.drills[0], equal=False)])},
        {"beside": replace(BESIDE, beside=[1.2] * 10)},
    ],
)
def test_one_missed_target_is_one_line_of_the_table(missed: dict[str, figures.Measured]) -> None:
    assert list(met(replace(RESULTS, **missed)).values()).count(False) == 1  # type: ignore[arg-type]


def test_a_wrong_token_anywhere_is_said_in_the_last_line() -> None:
    wrong = replace(FAULTS, drills=[replace(FAULTS.drills[0], equal=False)])
    assert replace(RESULTS, faults=wrong).last_line()["tokens_equal"] == "no"
    assert replace(RESULTS, long=replace(LONG, equal=False)).last_line()["tokens_equal"] == "no"


def test_ratios_are_of_pairs() -> None:
    assert paired([1.0, 10.0, 3.0], [1.0, 5.0, 3.0]) == 1.0
    with pytest.raises(ValueError, match="zip"):
        paired([1.0], [1.0, 2.0])


def test_every_architecture_is_listed() -> None:
    assert EXACTNESS.listing().count("| a") == 1 + 21


def kept(folder: Path, **changed: Any) -> Records:
    given: dict[str, Any] = {"size": QUICK, "code": "c", "machine": MACHINE, "now": NOW, **changed}
    return Records(folder, **given)


def test_rows_are_found_again(tmp_path: Path) -> None:
    records = kept(tmp_path)
    for name, measured in zip(
        figures.KINDS, (EXACTNESS, PREFILL, EXPOSED, LONG, DECODE, FIRST, FAULTS, BESIDE), strict=True
    ):
        records.add(name, measured)
    assert figures.results(kept(tmp_path).rows) == RESULTS


def test_rows_that_are_found_again_have_the_date_and_the_load_of_the_first(tmp_path: Path) -> None:
    kept(tmp_path)
    busier = replace(MACHINE, load_average=2.0)
    records = kept(tmp_path, machine=busier, now=NOW + timedelta(days=3))
    assert (records.started, records.machine) == (NOW, MACHINE)


def test_a_line_that_was_cut_off_is_measured_again(tmp_path: Path) -> None:
    kept(tmp_path).add("prefill", PREFILL)
    with (tmp_path / "rows.jsonl").open("a") as file:
        file.write('{"row": "long", "measu')
    records = kept(tmp_path)
    assert list(records.rows) == ["prefill"]
    records.add("beside", BESIDE)
    assert list(kept(tmp_path).rows) == ["prefill", "beside"]


@pytest.mark.parametrize(
    ("what", "changed"),
    [
        ("size", {"size": Size()}),
        ("engine", {"code": "d"}),
        ("machine", {"machine": replace(MACHINE, cpus=4)}),
    ],
)
def test_rows_of_another_size_engine_or_machine_are_not_mixed_in(
    tmp_path: Path, what: str, changed: dict[str, Any]
) -> None:
    kept(tmp_path)
    with pytest.raises(ValueError, match=f"rows of another {what}; give another --folder, or --fresh"):
        kept(tmp_path, **changed)


def test_rows_without_a_date_are_of_another_engine(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"size": asdict(QUICK)}) + "\n")
    with pytest.raises(ValueError, match="rows of another engine"):
        kept(tmp_path)


def test_another_engine_has_another_digest(tmp_path: Path) -> None:
    engine = tmp_path / "runtime" / "kvplane_runtime" / "ring" / "windows.py"
    engine.parent.mkdir(parents=True)
    found = {code(tmp_path)}
    for text in ("1", "2"):
        engine.write_text(text)
        found.add(code(tmp_path))
    (tmp_path / "bench" / "ring").mkdir(parents=True)
    (tmp_path / "bench" / "ring" / "drawing.py").write_text("how it looks")
    assert code(tmp_path) in found
    assert len(found) == 3
    assert code() not in found


def test_what_is_not_measured_yet_is_named() -> None:
    documents = {"prefill": json.loads(json.dumps(asdict(PREFILL)))}
    with pytest.raises(ValueError, match="Not measured yet: exactness, exposed, long"):
        figures.results(documents)
