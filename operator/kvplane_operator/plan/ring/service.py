"""The plan of a ring service: what to write, whom to drain, which pods to delete, and what status says of it all.

A verdict is told before it is acted upon: a group is scaled to 0 only once status says that it failed, since its pods, the
evidence, go with it.
"""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Any

from kvplane_api import names
from kvplane_api.conditions import Type
from kvplane_api.service import LLMServiceSpec, Ring, RingRecovery
from kvplane_operator.plan import children as shared
from kvplane_operator.plan import record as records
from kvplane_operator.plan.actions import Drain, PodDeletion
from kvplane_operator.plan.findings import Finding, findings
from kvplane_operator.plan.ring import pods, restarts, size
from kvplane_operator.plan.ring.children import Wanted, wanted_children
from kvplane_operator.plan.ring.drain import drained, remaining_seconds
from kvplane_operator.plan.ring.groups import Group, groups, number_of, numbers_taken, time_of
from kvplane_operator.plan.ring.restarts import Ledger
from kvplane_operator.plan.ring.rollout import renewal
from kvplane_operator.plan.ring.scale import Scale, scale
from kvplane_operator.plan.ring.status import Rings
from kvplane_operator.plan.ring.stuck import stuck
from kvplane_operator.plan.snapshot import Manifest, Snapshot
from kvplane_operator.plan.status import DEFAULT_STARTUP_SECONDS
from kvplane_operator.settings import OperatorSettings

_OF_SCALE = ("replicas", "autoscaling")

ASK_AGAIN_SECONDS = 5.0
"""A sidecar that was asked to drain, and does not say yet that it does, is asked again."""


@dataclass(frozen=True)
class RingPlan:
    """What to do about the groups."""

    rings: Rings
    config: str
    wanted: Wanted
    drains: tuple[Drain, ...] = ()
    pod_deletions: tuple[PodDeletion, ...] = ()
    waits: tuple[float, ...] = field(default=())
    """Seconds after which the plan may differ without an event."""


def look(snapshot: Snapshot, spec: LLMServiceSpec | None, *, acts: bool, now: datetime) -> Rings:
    """The groups as they are, exits counted and verdicts given.

    ``spec`` is None where it cannot be read: then nothing is counted and nobody judged. ``acts``: it is acted upon, so that its
    change gives the budgets back.
    """
    found = groups(snapshot)
    pods_of = _pods_by_group(snapshot)
    timeout = spec.engine.startup_timeout_seconds if spec else DEFAULT_STARTUP_SECONDS
    telling = tuple(findings(tuple(itertools.chain.from_iterable(pods_of.values())), startup_timeout_seconds=timeout))
    held = _ledger(snapshot, acts=acts)
    recovery = (size.asked(spec) if spec else Ring()).recovery
    return Rings(
        groups=found,
        ledger=_judged(held, found, pods_of, telling, recovery=recovery, now=now) if spec else held,
        told_failed=held.failed,
        findings=telling,
        size=size.size(spec) if spec else None,
        desired=spec.replicas if spec else int(snapshot.status.get("desiredReplicas", 0)),
        budget=recovery.restart_budget,
        scale=Scale(staying=tuple(group.number for group in found), made=(), leaving=()),
    )


def _pods_by_group(snapshot: Snapshot) -> dict[int, list[Manifest]]:
    pods_of: dict[int, list[Manifest]] = {}
    for pod in snapshot.pods:
        if (number := number_of(pod)) is not None:
            pods_of.setdefault(number, []).append(pod)
    return pods_of


def _judged(
    held: Ledger,
    found: Sequence[Group],
    pods_of: Mapping[int, Sequence[Manifest]],
    telling: Sequence[Finding],
    *,
    recovery: RingRecovery,
    now: datetime,
) -> Ledger:
    """``held`` with what the pods show now, and the verdicts that follow from it."""
    group_of = {pod["metadata"]["name"]: number for number, ranks in pods_of.items() for pod in ranks}
    findings_of: dict[int, list[Finding]] = {}
    for finding in telling:
        findings_of.setdefault(group_of[finding.pod], []).append(finding)
    counted, lost = {}, set()
    for group in found:
        entry = held.restarts.get(group.number)
        if group.number not in held.failed:  # else what led to the verdict stands as long as it
            entry = restarts.counted(
                entry,
                group.number,
                pods_of.get(group.number, ()),
                findings=findings_of.get(group.number, ()),
                now=now,
                window=timedelta(seconds=recovery.budget_window_seconds),
            )
        if entry is not None:
            counted[group.number] = entry
        if restarts.given_up(
            group, entry, budget=recovery.restart_budget, now=now, grace_seconds=recovery.reform_grace_seconds
        ):
            lost.add(group.number)
    return replace(held, restarts=counted, failed=held.failed | lost)


