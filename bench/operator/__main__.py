"""``python -m bench.operator``: kvplane's operator, then LeaderWorkerSet's controller, each on an API server of its own."""

import argparse
import asyncio
import shutil
import signal
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from bench import report
from bench.operator import controllers
from bench.operator.client import Client
from bench.operator.controllers import Controller
from bench.operator.measures import Bench, Burst, Idle, Recovery, Timing, milliseconds
from e2e.cluster.controlplane import ControlPlane
from e2e.cluster.progress import Progress

SAME_IDENTITY = {"KVPLANE_OPERATOR_IDENTITY": "kvplane-operator-0"}
"""What the operator's container is called again after a crash in a cluster: the Lease is its own."""


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    one_by_one: int = 100
    repeats: int = 3
    small: int = 200
    large: int = 1000
    updates: int = 100
    idle_seconds: float = 120.0
    """kvplane's watches are renewed every 120 s, so a window of that length has each of them once."""


@dataclass(frozen=True)
class Outcome:
    """Everything measured of one controller."""

    name: str
    creations: tuple[tuple[Timing, ...], ...]
    small: tuple[Burst, ...]
    large: Burst
    updates: tuple[Timing, ...]
    idle: tuple[Idle, ...]
    """Without objects, with few, with many."""
    recoveries: tuple[Recovery, ...]
    """By a process of another identity; and of the same identity, where the controller has that setting."""


async def measure(controller: Controller, size: Size, control_plane: ControlPlane, progress: Progress) -> Outcome:
    """All measures of one controller on one fresh API server."""
    controller.install(control_plane)
    control_plane.kubectl("create", "namespace", controllers.NAMESPACE)
    process = controller.process(control_plane, control_plane.logs / "controller.log")
    try:
        async with Client(control_plane.kubeconfig) as client:
            bench = Bench(controller, client, process)
            with progress.step(f"{controller.name}: the API server alone"):
                noise = await bench.noise(size.idle_seconds)
            with progress.step(f"{controller.name}: start"):
                await bench.start()
            with progress.step(f"{controller.name}: idle"):
                idle = [await bench.idle(size.idle_seconds, noise_per_second=noise)]
            creations, small = [], []
            for number in range(1, size.repeats + 1):
                with progress.step(
                    f"{controller.name}: {size.one_by_one} one after another, {number} of {size.repeats}"
                ):
                    creations.append(tuple(await bench.one_by_one(size.one_by_one)))
                    await bench.clear()
            for number in range(1, size.repeats + 1):
                with progress.step(f"{controller.name}: {size.small} at once, {number} of {size.repeats}") as step:
                    small.append(await bench.burst(size.small))
                    step.detail = f"{small[-1].seconds:.2f} s"
                    if number < size.repeats:
                        await bench.clear()
            with progress.step(f"{controller.name}: {size.updates} updates"):
                updates = await bench.updates(size.updates)
            with progress.step(f"{controller.name}: idle with {size.small}"):
                idle.append(await bench.idle(size.idle_seconds, noise_per_second=noise))
                await bench.clear()
            with progress.step(f"{controller.name}: {size.large} at once") as step:
                large = await bench.burst(size.large)
                step.detail = f"{large.seconds:.2f} s"
            with progress.step(f"{controller.name}: idle with {size.large}"):
                idle.append(await bench.idle(size.idle_seconds, noise_per_second=noise))
                await bench.clear()
            with progress.step(f"{controller.name}: kill -9 in the middle of {size.small}"):
                recoveries = [await bench.recovery(size.small)]
                await bench.clear()
            if controller.name == "kvplane":
                process.kill()
                process.start(**SAME_IDENTITY)
                with progress.step(f"{controller.name}: kill -9 in the middle of {size.small}, same identity"):
                    await bench.burst(1)
                    await bench.clear()
                    recoveries.append(await bench.recovery(size.small, **SAME_IDENTITY))
    finally:
        process.kill()
    return Outcome(
        name=controller.name,
        creations=tuple(creations),
        small=tuple(small),
        large=large,
        updates=tuple(updates),
        idle=tuple(idle),
        recoveries=tuple(recoveries),
    )


@dataclass(frozen=True)
class Figures:
    """The figures that an outcome is quoted by."""

    create_median_ms: float
    create_p99_ms: float
    burst_small_s: float
    burst_large_s: float
    update_median_ms: float
    idle_rps: float
    idle_rps_more: float
    rss_mb: float
    recovery_s: float


def figures(outcome: Outcome) -> Figures:
    """Of repeated measures: the median of the runs; the p99 is that of all runs' samples together."""
    creations = milliseconds([timing for run in outcome.creations for timing in run])
    return Figures(
        create_median_ms=statistics.median(milliseconds(run).median for run in outcome.creations),
        create_p99_ms=creations.p99,
        burst_small_s=statistics.median(burst.seconds for burst in outcome.small),
        burst_large_s=outcome.large.seconds,
        update_median_ms=milliseconds(outcome.updates).median,
        idle_rps=outcome.idle[0].per_second(),
        idle_rps_more=outcome.idle[-1].per_second() - outcome.idle[0].per_second(),
        rss_mb=outcome.idle[-1].rss_mb,
        recovery_s=outcome.recoveries[0].seconds,
    )


