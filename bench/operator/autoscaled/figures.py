"""What was measured, and how it is told. Pure."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

from bench import report
from bench.operator.requests import Requests

ROUND = "kvplane_autoscaler_round_seconds"
"""The operator's histogram of ticks: one service's pods read, and one decision."""

Buckets = Mapping[float, float]
"""Counts up to a bound, by the bound."""


@dataclass(frozen=True)
class Window:
    """The operator over a time in which nothing changes."""

    seconds: float
    requests: Requests
    noise_per_second: float
    rss_mb: float
    cpu_cores: float
    rounds: Buckets
    busy_gaps: Sequence[float]
    """Seconds between two reads of one pod of a busy service, as the pods see it."""
    quiet_gaps: Sequence[float]

    def per_second(self) -> float:
        """Requests per second that the API server would not have had without the operator."""
        return self.requests.total() / self.seconds - self.noise_per_second


@dataclass(frozen=True)
class Outcome:
    """All of one run."""

    services: int
    pods: int
    window: Window
    busy: Sequence[float]
    """Seconds from the overload of a busy service to its Deployment with more replicas."""
    quiet: Sequence[float]
    """The same of services that had nothing to do before."""
    undecided: Sequence[str]
    """Services that had no decision while it was waited for; their seconds are infinite."""
    scrapes: int
    """Looks at the operator's metrics."""
    scrapes_failed: int


def buckets(exposition: str, histogram: str = ROUND) -> Buckets:
    """The counts of a histogram in the operator's metrics, all labels together."""
    counts: dict[float, float] = {}
    for family in text_string_to_metric_families(exposition):
        for sample in family.samples:
            if sample.name == f"{histogram}_bucket":
                bound = float(sample.labels["le"])
                counts[bound] = counts.get(bound, 0.0) + sample.value
    return counts


def since(after: Buckets, before: Buckets) -> Buckets:
    """What was added; nothing is known of it where nothing is known of before."""
    return {} if not before else {bound: count - before.get(bound, 0.0) for bound, count in after.items()}


def quantile(counts: Buckets, q: float) -> float:
    """By linear interpolation within the bucket, as Prometheus's histogram_quantile; nan where nothing was counted."""
    bounds = sorted(counts)
    if not bounds or not counts[bounds[-1]]:
        return math.nan
    rank, low, below = q * counts[bounds[-1]], 0.0, 0.0
    for bound in bounds:
        if counts[bound] >= rank:
            if math.isinf(bound):
                return low
            return low + (bound - low) * (rank - below) / (counts[bound] - below) if counts[bound] > below else low
        low, below = bound, counts[bound]
    return low


def waited(told: Mapping[str, float], decided: Mapping[str, float]) -> dict[str, float]:
    """Seconds from the overload of each service to its decision; infinite where none came, or before it: that one is not of it."""
    return {
        name: decided[name] - since if decided.get(name, -math.inf) >= since else math.inf
        for name, since in told.items()
    }


def last_line(outcome: Outcome) -> dict[str, report.Value]:
    """Of busy services the 99th percentile; of all the longest; infinite where it is that of a service without a decision."""
    return {
        "busy_decided_s": report.percentile(outcome.busy, 0.99),
        "all_decided_s": max([*outcome.busy, *outcome.quiet]),
        "cpu_cores": outcome.window.cpu_cores,
        "rss_mb": outcome.window.rss_mb,
        "requests_per_s": outcome.window.per_second(),
    }


def rows(outcome: Outcome) -> list[tuple[str, str]]:
    """Label and value of each line of the table."""
    window, n = outcome.window, report.number
    kinds = list(window.requests.by_kind().items())[:5]
    return [
        ("services / pods", f"{outcome.services:,} / {outcome.pods:,}"),
        ("steady: CPU, cores", n(window.cpu_cores)),
        ("steady: RSS, MB", n(window.rss_mb)),
        ("steady: requests/s", n(window.per_second())),
        ("… most of them", ", ".join(f"{kind} {n(count / window.seconds)}/s" for kind, count in kinds)),
        ("tick: p50 / p99, ms", " / ".join(n(1000 * quantile(window.rounds, q)) for q in (0.5, 0.99))),
        ("between two reads, busy: median / p99, s", _spread(window.busy_gaps)),
        ("between two reads, quiet: median / p99, s", _spread(window.quiet_gaps)),
        ("overload → Deployment, busy: median / p99 / most, s", _spread(outcome.busy, most=True)),
        ("overload → Deployment, quiet before: median / p99 / most, s", _spread(outcome.quiet, most=True)),
        ("… without a decision", f"{len(outcome.undecided)} of {len(outcome.busy) + len(outcome.quiet)}"),
        ("scrapes that failed", f"{outcome.scrapes_failed} of {outcome.scrapes}"),
    ]


def _spread(samples: Sequence[float], *, most: bool = False) -> str:
    found = report.distribution(samples)
    values = [found.median, found.p99, *([found.largest] if most else [])]
    return " / ".join(report.number(value) for value in values)
