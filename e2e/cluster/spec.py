"""What a cluster is: its names, address ranges and timings. Pure: nothing here touches the machine.

10.X.0.0/24        machines: cp .1 (the bridge is in its namespace), this host .254, node-i .(10+i)
10.X.(16+i).0/24   pods of node-i, inside 10.X.16.0/20
10.X.128.0/20      services: the API server .128.1, DNS .128.10
                   X = 200 + index; each cluster on a machine has an index of its own
"""

import hashlib
import re
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from e2e.cluster.errors import ClusterStateError

CONTROL_PLANE = "cp"
"""The name of the machine that runs the control plane."""

INDEXES = range(56)
MAX_NODES = 15
MAX_NAME = 10
API_PORT = 6443


@dataclass(frozen=True)
class ClusterSpec:
    """What a user may choose.

    The timings make faults visible within a test's patience, where Kubernetes' defaults (40 s, 300 s, 300 s) are made
    for large clusters.

    Raises:
        ClusterStateError: a field is out of its bounds; the message says which.
    """

    name: str = "kvplane"
    """At most 10 characters: with a tag of 4 it names a network link, which may have 15."""
    nodes: int = 3
    node_grace_seconds: int = 8
    """How long a node may be silent before it is not Ready."""
    eviction_seconds: int = 5
    """How long pods stay on a node that is not Ready, where they tolerate nothing else."""
    restart_backoff_seconds: int = 2
    """The longest wait between restarts of a crashing container."""

    def __post_init__(self) -> None:
        if not re.fullmatch(rf"[a-z][a-z0-9]{{0,{MAX_NAME - 1}}}", self.name):
            raise ClusterStateError(
                f"The cluster's name is {self.name!r}; give a letter and then letters and digits, lower case, "
                f"at most {MAX_NAME} in all."
            )
        if not 1 <= self.nodes <= MAX_NODES:
            raise ClusterStateError(f"The cluster has {self.nodes} nodes; give 1 to {MAX_NODES}.")
        if self.node_grace_seconds < 4:
            raise ClusterStateError(
                f"node_grace_seconds is {self.node_grace_seconds}; give 4 or more: nodes report every 2 s."
            )

    @property
    def node_names(self) -> tuple[str, ...]:
        return tuple(f"node-{number}" for number in range(1, self.nodes + 1))

    @property
    def machine_names(self) -> tuple[str, ...]:
        return (CONTROL_PLANE, *self.node_names)


@dataclass(frozen=True)
class Addresses:
    """The addresses of the cluster with this index."""

    index: int

    def __post_init__(self) -> None:
        if self.index not in INDEXES:
            raise ClusterStateError(f"The cluster's index is {self.index}; give 0 to {INDEXES[-1]}.")

    def _ip(self, rest: str) -> str:
        return f"10.{200 + self.index}.{rest}"

    @property
    def everything(self) -> str:
        return self._ip("0.0/16")

    @property
    def pods(self) -> str:
        return self._ip("16.0/20")

    @property
    def services(self) -> str:
        return self._ip("128.0/20")

    @property
    def control_plane(self) -> str:
        return self._ip("0.1")

    @property
    def host(self) -> str:
        """This host as seen from pods: a test's own server listens here."""
        return self._ip("0.254")

    @property
    def api_service(self) -> str:
        return self._ip("128.1")

    @property
    def dns(self) -> str:
        return self._ip("128.10")

    @property
    def server(self) -> str:
        return f"https://{self.control_plane}:{API_PORT}"

    def machine(self, name: str) -> str:
        return self.control_plane if name == CONTROL_PLANE else self._ip(f"0.{10 + node_number(name)}")

    def pods_of(self, node: str) -> str:
        return self._ip(f"{16 + node_number(node)}.0/24")

    def network(self) -> IPv4Network:
        return IPv4Network(self.everything)


def node_number(node: str) -> int:
    """3 of "node-3"."""
    return int(node.removeprefix("node-"))


def kernel_name(name: str, folder: Path) -> str:
    """What a cluster's cgroups and its link are called: its name and a tag of the folder that it lives in.

    The tag keeps clusters of the same name in different caches apart: none is ever taken for a leftover of the other.
    """
    return f"{name}-{hashlib.sha256(str(folder).encode()).hexdigest()[:4]}"
