"""etcd and a real API server on loopback: no root, no namespaces, no nodes; for integration tests and benchmarks.

    with ControlPlane(tmp_path, controllers=True) as control_plane:
        control_plane.kubectl("apply", "-f", "crds/")
        config.load_kube_config(str(control_plane.kubeconfig))

Admission, CEL, RBAC, server-side apply, watches and storage are the real thing; with `controllers=True` so are the
built-in controllers (Deployments make ReplicaSets and Pods, garbage collection follows owner references, namespaces are
removed). No pod ever runs.

The daemons hang on a guard process that kills them when this process ends in whatever way (supervise.py). Nothing is
written outside of `directory` and the cache of programs.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import TracebackType

from e2e.cluster import binaries, commands, daemons, pki, supervise
from e2e.cluster.api import Api, wait_for
from e2e.cluster.errors import CommandError
from e2e.cluster.ports import free_ports
from e2e.cluster.progress import Progress

REPOSITORY = Path(__file__).resolve().parents[2]
SERVICE_NETWORK = "10.96.0.0/16"
SERVICE_IP = "10.96.0.1"
NAME = "kvplane-loopback"
START_SECONDS = 120.0


class ControlPlane:
    """A control plane whose files lie in `directory` (which need not exist, and must not hold an older one).

    Entering the context takes 3-5 s on an idle machine once the programs are built; the first ever use builds them.

    Raises:
        StartTimeoutError: a daemon did not start within START_SECONDS; the message names its log.
        BuildError, RequirementError: the programs could not be built.
    """

    def __init__(self, directory: Path, *, controllers: bool = False, progress: Progress | None = None) -> None:
        self.directory = directory.absolute()
        self.kubeconfig = self.directory / "kubeconfig"
        self._controllers = controllers
        self._progress = progress or Progress(quiet=True)
        self._config, self._control = self.directory / "config", self.directory / "control"
        self._guard: subprocess.Popen[bytes] | None = None
        self._api: Api | None = None
        self._programs: dict[str, Path] = {}

    @property
    def api(self) -> Api:
        """A client with the admin's rights."""
        if self._api is None:
            raise CommandError("The control plane is not started: use it in a `with` statement.")
        return self._api

    @property
    def server(self) -> str:
        """The API server's address, "https://127.0.0.1:PORT"."""
        return self.api.server

    @property
    def logs(self) -> Path:
        return self.directory / "logs"

    def __enter__(self) -> "ControlPlane":
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    def start(self) -> None:
        self._programs = binaries.build(binaries.select(["kubernetes", "etcd"]), progress=self._progress)
        port, etcd_port, etcd_peer_port, controllers_port = free_ports(4)
        server = f"https://127.0.0.1:{port}"
        pki.issue(self._config, NAME, pki.control_plane(["127.0.0.1", SERVICE_IP]))
        pki.write_kubeconfig(self.kubeconfig, self._config, pki.ADMIN, name=NAME, server=server)
        for user in pki.COMPONENT_USERS:
            pki.write_kubeconfig(self._config / f"{user}.kubeconfig", self._config, user, name=NAME, server=server)
        layout = daemons.Layout(
            programs=self._gather_programs(),
            config=str(self._config),
            data=str(self.directory),
            api_ready=str(self._control / "api-ready"),
        )
        members = [
            daemons.etcd(layout, port=etcd_port, peer_port=etcd_peer_port),
            daemons.kube_apiserver(
                layout,
                address="127.0.0.1",
                port=port,
                etcd_port=etcd_port,
                service_network=SERVICE_NETWORK,
                eviction_seconds=300,
                loopback_only=True,
            ),
        ]
        if self._controllers:
            members.append(
                daemons.kube_controller_manager(layout, node_grace_seconds=40, port=controllers_port),
            )
        plan = supervise.Plan(
            daemons=tuple(members),
            control=str(self._control),
            logs=str(self.logs),
            environment={"PATH": os.defpath, "HOME": str(self.directory)},
        )
        (self.directory / "plan.json").write_text(plan.to_json())
        self._api = Api(server, self._config)
        self._start_guard()
        try:
            self._await_api()
            (self._control / "api-ready").touch()
            if self._controllers:
                self._await(
                    "The default service account, which the controller manager makes",
                    "/api/v1/namespaces/default/serviceaccounts/default",
                )
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Kill every daemon at once. Their files and logs stay in the directory."""
        if self._guard is not None:
            assert self._guard.stdin is not None
            self._guard.stdin.close()
            self._guard.wait()
            self._guard = None

    def stop_apiserver(self) -> None:
        """Kill the API server with SIGKILL and keep it down; returns when it is gone."""
        (self._control / "kube-apiserver.down").touch()
        pid_file = self._control / "kube-apiserver.pid"
        wait_for("The end of kube-apiserver", lambda: not pid_file.exists(), seconds=10, where=str(self.logs))

    def start_apiserver(self) -> None:
        """Start it again, on the same port; returns when it is ready (about 1 s later than a first start)."""
        (self._control / "kube-apiserver.down").unlink(missing_ok=True)
        self._await_api()

    def pid(self, daemon: str) -> int:
        """The process id of "etcd", "kube-apiserver" or "kube-controller-manager", to measure or to signal it."""
        try:
            return int((self._control / f"{daemon}.pid").read_text())
        except (FileNotFoundError, ValueError):
            raise CommandError(f"{daemon} does not run; its log is {self.logs / daemon}.log.") from None

    def kubectl(self, *arguments: str, stdin: str | None = None) -> str:
        """The stdout of `kubectl ARGUMENTS` as the admin.

        Raises:
            CommandError: it failed; the message ends with its stderr.
        """
        return commands.run(
            self._programs["kubectl"],
            f"--kubeconfig={self.kubeconfig}",
            f"--cache-dir={self.directory}/discovery",
            *arguments,
            stdin=stdin,
        )

    def get(self, *arguments: str) -> object:
        """`kubectl get ARGUMENTS -o json`, parsed."""
        answer: object = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return answer

    def _gather_programs(self) -> str:
        """One folder of links: each component is built into a folder of its own."""
        folder = self.directory / "bin"
        folder.mkdir()
        for name, program in self._programs.items():
            (folder / name).symlink_to(program)
        return str(folder)

    def _start_guard(self) -> None:
        with (self.directory / "guard.log").open("wb") as log:
            self._guard = subprocess.Popen(
                [sys.executable, "-S", "-m", "e2e.cluster.supervise", str(self.directory)],
                cwd=REPOSITORY,
                env={"PATH": os.defpath},
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
            )

    def _await_api(self) -> None:
        api = self.api
        wait_for("The API server", api.ready, seconds=START_SECONDS, where=f"{self.logs}/kube-apiserver.log")
        self._await("The default namespace", "/api/v1/namespaces/default")

    def _await(self, what: str, path: str) -> None:
        api = self.api
        wait_for(what, lambda: bool(api.get(path)), seconds=START_SECONDS, where=str(self.logs))
