"""``python -m bench.admission``: our admission beside the peers', on the real vLLM and on recorded traffic.

Prints its plan, then measures; what is measured already (``--folder``) is not measured again.
"""

import argparse
import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

import aiohttp

from bench import report
from bench.admission import figures, goals, plan, search, workload
from bench.admission.arena import FACTS, LAYERS, PACE, Arena
from bench.admission.figures import Results
from bench.admission.goals import Goals
from bench.admission.plan import Size
from bench.admission.records import Records
from bench.admission.replay import study
from e2e.cluster.progress import Progress

PASSING = 0.99
"""Goodput that capacity means."""
FAILURES = 2
"""Of a probe, until its rate is too high."""
TRIES = 3
"""Of a probe or a run with which the machine does not keep up, whatever came of it."""
FIRST_RATES = {"chat": 20.0, "mixed": 8.0, "long": 6.0, workload.SHIFT: 1.0}
"""Where the bisection begins; of the shift: the factor on the capacities of its mixes."""
REPLAY_FILE = "replay.jsonl"
REPLAY_QUICK = replace(study.Size(), pairs=study.Size().pairs[:2], seeds=(1,), share=0.05, tuning_share=0.02)


class Bench:
    """One whole measurement in one folder."""

    def __init__(self, *, arena: Arena, records: Records, size: Size, progress: Progress) -> None:
        self._arena, self._records, self._size, self._progress = arena, records, size, progress

    async def measure(self) -> dict[str, Goals]:
        """All stages; the records hold the results. Returns the goals."""
        targets = await self._goals()
        capacity = {mix: await self._capacity(mix, targets[mix]) for mix in plan.needed_for_capacity(self._size)}
        await self._runs(plan.tuning(self._size), targets, capacity)
        goodputs = self._records.goodputs()
        tuned = self._arena.cap = plan.tuned_cap(goodputs, self._size)
        self._progress.say(f"vLLM's own cap is {tuned}, the best in the tuning runs.")
        hindsight = {mix: plan.hindsight_caps(goodputs, self._size, mix=mix, tuned=tuned) for mix in self._size.mixes}
        await self._runs(plan.main_runs(self._size, hindsight), targets, capacity)
        return targets

    async def _goals(self) -> dict[str, Goals]:
        """Written to their file before any policy has run."""
        known = self._records.goals
        if known is not None:
            return known
        found = {}
        for mix in plan.needed_for_capacity(self._size):
            with self._progress.step(f"{mix}: goals") as step:
                arrivals = workload.one_by_one(mix, count=self._size.unloaded, seed=plan.UNLOADED_SEED)
                run = await self._arena.unloaded(arrivals, salt=f"unloaded {mix}")
                found[mix] = goals.goals(run.outcomes)
                met = goals.summary(run.outcomes, found[mix]).goodput
                step.detail = f"{_said(found[mix])}; of the idle engine's requests {100 * met:.0f} % meet them"
        self._records.write_goals(found)
        return found

    async def _capacity(self, mix: str, targets: Goals) -> float:
        """Requests a second; of the shift a factor."""
        probes = self._records.probes.setdefault(mix, [])
        while (rate := search.next_rate(probes, first=FIRST_RATES[mix])) is not None:
            phases = workload.phases(
                mix,
                load=1.0,
                seconds=plan.probe_seconds(self._size, mix),
                capacity=self._known_capacity() | {mix: rate},
                seed=0,
            )
            arrivals = workload.arrivals(phases, seed=plan.CAPACITY_SEED)
            passed, failures, tries = False, 0, 0
            while not passed and failures < FAILURES and tries < TRIES:
                tries += 1
                with self._progress.step(f"{mix}: capacity") as step:
                    salt = f"capacity {mix} {len(probes)} {tries}"
                    run, machine = await self._arena.probe(arrivals, targets, salt=salt)
                    goodput = goals.summary(run.outcomes, targets).goodput
                    step.detail = f"{rate:.2f}/s, goodput {100 * goodput:.1f} %, {machine}"
                if machine.kept_up or tries == TRIES:
                    passed, failures = goodput >= PASSING, failures + 1
            self._records.add_probe(mix, search.Probe(rate=rate, passed=passed))
        found = search.best(probes)
        assert found is not None, "the search ends with a rate that passed"
        return found

    def _known_capacity(self) -> dict[str, float]:
        found = {mix: search.best(probes) for mix, probes in self._records.probes.items()}
        return {mix: rate for mix, rate in found.items() if rate is not None}

    async def _runs(self, steps: Sequence[plan.Step], targets: dict[str, Goals], capacity: dict[str, float]) -> None:
        to_do = plan.still_to_do(steps, self._records.runs)
        for number, each in enumerate(to_do, start=1):
            key = each.key
            seconds = self._size.window(key.mix)
            phases = workload.phases(key.mix, load=key.load, seconds=seconds, capacity=capacity, seed=key.seed)
            arrivals = workload.arrivals(phases, seed=key.seed)
            label = f"{key.stage} {number}/{len(to_do)}: {key.mix} {key.load:g}x seed {key.seed}, {key.contestant}"
            for _ in range(TRIES):
                with self._progress.step(label) as step:
                    record = await self._arena.run(
                        key, each.contestant, arrivals, targets[key.mix], rate=len(arrivals) / seconds
                    )
                    step.detail = (
                        f"goodput {100 * record.summary.goodput:.1f} %, {record.preemptions} preemptions, "
                        f"{record.recomputed_tokens} tokens again, {record.machine}"
                    )
                if record.machine.kept_up:
                    break
            self._records.add_run(record)


