"""Ring groups as the watches show them: the values that every decision about them is made from.

A group is a StatefulSet and its pods, a rank is a pod. A rank is Ready only as a member of a formed ring, so readiness tells
all: the ring of a group is *formed* while rank 0 is Ready, and *whole* while all N are.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final

from kvplane_api import names
from kvplane_operator.plan.findings import pod_condition, ready
from kvplane_operator.plan.snapshot import Kind, Manifest, Snapshot

_SET: Final = re.compile(r"(.+)-ring-\d+")

LONG_AGO: Final = datetime(1970, 1, 1, tzinfo=UTC)

_OURS: Final = (names.CONTAINER_ENGINE, names.CONTAINER_SIDECAR)
"""Containers that make up a rank: what a user adds to the pod is no part of the ring."""


@dataclass(frozen=True)
class Rank:
    """One pod of a ring."""

    ordinal: int
    pod: str
    uid: str
    ready: bool = False
    """A member of a formed ring, and not on its way out."""
    going: bool = False
    """Its deletion has begun."""
    template: str = ""
    """Hash of the template it was made from."""
    since: datetime = LONG_AGO
    """When its readiness, or that of its node, changed last; of a pod that never had any, when it was made. A pod on a node that
    is back is Ready some seconds after it."""
    drain_since: datetime | None = None
    """Since when the operator drains it."""
    draining: bool = False
    """Its sidecar says so."""
    in_flight: int | None = None
    """Requests that its sidecar holds; None where that is not known."""
    ip: str = ""
    exited: bool = False
    """Its engine or its sidecar has exited, and does not run yet."""
    cut_off: bool = False
    """Its node is known, and not ready: that the pod is not Ready is what the cluster supposes, and it may serve all the same."""


@dataclass(frozen=True)
class Group:
    """One ring group."""

    number: int
    size: int
    """Ranks that its StatefulSet asks for; 0 where it was given up."""
    template: str = ""
    """Hash of the template that its StatefulSet makes pods from."""
    ranks: tuple[Rank, ...] = ()
    """Those whose pods exist, by ordinal."""
    observed: bool = True
    """Whether the StatefulSet's controller has seen its template: before, it would make pods of the last one."""

    @property
    def leader(self) -> Rank | None:
        """Rank 0, unless it is on its way out."""
        return next((rank for rank in self.ranks if rank.ordinal == 0 and not rank.going), None)

    @property
    def members(self) -> int:
        """Ranks that are in the ring."""
        return sum(rank.ready for rank in self.ranks)

    @property
    def formed(self) -> bool:
        """Whether the ring serves."""
        return self.leader is not None and self.leader.ready

    @property
    def whole(self) -> bool:
        """Whether the ring serves with all of its ranks."""
        return self.formed and self.members == self.size

    @property
    def crashed(self) -> bool:
        """Whether exits keep it from forming a ring, for which it needs rank 0 and all others but one."""
        exited = [rank.ordinal for rank in self.ranks if rank.exited and not rank.going]
        return 0 in exited or len(exited) > 1

    @property
    def draining(self) -> bool:
        """Whether the operator drains it."""
        return self.leader is not None and self.leader.drain_since is not None

    @property
    def in_flight(self) -> float:
        """Requests it holds; endless where that is not known, so that what is known to be empty goes first."""
        known = self.leader.in_flight if self.leader is not None else 0
        return float("inf") if known is None else known

    def seconds_to_idle(self, now: datetime, grace_seconds: float) -> float | None:
        """Time until it has served nobody for the grace, 0 from then on; None while it serves, or may, or is drained.

        A ring that forms anew takes seconds and holds requests meanwhile, so it is not taken for one that serves nobody. Nor
        is one whose rank 0 is cut off: when many nodes cannot reach the API server, it is no time to renew all rings.
        """
        if self.formed or self.draining or (self.leader is not None and self.leader.cut_off):
            return None
        last = max((rank.since for rank in self.ranks), default=LONG_AGO)
        return max(0.0, grace_seconds - (now - last).total_seconds())

    def idle(self, now: datetime, grace_seconds: float) -> bool:
        """Whether it has served nobody for the grace."""
        return self.seconds_to_idle(now, grace_seconds) == 0.0


def set_name(service: str, number: int) -> str:
    """Name of a group's StatefulSet and of its headless Service: the ring engine finds rank 0 by it."""
    return f"{service}-ring-{number}"


def service_of_set(name: str) -> str | None:
    """The service that has a group whose StatefulSet bears that name, if any has; None if it is no group's name."""
    found = _SET.fullmatch(name)
    return found[1] if found else None


def set_number(name: str, service: str) -> int | None:
    """The group whose child has that name; None if it is none's. Names cannot be changed by hand, as labels can."""
    text = name.removeprefix(set_name(service, 0)[:-1])
    return int(text) if text != name and text.isdecimal() else None


def number_of(pod: Mapping[str, Any]) -> int | None:
    """The group that a pod belongs to; None if to none."""
    place = _place(pod)
    return place[0] if place else None


def ordinal_of(pod: Mapping[str, Any]) -> int | None:
    """The rank of a pod; None for the pod of no ring."""
    place = _place(pod)
    return place[1] if place else None


