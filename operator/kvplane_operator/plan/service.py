"""The plan of one service: everything to write, from one snapshot, as a value.

A change of mode is made before it is broken: while the new pool has fewer that serve than it is asked for, and than the old
one has, the old one stays as it is and clients are led to it.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import Any

from pydantic import ValidationError

from kvplane_api import names
from kvplane_api.conditions import Condition, Reason, Type
from kvplane_api.service import LLMServiceSpec
from kvplane_operator.autoscaler.victims import deletion_costs
from kvplane_operator.autoscaler.view import replicas
from kvplane_operator.plan import acceptance, pods, scaling, status
from kvplane_operator.plan import capacity as capacities
from kvplane_operator.plan import signals as sidecars
from kvplane_operator.plan.acceptance import Objection
from kvplane_operator.plan.actions import Deletion, DeletionCost, Drain, PodDeletion, Write
from kvplane_operator.plan.children import config_hash, current_config, current_record, wanted_children
from kvplane_operator.plan.findings import findings
from kvplane_operator.plan.merge import departures
from kvplane_operator.plan.mode import Choice, Mode, choose, other
from kvplane_operator.plan.ring import pods as ring_pods
from kvplane_operator.plan.ring import status as ring_status
from kvplane_operator.plan.ring.children import Wanted
from kvplane_operator.plan.ring.groups import groups, number_of, set_number
from kvplane_operator.plan.ring.service import RingPlan, forced, look, ring_plan
from kvplane_operator.plan.ring.status import Rings
from kvplane_operator.plan.snapshot import Kind, Manifest, Obstacle, Ref, Snapshot
from kvplane_operator.plan.status import Told, wanted_status
from kvplane_operator.settings import OperatorSettings

CONFLICT_RETRY_SECONDS = 30.0
"""A foreign object that blocks a child is not watched, so it is looked for again."""
LEFTOVER_RETRY_SECONDS = 1.0
REJECTED_RETRY_SECONDS = 30.0
"""A refusal can depend on objects that are not watched (a quota, an admission webhook)."""


@dataclass(frozen=True)
class Plan:
    """What to do for one service; empty where everything is as it should be."""

    status: dict[str, Any]
    choice: Choice | None = None
    """The mode and why; None where the spec cannot be read."""
    writes: tuple[Write, ...] = ()
    deletions: tuple[Deletion, ...] = ()
    touched_pods: tuple[str, ...] = ()
    """Pods whose annotation has to take the configuration's hash, so that the kubelet syncs the volume at once."""
    config_hash: str = ""
    deletion_costs: tuple[DeletionCost, ...] = ()
    """To be told before the Deployment is written, which asks for fewer pods."""
    drains: tuple[Drain, ...] = ()
    pod_deletions: tuple[PodDeletion, ...] = ()
    wake_after_seconds: float | None = None
    dry_run_first: bool = field(default=False)
    """The user's overlay is new: the API server has to check the result before anything is written."""

    @property
    def acts(self) -> bool:
        """Whether anything but the status changes."""
        return any((self.writes, self.deletions, self.touched_pods, self.drains, self.pod_deletions))


@dataclass(frozen=True)
class _HandOver:
    """A change of mode that is under way: the old pool serves."""

    mode: Mode
    """The new one."""
    ready: int
    """Replicas of it that could serve."""
    enough: int
    """With so many of them the old pool goes."""


