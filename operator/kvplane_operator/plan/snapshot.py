"""The immutable picture of one service that a plan is made from."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Any

from kvplane_api.wire import SidecarState

Manifest = dict[str, Any]


class Kind(StrEnum):
    """Kinds of children, in the order in which they are shown."""

    DEPLOYMENT = "Deployment"
    STATEFUL_SET = "StatefulSet"
    SERVICE = "Service"
    CONFIG_MAP = "ConfigMap"
    PDB = "PodDisruptionBudget"


WORKLOADS = frozenset({Kind.DEPLOYMENT, Kind.STATEFUL_SET})
"""Kinds of children that make pods."""


@dataclass(frozen=True, order=True)
class Ref:
    """One child by kind and name, in the service's namespace."""

    kind: Kind
    name: str

    def __str__(self) -> str:
        return f"{self.kind.value} {self.name}"


@dataclass(frozen=True)
class Version:
    """Which object of a name, and how new."""

    uid: str
    resource_version: str


class Obstacle(StrEnum):
    """Why a child could not be written."""

    CONFLICT = "conflict"  # an object that is not ours has the name
    LEFTOVER = "leftover"  # a child of an earlier service of that name; the garbage collector is about to remove it
    REJECTED = "rejected"  # the API server refused the child for good (422, 403)
    ENDING = "ending"  # the namespace is being deleted, and the service with it


@dataclass(frozen=True)
class Blocked:
    """A child that could not be written at the last attempt, and for which wanted content."""

    ref: Ref
    obstacle: Obstacle
    message: str
    generation: int


@dataclass(frozen=True)
class Reading:
    """What the last polls of a pod's sidecar gave."""

    state: SidecarState | None
    """The last answer; None if there is none, or none for too long."""
    silent: int = 0
    """Polls in a row, up to the last one, that gave no signals."""
    error: str = ""
    """Why the last poll failed; empty if it did not."""
    at: float | None = None
    """When ``state`` came, in seconds since the epoch; None: not known."""


@dataclass(frozen=True)
class Scaling:
    """What the autoscaler says of one service now. It changes only with what has to be done or told."""

    mode: str
    """Mode of the pool that it speaks of."""
    desired: int
    """Replicas that there should be."""
    blind: str = ""
    """Why nothing goes down, where signals have been missing for a while; else empty."""
    at_maximum: bool = False
    """More are needed, or were a moment ago, than there may be."""


@dataclass(frozen=True, order=True)
class Scaler:
    """A HorizontalPodAutoscaler, as far as it concerns one service."""

    name: str
    kind: str
    """Of what it targets: LLMService, or the kind of a child."""
    target: str


@dataclass(frozen=True)
class NodeView:
    """What the operator looks at of a node."""

    ready: bool
    since: datetime
    """When ``ready`` changed last."""
    out_of_service: bool = False
    """Somebody vouches that nothing runs there any more (taint node.kubernetes.io/out-of-service)."""


@dataclass(frozen=True)
class Snapshot:
    """One service as the watch caches and the last writes show it."""

    namespace: str
    name: str
    uid: str
    resource_version: str
    generation: int
    spec: Mapping[str, Any]
    status: Mapping[str, Any]
    deleting: bool = False
    children: Mapping[Ref, Manifest] = field(default_factory=dict)
    """Children owned by this service's uid."""
    pods: tuple[Manifest, ...] = ()
    readings: Mapping[str, Reading] = field(default_factory=dict)
    """By the name of the pod; only of pods that were polled."""
    blocked: tuple[Blocked, ...] = ()
    annotations: Mapping[str, str] = field(default_factory=dict)
    """Of the LLMService."""
    nodes: Mapping[str, NodeView] = field(default_factory=dict)
    """By name, those of this service's pods; empty where the operator may not read nodes."""
    scaling: Scaling | None = None
    """None: the autoscaler of this process has not decided yet, or does not decide."""
    scalers: tuple[Scaler, ...] = ()
    """Those of others that target this service, or something with the name of a child."""
    capacity_written: datetime | None = None
    """When this process last changed ``status.capacity``; None: not yet."""
