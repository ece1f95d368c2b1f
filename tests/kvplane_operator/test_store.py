"""The store: the newer version wins, whichever of watch and write brings it."""

from datetime import UTC, datetime
from typing import Any

import pytest

from kvplane_api import names
from kvplane_operator.plan.ring.stuck import writes_to_claim
from kvplane_operator.plan.snapshot import Kind, NodeView, Reading, Ref, Scaler, Scaling, Snapshot, Version
from kvplane_operator.store import POD, SERVICE, Store

DEPLOYMENT = Kind.DEPLOYMENT.value


def service(version: int = 1, *, uid: str = "u1", name: str = "chat", **more: Any) -> dict[str, Any]:
    metadata = {"namespace": "team", "name": name, "uid": uid, "resourceVersion": str(version), "generation": 1}
    return {"metadata": {**metadata, "managedFields": [{"a": 1}]}, "spec": {"replicas": version}, **more}


def child(version: int = 1, *, owner: str = "u1", uid: str = "d1", name: str = "chat") -> dict[str, Any]:
    return {
        "metadata": {
            "namespace": "team",
            "name": name,
            "uid": uid,
            "resourceVersion": str(version),
            "labels": {names.LABEL_SERVICE: "chat"},
            "ownerReferences": [{"uid": owner, "controller": True}],
            "managedFields": [{"a": 1}],
        },
        "spec": {"replicas": version},
    }


def pod(version: int = 1, name: str = "chat-1") -> dict[str, Any]:
    labels = {names.LABEL_SERVICE: "chat"}
    metadata = {"namespace": "team", "name": name, "uid": name, "resourceVersion": str(version), "labels": labels}
    return {"metadata": metadata, "spec": {"nodeName": "n", "containers": [{}]}, "status": {"phase": "Running"}}


@pytest.fixture
def store() -> Store:
    store = Store()
    store.put(SERVICE, service())
    return store


def replicas(store: Store) -> int | None:
    snapshot = store.snapshot("u1")
    held = snapshot.children.get(Ref(Kind.DEPLOYMENT, "chat")) if snapshot else None
    return held["spec"]["replicas"] if held else None


def test_the_newer_version_wins(store: Store) -> None:
    assert store.put(DEPLOYMENT, child(5))
    assert not store.put(DEPLOYMENT, child(4))
    assert not store.put(DEPLOYMENT, child(5))
    assert replicas(store) == 5
    assert store.put(DEPLOYMENT, child(10))  # as integers: "10" is newer than "5"
    assert replicas(store) == 10


def test_the_echo_of_a_write_is_nothing_new(store: Store) -> None:
    written = child(7)
    assert store.put(DEPLOYMENT, written)
    assert not store.put(DEPLOYMENT, written)


def test_a_removal_forgets(store: Store) -> None:
    store.put(DEPLOYMENT, child(5))
    assert store.remove(DEPLOYMENT, child(6))
    assert replicas(store) is None
    assert not store.remove(DEPLOYMENT, child(6))


def test_a_late_removal_of_the_predecessor_leaves_the_successor(store: Store) -> None:
    store.put(DEPLOYMENT, child(9, uid="d2"))
    assert not store.remove(DEPLOYMENT, child(6, uid="d1"))
    assert replicas(store) == 9


def test_a_removal_names_the_service_of_that_uid_only(store: Store) -> None:
    store.put(SERVICE, service(9, uid="u2"))
    assert not store.remove(SERVICE, service(5, uid="u1"))
    assert store.snapshot("u2") is not None


def test_children_of_others_are_not_in_the_snapshot(store: Store) -> None:
    store.put(DEPLOYMENT, child(owner="somebody"))
    assert replicas(store) is None


def test_pods_are_known_by_their_label_and_kept_slim(store: Store) -> None:
    store.put(POD, pod())
    snapshot = store.snapshot("u1")
    assert snapshot is not None
    (held,) = snapshot.pods
    assert held["spec"] == {"nodeName": "n"}
    assert held["status"] == {"phase": "Running"}


