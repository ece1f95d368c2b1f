"""``python -m bench.proxy``: for each number of streams, rounds of direct, ours, Go's and our proxy alone."""

import argparse
import resource
import shutil
import signal
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from bench import report
from bench.proxy import contestants, figures
from bench.proxy.contestants import Contestant, run_load
from bench.proxy.figures import Level, Round
from bench.proxy.sidecar import Sidecar
from e2e.cluster.ports import free_ports
from e2e.cluster.progress import Progress


@dataclass(frozen=True)
class Size:
    """How much is measured."""

    streams: tuple[int, ...] = (1, 10, 100, 300, 500, 1000)
    judged: int = 500
    rounds: int = 3
    chunks: int = 60
    """Of each stream."""
    interval_us: int = 50_000
    """20 chunks a second."""
    seconds: int = 8
    """Each window, after the streams have started one by one."""
    requests: int = 12_000
    connections: int = 16
    warm_streams: int = 20
    warm_seconds: int = 2
    """Enough of both for the sidecar to have learned how long prompts and steps take (8 of each)."""


QUICK = Size(streams=(1, 500), rounds=1, chunks=40, seconds=5, requests=2_000)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m bench.proxy", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="two minutes, to see that it works; its figures are none")
    size = QUICK if parser.parse_args().quick else Size()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the processes are killed
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

    started, machine, progress = report.now(), report.machine(), Progress()
    folder = Path(tempfile.mkdtemp(prefix="kvplane-bench-proxy-"))
    program = contestants.build(progress)
    engine = contestants.engine(program, folder)
    sidecar = Sidecar(engine_port=engine.port, admin_port=free_ports(1)[0], folder=folder)
    measured = (  # in the order of a Round
        engine,
        contestants.kvplane(sidecar, folder),
        contestants.reverse_proxy(program, engine, folder),
        contestants.proxy_alone(engine, folder),
    )
    try:
        for contestant in measured:
            contestant.start()
        with sidecar.asked():
            _warm(program, measured, size, progress)
            levels = [_streams(program, measured, size, streams, progress) for streams in size.streams]
            requests = _requests(program, measured, size, progress)
        admission = sidecar.admission_metrics()
    finally:
        for contestant in measured:
            contestant.stop()
        shutil.rmtree(folder, ignore_errors=True)

    written = report.Report(
        bench="proxy",
        machine=machine,
        started=started,
        settings=asdict(size) | {"streams": " ".join(map(str, size.streams))},
        header=figures.HEADER,
        rows=figures.rows(levels) + figures.request_rows(requests),
        last_line=figures.summary(levels, requests, judged=size.judged),
        samples={
            "levels": [asdict(level) for level in levels],
            "requests": asdict(requests),
            "admission": admission,
        },
    )
    progress.say(f"written: {written.write()}")
    print(written.text())


def _warm(program: Path, measured: tuple[Contestant, ...], size: Size, progress: Progress) -> None:
    with progress.step("warming up"):
        for one in measured:
            run_load(program, one, "streams", size.warm_streams, size.chunks, size.interval_us, size.warm_seconds)


def _streams(program: Path, measured: tuple[Contestant, ...], size: Size, streams: int, progress: Progress) -> Level:
    rounds: list[Round] = []
    for number in range(1, size.rounds + 1):
        with progress.step(f"{streams} streams, round {number} of {size.rounds}"):
            loads = [
                run_load(program, one, "streams", streams, size.chunks, size.interval_us, size.seconds)
                for one in measured
            ]
            rounds.append(Round(*loads))
    return Level(streams, rounds)


def _requests(program: Path, measured: tuple[Contestant, ...], size: Size, progress: Progress) -> Level:
    rounds: list[Round] = []
    for number in range(1, size.rounds + 1):
        with progress.step(f"{size.requests} requests, round {number} of {size.rounds}"):
            loads = [run_load(program, one, "requests", size.connections, size.requests) for one in measured]
            rounds.append(Round(*loads))
    return Level(size.connections, rounds)


if __name__ == "__main__":
    main()
