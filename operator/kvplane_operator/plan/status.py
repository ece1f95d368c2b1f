"""The wanted status: counts, and the conditions that tell a newcomer what is going on.

What a pool says of itself is a ``Told``: that of the paged pool is made here, that of rings in ``ring.status``.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from kvplane_api import names
from kvplane_api.conditions import Condition, Reason, Type, merge
from kvplane_api.service import LLMServiceSpec
from kvplane_operator.plan.capacity import Figures
from kvplane_operator.plan.findings import Finding, findings, over
from kvplane_operator.plan.mode import Mode
from kvplane_operator.plan.pods import selector
from kvplane_operator.plan.scaling import at_zero
from kvplane_operator.plan.signals import Signals, admission_impaired, fresh
from kvplane_operator.plan.snapshot import Kind, Ref, Snapshot

DEFAULT_STARTUP_SECONDS = 3600
"""engine.startupTimeoutSeconds where the spec cannot be read."""


@dataclass(frozen=True)
class Told:
    """What one pool says of itself."""

    mode: Mode
    replicas: int
    ready: int
    desired: int
    selector: Mapping[str, str]
    """Of the pods that count as replicas."""
    pool: Mapping[str, Any]
    """Its entry in ``status.pools``, without the figures."""
    conditions: tuple[Condition, ...]


def wanted_status(
    snapshot: Snapshot, told: Told, *, figures: Figures, others: Sequence[Mapping[str, Any]] = (), now: datetime
) -> dict[str, Any]:
    """The whole status as it should be; None for what should not be there. ``others``: pools that do not serve yet."""
    return {
        "observedGeneration": snapshot.generation,
        "mode": told.mode,
        "endpoint": f"http://{snapshot.name}.{snapshot.namespace}.svc:{names.PORT_SERVING}/v1",
        "replicas": told.replicas,
        "readyReplicas": told.ready,
        "desiredReplicas": told.desired,
        "selector": ",".join(f"{key}={value}" for key, value in sorted(told.selector.items())),
        "pools": [{**told.pool, **figures.pool}, *(dict(pool) for pool in others)],
        "capacity": figures.service,
        "conditions": merge(
            snapshot.status.get("conditions") or (), told.conditions, generation=snapshot.generation, now=now
        ),
    }


def paged(
    snapshot: Snapshot, spec: LLMServiceSpec | None, *, accepted: Condition, scaling: Condition, signals: Signals
) -> Told:
    """What the paged pool says of itself."""
    deployment = snapshot.children.get(Ref(Kind.DEPLOYMENT, snapshot.name), {})
    counts: Mapping[str, Any] = deployment.get("status", {})
    ready, replicas = int(counts.get("readyReplicas", 0)), int(counts.get("replicas", 0))
    desired = spec.replicas if spec else int(snapshot.status.get("desiredReplicas", 0))
    conditions = _conditions(
        snapshot, spec, deployment, accepted=accepted, scaling=scaling, signals=signals, desired=desired
    )
    pool = {"name": snapshot.name, "kind": "Paged", "replicas": replicas, "ready": ready}
    return Told("Paged", replicas, ready, desired, selector(snapshot.name), pool, tuple(conditions))


def status_patch(observed: Mapping[str, Any], wanted: Mapping[str, Any]) -> dict[str, Any]:
    """JSON merge patch (RFC 7396) that makes ``wanted`` of ``observed``; empty if it is, so that nothing is written."""
    patch: dict[str, Any] = {}
    for key, value in wanted.items():
        held = observed.get(key)
        if value == held:
            continue
        if isinstance(value, Mapping) and isinstance(held, Mapping):
            patch[key] = status_patch(held, {**dict.fromkeys(held), **value})
        else:
            patch[key] = value
    return patch


def _conditions(
    snapshot: Snapshot,
    spec: LLMServiceSpec | None,
    deployment: Mapping[str, Any],
    *,
    accepted: Condition,
    scaling: Condition,
    signals: Signals,
    desired: int,
) -> list[Condition]:
    timeout = spec.engine.startup_timeout_seconds if spec else DEFAULT_STARTUP_SECONDS
    # What ended a pod for good is told until another one serves in its place, and not for as long as its object stays.
    replaced = int(deployment.get("status", {}).get("readyReplicas", 0)) >= desired
    pods = tuple(pod for pod in snapshot.pods if not (replaced and over(pod)))
    found = findings(pods, startup_timeout_seconds=timeout)
    available = _available(deployment, found, desired=desired, accepted=accepted, asleep=at_zero(spec))
    progressing = _progressing(deployment, found, desired=desired, serving=available.status == "True")
    degraded = _degraded(
        deployment,
        found,
        desired=desired,
        available=available,
        progressing=progressing,
        impaired=admission_impaired(signals, snapshot),
    )
    ready = roll_up(accepted, available, progressing, degraded)
    return [accepted, available, progressing, degraded, fresh(signals, snapshot), scaling, ready]


def _available(
    deployment: Mapping[str, Any], found: list[Finding], *, desired: int, accepted: Condition, asleep: str
) -> Condition:
    kind = Type.AVAILABLE
    serving = int(deployment.get("status", {}).get("readyReplicas", 0))
    if serving:
        return Condition(kind, "True", Reason.MINIMUM_REPLICAS_AVAILABLE, f"{serving} of {desired} replicas serve.")
    if not deployment and accepted.status == "False":
        return Condition(kind, "False", Reason.NOT_RECONCILED, f"Nothing runs: {accepted.message}")
    if not desired:
        return Condition(kind, "False", Reason.SCALED_TO_ZERO, asleep)
    if refused := _deployment_condition(deployment, "ReplicaFailure", "True"):
        return Condition(
            kind, "False", Reason.PODS_REFUSED, f"The API server refuses the pods: {refused.get('message', '')}"
        )
    if found:
        return Condition(kind, "False", found[0].reason, found[0].message)
    return Condition(kind, "False", Reason.STARTING, "The pods are being created.")


def _progressing(deployment: Mapping[str, Any], found: list[Finding], *, desired: int, serving: bool) -> Condition:
    kind = Type.PROGRESSING
    if not deployment:
        return Condition(kind, "False", Reason.STABLE, "Nothing is being changed.")
    status = deployment.get("status", {})
    current = int(status.get("observedGeneration", 0)) >= int(deployment["metadata"].get("generation", 1))
    updated, replicas = int(status.get("updatedReplicas", 0)), int(status.get("replicas", 0))
    available = int(status.get("availableReplicas", 0))
    if current and updated == replicas == available == desired:
        return Condition(kind, "False", Reason.STABLE, "Everything asked for is there.")
    rolling = current and replicas > updated
    if rolling and serving and found:
        # The old pods serve on, and the new ones do not come up: say why, and what gets it going.
        worst = found[0]
        if worst.reason is Reason.UNSCHEDULABLE:
            return Condition(
                kind,
                "False",
                Reason.NO_ROOM_FOR_SURGE,
                f"{worst.message} The rollout waits for room for its surge pod: free some, or set rollout.maxSurge: 0 and "
                "maxUnavailable: 1.",
            )
        if worst.crash or worst.reason in (Reason.IMAGE_PULL_FAILED, Reason.CONTAINER_CONFIG_ERROR):
            return Condition(kind, "False", Reason.ROLLOUT_STALLED, f"The old pods serve on. {worst.message}")
    if rolling:
        return Condition(kind, "True", Reason.ROLLING_OUT, f"{updated} of {desired} replicas have the newest template.")
    return Condition(kind, "True", Reason.SCALING, f"{available} of {desired} replicas are available.")


def _degraded(
    deployment: Mapping[str, Any],
    found: list[Finding],
    *,
    desired: int,
    available: Condition,
    progressing: Condition,
    impaired: str | None,
) -> Condition:
    kind = Type.DEGRADED
    if available.status != "True":
        return Condition(kind, "False", Reason.NOT_SERVING, "Nothing serves; see Available.")
    serving = int(deployment.get("status", {}).get("readyReplicas", 0))
    if crash := next((f for f in found if f.crash), None):
        return Condition(kind, "True", Reason.CRASH_LOOPING, crash.message)
    if serving < desired and progressing.reason is not Reason.ROLLING_OUT:
        why = f" {found[0].message}" if found else ""
        if refused := _deployment_condition(deployment, "ReplicaFailure", "True"):
            why = f" The API server refuses further pods: {refused.get('message', '')}"
        return Condition(kind, "True", Reason.REPLICAS_MISSING, f"{serving} of {desired} replicas serve.{why}")
    if impaired is not None:
        return Condition(kind, "True", Reason.ADMISSION_IMPAIRED, impaired)
    return Condition(kind, "False", Reason.AS_ASKED, "Nothing is missing.")


def roll_up(acceptance: Condition, available: Condition, progressing: Condition, degraded: Condition) -> Condition:
    """The condition Ready."""
    kind = Type.READY
    if acceptance.status == "False":
        return Condition(kind, "False", acceptance.reason, acceptance.message)
    if available.status != "True":
        return Condition(kind, "False", available.reason, available.message)
    if degraded.status == "True":
        return Condition(kind, "False", degraded.reason, degraded.message)
    if progressing.reason in (Reason.NO_ROOM_FOR_SURGE, Reason.ROLLOUT_STALLED):
        return Condition(kind, "False", progressing.reason, progressing.message)
    return Condition(kind, "True", Reason.SERVING, available.message)


def _deployment_condition(deployment: Mapping[str, Any], kind: str, status: str) -> Mapping[str, Any] | None:
    conditions = deployment.get("status", {}).get("conditions", ())
    return next((c for c in conditions if c["type"] == kind and c["status"] == status), None)
