"""Who says how many replicas there are, and the condition ScalingActive.

Replicas have one owner. It is spec.replicas, which users and ``/scale`` write; with policy Native it is the autoscaler's
figure. That figure needs no place of its own: while this process has none, as after a restart, what the children have
stands. Where somebody else scales the Deployment itself, its value is followed: two writers of one field would never end.
"""

from collections.abc import Mapping
from typing import Any

from kvplane_api import names
from kvplane_api.conditions import Condition, Reason, Type
from kvplane_api.service import Autoscaling, LLMServiceSpec
from kvplane_operator.plan.mode import Mode, choose, other
from kvplane_operator.plan.ring.groups import groups
from kvplane_operator.plan.snapshot import Kind, Ref, Scaler, Scaling, Snapshot


def state_ref(service: str) -> Ref:
    """The ConfigMap in which the autoscaler keeps what it learned; no service's name has a dot, so it is no other child's."""
    return Ref(Kind.CONFIG_MAP, f"{service}.autoscaler")


def decides(spec: Mapping[str, Any]) -> bool:
    """Whether the autoscaler decides for a service with that spec, be it to act or only to export."""
    return (spec.get("autoscaling") or {}).get("policy") in ("Native", "External")


def native(spec: LLMServiceSpec) -> bool:
    """Whether the autoscaler's figure counts."""
    return spec.autoscaling is not None and spec.autoscaling.policy == "Native"


def with_replicas(snapshot: Snapshot, spec: LLMServiceSpec) -> LLMServiceSpec:
    """The spec with the replicas that are asked for now in the place of spec.replicas."""
    return spec.model_copy(update={"replicas": _asked(snapshot, spec, choose(spec).mode)})


def with_replicas_of(snapshot: Snapshot, spec: LLMServiceSpec, mode: Mode) -> LLMServiceSpec:
    """The spec with the replicas that the pool of ``mode`` was made to ask for, in which the service still serves. They are what
    status tells beside that mode: read again when the change is taken back, another mode's figure would be theirs.
    """
    there = _of_children(snapshot, mode)
    return spec if there is None else spec.model_copy(update={"replicas": there})


def intruder(snapshot: Snapshot) -> Scaler | None:
    """Somebody else's scaler of a child of this service."""
    return next((scaler for scaler in snapshot.scalers if _targets_child(snapshot, scaler)), None)


def followed(snapshot: Snapshot, mode: Mode) -> bool:
    """Whether somebody else's figure is followed. Of a ring it is not: a StatefulSet's replicas are ranks."""
    found = intruder(snapshot)
    return mode == "Paged" and found is not None and found.kind == Kind.DEPLOYMENT


def at_zero(spec: LLMServiceSpec | None) -> str:
    """What brings a service back that has no replicas, as a sentence."""
    if spec is not None and native(spec):
        return f"Nothing runs, as nobody asks; a new value of the annotation {names.ANNOTATION_WAKE} brings it back."
    return "spec.replicas is 0; kubectl scale brings it back."


def active(snapshot: Snapshot, spec: LLMServiceSpec | None) -> Condition:
    """The condition ScalingActive; ``spec`` is None where it cannot be read."""
    scaled = spec.autoscaling if spec is not None else None
    if (found := _foreign(snapshot) or (_of_policy(scaled) if spec is not None else None)) is not None:
        return found
    if scaled is None or snapshot.scaling is None:
        return _pending(snapshot)
    return _acting(snapshot, scaled, snapshot.scaling)


def _foreign(snapshot: Snapshot) -> Condition | None:
    found = intruder(snapshot)
    if found is None:
        return None
    return Condition(
        Type.SCALING_ACTIVE,
        "False",
        Reason.FOREIGN_SCALER,
        f"HorizontalPodAutoscaler {found.name} targets {found.kind} {found.target}, which belongs to this service. Delete it, or "
        f"point it at {names.KIND} {snapshot.name} and set autoscaling.policy: External.",
    )


def _of_policy(scaled: Autoscaling | None) -> Condition | None:
    """What there is to say where the autoscaler's figure does not count."""
    kind = Type.SCALING_ACTIVE
    if scaled is None or scaled.policy == "Off":
        return Condition(kind, "Unknown", Reason.SCALING_OFF, "Nothing scales the service; spec.replicas stands.")
    if scaled.policy == "External":
        return Condition(kind, "Unknown", Reason.SCALED_EXTERNALLY, "spec.replicas is left to an external scaler.")
    return None


