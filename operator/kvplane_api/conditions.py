"""Condition types and their reasons, as users and alerts see them, and the one function that sets them.

A condition is an adjective about the service; its reason is one of the constants here, its message a sentence that says
what to do. Reasons are API: renaming one breaks somebody's alert.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any, Final, Literal

Status = Literal["True", "False", "Unknown"]


class Type(StrEnum):
    """Types of the conditions of an LLMService, in the order in which they are shown."""

    ACCEPTED = "Accepted"
    AVAILABLE = "Available"
    PROGRESSING = "Progressing"
    DEGRADED = "Degraded"
    READY = "Ready"


class Reason(StrEnum):
    """Why a condition has its status. The comment says which type and status a reason goes with."""

    # Accepted
    VALID = "Valid"  # True: the spec is valid and, as far as known before a start, feasible
    INVALID_SPEC = "InvalidSpec"  # False: this operator cannot read the spec (a CRD newer than the operator, say)
    CONTEXT_EXCEEDS_CAPACITY = (
        "ContextExceedsCapacity"  # False: by model.facts, context.maxTokens does not fit one replica
    )
    RING_NOT_AVAILABLE = "RingNotAvailable"  # False: mode Auto would choose a ring, which this version cannot run
    PATH_NOT_ALLOWED = "PathNotAllowed"  # False: a path:// source where the installation does not allow hostPath
    CHILD_CONFLICT = "ChildConflict"  # False: an object that is not ours has the name of a child
    CHILD_REJECTED = "ChildRejected"  # False: the API server refused a child; the message is its own

    # Available
    MINIMUM_REPLICAS_AVAILABLE = "MinimumReplicasAvailable"  # True: at least one replica serves
    SCALED_TO_ZERO = "ScaledToZero"  # False: no replica is asked for
    STARTING = "Starting"  # False: replicas are being scheduled, pulled or loaded
    UNSCHEDULABLE = "Unschedulable"  # False: no node fits; the message is the scheduler's
    IMAGE_PULL_FAILED = "ImagePullFailed"  # False: an image cannot be pulled
    ENGINE_CRASHED = "EngineCrashed"  # False: the engine exits; the message has its exit code and last log lines
    SIDECAR_CRASHED = "SidecarCrashed"  # False: the sidecar exits
    OUT_OF_MEMORY = "OOMKilled"  # False: the kernel killed a container for memory
    CONTAINER_CONFIG_ERROR = "ContainerConfigError"  # False: a Secret or ConfigMap the pod refers to is missing, ...
    VOLUME_NOT_READY = "VolumeNotReady"  # False: a claim is missing or unbound
    PODS_REFUSED = "PodsRefused"  # False: the API server refuses the pods (pod security, quota)
    STARTUP_TIMED_OUT = "StartupTimedOut"  # False: the engine did not come up within engine.startupTimeoutSeconds
    NOT_RECONCILED = "NotReconciled"  # Unknown: nothing was applied, since the spec is not accepted

    # Progressing
    ROLLING_OUT = "RollingOut"  # True: pods of the newest template are being brought up
    SCALING = "Scaling"  # True: the number of replicas is changing
    STABLE = "Stable"  # False: everything asked for is there
    NO_ROOM_FOR_SURGE = "NoRoomForSurge"  # False: a rollout waits for a node that can hold the surge pod
    ROLLOUT_STALLED = "RolloutStalled"  # False: pods of the new template do not come up; the old ones serve on

    # Degraded
    AS_ASKED = "AsAsked"  # False: nothing is missing
    REPLICAS_MISSING = "ReplicasMissing"  # True: serving, with fewer replicas than asked
    CRASH_LOOPING = "CrashLooping"  # True: serving, while a replica crashes again and again
    NOT_SERVING = "NotServing"  # False: Available says why

    # Ready
    SERVING = "Serving"  # True: accepted, available, and as asked


MESSAGE_LIMIT: Final = 2048
"""Characters of a message kept in status; a crash's last log lines are cut at the front, where they say least."""


@dataclass(frozen=True)
class Condition:
    """One wanted condition; the transition time is added by ``merge``."""

    type: Type
    status: Status
    reason: Reason
    message: str


def merge(
    observed: Iterable[Mapping[str, Any]], wanted: Sequence[Condition], *, generation: int, now: datetime
) -> list[dict[str, Any]]:
    """Wanted conditions as they stand in status: ``lastTransitionTime`` moves only when the status does.

    Conditions of types that are not wanted are kept as they are: they may be another controller's.
    """
    before = {c["type"]: c for c in observed}
    stamp = now.strftime("%Y-%m-%dT%H:%M:%SZ")
    merged = []
    for condition in wanted:
        old = before.pop(condition.type.value, None)
        same = old is not None and old.get("status") == condition.status
        merged.append(
            {
                "type": condition.type.value,
                "status": condition.status,
                "reason": condition.reason.value,
                "message": condition.message[:MESSAGE_LIMIT],
                "observedGeneration": generation,
                "lastTransitionTime": old["lastTransitionTime"] if same and old else stamp,
            }
        )
    return [*merged, *(dict(c) for c in before.values())]


def status_of(conditions: Iterable[Mapping[str, Any]], kind: Type) -> str | None:
    """Status of the condition of that type, None where it is not set."""
    return next((str(c["status"]) for c in conditions if c["type"] == kind.value), None)
