"""What was measured, and the figures that are made of it. Pure."""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from bench import report

_LEAST_CPU_SECONDS = 0.2
"""The kernel counts CPU time in hundredths of a second: below this a quotient is mostly rounding."""


@dataclass(frozen=True)
class Spread:
    """Samples in short, in milliseconds."""

    count: int
    median_ms: float
    p99_ms: float
    max_ms: float


@dataclass(frozen=True)
class Load:
    """One run of one load against one contestant."""

    cpu_seconds: float
    """Of the contestant, user and system, in the window."""
    seconds: float
    requests: int
    chunks: int
    first_byte: Spread
    """From before the request to the first event; of a request that is not streamed, to the end of its answer."""
    chunk: Spread
    """From when the engine sent an event to when it was read, without the first of each stream."""


@dataclass(frozen=True)
class Round:
    """One right after the other, in this order."""

    direct: Load
    ours: Load
    """The sidecar's."""
    peer: Load
    alone: Load
    """The sidecar's proxy's, without admission."""


@dataclass(frozen=True)
class Level:
    """All rounds of one number of streams (or, not streamed, of connections)."""

    streams: int
    rounds: Sequence[Round]


Choice = Callable[[Round], Load]
"""One contestant's load of a round."""

_DIRECT: Final = "direct"
_CHOICES: Final[dict[str, Choice]] = {
    _DIRECT: lambda one: one.direct,
    "kvplane": lambda one: one.ours,
    "its proxy without admission": lambda one: one.alone,
    "ReverseProxy": lambda one: one.peer,
}
"""By the name in the table, in its order."""


def added_p99_ms(level: Level, choice: Choice) -> tuple[float, float]:
    """(first byte, chunk): p99 over the direct run's p99 of the same round; the median of the rounds."""
    loads = [(choice(one), one.direct) for one in level.rounds]
    return (
        statistics.median(load.first_byte.p99_ms - direct.first_byte.p99_ms for load, direct in loads),
        statistics.median(load.chunk.p99_ms - direct.chunk.p99_ms for load, direct in loads),
    )


def cpu_us(loads: Sequence[Load], *, per_request: bool = False) -> float:
    """Microseconds of CPU for each chunk (or request), over all rounds; NaN where there was too little to measure."""
    cpu = sum(load.cpu_seconds for load in loads)
    count = sum(load.requests if per_request else load.chunks for load in loads)
    return 1e6 * cpu / count if cpu >= _LEAST_CPU_SECONDS else float("nan")


def rows(levels: Sequence[Level]) -> list[tuple[str, ...]]:
    """One line of the table for each number of streams and contestant."""
    lines: list[tuple[str, ...]] = []
    for level in levels:
        for name, choice in _CHOICES.items():
            loads = [choice(one) for one in level.rounds]
            added = None if name == _DIRECT else added_p99_ms(level, choice)
            first_byte, chunk = [load.first_byte for load in loads], [load.chunk for load in loads]
            lines.append(
                (
                    f"{level.streams} streams, {name}",
                    _n(statistics.median(spread.median_ms for spread in first_byte)),
                    _n(statistics.median(spread.p99_ms for spread in first_byte)),
                    "" if added is None else _n(added[0]),
                    _n(statistics.median(spread.median_ms for spread in chunk)),
                    _n(statistics.median(spread.p99_ms for spread in chunk)),
                    "" if added is None else _n(added[1]),
                    "" if name == _DIRECT else _n(cpu_us(loads)),
                )
            )
    return lines


def request_rows(level: Level) -> list[tuple[str, ...]]:
    """The lines of requests that are not streamed."""
    lines: list[tuple[str, ...]] = []
    for name, choice in _CHOICES.items():
        loads = [choice(one) for one in level.rounds]
        whole = [load.first_byte for load in loads]
        p50, p99 = (statistics.median(times) for times in zip(*((s.median_ms, s.p99_ms) for s in whole), strict=True))
        cpu = "" if name == _DIRECT else f"{_n(cpu_us(loads, per_request=True))} a request"
        lines.append((f"not streamed, {level.streams} connections, {name}", _n(p50), _n(p99), "", "", "", "", cpu))
    return lines


HEADER = (
    "median of the rounds",
    "first byte median, ms",
    "p99, ms",
    "added p99, ms",
    "chunk median, ms",
    "p99, ms",
    "added p99, ms",
    "CPU a chunk, us",
)


def summary(levels: Sequence[Level], requests: Level, *, judged: int) -> dict[str, report.Value]:
    """The last line: the figures at ``judged`` streams, above which engine and load take too much of the machine."""
    level = next(level for level in levels if level.streams == judged)
    first_byte, chunk = added_p99_ms(level, lambda one: one.ours)
    return {
        "ttfb_added_p99_ms": first_byte,
        "chunk_added_p99_ms": chunk,
        "cpu_per_chunk_vs_go": _against_peer(level.rounds, per_request=False),
        "cpu_per_request_vs_go": _against_peer(requests.rounds, per_request=True),
        "streams": judged,
    }


def _against_peer(rounds: Sequence[Round], *, per_request: bool) -> float:
    ours, peer = (
        cpu_us(loads, per_request=per_request) for loads in zip(*((r.ours, r.peer) for r in rounds), strict=True)
    )
    return ours / peer


_n = report.number