def _said(targets: Goals) -> str:
    return f"first token {1000 * targets.ttft_seconds:.0f} ms, per token {1000 * targets.tpot_seconds:.1f} ms"


def said_plan(size: Size) -> str:
    """What will be done, and for how long."""
    parts = plan.estimate(size)
    total = sum(part.seconds for part in parts)
    lines = [(part.what, str(part.runs), f"{part.seconds / 60:.0f}") for part in parts]
    return report.table(("stage", "runs", "minutes"), [*lines, ("in all, without the replay", "", f"{total / 60:.0f}")])


def settings(size: Size) -> dict[str, object]:
    """What decides on the figures besides the code: results under other settings must not be mixed with these."""
    given = {
        "size": asdict(size),
        "engine": asdict(FACTS) | {"layers": LAYERS, "pace": asdict(PACE)},
        "mixes": [asdict(mix) for mix in workload.PLAIN],
    }
    written = json.loads(json.dumps(given))
    assert isinstance(written, dict)
    return written


def open_records(folder: Path, size: Size) -> Records:
    """The records in ``folder``; raises ValueError where they were measured under other settings."""
    file = folder / "settings.json"
    folder.mkdir(parents=True, exist_ok=True)
    if not file.exists():
        file.write_text(json.dumps(settings(size), indent=1) + "\n")
    elif json.loads(file.read_text()) != settings(size):
        raise ValueError(
            f"{folder} holds results under other settings, see {file.name}; give another --folder, or --fresh."
        )
    return Records(folder)


def forget_replayed(file: Path, family: str) -> None:
    """Takes one policy's replays out of their file."""
    if file.exists():
        lines = file.read_text().splitlines(keepends=True)
        file.write_text("".join(line for line in lines if json.loads(line)["key"]["family"] != family))


async def measure(size: Size, records: Records, folder: Path, progress: Progress) -> None:
    """Measures what is not in the records yet."""
    timeout = aiohttp.ClientTimeout(total=None)
    # Shorter than the engine's five seconds, after which it closes what is idle, maybe under a request on its way.
    connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=2)
    async with aiohttp.ClientSession(timeout=timeout, connector=connector) as session:
        arena = Arena(session=session, folder=folder, progress=progress, warm_up=size.warm_up)
        async with arena.open():
            await Bench(arena=arena, records=records, size=size, progress=progress).measure()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.admission", description=__doc__)
    parser.add_argument(
        "--quick",
        action="store_true",
        help="two mixes, two loads, one seed: to see that it works; no claim is made from it",
    )
    parser.add_argument("--folder", type=Path, help="where results are kept and found [bench/results/admission-SIZE]")
    parser.add_argument("--fresh", action="store_true", help="begin anew: move what is in the folder aside")
    parser.add_argument(
        "--again",
        metavar="CONTESTANT",
        help="measure this contestant anew, the others stay: for development, not for claims",
    )
    parser.add_argument("--plan", action="store_true", help="print the plan and end")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the engines are ended
    size = plan.QUICK if arguments.quick else Size()
    print(said_plan(size), flush=True)
    if arguments.plan:
        return

    folder = arguments.folder or report.RESULTS / f"admission-{'quick' if arguments.quick else 'full'}"
    started, machine, progress = report.now(), report.machine(), Progress()
    if arguments.fresh and folder.exists():
        folder.rename(folder.with_name(f"{folder.name}-{started:%Y%m%dT%H%M%SZ}"))
    records = open_records(folder, size)
    if arguments.again:
        records.forget(arguments.again)
        forget_replayed(folder / REPLAY_FILE, arguments.again)
    asyncio.run(measure(size, records, folder, progress))
    results = Results(records.runs.values())
    replayed = study.study(
        REPLAY_QUICK if arguments.quick else study.Size(), study.Results(folder / REPLAY_FILE), progress.say
    )

    written = report.Report(
        bench="admission",
        machine=machine,
        started=started,
        settings={"quick": int(arguments.quick), "window_seconds": size.window_seconds, "seeds": len(size.seeds)},
        header=figures.HEADER,
        rows=figures.rows(results),
        last_line=figures.last_line(results, replayed.figures()),
        samples=settings(size) | records.plain() | {"replay": replayed.rows()},
    )
    progress.say(f"written: {written.write()}")
    if arguments.again:
        print(f"{arguments.again} was measured later than the others: no claim is made from these figures.")
    if arguments.quick:
        print("A quick run shows that the benchmark works: no claim is made from its figures.")
    print(f"{figures.comparison(results)}\n\n{report.table(study.HEADER, replayed.rows())}\n")
    print(written.text())


if __name__ == "__main__":
    main()
