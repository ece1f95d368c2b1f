"""How faithful the simulated engine is: fitted on the real vLLM, then both under the same load; `make bench-engine`.

1. Clients in closed loops over a grid of lengths and counts keep the real engine busy while it records its schedule; the
   step times are fitted on every other step.
2. Poisson arrivals of mixed lengths, more than the KV cache holds, go to the real engine and through the simulated one.
3. Printed: errors of the fit, times to the first token and per token, preemptions and the usage of the KV cache.
"""

import argparse
import asyncio
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Final

from bench import report
from bench.engine import load
from bench.engine.fit import FITS, Fit, fit_step_time
from bench.engine.load import Job, Seen
from bench.engine.model import EngineConfig
from bench.engine.record import VLLM, recording_engine
from bench.engine.schedule import Recording, Step, differences, parse, renumbered
from bench.engine.simulate import Run, simulate, usage_rmse
from e2e.cluster.progress import Progress

CONFIG: Final = EngineConfig(
    num_gpu_blocks=97, block_size=32, max_num_seqs=64, max_num_batched_tokens=2048, max_model_len=2048
)
GRID: Final = tuple(
    (clients, prompt, output)
    for clients in (1, 2, 4, 8, 16, 24)
    for prompt, output in ((16, 64), (100, 32), (400, 16), (900, 8))
    if clients * (prompt + output) <= 3000
)
"""Clients, prompt and output tokens: what fits the KV cache."""
LONE_PROMPT: Final = 16


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    grid_seconds: float = 4.0
    rates: tuple[float, ...] = (3.0, 5.0, 8.0)
    load_seconds: float = 30.0


async def measure(size: Size, file: Path, progress: Progress) -> tuple[list[Seen], list[tuple[list[Job], list[Seen]]]]:
    """Drives the real engine; lone requests, and for each rate the jobs and what clients saw. The schedule is in ``file``."""
    engine = recording_engine(CONFIG, file, progress)
    async with engine:
        await load.keep_busy(
            engine.url, engine.model, clients=4, prompt_tokens=100, output_tokens=16, seconds=3.0, seed=0
        )
        lone: list[Seen] = []
        for number, (clients, prompt, output) in enumerate(GRID):
            with progress.step(f"{clients} clients, {prompt} + {output} tokens"):
                seen = await load.keep_busy(
                    engine.url, engine.model, clients=clients, prompt_tokens=prompt, output_tokens=output,
                    seconds=size.grid_seconds, seed=number,
                )  # fmt: skip
            if clients == 1 and prompt == LONE_PROMPT:
                lone = seen
        runs = []
        for number, rate in enumerate(size.rates):
            jobs = load.mixed(rate=rate, seconds=size.load_seconds, seed=number, sharing=0.3)
            with progress.step(f"{len(jobs)} requests, {rate:g} a second"):
                runs.append((jobs, await load.drive(engine.url, engine.model, jobs, seed=number)))
            await asyncio.sleep(0.5)  # the recorder's last lines
    return lone, runs


def real_run(jobs: Sequence[Job], seen: Sequence[Seen], steps: Sequence[Step]) -> Run:
    """What the real engine made of a load; ``steps`` are those of this load."""
    start = min(each.sent - each.job.at for each in seen)
    usable = CONFIG.num_gpu_blocks - 1
    return Run(
        ttft=tuple(each.first_token - (start + each.job.at) for each in seen),
        tpot=tuple(
            (each.last_token - each.first_token) / (job.output_tokens - 1)
            for each, job in zip(seen, jobs, strict=True)
            if job.output_tokens > 1
        ),
        preemptions=sum(len(step.preempted) for step in steps),
        usage=(
            *((step.at - start, 1 - step.free / usable) for step in steps),
            (max(each.last_token for each in seen) - start, 0.0),
        ),
        seconds=max(each.last_token for each in seen) - start,
    )


