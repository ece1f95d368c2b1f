"""NVIDIA's simulator of inference fleets, DynoSim, as a referee of ours: the same requests through the same engine in both.

It runs in an environment of its own, whose Python the caller names: ``pip install --no-deps ai-dynamo==1.4.2
ai-dynamo-runtime==1.4.2``, and what ``python -m dynamo.replay`` imports: ``pip install msgspec transformers kubernetes
scikit-learn plotly prometheus-api-client prometheus-client pandas pmdarima filterpy prophet``. Flags, fields of the engine's
arguments and of the report are those of docs.nvidia.com/dynamo/v1.4.0, "DynoSim Replay CLI Reference"; rows of the trace are
Mooncake's.

The engine is ours: DynoSim reads step times from a profile, which is written from the preset. No block of a prompt comes twice, so
that no prompt is found in a cache.
"""

import io
import json
import math
import shutil
import statistics
import struct
import subprocess
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, Final

from bench.admission.workload import Arrival
from bench.autoscaling.replica import Goals
from bench.engine.presets import Preset

TRACE_BLOCK: Final = 512
"""Tokens that one hash of a trace stands for."""
_LONGEST_SECONDS: Final = 1800.0
"""Of one run, which takes minutes; then it hangs."""
_CONTEXTS: Final = (1.0, 16_384.0)
"""Step times do not depend on the mean context; the profile needs two of them to have a plane."""


@dataclass(frozen=True)
class Told:
    """One run."""

    goodput_percent: float
    hours: float


def trace(arrivals: Sequence[Arrival]) -> str:
    """The requests as Mooncake rows."""
    numbers = count()
    return "".join(f"{json.dumps(row)}\n" for row in _rows(arrivals, numbers))


def _rows(arrivals: Sequence[Arrival], numbers: "count[int]") -> Iterator[dict[str, Any]]:
    for each in arrivals:
        blocks = math.ceil(each.prompt_tokens / TRACE_BLOCK)
        yield {
            "timestamp": round(1000 * each.at, 3),
            "input_length": each.prompt_tokens,
            "output_length": each.output_tokens,
            "hash_ids": [next(numbers) for _ in range(blocks)],
        }


def profile(preset: Preset) -> bytes:
    """Step times in milliseconds as an npz file: prompts by their tokens, decodes by the tokens of their context."""
    time, config = preset.step_time, preset.config
    tokens = (0.0, float(config.max_num_batched_tokens))
    kv_tokens = (0.0, float(config.num_gpu_blocks * config.block_size))
    decode = [[1000 * (time.base + time.per_context_token * kv) for _ in _CONTEXTS] for kv in kv_tokens]
    arrays: dict[str, tuple[tuple[int, ...], list[float]]] = {
        "prefill_isl": ((2,), list(tokens)),
        "prefill_ttft_ms": ((2,), [1000 * time.per_prefill_token * each for each in tokens]),
        "decode_active_kv_tokens": ((2,), list(kv_tokens)),
        "decode_context_length": ((2,), list(_CONTEXTS)),
        "decode_itl": ((2, 2), [value for row in decode for value in row]),
    }
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, (shape, values) in arrays.items():
            archive.writestr(f"{name}.npy", _npy(shape, values))
    return file.getvalue()


