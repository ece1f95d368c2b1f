"""Command lines and configuration files of every daemon of a cluster, as pure functions of what they must know.

One place for every flag that matters and its reason. Paths are those that the daemon sees. Configuration files are JSON,
which the YAML readers of kubelet and kube-proxy accept.
"""

from dataclasses import dataclass
from typing import Any

from e2e.cluster import pki
from e2e.cluster.supervise import Daemon

DNS_PORT = 53
KUBELET_PORT = 10250
PAUSE_IMAGE = "localhost/pause:1"
CRI_SOCKET = "/run/containerd/containerd.sock"
CLUSTER_DOMAIN = "cluster.local"


@dataclass(frozen=True)
class Layout:
    """Where the daemons of one machine find things."""

    programs: str
    """Folder of the programs."""
    config: str
    """Folder of certificates, kubeconfigs and configuration files."""
    data: str
    """Folder that etcd's data folder is in."""
    api_ready: str
    """File that appears once the API server answers; its clients start then and not before, for they back off."""

    def program(self, name: str) -> str:
        return f"{self.programs}/{name}"


MACHINE = Layout(
    programs="/var/lib/bin",
    config="/var/lib/kubernetes",
    data="/var/lib",
    api_ready="/var/lib/control/api-ready",
)


# ------------------------------------------------------------------------------------------------ control plane


def etcd(layout: Layout, *, port: int, peer_port: int) -> Daemon:
    """A single member on loopback. It never syncs to disk: the cluster does not outlive the machine anyway."""
    client, peer = f"http://127.0.0.1:{port}", f"http://127.0.0.1:{peer_port}"
    return Daemon(
        "etcd",
        (
            layout.program("etcd"),
            f"--data-dir={layout.data}/etcd",
            f"--listen-client-urls={client}",
            f"--advertise-client-urls={client}",
            f"--listen-peer-urls={peer}",
            f"--initial-advertise-peer-urls={peer}",
            f"--initial-cluster=default={peer}",
            "--unsafe-no-fsync",
            "--log-level=warn",
        ),
    )


def kube_apiserver(
    layout: Layout,
    *,
    address: str,
    port: int,
    etcd_port: int,
    service_network: str,
    eviction_seconds: int,
    loopback_only: bool = False,
) -> Daemon:
    """Node and RBAC authorizers, NodeRestriction and PodSecurity, aggregation; as strict as a production server.

    `eviction_seconds` is how long pods without tolerations of their own stay on a node that is not ready or unreachable.
    `loopback_only` listens on 127.0.0.1 and keeps that address out of the `kubernetes` Service, where it is invalid.
    """
    config = layout.config
    loopback = ("--bind-address=127.0.0.1", "--endpoint-reconciler-type=none") if loopback_only else ()
    return Daemon(
        "kube-apiserver",
        (
            layout.program("kube-apiserver"),
            f"--etcd-servers=http://127.0.0.1:{etcd_port}",
            f"--advertise-address={address}",
            f"--secure-port={port}",
            *loopback,
            f"--service-cluster-ip-range={service_network}",
            "--allow-privileged=true",
            "--authorization-mode=Node,RBAC",
            "--enable-admission-plugins=NodeRestriction,PodSecurity,OwnerReferencesPermissionEnforcement",
            f"--client-ca-file={config}/{pki.CA}.crt",
            f"--tls-cert-file={config}/{pki.API_SERVER}.crt",
            f"--tls-private-key-file={config}/{pki.API_SERVER}.key",
            f"--kubelet-certificate-authority={config}/{pki.CA}.crt",
            f"--kubelet-client-certificate={config}/{pki.KUBELET_CLIENT}.crt",
            f"--kubelet-client-key={config}/{pki.KUBELET_CLIENT}.key",
            "--kubelet-preferred-address-types=InternalIP",  # nobody resolves node names
            f"--service-account-issuer=https://kubernetes.default.svc.{CLUSTER_DOMAIN}",
            f"--service-account-signing-key-file={config}/{pki.SERVICE_ACCOUNTS}.key",
            f"--service-account-key-file={config}/{pki.SERVICE_ACCOUNTS}.crt",
            # Aggregated APIs (metrics.k8s.io, external.metrics.k8s.io) are called with this identity.
            f"--proxy-client-cert-file={config}/{pki.FRONT_PROXY}.crt",
            f"--proxy-client-key-file={config}/{pki.FRONT_PROXY}.key",
            f"--requestheader-client-ca-file={config}/{pki.CA}.crt",
            "--requestheader-allowed-names=front-proxy-client",
            "--requestheader-username-headers=X-Remote-User",
            "--requestheader-group-headers=X-Remote-Group",
            "--requestheader-extra-headers-prefix=X-Remote-Extra-",
            f"--default-not-ready-toleration-seconds={eviction_seconds}",
            f"--default-unreachable-toleration-seconds={eviction_seconds}",
        ),
    )


