"""One service that scales itself, whole: autoscaler, queue and reconciler, and a cluster that makes its pods; in virtual time."""

import asyncio
import contextlib
import copy
import itertools
from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from typing import Any, Final, cast

from kvplane_api import names
from kvplane_operator.cluster import Cluster, UnreachableError
from kvplane_operator.plan.signals import answered, failed
from kvplane_operator.plan.snapshot import Kind, Manifest, Ref
from kvplane_operator.reconcile import Reconciler
from kvplane_operator.scaling import Autoscaler
from kvplane_operator.store import POD, SERVICE, Store
from kvplane_operator.workqueue import WorkQueue
from tests.kvplane_operator.world import NATIVE, RUNNING, pod, settings, state

START: Final = 1_700_000_000.0
UID: Final = "uid-of-chat"
CAPACITY: Final = 100_000
USABLE: Final = 85_000
"""Of CAPACITY, with nothing learned: what counts as one replica."""
STATE: Final = "chat.autoscaler"


class Stage:
    """A cluster with one service, whose replicas share whatever load there is."""

    def __init__(self, spec: Mapping[str, Any] = NATIVE) -> None:
        self.store = Store()
        self.store.complete = True
        self.load = 0.0
        """Demand, in replicas."""
        self.startup = 20.0
        """Seconds until a pod is Ready."""
        self.silent: set[str] = set()
        """Pods whose sidecars do not answer; "*": none does."""
        self.pausing = False
        """Whether its requests are over whenever it is read."""
        self.unschedulable = False
        self.quota = 1000
        """Most pods that there may be."""
        self.leading = True
        self.broken = False
        """No write succeeds."""
        self.events: list[tuple[float, str, str]] = []
        """(time, reason, message) of those about scaling."""
        self.reads: list[float] = []
        self.asked: list[tuple[float, int]] = []
        """(time, replicas) of each change of the Deployment."""
        self.written: list[tuple[float, str]] = []
        """(time, name) of each ConfigMap written."""
        self.autoscaler = self.restarted()
        self._queue: WorkQueue | None = None
        self._admitted = 0
        self._versions = itertools.count(1)
        self._born = 0
        self._pods: dict[str, Manifest] = {}
        self._deployment: Manifest | None = None
        self._service: Manifest = {
            "metadata": {"namespace": "team", "name": "chat", "uid": UID, "generation": 0, "annotations": {}},
            "spec": {},
        }
        self.change(spec)

    def restarted(self) -> Autoscaler:
        """An autoscaler that knows nothing yet; what the last one said is gone with its process."""
        self.store.scale(UID, None)
        return Autoscaler(
            store=self.store,
            cluster=cast("Cluster", self),
            read=self._read,
            leading=lambda: self.leading,
            enqueue=self._enqueue,
            clock=self.now,
        )

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """The operator, while in the context."""
        reconciler = Reconciler(
            store=self.store, cluster=cast("Cluster", self), settings=settings(), drain=self._ask_to_drain
        )
        queue = self._queue = WorkQueue(reconciler.reconcile, workers=2)
        self._enqueue(UID)
        tasks = [asyncio.create_task(queue.run()), asyncio.create_task(self.autoscaler.run())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            for result in await asyncio.gather(*tasks, return_exceptions=True):
                assert isinstance(result, asyncio.CancelledError), result

    # What a user does.

    def change(self, spec: Mapping[str, Any]) -> None:
        """Apply this spec."""
        self._service["spec"] = copy.deepcopy(dict(spec))
        self._service["metadata"]["generation"] += 1
        self._put_service()

    def autoscaling(self, **fields: Any) -> None:
        """Apply NATIVE with these fields of spec.autoscaling over it."""
        self.change({**NATIVE, "autoscaling": {**NATIVE["autoscaling"], **fields}})

    def wake(self, value: str) -> None:
        """Annotate the service."""
        self._service["metadata"]["annotations"][names.ANNOTATION_WAKE] = value
        self._put_service()

    def remove(self) -> None:
        """Delete the service; its children go with it."""
        self.store.remove(SERVICE, self._next(self._service))

    def scale_deployment(self, replicas: int) -> None:
        """As somebody does who goes past the operator."""
        assert self._deployment is not None
        self._deployment["spec"]["replicas"] = replicas
        self._replace()

    def spoil(self, state: str) -> None:
        """Write something else into the autoscaler's ConfigMap."""
        snapshot = self.store.snapshot(UID)
        assert snapshot is not None
        held = self._next(snapshot.children[Ref(Kind.CONFIG_MAP, STATE)])
        held["data"]["state.json"] = state
        self.store.put(Kind.CONFIG_MAP.value, held)

    # What is there.

    @staticmethod
    def now() -> float:
        """Seconds since the epoch."""
        return START + asyncio.get_running_loop().time()

    @property
    def replicas(self) -> int:
        """What the Deployment asks for."""
        return int(self._deployment["spec"]["replicas"]) if self._deployment else -1

    @property
    def pods(self) -> list[str]:
        """Names of the pods, the oldest first."""
        return list(self._pods)

    def condition(self) -> tuple[str, str]:
        """Status and reason of ScalingActive, as written."""
        found = next(c for c in self._service["status"]["conditions"] if c["type"] == "ScalingActive")
        return found["status"], found["reason"]

    def told(self, reason: str) -> list[str]:
        """Messages of the events of that reason."""
        return [message for _, each, message in self.events if each == reason]

    def kept(self) -> dict[str, str]:
        """What stands in the autoscaler's ConfigMap."""
        snapshot = self.store.snapshot(UID)
        assert snapshot is not None
        held: dict[str, str] = snapshot.children[Ref(Kind.CONFIG_MAP, STATE)]["data"]
        return held

    # What the operator asks of the cluster and of the sidecars.

    async def apply(
        self, namespace: str, ref: Ref, manifest: Manifest, *, uid: str | None, dry_run: bool = False
    ) -> Manifest:
        if self.broken:
            raise UnreachableError("The API server does not answer.")
        written = self._next(manifest)
        written["metadata"] |= {"uid": uid or f"uid-of-{ref}", "generation": 1}
        if ref.kind is Kind.CONFIG_MAP:
            self.written.append((asyncio.get_running_loop().time(), ref.name))
        if ref.kind is Kind.DEPLOYMENT:
            replicas = manifest["spec"]["replicas"]
            if replicas != self.replicas:
                self.asked.append((asyncio.get_running_loop().time(), replicas))
            self._deployment = written
            self._replace()
        return copy.deepcopy(written)

    async def annotate_pod(self, namespace: str, name: str, key: str, value: str, *, uid: str | None = None) -> None:
        if name in self._pods:
            self._pods[name]["metadata"]["annotations"][key] = value
            self._put_pod(name)

    async def delete(self, namespace: str, ref: Ref, *, uid: str, resource_version: str) -> None:
        self.store.remove(ref.kind.value, {"metadata": {"namespace": namespace, "name": ref.name, "uid": uid}})

    async def patch_status(
        self, namespace: str, name: str, status: Mapping[str, Any], *, uid: str, resource_version: str
    ) -> Manifest:
        held = {**self._service.get("status", {}), **status}
        self._service["status"] = {key: value for key, value in held.items() if value is not None}
        self._service = self._next(self._service)
        return copy.deepcopy(self._service)

    async def create_event(self, namespace: str, event: Mapping[str, Any]) -> None:
        self.events.append((asyncio.get_running_loop().time(), event["reason"], event["message"]))

    @staticmethod
    async def _ask_to_drain(ip: str) -> None:
        return

    async def _read(self, uid: str) -> None:
        assert uid == UID
        self.reads.append(asyncio.get_running_loop().time())
        ready = [name for name, found in self._pods.items() if found["status"]["conditions"][0]["status"] == "True"]
        share = self.load / len(ready) if ready else 0.0
        self._admitted += 10 if share else 0
        for name in ready:
            before = self.store.reading(f"uid-of-{name}")
            if self.silent & {name, "*"}:
                reading = failed(before, "refused")
            else:
                reading = answered(before, self._state(name, 0.0 if self.pausing else share), at=self.now())
            self.store.note(f"uid-of-{name}", reading)

    def _state(self, name: str, share: float) -> Any:
        """Of a sidecar whose engine holds what it can of this share, and whose queue has the rest."""
        held = min(CAPACITY, round(share * USABLE))
        queued = max(0, round(share * USABLE) - held)
        return state(
            name,
            engine={
                "kvCacheCapacityTokens": CAPACITY,
                "kvCacheUsageRatio": held / CAPACITY,
                "requestsRunning": 100 if held else 0,
                "requestsWaiting": 0,
                "promptTokensTotal": self._admitted,
                "generationTokensTotal": self._admitted,
            },
            admission={
                "queued": 100 if queued else 0,
                "queuedReservationTokens": queued,
                "admittedTotal": self._admitted,
            },
        )

    # How the cluster does it.

    def _replace(self) -> None:
        """Pods come and go until there are as many as are asked for; those of the lowest cost go first."""
        wanted = min(self.replicas, self.quota)
        while len(self._pods) > wanted:
            self._end(min(reversed(self._pods), key=self._cost))
        while len(self._pods) < wanted:
            self._begin()
        self._count()

    def _cost(self, name: str) -> tuple[bool, int]:
        found = self._pods[name]
        ready = found["status"]["conditions"][0]["status"] == "True"
        return ready, int(found["metadata"]["annotations"].get(names.ANNOTATION_DELETION_COST, "0"))

    def _begin(self) -> None:
        self._born += 1
        name = f"chat-{self._born}"
        found = pod(name, engine=RUNNING, unscheduled="no node" if self.unschedulable else None)
        found["status"]["podIP"] = name
        found["metadata"] |= {
            "labels": {names.LABEL_SERVICE: "chat"},
            "creationTimestamp": datetime.fromtimestamp(self.now(), UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        self._pods[name] = found
        self._put_pod(name)
        if not self.unschedulable:
            asyncio.get_running_loop().call_later(self.startup, self._serve, name)

    def _serve(self, name: str) -> None:
        if name in self._pods:
            self._pods[name]["status"]["conditions"][0]["status"] = "True"
            self._put_pod(name)
            self._count()

    def _end(self, name: str) -> None:
        self.store.remove(POD, self._next(self._pods.pop(name)))

    def _count(self) -> None:
        """The Deployment's status."""
        assert self._deployment is not None
        ready = sum(found["status"]["conditions"][0]["status"] == "True" for found in self._pods.values())
        counts = {"observedGeneration": 1, "replicas": len(self._pods), "updatedReplicas": len(self._pods)}
        failure = {"type": "ReplicaFailure", "status": "True", "message": "exceeded quota"}
        self._deployment = self._next(self._deployment)
        self._deployment["status"] = {
            **counts,
            "readyReplicas": ready,
            "availableReplicas": ready,
            "conditions": [failure] if self.replicas > self.quota else [],
        }
        self.store.put(Kind.DEPLOYMENT.value, copy.deepcopy(self._deployment))
        self._enqueue(UID)

    def _enqueue(self, uid: str) -> None:
        """As a watch event does; before the operator runs there is nobody to tell."""
        if self._queue is not None:
            self._queue.add(uid)

    def _put_pod(self, name: str) -> None:
        self.store.put(POD, self._next(self._pods[name]))

    def _put_service(self) -> None:
        self._service = self._next(self._service)
        self.store.put(SERVICE, copy.deepcopy(self._service))
        self._enqueue(UID)

    def _next(self, manifest: Manifest) -> Manifest:
        """A copy, as the next version."""
        copied = copy.deepcopy(manifest)
        copied["metadata"] |= {"namespace": "team", "resourceVersion": str(next(self._versions))}
        return copied
