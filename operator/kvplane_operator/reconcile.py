"""Brings one service to what its plan says: observe, plan, apply; then tell, in status and events.

Order of writes: an overlay that the user changed is tried out by the API server before anything is written; pods that are to
go first are told so before their Deployment asks for fewer; what makes pods comes after all other children, so that no pod
starts while one of their names is somebody else's. A child that should not exist yet is only created: a name that is taken is
noticed by the write itself. Then come deletions, of children and of ring pods, and sidecars are asked to drain. The status is
written last, from a fresh plan, and only where it differs.
"""

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from kvplane_api import names
from kvplane_api.conditions import Type
from kvplane_operator import metrics
from kvplane_operator.cluster import ApiError, Cluster, ConflictError, RefusedError
from kvplane_operator.events import STAMP, event_of
from kvplane_operator.plan.actions import Deletion, DeletionCost, Drain, PodDeletion, Write
from kvplane_operator.plan.service import Plan, make_plan
from kvplane_operator.plan.snapshot import WORKLOADS, Blocked, Kind, Manifest, Obstacle, Ref, Snapshot
from kvplane_operator.plan.status import status_patch
from kvplane_operator.settings import OperatorSettings
from kvplane_operator.store import SERVICE, Store, owned_by

logger = logging.getLogger(__name__)

_HEAL_FIRST_SECONDS = 1.0
_HEAL_LONGEST_SECONDS = 60.0
_HEAL_FORGET_SECONDS = 300.0
_UNTOLD_SECONDS = 1.0
"""After a status that was refused, as it was planned from an old version: until the watch has brought the new one, each further
attempt would be refused too, and a plan may wait for nothing else."""
_INCOMPLETE_SECONDS = 0.5
"""Between looks until all that exists is in the store. A service may be there before its children are: by what its plan then
misses, replicas would begin anew, and pods be rendered anew."""


@dataclass
class _Memory:
    """What a service needs remembered between reconciles, and may lose in a restart."""

    blocked: tuple[Blocked, ...] = ()
    heals: dict[Ref, tuple[int, float]] = field(default_factory=dict)
    """How often in a row a child was healed, and when last: two writers that disagree must not spin."""
    capacity_written: datetime | None = None


