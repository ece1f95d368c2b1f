"""``make bench-thrash``: precision, recall and delay of the thrash detector.

Cache size is swept against working set for three kinds of traffic, with KV events and without, and the cases that must
not fire follow. It runs in simulated time: the figures are the same on every machine.
"""

import argparse
from collections import Counter
from collections.abc import Sequence

from bench import report
from bench.thrash.cases import RATIOS, SECONDS, SWEPT, Case, chats, must_not_fire
from bench.thrash.judge import judge, together
from bench.thrash.trial import Run
from e2e.cluster.progress import Progress

_n = report.number
HEADER = (
    "working set / cache",
    "wasted in the worst minute, %",
    "alarms",
    "… false",
    "thrashing told",
    "after, s",
    "as",
    "told without KV events",
    "… false",
)


def row(name: str, runs: Sequence[Run]) -> tuple[str, ...]:
    """A line of the table."""
    verdict = together(judge(run.sighted) for run in runs)
    blind = together(judge(run.blind) for run in runs)
    return (
        name,
        _n(100 * max(max(run.sighted.minutes()) for run in runs)),
        str(verdict.alarms),
        str(verdict.false_alarms),
        f"{len(verdict.delays)} of {verdict.episodes}",
        _n(verdict.delay) if verdict.delays else "",
        ", ".join(kind for kind, _ in Counter(verdict.kinds).most_common()),
        f"{len(blind.delays)} of {blind.episodes}",
        str(blind.false_alarms),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.thrash", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each case [%(default)s]")
    seeds = range(parser.parse_args().seeds)
    started, machine, progress = report.now(), report.machine(), Progress()

    cases = [sweep(ratio) for sweep in SWEPT for ratio in RATIOS]
    cases += [chats(ratio, offload=True) for ratio in RATIOS if ratio > 1]
    runs: dict[Case, list[Run]] = {}
    for case in (*cases, *must_not_fire()):
        with progress.step(case.name) as step:
            runs[case] = [case.run(seed=seed) for seed in seeds]
            step.detail = f"{sum(len(run.sighted.alarms) for run in runs[case])} alarms"
    everything = [run for found in runs.values() for run in found]
    total = together(judge(run.sighted) for run in everything)
    written = report.Report(
        bench="thrash",
        machine=machine,
        started=started,
        settings={"seeds": len(seeds), "seconds": SECONDS},
        header=HEADER,
        rows=[*(row(case.name, found) for case, found in runs.items()), row("all", everything)],
        last_line={
            "precision": total.precision,
            "recall": total.recall,
            "delay_s": total.delay,
            "false_alarms": sum(
                len(run.sighted.alarms) for case, found in runs.items() if case.must_not_fire for run in found
            ),
        },
    )
    progress.say(f"written: {written.write()}")
    print(written.text())


if __name__ == "__main__":
    main()
