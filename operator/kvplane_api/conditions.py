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
    SIGNALS_FRESH = "SignalsFresh"
    SCALING_ACTIVE = "ScalingActive"
    READY = "Ready"


class Reason(StrEnum):
    """Why a condition has its status; ``MEANINGS`` says which condition and status a reason goes with, and what to do."""

    VALID = "Valid"
    INVALID_SPEC = "InvalidSpec"
    CONTEXT_EXCEEDS_CAPACITY = "ContextExceedsCapacity"
    RING_NOT_AVAILABLE = "RingNotAvailable"
    RING_SIZE_UNKNOWN = "RingSizeUnknown"
    UNSUPPORTED_BY_RING = "UnsupportedByRing"
    PATH_NOT_ALLOWED = "PathNotAllowed"
    CHILD_CONFLICT = "ChildConflict"
    CHILD_REJECTED = "ChildRejected"

    MINIMUM_REPLICAS_AVAILABLE = "MinimumReplicasAvailable"
    SCALED_TO_ZERO = "ScaledToZero"
    STARTING = "Starting"
    UNSCHEDULABLE = "Unschedulable"
    IMAGE_PULL_FAILED = "ImagePullFailed"
    ENGINE_CRASHED = "EngineCrashed"
    SIDECAR_CRASHED = "SidecarCrashed"
    OUT_OF_MEMORY = "OOMKilled"
    CONTAINER_CONFIG_ERROR = "ContainerConfigError"
    VOLUME_NOT_READY = "VolumeNotReady"
    PODS_REFUSED = "PodsRefused"
    STARTUP_TIMED_OUT = "StartupTimedOut"
    NOT_RECONCILED = "NotReconciled"
    RESTART_BUDGET_EXHAUSTED = "RestartBudgetExhausted"

    ROLLING_OUT = "RollingOut"
    SCALING = "Scaling"
    STABLE = "Stable"
    NO_ROOM_FOR_SURGE = "NoRoomForSurge"
    ROLLOUT_STALLED = "RolloutStalled"
    CHANGING_MODE = "ChangingMode"
    RE_FORMING = "ReForming"

    AS_ASKED = "AsAsked"
    REPLICAS_MISSING = "ReplicasMissing"
    CRASH_LOOPING = "CrashLooping"
    RING_DEGRADED = "RingDegraded"
    ADMISSION_IMPAIRED = "AdmissionImpaired"
    NOT_SERVING = "NotServing"

    SIGNALS_READ = "SignalsRead"
    SIGNALS_PENDING = "SignalsPending"
    NO_SERVING_PODS = "NoServingPods"
    SIGNAL_MISSING = "SignalMissing"
    SIGNALS_STALE = "SignalsStale"
    SIDECAR_UNREACHABLE = "SidecarUnreachable"
    POD_MISMATCH = "PodMismatch"

    FOLLOWS_DEMAND = "FollowsDemand"
    AT_MAXIMUM = "AtMaximum"
    FOREIGN_SCALER_IGNORED = "ForeignScalerIgnored"
    SCALER_BLIND = "ScalerBlind"
    FOREIGN_SCALER = "ForeignScaler"
    SCALING_OFF = "ScalingOff"
    SCALED_EXTERNALLY = "ScaledExternally"
    SCALING_PENDING = "ScalingPending"

    SERVING = "Serving"


@dataclass(frozen=True)
class Meaning:
    """What a reason says on one condition, and what its reader should do; the source of docs/reference/conditions.md."""

    type: Type
    status: Status
    reason: Reason
    says: str
    cure: str


_NOTHING: Final = "Nothing."
_LOG: Final = "The message has the last log lines"

