"""What the operator knows of the cluster: the last seen version of every object it watches.

Two sources feed it, the watches and the answers to the operator's own writes; the newer resourceVersion wins. So a plan
made right after a write already sees it, and the watch event that echoes the write is recognised as nothing new. The
store never asks the API server for anything. What the pods' sidecars and the autoscaler said last is kept beside them.
"""

from collections.abc import Collection, Iterator, Mapping
from datetime import datetime
from typing import Any, Final, TypeVar

from kvplane_api import names
from kvplane_operator.plan.ring.groups import LONG_AGO, tells, time_of
from kvplane_operator.plan.snapshot import (
    Blocked,
    Kind,
    Manifest,
    NodeView,
    Reading,
    Ref,
    Scaler,
    Scaling,
    Snapshot,
    Version,
)

SERVICE: Final = names.KIND
POD: Final = "Pod"

OUT_OF_SERVICE: Final = "node.kubernetes.io/out-of-service"

Key = tuple[str, str, str]
"""Kind, namespace, name."""

Place = TypeVar("Place")

_POD_METADATA: Final = (
    "name",
    "namespace",
    "uid",
    "resourceVersion",
    "creationTimestamp",
    "deletionTimestamp",
    "labels",
    "annotations",
)


class Store:
    """Objects by kind, namespace and name, with the index that a snapshot needs."""

    def __init__(self) -> None:
        self.complete = False
        """Whether all that exists has been taken in; before, what is not here may be there all the same."""
        self._objects: dict[Key, Manifest] = {}
        self._by_service: dict[tuple[str, str], set[Key]] = {}
        self._on_node: dict[str, set[Key]] = {}
        self._services: dict[str, Key] = {}
        self._pods: dict[str, Key] = {}
        self._readings: dict[str, Reading] = {}
        self._nodes: dict[str, NodeView] = {}
        self._scaling: dict[str, Scaling] = {}
        self._scalers: dict[tuple[str, str], tuple[Scaler, ...]] = {}

    def put(self, kind: str, manifest: Mapping[str, Any]) -> bool:
        """Take in one object; False if a newer (or this very) version is known already."""
        slim = _slim(kind, manifest)
        metadata = slim["metadata"]
        key = (kind, metadata["namespace"], metadata["name"])
        held = self._objects.get(key)
        if held is not None and not _newer(metadata, held["metadata"]):
            return False
        self._objects[key] = slim
        if held is not None:
            self._take_out(key, held)  # of what it was of before: its label may have been changed
        if kind == SERVICE:
            if held is not None and held["metadata"]["uid"] != metadata["uid"]:
                self._forget_service(held["metadata"]["uid"])  # made again under its name before its removal was seen
            self._services[metadata["uid"]] = key
        elif kind == POD:
            if held is not None and held["metadata"]["uid"] != metadata["uid"]:
                self._forget_pod(held["metadata"]["uid"])
            self._pods[metadata["uid"]] = key
            if not tells(slim):  # what was read of it before says nothing of its next start
                self._readings.pop(metadata["uid"], None)
        if owner := service_of(kind, metadata):
            self._by_service.setdefault((metadata["namespace"], owner), set()).add(key)
        if kind == POD and (node := slim["spec"].get("nodeName")):
            self._on_node.setdefault(node, set()).add(key)
        return True

    def remove(self, kind: str, manifest: Mapping[str, Any]) -> bool:
        """Forget an object that is gone; False if a newer one of that name is known already."""
        metadata = manifest["metadata"]
        key = (kind, metadata["namespace"], metadata["name"])
        held = self._objects.get(key)
        if held is None or (held["metadata"]["uid"] != metadata["uid"] and not _newer(metadata, held["metadata"])):
            return False
        self._forget(key)
        return True

    def retain(
        self, kind: str, listed: Mapping[tuple[str, str], Version], *, resource_version: str, namespace: str | None
    ) -> list[Manifest]:
        """Forget what a complete listing (by namespace and name) of one or all namespaces does not have; return it.

        A watch that had to start over does not report what vanished meanwhile. Objects that are newer than the listing
        stay.
        """
        lost = [
            (key, held)
            for key, held in self._objects.items()
            if key[0] == kind
            and namespace in (None, key[1])
            and ((found := listed.get(key[1:])) is None or found.uid != held["metadata"]["uid"])
            and int(held["metadata"]["resourceVersion"]) <= int(resource_version)
        ]
        for key, _ in lost:
            self._forget(key)
        return [held for _, held in lost]

    def behind(self, kind: str, listed: Mapping[tuple[str, str], Version]) -> list[tuple[str, str]]:
        """Namespaces and names of listed objects of which this or a newer version was never taken in."""
        return [
            where
            for where, version in listed.items()
            if (held := self._objects.get((kind, *where))) is None
            or int(held["metadata"]["resourceVersion"]) < int(version.resource_version)
        ]

    def uid_of(self, namespace: str, service: str) -> str | None:
        """UID of the service of that name."""
        held = self._objects.get((SERVICE, namespace, service))
        return held["metadata"]["uid"] if held else None

    def service_uid(self, kind: str, metadata: Mapping[str, Any]) -> str | None:
        """UID of the service that an object is of, or is; None where it is of none that is known."""
        name = service_of(kind, metadata)
        return self.uid_of(metadata["namespace"], name) if name else None

    def service(self, namespace: str, name: str) -> Manifest | None:
        """The service of that name."""
        return self._objects.get((SERVICE, namespace, name))

    def services(self) -> int:
        """How many services there are."""
        return len(self._services)

    def llmservices(self) -> Iterator[Manifest]:
        """All services."""
        return (self._objects[key] for key in self._services.values())

    def pods(self) -> Iterator[Manifest]:
        """All pods of services."""
        return (self._objects[key] for key in self._pods.values())

    def pods_of(self, uid: str) -> list[Manifest]:
        """The pods of one service; none if it is gone."""
        key = self._services.get(uid)
        keys = self._by_service.get(key[1:], ()) if key else ()
        return [self._objects[each] for each in keys if each[0] == POD]

    def reading(self, pod_uid: str) -> Reading | None:
        """What that pod's sidecar said last."""
        return self._readings.get(pod_uid)

    def put_node(self, node: Mapping[str, Any]) -> list[str]:
        """Take in a node; the uids of the services that have pods there, if it is news to them."""
        name = node["metadata"]["name"]
        view = _view(node)
        if self._nodes.get(name) == view:
            return []
        self._nodes[name] = view
        return self._services_on(name)

    def remove_node(self, name: str) -> None:
        """Forget a node that is gone; Kubernetes itself removes the pods of nodes that are no more."""
        self._nodes.pop(name, None)

    def note(self, pod_uid: str, reading: Reading) -> bool:
        """Keep what a pod's sidecar said for as long as it tells; False if it does not, or is gone."""
        key = self._pods.get(pod_uid)
        if key is None or not tells(self._objects[key]):
            return False
        self._readings[pod_uid] = reading
        return True

    def scale(self, uid: str, scaling: Scaling | None) -> bool:
        """Keep what the autoscaler says of a service, None for nothing; False if that is not news, or the service is gone."""
        if self._scaling.get(uid) == scaling or (scaling is not None and uid not in self._services):
            return False
        if scaling is None:
            del self._scaling[uid]
        else:
            self._scaling[uid] = scaling
        return True

    def put_scalers(
        self, scalers: Mapping[tuple[str, str], tuple[Scaler, ...]], *, unlisted: Collection[str | None] = ()
    ) -> list[str]:
        """Take in all scalers of others, by namespace and service; the uids of the services to which that is news.

        Those of ``unlisted`` namespaces stay as they are; None among them means all namespaces.
        """
        kept = {key: held for key, held in self._scalers.items() if None in unlisted or key[0] in unlisted}
        known = {**kept, **scalers}
        news = {key for key in self._scalers.keys() | known.keys() if self._scalers.get(key) != known.get(key)}
        self._scalers = known
        return [uid for key in sorted(news) if (uid := self.uid_of(*key)) is not None]

    def snapshot(
        self, uid: str, blocked: tuple[Blocked, ...] = (), *, capacity_written: datetime | None = None
    ) -> Snapshot | None:
        """The picture of one service; None if it is gone."""
        key = self._services.get(uid)
        service = self._objects.get(key) if key else None
        if service is None or service["metadata"]["uid"] != uid:
            return None
        metadata = service["metadata"]
        namespace, name = metadata["namespace"], metadata["name"]
        children: dict[Ref, Manifest] = {}
        pods: list[Manifest] = []
        for child_key in sorted(self._by_service.get((namespace, name), ())):
            child = self._objects[child_key]
            if child_key[0] == POD:
                pods.append(child)
            elif child_key[0] != SERVICE and owned_by(child, uid):
                children[Ref(Kind(child_key[0]), child_key[2])] = child
        return Snapshot(
            namespace=namespace,
            name=name,
            uid=uid,
            resource_version=metadata["resourceVersion"],
            generation=metadata["generation"],
            spec=service["spec"],
            status=service.get("status") or {},
            deleting="deletionTimestamp" in metadata,
            children=children,
            pods=tuple(pods),
            readings={
                pod["metadata"]["name"]: self._readings[pod["metadata"]["uid"]]
                for pod in pods
                if pod["metadata"]["uid"] in self._readings
            },
            blocked=blocked,
            annotations=metadata.get("annotations") or {},
            nodes={
                node: self._nodes[node] for pod in pods if (node := pod["spec"].get("nodeName")) in self._nodes and node
            },
            scaling=self._scaling.get(uid),
            scalers=self._scalers.get((namespace, name), ()),
            capacity_written=capacity_written,
        )

    def _services_on(self, node: str) -> list[str]:
        owners = {(key[1], service_of(POD, self._objects[key]["metadata"])) for key in self._on_node.get(node, ())}
        uids = (self.uid_of(namespace, name) for namespace, name in owners if name is not None)
        return [uid for uid in uids if uid is not None]

    def _forget(self, key: Key) -> None:
        held = self._objects.pop(key)
        if key[0] == SERVICE:
            self._forget_service(held["metadata"]["uid"])
        elif key[0] == POD:
            self._forget_pod(held["metadata"]["uid"])
        self._take_out(key, held)

    def _take_out(self, key: Key, held: Manifest) -> None:
        if owner := service_of(key[0], held["metadata"]):
            _leave(self._by_service, (key[1], owner), key)
        if key[0] == POD and (node := held["spec"].get("nodeName")):
            _leave(self._on_node, node, key)

    def _forget_service(self, uid: str) -> None:
        self._services.pop(uid, None)
        self._scaling.pop(uid, None)

    def _forget_pod(self, uid: str) -> None:
        self._pods.pop(uid, None)
        self._readings.pop(uid, None)


