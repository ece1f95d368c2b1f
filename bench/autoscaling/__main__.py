"""``python -m bench.autoscaling``: every scaler on every variant of both traces, in virtual time."""

import argparse
import os
from dataclasses import asdict, replace

from bench import report
from bench.autoscaling.study import (
    AGAINST_HEADER,
    HEADER,
    Size,
    Study,
    against_rows,
    chosen,
    reported_runs,
    run_all,
    tuning_runs,
)
from e2e.cluster.progress import Progress


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.autoscaling", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few cells, one seed, to see that it works")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    size = Size(processes=arguments.processes)
    if arguments.quick:
        size = replace(size, variants=("raw", "steps", "steady"), seeds=(1,), startups=(60.0,), highest=6)
    started, machine, progress = report.now(), report.machine(), Progress()
    tried = tuning_runs(size)
    with progress.step(f"{len(tried)} runs to choose settings"):
        settings = chosen(run_all(tried, size))
    runs = reported_runs(size, settings)
    with progress.step(f"{len(runs)} runs that are reported"):
        results = run_all(runs, size)
    study = Study(results)
    against = against_rows(study.against())
    written = report.Report(
        bench="autoscaling",
        machine=machine,
        started=started,
        settings={name: str(value) for name, value in asdict(size).items()} | {"chosen": str(settings)},
        header=HEADER,
        rows=study.rows(),
        last_line=asdict(study.figures()),
        samples={"results": [asdict(result) for result in results], "against": against},
    )
    progress.say(f"written: {written.write()}")
    print(report.table(AGAINST_HEADER, against))
    print()
    print(written.text())


if __name__ == "__main__":
    main()
