"""``python -m bench.autoscaling``: every scaler on every variant of both traces, in virtual time."""

import argparse
import os
from dataclasses import asdict, replace

from bench import report
from bench.autoscaling.study import HEADER, Size, Study, chosen, reported_runs, run_all, tuning_runs
from e2e.cluster.progress import Progress


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.autoscaling", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one seed, one start-up time; its figures are none")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    arguments = parser.parse_args()
    size = Size(processes=arguments.processes)
    if arguments.quick:
        size = replace(size, seeds=(1,), startups=(60.0,))
    started, machine, progress = report.now(), report.machine(), Progress()
    tried = tuning_runs(size)
    progress.say(f"{len(tried)} runs to choose the peers' settings")
    settings = chosen(run_all(tried, size))
    runs = reported_runs(size, settings)
    progress.say(f"{len(runs)} runs that are reported")
    results = run_all(runs, size)
    study = Study(results)
    written = report.Report(
        bench="autoscaling",
        machine=machine,
        started=started,
        settings={name: str(value) for name, value in asdict(size).items()} | {"chosen": str(settings)},
        header=HEADER,
        rows=study.rows(),
        last_line=asdict(study.figures()),
        samples={"results": [asdict(result) for result in results]},
    )
    progress.say(f"written: {written.write()}")
    print(written.text())


if __name__ == "__main__":
    main()
