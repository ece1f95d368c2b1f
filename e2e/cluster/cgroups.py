"""Every process of a cluster lives below one named cgroup, so that `down` finds all of them after any crash.

Both layouts: the unified hierarchy (v2), and one hierarchy per controller (v1), with or without a v2 one beside them.

    NAME/MACHINE/daemons    what pid 1 of the machine starts, and pid 1
    NAME/MACHINE/kubepods   what the machine's kubelet makes for its pods

v2 allows processes in leaves only, which is why the daemons have a cgroup of their own.
"""

import errno
import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.errors import ClusterStateError

MOUNT = Path("/sys/fs/cgroup")
CONTROLLERS = frozenset({"cpu", "cpuset", "io", "memory", "pids"})
DAEMONS = "daemons"
KILL_SECONDS = 30.0
BURY_SECONDS = 10.0


@dataclass(frozen=True)
class Cgroups:
    """The cgroups below `name` in every hierarchy mounted in `mount`."""

    name: str
    mount: Path = MOUNT

    @property
    def unified(self) -> bool:
        """Whether v2 has the controllers."""
        return (self.mount / "cgroup.controllers").exists()

    def hierarchies(self) -> tuple[Path, ...]:
        if self.unified:
            return (self.mount,)
        return tuple(sorted(d for d in self.mount.iterdir() if d.is_dir() and not d.is_symlink()))

    def tracking(self) -> Path:
        """The cgroup in the one hierarchy where processes are looked up."""
        if self.unified:
            return self.mount / self.name
        named = next(d for d in ("systemd", "pids", "memory", "") if (self.mount / d).is_dir())
        return self.mount / named / self.name

    def daemons(self, machine: str) -> Path:
        return self.tracking() / machine / DAEMONS

    def create(self, machine: str) -> None:
        """Make the cgroups of one machine, anew: a kubelet spends 3 s on each stale pod cgroup that it finds."""
        self.remove(machine)
        for hierarchy in self.hierarchies():
            parent = hierarchy
            for part in (self.name, machine):
                if self.unified:
                    _delegate(parent)
                parent = _make(parent, part)
            if self.unified:
                _delegate(parent)
        self.daemons(machine).mkdir()

    def remove(self, machine: str = "") -> None:
        """Remove the cgroups of one machine, or of all; no process may be left in them."""
        for hierarchy in self.hierarchies():
            for folder, _, _ in os.walk(hierarchy / self.name / machine, topdown=False):
                _rmdir(Path(folder))

    def processes(self, path: str = "") -> list[int]:
        """Pids of every process below NAME/path, as this process's namespace sees them."""
        return processes_below(self.tracking() / path)

    def kill(self, path: str = "") -> None:
        """Kill everything below NAME/path and wait until it is gone.

        Raises:
            ClusterStateError: something survives SIGKILL for KILL_SECONDS.
        """
        self._thaw(path)
        end = time.monotonic() + KILL_SECONDS
        while pids := self.processes(path):
            if time.monotonic() > end:
                raise ClusterStateError(
                    f"Processes {pids} of the cluster do not end although they were killed: they wait for the kernel "
                    "(`cat /proc/PID/stack` says for what); only a reboot helps when that does not end."
                )
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.02)

    def _thaw(self, path: str) -> None:
        """A frozen process does not die (v1 only): runc freezes containers while it kills them, and may be killed."""
        for state in (self.mount / "freezer" / self.name / path).rglob("freezer.state"):
            state.write_text("THAWED")


def processes_below(folder: Path) -> list[int]:
    """Pids in the cgroup `folder` and all below it; none where it is gone."""
    pids: list[int] = []
    for here, _, _ in os.walk(folder):
        try:
            pids += map(int, Path(here, "cgroup.procs").read_text().split())
        except OSError:
            continue  # removed since
    return pids


def _make(parent: Path, name: str) -> Path:
    child = parent / name
    child.mkdir(exist_ok=True)
    for file in ("cpuset.cpus", "cpuset.mems"):  # v1: empty in a new cgroup, and nothing can run there until set
        if (parent / file).exists() and not (child / file).read_text().strip():
            (child / file).write_text((parent / file).read_text())
    return child


def _delegate(folder: Path) -> None:
    """Give the children of a v2 cgroup the controllers that a kubelet needs and the kernel offers."""
    offered = set((folder / "cgroup.controllers").read_text().split()) & CONTROLLERS
    (folder / "cgroup.subtree_control").write_text(" ".join(f"+{name}" for name in sorted(offered)))


def _rmdir(folder: Path) -> None:
    end = time.monotonic() + BURY_SECONDS
    while time.monotonic() < end:
        try:
            folder.rmdir()
        except FileNotFoundError:
            return
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            time.sleep(0.02)  # its last process is not buried yet
        else:
            return
    raise ClusterStateError(f"The cgroup {folder} is still in use; `cat {folder}/cgroup.procs` says by whom.")
