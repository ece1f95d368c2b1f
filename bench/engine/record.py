"""A real engine that writes its schedule down; `python -m bench.engine.record` renews what the unit tests repeat.

*Schedules* of two engines, each with more load than its KV cache holds and with prefixes that requests share: one with the
usual arguments, one with a small budget, so that prompts come in many chunks, and with few places. A busy machine does no
harm here: decisions depend on what came before which step, not on how long a step took.

*Runs* of the usual engine, with the times that clients saw, under a load that it serves as it comes and under three times
what it can serve, for some seconds. The engine is paced (``runs``), and on a machine that cannot keep the pace nothing
is written.
"""

import argparse
import asyncio
import signal
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Final

from bench import report
from bench.engine import load
from bench.engine.fit import fit_step_time, with_interruptions
from bench.engine.load import Job, Seen
from bench.engine.model import EngineConfig, StepTime
from bench.engine.real import RealEngine
from bench.engine.runs import RecordedRun, during, frontend_seconds, real_run
from bench.engine.schedule import FILE_VARIABLE, Recording, differences, parse, renumbered
from bench.engine.simulate import usage_rmse
from e2e.cluster.progress import Progress

REPOSITORY: Final = Path(__file__).resolve().parents[2]
SCHEDULES: Final = REPOSITORY / "tests" / "bench" / "schedules"
VLLM: Final = "0.32.0"
STEPS: Final = 400
CONFIGS: Final = {
    "usual": EngineConfig(
        num_gpu_blocks=97, block_size=32, max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=2048
    ),
    "small-budget": EngineConfig(
        num_gpu_blocks=65, block_size=32, max_num_seqs=12, max_num_batched_tokens=128, max_model_len=1536
    ),
}
_RATE: Final = 12.0
_SECONDS: Final = 6.0

RUNS: Final = REPOSITORY / "tests" / "bench" / "runs"
LOADS: Final = {"light": (3.0, 20.0), "overload": (14.0, 6.0)}
"""Requests a second, and for how long; the engine serves between four and five a second."""
PACE: Final = StepTime(base=0.010, per_prefill_token=0.00012, per_decode=0.0001, per_context_token=0.0)
"""As in bench/admission: two layers are computed well within it."""
LAYERS: Final = 2
LONE_PROMPT: Final = 16
LONE_SECONDS: Final = 5.0
LEAST_BASE: Final = 0.9
MOST_BASE: Final = 1.3
"""Times the pace's, the engine's own work included."""
MOST_MAPE_PERCENT: Final = 10.0
_SEED: Final = 11


def recording_engine(
    config: EngineConfig, file: Path, progress: Progress, *, layers: int = 4, pace: StepTime | None = None
) -> RealEngine:
    """The real engine with these arguments; its schedule goes to ``file``."""
    return RealEngine(
        blocks=config.num_gpu_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        layers=layers,
        pace=pace,
        extra_args=(
            *("--max-num-batched-tokens", str(config.max_num_batched_tokens)),
            *("--scheduler-cls", "bench.engine.recorder.RecordingScheduler"),
        ),
        extra_environment={FILE_VARIABLE: str(file), "PYTHONPATH": str(REPOSITORY)},
        progress=progress,
    )


async def record(config: EngineConfig, file: Path, progress: Progress) -> Recording:
    """The first STEPS steps of an overloaded engine."""
    async with recording_engine(config, file, progress) as engine:
        jobs = load.mixed(rate=_RATE, seconds=_SECONDS, seed=7, sharing=0.4)
        with progress.step(f"{len(jobs)} requests"):
            await load.drive(engine.url, engine.model, jobs, seed=7)
        await asyncio.sleep(0.5)  # the recorder's last lines
    with file.open() as lines:
        steps = [step for step in parse(lines) if step.scheduled]
    return Recording(vllm=VLLM, config=config, steps=renumbered(steps[:STEPS]))


