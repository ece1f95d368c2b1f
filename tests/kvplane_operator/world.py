"""Fabricated snapshots: services, children as the API server would hold them, pods in every state."""

import copy
import itertools
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from kvplane_api.wire import SidecarState
from kvplane_operator.plan.service import Plan, make_plan
from kvplane_operator.plan.snapshot import Blocked, Kind, Manifest, NodeView, Reading, Ref, Scaler, Scaling, Snapshot
from kvplane_operator.plan.status import status_patch
from kvplane_operator.settings import OperatorSettings

NOW = datetime(2026, 1, 1, 12, tzinfo=UTC)
NAME = "chat"
DEPLOYMENT = Ref(Kind.DEPLOYMENT, NAME)
CONFIG_MAP = Ref(Kind.CONFIG_MAP, NAME)
PDB = Ref(Kind.PDB, NAME)
HF: Mapping[str, Any] = {"model": {"source": "hf://acme/tiny"}}
NATIVE: Mapping[str, Any] = {**HF, "autoscaling": {"policy": "Native", "maxReplicas": 8}}


def settings(**values: Any) -> OperatorSettings:
    """Settings of an installation, with images of its own."""
    defaults = {
        "identity": "test",
        "sidecar_image": "example.com/control:1",
        "engine_image": "example.com/vllm:1",
        "ring_image": "example.com/ring:1",
    }
    return OperatorSettings(**(defaults | values))


class World:
    """One service and its children; plans are carried out at once and without fail."""

    def __init__(self, spec: Mapping[str, Any] = HF, *, settings: OperatorSettings | None = None) -> None:
        self.spec: dict[str, Any] = copy.deepcopy(dict(spec))
        self.settings = settings or globals()["settings"]()
        self.children: dict[Ref, Manifest] = {}
        self.pods: list[Manifest] = []
        self.status: dict[str, Any] = {}
        self.blocked: tuple[Blocked, ...] = ()
        self.readings: dict[str, Reading] = {}
        self.annotations: dict[str, str] = {}
        self.nodes: dict[str, NodeView] = {}
        self.scaling: Scaling | None = None
        self.scalers: tuple[Scaler, ...] = ()
        self.now = NOW
        self.capacity_written: datetime | None = None
        self.generation = 1
        self._versions = itertools.count(1)

    def snapshot(self) -> Snapshot:
        return Snapshot(
            namespace="team",
            name=NAME,
            uid="uid-of-chat",
            resource_version="1",
            generation=self.generation,
            spec=self.spec,
            status=self.status,
            children=copy.deepcopy(self.children),
            pods=tuple(self.pods),
            readings=dict(self.readings),
            blocked=self.blocked,
            annotations=dict(self.annotations),
            nodes=dict(self.nodes),
            scaling=self.scaling,
            scalers=self.scalers,
            capacity_written=self.capacity_written,
        )

    def plan(self) -> Plan:
        return make_plan(self.snapshot(), settings=self.settings, now=self.now)

    def settle(self) -> Plan:
        """Carry a plan out and return it."""
        plan = self.plan()
        for write in plan.writes:
            held = self.children.get(write.ref, {"metadata": {}})
            stored = copy.deepcopy(write.manifest)
            stored["metadata"] |= {
                "uid": held["metadata"].get("uid", f"uid-of-{write.ref}"),
                "resourceVersion": str(next(self._versions)),
                "generation": held["metadata"].get("generation", 0) + 1,
            }
            if "status" in held:
                stored["status"] = held["status"]
            self.children[write.ref] = stored
        for deletion in plan.deletions:
            del self.children[deletion.ref]
        if "capacity" in status_patch(self.status, plan.status):
            self.capacity_written = self.now
        self.status = {key: value for key, value in plan.status.items() if value is not None}
        return plan

    def change(self, **fields: Any) -> None:
        """A new generation with these parts of the spec replaced."""
        self.spec |= fields
        self.generation += 1

    def counts(self, *, replicas: int, ready: int, updated: int | None = None, **more: Any) -> None:
        """What the Deployment's controller reports."""
        deployment = self.children[DEPLOYMENT]
        deployment["status"] = {
            "observedGeneration": deployment["metadata"]["generation"],
            "replicas": replicas,
            "readyReplicas": ready,
            "availableReplicas": ready,
            "updatedReplicas": replicas if updated is None else updated,
            **more,
        }

    def plan_of(self, ref: Ref) -> Manifest:
        """What the operator says of a child, without what identifies it."""
        held = self.children[ref]
        parts = {key: value for key, value in held.items() if key not in ("apiVersion", "kind", "metadata", "status")}
        return {**parts, "metadata": {"labels": held["metadata"]["labels"]}}

    def template(self) -> dict[str, Any]:
        template: dict[str, Any] = self.children[DEPLOYMENT]["spec"]["template"]
        return template

    def condition(self, kind: str) -> tuple[str, str]:
        """Status and reason of a condition of the wanted status."""
        found = self.wanted(kind)
        return found["status"], found["reason"]

    def wanted(self, kind: str) -> dict[str, Any]:
        conditions: list[dict[str, Any]] = self.plan().status["conditions"]
        return next(c for c in conditions if c["type"] == kind)