def test_a_pod_whose_label_was_changed_is_of_the_other_service_alone(store: Store) -> None:
    """As somebody does who takes a pod out of its service to look at it: a trace of it that outlived it would break every
    snapshot of the service."""
    store.put(SERVICE, service(name="mail", uid="u2"))
    store.put(POD, pod())
    moved = pod(2)
    moved["metadata"]["labels"] = {names.LABEL_SERVICE: "mail"}
    store.put(POD, moved)
    left, joined = store.snapshot("u1"), store.snapshot("u2")
    assert left is not None
    assert joined is not None
    assert (left.pods, len(joined.pods)) == ((), 1)
    assert store.remove(POD, moved)
    for uid in ("u1", "u2"):
        snapshot = store.snapshot(uid)
        assert snapshot is not None
        assert snapshot.pods == ()
        assert store.pods_of(uid) == []


def test_of_a_pods_volumes_its_claims_are_kept(store: Store) -> None:
    """A pod that may write to one is not deleted by force, whatever its template says by then."""
    found = pod()
    mount = {"name": "state", "mountPath": "/state"}
    found["spec"] |= {
        "volumes": [{"name": "tmp", "emptyDir": {}}, {"name": "state", "persistentVolumeClaim": {"claimName": "s"}}],
        "containers": [{"name": "engine", "image": "e", "volumeMounts": [mount]}],
    }
    store.put(POD, found)
    snapshot = store.snapshot("u1")
    assert snapshot is not None
    (held,) = snapshot.pods
    assert held["spec"] == {
        "nodeName": "n",
        "volumes": [{"name": "state", "persistentVolumeClaim": {"claimName": "s"}}],
        "initContainers": [],
        "containers": [{"volumeMounts": [mount]}],
    }
    assert writes_to_claim(held)


def test_managed_fields_are_not_kept(store: Store) -> None:
    store.put(DEPLOYMENT, child())
    snapshot = store.snapshot("u1")
    assert snapshot is not None
    assert "managedFields" not in snapshot.children[Ref(Kind.DEPLOYMENT, "chat")]["metadata"]


def test_a_service_that_is_gone_has_no_snapshot(store: Store) -> None:
    assert store.uid_of("team", "chat") == "u1"
    store.remove(SERVICE, service(2))
    assert (store.snapshot("u1"), store.uid_of("team", "chat"), store.services()) == (None, None, 0)
    assert list(store.llmservices()) == []


def test_a_service_made_again_has_a_snapshot_of_its_own(store: Store) -> None:
    store.put(DEPLOYMENT, child())
    store.put(SERVICE, service(5, uid="u2"))
    assert store.snapshot("u1") is None
    snapshot = store.snapshot("u2")
    assert snapshot is not None
    assert snapshot.children == {}
    assert store.services() == 1
    assert [held["metadata"]["uid"] for held in store.llmservices()] == ["u2"]


