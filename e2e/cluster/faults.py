"""What tests break on purpose in one container; faults of whole machines and daemons are methods of Machine and Cluster."""

import os
import signal
from pathlib import Path
from typing import Any

from e2e.cluster.api import Json
from e2e.cluster.cgroups import processes_below
from e2e.cluster.errors import ClusterStateError

SIGNALS = ("KILL", "STOP", "CONT")


def container_id(pod: Json, container: str | None) -> str:
    """The id, as containerd knows it, of a pod's running container; of its first one for no name.

    Raises:
        ClusterStateError: there is no such container, or it does not run.
    """
    status = pod.get("status", {})
    kinds = ("initContainerStatuses", "containerStatuses")
    containers: dict[str, dict[str, Any]] = {s["name"]: s for kind in kinds for s in status.get(kind) or ()}
    name = container or pod["spec"]["containers"][0]["name"]
    where = f"The pod {pod['metadata']['namespace']}/{pod['metadata']['name']}"
    if name not in containers:
        raise ClusterStateError(f"{where} has no container {name!r}; it has {', '.join(sorted(containers)) or 'none'}.")
    if "running" not in (state := containers[name].get("state", {})):
        raise ClusterStateError(f"{where}: the container {name} does not run ({', '.join(state) or 'no state yet'}).")
    return str(containers[name]["containerID"]).removeprefix("containerd://")


def container_processes(machine: Path, container: str) -> list[int]:
    """Pids, on this host, of the container with this id; `machine` is the machine's cgroup."""
    pids: list[int] = []
    for folder in machine.glob(f"kubepods/**/{container}"):
        pids += processes_below(folder)
    return pids


def send(pids: list[int], name: str) -> int:
    """Send SIG`name` to all of them; how many there were.

    Raises:
        ClusterStateError: it is none of SIGNALS, or there is no process.
    """
    if name not in SIGNALS:
        raise ClusterStateError(f"The signal is {name!r}; give one of {', '.join(SIGNALS)}.")
    if not pids:
        raise ClusterStateError("The container has no process: it has just ended.")
    for pid in pids:
        try:
            os.kill(pid, signal.Signals[f"SIG{name}"])
        except ProcessLookupError:
            continue
    return len(pids)
