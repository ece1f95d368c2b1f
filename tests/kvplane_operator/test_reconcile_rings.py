"""What a plan for rings makes the operator do, and in which order; with a cluster that only takes notes."""

import itertools
from collections.abc import Mapping
from typing import Any, cast

import pytest

from kvplane_api import names
from kvplane_operator import metrics
from kvplane_operator.cluster import Cluster, ConflictError, RefusedError
from kvplane_operator.plan.snapshot import Kind, Manifest, Ref
from kvplane_operator.plan.status import status_patch
from kvplane_operator.reconcile import Reconciler
from kvplane_operator.store import POD, SERVICE, Store
from tests.kvplane_operator.ring_world import with_ring
from tests.kvplane_operator.world import crashed, pod, settings

UID = "uid-of-chat"
RING = with_ring(recovery={"reformGraceSeconds": 0, "restartBudget": 0})
LEADER = "chat-ring-0-0"


class Notes:
    """A cluster in which everything succeeds at once."""

    def __init__(self) -> None:
        self.store = Store()
        self.store.complete = True
        self.done: list[tuple[str, ...]] = []
        self.sets: dict[str, Manifest] = {}
        self.gone: set[str] = set()
        """Pods, by uid, that were deleted by force; the watch has not told of it."""
        self.behind = False
        """The watch has not brought the newest version of the service yet."""
        self.refusal = ""
        """What the API server says to each write of a child; empty: it takes them all."""
        self.pod_refusal = ""
        """The same for changes of pods."""
        self._versions = itertools.count(1)
        self._service: Manifest = {
            "metadata": {"namespace": "team", "name": "chat", "uid": UID, "generation": 0},
            "spec": {},
        }

    def ask(self, spec: Mapping[str, Any]) -> None:
        """The user applies this spec."""
        self._service["spec"] = dict(spec)
        self._service["metadata"]["generation"] += 1
        self._put(SERVICE, self._service)

    def serve(self, *, ready: bool = True, exits: int = 0, lost: int | None = None) -> None:
        """The pods of group 0: in a ring or not; rank 0 exited so often; this rank is on a lost node and told to go."""
        template = self.sets["chat-ring-0"]["spec"]["template"]["metadata"]
        for ordinal in range(3):
            engine = crashed(restarts=exits - 1) if exits and ordinal == 0 else None
            made = pod(f"chat-ring-0-{ordinal}", node=f"node-{ordinal}", ready=ready, engine=engine)
            made["metadata"] |= {"labels": template["labels"], "annotations": dict(template["annotations"])}
            made["status"]["podIP"] = f"10.0.0.{ordinal}"
            if ordinal == lost:
                made["metadata"]["deletionTimestamp"] = "2026-01-01T12:00:00Z"
            self._put(POD, made)

    def drift(self, name: str) -> None:
        """Somebody else writes into a group's StatefulSet."""
        held = self.sets[name]
        self._put(Kind.STATEFUL_SET.value, {**held, "spec": {**held["spec"], "serviceName": "elsewhere"}})

    def lose(self, node: str) -> None:
        """The node has not answered for years."""
        condition = {"type": "Ready", "status": "Unknown", "lastTransitionTime": "2020-01-01T12:00:00Z"}
        assert self.store.put_node({"metadata": {"name": node}, "status": {"conditions": [condition]}}) == [UID]

    def accepted(self) -> tuple[str, str]:
        """Status and reason of Accepted, as written."""
        found = next(c for c in self._service["status"]["conditions"] if c["type"] == "Accepted")
        return found["status"], found["reason"]

    async def apply(
        self, namespace: str, ref: Ref, manifest: Manifest, *, uid: str | None, dry_run: bool = False
    ) -> Manifest:
        assert not dry_run
        if self.refusal:
            raise RefusedError(self.refusal, code=403)
        written = {**manifest, "metadata": {**manifest["metadata"], "uid": uid or f"uid-of-{ref}", "generation": 1}}
        written["metadata"]["resourceVersion"] = str(next(self._versions))
        self.done.append(("apply", str(ref)))
        if ref.kind is Kind.STATEFUL_SET:
            self.done[-1] += (str(manifest["spec"]["replicas"]),)
            self.sets[ref.name] = written
        return written

    async def annotate_pod(self, namespace: str, name: str, key: str, value: str, *, uid: str | None = None) -> None:
        if self.pod_refusal:
            raise RefusedError(self.pod_refusal, code=403)
        self.done.append(("annotate", name, key, str(uid)))

    async def delete_pod(self, namespace: str, name: str, *, uid: str, force: bool) -> bool:
        self.done.append(("delete pod", name, uid, "by force" if force else "gently"))
        there = uid not in self.gone
        if force:
            self.gone.add(uid)
        return there

    async def patch_status(
        self, namespace: str, name: str, status: Mapping[str, Any], *, uid: str, resource_version: str
    ) -> Manifest:
        if self.behind:
            raise ConflictError("the object has been modified", code=409)
        held = {**self._service.get("status", {}), **status}
        self._service["status"] = {key: value for key, value in held.items() if value is not None}
        self.done.append(("status", *sorted(pool["name"] for pool in held["pools"] if "failedGroups" in pool)))
        return self._next(self._service)

    async def create_event(self, namespace: str, event: Mapping[str, Any]) -> None:
        self.done.append(("event", event["reason"]))

    async def drain(self, ip: str) -> None:
        """What the reconciler is given to ask a sidecar with."""
        self.done.append(("ask to drain", ip))

    def _put(self, kind: str, manifest: Manifest) -> None:
        self.store.put(kind, self._next(manifest))

    def _next(self, manifest: Manifest) -> Manifest:
        version = {"namespace": "team", "resourceVersion": str(next(self._versions))}
        return {**manifest, "metadata": {**manifest["metadata"], **version}}


