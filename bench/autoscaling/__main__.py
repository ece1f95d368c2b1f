"""``python -m bench.autoscaling``: every scaler on every variant of both traces, in virtual time."""

import argparse
import os
from dataclasses import asdict, replace

from bench import report
from bench.autoscaling.study import (
    AGAINST_HEADER,
    HEADER,
    Result,
    Run,
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
    settings = chosen(_run(tuning_runs(size), size, "runs to choose settings", progress))
    results = _run(reported_runs(size, settings), size, "runs that are reported", progress)
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


def _run(runs: list[Run], size: Size, what: str, progress: Progress) -> list[Result]:
    with progress.step(f"{len(runs)} {what}") as step:

        def told(done: int) -> None:
            step.detail = f"{done} done"

        return run_all(runs, size, told=told)


if __name__ == "__main__":
    main()