class Reconciler:
    """Reconciles services by uid; one at a time for each, many side by side."""

    def __init__(
        self, *, store: Store, cluster: Cluster, settings: OperatorSettings, drain: Callable[[str], Awaitable[None]]
    ) -> None:
        """``drain`` asks the sidecar at an IP to take no more requests."""
        self._drain_at = drain
        self._store = store
        self._cluster = cluster
        self._settings = settings
        self._memory: dict[str, _Memory] = {}

    async def reconcile(self, uid: str) -> float | None:
        """One pass; returns the seconds after which the service wants another one without a cause."""
        if not self._store.complete:
            return _INCOMPLETE_SECONDS
        memory = self._memory.setdefault(uid, _Memory())
        snapshot = self._look(uid, memory)
        if snapshot is None:
            self._memory.pop(uid, None)
            return None
        if snapshot.deleting:
            return None
        with metrics.RECONCILE_SECONDS.time():
            plan = self._plan(snapshot)
            put_off = None
            if plan.acts or memory.blocked:
                written, put_off = await self._execute(snapshot, plan, memory)
                if written and not memory.blocked:
                    # What there is to tell is told in a pass of its own, from the end of the queue: in a burst, the
                    # children of all services come before the status of any.
                    return 0.0
                fresh = self._look(uid, memory)
                if fresh is None:
                    return None
                snapshot, plan = fresh, self._plan(fresh)
            told = await self._tell(snapshot, plan, memory)
        waits = [self._settings.resync_seconds, plan.wake_after_seconds, put_off]
        soonest = min(wait for wait in waits if wait is not None)
        return soonest if told else max(soonest, _UNTOLD_SECONDS)

    def _look(self, uid: str, memory: _Memory) -> Snapshot | None:
        return self._store.snapshot(uid, memory.blocked, capacity_written=memory.capacity_written)

    def _plan(self, snapshot: Snapshot) -> Plan:
        return make_plan(snapshot, settings=self._settings, now=datetime.now(UTC))

    async def _execute(self, snapshot: Snapshot, plan: Plan, memory: _Memory) -> tuple[bool, float | None]:
        """Do the plan's writes; returns whether there were any, and when to come back for what was put off."""
        namespace = snapshot.namespace
        writes, put_off = self._calm(plan.writes, memory)
        if any(write.ref.kind is Kind.DEPLOYMENT for write in writes):
            await asyncio.gather(*(self._tell_cost(namespace, cost) for cost in plan.deletion_costs))
        blocked = await self._try_out(snapshot, plan, writes) or await self._apply_all(snapshot, writes)
        put_off_refs = {write.ref for write in plan.writes} - {write.ref for write in writes}
        # What was refused, and is not tried again yet, is refused still.
        memory.blocked = (*blocked, *(b for b in memory.blocked if b.ref in put_off_refs))
        if memory.blocked:
            # Whoever is to go on a node that is lost has been told so by somebody else, and waits for no child.
            await asyncio.gather(*(self._delete_pod(snapshot, each) for each in plan.pod_deletions if each.force))
        else:
            await asyncio.gather(
                *(self._delete(namespace, deletion) for deletion in plan.deletions),
                *(
                    self._annotate(namespace, pod, names.ANNOTATION_CONFIG_HASH, plan.config_hash)
                    for pod in plan.touched_pods
                ),
                *(self._delete_pod(snapshot, deletion) for deletion in plan.pod_deletions),
                *(self._drain(namespace, drain) for drain in plan.drains),
            )
        return bool(writes), put_off

    async def _delete(self, namespace: str, deletion: Deletion) -> None:
        try:
            await self._cluster.delete(
                namespace, deletion.ref, uid=deletion.uid, resource_version=deletion.resource_version
            )
        except ConflictError:
            return  # it changed since it was seen; the watch event of that change brings it back here

    async def _delete_pod(self, snapshot: Snapshot, deletion: PodDeletion) -> None:
        logger.info("Pod %s/%s is deleted: %s.", snapshot.namespace, deletion.pod, deletion.why)
        try:
            done = await self._cluster.delete_pod(
                snapshot.namespace, deletion.pod, uid=deletion.uid, force=deletion.force
            )
        except ConflictError:
            return  # another pod bears the name; its watch event brings it back here
        if not done:
            return  # the watch has yet to tell that it is gone
        metrics.RING_PODS_DELETED.labels("forced" if deletion.force else "renewed").inc()
        if deletion.force:
            text = f"Pod {deletion.pod} is deleted by force: {deletion.why}."
            await self._post(snapshot, event_of(snapshot, "Warning", "PodDeletedByForce", text))

    async def _tell_cost(self, namespace: str, told: DeletionCost) -> None:
        try:
            await self._annotate(namespace, told.pod, names.ANNOTATION_DELETION_COST, str(told.cost), uid=told.uid)
        except ConflictError:
            return  # another pod bears the name: it is as young as can be, and nothing is lost with it

    async def _annotate(self, namespace: str, pod: str, key: str, value: str, *, uid: str | None = None) -> None:
        """What stands there makes things quicker or gentler. Where a policy refuses it they happen all the same."""
        try:
            await self._cluster.annotate_pod(namespace, pod, key, value, uid=uid)
        except RefusedError as error:
            logger.warning("Pod %s/%s goes without the annotation %s: %s", namespace, pod, key, error)

    async def _drain(self, namespace: str, drain: Drain) -> None:
        """The mark first: it says to whoever leads next that this rank 0 is to go."""
        if not drain.marked:
            stamp = datetime.now(UTC).strftime(STAMP)
            try:
                await self._annotate(namespace, drain.pod, names.ANNOTATION_DRAIN_SINCE, stamp, uid=drain.uid)
            except ConflictError:
                return
        if drain.ip:
            await self._drain_at(drain.ip)

    def _calm(self, writes: tuple[Write, ...], memory: _Memory) -> tuple[list[Write], float | None]:
        """Put off healing that did not hold before: each time in a row twice as long."""
        now = time.monotonic()
        calm, waits = [], []
        for write in writes:
            if write.why == "spec changed" or not write.exists:
                memory.heals.pop(write.ref, None)
                calm.append(write)
                continue
            count, last = memory.heals.get(write.ref, (0, 0.0))
            if now - last > _HEAL_FORGET_SECONDS:
                count = 0
            pause = min(_HEAL_LONGEST_SECONDS, _HEAL_FIRST_SECONDS * 2 ** (count - 1)) if count else 0.0
            if now - last < pause:
                waits.append(pause - (now - last))
                continue
            memory.heals[write.ref] = (count + 1, now)
            metrics.DRIFT_HEALED.labels(write.ref.kind.value).inc()
            logger.info("%s is healed: %s", write.ref, write.why)
            calm.append(write)
        return calm, min(waits, default=None)

    async def _try_out(self, snapshot: Snapshot, plan: Plan, writes: list[Write]) -> list[Blocked]:
        """Have the API server check a workload with a user's overlay before anything, its record too, is written."""
        if not plan.dry_run_first:
            return []
        tried = [write for write in writes if write.ref.kind in WORKLOADS]
        return [b for write in tried if (b := await self._write(snapshot, write, dry_run=True))]

    async def _apply_all(self, snapshot: Snapshot, writes: list[Write]) -> list[Blocked]:
        # Workloads last: no pod starts while a name is not ours, and the record of the pod template, in the ConfigMap,
        # is never younger than a workload made from it.
        first = [write for write in writes if write.ref.kind not in WORKLOADS]
        last = [write for write in writes if write.ref.kind in WORKLOADS]
        blocked: list[Blocked] = []
        for batch in (first, last):
            results = await asyncio.gather(*(self._write(snapshot, write) for write in batch))
            blocked += [b for b in results if b is not None]
            if blocked:
                break
        return blocked

    async def _write(self, snapshot: Snapshot, write: Write, *, dry_run: bool = False) -> Blocked | None:
        try:
            applied = await self._cluster.apply(
                snapshot.namespace, write.ref, write.manifest, uid=write.uid, dry_run=dry_run
            )
        except RefusedError as error:
            message = f"The API server refuses {write.ref}: {error}"
            obstacle = Obstacle.ENDING if "being terminated" in str(error) else Obstacle.REJECTED
            return Blocked(write.ref, obstacle, message, snapshot.generation)
        except ConflictError:
            if write.uid is not None:
                raise  # the object was replaced meanwhile: look again
            return await self._write_over(snapshot, write, dry_run=dry_run)
        if not dry_run:
            self._store.put(write.ref.kind.value, applied)
        return None

    async def _write_over(self, snapshot: Snapshot, write: Write, *, dry_run: bool) -> Blocked | None:
        """The name of a child that is not in the store is taken: by ours with its label lost, or by somebody else's?"""
        held = await self._cluster.get(snapshot.namespace, write.ref)
        if held is None:
            raise ConflictError(f"{write.ref} was there a moment ago, and is gone: it is tried again.", code=409)
        if not owned_by(held, snapshot.uid):
            return _not_ours(snapshot, write.ref, held)
        ours = replace(write, exists=True, uid=held["metadata"]["uid"])
        return await self._write(snapshot, ours, dry_run=dry_run)

    async def _tell(self, snapshot: Snapshot, plan: Plan, memory: _Memory) -> bool:
        """Write what differs of the status, and an event for each condition whose reason changed; False if the service is
        another version by now.
        """
        patch = status_patch(snapshot.status, plan.status)
        if not patch:
            return True
        try:
            written = await self._cluster.patch_status(
                snapshot.namespace,
                snapshot.name,
                patch,
                uid=snapshot.uid,
                resource_version=snapshot.resource_version,
            )
        except ConflictError:
            return False  # its watch event brings it back here
        except ApiError as error:
            if error.code == 404:
                return False
            raise
        self._store.put(SERVICE, written)
        if "capacity" in patch:
            memory.capacity_written = datetime.now(UTC)
        for event in _events(snapshot, plan):
            await self._post(snapshot, event)
        return True

    async def _post(self, snapshot: Snapshot, event: dict[str, Any]) -> None:
        try:
            await self._cluster.create_event(snapshot.namespace, event)
        except ApiError as error:
            logger.info("An event was not posted: %s", error)