def service_of(kind: str, metadata: Mapping[str, Any]) -> str | None:
    """Name of the service an object belongs to by its label; of a service, its own."""
    if kind == SERVICE:
        return str(metadata["name"])
    return (metadata.get("labels") or {}).get(names.LABEL_SERVICE)


def owned_by(manifest: Mapping[str, Any], uid: str) -> bool:
    """Whether the object's controller is the service of that uid."""
    owners = manifest["metadata"].get("ownerReferences") or ()
    return any(owner.get("controller") and owner.get("uid") == uid for owner in owners)


def _view(node: Mapping[str, Any]) -> NodeView:
    conditions = (node.get("status") or {}).get("conditions") or ()
    ready: Mapping[str, Any] = next((c for c in conditions if c["type"] == "Ready"), {})
    taints = (node.get("spec") or {}).get("taints") or ()
    return NodeView(
        # Without the condition the node has only just come; it is not taken for one that is lost.
        ready=ready.get("status", "True") == "True",
        since=time_of(ready.get("lastTransitionTime")) or LONG_AGO,
        out_of_service=any(taint.get("key") == OUT_OF_SERVICE for taint in taints),
    )


def _leave(index: dict[Place, set[Key]], place: Place, key: Key) -> None:
    keys = index[place]
    keys.discard(key)
    if not keys:
        del index[place]


