"""A service of rings in a world that makes its pods: StatefulSets, kubelets, rings that form, sidecars that drain.

Each call of ``step`` is one look of the operator and a moment in which everybody else does their part. A ring forms by the
engine's rule: rank 0 and at least N-1 ranks of one template that are up.
"""

import copy
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from kvplane_api import names
from kvplane_operator.plan.ring.groups import Group, groups, number_of, ordinal_of, set_number
from kvplane_operator.plan.service import Plan
from kvplane_operator.plan.snapshot import Kind, Manifest, Reading, Ref
from tests.kvplane_operator.world import NAME, World, pod, settings, state

Where = tuple[int, int]
"""Group, ordinal."""

RING: Mapping[str, Any] = {"model": {"source": "pvc://models"}, "mode": "Ring", "ring": {"size": 3}}


def with_ring(**fields: Any) -> dict[str, Any]:
    """A ring of three, with these fields of spec.ring over it."""
    return {**RING, "ring": {"size": 3, **fields}}


class RingWorld(World):
    """One service of rings."""

    def __init__(self, spec: Mapping[str, Any] = RING, **values: Any) -> None:
        super().__init__(spec, settings=settings(**values))
        self.down: set[Where] = set()
        """Ranks whose engine does not come up."""
        self.held: dict[int, int] = {}
        """Requests in flight, by group."""
        self.exited: dict[str, int] = {}
        """How often the engine of a pod exited, by uid."""
        self.log = "no reason given"
        self.seconds = 10.0
        """Between two steps."""
        self._made = 0

    def step(self) -> Plan:
        """The operator looks and acts once; then the world goes on."""
        plan = self.settle()
        self._carry_out(plan)
        self.now += timedelta(seconds=self.seconds)
        self._controllers()
        self._engines()
        return plan

    def run(self, steps: int = 6) -> "RingWorld":
        """Several steps."""
        for _ in range(steps):
            self.step()
        return self

    def groups(self) -> tuple[Group, ...]:
        """The groups as the operator sees them."""
        return groups(self.snapshot())

    def group(self, number: int) -> Group:
        """One of them."""
        (found,) = (group for group in self.groups() if group.number == number)
        return found

    def rank(self, number: int, ordinal: int) -> Manifest:
        """The pod of a rank."""
        (found,) = (p for p in self.pods if (number_of(p), ordinal_of(p)) == (number, ordinal))
        return found

    def crash(self, number: int, ordinal: int, times: int = 1) -> None:
        """The engine of a rank exits; it stays down until it is taken out of ``down``."""
        uid = self.rank(number, ordinal)["metadata"]["uid"]
        self.exited[uid] = self.exited.get(uid, 0) + times
        self.down.add((number, ordinal))
        self._engines()

    def stateful_set(self, number: int) -> Manifest:
        """The StatefulSet of a group."""
        return self.children[Ref(Kind.STATEFUL_SET, f"{NAME}-ring-{number}")]

    def ring_pool(self) -> dict[str, Any]:
        """The ring pool as status has it."""
        (pool,) = (pool for pool in self.status["pools"] if pool["kind"] == "Ring")
        return dict(pool)

    def _carry_out(self, plan: Plan) -> None:
        by_uid = {p["metadata"]["uid"]: p for p in self.pods}
        for drain in plan.drains:
            found = by_uid[drain.uid]
            found["metadata"]["annotations"].setdefault(names.ANNOTATION_DRAIN_SINCE, self._stamp())
        gone = {deletion.uid for deletion in plan.pod_deletions}
        self.pods = [p for p in self.pods if p["metadata"]["uid"] not in gone]

    def _controllers(self) -> None:
        wanted = {}
        for ref, child in self.children.items():
            if ref.kind is Kind.STATEFUL_SET and set_number(ref.name, NAME) is not None:
                child["status"] = {"observedGeneration": child["metadata"]["generation"]}
                for ordinal in range(child["spec"]["replicas"]):
                    wanted[f"{ref.name}-{ordinal}"] = child
        self.pods = [p for p in self.pods if number_of(p) is None or p["metadata"]["name"] in wanted]
        there = {p["metadata"]["name"] for p in self.pods}
        self.pods += [self._new_pod(name, child) for name, child in wanted.items() if name not in there]

    def _new_pod(self, name: str, stateful_set: Manifest) -> Manifest:
        self._made += 1
        template = copy.deepcopy(stateful_set["spec"]["template"]["metadata"])
        made = pod(name, node=f"node-{self._made}")
        index = {names.LABEL_POD_INDEX: name.rpartition("-")[2]}
        made["metadata"] |= {
            "uid": f"uid-{self._made}",
            "labels": {**template["labels"], **index},
            "annotations": template["annotations"],
            "creationTimestamp": self._stamp(),
        }
        made["status"]["podIP"] = f"10.0.0.{self._made}"
        return made

    def _engines(self) -> None:
        """Rings form of what is up, readiness follows, sidecars tell."""
        rings: dict[tuple[int | None, str], list[Manifest]] = {}
        for found in self.pods:
            number = number_of(found)
            if number is not None:
                template = found["metadata"]["annotations"][names.ANNOTATION_TEMPLATE_HASH]
                rings.setdefault((number, template), []).append(found)
        for (number, _), ranks in rings.items():
            assert number is not None
            up = [p for p in ranks if (number, ordinal_of(p)) not in self.down and not self._going(p)]
            size = self.stateful_set(number)["spec"]["replicas"]
            formed = len(up) >= size - 1 and any(ordinal_of(p) == 0 for p in up)
            for found in ranks:
                drains = names.ANNOTATION_DRAIN_SINCE in found["metadata"]["annotations"]
                self._show(found, ready=formed and found in up and not drains)
                if ordinal_of(found) == 0:
                    told = state(found["metadata"]["name"], draining=drains, inFlight=self.held.get(number, 0))
                    self.readings[found["metadata"]["name"]] = Reading(told)

    def _show(self, found: Manifest, *, ready: bool) -> None:
        conditions = found["status"]["conditions"]
        (before,) = (c for c in conditions if c["type"] == "Ready")
        if before["status"] != str(ready) or "lastTransitionTime" not in before:
            before |= {"status": str(ready), "lastTransitionTime": self._stamp()}
        exits = self.exited.get(found["metadata"]["uid"], 0)
        (engine,) = found["status"]["containerStatuses"]
        waits = exits > 0 and (number_of(found), ordinal_of(found)) in self.down
        if exits:
            ended = {"exitCode": 1, "reason": "Error", "message": self.log}
            engine |= {"restartCount": exits - waits, "lastState": {"terminated": ended}}
        running = {"running": {"startedAt": self._stamp()}}
        engine["state"] = {"waiting": {"reason": "CrashLoopBackOff"}} if waits else running

    @staticmethod
    def _going(found: Manifest) -> bool:
        return "deletionTimestamp" in found["metadata"]

    def _stamp(self) -> str:
        return self.now.strftime("%Y-%m-%dT%H:%M:%SZ")


def formed(spec: Mapping[str, Any] = RING, **values: Any) -> RingWorld:
    """A world whose rings have formed."""
    world = RingWorld(spec, **values).run()
    assert all(group.whole for group in world.groups())
    return world
