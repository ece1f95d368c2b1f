"""How faithful the simulated engine is: fitted on the real vLLM, then both under the same load; `make bench-engine`.

1. Clients in closed loops over a grid of lengths and counts keep the real engine busy while it records its schedule; the
   step times are fitted on every other step. What was computed to warm the engine up is not among them.
2. Poisson arrivals of mixed lengths, more than the KV cache holds, go to the real engine and through the simulated one.
   A part of the grid is measured before each of these loads: the speed of a shared processor changes within minutes.
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
from bench.engine.fit import FITS, Fit, fit_step_time, ratios
from bench.engine.load import Job, Seen
from bench.engine.model import EngineConfig
from bench.engine.record import VLLM, recording_engine
from bench.engine.runs import during, frontend_seconds, real_run
from bench.engine.schedule import Recording, differences, parse, renumbered
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
WARM_UP_SECONDS: Final = 1.5
"""For each length of prompts: what is compiled, allocated and read for the first time, is."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    grid_seconds: float = 4.0
    """Of each of its points, over all parts."""
    rates: tuple[float, ...] = (3.0, 5.0, 8.0)
    load_seconds: float = 30.0


@dataclass(frozen=True)
class Measured:
    """What clients saw; times on the monotonic clock."""

    grid: list[list[Seen]]
    """Of each point in each part, in the order in which they were measured."""
    lone: list[list[Seen]]
    """Those of them that are of lone requests with a prompt of LONE_PROMPT tokens."""
    runs: list[tuple[list[Job], list[Seen]]]
    """For each rate."""


async def measure(size: Size, file: Path, progress: Progress) -> Measured:
    """Drives the real engine; its schedule is in ``file``. No two points have a seed in common, so none finds another's prompts."""
    measured = Measured([], [], [])
    async with recording_engine(CONFIG, file, progress) as engine:
        with progress.step("warm-up"):
            for prompt in sorted({prompt for _, prompt, _ in GRID}):
                await load.keep_busy(
                    engine.url, engine.model, clients=2, prompt_tokens=prompt, output_tokens=8,
                    seconds=WARM_UP_SECONDS, seed=10_000 + prompt,
                )  # fmt: skip
        for part, rate in enumerate(size.rates):
            for number, (clients, prompt, output) in enumerate(GRID):
                with progress.step(f"{clients} clients, {prompt} + {output} tokens"):
                    seen = await load.keep_busy(
                        engine.url, engine.model, clients=clients, prompt_tokens=prompt, output_tokens=output,
                        seconds=size.grid_seconds / len(size.rates), seed=100 * part + number,
                    )  # fmt: skip
                measured.grid.append(seen)
                if clients == 1 and prompt == LONE_PROMPT:
                    measured.lone.append(seen)
            jobs = load.mixed(rate=rate, seconds=size.load_seconds, seed=part, sharing=0.3)
            with progress.step(f"{len(jobs)} requests, {rate:g} a second"):
                measured.runs.append((jobs, await load.drive(engine.url, engine.model, jobs, seed=1000 + part)))
        await asyncio.sleep(0.5)  # the recorder's last lines
    return measured


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
        measured = asyncio.run(measure(size, file, progress))
        with file.open() as lines:
            steps = parse(lines)

    loaded = [during(steps, seen) for _, seen in measured.runs]
    gridded = [step for seen in measured.grid for step in during(steps, seen)]
    step_time, quality = fit_step_time(gridded)
    lone = [each for seen in measured.lone for each in seen]
    fit = Fit(
        vllm=VLLM,
        machine=str(machine),
        date=started.date().isoformat(),
        step_time=step_time,
        frontend_seconds=frontend_seconds(lone, [step for seen in measured.lone for step in during(steps, seen)]),
        mape_percent=quality.mape_percent,
        r_squared=quality.r_squared,
        bias_percent=quality.bias_percent,
        interrupted_percent=quality.interrupted_percent,
        steps=len(gridded),
    )
    pairs = [
        (
            real_run(jobs, seen, part, config=CONFIG),
            simulate(jobs, config=CONFIG, step_time=step_time, frontend_seconds=fit.frontend_seconds),
        )
        for (jobs, seen), part in zip(measured.runs, loaded, strict=True)
    ]
    for part in loaded:
        decided = differences(Recording(VLLM, CONFIG, renumbered(part))) or ["every decision is the same"]
        progress.say(f"the schedule of {len(part)} steps, repeated: {decided[0]}")
    progress.say(
        f"{fit.steps} steps: {1e3 * step_time.base:.2f} ms + {1e6 * step_time.per_prefill_token:.1f} us a prefill token + "
        f"{1e6 * step_time.per_decode:.1f} us a decode + {1e6 * step_time.per_context_token:.3f} us a context token; "
        f"MAPE {fit.mape_percent:.1f} %, R^2 {fit.r_squared:.2f}, bias {fit.bias_percent:+.1f} %, "
        f"{fit.interrupted_percent:.1f} % interrupted"
    )
    for name, found in (("the grid", gridded), *zip((f"{rate:g}/s" for rate in size.rates), loaded, strict=True)):
        told = "; ".join(f"{kind} {ratio:.2f} ({count})" for kind, (count, ratio) in ratios(found, step_time).items())
        progress.say(f"predicted / measured time of a step, median, {name}: {told}")
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
        "fit_r2": fit.r_squared,
        "ttft_error": statistics.fmean(
            100 * abs(statistics.median(simulated.ttft) / statistics.median(real.ttft) - 1) for real, simulated in pairs
        ),
        "preemptions_real": sum(real.preemptions for real, _ in pairs),
        "preemptions_sim": sum(simulated.preemptions for _, simulated in pairs),
        "usage_rmse": statistics.fmean(usage_rmse(real, simulated) for real, simulated in pairs),
    }


if __name__ == "__main__":
    main()