def _npy(shape: tuple[int, ...], values: Sequence[float]) -> bytes:
    """NumPy's format 1.0, of 64-bit floats."""
    header = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".encode()
    header += b" " * (-(10 + len(header) + 1) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + struct.pack(f"<{len(values)}d", *values)


def engine_arguments(preset: Preset, *, startup_seconds: float, profile: Path) -> dict[str, Any]:
    """Of one worker."""
    config = preset.config
    return {
        "num_gpu_blocks": config.num_gpu_blocks - 1,  # vLLM counts its null block
        "block_size": config.block_size,
        "max_num_seqs": config.max_num_seqs,
        "max_num_batched_tokens": config.max_num_batched_tokens,
        "enable_prefix_caching": False,
        "startup_time": startup_seconds,
        "planner_profile_data": str(profile),
    }


def planner(target: str, *, highest: int) -> dict[str, Any]:
    """The planner's configuration; ``target``: throughput or latency."""
    return {
        "mode": "agg",
        "optimization_target": target,
        "min_endpoint": 1,
        "max_gpu_budget": highest,
        "decode_engine_num_gpu": 1,
        "prefill_engine_num_gpu": 1,
        "report_interval_hours": None,
        "live_dashboard_port": 0,
    }


def told(report: Mapping[str, Any], *, offered: int) -> Told:
    """What a report says of ``offered`` requests. Raises RuntimeError, with a sentence, where it lacks a field."""
    try:
        return Told(100.0 * report["goodput_completed_requests"] / offered, float(report["gpu_hours"]))
    except KeyError as error:
        raise RuntimeError(f"The report of dynamo.replay has no {error}; it has {', '.join(sorted(report))}.") from None


def _read(path: Path) -> dict[str, Any]:
    """Raises RuntimeError, with a sentence, where it is no report."""
    text = path.read_text()
    try:
        return dict(json.loads(text))
    except (TypeError, ValueError):
        raise RuntimeError(f"The report of dynamo.replay is no JSON object; it begins with {text[:200]!r}.") from None


class DynoSim:
    """DynoSim, by the Python that has it."""

    def __init__(self, python: Path, folder: Path) -> None:
        """``folder``: where its files go."""
        # Absolute, as it runs in another folder; not resolved, as a virtual environment is known by its link.
        self._python = Path(shutil.which(python) or python).absolute()
        self._folder = folder

    def run(
        self,
        arrivals: Sequence[Arrival],
        preset: Preset,
        *,
        goals: Goals,
        startup_seconds: float,
        workers: int,
        scaled_by: Mapping[str, Any] | None = None,
    ) -> Told:
        """One run with ``workers`` at first; ``scaled_by``: a planner's configuration, None: they stay.

        Raises:
            RuntimeError: it failed, or took too long; the message ends with what it said.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        requests, steps, report = (self._folder / name for name in ("trace.jsonl", "steps.npz", "report.json"))
        report.unlink(missing_ok=True)  # that of the run before is not read for this one's
        requests.write_text(trace(arrivals))
        steps.write_bytes(profile(preset))
        arguments = engine_arguments(preset, startup_seconds=startup_seconds, profile=steps)
        command = [
            str(self._python), "-m", "dynamo.replay", str(requests),
            "--trace-format", "mooncake",
            "--trace-block-size", str(TRACE_BLOCK),
            "--num-workers", str(workers),
            "--extra-engine-args", json.dumps(arguments),
            "--sla-ttft-ms", str(1000 * goals.ttft_seconds),
            "--sla-itl-ms", str(1000 * goals.tpot_seconds),
            "--report-json", str(report),
        ]  # fmt: skip
        if scaled_by is not None:
            command += ["--planner-config", json.dumps(scaled_by)]
        try:
            done = subprocess.run(
                command, cwd=self._folder, capture_output=True, text=True, check=False, timeout=_LONGEST_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise RuntimeError(f"dynamo.replay did not end within {_LONGEST_SECONDS:.0f} s.") from None
        if done.returncode:
            raise RuntimeError(f"dynamo.replay failed with status {done.returncode}: {done.stderr[-2000:]}")
        return told(_read(report), offered=len(arrivals))


def error_percent(ours: Sequence[Told], theirs: Sequence[Told]) -> float:
    """Mean distance of both simulators' goodput, in points; nan where nothing was asked."""
    if not ours:
        return math.nan
    return statistics.fmean(abs(a.goodput_percent - b.goodput_percent) for a, b in zip(ours, theirs, strict=True))
