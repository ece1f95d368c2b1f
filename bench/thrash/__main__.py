"""``make bench-thrash``: precision, recall and delay of the thrash detector.

Cache size is swept against working set for three kinds of traffic, with KV events and without, and the cases that must
not fire follow. It runs in simulated time: the figures are the same on every machine.
"""

import argparse
from collections import Counter
from collections.abc import Iterable, Sequence

from bench import report
from bench.thrash import cases
from bench.thrash.cases import RATIOS, SWEPT, Case
from bench.thrash.judge import Verdict, judge, together
from bench.thrash.trial import Trial
from e2e.cluster.progress import Progress

_n = report.number
HEADER = ("", "wasted, worst minute %", "alarms", "false", "episodes", "told", "delay s", "kind", "told without events")


def trials(case: Case, *, seeds: Sequence[int], events: bool) -> list[Trial]:
    """One per seed."""
    return [case.run(seed=seed, events=events) for seed in seeds]


def row(name: str, found: Sequence[Trial], blind: Iterable[Verdict]) -> tuple[str, ...]:
    """A line of the table."""
    verdict, without = together(map(judge, found)), together(blind)
    return (
        name,
        _n(100 * max(max(trial.minutes()) for trial in found)),
        str(verdict.alarms),
        str(verdict.false_alarms),
        str(verdict.episodes),
        str(len(verdict.delays)),
        _n(verdict.delay) if verdict.delays else "",
        ", ".join(kind for kind, _ in Counter(verdict.kinds).most_common()),
        f"{len(without.delays)} of {without.episodes}, {without.false_alarms} false",
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.thrash", description=__doc__)
    parser.add_argument("--seeds", type=int, default=3, help="runs of each case [%(default)s]")
    seeds = range(parser.parse_args().seeds)
    started, machine, progress = report.now(), report.machine(), Progress()

    swept = [sweep(ratio) for sweep in SWEPT for ratio in RATIOS]
    swept += [cases.chats(ratio, offload=True) for ratio in RATIOS if ratio > 1]
    quiet = cases.must_not_fire()
    rows, sighted, blind, broken = [], [], [], []
    for case in (*swept, *quiet):
        with progress.step(case.name) as step:
            found = trials(case, seeds=seeds, events=True)
            verdicts = [judge(trial) for trial in trials(case, seeds=seeds, events=False)]
            rows.append(row(case.name, found, verdicts))
            sighted += [judge(trial) for trial in found]
            blind += verdicts
            step.detail = f"{together(map(judge, found)).alarms} alarms"
        if case.must_not_fire:
            broken += [judge(trial).alarms for trial in found]
    total, without = together(sighted), together(blind)
    rows.append(
        (
            "all",
            "",
            str(total.alarms),
            str(total.false_alarms),
            str(total.episodes),
            str(len(total.delays)),
            _n(total.delay),
            "",
            f"{len(without.delays)} of {without.episodes}, {without.false_alarms} false",
        )
    )
    written = report.Report(
        bench="thrash",
        machine=machine,
        started=started,
        settings={"seeds": len(seeds), "seconds": cases.SECONDS},
        header=HEADER,
        rows=rows,
        last_line={
            "precision": total.precision,
            "recall": total.recall,
            "delay_s": total.delay,
            "false_alarms": sum(broken),
        },
    )
    progress.say(f"written: {written.write()}")
    print(written.text())


if __name__ == "__main__":
    main()
