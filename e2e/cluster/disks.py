"""What lies on the disk of each machine before it is switched on: keys, configuration, images, and orders for pid 1."""

import json
import shutil
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster import daemons, network, pki
from e2e.cluster.containerd import SNAPSHOTS
from e2e.cluster.images import GoldenStore
from e2e.cluster.machine import PATH, Machine
from e2e.cluster.pid1 import MachineSpec
from e2e.cluster.spec import API_PORT, Addresses, ClusterSpec, node_number
from e2e.cluster.supervise import Daemon, Plan

GOLDEN_PLACE = "golden"
"""Where a node's disk shows the whole golden store, so that later layers can be mounted from there."""
ETCD_PORT, ETCD_PEER_PORT = 2379, 2380


@dataclass(frozen=True)
class DiskWriter:
    """Writes the disks of one cluster's machines."""

    spec: ClusterSpec
    addresses: Addresses
    certificates: Path
    """Folder that pki.issue() filled."""
    programs: Path
    golden: GoldenStore
    wiring: network.Wiring

    def control_plane(self, machine: Machine) -> None:
        a, layout = self.addresses, daemons.MACHINE
        machine.config.mkdir(parents=True)
        for file in (self.certificates).iterdir():
            shutil.copy(file, machine.config)
        for user in pki.COMPONENT_USERS:
            self._kubeconfig(user, machine.config / f"{user}.kubeconfig")
        (machine.config / "Corefile").write_text(daemons.corefile(a.control_plane))
        _write_json(
            machine.config / "kube-proxy.yaml", daemons.kube_proxy_config(pods=a.pods, node=self.spec.node_names[0])
        )
        members = (
            daemons.etcd(layout, port=ETCD_PORT, peer_port=ETCD_PEER_PORT),
            daemons.kube_apiserver(
                layout,
                address=a.control_plane,
                port=API_PORT,
                etcd_port=ETCD_PORT,
                service_network=a.services,
                eviction_seconds=self.spec.eviction_seconds,
            ),
            daemons.kube_controller_manager(layout, node_grace_seconds=self.spec.node_grace_seconds),
            daemons.kube_scheduler(layout),
            daemons.coredns(layout),
            daemons.kube_proxy(layout),  # so that this host reaches services, and the API server webhooks
        )
        self._describe(machine, members, (), network.CONTROL_PLANE_SYSCTLS)

    def node(self, machine: Machine) -> None:
        a, name, config = self.addresses, machine.name, machine.config
        for folder in (config, machine.disk / "cni/net.d", machine.disk / "containerd", machine.disk / "kubelet"):
            folder.mkdir(parents=True)
        for source, target in (
            (f"{pki.CA}.crt", f"{pki.CA}.crt"),
            (f"{name}.crt", "kubelet.crt"),
            (f"{name}.key", "kubelet.key"),
        ):
            shutil.copy(self.certificates / source, config / target)
        self._kubeconfig(name, config / "kubelet.kubeconfig")
        self._kubeconfig("kube-proxy", config / "kube-proxy.kubeconfig")
        (config / "resolv.conf").touch()
        (config / "containerd.toml").write_text(daemons.containerd_config())
        _write_json(machine.disk / "cni/net.d/10-pods.conflist", daemons.cni_config(a.pods_of(name)))
        _write_json(config / "kube-proxy.yaml", daemons.kube_proxy_config(pods=a.pods, node=name))
        _write_json(
            config / "kubelet.yaml",
            daemons.kubelet_config(
                address=a.machine(name),
                dns=a.dns,
                cgroup=f"/{machine.cgroups.name}/{name}",
                node_grace_seconds=self.spec.node_grace_seconds,
                restart_backoff_seconds=self.spec.restart_backoff_seconds,
            ),
        )
        (machine.disk / GOLDEN_PLACE).mkdir()
        shown = [(str(self.golden.root), GOLDEN_PLACE)]
        for number in self.golden.seed(machine.disk / "containerd"):
            shown.append((str(self.golden.root / SNAPSHOTS / number), f"containerd/{SNAPSHOTS}/{number}"))
        members = (
            daemons.containerd(daemons.MACHINE),
            daemons.kubelet(daemons.MACHINE, address=a.machine(name), zone=f"zone-{node_number(name)}"),
            daemons.kube_proxy(daemons.MACHINE),
        )
        self._describe(machine, members, tuple(shown), {})

    def _describe(
        self,
        machine: Machine,
        members: tuple[Daemon, ...],
        layers: tuple[tuple[str, str], ...],
        more_sysctls: dict[str, str],
    ) -> None:
        plan = Plan(
            daemons=members,
            control="/var/lib/control",
            logs="/var/log",
            environment={"PATH": PATH, "HOME": "/var/lib"},
        )
        spec = MachineSpec(
            hostname=machine.name,
            cgroup=str(machine.cgroups.daemons(machine.name)),
            disk=str(machine.disk),
            programs=str(self.programs),
            layers=layers,
            addresses=self.wiring.inside(machine.name),
            sysctls={**network.MACHINE_SYSCTLS, **more_sysctls},
            plan=plan,
        )
        machine.write(spec)

    def _kubeconfig(self, user: str, path: Path) -> None:
        server = self.addresses.server
        pki.write_kubeconfig(path, self.certificates, user, name=self.spec.name, server=server)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=1))
