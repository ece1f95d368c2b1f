"""What ring groups say of themselves: counts by group, and conditions."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from kvplane_api.conditions import Condition, Reason, Type
from kvplane_operator.plan.findings import Finding
from kvplane_operator.plan.ring.groups import Group
from kvplane_operator.plan.ring.pods import serving_selector
from kvplane_operator.plan.ring.restarts import Ledger, Restarts, written
from kvplane_operator.plan.ring.rollout import Renewal
from kvplane_operator.plan.ring.scale import Scale
from kvplane_operator.plan.signals import Signals, admission_impaired, fresh
from kvplane_operator.plan.snapshot import Snapshot
from kvplane_operator.plan.status import Told, roll_up

_TELLING_OF_A_ROLLOUT = (Reason.IMAGE_PULL_FAILED, Reason.CONTAINER_CONFIG_ERROR, Reason.UNSCHEDULABLE)


@dataclass(frozen=True)
class Rings:
    """All that is known of the groups of a service at one moment."""

    groups: tuple[Group, ...]
    ledger: Ledger
    told_failed: frozenset[int]
    """Groups that status says were given up: only what is told is acted upon."""
    findings: tuple[Finding, ...]
    """Of all ring pods, the most telling first."""
    size: int | None
    """Ranks of a ring; None where the spec does not tell."""
    desired: int
    budget: int
    scale: Scale
    renewal: Renewal = field(default_factory=Renewal)

    @property
    def serving(self) -> tuple[Group, ...]:
        """Groups with a formed ring."""
        return tuple(group for group in self.groups if group.formed)

    @property
    def degraded(self) -> tuple[Group, ...]:
        """Groups that serve with a rank less."""
        return tuple(group for group in self.serving if not group.whole)

    @property
    def exhausted(self) -> tuple[Restarts, ...]:
        """The groups that used more than their budget and are not whole, those that were given up first."""
        whole = {group.number for group in self.groups if group.whole}
        over = [
            entry
            for number, entry in self.ledger.restarts.items()
            if number in self.ledger.failed or (entry.count > self.budget and number not in whole)
        ]
        return tuple(sorted(over, key=lambda entry: (entry.group not in self.ledger.failed, entry.group)))

    def finding_of(self, group: Group) -> str:
        """What the most telling of a group's pods says, with a space before; empty where nothing does."""
        pods = {rank.pod for rank in group.ranks}
        return next((f" {finding.message}" for finding in self.findings if finding.pod in pods), "")


def told(
    snapshot: Snapshot, rings: Rings, *, accepted: Condition, scaling: Condition, signals: Signals, asleep: str
) -> Told:
    """What the pool of ring groups says of itself; ``asleep``: what brings it back from no group at all."""
    available = _available(rings, accepted=accepted, asleep=asleep)
    progressing = _progressing(rings)
    degraded = _degraded(
        rings, available=available, progressing=progressing, impaired=admission_impaired(signals, snapshot)
    )
    ready = roll_up(accepted, available, progressing, degraded)
    conditions = (accepted, available, progressing, degraded, fresh(signals, snapshot), scaling, ready)
    exists, serving = len(rings.groups), len(rings.serving)
    return Told(
        "Ring", exists, serving, rings.desired, serving_selector(snapshot.name), pool(snapshot.name, rings), conditions
    )


def pool(service: str, rings: Rings) -> dict[str, Any]:
    """The pool's entry in ``status.pools``."""
    return {
        "name": f"{service}-ring",
        "kind": "Ring",
        "replicas": len(rings.groups),
        "ready": len(rings.serving),
        **({"size": rings.size} if rings.size is not None else {}),
        **({"degradedGroups": [group.number for group in rings.degraded]} if rings.degraded else {}),
        **written(rings.ledger, existing={group.number for group in rings.groups}),
    }


def _available(rings: Rings, *, accepted: Condition, asleep: str) -> Condition:
    kind = Type.AVAILABLE
    if rings.serving:
        text = f"{len(rings.serving)} of {rings.desired} rings serve."
        return Condition(kind, "True", Reason.MINIMUM_REPLICAS_AVAILABLE, text)
    if not rings.groups and accepted.status == "False":
        return Condition(kind, "False", Reason.NOT_RECONCILED, f"Nothing runs: {accepted.message}")
    if not rings.desired:
        return Condition(kind, "False", Reason.SCALED_TO_ZERO, asleep)
    if rings.groups and all(group.number in rings.ledger.failed for group in rings.groups):
        return Condition(kind, "False", Reason.RESTART_BUDGET_EXHAUSTED, _exhausted(rings))
    if rings.findings:
        return Condition(kind, "False", rings.findings[0].reason, rings.findings[0].message)
    # A StatefulSet says in events only why its pods are refused, and those are nobody's to read here.
    text = "The pods are being created. Where none appear, kubectl describe the StatefulSets: a quota or pod security refuses."
    return Condition(kind, "False", Reason.STARTING, text)