async def record_run(rate: float, seconds: float, file: Path, progress: Progress) -> RecordedRun:
    """One load on the paced engine.

    Raises:
        RuntimeError: this machine, or vLLM, did not keep the pace.
    """
    config = CONFIGS["usual"]
    jobs = load.mixed(rate=rate, seconds=seconds, seed=_SEED, sharing=0.3)
    async with recording_engine(config, file, progress, layers=LAYERS, pace=PACE) as engine:
        with progress.step("lone requests"):
            lone = await load.keep_busy(
                engine.url, engine.model, clients=1, prompt_tokens=LONE_PROMPT, output_tokens=8,
                seconds=LONE_SECONDS, seed=0,
            )  # fmt: skip
        with progress.step(f"{len(jobs)} requests, {rate:g} a second"):
            seen = await load.drive(engine.url, engine.model, jobs, seed=_SEED)
        await asyncio.sleep(0.5)  # the recorder's last lines
    return _run(jobs, seen, lone, file, config)


def _run(jobs: list[Job], seen: list[Seen], lone: list[Seen], file: Path, config: EngineConfig) -> RecordedRun:
    with file.open() as lines:
        steps = parse(lines)
    own = during(steps, seen)
    step_time, quality = fit_step_time(own)
    step_time = with_interruptions(step_time, own)
    took = f"Steps took {1000 * step_time.base:.1f} ms and more, give or take {quality.mape_percent:.1f} %"
    if step_time.base < LEAST_BASE * PACE.base:
        raise RuntimeError(f"{took}, where the pace is {1000 * PACE.base:.0f} ms: vLLM has not loaded kvplane_pace.")
    if quality.mape_percent > MOST_MAPE_PERCENT or step_time.base > MOST_BASE * PACE.base:
        raise RuntimeError(
            f"{took}, where the pace is {1000 * PACE.base:.0f} ms: other processes had the processors. Record when this "
            "machine is free."
        )
    return RecordedRun(
        vllm=VLLM,
        config=config,
        step_time=step_time,
        frontend_seconds=frontend_seconds(lone, during(steps, lone)),
        jobs=tuple(jobs),
        run=real_run(jobs, seen, own, config=config),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.engine.record", description=__doc__)
    parser.add_argument("--only", choices=("schedules", "runs"), help="of these two; both unless said")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engine is ended
    progress = Progress()
    if arguments.only != "runs":
        _write_schedules(progress)
    if arguments.only != "schedules":
        _write_runs(progress)


def _write_schedules(progress: Progress) -> None:
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory(prefix="kvplane-bench-") as folder:
            recording = asyncio.run(record(config, Path(folder) / "schedule", progress))
        path = SCHEDULES / f"{name}.json"
        recording.write(path, note=_note())
        preempted = sum(len(step.preempted) for step in recording.steps)
        decided = differences(recording) or ["every decision is the same"]
        progress.say(f"written: {path}: {len(recording.steps)} steps, {preempted} preemptions; simulated: {decided[0]}")


def _write_runs(progress: Progress) -> None:
    for name, (rate, seconds) in LOADS.items():
        with tempfile.TemporaryDirectory(prefix="kvplane-bench-") as folder:
            recorded = asyncio.run(record_run(rate, seconds, Path(folder) / "schedule", progress))
        path = RUNS / f"{name}.json"
        recorded.write(path, note=_note())
        real, simulated = recorded.run, recorded.simulated()
        progress.say(
            f"written: {path}: {len(recorded.jobs)} requests; real / simulated: first token, median "
            f"{1000 * statistics.median(real.ttft):.0f} / {1000 * statistics.median(simulated.ttft):.0f} ms, p90 "
            f"{1000 * report.percentile(real.ttft, 0.9):.0f} / {1000 * report.percentile(simulated.ttft, 0.9):.0f} ms, "
            f"{real.preemptions} / {simulated.preemptions} preemptions, usage apart by {usage_rmse(real, simulated):.3f}"
        )


def _note() -> str:
    return f"vLLM {VLLM} CPU, {report.now().date()}, python -m bench.engine.record"


if __name__ == "__main__":
    main()
