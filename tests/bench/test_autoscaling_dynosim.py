"""What DynoSim is given, and what is read from it. That it runs is not tested: it is no dependency."""

import io
import json
import math
import struct
import zipfile
from pathlib import Path

import pytest

from bench.admission.workload import Arrival
from bench.autoscaling import dynosim
from bench.autoscaling.dynosim import DynoSim, Told
from bench.autoscaling.replica import Goals
from bench.engine.presets import PRESETS

PRESET = PRESETS["32b-h100"]


def test_no_two_prompts_share_a_block() -> None:
    rows = [
        json.loads(line) for line in dynosim.trace([Arrival(0.5, 513, 7, 256), Arrival(2.0, 100, 1, 256)]).splitlines()
    ]
    assert rows[0] == {"timestamp": 500.0, "input_length": 513, "output_length": 7, "hash_ids": [0, 1]}
    assert rows[1]["hash_ids"] == [2]


def test_the_profile_has_the_presets_step_times() -> None:
    with zipfile.ZipFile(io.BytesIO(dynosim.profile(PRESET))) as archive:
        arrays = {name.removesuffix(".npy"): archive.read(name) for name in archive.namelist()}
    assert sorted(arrays) == [
        "decode_active_kv_tokens", "decode_context_length", "decode_itl", "prefill_isl", "prefill_ttft_ms",
    ]  # fmt: skip
    for data in arrays.values():
        (length,) = struct.unpack("<H", data[8:10])
        assert (10 + length) % 64 == 0
    time = PRESET.step_time
    prefill = struct.unpack("<2d", arrays["prefill_ttft_ms"][-16:])
    assert prefill == pytest.approx((0.0, 1000 * time.per_prefill_token * PRESET.config.max_num_batched_tokens))
    decode = struct.unpack("<4d", arrays["decode_itl"][-32:])
    assert decode[0] == decode[1] == pytest.approx(1000 * time.base)
    assert decode[2] == decode[3] > decode[0]


def test_arguments_are_json() -> None:
    arguments = dynosim.engine_arguments(PRESET, startup_seconds=60.0, profile=Path("/x.npz"))
    assert json.loads(json.dumps(arguments))["startup_time"] == 60.0
    assert json.loads(json.dumps(dynosim.planner("latency", highest=10)))["optimization_target"] == "latency"


def test_its_python_may_be_named_from_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in another folder."""
    python = tmp_path / "venv" / "python"
    python.parent.mkdir()
    python.write_text("""#!/bin/sh\necho '{"goodput_completed_requests": 1, "gpu_hours": 0.5}' > report.json\n""")
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    simulator = DynoSim(Path("venv/python"), tmp_path / "files")
    found = simulator.run([Arrival(0.5, 513, 7, 256)], PRESET, goals=Goals(), startup_seconds=60.0, workers=1)
    assert found == Told(100.0, 0.5)


def test_a_report_is_counted_by_what_was_offered() -> None:
    report = {"num_requests": 190, "goodput_completed_requests": 150, "gpu_hours": 2.5}
    assert dynosim.told(report, offered=200) == Told(75.0, 2.5)


def test_a_report_of_another_kind_is_refused_with_a_sentence() -> None:
    with pytest.raises(RuntimeError, match=r"has no 'gpu_hours'; it has goodput_completed_requests\."):
        dynosim.told({"goodput_completed_requests": 150}, offered=200)


@pytest.mark.parametrize("written", ["", "[1]", '{"gpu_hours": '])
def test_what_is_no_report_is_refused_with_a_sentence(tmp_path: Path, written: str) -> None:
    """So that the run that asks goes on without it."""
    python, report = tmp_path / "python", tmp_path / "given.json"
    report.write_text(written)
    python.write_text(f"""#!/bin/sh\ncp {report} report.json\n""")
    python.chmod(0o755)
    with pytest.raises(RuntimeError, match=r"is no JSON object; it begins with"):
        DynoSim(python, tmp_path / "files").run(
            [Arrival(0.5, 513, 7, 256)], PRESET, goals=Goals(), startup_seconds=60.0, workers=1
        )


def test_the_report_of_the_run_before_is_not_read_again(tmp_path: Path) -> None:
    python, report = tmp_path / "python", tmp_path / "files" / "report.json"
    report.parent.mkdir()
    report.write_text('{"goodput_completed_requests": 1, "gpu_hours": 0.5}')
    python.write_text("""#!/bin/sh\n""")
    python.chmod(0o755)
    with pytest.raises(OSError, match=r"report\.json"):
        DynoSim(python, tmp_path / "files").run(
            [Arrival(0.5, 513, 7, 256)], PRESET, goals=Goals(), startup_seconds=60.0, workers=1
        )


def test_what_was_not_asked_has_no_error() -> None:
    assert math.isnan(dynosim.error_percent([], []))


def test_the_error_is_the_mean_distance() -> None:
    assert dynosim.error_percent([Told(90.0, 1.0), Told(80.0, 1.0)], [Told(88.0, 1.0), Told(84.0, 1.0)]) == 3.0