def _progressing(rings: Rings) -> Condition:
    kind = Type.PROGRESSING
    if not rings.groups and not rings.scale.made:
        return Condition(kind, "False", Reason.STABLE, "Nothing is being changed.")
    if rings.renewal.pending:
        return _rolling(rings)
    if rings.scale.made or rings.scale.leaving:
        text = f"{len(rings.scale.staying)} of {rings.desired} ring groups are there and stay."
        return Condition(kind, "True", Reason.SCALING, text)
    if forming := _forming(rings.groups, rings.ledger):
        group = forming[0]
        text = f"Ring group {group.number} has {group.members} of {group.size} ranks in its ring."
        return Condition(kind, "True", Reason.RE_FORMING, text)
    given_up = any(group.number in rings.ledger.failed for group in rings.groups)
    text = "Nothing is being changed." if given_up else "Everything asked for is there."
    return Condition(kind, "False", Reason.STABLE, text)


def _rolling(rings: Rings) -> Condition:
    """Why a rollout does not go on is what its reader needs: the groups that are as wanted and form no ring say it."""
    kind, pending = Type.PROGRESSING, rings.renewal.pending
    stalled = next((group for group in _forming(rings.groups, rings.ledger) if not group.formed), None)
    finding = next((f for f in rings.findings if stalled and f.pod in {rank.pod for rank in stalled.ranks}), None)
    if stalled and rings.serving and finding and (finding.crash or finding.reason in _TELLING_OF_A_ROLLOUT):
        text = (
            f"{pending} ring groups keep the old template and serve on. Ring group {stalled.number}: {finding.message}"
        )
        return Condition(kind, "False", Reason.ROLLOUT_STALLED, text)
    waits = ", ".join(map(str, rings.renewal.waits_for))
    if rings.ledger.failed.intersection(rings.renewal.waits_for):
        text = f"{pending} ring groups keep the old template. Ring group {waits} was given up with the new one; see Degraded."
        return Condition(kind, "False", Reason.ROLLOUT_STALLED, text)
    text = f"{pending} of {len(rings.groups)} ring groups are yet to get the newest template." + (
        f" They wait for group {waits}, which is short of a rank." if waits else ""
    )
    return Condition(kind, "True", Reason.ROLLING_OUT, text)


def _degraded(rings: Rings, *, available: Condition, progressing: Condition, impaired: str | None) -> Condition:
    kind = Type.DEGRADED
    if available.status != "True":
        return Condition(kind, "False", Reason.NOT_SERVING, "Nothing serves; see Available.")
    if rings.exhausted:
        return Condition(kind, "True", Reason.RESTART_BUDGET_EXHAUSTED, _exhausted(rings))
    if rings.degraded:
        group = rings.degraded[0]
        text = f"Ring group {group.number} serves with {group.members} of {group.size} ranks.{rings.finding_of(group)}"
        return Condition(kind, "True", Reason.RING_DEGRADED, text)
    if len(rings.serving) < rings.desired and progressing.reason is not Reason.ROLLING_OUT:
        why = f" {rings.findings[0].message}" if rings.findings else ""
        text = f"{len(rings.serving)} of {rings.desired} rings serve.{why}"
        return Condition(kind, "True", Reason.REPLICAS_MISSING, text)
    if impaired is not None:
        return Condition(kind, "True", Reason.ADMISSION_IMPAIRED, impaired)
    return Condition(kind, "False", Reason.AS_ASKED, "Nothing is missing.")


def _exhausted(rings: Rings) -> str:
    """What became of the first group over its budget, and its first crash."""
    if not rings.exhausted:
        failed = ", ".join(map(str, sorted(rings.ledger.failed)))
        return f"Ring group {failed} used up ring.recovery.restartBudget and was given up."
    entry, more = rings.exhausted[0], len(rings.exhausted) - 1
    if entry.group in rings.ledger.failed:
        fate = "was given up; change the spec, or annotate the service with a new value of kvplane.dev/retry"
    elif entry.group in {group.number for group in rings.serving}:
        fate = "serves with a rank less"
    else:
        fate = "has no ring now"
    others = f" So did {more} more." if more else ""
    first = f" The first: {entry.message}" if entry.message else ""
    return (
        f"Ring group {entry.group} had {entry.count} exits, more than ring.recovery.restartBudget ({rings.budget}), and {fate}."
        f"{others}{first}"
    )


def _forming(groups: Sequence[Group], ledger: Ledger) -> list[Group]:
    """Groups that are short of a rank, without those that were given up."""
    return [group for group in groups if group.number not in ledger.failed and not group.whole]