def ring_plan(
    snapshot: Snapshot, spec: LLMServiceSpec, *, settings: OperatorSettings, clients: Mapping[str, str], now: datetime
) -> RingPlan:
    """The plan for a spec that was accepted. ``clients``: labels of the pods that clients are led to."""
    ranks = size.size(spec)
    if ranks is None:
        raise ValueError("ring.size must be given or planned before rings are; the check ring_size_known sees to it.")
    recovery, drain_seconds = size.asked(spec).recovery, spec.disruption.drain_seconds
    rings = look(snapshot, spec, acts=True, now=now)
    failed = rings.told_failed
    planned = scale(rings.groups, replicas=spec.replicas, failed=failed, taken=numbers_taken(snapshot))

    variant = pods.variant(spec, service=snapshot.name, size=ranks, settings=settings)
    record = shared.current_record(snapshot, spec, settings, variant, ring=ranks)
    config = shared.current_config(snapshot, spec, record=record)
    kept = [group for group in rings.groups if group.number in planned.staying]
    staying = [group for group in kept if group.number not in failed]
    renewed = renewal(
        staying,
        given_up=[group for group in kept if group.number in failed],
        template=pods.template_hash(record.template),
        now=now,
        grace_seconds=recovery.reform_grace_seconds,
        drain_seconds=drain_seconds,
    )
    leaving = [group for group in rings.groups if group.number in planned.leaving]
    gone = {
        group.number
        for group in leaving
        if (
            drained(group, now=now, drain_seconds=drain_seconds)
            if group.draining
            else group.idle(now, recovery.reform_grace_seconds)
        )
    }
    draining = [group for group in leaving if group.number not in gone and (group.formed or group.draining)]
    wanted = wanted_children(
        snapshot,
        spec,
        record=record,
        config=config,
        size=ranks,
        groups=rings.groups,
        scale=planned,
        failed=failed,
        take=renewed.take,
        gone=gone,
        clients=clients,
        long_down=_long_down(snapshot, rings, seconds=spec.engine.startup_timeout_seconds, now=now),
    )
    drains = tuple(_drains([*renewed.drain, *draining]))
    over = {entry.group for entry in rings.exhausted}
    waits = [
        renewed.wake_after_seconds,
        0.0 if rings.ledger.failed != failed else None,
        ASK_AGAIN_SECONDS if drains else None,
        *(remaining_seconds(group, now=now, drain_seconds=drain_seconds) for group in draining if group.draining),
        *(_until_idle(group, now, recovery.reform_grace_seconds) for group in leaving),
        *(_until_idle(group, now, recovery.reform_grace_seconds) for group in staying if group.number in over),
    ]
    return RingPlan(
        rings=replace(rings, scale=planned, renewal=renewed),
        config=config,
        wanted=wanted,
        drains=drains,
        pod_deletions=tuple(PodDeletion(rank.pod, rank.uid, "its ring group is renewed") for rank in renewed.delete),
        waits=tuple(wait for wait in waits if wait is not None),
    )


def forced(
    snapshot: Snapshot, spec: LLMServiceSpec | None, *, now: datetime
) -> tuple[tuple[PodDeletion, ...], float | None]:
    """Ring pods to delete by force, and after how many seconds to look again.

    Neither the mode nor an objection to the spec matters: somebody told these pods to go, and a rank, or its group, waits for it.
    """
    recovery = (size.asked(spec) if spec else Ring()).recovery
    mine = [pod for pod in snapshot.pods if number_of(pod) is not None]
    ended = stuck(mine, snapshot.nodes, grace_seconds=recovery.reform_grace_seconds, now=now)
    found = (pod["metadata"] for pod in ended.pods)
    deletions = (PodDeletion(pod["name"], pod["uid"], "its node does not answer", force=True) for pod in found)
    return tuple(deletions), ended.wake_after_seconds


def _ledger(snapshot: Snapshot, *, acts: bool) -> Ledger:
    """What status says, with the whole budget again where the spec changed, or a user asks for it.

    How many groups there are, and who says so, is no change of what they run: an autoscaler must not start a crash loop
    anew. While a spec is not acted upon, the groups are as the last one left them, and given up if they were.
    """
    pools: tuple[Mapping[str, Any], ...] = tuple(snapshot.status.get("pools") or ())
    held = restarts.ledger(next((pool for pool in pools if pool.get("kind") == "Ring"), {}))
    if not acts:
        return held
    retry = snapshot.annotations.get(names.ANNOTATION_RETRY, "")[:63]
    spec = records.digest({field: value for field, value in snapshot.spec.items() if field not in _OF_SCALE})
    if held.spec != spec or (retry and retry != held.retry):
        return restarts.reset(held, retry=retry, spec=spec)
    return held


def _long_down(snapshot: Snapshot, rings: Rings, *, seconds: int, now: datetime) -> bool:
    """Whether no ring has served for so long. Since when is told by status: a pod that was made anew says nothing of it."""
    conditions = snapshot.status.get("conditions") or ()
    available: Mapping[str, Any] = next((c for c in conditions if c["type"] == Type.AVAILABLE.value), {})
    since = time_of(available.get("lastTransitionTime"))
    if rings.serving or available.get("status") != "False" or since is None:
        return False
    return (now - since).total_seconds() >= seconds


def _drains(found: list[Group]) -> list[Drain]:
    """Whom to mark or to ask again: who says already that it drains is left in peace."""
    leaders = [group.leader for group in found]
    return [
        Drain(leader.pod, leader.uid, leader.ip, marked=leader.drain_since is not None)
        for leader in leaders
        if leader is not None and not (leader.drain_since is not None and leader.draining)
    ]


def _until_idle(group: Group, now: datetime, grace_seconds: float) -> float | None:
    return group.seconds_to_idle(now, grace_seconds) or None
