"""A cluster as a whole: up, down, status, images, faults.

`up` always leaves a cluster that is Ready, whatever it found: one that runs as wanted is kept, anything else (another
number of nodes, the remains of a killed `up`) is taken down first. `down` leaves nothing: it needs no knowledge of how
far `up` came, for all that a cluster takes from the host is named after it (spec.kernel_name) or written down before it
is taken (cluster.json).

The order of `up` is the order of dependence: programs and images (which outlive clusters), an address range,
certificates, machines, wires; then it waits for the API server, lets its clients start, and waits for the nodes.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

from e2e.cluster import binaries, cache, commands, daemons, faults, network, pki, requirements, sysctls
from e2e.cluster.api import Api, Json, condition, wait_for
from e2e.cluster.cgroups import Cgroups
from e2e.cluster.containerd import SNAPSHOTS, Store, UnpackedImage
from e2e.cluster.disks import GOLDEN_PLACE, DiskWriter
from e2e.cluster.errors import ClusterError, ClusterStateError
from e2e.cluster.images import GoldenStore
from e2e.cluster.locks import exclusive
from e2e.cluster.machine import Machine
from e2e.cluster.progress import Progress
from e2e.cluster.spec import CONTROL_PLANE, Addresses, ClusterSpec, kernel_name

READY_SECONDS = 180.0
"""Patience for each thing that `up` waits for; an idle machine needs a few seconds for all."""
COMPONENTS = ("kubernetes", "etcd", "containerd", "coredns")


@dataclass(frozen=True)
class Record:
    """What is written down about a cluster before it takes anything from the host."""

    spec: ClusterSpec
    index: int
    ready: bool

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=1)

    @staticmethod
    def from_json(text: str) -> "Record":
        raw = json.loads(text)
        return Record(spec=ClusterSpec(**raw["spec"]), index=raw["index"], ready=raw["ready"])


class Cluster:
    """The cluster called `spec.name`, running or not. Every method may be called by any process.

    Raises (any method):
        RequirementError: the machine lacks something.
        ClusterStateError: the method does not fit the state that the cluster is in.
        StartTimeoutError: something did not become ready.
    """

    def __init__(self, spec: ClusterSpec | None = None, *, progress: Progress | None = None) -> None:
        self.spec = spec or ClusterSpec()
        self.folder = cache.clusters() / self.spec.name
        self.kubeconfig = self.folder / "kubeconfig"
        self._progress = progress or Progress()

    @classmethod
    def named(cls, name: str, *, progress: Progress | None = None) -> "Cluster":
        """The cluster of this name with the specification that it was last brought up with."""
        record = _read(cache.clusters() / name / "cluster.json")
        return cls(record.spec if record else ClusterSpec(name=name), progress=progress)

    # ------------------------------------------------------------------------------------------------- its parts

    @property
    def kernel_name(self) -> str:
        """What its cgroups and its link on this host are called."""
        return kernel_name(self.spec.name, self.folder)

    @property
    def cgroups(self) -> Cgroups:
        return Cgroups(self.kernel_name)

    def record(self) -> Record:
        if (record := _read(self.folder / "cluster.json")) is None:
            raise ClusterStateError(
                f"The cluster {self.spec.name} is not up: run `python -m e2e.cluster --name {self.spec.name} up`."
            )
        return record

    @property
    def addresses(self) -> Addresses:
        return Addresses(self.record().index)

    @cached_property
    def api(self) -> Api:
        """A client of the API server with the admin's rights."""
        return Api(self.addresses.server, self.folder / "pki")

    def machine(self, name: str) -> Machine:
        """ "cp" or a node."""
        if name not in self.spec.machine_names:
            raise ClusterStateError(
                f"There is no machine {name!r} in {self.spec.name}; there are {', '.join(self.spec.machine_names)}."
            )
        return Machine(name, self.folder / name, self.cgroups)

    def machine_of_running(self, name: str) -> Machine:
        """The same, of a cluster that is up."""
        machine = self.machine(name)
        self.record()
        return machine

    def node(self, name: str) -> Machine:
        """A node of a cluster that is up."""
        if name not in self.spec.node_names:
            raise ClusterStateError(
                f"There is no node {name!r} in {self.spec.name}; there are {', '.join(self.spec.node_names)}."
            )
        return self.machine_of_running(name)

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """The stdout of `kubectl ARGUMENTS` as the admin.

        Raises:
            CommandError: it failed; the message ends with its stderr.
        """
        self.record()
        where = (f"--kubeconfig={self.kubeconfig}", f"--cache-dir={self.folder}/discovery")
        environment = {**os.environ, "NO_PROXY": "*"}
        return commands.run(self.folder / "bin" / "kubectl", *where, *arguments, stdin=stdin, environment=environment)

    # -------------------------------------------------------------------------------------------------------- up

    def up(self, *, recreate: bool = False) -> None:
        """Have the cluster up and every node Ready; one that is so already is kept unless `recreate` is given."""
        progress = self._progress
        requirements.check(progress)
        programs = binaries.build(binaries.select(COMPONENTS), progress=progress)
        with self._lock():
            if not recreate and self._is_as_wanted():
                progress.say(f"The cluster {self.spec.name} is up already.")
                return
            self._clear()
            golden = GoldenStore(cache.golden(), programs, cache.clusters())
            golden.ensure_pause_image(progress)
            record = self._take_range()
            with progress.step("certificates"):
                self._make_certificates()
            self._gather(programs)
            with progress.step(f"control plane and {self.spec.nodes} nodes switched on"):
                self._start_machines(golden)
            with progress.step("API server ready"):
                self._await("The API server", self.api.ready, "cp/disk/log/kube-apiserver.log")
            for name in self.spec.machine_names:
                (self.machine(name).control / "api-ready").touch()
            with progress.step("all nodes Ready"):
                self._make_first_objects()
                self._await("All nodes Ready", self.all_nodes_ready, "node-*/disk/log/kubelet.log")
                account = "/api/v1/namespaces/default/serviceaccounts/default"
                self._await("The default service account", lambda: bool(self.api.get(account)), "cp/disk/log")
            with progress.step("services and names work"):
                # Asked at the service's address, which needs kube-proxy, for the API server's name, which needs CoreDNS.
                name, dns = f"kubernetes.default.svc.{daemons.CLUSTER_DOMAIN}", self.addresses.dns
                self._await("The DNS service", lambda: network.resolves(dns, name), "cp/disk/log/coredns.log")
            self._write(replace(record, ready=True))
        progress.say(f"{progress.seconds():7.1f} s  in all: {self.spec.name} is up, {self.addresses.everything}")

    def all_nodes_ready(self) -> bool:
        nodes = self.api.get("/api/v1/nodes")["items"]
        return len(nodes) == self.spec.nodes and all(condition(node) for node in nodes)

    def _is_as_wanted(self) -> bool:
        record = _read(self.folder / "cluster.json")
        if record is None or not record.ready or record.spec != self.spec:
            return False
        if not all(self.machine(name).running() for name in self.spec.machine_names):
            return False
        try:
            return self.all_nodes_ready()
        except (OSError, ClusterError):
            return False

    def _take_range(self) -> Record:
        """Choose an index that nobody uses, write it down, then claim it in the kernel."""
        with sysctls.machine_lock():
            records = (_read(path) for path in cache.clusters().glob("*/cluster.json"))
            reserved = [record.index for record in records if record]
            index = network.choose_index(network.taken_networks(), reserved)
            record = Record(self.spec, index, ready=False)
            self.folder.mkdir(parents=True, mode=0o700)
            self._write(record)
            network.claim(Addresses(index))
            sysctls.save(self.kernel_name)
        return record

    def _write(self, record: Record) -> None:
        """All or nothing: a killed writer leaves the old record or the new one."""
        draft = self.folder / "cluster.json.new"
        draft.write_text(record.to_json())
        draft.rename(self.folder / "cluster.json")

    def _make_certificates(self) -> None:
        a = self.addresses
        nodes = [pki.node(name, a.machine(name)) for name in self.spec.node_names]
        served = [a.api_service, a.control_plane, "127.0.0.1"]
        pki.issue(self.folder / "pki", f"{self.spec.name}-ca", [*pki.control_plane(served), *nodes])
        server = self.addresses.server
        pki.write_kubeconfig(self.kubeconfig, self.folder / "pki", pki.ADMIN, name=self.spec.name, server=server)

    def _gather(self, programs: dict[str, Path]) -> None:
        """One folder with all programs: the cluster goes on when the cache's are built anew."""
        (self.folder / "bin").mkdir()
        for name, program in programs.items():
            os.link(program, self.folder / "bin" / name)

    def _start_machines(self, golden: GoldenStore) -> None:
        wiring = network.Wiring(self.spec, self.addresses, self.kernel_name)
        writer = DiskWriter(
            spec=self.spec,
            addresses=self.addresses,
            certificates=self.folder / "pki",
            programs=self.folder / "bin",
            golden=golden,
            wiring=wiring,
        )
        control_plane = self.machine(CONTROL_PLANE)
        writer.control_plane(control_plane)
        cp_pid = control_plane.boot()
        wiring.connect_host(cp_pid)
        for name in self.spec.node_names:
            node = self.machine(name)
            writer.node(node)
            wiring.connect_node(name, node.boot(), cp_pid)

    def _make_first_objects(self) -> None:
        for path, body in daemons.first_objects(control_plane=self.addresses.control_plane, dns=self.addresses.dns):
            self.api.create(path, body)

    def _await(self, what: str, ready: Callable[[], bool], log: str) -> None:
        wait_for(what, ready, seconds=READY_SECONDS, where=f"{self.folder}/{log}")

    # ------------------------------------------------------------------------------------------------------ down

    def down(self) -> None:
        """Remove the cluster and all that it took; nothing happens where there is none."""
        with self._lock(), self._progress.step(f"{self.spec.name} is down, nothing is left"):
            self._clear()

    def _clear(self) -> None:
        self.cgroups.kill()
        record = _read(self.folder / "cluster.json")
        with sysctls.machine_lock():
            if record:
                network.release(Addresses(record.index), self.kernel_name)
            sysctls.restore(self.kernel_name, alive=lambda name: Cgroups(name).tracking().exists())
        self.cgroups.remove()
        if self.folder.exists():
            # Renamed first: the range is free again, and a killed removal leaves no half of a cluster.
            trash = Path(tempfile.mkdtemp(prefix=f".{self.spec.name}-", dir=cache.clusters()))
            self.folder.rename(trash / self.spec.name)
        for trash in cache.clusters().glob(f".{self.spec.name}-*"):
            commands.run("rm", "-rf", trash)
        self.__dict__.pop("api", None)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        """One `up`, `down` or `load` of a cluster at a time."""
        cache.clusters().mkdir(parents=True, exist_ok=True)
        lock, other = cache.clusters() / f".{self.spec.name}.lock", f"another command on {self.spec.name}"
        with exclusive(lock, waiting_for=other, progress=self._progress):
            yield

    # -------------------------------------------------------------------------------------------- images and status

    def load(self, images: Sequence[str]) -> None:
        """Have these images on every node, now and in clusters to come: names in buildah's store, or archives."""
        programs = binaries.build(binaries.select(["containerd"]), progress=self._progress)
        golden = GoldenStore(cache.golden(), programs, cache.clusters())
        with self._lock():
            found = golden.load(images, self._progress)
            nodes = [node for name in self.spec.node_names if (node := self.machine(name)).running()]
            if not nodes or not (self.folder / "cluster.json").exists():
                return
            with (
                self._progress.step(f"images on {len(nodes)} running nodes"),
                ThreadPoolExecutor(max_workers=len(nodes)) as pool,
            ):
                for done in [pool.submit(self._show_images, node, programs["ctr"], found) for node in nodes]:
                    done.result()

    def _show_images(self, node: Machine, ctr: Path, found: Sequence[UnpackedImage]) -> None:
        """Have the node's own containerd adopt images of the golden store."""
        # The node's /run is private, but can be reached through its pid 1.
        socket = Path(f"/proc/{node.pid()}/root{daemons.CRI_SOCKET}")
        store = Store(ctr=ctr, socket=socket, root=node.disk / "containerd")
        golden = cache.golden() / "root"

        def show(tree: Path, number: str) -> None:
            snapshot = tree.parent.relative_to(golden)
            node.show(golden, GOLDEN_PLACE, str(snapshot), f"containerd/{SNAPSHOTS}/{number}")

        for image in found:
            store.adopt(image, show)

    def trust_registry(self, name: str, url: str) -> None:
        """Pull images named `name`/… ("registry.test:5000") from `url` ("http://10.200.0.254:5000") on every node.

        No name service is asked for `name`, and `url` may be plain HTTP. Takes effect at the next pull.
        """
        for node in map(self.machine, self.spec.node_names):
            folder = node.config / "certs.d" / name
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "hosts.toml").write_text(daemons.registry_hosts(url))

    def status(self) -> str:
        """Machines, nodes and pods, for people."""
        record = self.record()
        lines = [f"{self.spec.name}: {self.addresses.everything}, {'ready' if record.ready else 'not whole'}"]
        for name in self.spec.machine_names:
            count = len(self.cgroups.processes(name))
            lines.append(f"  {name:8} {'on' if self.machine(name).running() else 'off':4} {count} processes")
        return "\n".join([*lines, self.kubectl("get", "nodes,pods", "--all-namespaces", "--output=wide")])

    # ---------------------------------------------------------------------------------------------------- faults

    def cut(self, node: str) -> None:
        """Pull the node's cable: its pods and kubelet live on, unreachable."""
        network.set_port(self.machine(CONTROL_PLANE).pid(), self.node(node).name, up=False)

    def heal(self, node: str) -> None:
        """Plug the cable in again."""
        network.set_port(self.machine(CONTROL_PLANE).pid(), self.node(node).name, up=True)

    def kill_pod_process(self, namespace: str, pod: str, *, container: str | None = None, signal: str = "KILL") -> int:
        """Signal every process of a container from outside of it ("KILL", "STOP", "CONT"); how many they were."""
        return faults.send(self._processes(namespace, pod, container), signal)

    def hide(self, namespace: str, pod: str, address: str) -> None:
        """The pod finds no way to an IPv4 address any more and is told so at once; everybody else still does."""
        self._route(namespace, pod, "add", address)

    def unhide(self, namespace: str, pod: str, address: str) -> None:
        """The way that was there before is there again."""
        self._route(namespace, pod, "del", address)

    def _route(self, namespace: str, pod: str, what: str, address: str) -> None:
        pids = self._processes(namespace, pod, None)
        if not pids:
            raise ClusterStateError(f"The pod {namespace}/{pod} has no process: it has just ended.")
        network.in_network_of(pids[0], "ip", "route", what, "unreachable", f"{address}/32")

    def _processes(self, namespace: str, pod: str, container: str | None) -> list[int]:
        found: Json = self.api.get(f"/api/v1/namespaces/{namespace}/pods/{pod}")
        identity = faults.container_id(found, container)
        return faults.container_processes(self.cgroups.tracking() / found["spec"]["nodeName"], identity)

    def stop_daemon(self, machine: str, daemon: str) -> None:
        """Kill a daemon ("kube-apiserver" of "cp", "kubelet" of "node-1", …) with SIGKILL and keep it down."""
        self.machine_of_running(machine).stop_daemon(daemon)

    def start_daemon(self, machine: str, daemon: str) -> None:
        self.machine_of_running(machine).start_daemon(daemon)

    def stop_kubelet(self, node: str) -> None:
        """The node's pods live on, and nobody looks after them."""
        self.node(node).stop_daemon("kubelet")

    def start_kubelet(self, node: str) -> None:
        self.node(node).start_daemon("kubelet")

    def power_off(self, node: str) -> None:
        """Everything on the node dies at once; its disk stays."""
        self.node(node).power_off()

    def boot(self, node: str) -> None:
        """Switch a node on that was powered off."""
        machine = self.node(node)
        if machine.running():
            raise ClusterStateError(f"The node {node} is on already.")
        wiring = network.Wiring(self.spec, self.addresses, self.kernel_name)
        cp_pid = self.machine(CONTROL_PLANE).pid()
        wiring.connect_node(node, machine.boot(), cp_pid)


def _read(path: Path) -> Record | None:
    return Record.from_json(path.read_text()) if path.exists() else None