@pytest.fixture
def notes() -> Notes:
    return Notes()


def reconciler_of(notes: Notes) -> Reconciler:
    """One that remembers nothing yet."""
    given = settings(read_nodes=True)
    return Reconciler(store=notes.store, cluster=cast("Cluster", notes), settings=given, drain=notes.drain)


async def reconciled(notes: Notes) -> list[tuple[str, ...]]:
    """What is done until there is nothing to do at once."""
    reconciler = reconciler_of(notes)
    notes.done.clear()
    for _ in range(10):
        if await reconciler.reconcile(UID) != 0.0:
            return notes.done
    raise AssertionError(f"It does not settle: {notes.done}")


async def test_sets_come_last_and_then_it_is_told(notes: Notes) -> None:
    notes.ask(RING)
    done = await reconciled(notes)
    kinds = [note[0] if note[0] != "apply" else note[1].split()[0] for note in done]
    assert kinds.index("StatefulSet") == max(i for i, kind in enumerate(kinds) if kind in set(Kind))
    assert kinds.index("StatefulSet") < kinds.index("status")
    assert ("apply", "StatefulSet chat-ring-0", "3") in done


async def test_a_settled_service_is_left_alone(notes: Notes) -> None:
    notes.ask(RING)
    await reconciled(notes)
    notes.serve()
    await reconciled(notes)
    assert await reconciled(notes) == []


async def test_nothing_is_done_before_all_that_exists_is_known(notes: Notes) -> None:
    """What is not in the store yet would be made anew, beside what is there."""
    notes.store.complete = False
    notes.ask(RING)
    assert await reconciled(notes) == []
    notes.store.complete = True
    assert ("apply", "StatefulSet chat-ring-0", "3") in await reconciled(notes)


async def test_rank_0_is_marked_and_then_asked_to_drain(notes: Notes) -> None:
    notes.ask(RING)
    await reconciled(notes)
    notes.serve()
    await reconciled(notes)
    notes.ask({**RING, "engine": {"startupTimeoutSeconds": 60}})
    done = [note for note in await reconciled(notes) if note[0] in ("annotate", "ask to drain", "delete pod")]
    assert done[:2] == [
        ("annotate", LEADER, names.ANNOTATION_DRAIN_SINCE, f"uid-of-{LEADER}"),
        ("ask to drain", "10.0.0.0"),
    ]
    assert not any(note[0] == "delete pod" for note in done)
    assert not any(note[:2] == ("apply", "StatefulSet chat-ring-0") for note in notes.done)  # not while it serves


