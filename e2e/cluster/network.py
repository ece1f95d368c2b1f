"""Wires: one bridge in the control plane's machine, a link to each node, one link and two routes on this host.

The host's share is small on purpose: no packet filter rules, no bridge, no forwarding, nothing that outlives the link but
one `unreachable` route. That route has three uses: it claims the range (the kernel refuses a second one), it keeps
packets for a cluster that is down from leaving by the default route, and it costs nothing. No machine has a default
route, so that no packet of a cluster ever leaves this host.
"""

import json
import socket
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import IPv4Network
from typing import Any

from e2e.cluster.commands import run
from e2e.cluster.errors import ClusterStateError, CommandError
from e2e.cluster.spec import CONTROL_PLANE, INDEXES, Addresses, ClusterSpec

BRIDGE = "br0"
CLAIM_METRIC = "9999"

MACHINE_SYSCTLS = {
    "net/ipv4/ip_forward": "1",
    # Two pods of one node talk through the bridge's address: no redirects that would bypass kube-proxy.
    "net/ipv4/conf/all/send_redirects": "0",
    "net/ipv4/conf/default/send_redirects": "0",
    "net/ipv4/conf/eth0/send_redirects": "0",
    # A cut connection that is healed goes on within seconds instead of up to two minutes (kernel 6.15 or newer).
    "net/ipv4/tcp_rto_max_ms": "1000",
}
CONTROL_PLANE_SYSCTLS = {"net/bridge/bridge-nf-call-iptables": "0"}


def choose_index(taken: Iterable[IPv4Network], reserved: Iterable[int] = ()) -> int:
    """The first index whose range overlaps no network in `taken` and which is not `reserved` by another cluster.

    Raises:
        ClusterStateError: there is none.
    """
    networks, others = list(taken), set(reserved)
    for index in INDEXES:
        own = Addresses(index).network()
        if index not in others and not any(own.overlaps(network) for network in networks):
            return index
    raise ClusterStateError(
        f"Every range from {Addresses(INDEXES[0]).everything} to {Addresses(INDEXES[-1]).everything} overlaps a "
        "route of this machine: take clusters down that you no longer need (each has a folder in "
        "$KVPLANE_CACHE/clusters), or remove the route to 10.0.0.0/8 (a VPN's?) meanwhile."
    )


def destinations(routes: Iterable[dict[str, Any]]) -> list[IPv4Network]:
    """The networks that `ip -json route` lists, without the default route (it overlaps everything and means nothing)."""
    found = (str(route.get("dst", "default")) for route in routes)
    return [IPv4Network(text, strict=False) for text in found if text != "default"]


def taken_networks() -> list[IPv4Network]:
    """Every IPv4 network that this host has a route to: its own addresses, VPNs, other clusters."""
    return destinations(json.loads(run("ip", "-json", "-4", "route", "show", "table", "all") or "[]"))


def claim(addresses: Addresses) -> None:
    """Reserve the range in the kernel.

    Raises:
        ClusterStateError: somebody else has it.
    """
    try:
        run("ip", "route", "add", "unreachable", addresses.everything, "metric", CLAIM_METRIC)
    except CommandError as error:
        raise ClusterStateError(f"The range {addresses.everything} is taken: {error}") from None


def release(addresses: Addresses, link: str) -> None:
    """Remove the link, with the routes over it, and the claim, as far as they are there."""
    for command in (
        ("link", "del", link),
        ("route", "del", "unreachable", addresses.everything, "metric", CLAIM_METRIC),
    ):
        try:
            run("ip", *command)
        except CommandError as error:
            if not any(absent in error.output for absent in ("Cannot find device", "No such process")):
                raise


@dataclass(frozen=True)
class Wiring:
    """The `ip` commands of one cluster; `link` is the name of this host's end."""

    spec: ClusterSpec
    addresses: Addresses
    link: str

    def inside(self, machine: str) -> tuple[str, ...]:
        """`ip -batch` commands that pid 1 of a machine runs once it has eth0."""
        a = self.addresses
        others = [node for node in self.spec.node_names if node != machine]
        to_pods = tuple(f"route add {a.pods_of(node)} via {a.machine(node)}" for node in others)
        if machine == CONTROL_PLANE:
            return (
                "link set lo up",
                f"addr add {a.control_plane}/24 dev {BRIDGE}",
                f"link set {BRIDGE} up",
                f"link set eth0 master {BRIDGE} up",
                f"route add {a.services} dev {BRIDGE}",
                f"route add unreachable {a.everything}",
                *to_pods,
            )
        return (
            "link set lo up",
            f"addr add {a.machine(machine)}/24 dev eth0",
            "link set eth0 up",
            f"route add {a.services} dev eth0",
            f"route add unreachable default metric {CLAIM_METRIC}",
            *to_pods,
        )

    def connect_host(self, control_plane_pid: int) -> None:
        """Make the bridge and plug this host into it: from here on pods, services and the API server are reachable."""
        a, pid = self.addresses, control_plane_pid
        in_network_of(pid, "ip", "link", "add", BRIDGE, "type", "bridge")
        run("ip", "link", "add", self.link, "type", "veth", "peer", "name", "eth0", "netns", str(pid))
        batch = (
            f"addr add {a.host}/24 dev {self.link}",
            f"link set {self.link} up",
            f"route add {a.everything} via {a.control_plane}",
        )
        run("ip", "-batch", "-", stdin="\n".join(batch) + "\n")

    def connect_node(self, node: str, node_pid: int, control_plane_pid: int) -> None:
        """Plug a node's eth0 into the bridge; the bridge's end is called after the node."""
        cp = control_plane_pid
        for stale in ports(cp) & {node}:  # of a node whose network namespace the kernel has not yet taken down
            in_network_of(cp, "ip", "link", "del", stale)
        ends = ("eth0", "netns", str(node_pid), "type", "veth", "peer", "name", node, "netns", str(cp))
        run("ip", "link", "add", *ends)
        in_network_of(cp, "ip", "link", "set", node, "master", BRIDGE, "up")


def set_port(control_plane_pid: int, node: str, *, up: bool) -> None:
    """Pull or plug the node's cable at the bridge's end: the addresses and routes inside of the node stay."""
    in_network_of(control_plane_pid, "ip", "link", "set", node, "up" if up else "down")


def ports(control_plane_pid: int) -> set[str]:
    """Names of the links in the control plane's namespace."""
    links = json.loads(in_network_of(control_plane_pid, "ip", "-json", "link", "show"))
    return {str(link["ifname"]) for link in links}


def in_network_of(pid: int, *command: str) -> str:
    """Run a command of this host in a process's network namespace. Not `ip netns exec`, which hides the cgroups."""
    return run("nsenter", "--target", str(pid), "--net", *command)


def resolves(server: str, name: str, *, timeout_seconds: float = 1.0) -> bool:
    """Whether the name server `server` knows an address of `name` (RFC 1035, one question over UDP)."""
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    query = b"\x4b\x56\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + labels + b"\x00\x00\x01\x00\x01"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as asked:
        asked.settimeout(timeout_seconds)
        asked.connect((server, 53))
        asked.send(query)
        answer = asked.recv(512)
    return len(answer) >= 12 and answer[:2] == query[:2] and answer[3] & 0x0F == 0 and answer[6:8] != b"\x00\x00"
