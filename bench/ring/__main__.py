"""``python -m bench.ring``: the ring engine's claims, row by row; what is measured already (``--folder``) is not again."""

import argparse
import asyncio
import signal
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from bench import report
from bench.ring import decode, exact, faults, figures, latency, prefill, sizes
from bench.ring.figures import Measured
from bench.ring.records import Records, code
from bench.ring.sizes import Size
from e2e.cluster.progress import Progress

ROWS: Final[Mapping[str, Callable[[Size, Progress], Measured]]] = {
    "exactness": exact.measure,
    "prefill": prefill.efficiency,
    "exposed": prefill.exposed,
    "long": prefill.long,
    "decode": decode.measure,
    "first_token": lambda size, progress: asyncio.run(latency.first_token(size, progress)),
    "faults": lambda size, progress: asyncio.run(faults.measure(size, progress)),
    "beside": lambda size, progress: asyncio.run(latency.beside(size, progress)),
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.ring", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small, to see that it works; no claim is made from it")
    parser.add_argument("--folder", type=Path, help="where rows are kept and found [bench/results/ring-SIZE]")
    parser.add_argument("--fresh", action="store_true", help="begin anew: move what is in the folder aside")
    parser.add_argument("--only", choices=ROWS, action="append", help="these rows, and no table")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are ended
    size = sizes.QUICK if arguments.quick else Size()
    folder = arguments.folder or report.RESULTS / f"ring-{'quick' if arguments.quick else 'full'}"
    now, progress = report.now(), Progress()
    if arguments.fresh and folder.exists():
        folder.rename(folder.with_name(f"{folder.name}-{now:%Y%m%dT%H%M%SZ}"))
    records = Records(folder, size, code=code(), machine=report.machine(), now=now)
    for name in arguments.only or ROWS:
        if name not in records.rows:
            records.add(name, ROWS[name](size, progress))
    if arguments.only:
        return

    results = figures.results(records.rows)
    written = report.Report(
        bench="ring",
        machine=records.machine,
        started=records.started,
        settings={"quick": int(arguments.quick), "long_tokens": size.long_tokens, "first_tokens": size.first_tokens},
        header=figures.HEADER,
        rows=results.rows(),
        last_line=results.last_line(),
        samples=dict(records.rows),
    )
    progress.say(f"written: {written.write()}")
    if arguments.quick:
        print("A quick run shows that the benchmark works: no claim is made from its figures.")
    print(f"{results.exactness.listing()}\n\n{written.text()}")


if __name__ == "__main__":
    main()