async def test_a_policy_that_keeps_pods_from_being_marked_keeps_nothing_else_back(notes: Notes) -> None:
    notes.ask(RING)
    await reconciled(notes)
    notes.serve()
    await reconciled(notes)
    notes.pod_refusal = "admission webhook denies changes of pods"
    notes.ask({**RING, "engine": {"startupTimeoutSeconds": 60}})
    done = [note[0] for note in await reconciled(notes)]
    assert "ask to drain" in done
    assert "status" in done


async def test_a_rank_on_a_lost_node_is_deleted_by_force_and_told_of(notes: Notes) -> None:
    notes.ask(RING)
    await reconciled(notes)
    notes.serve(lost=1)
    notes.lose("node-1")
    before = forced()
    done = [*await reconciled(notes)]
    assert ("delete pod", "chat-ring-0-1", "uid-of-chat-ring-0-1", "by force") in done
    done += await reconciled(notes)  # the watch is late, and it is deleted once more
    assert done.count(("event", "PodDeletedByForce")) == 1
    assert forced() - before == 1


async def test_a_rank_on_a_lost_node_goes_also_while_a_child_is_refused(notes: Notes) -> None:
    """Its group would stay a rank short for as long as somebody else's quota is full."""
    notes.ask(RING)
    await reconciled(notes)
    notes.serve(lost=1)
    notes.lose("node-1")
    notes.refusal = "exceeded quota: groups"
    notes.ask({**RING, "replicas": 2})
    done = await reconciled(notes)
    assert notes.accepted() == ("False", "ChildRejected")
    assert ("delete pod", "chat-ring-0-1", "uid-of-chat-ring-0-1", "by force") in done


async def test_a_refusal_stands_while_it_is_not_tried_again(notes: Notes) -> None:
    """Healing pauses longer each time; in between nothing has become well."""
    notes.ask(RING)
    await reconciled(notes)
    notes.serve()
    await reconciled(notes)
    notes.drift("chat-ring-0")
    notes.refusal = "denied by a policy"
    reconciler = reconciler_of(notes)
    for _ in range(3):
        await reconciler.reconcile(UID)
        assert notes.accepted() == ("False", "ChildRejected")


async def test_in_a_namespace_that_goes_no_child_is_tried_again_without_a_pause(notes: Notes) -> None:
    """The service may go last, after all that would be made anew for it."""
    notes.refusal = "unable to create new content in namespace team because it is being terminated"
    notes.ask(RING)
    await reconciled(notes)  # fails where it does not settle
    assert notes.accepted() == ("True", "Valid")


def forced() -> float:
    return metrics.REGISTRY.get_sample_value("kvplane_operator_ring_pods_deleted_total", {"cause": "forced"}) or 0.0


async def test_a_verdict_is_told_before_a_group_is_given_up(notes: Notes) -> None:
    notes.ask(RING)
    await reconciled(notes)
    notes.serve(ready=False, exits=2)
    done = await reconciled(notes)
    told, scaled = done.index(("status", "chat-ring")), done.index(("apply", "StatefulSet chat-ring-0", "0"))
    assert told < scaled
    assert ("event", "RestartBudgetExhausted") in done[told:]


async def test_a_verdict_that_cannot_be_told_yet_is_not_tried_without_a_pause(notes: Notes) -> None:
    """The watch is behind, for minutes perhaps: until then the API server would refuse each attempt."""
    notes.ask(RING)
    await reconciled(notes)
    notes.serve(ready=False, exits=2)
    notes.behind = True
    assert all(note[0] != "status" for note in await reconciled(notes))


def test_status_patches_of_pools_are_whole() -> None:
    """A list is replaced as it is, so that a verdict never mixes with an older one."""
    held = {"pools": [{"name": "chat-ring", "failedGroups": [0], "retry": "1"}]}
    assert status_patch(held, {"pools": [{"name": "chat-ring"}]}) == {"pools": [{"name": "chat-ring"}]}