def make_plan(snapshot: Snapshot, *, settings: OperatorSettings, now: datetime) -> Plan:
    """The plan for ``snapshot``. Pure: same arguments, same plan; planning again after it was applied gives no writes."""
    signals = sidecars.read(snapshot)
    try:
        spec = scaling.with_replicas(snapshot, LLMServiceSpec.parse(dict(snapshot.spec)))
    except ValidationError as error:
        unreadable = Objection(Reason.INVALID_SPEC, _explain(error))
        return _status_only(snapshot, None, unreadable, signals, now=now)
    objection = acceptance.first_objection(acceptance.BEFORE_WRITING, snapshot, spec, settings)
    if objection is not None:
        return _status_only(snapshot, spec, objection, signals, now=now)

    choice = choose(spec)
    objection = acceptance.first_objection(acceptance.AFTER_WRITING, snapshot, spec, settings)
    notes = _notes(choice, settings)
    change = _hand_over(snapshot, choice.mode, spec)
    serving = other(choice.mode) if change else choice.mode
    clients = pods.selector(snapshot.name) if serving == "Paged" else ring_pods.serving_selector(snapshot.name)
    rings: RingPlan | None = None
    if choice.mode == "Ring":
        rings = ring_plan(snapshot, spec, settings=settings, clients=clients, now=now)
        wanted, config = rings.wanted, rings.config
    else:
        wanted, config = _paged_children(snapshot, spec, settings, clients=clients)
    children, kept = wanted.children, wanted.kept | _asked_by_ranks(snapshot)
    if serving != choice.mode:
        children = {ref: child for ref, child in children.items() if ref.kind is not Kind.PDB}
        kept |= _of_pool(snapshot, serving)
    if scaling.decides(snapshot.spec):
        kept |= {scaling.state_ref(snapshot.name)}
    told = scaling.with_replicas_of(snapshot, spec, serving) if change else spec
    plan = _told(
        snapshot,
        told,
        choice,
        serving=serving,
        change=change,
        rings=rings.rings if rings else look(snapshot, told, acts=True, now=now),
        objection=objection,
        notes=notes,
        signals=signals,
        now=now,
    )
    wanted_hash = config_hash(config)
    ended, until_ended = forced(snapshot, spec, now=now)
    return replace(
        plan,
        writes=tuple(_writes(snapshot, children)),
        deletions=tuple(_deletions(snapshot, children, kept)),
        touched_pods=tuple(_stale_pods(snapshot, wanted_hash)),
        config_hash=wanted_hash,
        deletion_costs=_deletion_costs(snapshot, children, now=now),
        drains=rings.drains if rings else (),
        pod_deletions=(*(rings.pod_deletions if rings else ()), *ended),
        wake_after_seconds=_soonest(
            _wake(snapshot), plan.wake_after_seconds, until_ended, *(rings.waits if rings else ())
        ),
        dry_run_first=spec.pod_template is not None and spec.pod_template.spec is not None,
    )


def _paged_children(
    snapshot: Snapshot, spec: LLMServiceSpec, settings: OperatorSettings, *, clients: Mapping[str, str]
) -> tuple[Wanted, str]:
    """The paged pool's children, and the sidecars' configuration."""
    variant = pods.paged(spec, service=snapshot.name, settings=settings)
    record = current_record(snapshot, spec, settings, variant)
    config = current_config(snapshot, spec, record=record)
    return Wanted(wanted_children(snapshot, spec, record=record, config=config, clients=clients)), config


def _status_only(
    snapshot: Snapshot,
    spec: LLMServiceSpec | None,
    objection: Objection,
    signals: sidecars.Signals,
    *,
    now: datetime,
) -> Plan:
    """What is said of what runs while nothing is changed; only what is to go already goes."""
    choice = choose(spec) if spec else None
    runs = snapshot.status.get("mode")
    mode: Mode = runs if runs in ("Paged", "Ring") else (choice.mode if choice else "Paged")
    told = scaling.with_replicas_of(snapshot, spec, mode) if spec and choice and choice.mode != mode else spec
    rings = look(snapshot, told, acts=False, now=now)
    plan = _told(
        snapshot, told, choice, serving=mode, rings=rings, objection=objection, notes="", signals=signals, now=now
    )
    ended, until_ended = forced(snapshot, spec, now=now)
    return replace(plan, pod_deletions=ended, wake_after_seconds=_soonest(plan.wake_after_seconds, until_ended))


def _told(
    snapshot: Snapshot,
    spec: LLMServiceSpec | None,
    choice: Choice | None,
    *,
    serving: Mode,
    rings: Rings,
    objection: Objection | None,
    notes: str,
    signals: sidecars.Signals,
    now: datetime,
    change: _HandOver | None = None,
) -> Plan:
    """A plan that only tells: the pool that serves speaks for the service."""
    accepted = acceptance.accepted(objection, notes=notes)
    active = scaling.active(snapshot, spec)
    if serving == "Paged":
        told = status.paged(snapshot, spec, accepted=accepted, scaling=active, signals=signals)
        others = [ring_status.pool(snapshot.name, rings)] if rings.groups else []
    else:
        told = ring_status.told(
            snapshot, rings, accepted=accepted, scaling=active, signals=signals, asleep=scaling.at_zero(spec)
        )
        others = []
    if change is not None and objection is None:
        told = _changing(told, snapshot, spec, change)
    figures = capacities.figures(signals, snapshot, spec.admission if spec else None, now=now, ring=serving == "Ring")
    wanted = wanted_status(snapshot, told, figures=figures, others=others, now=now)
    return Plan(status=wanted, choice=choice, wake_after_seconds=figures.wake_after_seconds)


def _notes(choice: Choice, settings: OperatorSettings) -> str:
    """What else there is to know of a spec that is valid."""
    blind = (
        "This installation may not read nodes, so a rank on a lost node comes back only with the node, or when somebody "
        "deletes its pod by force (chart value rbac.nodes)."
    )
    return " ".join(filter(None, (choice.why, blind if choice.mode == "Ring" and not settings.read_nodes else "")))