MEANINGS: Final[tuple[Meaning, ...]] = (
    Meaning(
        Type.ACCEPTED,
        "True",
        Reason.VALID,
        "The spec is valid and, as far as known before a start, feasible.",
        _NOTHING,
    ),
    Meaning(
        Type.ACCEPTED,
        "False",
        Reason.INVALID_SPEC,
        "This operator cannot read the spec: the CRD is newer than the operator. What runs goes on.",
        "Upgrade the operator to the version of the CRD, or remove the field that the message names.",
    ),
    Meaning(
        Type.ACCEPTED,
        "False",
        Reason.CONTEXT_EXCEEDS_CAPACITY,
        "By model.facts, context.maxTokens does not fit the KV memory of one replica, or of one ring.",
        "Lower context.maxTokens. Paged: raise engine.tensorParallelSize, set engine.kvCacheDtype: fp8, or use mode Ring. "
        "Ring: raise ring.size to what the message says, or leave it out.",
    ),
    Meaning(
        Type.ACCEPTED,
        "False",
        Reason.RING_NOT_AVAILABLE,
        "The service is to be a ring, and this installation names no image of the ring engine.",
        "Set ring.image, or install the chart with defaults.ringImage. Or set mode: Paged.",
    ),
    Meaning(
        Type.ACCEPTED,
        "False",
        Reason.RING_SIZE_UNKNOWN,
        "Mode Auto chose a ring, and nothing says how large it has to be.",
        "Set ring.size, or give model.facts, from which it is planned.",
    ),
    Meaning(
        Type.ACCEPTED,
        "False",
        Reason.UNSUPPORTED_BY_RING,
        "The spec asks a ring, which the user or mode Auto chose, for what it does not have; the message names it.",
        "Remove it, or set mode: Paged.",
    ),
    Meaning(
        Type.ACCEPTED,
        "False",
        Reason.PATH_NOT_ALLOWED,
        "model.source is path://, and the installation does not allow hostPath.",
        "Use pvc:// or oci://, or install the chart with security.allowPathSources=true.",
    ),
    Meaning(
        Type.ACCEPTED,
        "False",
        Reason.CHILD_CONFLICT,
        "An object that does not belong to this service has the name of a child. It is left alone.",
        "Rename the service, or delete that object.",
    ),
    Meaning(
        Type.ACCEPTED,
        "False",
        Reason.CHILD_REJECTED,
        "The API server refuses a child, for example for podTemplate or a quota; the message is its own.",
        "Change what the message names; the operator tries again by itself.",
    ),
    Meaning(Type.AVAILABLE, "True", Reason.MINIMUM_REPLICAS_AVAILABLE, "At least one replica serves.", _NOTHING),
    Meaning(
        Type.AVAILABLE,
        "False",
        Reason.SCALED_TO_ZERO,
        "No replica is asked for.",
        "kubectl scale it up. With autoscaling.policy Native: give the annotation kvplane.dev/wake a new value.",
    ),
    Meaning(
        Type.AVAILABLE,
        "False",
        Reason.STARTING,
        "Replicas are being scheduled, pulled or loaded; the message says which.",
        "Wait: loading a large model takes minutes, and engine.startupTimeoutSeconds bounds it.",
    ),
    Meaning(
        Type.AVAILABLE,
        "False",
        Reason.UNSCHEDULABLE,
        "No node fits a pod; the message is the scheduler's.",
        "Add or free nodes, or ask for less in engine.resources and engine.tensorParallelSize, or in ring.resources of a ring.",
    ),
    Meaning(
        Type.AVAILABLE,
        "False",
        Reason.IMAGE_PULL_FAILED,
        "An image, or a model image of oci://, cannot be pulled.",
        "Correct engine.image (ring.image of a ring) or model.source, or give podTemplate.spec.imagePullSecrets.",
    ),
    Meaning(
        Type.AVAILABLE,
        "False",
        Reason.ENGINE_CRASHED,
        f"The engine exits. {_LOG} and the exit code.",
        "Correct what the log names: often model.source, the token, or engine.extraArgs.",
    ),
    Meaning(
        Type.AVAILABLE,
        "False",
        Reason.SIDECAR_CRASHED,
        f"The sidecar exits. {_LOG}.",
        "Report it with these lines; check that the sidecar image is the operator's version.",
    ),
    Meaning(
        Type.AVAILABLE,
        "False",
        Reason.OUT_OF_MEMORY,
        "The kernel killed a container for memory.",
        "Raise the memory limit in engine.resources (ring.resources of a ring that has them), or lower engine.gpuMemoryPercent on "
        "CPU engines.",
    ),
    Meaning(
        Type.AVAILABLE,
        "False",
        Reason.CONTAINER_CONFIG_ERROR,
        "A container cannot be created: a Secret or a key that it refers to is missing, or its command is not there.",
        "Create what the message names; the pod goes on by itself.",
    ),
    Meaning(
        Type.AVAILABLE,
        "False",
        Reason.VOLUME_NOT_READY,
        "A PersistentVolumeClaim is missing or unbound, or a volume cannot be mounted.",
        "Create the claim, or correct model.source or model.cache.claimName.",
    ),
    Meaning(
        Type.AVAILABLE,
        "False",
        Reason.PODS_REFUSED,
        "The API server refuses the pods: pod security, or a quota.",
        "Change what the message names, or the namespace's policy or quota.",
    ),
    Meaning(
        Type.AVAILABLE,
        "False",
        Reason.STARTUP_TIMED_OUT,
        "The engine did not answer within engine.startupTimeoutSeconds and was ended.",
        "Raise it, or keep the download with model.cache.claimName.",
    ),
    Meaning(
        Type.AVAILABLE,
        "False",
        Reason.RESTART_BUDGET_EXHAUSTED,
        f"Every ring group used up recovery.restartBudget without forming a ring, and was given up. {_LOG} of the first crash.",
        "Correct what the log names; a change of the spec, or a new value of the annotation kvplane.dev/retry, starts them again.",
    ),
    Meaning(
        Type.AVAILABLE, "False", Reason.NOT_RECONCILED, "Nothing runs, since the spec is not accepted.", "See Accepted."
    ),
    Meaning(Type.PROGRESSING, "True", Reason.ROLLING_OUT, "Pods of the newest template are being brought up.", "Wait."),
    Meaning(Type.PROGRESSING, "True", Reason.SCALING, "The number of replicas is changing.", "Wait."),
    Meaning(Type.PROGRESSING, "False", Reason.STABLE, "Nothing is being changed.", _NOTHING),
    Meaning(
        Type.PROGRESSING,
        "False",
        Reason.NO_ROOM_FOR_SURGE,
        "A rollout waits for a node that can hold its surge pod; the old pods serve.",
        "Free room for one more pod, or set rollout.maxSurge: 0 and rollout.maxUnavailable: 1.",
    ),
    Meaning(
        Type.PROGRESSING,
        "False",
        Reason.ROLLOUT_STALLED,
        "Pods of the new template do not come up; the old pods serve on.",
        "Correct what the message names, or set the spec back.",
    ),
    Meaning(
        Type.PROGRESSING,
        "True",
        Reason.RE_FORMING,
        "A ring waits for a rank, or takes one in; the message says which.",
        "Wait: seconds for a restart, minutes for a new node.",
    ),
    Meaning(
        Type.PROGRESSING,
        "True",
        Reason.CHANGING_MODE,
        "The pods of the other mode serve until enough of the new one do; the message has the numbers.",
        "Wait. Where both do not fit, free room for the new ones, ask for fewer, or delete the service and make it again.",
    ),
    Meaning(Type.DEGRADED, "False", Reason.AS_ASKED, "Nothing is missing.", _NOTHING),
    Meaning(
        Type.DEGRADED,
        "True",
        Reason.REPLICAS_MISSING,
        "The service serves, with fewer replicas than asked; the message says why.",
        "As for the reason of Available that the message gives.",
    ),
    Meaning(
        Type.DEGRADED,
        "True",
        Reason.CRASH_LOOPING,
        f"The service serves, while a replica crashes again and again. {_LOG}.",
        "As for EngineCrashed, SidecarCrashed or OOMKilled.",
    ),
    Meaning(
        Type.DEGRADED,
        "True",
        Reason.RING_DEGRADED,
        "A ring serves with a rank less; the message says which group, and why the rank is away.",
        "Wait: seconds for a restart, minutes for a new node. Else as for the reason of Available that the message gives.",
    ),
    Meaning(
        Type.DEGRADED,
        "True",
        Reason.RESTART_BUDGET_EXHAUSTED,
        "The service serves, while a ring group used up recovery.restartBudget: given up, or serving with a rank less. "
        f"{_LOG} of the first crash.",
        "Correct what the log names; a change of the spec, or a new value of the annotation kvplane.dev/retry, starts it again.",
    ),
    Meaning(
        Type.DEGRADED,
        "True",
        Reason.ADMISSION_IMPAIRED,
        "The service serves, while admission decides without some of the engine's signals: by its own accounting alone, and "
        "more carefully.",
        "See SignalsFresh.",
    ),
    Meaning(Type.DEGRADED, "False", Reason.NOT_SERVING, "Nothing serves.", "See Available."),
    Meaning(
        Type.SIGNALS_FRESH,
        "True",
        Reason.SIGNALS_READ,
        "The sidecars of the pods that serve answer, and have all signals of their engines.",
        _NOTHING,
    ),
    Meaning(
        Type.SIGNALS_FRESH,
        "False",
        Reason.SIGNAL_MISSING,
        "The engine's metrics lack a signal that admission and scaling need. The message names it, and the names that were "
        "looked for: an engine of another version may have renamed it.",
        "Use an engine version that the sidecar knows, or upgrade kvplane. Metrics must not be switched off in the engine.",
    ),
    Meaning(
        Type.SIGNALS_FRESH,
        "False",
        Reason.SIGNALS_STALE,
        "The sidecar answers, but cannot read its engine's metrics, or could not for a while.",
        "Look at the engine's log and CPU: its HTTP server hangs, or is starved.",
    ),
    Meaning(
        Type.SIGNALS_FRESH,
        "False",
        Reason.SIDECAR_UNREACHABLE,
        "The operator cannot read a pod's state; the message says why. The pod itself may be well, and admission in it.",
        "Let the operator's pods reach TCP port 8001 of the engine pods: a NetworkPolicy may keep them from it.",
    ),
    Meaning(
        Type.SIGNALS_FRESH,
        "False",
        Reason.POD_MISMATCH,
        "Another pod answers at a pod's address, so its figures would be counted for the wrong one.",
        "Look for two pods with one IP, or a proxy in between that sends requests elsewhere.",
    ),
    Meaning(
        Type.SIGNALS_FRESH,
        "Unknown",
        Reason.SIGNALS_PENDING,
        "The pods serve, and were not read yet.",
        "Wait: seconds.",
    ),
    Meaning(
        Type.SIGNALS_FRESH, "Unknown", Reason.NO_SERVING_PODS, "No pod serves, so there is nothing to read.", _NOTHING
    ),
    Meaning(
        Type.SCALING_ACTIVE,
        "True",
        Reason.FOLLOWS_DEMAND,
        "The autoscaler acts, both ways, within minReplicas and maxReplicas. Its events say why.",
        _NOTHING,
    ),
    Meaning(
        Type.SCALING_ACTIVE,
        "True",
        Reason.AT_MAXIMUM,
        "The autoscaler acts, and demand needs more than autoscaling.maxReplicas, or did within the last minute.",
        "Raise autoscaling.maxReplicas where refusals and waiting are dearer than replicas.",
    ),
    Meaning(
        Type.SCALING_ACTIVE,
        "True",
        Reason.FOREIGN_SCALER_IGNORED,
        "The autoscaler acts. A HorizontalPodAutoscaler (KEDA makes one too) writes spec.replicas, which policy Native does not "
        "read; the message names it.",
        "Delete it, or set autoscaling.policy: External.",
    ),
    Meaning(
        Type.SCALING_ACTIVE,
        "False",
        Reason.SCALER_BLIND,
        "Signals of pods that serve are missing, so nothing goes down. What the others tell may still raise.",
        "See SignalsFresh.",
    ),
    Meaning(
        Type.SCALING_ACTIVE,
        "False",
        Reason.FOREIGN_SCALER,
        "A HorizontalPodAutoscaler (KEDA makes one too) targets a child of the service; the message names it. Replicas of a "
        "Deployment are left to it, as it sets them.",
        "Delete it, or point it at the LLMService and set autoscaling.policy: External.",
    ),
    Meaning(
        Type.SCALING_ACTIVE,
        "Unknown",
        Reason.SCALING_OFF,
        "Nothing scales the service: spec.autoscaling is unset, or its policy is Off.",
        _NOTHING,
    ),
    Meaning(
        Type.SCALING_ACTIVE,
        "Unknown",
        Reason.SCALED_EXTERNALLY,
        "spec.replicas is left to an external scaler, by autoscaling.policy External.",
        "Look at that scaler.",
    ),
    Meaning(
        Type.SCALING_ACTIVE,
        "Unknown",
        Reason.SCALING_PENDING,
        "The autoscaler has not decided yet; the replicas that there are stay.",
        "Wait: seconds.",
    ),
    Meaning(Type.READY, "True", Reason.SERVING, "The service is accepted, available and as asked.", _NOTHING),
)
"""Ready is the roll-up: False with the reason and message of the first condition that keeps it from being True."""


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