def _kubeconfigs(layout: Layout, name: str) -> tuple[str, ...]:
    return tuple(
        f"--{kind}kubeconfig={layout.config}/{name}.kubeconfig" for kind in ("", "authentication-", "authorization-")
    )


def kube_controller_manager(layout: Layout, *, node_grace_seconds: int, port: int = 10257) -> Daemon:
    """Quick to notice a lost node and to evict its pods, where the defaults are made to be slow on purpose.

    `node_grace_seconds` is how long a node may be silent before it is not ready. The eviction rate and the zone
    threshold make three nodes behave as three hundred do: by default, small zones that fail are evicted slowly or not at
    all. Node CIDRs are given by the CNI configuration.
    """
    config = layout.config
    return Daemon(
        "kube-controller-manager",
        (
            layout.program("kube-controller-manager"),
            *_kubeconfigs(layout, "kube-controller-manager"),
            "--bind-address=127.0.0.1",
            f"--secure-port={port}",
            f"--service-account-private-key-file={config}/{pki.SERVICE_ACCOUNTS}.key",
            "--use-service-account-credentials=true",
            f"--root-ca-file={config}/{pki.CA}.crt",
            f"--client-ca-file={config}/{pki.CA}.crt",
            f"--cluster-signing-cert-file={config}/{pki.CA}.crt",
            f"--cluster-signing-key-file={config}/{pki.CA}.key",
            "--leader-elect=false",
            "--allocate-node-cidrs=false",
            "--node-monitor-period=1s",
            f"--node-monitor-grace-period={node_grace_seconds}s",
            "--node-eviction-rate=10",
            "--unhealthy-zone-threshold=1",
            "--kube-api-qps=200",
            "--kube-api-burst=300",
        ),
        needs=(layout.api_ready,),
    )


def kube_scheduler(layout: Layout) -> Daemon:
    return Daemon(
        "kube-scheduler",
        (
            layout.program("kube-scheduler"),
            *_kubeconfigs(layout, "kube-scheduler"),
            "--bind-address=127.0.0.1",
            "--leader-elect=false",
        ),
        needs=(layout.api_ready,),
    )


def coredns(layout: Layout) -> Daemon:
    return Daemon("coredns", (layout.program("coredns"), f"-conf={layout.config}/Corefile"), needs=(layout.api_ready,))


def corefile(address: str, layout: Layout = MACHINE) -> str:
    """Answers for the cluster's names; every other name does not exist, as nothing is forwarded outside.

    Two server blocks: within one, `template` comes before `kubernetes` whatever the order here.
    """
    return f"""\
{CLUSTER_DOMAIN}:{DNS_PORT} in-addr.arpa:{DNS_PORT} {{
  bind {address}
  kubernetes {CLUSTER_DOMAIN} in-addr.arpa {{
    kubeconfig {layout.config}/coredns.kubeconfig
    ttl 5
  }}
  cache 5
}}
.:{DNS_PORT} {{
  bind {address}
  template ANY ANY . {{
    rcode NXDOMAIN
  }}
}}
"""


