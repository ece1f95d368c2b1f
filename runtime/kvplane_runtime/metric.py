"""Metrics as a process exports them: an entry of its table, and what a scrape gets to see of the values known then."""

import enum
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric as Family

from kvplane_runtime.histogram import Histogram

LABEL_MODEL: Final = "model_name"

Samples = Mapping[tuple[str, ...], float | Histogram]
"""Values by the values of the metric's own labels."""


class Kind(enum.StrEnum):
    """What Prometheus is told that a metric is."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


_FAMILIES: Final = {
    Kind.GAUGE: GaugeMetricFamily,
    Kind.COUNTER: CounterMetricFamily,
    Kind.HISTOGRAM: HistogramMetricFamily,
}


@dataclass(frozen=True, slots=True)
class Metric:
    """One metric as it is exported and documented."""

    name: str
    """With the prefix, without ``_total``."""
    kind: Kind
    description: str
    labels: tuple[str, ...] = ()
    """Beside ``model_name``, which every metric has."""
    source: str = ""
    """Where the value comes from, if it is not the process's own; the names an engine version may use, newest first."""

    @property
    def exported_name(self) -> str:
        """As it stands in the exposition."""
        return f"{self.name}_total" if self.kind is Kind.COUNTER else self.name

    def family(self) -> Family:
        """An empty family to add samples to."""
        family: Family = _FAMILIES[self.kind](self.name, self.description, labels=(*self.labels, LABEL_MODEL))
        return family


def families(known: Iterable[tuple[Metric, Samples]], *, served_name: str) -> Iterator[Family]:
    """What ``known`` has samples of, with the model's name on each."""
    for metric, samples in known:
        if samples:
            family = metric.family()
            for labels, value in samples.items():
                _add(family, (*labels, served_name), value)
            yield family


def _add(family: Family, labels: tuple[str, ...], value: float | Histogram) -> None:
    match family:
        case HistogramMetricFamily():
            assert isinstance(value, Histogram)  # noqa: S101  (the table pairs them)
            family.add_metric(labels, buckets=list(value.buckets), sum_value=value.sum)
        case GaugeMetricFamily() | CounterMetricFamily():
            assert not isinstance(value, Histogram)  # noqa: S101  (the table pairs them)
            family.add_metric(labels, value)
