"""What the autoscaler exports: every input and output of its last decision on each service, read at each scrape.

A standby has decided nothing and exports nothing. What is not known is absent.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from kvplane_operator.autoscaler.law import Decision, Reason
from kvplane_operator.autoscaler.settings import Settings
from kvplane_operator.autoscaler.signals import Signals

Sample = tuple[str, tuple[str, ...], float | None]
"""Name of a family, its labels but for the service's, and the value."""


@dataclass
class Counts:
    """What was decided so far on one service, by this leader."""

    decisions: Counter[Reason] = field(default_factory=Counter)
    up: int = 0
    down: int = 0
    reversals: int = 0
    last: int = 0
    """Direction of the last change, above or below 0; 0: none yet."""

    def note(self, reason: Reason, change: int) -> None:
        """One more decision, and by how many replicas it differs from what was there."""
        self.decisions[reason] += 1
        if not change:
            return
        self.up += change > 0
        self.down += change < 0
        self.reversals += self.last * change < 0
        self.last = change


@dataclass(frozen=True)
class Report:
    """The last decision on one service."""

    namespace: str
    service: str
    settings: Settings
    signals: Signals
    decision: Decision
    at: float
    """In seconds since the epoch."""
    counts: Counts


_OF_SERVICE: Final = ("namespace", "service")
_PREFIX: Final = "kvplane_autoscaler_"

_GAUGES: Final[tuple[tuple[str, str, tuple[str, ...]], ...]] = (
    ("desired_replicas", "Replicas that there should be; with policy External, for another scaler to follow.", ()),
    (
        "replicas",
        "Replicas by state: asked, ready, pending (not ready yet), refused (of these, and another one would be too), draining.",
        ("state",),
    ),
    ("limit_replicas", "Bounds of autoscaling, by limit: min, max.", ("limit",)),
    ("demand_replicas", "Replicas that the work of now would fill.", ()),
    (
        "demand_cause_replicas",
        "Demand by cause: KV memory held, queued, shed (refused); prefill (the greater of it and KV memory counts); waste "
        "(work done again while an engine thrashes).",
        ("cause",),
    ),
    ("forecast_replicas", "Demand that is expected when a replica asked for now would serve.", ()),
    (
        "forecast_method_replicas",
        "Forecasts by method: persistence, trend, yesterday, recent. The highest of those that have proved no worse than "
        "persistence counts.",
        ("method",),
    ),
    ("horizon_seconds", "Time until a replica that is asked for now would serve.", ()),
    (
        "startup_p90_seconds",
        "90th percentile of the measured start-ups, by image: cached (on the node before), pulled (or not known).",
        ("image",),
    ),
    ("usable_ratio", "Share of a replica's KV memory that is planned with, as learned.", ()),
    ("prefill_tokens_per_second", "Prompt tokens that a replica computes per second, as learned.", ()),
    ("fastest_prompt_tokens_per_second", "The most prompt tokens per second that one replica was seen to compute.", ()),
    (
        "prompt_margin",
        "Room that prompts are given beside their work R, in replicas: this times the root of R. Absent while nothing says that "
        "room is short.",
        (),
    ),
    ("residence_seconds", "Time that a request stays in an engine, as learned.", ()),
    ("kv_tokens", "KV memory of the replicas that were read, by state: capacity, held, queued.", ("state",)),
    ("requests", "Requests at the replicas that were read, by state: running, queued.", ("state",)),
    ("requests_per_second", "Requests by result: admitted, refused.", ("result",)),
    (
        "tokens_per_second",
        "Tokens by kind: prompt (computed), generation, shed (KV memory that refused requests would have taken), wasted.",
        ("kind",),
    ),
    (
        "answers_per_second",
        "Answers that came whole, by what became of the promises in spec.slo: kept, broken.",
        ("promises",),
    ),
    ("signals_missing", "Replicas that serve and whose signals are missing.", ()),
    ("active", "1 while replicas can go both ways as far as signals are concerned, else 0.", ()),
    ("panic", "1 while an overload is seen, or was a start-up ago, so that nothing goes down; else 0.", ()),
    ("decision_age_seconds", "Time since the last decision.", ()),
)
_COUNTERS: Final[tuple[tuple[str, str, tuple[str, ...]], ...]] = (
    ("decisions", "Decisions by reason, those that change nothing included.", ("reason",)),
    ("changes", "Decisions that changed the replicas, by direction: up, down.", ("direction",)),
    ("reversals", "Changes in the opposite direction of the last one.", ()),
)


