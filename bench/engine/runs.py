"""What the real engine made of a load, with its times; written down, and made again by the simulated engine.

`python -m bench.engine.record` renews the runs in tests/bench/runs. The engine is paced there (bench/engine/plugin), since
a processor that others share computes at changing speed, and a queue multiplies that: scheduling, KV blocks, preemption,
batches, HTTP and their moments are vLLM's, and a step lasts what its pace says and vLLM's own work around it. Together they
are measured on the steps of the very run. How long steps last without a pace is the fit's matter (``fit``).
"""

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from bench.engine.load import Job, Seen
from bench.engine.model import EngineConfig, StepTime
from bench.engine.schedule import Step
from bench.engine.simulate import Run, simulate

EVERY_SECONDS: Final = 0.1
"""Between two points of a usage curve that is written down; ``usage_rmse`` compares as many."""


@dataclass(frozen=True)
class RecordedRun:
    """One load on one engine that was idle before, from the first request to the last token."""

    vllm: str
    config: EngineConfig
    step_time: StepTime
    """Of this run."""
    frontend_seconds: float
    """As in ``fit.Fit``."""
    jobs: tuple[Job, ...]
    run: Run

    def simulated(self) -> Run:
        """What the simulated engine makes of the same jobs."""
        return simulate(self.jobs, config=self.config, step_time=self.step_time, frontend_seconds=self.frontend_seconds)

    def write(self, path: Path, *, note: str) -> None:
        """As JSON, times to 0.1 ms, and of the usage its values EVERY_SECONDS."""
        run = self.run
        document = {
            "note": note,
            "vllm": self.vllm,
            "config": asdict(self.config),
            "step_time": asdict(self.step_time),
            "frontend_seconds": self.frontend_seconds,
            "jobs": [list(asdict(job).values()) for job in self.jobs],
            "ttft": [round(seconds, 4) for seconds in run.ttft],
            "tpot": [round(seconds, 5) for seconds in run.tpot],
            "preemptions": run.preemptions,
            "usage": [round(run.usage_at(i * EVERY_SECONDS), 4) for i in range(int(run.seconds / EVERY_SECONDS) + 1)],
            "seconds": round(run.seconds, 4),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(f'"{key}": {json.dumps(value)}' for key, value in document.items())
        path.write_text("{\n" + lines + "\n}\n")

    @classmethod
    def read(cls, path: Path) -> "RecordedRun":
        """What ``write`` wrote."""
        document = json.loads(path.read_text())
        return cls(
            vllm=document["vllm"],
            config=EngineConfig(**document["config"]),
            step_time=StepTime(**document["step_time"]),
            frontend_seconds=document["frontend_seconds"],
            jobs=tuple(Job(*fields) for fields in document["jobs"]),
            run=Run(
                ttft=tuple(document["ttft"]),
                tpot=tuple(document["tpot"]),
                preemptions=document["preemptions"],
                usage=(
                    *((i * EVERY_SECONDS, usage) for i, usage in enumerate(document["usage"])),
                    (document["seconds"], 0.0),
                ),
                seconds=document["seconds"],
            ),
        )


def real_run(jobs: Sequence[Job], seen: Sequence[Seen], steps: Sequence[Step], *, config: EngineConfig) -> Run:
    """What the real engine made of a load; ``steps`` are those of this load."""
    start = min(each.sent - each.job.at for each in seen)
    usable = config.num_gpu_blocks - 1
    seconds = max(each.last_token for each in seen) - start
    return Run(
        ttft=tuple(each.first_token - (start + each.job.at) for each in seen),
        tpot=tuple(
            (each.last_token - each.first_token) / (job.output_tokens - 1)
            for each, job in zip(seen, jobs, strict=True)
            if job.output_tokens > 1
        ),
        preemptions=sum(len(step.preempted) for step in steps),
        usage=(*((step.at - start, 1 - step.free / usable) for step in steps), (seconds, 0.0)),
        seconds=seconds,
    )


def during(steps: Sequence[Step], seen: Sequence[Seen]) -> list[Step]:
    """The steps between the first request and the last answer."""
    begin, end = min(each.sent for each in seen), max(each.last_token for each in seen)
    return [step for step in steps if begin <= step.at <= end]


def frontend_seconds(lone: Sequence[Seen], steps: Sequence[Step]) -> float:
    """What a request spends outside the engine core: the time to first token of lone requests less that of their step.

    ``lone``: one at a time, with prompts of one length that nothing shares; ``steps`` are theirs.
    """
    core = [step.seconds for step in steps if step.seconds and step.prefill_tokens == lone[0].job.prompt_tokens]
    return max(0.0, statistics.median(each.first_token - each.sent for each in lone) - statistics.median(core))
