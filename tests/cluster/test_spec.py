from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from typing import Any

import pytest

from e2e.cluster.errors import ClusterStateError
from e2e.cluster.spec import INDEXES, MAX_NODES, Addresses, ClusterSpec, kernel_name


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "A"}, "name is 'A'; give a letter"),
        ({"name": "eleven-char"}, "at most 10"),
        ({"name": ""}, "name is ''"),
        ({"name": "1st"}, "give a letter"),
        ({"nodes": 0}, "has 0 nodes; give 1 to 15"),
        ({"nodes": 16}, "has 16 nodes; give 1 to 15"),
        ({"node_grace_seconds": 3}, "node_grace_seconds is 3; give 4 or more"),
    ],
)
def test_bad_specs_are_refused_with_the_bound(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ClusterStateError, match=message):
        replace(ClusterSpec(), **change)


def test_machines_are_the_control_plane_and_the_nodes() -> None:
    assert ClusterSpec(nodes=2).machine_names == ("cp", "node-1", "node-2")


@pytest.mark.parametrize("index", INDEXES)
def test_ranges_of_a_cluster_are_disjoint_and_inside_of_its_own(index: int) -> None:
    a = Addresses(index)
    machines = IPv4Network(f"{a.control_plane}/24", strict=False)
    assert not machines.overlaps(IPv4Network(a.pods))
    assert not machines.overlaps(IPv4Network(a.services))
    assert not IPv4Network(a.pods).overlaps(IPv4Network(a.services))
    nodes = ClusterSpec(nodes=MAX_NODES).node_names
    pods = [IPv4Network(a.pods_of(node)) for node in nodes]
    assert len(set(pods)) == MAX_NODES
    assert all(network.subnet_of(IPv4Network(a.pods)) for network in pods)
    addresses = [a.control_plane, a.host, *(a.machine(node) for node in nodes)]
    assert len(set(addresses)) == MAX_NODES + 2
    assert all(IPv4Address(address) in machines for address in addresses)
    assert all(IPv4Address(address) in IPv4Network(a.services) for address in (a.api_service, a.dns))


def test_clusters_do_not_overlap() -> None:
    networks = [Addresses(index).network() for index in INDEXES]
    assert not any(one.overlaps(other) for one in networks for other in networks if one is not other)


def test_an_index_out_of_range_is_refused() -> None:
    with pytest.raises(ClusterStateError, match="index is 56; give 0 to 55"):
        Addresses(56)


def test_kernel_names_fit_a_link_and_differ_by_folder() -> None:
    one, other = (kernel_name("abcdefghij", Path(folder)) for folder in ("/a", "/b"))
    assert one != other
    assert len(one) == 15
