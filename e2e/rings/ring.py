"""One ring group on the cluster: its pods by rank, what its rank 0 tells, and whether it is whole.

Pods are read from the API server; what the ring says of itself comes through the sidecar of rank 0, as Prometheus gets it.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from e2e.cluster.api import Json, condition
from e2e.cluster.cgroups import processes_below
from e2e.cluster.cluster import Cluster
from e2e.cluster.errors import ApiError
from e2e.tests import sidecar
from kvplane_api import names

WHOLE_SECONDS: Final = 240.0
"""Patience for a ring to be whole: a rank that loads on busy processors takes half a minute."""
_POLL_SECONDS: Final = 0.1


@dataclass(frozen=True)
class Ring:
    """Group ``group`` of a service, which has ``size`` ranks."""

    cluster: Cluster
    namespace: str
    service: str
    size: int
    group: int = 0

    def name(self, rank: int) -> str:
        """Of a rank's pod."""
        return f"{self.service}-ring-{self.group}-{rank}"

    @property
    def selector(self) -> str:
        """Of its pods."""
        return f"{names.LABEL_SERVICE}={self.service},{names.LABEL_GROUP}={self.group}"

    def pods(self) -> list[Json]:
        """Those that there are, also those on their way out, by rank."""
        return pods_of(self.cluster, self.namespace, self.selector)

    def pod(self, rank: int) -> Json:
        """A rank's pod; raises ApiError where there is none."""
        return self.cluster.api.get(f"/api/v1/namespaces/{self.namespace}/pods/{self.name(rank)}")

    def node(self, rank: int) -> str:
        """Where a rank runs."""
        return str(self.pod(rank)["spec"]["nodeName"])

    def value(self, metric: str, **labels: str) -> float:
        """A metric of the ring; raises OSError or KeyError where rank 0 does not tell."""
        return sidecar.value(str(self.pod(0)["status"]["podIP"]), metric, **labels)

    def epoch(self) -> int:
        """Number of the ring that is."""
        return int(self.value("kvplane_ring_epoch"))

    def is_past(self, epoch: int) -> bool:
        """Whether the ring of that epoch is over, and rank 0 says so."""
        try:
            return self.epoch() > epoch
        except (OSError, KeyError, ApiError):
            return False

    def await_idle(self) -> None:
        """Returns when no request is in the engine, as the sidecar has heard: its other figures are then of the same moment
        or later."""
        sidecar.eventually(
            lambda: self.value("kvplane_ring_api_requests_in_flight") == 0,
            seconds=30,
            otherwise=lambda: "a request is still in the ring",
        )

    def kill(self, rank: int, signal: str = "KILL") -> None:
        """Signal the engine of a rank; its sidecar lives on."""
        self.cluster.kill_pod_process(self.namespace, self.name(rank), container=names.CONTAINER_ENGINE, signal=signal)

    def is_whole(self, *, after_epoch: int = -1) -> bool:
        """Whether every rank is Ready, in a ring that was formed after the one of that epoch."""
        pods = self.pods()
        if len(pods) != self.size or not all(serves(pod) for pod in pods):
            return False
        try:
            # In this order: members read first may be those of the ring before, and the epoch the one after its loss.
            return self.epoch() > after_epoch and self.value("kvplane_ring_members") == self.size
        except (OSError, KeyError, ApiError):
            return False

    def await_whole(self, *, after_epoch: int = -1) -> float:
        """When it was seen whole, on the monotonic clock; raises AssertionError after WHOLE_SECONDS."""
        await_true(
            lambda: self.is_whole(after_epoch=after_epoch),
            what=lambda: f"The ring {self.name(0)} is not whole: {[state_of(pod) for pod in self.pods()]}",
            seconds=WHOLE_SECONDS,
        )
        return time.monotonic()


def pods_of(cluster: Cluster, namespace: str, selector: str) -> list[Json]:
    """Pods with these labels, also those on their way out, by name."""
    found = cluster.api.get(f"/api/v1/namespaces/{namespace}/pods?labelSelector={selector}")["items"]
    return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))


def await_true(holds: Callable[[], bool], *, what: Callable[[], str], seconds: float) -> None:
    """Returns when it holds; raises AssertionError with ``what`` where it does not in time."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, what()
        time.sleep(_POLL_SECONDS)


def serves(pod: Json) -> bool:
    """Whether a pod is Ready and not on its way out."""
    return "deletionTimestamp" not in pod["metadata"] and condition(pod)


def restarts(pod: Json) -> int:
    """Starts of the pod's engine after the first."""
    statuses = pod["status"].get("containerStatuses", ())
    return sum(int(status["restartCount"]) for status in statuses if status["name"] == names.CONTAINER_ENGINE)


def state_of(pod: Json) -> dict[str, Any]:
    """What of a pod explains why it does not serve."""
    return {
        "name": pod["metadata"]["name"],
        "node": pod["spec"].get("nodeName"),
        "going": "deletionTimestamp" in pod["metadata"],
        "ready": condition(pod),
        "engine": next(
            (s["state"] for s in pod["status"].get("containerStatuses", ()) if s["name"] == names.CONTAINER_ENGINE),
            None,
        ),
    }


def engine_processes(cluster: Cluster, node: str, uid: str) -> list[int]:
    """Processes of the ring engine in a pod, as this host sees them: also where nobody else reaches the node."""
    machine = cluster.cgroups.tracking() / node
    pids = [pid for folder in machine.glob(f"kubepods/**/pod{uid}") for pid in processes_below(folder)]
    return [pid for pid in pids if b"kvplane-ring" in _command(pid)]


def engine_log(cluster: Cluster, node: str, uid: str, *, lines: int = 30) -> str:
    """The end of what the ring engine in a pod said, from the node's disk: also where nobody else reaches the node."""
    folders = (cluster.node(node).disk / "log/pods").glob(f"*_{uid}/{names.CONTAINER_ENGINE}")
    logs = [path for folder in folders for path in sorted(folder.glob("*.log"))]
    return "\n".join(line for path in logs for line in path.read_text(errors="replace").splitlines()[-lines:])


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:  # it has ended
        return b""
