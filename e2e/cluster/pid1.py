"""The first process of a machine: makes it what it is, then supervises its daemons and reaps its orphans.

    python -m e2e.cluster.pid1 FOLDER      FOLDER/machine.json says what to be

The process that is started enters the machine's cgroup and new net, mount, pid, uts and ipc namespaces, forks, writes
the pid of its child as the host sees it to FOLDER/init.pid, and ends. The child is pid 1: when it is killed, the kernel
takes every process, mount, network namespace and link of the machine with it, which is all the teardown there is.

Stdlib only: it starts for every machine and should be up in milliseconds.
"""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from e2e.cluster import mounts
from e2e.cluster.supervise import TURN_SECONDS, Plan, Supervisor, die_with_parent

PRIVATE = ("/var/lib", "/var/log", "/run")
"""What each machine has of its own, so that its daemons can use their default paths."""


@dataclass(frozen=True)
class MachineSpec:
    """What a machine is made of."""

    hostname: str
    cgroup: str
    """Folder of the cgroup that pid 1 and the daemons run in."""
    disk: str
    """What is mounted as /var/lib; its `log` is /var/log as well. Survives a power-off."""
    programs: str
    """What is mounted as /var/lib/bin."""
    layers: tuple[tuple[str, str], ...]
    """(folder, place on the disk) of the unpacked image layers that are mounted there read-only."""
    addresses: tuple[str, ...]
    """`ip -batch` commands, run when the wire (eth0) has come from outside."""
    sysctls: Mapping[str, str]
    """Path below /proc/sys to value."""
    plan: Plan

    def to_json(self) -> str:
        return json.dumps({**asdict(self), "plan": self.plan.to_json()}, indent=1)

    @staticmethod
    def from_json(text: str) -> "MachineSpec":
        raw = json.loads(text)
        raw["layers"] = tuple((folder, place) for folder, place in raw["layers"])
        raw["addresses"] = tuple(raw["addresses"])
        raw["plan"] = Plan.from_json(raw["plan"])
        return MachineSpec(**raw)


def foreign(mount: mounts.Mount, keep: tuple[str, ...]) -> bool:
    """Whether a machine should let go of a mount that it inherited.

    Other people's containers and network namespaces must not be kept alive by us, and what lies below our private
    folders is about to be hidden. `keep` are folders that are needed, wherever they lie.
    """
    if any(path == mount.at or path.startswith(mount.at.rstrip("/") + "/") for path in keep):
        return False
    if any(mount.at.startswith(folder + "/") for folder in PRIVATE):
        return True
    return mount.kind in ("overlay", "nsfs") and mount.at != "/"


def main(folder: Path, parent: int) -> None:
    die_with_parent(parent)  # until the machine exists: a killed `up` leaves no half of one
    spec = MachineSpec.from_json((folder / "machine.json").read_text())
    os.setsid()
    (Path(spec.cgroup) / "cgroup.procs").write_text(str(os.getpid()))
    mounts.unshare(
        mounts.CLONE_NEWNS | mounts.CLONE_NEWUTS | mounts.CLONE_NEWIPC | mounts.CLONE_NEWPID | mounts.CLONE_NEWNET
    )
    pid = os.fork()
    if pid:
        (folder / "init.pid").write_text(str(pid))
        return
    run(spec)


def run(spec: MachineSpec) -> None:
    """Be pid 1; never returns."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    make_disk(spec)
    socket.sethostname(spec.hostname)
    os.chdir("/")
    await_wire()
    for path, value in spec.sysctls.items():
        try:
            Path("/proc/sys", path).write_text(value)
        except OSError as error:  # an older kernel may lack one; only timings depend on those
            print(f"sysctl {path}: {error}", flush=True)
    subprocess.run(["ip", "-batch", "-"], input="\n".join(spec.addresses) + "\n", text=True, check=True)
    supervisor = Supervisor(spec.plan)
    while True:
        supervisor.turn()
        time.sleep(TURN_SECONDS)


def make_disk(spec: MachineSpec) -> None:
    mounts.private()
    disk = Path(spec.disk)
    keep = (spec.disk, spec.programs, *(folder for folder, _ in spec.layers))
    for mount in reversed(mounts.mounted()):
        if foreign(mount, keep):
            mounts.detach(mount.at)
    for folder, place in spec.layers:
        mounts.bind(folder, disk / place, read_only=True)
    mounts.bind(spec.programs, disk / "bin")
    mounts.bind(disk / "log", "/var/log")  # kubelets remove log folders of pods that are not theirs
    mounts.bind(disk, "/var/lib", recursive=True)
    mounts.fresh("tmpfs", "/run")
    mounts.fresh("proc", "/proc")
    mounts.shared()


def await_wire() -> None:
    while True:
        try:
            socket.if_nametoindex("eth0")
        except OSError:
            time.sleep(0.01)
        else:
            return


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
