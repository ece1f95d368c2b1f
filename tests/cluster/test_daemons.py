import json

import pytest

from e2e.cluster import daemons
from e2e.cluster.daemons import MACHINE, Layout

LAYOUT = Layout(programs="/p", config="/c", data="/d", api_ready="/r")


def flags(command: tuple[str, ...]) -> dict[str, str]:
    return dict(word.removeprefix("--").split("=", 1) for word in command[1:] if "=" in word)


def api_server(*, loopback_only: bool) -> dict[str, str]:
    daemon = daemons.kube_apiserver(
        LAYOUT,
        address="10.0.0.1",
        port=6443,
        etcd_port=2379,
        service_network="10.0.128.0/20",
        eviction_seconds=5,
        loopback_only=loopback_only,
    )
    assert daemon.command[0] == "/p/kube-apiserver"
    return flags(daemon.command)


def test_the_api_server_is_as_strict_as_in_production() -> None:
    given = api_server(loopback_only=False)
    assert given["authorization-mode"] == "Node,RBAC"
    assert given["enable-admission-plugins"] == "NodeRestriction,PodSecurity,OwnerReferencesPermissionEnforcement"
    assert "bind-address" not in given
    assert given["proxy-client-cert-file"] == "/c/front-proxy.crt"
    assert given["default-unreachable-toleration-seconds"] == "5"


def test_a_loopback_api_server_listens_nowhere_else() -> None:
    given = api_server(loopback_only=True)
    assert given["bind-address"] == "127.0.0.1"
    assert given["endpoint-reconciler-type"] == "none"


def test_clients_of_the_api_server_wait_for_it() -> None:
    waiting = [
        daemons.kube_controller_manager(LAYOUT, node_grace_seconds=8),
        daemons.kube_scheduler(LAYOUT),
        daemons.coredns(LAYOUT),
        daemons.kube_proxy(LAYOUT),
        daemons.kubelet(LAYOUT, address="10.0.0.2", zone="z"),
    ]
    assert all("/r" in daemon.needs for daemon in waiting)
    assert daemons.etcd(LAYOUT, port=1, peer_port=2).needs == ()


def test_the_kubelet_gets_what_the_cluster_is_about() -> None:
    config = daemons.kubelet_config(
        address="10.0.0.2", dns="10.0.128.10", cgroup="/x/node-1", node_grace_seconds=8, restart_backoff_seconds=2
    )
    assert config["cgroupRoot"] == "/x/node-1"
    assert config["clusterDNS"] == ["10.0.128.10"]
    assert config["crashLoopBackOff"] == {"maxContainerRestartPeriod": "2s"}
    assert config["authentication"]["anonymous"] == {"enabled": False}
    json.dumps(config)


def test_names_outside_of_the_cluster_are_answered_in_a_block_of_their_own() -> None:
    corefile = daemons.corefile("10.0.0.1")
    inside, outside = corefile.split("\n.:53")
    assert "kubernetes cluster.local" in inside
    assert "template" not in inside
    assert "rcode NXDOMAIN" in outside
    assert corefile.count("bind 10.0.0.1") == 2
    assert "forward" not in corefile


@pytest.mark.parametrize("text", [daemons.containerd_config(), daemons.registry_hosts("http://10.0.0.254:5000")])
def test_configurations_are_toml(text: str) -> None:
    import tomllib

    tomllib.loads(text)


def test_registries_are_looked_up_where_they_are_written() -> None:
    assert f'config_path = "{MACHINE.config}/certs.d"' in daemons.containerd_config()


def test_the_dns_service_points_at_the_control_plane() -> None:
    objects = dict(daemons.first_objects(control_plane="10.0.0.1", dns="10.0.128.10"))
    slices = objects["/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices"]
    assert slices["endpoints"] == [{"addresses": ["10.0.0.1"]}]
    assert objects["/api/v1/namespaces/kube-system/services"]["spec"]["clusterIP"] == "10.0.128.10"
