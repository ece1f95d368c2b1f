"""What the operator exports of its services: read from what it sees, absent where it is not known."""

from typing import Any

from prometheus_client import CollectorRegistry

from kvplane_api import names
from kvplane_operator import metrics
from kvplane_operator.plan.snapshot import Kind

CHAT = {"namespace": "team", "service": "chat"}


def service(**status: Any) -> dict[str, Any]:
    return {"metadata": {"namespace": "team", "name": "chat"}, "status": status}


def pod(name: str, **restarts: int) -> dict[str, Any]:
    statuses = [{"name": container.replace("_", "-"), "restartCount": n} for container, n in restarts.items()]
    return {
        "metadata": {"namespace": "team", "name": name, "labels": {names.LABEL_SERVICE: "chat"}},
        "status": {"initContainerStatuses": statuses[:1], "containerStatuses": statuses[1:]},
    }


def exported(*, services: tuple[Any, ...] = (), pods: tuple[Any, ...] = ()) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(metrics.ServiceCollector(services=lambda: services, pods=lambda: pods))
    return registry


def condition(registry: CollectorRegistry, kind: str, reason: str) -> float | None:
    return registry.get_sample_value("kvplane_service_condition", {**CHAT, "condition": kind, "reason": reason})


def test_conditions_are_1_0_or_absent() -> None:
    conditions = [
        {"type": "Ready", "status": "True", "reason": "Serving"},
        {"type": "Degraded", "status": "False", "reason": "AsAsked"},
        {"type": "SignalsFresh", "status": "Unknown", "reason": "NoReplicas"},
    ]
    registry = exported(services=(service(conditions=conditions),))
    assert condition(registry, "Ready", "Serving") == 1
    assert condition(registry, "Degraded", "AsAsked") == 0
    assert condition(registry, "SignalsFresh", "NoReplicas") is None


def test_replicas_are_those_of_the_status() -> None:
    registry = exported(services=(service(desiredReplicas=3, readyReplicas=0),))
    count = {
        s: registry.get_sample_value("kvplane_service_replicas", {**CHAT, "state": s}) for s in ("desired", "ready")
    }
    assert count == {"desired": 3, "ready": 0}


def test_ring_groups_are_counted_by_state() -> None:
    restarts = [{"group": 1, "count": 6, "windowStart": "2026-01-01T12:00:00Z", "pods": []}]
    pool = {"kind": "Ring", "ready": 2, "degradedGroups": [0], "failedGroups": [1], "restarts": restarts}
    registry = exported(services=(service(pools=[pool, {"kind": "Paged", "ready": 1}]),))
    count = {
        state: registry.get_sample_value("kvplane_service_ring_groups", {**CHAT, "state": state})
        for state in ("formed", "degraded", "failed")
    }
    assert count == {"formed": 2, "degraded": 1, "failed": 1}
    assert registry.get_sample_value("kvplane_service_ring_group_exits", {**CHAT, "group": "1"}) == 6


def test_a_paged_service_has_no_ring_groups() -> None:
    registry = exported(services=(service(pools=[{"kind": "Paged", "ready": 1}]),))
    assert registry.get_sample_value("kvplane_service_ring_groups", {**CHAT, "state": "formed"}) is None


def test_a_service_that_was_never_reconciled_has_no_series() -> None:
    registry = exported(services=({"metadata": {"namespace": "team", "name": "chat"}},))
    assert [sample for family in registry.collect() for sample in family.samples] == []


def test_restarts_are_those_of_each_container() -> None:
    registry = exported(pods=(pod("chat-1", kvplane_sidecar=1, engine=4), pod("chat-2")))
    restarts = {
        container: registry.get_sample_value(
            "kvplane_service_container_restarts_total", {**CHAT, "pod": "chat-1", "container": container}
        )
        for container in ("kvplane-sidecar", "engine")
    }
    assert restarts == {"kvplane-sidecar": 1, "engine": 4}


def test_a_kind_that_was_never_healed_counts_from_0() -> None:
    """Else the first time would be no increase."""
    for kind in Kind:
        value = metrics.REGISTRY.get_sample_value("kvplane_operator_drift_healed_total", {"kind": kind.value})
        assert value is not None
