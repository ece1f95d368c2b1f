"""The restart budget: how often containers of a group exited, and when that is a verdict.

Kubernetes restarts a container for ever, and its count starts again with every new pod. So exits are counted here, by the
group: each pod's own count is compared with what was seen of that pod before, and what was seen stands in status, where
neither a new pod nor a new leader loses it. Exits of a pod on its way out are nobody's fault and do not count.

A group over its budget that can form no ring is given up: the first crash says why, its accelerators are freed. One that
serves with a rank less goes on, and the rank that crashes is left to the kubelet, whose pauses a new pod would end. So does one
that forms none for another reason: exits of an hour ago are no reason to end ranks that load their weights.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final

from kvplane_api.conditions import MESSAGE_LIMIT, Reason
from kvplane_operator.plan.findings import Finding
from kvplane_operator.plan.ring.groups import LONG_AGO, Group, containers, has_exited, time_of

MESSAGES_KEPT: Final = 32
"""Groups whose first crash is kept in status with its log: those of a thousand groups would be more than etcd takes, and the
verdicts would go unwritten with them."""


@dataclass(frozen=True)
class Restarts:
    """What a group has used of its budget."""

    group: int
    count: int
    """Exits since ``window_start``."""
    window_start: datetime
    reason: str = ""
    """Of the first exit of the window, as a condition gives it."""
    message: str = ""
    """Empty where it was not kept."""
    pods: Mapping[str, int] = field(default_factory=dict)
    """Exits seen of each pod, by uid; of those that are there and have any."""


@dataclass(frozen=True)
class Ledger:
    """What status says of the groups' budgets."""

    restarts: Mapping[int, Restarts] = field(default_factory=dict)
    failed: frozenset[int] = field(default_factory=frozenset)
    """Groups that were given up."""
    retry: str = ""
    """Value of the annotation that was acted upon last."""
    spec: str = ""
    """Hash of the spec that all of this is about."""


def exits(pod: Mapping[str, Any]) -> int:
    """How often the engine or the sidecar of a pod have exited: of the two, that which has more often. A node that is rebooted
    ends both, and that is one exit.

    A container that exited and was not started again is one ahead of its restartCount, and stays so while it waits.
    """
    return max((int(status.get("restartCount", 0)) + has_exited(status) for status in containers(pod)), default=0)


def counted(
    before: Restarts | None,
    group: int,
    pods: Sequence[Mapping[str, Any]],
    *,
    findings: Iterable[Finding],
    now: datetime,
    window: timedelta,
) -> Restarts | None:
    """``before`` with what the group's pods show now; None where there is nothing to remember.

    The window begins with the first exit in it; after its end the next exit begins another.
    """
    seen: Mapping[str, int] = before.pods if before else {}
    standing = {p["metadata"]["uid"]: exits(p) for p in pods if "deletionTimestamp" not in p["metadata"]}
    new = sum(max(0, count - seen.get(uid, 0)) for uid, count in standing.items())
    there = {
        p["metadata"]["uid"]: max(standing.get(p["metadata"]["uid"], 0), seen.get(p["metadata"]["uid"], 0))
        for p in pods
    }
    held = {uid: count for uid, count in there.items() if count}
    in_window = before is not None and before.count > 0 and now - before.window_start < window
    if before is not None and in_window:
        return Restarts(group, before.count + new, before.window_start, before.reason, before.message, held)
    if new:
        reason, message = _first(group, findings)
        return Restarts(group, new, now, reason, message, held)
    return Restarts(group, 0, before.window_start if before else now, pods=held) if held else None


def given_up(group: Group, restarts: Restarts | None, *, budget: int, now: datetime, grace_seconds: float) -> bool:
    """Whether exits keep a group that had too many from forming a ring, and it has served nobody for the grace in which one
    forms anew."""
    over = restarts is not None and restarts.count > budget
    return over and group.crashed and group.idle(now, grace_seconds)


def ledger(pool: Mapping[str, Any]) -> Ledger:
    """What a pool's status says, as the operator wrote it; entries that somebody else wrote are left out."""
    restarts = {}
    for entry in pool.get("restarts") or ():
        began = time_of(entry.get("windowStart"))
        if began is not None:
            pods = {pod["uid"]: pod["count"] for pod in entry.get("pods") or ()}
            restarts[entry["group"]] = Restarts(
                entry["group"], entry["count"], began, entry.get("reason", ""), entry.get("message", ""), pods
            )
    failed = frozenset(pool.get("failedGroups") or ())
    return Ledger(restarts, failed, pool.get("retry") or "", pool.get("specHash") or "")


def reset(held: Ledger, *, retry: str, spec: str) -> Ledger:
    """All groups have their whole budget again; what their pods did before is not counted a second time."""
    cleared = {n: Restarts(n, 0, LONG_AGO, pods=r.pods) for n, r in held.restarts.items() if r.pods}
    return Ledger(cleared, frozenset(), retry, spec)


def written(held: Ledger, *, existing: Collection[int]) -> dict[str, Any]:
    """The ledger as it stands in a pool's status, of groups that exist."""
    in_order = sorted(held.restarts.keys() & set(existing), key=lambda number: (number not in held.failed, number))
    told = frozenset(in_order[:MESSAGES_KEPT])
    restarts = [
        {
            "group": number,
            "count": entry.count,
            "windowStart": entry.window_start.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "reason": entry.reason,
            "message": entry.message[:MESSAGE_LIMIT] if number in told else "",
            "pods": [{"uid": uid, "count": count} for uid, count in sorted(entry.pods.items())],
        }
        for number, entry in sorted(held.restarts.items())
        if number in existing
    ]
    failed = sorted(held.failed & set(existing))
    return {
        **({"restarts": restarts} if restarts else {}),
        **({"failedGroups": failed} if failed else {}),
        **({"retry": held.retry} if held.retry else {}),
        **({"specHash": held.spec} if held.spec else {}),
    }


def _first(group: int, findings: Iterable[Finding]) -> tuple[str, str]:
    crash = next((finding for finding in findings if finding.crash), None)
    if crash is None:
        return Reason.ENGINE_CRASHED.value, f"A container of ring group {group} exited, and runs again."
    return crash.reason.value, crash.message
