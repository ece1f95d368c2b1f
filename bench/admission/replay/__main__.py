"""``python -m bench.admission.replay``: the Azure traces, every policy, in virtual time."""

import argparse
import os
from dataclasses import asdict, replace
from pathlib import Path

from bench import report
from bench.admission.replay.study import HEADER, Results, Size, study
from bench.admission.replay.traces import NAMES
from bench.engine.presets import PRESETS
from e2e.cluster.progress import Progress


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.admission.replay", description=__doc__)
    parser.add_argument("--preset", choices=tuple(PRESETS), help="only this engine, with both traces")
    parser.add_argument("--quick", action="store_true", help="a tenth of each trace, one seed; its figures are none")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--file", type=Path, help="where runs are kept; what is there already is not run again")
    arguments = parser.parse_args()
    size = Size(processes=arguments.processes)
    if arguments.quick:
        size = replace(size, seeds=(1,), share=0.1, tuning_share=0.05)
    if arguments.preset:
        size = replace(size, pairs=tuple((arguments.preset, trace) for trace in NAMES))
    started, machine, progress = report.now(), report.machine(), Progress()
    file = arguments.file or report.RESULTS / f"replay-{started.strftime('%Y%m%dT%H%M%SZ')}.jsonl"
    progress.say(f"runs are kept in {file}")
    done = study(size, Results(file), progress.say)
    for (preset, trace), rate in done.capacity.items():
        progress.say(f"{preset} {trace}: 1.0x is {rate:.2f} requests a second")
    written = report.Report(
        bench="replay",
        machine=machine,
        started=started,
        settings={name: str(value) for name, value in asdict(size).items()},
        header=HEADER,
        rows=done.rows(),
        last_line=asdict(done.figures()),
    )
    progress.say(f"written: {written.write()}")
    print(written.text())


if __name__ == "__main__":
    main()
