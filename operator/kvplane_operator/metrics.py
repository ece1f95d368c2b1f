"""The operator's metrics, beside nothing else: registered once, incremented where things happen.

kvplane_operator_* are about the operator itself. kvplane_service_* say what the services and their pods look like to it,
read from its store at each scrape; they carry the namespace and the pod that they are about, so a Prometheus has to honour
their labels. So do kvplane_autoscaler_* that tell of a service; see ``scaling_metrics``.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from kvplane_api import names
from kvplane_operator.plan.snapshot import Kind
from kvplane_operator.scaling_metrics import AutoscalerCollector

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
for _kind in Kind:
    DRIFT_HEALED.labels(_kind.value)  # known from the start, so that the first one is an increase
STATE_POLLS: Final = Counter(
    "kvplane_operator_state_polls",
    "Reads of a pod's state from its sidecar, by result: answered, failed.",
    ("result",),
    registry=REGISTRY,
)
RING_PODS_DELETED: Final = Counter(
    "kvplane_operator_ring_pods_deleted",
    "Pods of ring groups that the operator deleted, by cause: renewed (a rollout), forced (a node that does not answer).",
    ("cause",),
    registry=REGISTRY,
)
for _cause in ("renewed", "forced"):
    RING_PODS_DELETED.labels(_cause)
AUTOSCALER_DECISION_SECONDS: Final = Histogram(
    "kvplane_autoscaler_decision_seconds",
    "Duration of one decision of the autoscaler on one service, from the signals on.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
AUTOSCALER_ROUND_SECONDS: Final = Histogram(
    "kvplane_autoscaler_round_seconds",
    "Time from asking the pods of one service for their state to the decision on it.",
    buckets=_SECONDS,
    registry=REGISTRY,
)
AUTOSCALER_ERRORS: Final = Counter(
    "kvplane_autoscaler_errors",
    "Rounds of the autoscaler that failed and are tried again.",
    registry=REGISTRY,
)
AUTOSCALER_STATE_WRITES: Final = Counter(
    "kvplane_autoscaler_state_writes",
    "Writes of what the autoscaler learned of a service to its ConfigMap, by result: written, failed.",
    ("result",),
    registry=REGISTRY,
)
for _result in ("written", "failed"):
    AUTOSCALER_STATE_WRITES.labels(_result)
LOOP_LAG: Final = Gauge(
    "kvplane_operator_event_loop_lag_seconds",
    "How late the last one-second tick of the event loop was.",
    registry=REGISTRY,
)

Manifests = Callable[[], Iterable[Mapping[str, Any]]]


class ServiceCollector(Collector):
    """The services' conditions and replicas, and the restarts of their containers, as the operator sees them now.

    A standby sees none and exports none. During a change of leader two operators may export the same series.
    """

    def __init__(self, *, services: Manifests, pods: Manifests) -> None:
        self._services = services
        self._pods = pods

    def describe(self) -> Iterable[Family]:
        """The families, empty."""
        return _service_families()

    def collect(self) -> Iterable[Family]:
        """The families, filled."""
        conditions, replicas, groups, exits, restarts = families = _service_families()
        for service in self._services():
            where = (service["metadata"]["namespace"], service["metadata"]["name"])
            status = service.get("status") or {}
            for condition in status.get("conditions") or ():
                if condition["status"] in _TRUTH:
                    labels = (*where, condition["type"], condition["reason"])
                    conditions.add_metric(labels, _TRUTH[condition["status"]])
            for state, count in (("desired", "desiredReplicas"), ("ready", "readyReplicas")):
                if count in status:
                    replicas.add_metric((*where, state), status[count])
            for pool in status.get("pools") or ():
                if pool["kind"] == "Ring":
                    for state, number in _ring_groups(pool).items():
                        groups.add_metric((*where, state), number)
                    for entry in pool.get("restarts") or ():
                        exits.add_metric((*where, str(entry["group"])), entry["count"])
        for pod in self._pods():
            metadata, status = pod["metadata"], pod["status"]
            where = (metadata["namespace"], metadata["labels"][names.LABEL_SERVICE])
            for kind in ("initContainerStatuses", "containerStatuses"):  # a native sidecar is an init container
                for container in status.get(kind) or ():
                    restarts.add_metric((*where, metadata["name"], container["name"]), container["restartCount"])
        return families


def _ring_groups(pool: Mapping[str, Any]) -> dict[str, int]:
    return {
        "formed": pool["ready"],
        "degraded": len(pool.get("degradedGroups") or ()),
        "failed": len(pool.get("failedGroups") or ()),
    }


def _service_families() -> tuple[
    GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily, GaugeMetricFamily, CounterMetricFamily
]:
    return (
        GaugeMetricFamily(
            "kvplane_service_condition",
            "Conditions of each LLMService: 1 for True, 0 for False; absent while it is Unknown.",
            labels=("namespace", "service", "condition", "reason"),
        ),
        GaugeMetricFamily(
            "kvplane_service_replicas",
            "Replicas of each LLMService by state: desired, and ready of these.",
            labels=("namespace", "service", "state"),
        ),
        GaugeMetricFamily(
            "kvplane_service_ring_groups",
            "Ring groups of each LLMService by state: formed (they serve), degraded (of these, with a rank less), failed "
            "(given up, their restart budget used).",
            labels=("namespace", "service", "state"),
        ),
        GaugeMetricFamily(
            "kvplane_service_ring_group_exits",
            "Exits of engines and sidecars that count against a ring group's restart budget now.",
            labels=("namespace", "service", "group"),
        ),
        CounterMetricFamily(
            "kvplane_service_container_restarts",
            "Restarts of the containers of each pod of an LLMService.",
            labels=("namespace", "service", "pod", "container"),
        ),
    )


_TRUTH: Final = {"True": 1.0, "False": 0.0}


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
    STATE_POLLS,
    RING_PODS_DELETED,
    LOOP_LAG,
    AUTOSCALER_DECISION_SECONDS,
    AUTOSCALER_ROUND_SECONDS,
    AUTOSCALER_ERRORS,
    AUTOSCALER_STATE_WRITES,
    ServiceCollector(services=tuple, pods=tuple),
    AutoscalerCollector(tuple),
)
"""All of them, in the order of the reference."""
