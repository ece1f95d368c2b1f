"""A real engine that writes its schedule down; `python -m bench.engine.record` renews those that the unit tests repeat.

Two engines, each with more load than its KV cache holds and with prefixes that requests share: one with the usual
arguments, one with a small budget, so that prompts come in many chunks, and with few places. A busy machine does no harm
here: decisions depend on what came before which step, not on how long a step took.
"""

import asyncio
import signal
import sys
import tempfile
from pathlib import Path
from typing import Final

from bench import report
from bench.engine import load
from bench.engine.model import EngineConfig
from bench.engine.real import RealEngine
from bench.engine.schedule import FILE_VARIABLE, Recording, differences, parse, renumbered
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


def recording_engine(config: EngineConfig, file: Path, progress: Progress) -> RealEngine:
    """The real engine with these arguments; its schedule goes to ``file``."""
    return RealEngine(
        blocks=config.num_gpu_blocks,
        block_size=config.block_size,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
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


def main() -> None:
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engine is ended
    progress = Progress()
    for name, config in CONFIGS.items():
        with tempfile.TemporaryDirectory(prefix="kvplane-bench-") as folder:
            recording = asyncio.run(record(config, Path(folder) / "schedule", progress))
        path = SCHEDULES / f"{name}.json"
        recording.write(path, note=f"vLLM {VLLM} CPU, {report.now().date()}, python -m bench.engine.record")
        preempted = sum(len(step.preempted) for step in recording.steps)
        decided = differences(recording) or ["every decision is the same"]
        progress.say(f"written: {path}: {len(recording.steps)} steps, {preempted} preemptions; simulated: {decided[0]}")


if __name__ == "__main__":
    main()