def during(steps: Sequence[Step], seen: Sequence[Seen]) -> list[Step]:
    """The steps between the first request and the last answer."""
    begin, end = min(each.sent for each in seen), max(each.last_token for each in seen)
    return [step for step in steps if begin <= step.at <= end]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.engine", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="short, to see that it works; its figures are none")
    parser.add_argument("--write-fit", metavar="NAME", help=f"keep the fit as {FITS.name}/NAME.json")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engine is ended
    size = Size(grid_seconds=1.0, rates=(8.0,), load_seconds=10.0) if arguments.quick else Size()
    started, machine, progress = report.now(), report.machine(), Progress()
    with tempfile.TemporaryDirectory(prefix="kvplane-bench-") as folder:
        file = Path(folder) / "schedule"
        lone, runs = asyncio.run(measure(size, file, progress))
        with file.open() as lines:
            steps = parse(lines)

    loaded = [during(steps, seen) for _, seen in runs]
    ahead = [step for step in steps if step.at < loaded[0][0].at]
    step_time, quality = fit_step_time(ahead)
    core = statistics.median(
        step.seconds for step in during(ahead, lone) if step.seconds and step.prefill_tokens == LONE_PROMPT
    )
    fit = Fit(
        vllm=VLLM,
        machine=str(machine),
        date=started.date().isoformat(),
        step_time=step_time,
        frontend_seconds=max(0.0, statistics.median(each.first_token - each.sent for each in lone) - core),
        mape_percent=quality.mape_percent,
        r_squared=quality.r_squared,
        steps=len(ahead),
    )
    pairs = [
        (
            real_run(jobs, seen, part),
            simulate(jobs, config=CONFIG, step_time=step_time, frontend_seconds=fit.frontend_seconds),
        )
        for (jobs, seen), part in zip(runs, loaded, strict=True)
    ]
    for part in loaded:
        decided = differences(Recording(VLLM, CONFIG, renumbered(part))) or ["every decision is the same"]
        progress.say(f"the schedule of {len(part)} steps, repeated: {decided[0]}")
    progress.say(
        f"{fit.steps} steps: {1e3 * step_time.base:.2f} ms + {1e6 * step_time.per_prefill_token:.1f} us a prefill token + "
        f"{1e6 * step_time.per_decode:.1f} us a decode + {1e6 * step_time.per_context_token:.3f} us a context token; "
        f"MAPE {fit.mape_percent:.1f} %, R^2 {fit.r_squared:.2f}"
    )
    if arguments.write_fit:
        progress.say(f"written: {fit.write(arguments.write_fit)}")
    written = report.Report(
        bench="engine",
        machine=machine,
        started=started,
        settings={key: str(value) for key, value in asdict(size).items()},
        header=("", *(f"{rate:g}/s {who}" for rate in size.rates for who in ("real", "simulated"))),
        rows=rows(pairs),
        last_line=summary(fit, pairs),
        samples={"fit": asdict(fit), "runs": [[asdict(run) for run in pair] for pair in pairs]},
    )
    progress.say(f"written: {written.write()}")
    print(f"{written.text()}", file=sys.stdout)


def rows(pairs: Sequence[tuple[Run, Run]]) -> list[tuple[str, ...]]:
    """The table; seconds as milliseconds."""

    def line(label: str, values: Sequence[float | int]) -> tuple[str, ...]:
        return (label, *(report.number(value) for value in values))

    each = [run for pair in pairs for run in pair]
    return [
        line("time to first token, median, ms", [1000 * statistics.median(run.ttft) for run in each]),
        line("… p99, ms", [1000 * report.percentile(run.ttft, 0.99) for run in each]),
        line("time per output token, median, ms", [1000 * statistics.median(run.tpot) for run in each]),
        line("… p99, ms", [1000 * report.percentile(run.tpot, 0.99) for run in each]),
        line("preemptions", [run.preemptions for run in each]),
        line("until the last token, s", [run.seconds for run in each]),
    ]


def summary(fit: Fit, pairs: Sequence[tuple[Run, Run]]) -> dict[str, report.Value]:
    """The last line. ``ttft_error``: of the median, in percent, mean of the loads; the usage's error is a share of 1."""
    return {
        "fit_mape": fit.mape_percent,
        "ttft_error": statistics.fmean(
            100 * abs(statistics.median(simulated.ttft) / statistics.median(real.ttft) - 1) for real, simulated in pairs
        ),
        "preemptions_real": sum(real.preemptions for real, _ in pairs),
        "preemptions_sim": sum(simulated.preemptions for _, simulated in pairs),
        "usage_rmse": statistics.fmean(usage_rmse(real, simulated) for real, simulated in pairs),
    }


if __name__ == "__main__":
    main()