def serves_clients(pod: Mapping[str, Any]) -> bool:
    """Whether requests of clients come to this pod: of a ring, only rank 0."""
    return names.LABEL_GROUP not in (pod["metadata"].get("labels") or {}) or ordinal_of(pod) == 0


def _place(pod: Mapping[str, Any]) -> tuple[int, int] | None:
    """Group and rank of a pod, if its name bears out its labels, which are anybody's to set: a StatefulSet's controller takes
    in none by its labels alone either, and the ring engine reads the name."""
    labels = pod["metadata"].get("labels") or {}
    number, named = labels.get(names.LABEL_GROUP, ""), names.rank_of(pod["metadata"]["name"])
    if named is None or not number.isdecimal():
        return None
    return (int(number), named[1]) if named[0] == set_name(labels.get(names.LABEL_SERVICE, ""), int(number)) else None


def tells(pod: Mapping[str, Any]) -> bool:
    """Whether the state of a pod's sidecar is worth asking for: it serves clients, or is drained so that it can go."""
    annotations = pod["metadata"].get("annotations") or {}
    drains = names.ANNOTATION_DRAIN_SINCE in annotations and not pod["metadata"].get("deletionTimestamp")
    return serves_clients(pod) and (ready(pod) or drains)


def groups(snapshot: Snapshot) -> tuple[Group, ...]:
    """The groups that have a StatefulSet, by number."""
    ranks: dict[int, list[Rank]] = {}
    for pod in snapshot.pods:
        if (place := _place(pod)) is not None:
            ranks.setdefault(place[0], []).append(_rank(pod, place[1], snapshot))
    found = []
    for ref, held in snapshot.children.items():
        number = set_number(ref.name, snapshot.name)
        if ref.kind is not Kind.STATEFUL_SET or number is None or held["metadata"].get("deletionTimestamp"):
            continue
        mine = sorted(ranks.get(number, ()), key=lambda rank: rank.ordinal)
        seen = int((held.get("status") or {}).get("observedGeneration", 0)) >= int(
            held["metadata"].get("generation", 1)
        )
        size = int(held["spec"].get("replicas", 0))
        found.append(Group(number, size, _template_hash(held), tuple(mine), observed=seen))
    return tuple(sorted(found, key=lambda group: group.number))


def numbers_taken(snapshot: Snapshot) -> frozenset[int]:
    """Numbers that no new group may get yet: they have a StatefulSet, or pods of one that is gone are on their way out.

    Pods that stay without a set do not count: a set of that number takes them in.
    """
    sets = (set_number(ref.name, snapshot.name) for ref in snapshot.children if ref.kind is Kind.STATEFUL_SET)
    going = (number_of(pod) for pod in snapshot.pods if "deletionTimestamp" in pod["metadata"])
    return frozenset(number for number in (*sets, *going) if number is not None)


def _rank(pod: Manifest, ordinal: int, snapshot: Snapshot) -> Rank:
    metadata = pod["metadata"]
    annotations = metadata.get("annotations") or {}
    reading = snapshot.readings.get(metadata["name"])
    state = reading.state if reading and reading.state and reading.state.pod == metadata["name"] else None
    changed = pod_condition(pod, "Ready").get("lastTransitionTime") or metadata.get("creationTimestamp")
    node = snapshot.nodes.get(pod["spec"].get("nodeName") or "")
    return Rank(
        ordinal=ordinal,
        pod=metadata["name"],
        uid=metadata["uid"],
        ready=ready(pod),
        going="deletionTimestamp" in metadata,
        template=annotations.get(names.ANNOTATION_TEMPLATE_HASH, ""),
        since=max(time_of(changed) or LONG_AGO, node.since if node else LONG_AGO),
        drain_since=time_of(annotations.get(names.ANNOTATION_DRAIN_SINCE)),
        draining=state is not None and state.draining,
        in_flight=state.in_flight if state else None,
        ip=pod["status"].get("podIP", ""),
        exited=any(has_exited(status) for status in containers(pod)),
        cut_off=node is not None and not node.ready,
    )


def containers(pod: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The statuses of a rank's engine and sidecar, which is an init container."""
    for kind in ("initContainerStatuses", "containerStatuses"):
        yield from (status for status in pod["status"].get(kind, ()) if status["name"] in _OURS)


def has_exited(status: Mapping[str, Any]) -> bool:
    """Whether a container has exited and was not started again, also while it waits for that."""
    state, last = status.get("state", {}), status.get("lastState", {})
    return "terminated" in state or ("waiting" in state and "terminated" in last)


def _template_hash(stateful_set: Manifest) -> str:
    annotations = stateful_set["spec"]["template"]["metadata"].get("annotations") or {}
    return str(annotations.get(names.ANNOTATION_TEMPLATE_HASH, ""))


def time_of(text: str | None) -> datetime | None:
    """A Kubernetes timestamp; None where there is none, or somebody wrote something else."""
    try:
        found = datetime.fromisoformat(text) if text else None
    except ValueError:
        return None
    return found if found is None or found.tzinfo else found.replace(tzinfo=UTC)