def _hand_over(snapshot: Snapshot, mode: Mode, spec: LLMServiceSpec) -> _HandOver | None:
    """The change to ``mode`` while the pool of the other mode has to serve on; None where it is made, or there is none.

    The new pool takes over with all that it is asked for, or with as many as the old one has left, where that is less.
    """
    deployment = snapshot.children.get(Ref(Kind.DEPLOYMENT, snapshot.name), {})
    ready: Mapping[Mode, int] = {
        "Paged": int(deployment.get("status", {}).get("readyReplicas", 0)),
        "Ring": sum(group.formed for group in groups(snapshot)),
    }
    enough = min(spec.replicas, ready[other(mode)])
    return _HandOver(mode, ready[mode], enough) if ready[mode] < enough else None


def _of_pool(snapshot: Snapshot, mode: Mode) -> frozenset[Ref]:
    """The children that make up the pods of a mode, and the disruption budget, which is theirs as long as they serve."""

    def belongs(ref: Ref) -> bool:
        makes_pods = ref.kind is Kind.DEPLOYMENT if mode == "Paged" else set_number(ref.name, snapshot.name) is not None
        return makes_pods or ref.kind is Kind.PDB

    return frozenset(filter(belongs, snapshot.children))


def _asked_by_ranks(snapshot: Snapshot) -> frozenset[Ref]:
    """The headless Services of groups that still have pods: by them a worker asks whether rank 0 still drains, and goes
    before it where nobody answers."""
    present = {number for pod in snapshot.pods if (number := number_of(pod)) is not None}
    return frozenset(
        ref for ref in snapshot.children if ref.kind is Kind.SERVICE and set_number(ref.name, snapshot.name) in present
    )


def _changing(told: Told, snapshot: Snapshot, spec: LLMServiceSpec | None, change: _HandOver) -> Told:
    """The old pool speaks, and says what it waits for before it goes."""
    timeout = spec.engine.startup_timeout_seconds if spec else status.DEFAULT_STARTUP_SECONDS
    new = tuple(pod for pod in snapshot.pods if (number_of(pod) is None) == (change.mode == "Paged"))
    worst = next(iter(findings(new, startup_timeout_seconds=timeout)), None)
    kind = Type.PROGRESSING
    text = (
        f"Mode {told.mode} serves until mode {change.mode} has its replicas ready: {change.ready} of {change.enough}."
    )
    changing = Condition(kind, "True", Reason.CHANGING_MODE, text)
    if worst is not None and worst.reason is not Reason.STARTING:
        changing = Condition(kind, "False", Reason.ROLLOUT_STALLED, f"{text} {worst.message}")
    conditions = (changing if condition.type is kind else condition for condition in told.conditions)
    return replace(told, conditions=tuple(conditions))


def _writes(snapshot: Snapshot, children: Mapping[Ref, Manifest]) -> list[Write]:
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


def _deletion_costs(snapshot: Snapshot, children: Mapping[Ref, Manifest], *, now: datetime) -> tuple[DeletionCost, ...]:
    """What pods have to be told so that the emptiest go first, where some stay and others go; only what is news."""
    ref = Ref(Kind.DEPLOYMENT, snapshot.name)
    if ref not in children or ref not in snapshot.children:
        return ()
    stay = int(children[ref]["spec"]["replicas"])
    going = int(snapshot.children[ref]["spec"].get("replicas", 1)) - stay
    if not stay or going <= 0:
        return ()
    found = replicas(snapshot, "Paged", cached=lambda _: None, now=now.timestamp())
    wanted = deletion_costs(found, going=going)
    told = []
    for pod in snapshot.pods:
        metadata = pod["metadata"]
        held = (metadata.get("annotations") or {}).get(names.ANNOTATION_DELETION_COST, "0")
        cost = wanted.get(metadata["name"])
        if cost is not None and str(cost) != held:
            told.append(DeletionCost(metadata["name"], metadata["uid"], cost))
    return tuple(told)


def _deletions(snapshot: Snapshot, children: Mapping[Ref, Manifest], kept: Collection[Ref]) -> list[Deletion]:
    return [
        Deletion(ref, held["metadata"]["uid"], held["metadata"]["resourceVersion"])
        for ref, held in sorted(snapshot.children.items())
        if ref not in children and ref not in kept and not held["metadata"].get("deletionTimestamp")
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
        Obstacle.ENDING: REJECTED_RETRY_SECONDS,
    }
    return _soonest(*(after[blocked.obstacle] for blocked in snapshot.blocked))


def _soonest(*waits: float | None) -> float | None:
    return min((wait for wait in waits if wait is not None), default=None)


def _explain(error: ValidationError) -> str:
    problems = "; ".join(
        f"spec.{'.'.join(str(part) for part in problem['loc'])}: {problem['msg']}" for problem in error.errors()[:5]
    )
    return (
        f"This operator cannot read the spec: {problems}. If the field is new, upgrade the operator to the version of the CRD; "
        "what runs goes on unchanged."
    )