# --------------------------------------------------------------------------------------------------------- node


def containerd(layout: Layout) -> Daemon:
    return Daemon("containerd", (layout.program("containerd"), f"--config={layout.config}/containerd.toml"))


def containerd_config(layout: Layout = MACHINE) -> str:
    """Settings for a root without CAP_SYS_RESOURCE, and registries by folder.

    `certs.d/HOST:PORT/hosts.toml` says how a registry is reached and is read at every pull (Cluster.trust_registry).
    """
    return f"""\
version = 3
[plugins."io.containerd.cri.v1.images".pinned_images]
  sandbox = "{PAUSE_IMAGE}"
[plugins."io.containerd.cri.v1.images".registry]
  config_path = "{layout.config}/certs.d"
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
  disable_apparmor = true
  [plugins."io.containerd.cri.v1.runtime".cni]
    bin_dirs = ["/usr/lib/cni"]
    conf_dir = "{layout.data}/cni/net.d"
  [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc]
    runtime_type = "io.containerd.runc.v2"
    [plugins."io.containerd.cri.v1.runtime".containerd.runtimes.runc.options]
      SystemdCgroup = false
      BinaryName = "/usr/sbin/runc"
"""


def registry_hosts(url: str) -> str:
    """A hosts.toml: pull what is named after the registry from `url` ("http://10.200.0.254:5000")."""
    return f"""\
server = "{url}"
[host."{url}"]
  capabilities = ["pull", "resolve"]
"""


def cni_config(pods: str) -> dict[str, Any]:
    """A bridge per node; other nodes' pods are reached by the routes of the machine. NetworkPolicy is not enforced."""
    bridge = {
        "type": "bridge",
        "bridge": "cni0",
        "isGateway": True,
        "ipMasq": False,
        "hairpinMode": True,
        "ipam": {"type": "host-local", "ranges": [[{"subnet": pods}]], "routes": [{"dst": "0.0.0.0/0"}]},
    }
    portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
    return {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, portmap]}


def kubelet(layout: Layout, *, address: str, zone: str) -> Daemon:
    return Daemon(
        "kubelet",
        (
            layout.program("kubelet"),
            f"--config={layout.config}/kubelet.yaml",
            f"--kubeconfig={layout.config}/kubelet.kubeconfig",
            f"--node-ip={address}",
            f"--node-labels=topology.kubernetes.io/zone={zone}",
        ),
        needs=(layout.api_ready, CRI_SOCKET),
    )


def kubelet_config(
    *,
    address: str,
    dns: str,
    cgroup: str,
    node_grace_seconds: int,
    restart_backoff_seconds: int,
    layout: Layout = MACHINE,
) -> dict[str, Any]:
    """`cgroup` is a root per kubelet: in a shared one they would remove each other's pods as unknown."""
    config = layout.config
    return {
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "address": address,
        "port": KUBELET_PORT,
        "authentication": {
            "anonymous": {"enabled": False},
            "webhook": {"enabled": True},
            "x509": {"clientCAFile": f"{config}/{pki.CA}.crt"},
        },
        "authorization": {"mode": "Webhook"},
        "tlsCertFile": f"{config}/kubelet.crt",
        "tlsPrivateKeyFile": f"{config}/kubelet.key",
        "containerRuntimeEndpoint": f"unix://{CRI_SOCKET}",
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": cgroup,
        "failCgroupV1": False,
        "clusterDomain": CLUSTER_DOMAIN,
        "clusterDNS": [dns],
        "resolvConf": f"{config}/resolv.conf",  # empty: the host's name servers cannot be reached from here
        "failSwapOn": False,
        # The kernel settings of the host and the OOM score of processes may be out of reach here; do without.
        "featureGates": {"KubeletInUserNamespace": True},
        "oomScoreAdj": 0,
        "serializeImagePulls": False,
        "nodeStatusUpdateFrequency": "2s",
        "nodeLeaseDurationSeconds": node_grace_seconds,
        # All nodes share one disk and one memory, so that the usual limits would evict on all of them at once.
        "evictionHard": {"memory.available": "100Mi", "nodefs.available": "1%", "imagefs.available": "1%"},
        "imageGCHighThresholdPercent": 100,  # the layers are shared with the golden store: nothing to gain
        "crashLoopBackOff": {"maxContainerRestartPeriod": f"{restart_backoff_seconds}s"},
    }


