"""The operator's own metrics, beside nothing else: registered once, incremented where things happen."""

from typing import Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

REGISTRY: Final = CollectorRegistry()

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)

RECONCILE_SECONDS: Final = Histogram(
    "kvplane_operator_reconcile_seconds",
    "Duration of one reconcile of one service, API requests included.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
RECONCILE_ERRORS: Final = Counter(
    "kvplane_operator_reconcile_errors",
    "Reconciles that failed and are tried again after a back-off.",
    registry=REGISTRY,
)
QUEUE_DEPTH: Final = Gauge("kvplane_operator_queue_depth", "Services that wait for a worker.", registry=REGISTRY)
QUEUE_SECONDS: Final = Histogram(
    "kvplane_operator_queue_seconds",
    "Time from an event to the start of the reconcile it causes.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
API_REQUESTS: Final = Counter(
    "kvplane_operator_api_requests",
    "Requests of the operator to the API server, watches not counted, by verb, kind and status code (0: no answer).",
    ("verb", "kind", "code"),
    registry=REGISTRY,
)
API_SECONDS: Final = Histogram(
    "kvplane_operator_api_request_seconds",
    "Duration of requests of the operator to the API server.",
    ("verb",),
    buckets=_SECONDS,
    registry=REGISTRY,
)
SERVICES: Final = Gauge("kvplane_operator_services", "LLMServices in the operator's care.", registry=REGISTRY)
LEADING: Final = Gauge(
    "kvplane_operator_leading", "1 while this process holds the leader Lease, else 0.", registry=REGISTRY
)
DRIFT_HEALED: Final = Counter(
    "kvplane_operator_drift_healed",
    "Children that another writer changed and the operator wrote again, by kind.",
    ("kind",),
    registry=REGISTRY,
)
LOOP_LAG: Final = Gauge(
    "kvplane_operator_event_loop_lag_seconds",
    "How late the last one-second tick of the event loop was.",
    registry=REGISTRY,
)

METRICS: Final = (
    RECONCILE_SECONDS,
    RECONCILE_ERRORS,
    QUEUE_DEPTH,
    QUEUE_SECONDS,
    API_REQUESTS,
    API_SECONDS,
    SERVICES,
    LEADING,
    DRIFT_HEALED,
    LOOP_LAG,
)
"""All of them, in the order of the reference."""