def settled(spec: Mapping[str, Any] = HF, **values: Any) -> World:
    """A world whose children exist."""
    world = World(spec, settings=settings(**values))
    world.settle()
    return world


def engine(world: World) -> dict[str, Any]:
    """The engine's container."""
    (container,) = (c for c in world.template()["spec"]["containers"] if c["name"] == "engine")
    return dict(container)


def sidecar(world: World) -> dict[str, Any]:
    """The sidecar's container."""
    (container,) = (c for c in world.template()["spec"]["initContainers"] if c["name"] == "kvplane-sidecar")
    return dict(container)


def pod(
    name: str = "chat-1",
    *,
    node: str | None = "node-1",
    ready: bool = False,
    engine: Mapping[str, Any] | None = None,
    sidecar: Mapping[str, Any] | None = None,
    unscheduled: str | None = None,
    **status: Any,
) -> Manifest:
    """A pod as the kubelet reports it; ``engine`` and ``sidecar`` are container statuses (state, lastState, ...)."""
    conditions = [{"type": "Ready", "status": str(ready)}]
    if unscheduled is not None:
        node = None
        conditions.append({"type": "PodScheduled", "status": "False", "message": unscheduled})
    return {
        "metadata": {"name": name, "uid": f"uid-of-{name}", "annotations": {}},
        "spec": {"nodeName": node},
        "status": {
            "conditions": conditions,
            "initContainerStatuses": [{"name": "kvplane-sidecar", "image": "s", "restartCount": 0, **(sidecar or {})}],
            "containerStatuses": [{"name": "engine", "image": "e", "restartCount": 0, **(engine or {})}],
            **status,
        },
    }


def crashed(
    code: int = 1, *, restarts: int = 1, reason: str = "Error", log: str = "", seconds: int = 5
) -> dict[str, Any]:
    """Status of a container that exited and waits for its next start."""
    ended = {
        "exitCode": code,
        "reason": reason,
        "message": log,
        "startedAt": "2026-01-01T12:00:00Z",
        "finishedAt": f"2026-01-01T{12 + seconds // 3600:02d}:{seconds % 3600 // 60:02d}:{seconds % 60:02d}Z",
    }
    return {
        "restartCount": restarts,
        "state": {"waiting": {"reason": "CrashLoopBackOff", "message": "back-off"}},
        "lastState": {"terminated": ended},
    }


_ENGINE: Mapping[str, Any] = {
    "kvCacheUsageRatio": 0.4,
    "kvCacheBlocks": 100,
    "kvCacheBlockSizeTokens": 16,
    "kvCacheCapacityTokens": 1600,
    "maxModelLenTokens": 4096,
}
_ADMISSION: Mapping[str, Any] = {
    "policy": "Enforce",
    "running": 1,
    "queued": 0,
    "queuedPromptTokens": 0,
    "queuedReservationTokens": 0,
    "reservedTokens": 0,
    "kappa": 1.0,
    "admittedTotal": 0,
    "refusedTotal": 0,
    "shedReservationTokensTotal": 0,
}


def state(
    name: str = "chat-1",
    *,
    engine: Mapping[str, Any] = _ENGINE,
    admission: Mapping[str, Any] | None = _ADMISSION,
    **fields: Any,
) -> SidecarState:
    """What the sidecar of a pod that serves tells while all is well, with these fields of the wire over it."""
    usual = {"engineReady": True, "draining": False, "inFlight": 1, "signalAgeSeconds": 0.5, "startupSeconds": 42.0}
    parts = {"engine": {**_ENGINE, **engine}, "admission": None if admission is None else {**_ADMISSION, **admission}}
    return SidecarState.model_validate({"pod": name, "servedName": NAME, **usual, **parts, **fields})


def waiting(reason: str, message: str = "") -> dict[str, Any]:
    """Status of a container that could not start."""
    return {"state": {"waiting": {"reason": reason, "message": message}}}


RUNNING: Mapping[str, Any] = {"state": {"running": {"startedAt": "2026-01-01T12:00:00Z"}}}