class AutoscalerCollector(Collector):
    """The last decision on each service."""

    def __init__(self, reports: Callable[[], Iterable[Report]], *, clock: Callable[[], float] = time.time) -> None:
        self._reports = reports
        self._clock = clock

    def describe(self) -> Iterable[Family]:
        """The families, empty."""
        gauges, counters = _families()
        return (*gauges.values(), *counters.values())

    def collect(self) -> Iterable[Family]:
        """The families, filled."""
        gauges, counters = _families()
        for report in self._reports():
            where = (report.namespace, report.service)
            for name, labels, value in _gauge_samples(report, self._clock()):
                if value is not None:
                    gauges[name].add_metric((*where, *labels), value)
            for name, labels, value in _counter_samples(report.counts):
                if value is not None:
                    counters[name].add_metric((*where, *labels), value)
        return (*gauges.values(), *counters.values())


def _families() -> tuple[dict[str, GaugeMetricFamily], dict[str, CounterMetricFamily]]:
    return (
        {
            name: GaugeMetricFamily(_PREFIX + name, meaning, labels=(*_OF_SERVICE, *labels))
            for name, meaning, labels in _GAUGES
        },
        {
            name: CounterMetricFamily(_PREFIX + name, meaning, labels=(*_OF_SERVICE, *labels))
            for name, meaning, labels in _COUNTERS
        },
    )


def _gauge_samples(report: Report, now: float) -> Iterator[Sample]:
    signals, decision, settings = report.signals, report.decision, report.settings
    yield "desired_replicas", (), decision.desired
    yield "replicas", ("asked",), signals.asked
    yield "replicas", ("ready",), len(signals.ready)
    yield "replicas", ("pending",), len(signals.pending)
    yield "replicas", ("refused",), sum(replica.refused for replica in signals.pending)
    yield "replicas", ("draining",), sum(replica.draining for replica in signals.replicas)
    yield "limit_replicas", ("min",), settings.min_replicas
    yield "limit_replicas", ("max",), settings.max_replicas
    yield "signals_missing", (), len(signals.unread)
    yield "active", (), float(decision.active)
    yield "panic", (), float(decision.panic)
    yield "decision_age_seconds", (), max(0.0, now - report.at)
    yield from _expected(decision)
    yield from _learned(decision)
    yield from _read(signals, decision)


def _expected(decision: Decision) -> Iterator[Sample]:
    demand = decision.demand
    yield "demand_replicas", (), demand.total
    for cause in ("held", "queued", "shed", "prefill", "waste"):
        yield "demand_cause_replicas", (cause,), getattr(demand, cause)
    yield "forecast_replicas", (), decision.forecast.demand
    for method, value in decision.forecast.values.items():
        yield "forecast_method_replicas", (method.name.lower(),), value
    yield "horizon_seconds", (), decision.horizon_seconds


def _learned(decision: Decision) -> Iterator[Sample]:
    learned, starts = decision.history.learned, decision.history.starts
    yield "usable_ratio", (), learned.usable.share
    yield "prefill_tokens_per_second", (), learned.prefill_tokens_per_second
    yield "fastest_prompt_tokens_per_second", (), learned.room.fastest
    yield "prompt_margin", (), decision.demand.margin
    yield "residence_seconds", (), learned.residence_seconds
    for image, cached, samples in (("cached", True, starts.cached), ("pulled", False, starts.pulled)):
        if samples:
            yield "startup_p90_seconds", (image,), starts.p90(cached, unknown=0.0)


def _read(signals: Signals, decision: Decision) -> Iterator[Sample]:
    """Sums over the replicas that were read; nothing where none was."""
    readings = [replica.reading for replica in signals.ready if replica.reading is not None]
    rates = [meter.rates for meter in decision.history.meters.values()]
    yield "kv_tokens", ("capacity",), _sum(readings, "capacity_tokens")
    yield "kv_tokens", ("held",), _sum(readings, "held_tokens")
    yield "kv_tokens", ("queued",), _sum(readings, "queued_tokens")
    yield "requests", ("running",), _sum(readings, "running")
    yield "requests", ("queued",), _sum(readings, "queued")
    yield "requests_per_second", ("admitted",), _sum(rates, "admitted")
    yield "requests_per_second", ("refused",), _sum(rates, "refused")
    yield "tokens_per_second", ("prompt",), _sum(rates, "prompt_tokens")
    yield "tokens_per_second", ("generation",), _sum(rates, "generation_tokens")
    yield "tokens_per_second", ("shed",), _sum(rates, "shed_tokens")
    yield "answers_per_second", ("kept",), _sum(rates, "kept")
    yield "answers_per_second", ("broken",), _sum(rates, "broken")
    yield "tokens_per_second", ("wasted",), _sum(readings, "wasted_tokens_per_second")


def _sum(items: Iterable[object], name: str) -> float | None:
    """Of what is known; None where nothing is."""
    known = [value for item in items if (value := getattr(item, name)) is not None]
    return sum(known) if known else None


def _counter_samples(counts: Counts) -> Iterator[Sample]:
    for reason, count in counts.decisions.items():
        yield "decisions", (reason.value,), count
    yield "changes", ("up",), counts.up
    yield "changes", ("down",), counts.down
    yield "reversals", (), counts.reversals