def test_deletion_is_seen(store: Store) -> None:
    going = service(2)
    going["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
    store.put(SERVICE, going)
    snapshot = store.snapshot("u1")
    assert snapshot is not None
    assert snapshot.deleting


def test_a_listing_forgets_what_vanished_while_nobody_watched(store: Store) -> None:
    store.put(POD, pod(3, "chat-1"))
    store.put(POD, pod(4, "chat-2"))
    lost = store.retain(POD, {("team", "chat-2"): Version("chat-2", "4")}, resource_version="10", namespace=None)
    assert [held["metadata"]["name"] for held in lost] == ["chat-1"]
    snapshot = store.snapshot("u1")
    assert snapshot is not None
    assert [held["metadata"]["name"] for held in snapshot.pods] == ["chat-2"]


def test_a_listing_forgets_what_was_replaced_meanwhile(store: Store) -> None:
    store.put(DEPLOYMENT, child(3, uid="d1"))
    assert store.retain(DEPLOYMENT, {("team", "chat"): Version("d2", "9")}, resource_version="10", namespace=None)


def test_what_is_newer_than_the_listing_stays(store: Store) -> None:
    store.put(POD, pod(11))
    assert store.retain(POD, {}, resource_version="10", namespace=None) == []


def test_a_listing_of_one_namespace_says_nothing_of_others(store: Store) -> None:
    store.put(POD, pod(3))
    assert store.retain(POD, {}, resource_version="10", namespace="other") == []
    assert len(store.retain(POD, {}, resource_version="10", namespace="team")) == 1


def test_what_is_listed_and_was_not_seen_is_behind(store: Store) -> None:
    store.put(POD, pod(3, "chat-1"))
    store.put(POD, pod(5, "chat-2"))
    listed = {
        ("team", "chat-1"): Version("chat-1", "4"),
        ("team", "chat-2"): Version("chat-2", "4"),
        ("team", "chat-3"): Version("chat-3", "2"),
    }
    assert store.behind(POD, listed) == [("team", "chat-1"), ("team", "chat-3")]


def serving(version: int, *, well: bool = True) -> dict[str, Any]:
    manifest = pod(version)
    manifest["status"]["conditions"] = [{"type": "Ready", "status": str(well)}]
    return manifest


class TestReadings:
    READING = Reading(None, 1, "refused")

    def readings(self, store: Store) -> dict[str, Reading]:
        snapshot = store.snapshot("u1")
        assert snapshot is not None
        return dict(snapshot.readings)

    def test_of_a_pod_are_in_the_snapshot_by_its_name(self, store: Store) -> None:
        store.put(POD, serving(3))
        assert store.note("chat-1", self.READING)
        assert self.readings(store) == {"chat-1": self.READING}

    def test_outlive_what_else_happens_to_the_pod(self, store: Store) -> None:
        store.put(POD, serving(3))
        store.note("chat-1", self.READING)
        store.put(POD, serving(4))
        assert self.readings(store) == {"chat-1": self.READING}

    def test_end_when_the_pod_stops_serving(self, store: Store) -> None:
        """An engine that restarts: what was read of it before says nothing of it after."""
        store.put(POD, serving(3))
        store.note("chat-1", self.READING)
        store.put(POD, serving(4, well=False))
        assert self.readings(store) == {}
        assert not store.note("chat-1", self.READING)
        store.put(POD, serving(5))
        assert self.readings(store) == {}

    def test_end_with_the_pod(self, store: Store) -> None:
        store.put(POD, serving(3))
        store.note("chat-1", self.READING)
        store.remove(POD, pod(4))
        assert store.reading("chat-1") is None
        assert list(store.pods()) == []

    def test_end_with_a_pod_that_was_replaced_under_its_name(self, store: Store) -> None:
        store.put(POD, serving(3))
        store.note("chat-1", self.READING)
        new = serving(4)
        new["metadata"]["uid"] = "another"
        store.put(POD, new)
        assert self.readings(store) == {}
        assert [held["metadata"]["uid"] for held in store.pods()] == ["another"]

    def test_of_a_pod_that_nobody_knows_are_not_kept(self, store: Store) -> None:
        assert not store.note("chat-1", self.READING)
        assert store.reading("chat-1") is None


class TestDrainedPods:
    def test_are_read_until_they_go(self, store: Store) -> None:
        """A rank 0 that is drained is not Ready, and says when it is empty."""
        drained = serving(3, well=False)
        drained["metadata"]["annotations"] = {names.ANNOTATION_DRAIN_SINCE: "2026-01-01T12:00:00Z"}
        store.put(POD, drained)
        assert store.note("chat-1", TestReadings.READING)
        going = serving(4, well=False)
        going["metadata"] |= {
            **drained["metadata"],
            "resourceVersion": "4",
            "deletionTimestamp": "2026-01-01T12:00:09Z",
        }
        store.put(POD, going)
        assert store.reading("chat-1") is None


class TestNodes:
    @staticmethod
    def node(name: str = "n", *, ready: str = "True", taints: tuple[str, ...] = ()) -> dict[str, Any]:
        condition = {"type": "Ready", "status": ready, "lastTransitionTime": "2026-01-01T12:00:00Z"}
        spec = {"taints": [{"key": key, "effect": "NoExecute"} for key in taints]}
        return {"metadata": {"name": name}, "spec": spec, "status": {"conditions": [condition]}}

    def seen(self, store: Store) -> dict[str, NodeView]:
        snapshot = store.snapshot("u1")
        assert snapshot is not None
        return dict(snapshot.nodes)

    @pytest.mark.parametrize(("ready", "well"), [("True", True), ("False", False), ("Unknown", False)])
    def test_of_the_services_pods_are_in_the_snapshot(self, store: Store, ready: str, well: bool) -> None:
        store.put(POD, pod(3))
        store.put_node(self.node(ready=ready))
        store.put_node(self.node("elsewhere"))
        assert self.seen(store) == {"n": NodeView(ready=well, since=datetime(2026, 1, 1, 12, tzinfo=UTC))}

    def test_that_somebody_vouches_for(self, store: Store) -> None:
        store.put(POD, pod(3))
        store.put_node(self.node(ready="Unknown", taints=("node.kubernetes.io/out-of-service",)))
        assert self.seen(store)["n"].out_of_service

    def test_are_news_to_the_services_on_them_once(self, store: Store) -> None:
        store.put(POD, pod(3))
        assert store.put_node(self.node()) == ["u1"]
        assert store.put_node(self.node()) == []
        assert store.put_node(self.node(ready="Unknown")) == ["u1"]
        assert store.put_node(self.node("elsewhere")) == []

    def test_are_no_news_to_a_service_whose_pods_there_are_gone(self, store: Store) -> None:
        store.put(POD, pod(3))
        store.put(POD, pod(4, "chat-2"))
        store.remove(POD, pod(3))
        assert store.put_node(self.node()) == ["u1"]
        store.remove(POD, pod(4, "chat-2"))
        assert store.put_node(self.node(ready="Unknown")) == []
        moved = pod(5)
        moved["spec"]["nodeName"] = "elsewhere"
        store.put(POD, pod(4))
        store.put(POD, moved)  # made again under its name before its removal was seen
        assert store.put_node(self.node()) == []
        assert store.put_node(self.node("elsewhere")) == ["u1"]

    def test_that_are_gone_are_not_known(self, store: Store) -> None:
        store.put(POD, pod(3))
        store.put_node(self.node())
        store.remove_node("n")
        assert self.seen(store) == {}

    def test_without_a_word_on_readiness_are_not_lost(self, store: Store) -> None:
        store.put(POD, pod(3))
        store.put_node({"metadata": {"name": "n"}, "spec": {}, "status": {}})
        assert self.seen(store)["n"].ready


class TestScaling:
    SAYS = Scaling(mode="Paged", desired=3)

    @staticmethod
    def seen(store: Store) -> Snapshot:
        snapshot = store.snapshot("u1")
        assert snapshot is not None
        return snapshot

    def test_what_the_autoscaler_says_is_in_the_snapshot_and_news_once(self, store: Store) -> None:
        assert self.seen(store).scaling is None
        assert store.scale("u1", self.SAYS)
        assert not store.scale("u1", self.SAYS)
        assert self.seen(store).scaling == self.SAYS
        assert store.scale("u1", None)
        assert not store.scale("u1", None)
        assert self.seen(store).scaling is None

    def test_of_a_service_that_is_gone_nothing_is_kept(self, store: Store) -> None:
        store.scale("u1", self.SAYS)
        store.remove(SERVICE, service(2))
        assert not store.scale("u1", self.SAYS)
        store.put(SERVICE, service(3))
        assert self.seen(store).scaling is None

    def test_of_a_service_made_again_under_its_name_nothing_is_known(self, store: Store) -> None:
        store.scale("u1", self.SAYS)
        store.put(SERVICE, service(2, uid="u2"))
        assert not store.scale("u1", None)
        assert store.snapshot("u1") is None

    def test_outlives_changes_of_the_service(self, store: Store) -> None:
        store.scale("u1", self.SAYS)
        store.put(SERVICE, service(2))
        assert self.seen(store).scaling == self.SAYS

    def test_scalers_of_others_are_news_to_the_services_they_concern(self, store: Store) -> None:
        theirs, mail = Scaler("theirs", "Deployment", "chat"), Scaler("theirs", "Deployment", "mail")
        found = {("team", "chat"): (theirs,), ("team", "mail"): (mail,), ("other", "chat"): (theirs,)}
        assert store.put_scalers(found) == ["u1"]
        assert store.put_scalers(found) == []
        assert self.seen(store).scalers == (theirs,)
        assert store.put_scalers({}) == ["u1"]
        assert self.seen(store).scalers == ()


def test_pods_of_a_service(store: Store) -> None:
    store.put(POD, pod(3, "chat-1"))
    store.put(POD, pod(4, "chat-2"))
    store.put(DEPLOYMENT, child(5))
    assert sorted(each["metadata"]["name"] for each in store.pods_of("u1")) == ["chat-1", "chat-2"]
    assert store.pods_of("gone") == []


def test_annotations_of_the_service_are_in_the_snapshot(store: Store) -> None:
    annotated = service(2)
    annotated["metadata"]["annotations"] = {names.ANNOTATION_RETRY: "1"}
    store.put(SERVICE, annotated)
    snapshot = store.snapshot("u1")
    assert snapshot is not None
    assert snapshot.annotations == {names.ANNOTATION_RETRY: "1"}