def _acting(snapshot: Snapshot, scaled: Autoscaling, scaling: Scaling) -> Condition:
    """What the autoscaler says of itself."""
    kind = Type.SCALING_ACTIVE
    if scaling.blind:
        return Condition(kind, "False", Reason.SCALER_BLIND, scaling.blind)
    if (ignored := next((each for each in snapshot.scalers if each.kind == names.KIND), None)) is not None:
        text = (
            f"HorizontalPodAutoscaler {ignored.name} writes spec.replicas, which autoscaling.policy Native does not read. Delete "
            "it, or set policy: External."
        )
        return Condition(kind, "True", Reason.FOREIGN_SCALER_IGNORED, text)
    if scaling.at_maximum:
        text = f"Demand needs more than autoscaling.maxReplicas, {scaled.max_replicas}."
        return Condition(kind, "True", Reason.AT_MAXIMUM, text)
    text = f"Between {scaled.min_replicas} and {scaled.max_replicas} replicas run, as demand needs."
    if not scaling.desired:
        text = "Nothing runs, as nobody asks."
    return Condition(kind, "True", Reason.FOLLOWS_DEMAND, text)


def _asked(snapshot: Snapshot, spec: LLMServiceSpec, mode: Mode) -> int:
    there = _of_children(snapshot, mode)
    if there is not None and followed(snapshot, mode):
        return there
    if not native(spec):
        return spec.replicas
    if snapshot.scaling is not None and snapshot.scaling.mode == mode:
        return snapshot.scaling.desired
    return _first(spec, awake=bool(_of_children(snapshot, other(mode)))) if there is None else there


def _of_children(snapshot: Snapshot, mode: Mode) -> int | None:
    """Replicas that the children of a mode were made to ask for; None where that cannot be told."""
    deployment = snapshot.children.get(Ref(Kind.DEPLOYMENT, snapshot.name))
    if mode == "Paged" and deployment is not None:
        return int(deployment["spec"].get("replicas", 1))
    staying = sum(not group.draining for group in groups(snapshot)) if mode == "Ring" else 0
    if snapshot.status.get("mode") == mode and "desiredReplicas" in snapshot.status:
        # Groups that are drained to be renewed count in status only; those just made, before their maker could say so,
        # only here. Status is written last.
        return max(int(snapshot.status["desiredReplicas"]), staying)
    return staying or None


def _first(spec: LLMServiceSpec, *, awake: bool) -> int:
    """Replicas of a service that has none yet in its mode; ``awake``: it has some in the other one, and must not fall asleep for a
    spec.replicas of 0 with which it began.
    """
    scaled, replicas = spec.autoscaling, spec.replicas
    if scaled is None or (not replicas and not awake and scaled.scale_to_zero_after_seconds is not None):
        return replicas
    most = max(scaled.min_replicas, replicas) if scaled.max_replicas is None else scaled.max_replicas
    return min(max(replicas, scaled.min_replicas), most)


def _targets_child(snapshot: Snapshot, scaler: Scaler) -> bool:
    return scaler.kind != names.KIND and Ref(Kind(scaler.kind), scaler.target) in snapshot.children


def _pending(snapshot: Snapshot) -> Condition:
    """What stands in status stays until the autoscaler of this process has decided."""
    kind = Type.SCALING_ACTIVE
    conditions: list[Mapping[str, Any]] = snapshot.status.get("conditions") or []
    held = next((each for each in conditions if each["type"] == kind.value), None)
    if held is not None and held["reason"] in _OF_DECISIONS:
        return Condition(kind, held["status"], Reason(held["reason"]), held["message"])
    text = "The autoscaler has not decided yet; the replicas that there are stay."
    return Condition(kind, "Unknown", Reason.SCALING_PENDING, text)


_OF_DECISIONS = frozenset(
    {Reason.FOLLOWS_DEMAND, Reason.AT_MAXIMUM, Reason.SCALER_BLIND, Reason.FOREIGN_SCALER_IGNORED}
)
