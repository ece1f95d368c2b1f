"""The plan of one service: everything to write, from one snapshot, as a value."""

from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from kvplane_api import names
from kvplane_api.conditions import Reason
from kvplane_api.service import LLMServiceSpec
from kvplane_operator.plan import acceptance
from kvplane_operator.plan import capacity as capacities
from kvplane_operator.plan import signals as sidecars
from kvplane_operator.plan.acceptance import Objection
from kvplane_operator.plan.children import config_hash, current_config, current_record, wanted_children
from kvplane_operator.plan.merge import departures
from kvplane_operator.plan.snapshot import Kind, Manifest, Obstacle, Ref, Snapshot
from kvplane_operator.plan.status import wanted_status
from kvplane_operator.settings import OperatorSettings

CONFLICT_RETRY_SECONDS = 30.0
"""A foreign object that blocks a child is not watched, so it is looked for again."""
LEFTOVER_RETRY_SECONDS = 1.0
REJECTED_RETRY_SECONDS = 30.0
"""A refusal can depend on objects that are not watched (a quota, an admission webhook)."""


@dataclass(frozen=True)
class Write:
    """One child to apply. ``exists``: an object of that name is known to be ours; else its name must be free."""

    ref: Ref
    manifest: Manifest
    exists: bool
    uid: str | None
    why: str


@dataclass(frozen=True)
class Deletion:
    """One child to delete, only if it still is the object that was seen."""

    ref: Ref
    uid: str
    resource_version: str


@dataclass(frozen=True)
class Plan:
    """What to write for one service; empty where everything is as it should be."""

    status: dict[str, Any]
    writes: tuple[Write, ...] = ()
    deletions: tuple[Deletion, ...] = ()
    touched_pods: tuple[str, ...] = ()
    """Pods whose annotation has to take the configuration's hash, so that the kubelet syncs the volume at once."""
    config_hash: str = ""
    wake_after_seconds: float | None = None
    dry_run_first: bool = field(default=False)
    """The user's overlay is new: the API server has to check the result before anything is written."""


def make_plan(snapshot: Snapshot, *, settings: OperatorSettings, now: datetime) -> Plan:
    """The plan for ``snapshot``. Pure: same arguments, same plan; planning again after it was applied gives no writes."""
    signals = sidecars.read(snapshot)
    try:
        spec = LLMServiceSpec.parse(dict(snapshot.spec))
    except ValidationError as error:
        unreadable = Objection(Reason.INVALID_SPEC, _explain(error))
        return _status_only(snapshot, None, unreadable, signals, now=now)
    objection = acceptance.first_objection(acceptance.BEFORE_WRITING, snapshot, spec, settings)
    if objection is not None:
        return _status_only(snapshot, spec, objection, signals, now=now)

    record = current_record(snapshot, spec, settings)
    config = current_config(snapshot, spec, record=record)
    children = wanted_children(snapshot, spec, record=record, config=config)
    objection = acceptance.first_objection(acceptance.AFTER_WRITING, snapshot, spec, settings)
    wanted_hash = config_hash(config)
    told = _status_only(snapshot, spec, objection, signals, now=now)
    return replace(
        told,
        writes=tuple(_writes(snapshot, children)),
        deletions=tuple(_deletions(snapshot, children)),
        touched_pods=tuple(_stale_pods(snapshot, wanted_hash)),
        config_hash=wanted_hash,
        wake_after_seconds=min(filter(None, (_wake(snapshot), told.wake_after_seconds)), default=None),
        dry_run_first=spec.pod_template is not None and spec.pod_template.spec is not None,
    )


def _status_only(
    snapshot: Snapshot,
    spec: LLMServiceSpec | None,
    objection: Objection | None,
    signals: sidecars.Signals,
    *,
    now: datetime,
) -> Plan:
    figures = capacities.figures(signals, snapshot, spec.admission if spec else None, now=now)
    status = wanted_status(snapshot, spec, objection=objection, signals=signals, figures=figures, now=now)
    return Plan(status=status, wake_after_seconds=figures.wake_after_seconds)


def _writes(snapshot: Snapshot, children: dict[Ref, Manifest]) -> list[Write]:
    writes = []
    for ref, manifest in children.items():
        held = snapshot.children.get(ref)
        if held is None:
            writes.append(Write(ref, manifest, exists=False, uid=None, why="missing"))
            continue
        annotation = (held["metadata"].get("annotations") or {}).get(names.ANNOTATION_PLAN_HASH)
        if annotation != manifest["metadata"]["annotations"][names.ANNOTATION_PLAN_HASH]:
            why = "spec changed"
        elif drift := next(departures(manifest, held), None):
            why = f"{drift} was changed by another writer"
        else:
            continue
        writes.append(Write(ref, manifest, exists=True, uid=held["metadata"]["uid"], why=why))
    return writes


def _deletions(snapshot: Snapshot, children: dict[Ref, Manifest]) -> list[Deletion]:
    return [
        Deletion(ref, held["metadata"]["uid"], held["metadata"]["resourceVersion"])
        for ref, held in sorted(snapshot.children.items())
        if ref not in children and not held["metadata"].get("deletionTimestamp")
    ]


def _stale_pods(snapshot: Snapshot, wanted_hash: str) -> list[str]:
    """Pods to touch: only once the ConfigMap itself is known to hold the wanted configuration."""
    config_map = snapshot.children.get(Ref(Kind.CONFIG_MAP, snapshot.name))
    if config_map is None or config_hash(config_map.get("data", {}).get(names.FILE_SIDECAR_CONFIG, "")) != wanted_hash:
        return []
    return [
        pod["metadata"]["name"]
        for pod in snapshot.pods
        if not pod["metadata"].get("deletionTimestamp")
        and (pod["metadata"].get("annotations") or {}).get(names.ANNOTATION_CONFIG_HASH) != wanted_hash
    ]


def _wake(snapshot: Snapshot) -> float | None:
    after = {
        Obstacle.CONFLICT: CONFLICT_RETRY_SECONDS,
        Obstacle.LEFTOVER: LEFTOVER_RETRY_SECONDS,
        Obstacle.REJECTED: REJECTED_RETRY_SECONDS,
    }
    return min((after[blocked.obstacle] for blocked in snapshot.blocked), default=None)


def _explain(error: ValidationError) -> str:
    problems = "; ".join(
        f"spec.{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}" for problem in error.errors()[:5]
    )
    return (
        f"This operator cannot read the spec: {problems}. If the field is new, upgrade the operator to the version of the CRD; "
        "what runs goes on unchanged."
    )
