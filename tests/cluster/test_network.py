from ipaddress import IPv4Network

import pytest

from e2e.cluster.errors import ClusterStateError
from e2e.cluster.network import Wiring, choose_index, destinations
from e2e.cluster.spec import Addresses, ClusterSpec

WIRING = Wiring(ClusterSpec(nodes=2), Addresses(0), "kvplane-abcd")


def test_the_first_free_range_is_chosen() -> None:
    assert choose_index([]) == 0
    assert choose_index([IPv4Network("10.200.0.0/16")], reserved=[1]) == 2


def test_a_range_that_overlaps_any_route_is_not_taken() -> None:
    assert choose_index([IPv4Network("10.200.5.0/24"), IPv4Network("10.201.0.1/32")]) == 2


def test_no_free_range_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(ClusterStateError, match=r"overlaps a route .* down .* VPN"):
        choose_index([IPv4Network("10.0.0.0/8")])


def test_the_default_route_takes_nothing() -> None:
    routes = [
        {"dst": "default"},
        {"dst": "192.0.2.0/24"},
        {"type": "local", "dst": "127.0.0.1"},
        {"dst": "10.200.0.0/16"},
    ]
    expected = [IPv4Network("192.0.2.0/24"), IPv4Network("127.0.0.1/32"), IPv4Network("10.200.0.0/16")]
    assert destinations(routes) == expected


def test_nodes_reach_machines_pods_and_services_and_nothing_else() -> None:
    assert WIRING.inside("node-1") == (
        "link set lo up",
        "addr add 10.200.0.11/24 dev eth0",
        "link set eth0 up",
        "route add 10.200.128.0/20 dev eth0",
        "route add unreachable default metric 9999",
        "route add 10.200.18.0/24 via 10.200.0.12",
    )


def test_the_control_plane_routes_to_every_nodes_pods() -> None:
    inside = WIRING.inside("cp")
    assert "route add 10.200.17.0/24 via 10.200.0.11" in inside
    assert "route add 10.200.18.0/24 via 10.200.0.12" in inside
    assert not any("default" in command for command in inside)