def _not_ours(snapshot: Snapshot, ref: Ref, manifest: Manifest) -> Blocked:
    for owner in manifest["metadata"].get("ownerReferences") or ():
        if owner.get("kind") == names.KIND and owner.get("name") == snapshot.name:
            message = f"{ref} belongs to an earlier {names.KIND} of this name and is about to be removed."
            return Blocked(ref, Obstacle.LEFTOVER, message, snapshot.generation)
    message = (
        f"{ref} exists in namespace {snapshot.namespace} and does not belong to this {names.KIND}. It is left alone: rename the "
        f"{names.KIND}, or delete that object."
    )
    return Blocked(ref, Obstacle.CONFLICT, message, snapshot.generation)


_TOLD = (
    Type.ACCEPTED,
    Type.AVAILABLE,
    Type.PROGRESSING,
    Type.DEGRADED,
    Type.SIGNALS_FRESH,
    Type.SCALING_ACTIVE,
)


def _events(snapshot: Snapshot, plan: Plan) -> list[dict[str, Any]]:
    """Events for what a person watching the service would want to see happen."""
    before = {c["type"]: c for c in snapshot.status.get("conditions") or ()}
    events = []
    mode, was = plan.status["mode"], snapshot.status.get("mode")
    if plan.choice is not None and plan.choice.why and mode != was and (was or mode == "Ring"):
        events.append(event_of(snapshot, "Normal", "ModeChosen", plan.choice.why))
    for condition in plan.status["conditions"]:
        old = before.get(condition["type"])
        if condition["type"] not in _TOLD or (old is not None and old["reason"] == condition["reason"]):
            continue
        if old is None and condition["status"] == _USUAL_AT_FIRST.get(condition["type"]):
            continue
        bad = _BAD.get(condition["type"]) == condition["status"] or condition["reason"] in _BAD_REASONS
        text = f"{condition['type']}={condition['status']}: {condition['message']}"
        events.append(event_of(snapshot, "Warning" if bad else "Normal", condition["reason"], text))
    return events


_USUAL_AT_FIRST = {
    "Accepted": "True",
    "Available": "False",
    "Progressing": "True",
    "Degraded": "False",
    "SignalsFresh": "Unknown",
    "ScalingActive": "Unknown",
}
_BAD = {"Accepted": "False", "Degraded": "True", "SignalsFresh": "False", "ScalingActive": "False"}
_BAD_REASONS = frozenset(
    {
        "OOMKilled",
        "EngineCrashed",
        "SidecarCrashed",
        "ImagePullFailed",
        "Unschedulable",
        "StartupTimedOut",
        "PodsRefused",
        "VolumeNotReady",
        "ContainerConfigError",
        "NoRoomForSurge",
        "RolloutStalled",
        "RestartBudgetExhausted",
        "AtMaximum",
        "ForeignScalerIgnored",
    }
)