def _newer(metadata: Mapping[str, Any], held: Mapping[str, Any]) -> bool:
    # Resource versions of one resource are integers that grow (KEP-5504).
    return int(metadata["resourceVersion"]) > int(held["resourceVersion"])


def _slim(kind: str, manifest: Mapping[str, Any]) -> Manifest:
    """The parts that plans read: managedFields alone is often half of an object."""
    metadata = manifest["metadata"]
    if kind == POD:
        spec = {"nodeName": manifest["spec"].get("nodeName"), **_claims(manifest["spec"])}
        kept = {key: metadata[key] for key in _POD_METADATA if key in metadata}
        return {"metadata": kept, "spec": spec, "status": manifest.get("status") or {}}
    slim = {key: value for key, value in manifest.items() if key != "metadata"}
    slim["metadata"] = {key: value for key, value in metadata.items() if key != "managedFields"}
    return slim


def _claims(spec: Mapping[str, Any]) -> dict[str, Any]:
    """The volumes of a pod that are claims, and how its containers use volumes; nothing where there is no claim."""
    volumes = [v for v in spec.get("volumes") or () if "persistentVolumeClaim" in v or "ephemeral" in v]
    if not volumes:
        return {}
    uses = {
        kind: [{part: c[part] for part in ("volumeMounts", "volumeDevices") if part in c} for c in spec.get(kind) or ()]
        for kind in ("initContainers", "containers")
    }
    return {"volumes": volumes, **uses}
