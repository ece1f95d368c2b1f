"""What every benchmark ends with: a table, a JSON file, and one last line that a script can read.

A figure without its machine and its date says nothing, so both are in the file, with the load average at the start:
above the number of CPUs, the figures are of a busy machine.
"""

import json
import math
import os
import platform
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path

RESULTS = Path(__file__).resolve().parent / "results"
"""Ignored by git: results belong to a machine."""

Value = float | int | str


@dataclass(frozen=True)
class Machine:
    """Where a benchmark ran."""

    cpus: int
    cpu_model: str
    memory_gib: float
    kernel: str
    python: str
    load_average: float
    """Of the last minute, when the benchmark began."""

    def __str__(self) -> str:
        return (
            f"{self.cpus} CPUs ({self.cpu_model}), {self.memory_gib:.0f} GiB, Linux {self.kernel}, Python {self.python}, "
            f"load average {self.load_average:.2f} at the start"
        )


def machine(proc: Path = Path("/proc")) -> Machine:
    """This machine."""
    models = [line for line in (proc / "cpuinfo").read_text().splitlines() if line.startswith("model name")]
    total = next(line for line in (proc / "meminfo").read_text().splitlines() if line.startswith("MemTotal:"))
    return Machine(
        cpus=len(os.sched_getaffinity(0)),
        cpu_model=models[0].partition(":")[2].strip() if models else platform.machine(),
        memory_gib=round(int(total.split()[1]) / 2**20, 1),
        kernel=platform.release(),
        python=platform.python_version(),
        load_average=float((proc / "loadavg").read_text().split()[0]),
    )


@dataclass(frozen=True)
class Distribution:
    """Samples in short; the unit is the samples'."""

    count: int
    median: float
    p99: float
    smallest: float
    largest: float


def distribution(samples: Sequence[float]) -> Distribution:
    """Raises ValueError where there is no sample."""
    if not samples:
        raise ValueError("There are no samples to describe: nothing was measured.")
    return Distribution(
        count=len(samples),
        median=statistics.median(samples),
        p99=percentile(samples, 0.99),
        smallest=min(samples),
        largest=max(samples),
    )


def percentile(samples: Sequence[float], fraction: float) -> float:
    """The nearest-rank percentile: the smallest sample that at least ``fraction`` of all do not exceed.

    Never interpolated, so that a p99 is a time that really was taken.
    """
    return sorted(samples)[max(0, math.ceil(fraction * len(samples)) - 1)]


@dataclass(frozen=True)
class Report:
    """One run of one benchmark."""

    bench: str
    machine: Machine
    started: datetime
    settings: Mapping[str, Value]
    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    last_line: Mapping[str, Value]
    """Figures of the last line, in its order."""
    samples: Mapping[str, object] = field(default_factory=dict)
    """Everything measured, as plain data; only in the JSON file."""

    def text(self) -> str:
        """What goes to stdout: date and machine, the table, the last line."""
        date = self.started.strftime("%Y-%m-%d %H:%M UTC")
        return f"{date}; {self.machine}\n\n{table(self.header, self.rows)}\n\n{last_line(self.bench, self.last_line)}"

    def write(self, folder: Path = RESULTS) -> Path:
        """Write ``BENCH-DATE.json`` into ``folder``; its path."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{self.bench}-{self.started.strftime('%Y%m%dT%H%M%SZ')}.json"
        document = asdict(self) | {"started": self.started.isoformat()}
        path.write_text(json.dumps(_finite(document), indent=1, allow_nan=False) + "\n")
        return path


def _finite(value: object) -> object:
    """With null for what is not known, or never came: JSON has no word for nan and infinity."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def now() -> datetime:
    """The moment, for ``Report.started``."""
    return datetime.now(UTC)


def last_line(bench: str, figures: Mapping[str, Value]) -> str:
    """``bench NAME: key=value key=value``; values have no spaces, so that the line splits at them."""
    return " ".join([f"bench {bench}:", *(f"{key}={number(value)}" for key, value in figures.items())])


def number(value: Value) -> str:
    """Three significant digits below 100, whole numbers from there; words with their spaces replaced."""
    if isinstance(value, str):
        return value.replace(" ", "-")
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return "none"
    if abs(value) >= 100:
        return f"{value:.0f}"
    if abs(value) < 0.005:
        return "0"
    digits = 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table with aligned columns: readable in a terminal, and in the documentation as it is."""
    lines = [tuple(header), *(tuple(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]

    def aligned(line: Sequence[str]) -> str:
        cells = (
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        return f"| {' | '.join(cells)} |"

    rule = "|".join("-" * (width + 1) + ("-" if i == 0 else ":") for i, width in enumerate(widths))
    return "\n".join([aligned(lines[0]), f"|{rule}|", *(aligned(line) for line in lines[1:])])
