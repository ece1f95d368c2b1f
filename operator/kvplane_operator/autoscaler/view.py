"""What a service and its pods, as the watches and the polls show them, say to the law.

A replica is a pod of the Deployment, or a ring group for which its rank 0 speaks. What was read of it counts for
``MOST_AGE_SECONDS``; older, of another pod, or unsound, it is missing.
"""

from collections.abc import Callable
from typing import Any, Final

from kvplane_api import names
from kvplane_api.conditions import Reason
from kvplane_api.service import Autoscaling
from kvplane_operator.autoscaler.settings import Settings, Tuning
from kvplane_operator.autoscaler.signals import Reading, Replica, Signals, read
from kvplane_operator.plan.findings import findings, over, pod_condition, ready
from kvplane_operator.plan.mode import Mode
from kvplane_operator.plan.ring.groups import groups, number_of, set_name, time_of
from kvplane_operator.plan.snapshot import Kind, Manifest, Ref, Snapshot

MOST_AGE_SECONDS: Final = 20.0
"""Quiet services are read every 15 s, and a read takes up to 2 s: one that was missed makes a replica's signals missing."""

_MADE_SECONDS: Final = 60.0
"""A StatefulSet makes all pods of a ring at once: those that are not there after so long are kept away, as by a quota. Only its
events would say so, which the operator may not read."""
_NO_BOUND: Final = 10_000
_NO_START: Final = frozenset(
    {Reason.UNSCHEDULABLE, Reason.VOLUME_NOT_READY, Reason.IMAGE_PULL_FAILED, Reason.CONTAINER_CONFIG_ERROR}
)

Cached = Callable[[Manifest], bool | None]
"""Whether a pod found its image on its node; None: not known."""


def settings(autoscaling: Autoscaling, tuning: Tuning) -> Settings:
    """What ``spec.autoscaling`` says to the law."""
    return Settings(
        min_replicas=autoscaling.min_replicas,
        max_replicas=autoscaling.max_replicas or max(_NO_BOUND, autoscaling.min_replicas),
        scale_to_zero_after_seconds=autoscaling.scale_to_zero_after_seconds,
        scale_down_window_seconds=autoscaling.scale_down_window_seconds,
        cost_of_miss=float(autoscaling.cost_of_miss),
        tuning=tuning,
    )


def signals(snapshot: Snapshot, mode: Mode, *, asked: int, wake: bool, cached: Cached, now: float) -> Signals:
    """All that the law looks at."""
    found = replicas(snapshot, mode, cached=cached, now=now)
    there = sum(not replica.draining for replica in found)
    if mode == "Paged" and _quota_hit(snapshot):
        found += tuple(
            Replica(name=f"refused-{number}", created_at=now, ready=False, refused=True)
            for number in range(asked - there)
        )
    return Signals(asked=asked, replicas=found, wake=wake)


def replicas(snapshot: Snapshot, mode: Mode, *, cached: Cached, now: float) -> tuple[Replica, ...]:
    """The replicas of the pool of a mode, those that are going included."""
    return _groups(snapshot, cached, now) if mode == "Ring" else _pods(snapshot, cached, now)


def _pods(snapshot: Snapshot, cached: Cached, now: float) -> tuple[Replica, ...]:
    return tuple(
        Replica(
            name=pod["metadata"]["name"],
            created_at=_made_at(pod, now),
            ready=ready(pod),
            changed_at=_changed_at(snapshot, pod),
            draining="deletionTimestamp" in pod["metadata"],
            image_cached=cached(pod),
            refused=_refused(pod),
            reading=_reading(snapshot, pod["metadata"]["name"], now),
        )
        for pod in snapshot.pods
        if number_of(pod) is None and not over(pod)
    )


def _groups(snapshot: Snapshot, cached: Cached, now: float) -> tuple[Replica, ...]:
    found = []
    for group in groups(snapshot):
        held = snapshot.children[Ref(Kind.STATEFUL_SET, set_name(snapshot.name, group.number))]
        ranks = [pod for pod in snapshot.pods if number_of(pod) == group.number]
        made_at = _made_at(held, now)
        kept_away = len(ranks) < group.size and now - made_at > _MADE_SECONDS
        goes = any(rank.ordinal == 0 and rank.going for rank in group.ranks)
        found.append(
            Replica(
                name=set_name(snapshot.name, group.number),
                # A group that is renewed keeps its StatefulSet, and starts with its pods.
                created_at=max((made_at, *(_made_at(pod, now) for pod in ranks))),
                ready=group.formed,
                changed_at=group.leader.since.timestamp() if group.leader and not group.leader.cut_off else None,
                draining=group.draining or goes,
                image_cached=True if ranks and all(cached(pod) for pod in ranks) else None,
                # One that was given up is of no use, and another one would end as it did.
                refused=not group.size or kept_away or any(_refused(pod) for pod in ranks),
                reading=_reading(snapshot, group.leader.pod, now) if group.leader else None,
            )
        )
    return tuple(found)


def _reading(snapshot: Snapshot, pod: str, now: float) -> Reading | None:
    held = snapshot.readings.get(pod)
    if held is None or held.at is None or abs(now - held.at) > MOST_AGE_SECONDS:
        return None
    return read(held.state, pod=pod, at=held.at)


def _made_at(manifest: Manifest, now: float) -> float:
    made = time_of(manifest["metadata"].get("creationTimestamp"))
    return made.timestamp() if made else now


def _changed_at(snapshot: Snapshot, pod: Manifest) -> float | None:
    node = snapshot.nodes.get(pod["spec"].get("nodeName") or "")
    changed = time_of(pod_condition(pod, "Ready").get("lastTransitionTime"))
    return changed.timestamp() if changed and (node is None or node.ready) else None


def _refused(pod: Manifest) -> bool:
    """Whether what keeps it from starting would keep any other one too. A crash may be its node's: another one is worth a try."""
    found = findings((pod,), startup_timeout_seconds=0)  # which tells crashes apart, and none of them counts
    return any(finding.reason in _NO_START for finding in found)


def _quota_hit(snapshot: Snapshot) -> bool:
    deployment = snapshot.children.get(Ref(Kind.DEPLOYMENT, snapshot.name), {})
    conditions: list[dict[str, Any]] = deployment.get("status", {}).get("conditions") or []
    return any(each["type"] == "ReplicaFailure" and each["status"] == "True" for each in conditions)


class Images:
    """Which image has run on which node, as far as this process has seen: whether a start had to pull is told by that."""

    _MOST: Final = 10_000

    def __init__(self) -> None:
        self._first: dict[tuple[str, str], str] = {}
        """The pod, by uid, that ran it first."""

    def note(self, pods: tuple[Manifest, ...]) -> None:
        """Take note of the pods that serve."""
        for pod in pods:
            key = _place(pod)
            if key is not None and ready(pod):
                self._first.setdefault(key, pod["metadata"]["uid"])
        while len(self._first) > self._MOST:
            del self._first[next(iter(self._first))]

    def cached(self, pod: Manifest) -> bool | None:
        """Whether another pod had run the image on the pod's node before."""
        key = _place(pod)
        first = self._first.get(key) if key is not None else None
        return True if first is not None and first != pod["metadata"]["uid"] else None


def _place(pod: Manifest) -> tuple[str, str] | None:
    node = pod["spec"].get("nodeName")
    image = next(
        (
            each["image"]
            for each in pod["status"].get("containerStatuses", ())
            if each["name"] == names.CONTAINER_ENGINE
        ),
        None,
    )
    return (node, image) if node and image else None