def kube_proxy(layout: Layout) -> Daemon:
    return Daemon(
        "kube-proxy",
        (layout.program("kube-proxy"), f"--config={layout.config}/kube-proxy.yaml"),
        needs=(layout.api_ready,),
    )


def kube_proxy_config(*, pods: str, node: str, layout: Layout = MACHINE) -> dict[str, Any]:
    """`node` must exist, or it waits 30 s for it; on the control plane, which is none, it is another's name."""
    return {
        "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
        "kind": "KubeProxyConfiguration",
        "mode": "nftables",
        "nftables": {"minSyncPeriod": "100ms"},
        "detectLocalMode": "ClusterCIDR",
        "clusterCIDR": pods,
        "hostnameOverride": node,
        "clientConnection": {"kubeconfig": f"{layout.config}/kube-proxy.kubeconfig"},
        # Connection tracking is set for the whole host: leave it alone.
        "conntrack": {
            "maxPerCore": 0,
            "min": 0,
            "tcpEstablishedTimeout": "0s",
            "tcpCloseWaitTimeout": "0s",
        },
    }


# ------------------------------------------------------------------------------------------------ first objects


def first_objects(*, control_plane: str, dns: str) -> tuple[tuple[str, dict[str, Any]], ...]:
    """(API path, object) of what a cluster needs before its first pod: rights of two components, the DNS service."""
    rbac = "/apis/rbac.authorization.k8s.io/v1"
    ports = [
        {"name": "dns", "port": DNS_PORT, "protocol": "UDP"},
        {"name": "dns-tcp", "port": DNS_PORT, "protocol": "TCP"},
    ]

    def binding(name: str, role: str, user: str) -> tuple[str, dict[str, Any]]:
        group = "rbac.authorization.k8s.io"
        return f"{rbac}/clusterrolebindings", {
            "metadata": {"name": name},
            "roleRef": {"apiGroup": group, "kind": "ClusterRole", "name": role},
            "subjects": [{"apiGroup": group, "kind": "User", "name": user}],
        }

    watch = ["list", "watch"]
    coredns_role = {
        "metadata": {"name": "system:coredns"},
        "rules": [
            {"apiGroups": [""], "resources": ["endpoints", "services", "pods", "namespaces"], "verbs": watch},
            {"apiGroups": ["discovery.k8s.io"], "resources": ["endpointslices"], "verbs": watch},
        ],
    }
    dns_service = {"metadata": {"name": "kube-dns"}, "spec": {"clusterIP": dns, "ports": ports}}
    dns_endpoints = {
        "metadata": {"name": "kube-dns-cp", "labels": {"kubernetes.io/service-name": "kube-dns"}},
        "addressType": "IPv4",
        "endpoints": [{"addresses": [control_plane]}],
        "ports": ports,
    }
    return (
        binding("kubelet-client", "system:kubelet-api-admin", "kube-apiserver-kubelet-client"),
        (f"{rbac}/clusterroles", coredns_role),
        binding("system:coredns", "system:coredns", "system:coredns"),
        ("/api/v1/namespaces/kube-system/services", dns_service),
        ("/apis/discovery.k8s.io/v1/namespaces/kube-system/endpointslices", dns_endpoints),
    )
