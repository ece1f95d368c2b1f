"""One machine of a cluster, from the outside: its folder, its pid 1, its cgroup; boot, enter, power off.

FOLDER/disk/          /var/lib of the machine; survives a power-off
FOLDER/disk/log/      logs of its daemons and pods
FOLDER/disk/control/  what its supervisor is told (supervise.py)
FOLDER/machine.json   what pid 1 is to make (pid1.py)
FOLDER/init.log       what pid 1 says
"""

import os
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

from e2e.cluster import commands
from e2e.cluster.api import wait_for
from e2e.cluster.cgroups import Cgroups
from e2e.cluster.errors import ClusterStateError, CommandError
from e2e.cluster.pid1 import MachineSpec

REPOSITORY = Path(__file__).resolve().parents[2]
PATH = "/var/lib/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
NAMESPACES = ("--mount", "--net", "--pid", "--uts", "--ipc")


@dataclass(frozen=True)
class Machine:
    """A machine called `name` whose files lie in `folder`; it may be on or off."""

    name: str
    folder: Path
    cgroups: Cgroups

    @property
    def disk(self) -> Path:
        return self.folder / "disk"

    @property
    def config(self) -> Path:
        """/var/lib/kubernetes of the machine."""
        return self.disk / "kubernetes"

    @property
    def control(self) -> Path:
        return self.disk / "control"

    @property
    def logs(self) -> Path:
        return self.disk / "log"

    def write(self, spec: MachineSpec) -> None:
        """Make the folders that pid 1 mounts, and its orders."""
        for folder in (self.config, self.control, self.logs, self.disk / "bin"):
            folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "machine.json").write_text(spec.to_json())

    def boot(self) -> int:
        """Make the namespaces and start pid 1 in them, whose pid is returned; it waits for its wire (network.py).

        Raises:
            CommandError: the kernel refused; the message ends with what pid 1 said.
        """
        pid_file = self.folder / "init.pid"
        pid_file.unlink(missing_ok=True)
        self.cgroups.create(self.name)
        with (self.folder / "init.log").open("ab") as log:
            status = subprocess.run(
                [sys.executable, "-S", "-m", "e2e.cluster.pid1", str(self.folder), str(os.getpid())],
                cwd=REPOSITORY,
                env={"PATH": os.defpath},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                check=False,
            ).returncode
        if status or not pid_file.exists():
            raise CommandError(f"The machine {self.name} did not start.", (self.folder / "init.log").read_text())
        return self.pid()

    def pid(self) -> int:
        """The pid of its pid 1 on this host.

        Raises:
            ClusterStateError: the machine is off.
        """
        try:
            pid = int((self.folder / "init.pid").read_text())
        except (FileNotFoundError, ValueError):
            pid = -1
        if pid not in self.cgroups.processes(f"{self.name}/daemons"):  # the number may be somebody else's by now
            raise ClusterStateError(f"The machine {self.name} is off: boot it with `python -m e2e.cluster boot`.")
        return pid

    def running(self) -> bool:
        try:
            self.pid()
        except ClusterStateError:
            return False
        return True

    def power_off(self) -> None:
        """Everything on it dies at once, as by a pulled plug; its disk stays."""
        self.cgroups.kill(self.name)

    def command(self, *words: str) -> list[str]:
        """The argument list that runs `words` in the machine's namespaces, with the cluster's programs on the path."""
        enter = ["nsenter", "--target", str(self.pid()), *NAMESPACES]
        return [*enter, "env", f"PATH={PATH}", "HOME=/root", *words]

    def run(self, *words: str, stdin: str | bytes | None = None) -> str:
        """The stdout of a command run in the machine."""
        return commands.run(*self.command(*words), stdin=stdin)

    def show(self, folder: Path, place: str, part: str, at: str) -> None:
        """Mount `part` of a folder that the disk shows at `place`, read-only at `at`, now and at every boot."""
        self.run("mount", "--bind", f"/var/lib/{place}/{part}", f"/var/lib/{at}")
        spec = self._spec()
        self.write(replace(spec, layers=(*spec.layers, (str(folder / part), at))))

    def _spec(self) -> MachineSpec:
        return MachineSpec.from_json((self.folder / "machine.json").read_text())

    def stop_daemon(self, daemon: str) -> None:
        """Kill a daemon with SIGKILL and keep it down; returns when it is gone."""
        self._check(daemon)
        (self.control / f"{daemon}.down").touch()
        pid_file = self.control / f"{daemon}.pid"
        wait_for(f"The end of {daemon}", lambda: not pid_file.exists(), seconds=10, where=f"{self.folder}/init.log")

    def start_daemon(self, daemon: str) -> None:
        """Let a stopped daemon run again; returns at once, it starts within a second."""
        self._check(daemon)
        (self.control / f"{daemon}.down").unlink(missing_ok=True)

    def daemons(self) -> tuple[str, ...]:
        return tuple(daemon.name for daemon in self._spec().plan.daemons)

    def _check(self, daemon: str) -> None:
        self.pid()  # it must be on
        if daemon not in (known := self.daemons()):
            raise ClusterStateError(f"{self.name} runs no {daemon!r}; its daemons are {', '.join(known)}.")