def rows(outcome: Outcome, size: Size) -> list[tuple[str, str]]:
    """Label and value of each line of the table."""
    runs = [milliseconds(run) for run in outcome.creations]
    pooled = milliseconds([timing for run in outcome.creations for timing in run])
    answered = report.distribution([1000 * t.since_answered for run in outcome.creations for t in run])
    updates = milliseconds(outcome.updates)
    medians, bursts = [run.median for run in runs], [burst.seconds for burst in outcome.small]
    lines = [
        ("create → child, one after another: median / p99, ms", f"{_n(statistics.median(medians))} / {_n(pooled.p99)}"),
        ("… medians of the runs, ms", " ".join(map(_n, medians))),
        ("… counted from the API server's answer: median / p99, ms", f"{_n(answered.median)} / {_n(answered.p99)}"),
        *_burst_rows(f"{size.small} at once", outcome.small[_middle(bursts)]),
        ("… runs, s", " ".join(map(_n, bursts))),
        *_burst_rows(f"{size.large} at once", outcome.large),
        ("change → child: median / p99, ms", f"{_n(updates.median)} / {_n(updates.p99)}"),
    ]
    for idle in outcome.idle:
        lines.append((f"idle, {_about(idle.objects)} objects: requests/s", _n(idle.per_second())))
        lines.append(
            (f"idle, {_about(idle.objects)} objects: RSS, MB / CPU, %", f"{_n(idle.rss_mb)} / {_n(idle.cpu_percent)}")
        )
    first = outcome.recoveries[0]
    lines += [
        (f"kill -9 amid {size.small} → all complete, s", _n(first.seconds)),
        (
            "… of that, until it led again / afterwards, s",
            f"{_n(first.leading_seconds)} / {_n(first.working_seconds())}",
        ),
        ("… children doubled", str(first.doubled)),
    ]
    if len(outcome.recoveries) > 1:
        lines.append(("kill -9, restarted under the same identity, s", _n(outcome.recoveries[1].seconds)))
    else:
        lines.append(("kill -9, restarted under the same identity, s", "no such setting"))
    return lines


def _burst_rows(label: str, burst: Burst) -> list[tuple[str, str]]:
    spread = milliseconds(burst.timings)
    return [
        (f"{label}, s", _n(burst.seconds)),
        ("… objects/s", _n(burst.per_second())),
        ("… each: median / p99, ms", f"{_n(spread.median)} / {_n(spread.p99)}"),
        ("… until all children of all, s", _n(burst.complete_seconds)),
    ]


def _middle(values: Sequence[float]) -> int:
    return sorted(range(len(values)), key=values.__getitem__)[len(values) // 2]


def _about(count: int) -> str:
    return f"{count:,}"


_n = report.number


def summary(ours: Outcome, peer: Outcome | None) -> dict[str, report.Value]:
    """The last line."""
    mine = figures(ours)
    line: dict[str, report.Value] = {
        "create_median_ms": mine.create_median_ms,
        "create_p99_ms": mine.create_p99_ms,
        "burst200_s": mine.burst_small_s,
        "burst1000_s": mine.burst_large_s,
        "update_median_ms": mine.update_median_ms,
        "idle_rps_0": mine.idle_rps,
        "idle_rps_1000": mine.idle_rps_more,
        "rss_mb_1000": mine.rss_mb,
        "converge_after_kill_s": mine.recovery_s,
    }
    if peer is not None:
        theirs = figures(peer)
        line |= {
            "peer": peer.name,
            "peer_create_median_ms": theirs.create_median_ms,
            "peer_burst200_s": theirs.burst_small_s,
            "peer_idle_rps": theirs.idle_rps,
            "peer_rss_mb": theirs.rss_mb,
        }
    return line


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.operator", description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="small numbers, to see that it works; its figures are none"
    )
    parser.add_argument(
        "--only", choices=("kvplane", "peer"), help="measure one of the two, without a last line's peer"
    )
    parser.add_argument(
        "--keep", type=Path, help="keep API servers' and controllers' files and logs in this new folder"
    )
    parser.add_argument("--idle-seconds", type=float, help="length of each window of idleness (default: 120)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the controllers are killed

    size = (
        Size(one_by_one=20, repeats=1, small=40, large=100, updates=20, idle_seconds=10.0)
        if arguments.quick
        else Size()
    )
    if arguments.idle_seconds:
        size = replace(size, idle_seconds=arguments.idle_seconds)
    started, machine, progress = report.now(), report.machine(), Progress()
    folder = arguments.keep or Path(tempfile.mkdtemp(prefix="kvplane-bench-"))
    contestants = {"kvplane": controllers.kvplane(), "peer": controllers.leader_worker_set()}
    outcomes: dict[str, Outcome] = {}
    try:
        for role, controller in contestants.items():
            if arguments.only in (None, role):
                with ControlPlane(folder / role, progress=progress) as control_plane:
                    outcomes[role] = asyncio.run(measure(controller, size, control_plane, progress))
    finally:
        if arguments.keep is None:
            shutil.rmtree(folder, ignore_errors=True)

    columns = [rows(outcome, size) for outcome in outcomes.values()]
    written = report.Report(
        bench="operator",
        machine=machine,
        started=started,
        settings=asdict(size),
        header=("", *(outcome.name for outcome in outcomes.values())),
        rows=[(lines[0][0], *(value for _, value in lines)) for lines in zip(*columns, strict=True)],
        last_line=summary(outcomes["kvplane"], outcomes.get("peer")) if "kvplane" in outcomes else {},
        samples={role: _plain(outcome) for role, outcome in outcomes.items()},
    )
    progress.say(f"written: {written.write()}")
    print(written.text())


def _plain(outcome: Outcome) -> dict[str, object]:
    """As JSON can hold it: the counters of requests have pairs as keys."""
    plain = asdict(outcome)
    for document, idle in zip(plain["idle"], outcome.idle, strict=True):
        document["requests"] = idle.requests.by_kind()
        document["per_second"] = idle.per_second()
    return plain


if __name__ == "__main__":
    main()
