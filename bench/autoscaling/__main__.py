"""``python -m bench.autoscaling``: every scaler on every variant of both traces, in virtual time; goes on where it ended."""

import argparse
import itertools
import os
import signal
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from typing import Final

from bench import report
from bench.autoscaling.dynosim import DynoSim, Told, error_percent
from bench.autoscaling.records import Records, digest
from bench.autoscaling.study import (
    AGAINST_HEADER,
    HEADER,
    OURS,
    SENSITIVITY_HEADER,
    Result,
    Run,
    Size,
    Study,
    against_rows,
    chosen,
    refereed,
    reported_runs,
    run_all,
    sensitivity_rows,
    sensitivity_runs,
    tuning_runs,
)
from e2e.cluster.progress import Progress

_BEST: Final = 2
"""Peers that are set before other conditions too."""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.autoscaling", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cells, one seed, to see that it works")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument(
        "--dynosim",
        type=Path,
        metavar="PYTHON",
        default=os.environ.get("DYNOSIM") or None,
        help="Python that has ai-dynamo, whose simulator is asked too; see bench/autoscaling/dynosim.py [$DYNOSIM]",
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes end too
    size = Size(processes=arguments.processes)
    if arguments.quick:
        size = replace(size, variants=("raw", "steps", "steady"), seeds=(1,), startups=(60.0,), highest=6)
    started, machine, progress = report.now(), report.machine(), Progress()
    records = Records(report.RESULTS / "autoscaling" / f"{digest(size)}.jsonl")
    settings = chosen(_run(tuning_runs(size), size, "runs to choose settings", records, progress))
    results = _run(reported_runs(size, settings), size, "runs that are reported", records, progress)
    referee, unasked = _referee(arguments.dynosim, size, progress)
    error = error_percent([ours for _, ours, _ in referee], [theirs for _, _, theirs in referee])
    study = Study(results)
    sensitive = (OURS, *study.ranked()[:_BEST])
    changed = _run(sensitivity_runs(size, settings, sensitive), size, "runs under other conditions", records, progress)
    sensitivity = sensitivity_rows([*results, *changed], size, sensitive)
    against = against_rows(study.against())
    written = report.Report(
        bench="autoscaling",
        machine=machine,
        started=started,
        settings={name: str(value) for name, value in asdict(size).items()}
        | {"chosen": str(settings), "dynosim": unasked or str(arguments.dynosim)},
        header=HEADER,
        rows=study.rows(),
        last_line=asdict(study.figures(dynosim_error_percent=error)),
        samples={
            "results": [asdict(result) for result in results],
            "against": against,
            "changed": [asdict(result) for result in changed],
            "sensitivity": sensitivity,
            "dynosim": [(name, asdict(ours), asdict(theirs)) for name, ours, theirs in referee],
        },
    )
    progress.say(f"written: {written.write()}")
    if unasked:
        progress.say(f"dynosim_error_percent is none: {unasked}")
    for header, rows in ((AGAINST_HEADER, against), (SENSITIVITY_HEADER, sensitivity)):
        print(report.table(header, rows))
        print()
    print(written.text())


def _referee(python: Path | None, size: Size, progress: Progress) -> tuple[list[tuple[str, Told, Told]], str]:
    """What both simulators say; and why DynoSim said nothing, empty where it did: hours of runs are not lost by it."""
    if python is None:
        return [], "DynoSim was not asked. Give --dynosim (make: DYNOSIM=) a Python that has ai-dynamo."
    try:
        with progress.step("DynoSim"), tempfile.TemporaryDirectory(prefix="kvplane-dynosim-") as folder:
            return refereed(size, DynoSim(python, Path(folder))), ""
    except (OSError, RuntimeError) as error:
        return [], f"DynoSim failed: {error}"


def _run(runs: list[Run], size: Size, what: str, records: Records, progress: Progress) -> list[Result]:
    with progress.step(f"{len(runs)} {what}") as step:
        done = itertools.count(1 + sum(run in records.results for run in runs))

        def keep(result: Result) -> None:
            records.add(result)
            step.detail = f"{next(done)} done"

        return run_all(runs, size, known=records.results, keep=keep)


if __name__ == "__main__":
    main()
