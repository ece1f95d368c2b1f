"""What the machine must have for a cluster with nodes, looked at before anything is changed.

Each check is a function that gives a sentence on what is missing and how to get it, or nothing. All are run, so that a
newcomer sees everything at once instead of one surprise after the other. Programs that Debian and Ubuntu package are
installed where that is possible.
"""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from e2e.cluster import cache, commands
from e2e.cluster.errors import CommandError, RequirementError
from e2e.cluster.progress import Progress

GIB = 2**30
DISK_COLD = 16 * GIB
"""Free space for a first run: 9 GiB of Go caches, 1 GiB of programs, the rest for images."""
DISK_WARM = 4 * GIB
MEMORY = 3 * GIB
"""A control plane (650 MB) and three nodes (233 MB each), and something to run on them."""

CNI_PLUGINS = Path("/usr/lib/cni")

PACKAGES: Mapping[str, str] = {
    "runc": "runc",
    "nft": "nftables",
    "ip": "iproute2",
    "conntrack": "conntrack",
    "openssl": "openssl",
    "nsenter": "util-linux",
    "setpriv": "util-linux",
    "gcc": "gcc",
}
"""Program to the Debian package that has it."""

LIBRARIES: Mapping[Path, str] = {
    CNI_PLUGINS / "bridge": "containernetworking-plugins",
    Path("/usr/include/stdio.h"): "libc6-dev",
}

Check = Callable[[], str | None]


def check(progress: Progress) -> None:
    """Install what can be installed, and make sure of the rest.

    Raises:
        RequirementError: something is missing; one sentence for each thing.
    """
    if os.geteuid() == 0 and (missing := missing_packages()):
        install(missing, progress)
    problems = [problem for one in CHECKS if (problem := one()) is not None]
    if problems:
        raise RequirementError(
            "This machine cannot run the cluster:\n" + "\n".join(f"  - {problem}" for problem in problems)
        )


def missing_packages() -> list[str]:
    programs = {package for program, package in PACKAGES.items() if find_program(program) is None}
    libraries = {package for file, package in LIBRARIES.items() if not file.exists()}
    return sorted(programs | libraries)


def find_program(name: str) -> str | None:
    """Also in the system folders that are not on every user's path."""
    return shutil.which(name, path=f"{os.environ.get('PATH', os.defpath)}:/usr/local/sbin:/usr/sbin:/sbin")


def install(packages: Sequence[str], progress: Progress) -> None:
    """Install Debian packages; what fails is reported by the checks."""
    if shutil.which("apt-get") is None:
        return
    with progress.step(f"apt-get install {' '.join(packages)}"):
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        get = ["apt-get", "install", "--yes", "--no-install-recommends", *packages]
        try:
            commands.run(*get, environment=environment)
        except CommandError:  # the package lists may be missing or old
            try:
                commands.run("apt-get", "update", environment=environment)
                commands.run(*get, environment=environment)
            except CommandError as error:
                progress.say(str(error))


def _root() -> str | None:
    if os.geteuid() == 0:
        return None
    return (
        f"Root is needed to make namespaces, mounts and cgroups; this is user {os.geteuid()}. Run it with sudo, or set "
        "KVPLANE_CLUSTER=kind (needs Docker) or KVPLANE_CLUSTER=kubeconfig to use a cluster that you have."
    )


def _packages() -> str | None:
    if not (missing := missing_packages()):
        return None
    return f"Programs are missing; install them: apt-get install {' '.join(missing)}."


def _cgroups() -> str | None:
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        present = set((root / "cgroup.controllers").read_text().split())
    else:
        present = {folder.name for folder in root.iterdir()} if root.exists() else set()
    lacking = sorted({"cpu", "memory", "pids", "cpuset"} - present)
    if lacking:
        return f"The cgroup controllers {', '.join(lacking)} are not mounted in {root}: a kubelet needs them."
    if os.geteuid() == 0 and not os.access(root, os.W_OK):
        return f"{root} is read-only: in a container, start it with --privileged --cgroupns=host."
    return None


def _namespaces_and_netfilter() -> str | None:
    """Try, in namespaces of its own, what kube-proxy and the nodes need: a bridge, a veth pair, an nft masquerade."""
    if os.geteuid() or find_program("nft") is None or find_program("ip") is None:
        return None  # reported by another check
    script = (
        "ip link add br0 type bridge && ip link add v0 type veth peer name v1 && nft 'table ip t { chain c "
        "{ type nat hook postrouting priority 100; ip saddr 10.0.0.0/8 ct state new counter masquerade; }; }'"
    )
    try:
        commands.run("unshare", "--net", "--mount", "--pid", "--fork", "sh", "-ec", script)
    except CommandError as error:
        return (
            "The kernel does not let us make network namespaces with bridges, veth pairs and nftables NAT (modules "
            "bridge, veth, nf_tables, nft_nat, nft_masq, nf_conntrack); in a container, start it with --privileged. "
            f"It said: {error.output.strip()}"
        )
    return None


def _overlayfs() -> str | None:
    """Images are overlay mounts; the kernel refuses one whose upper layer is on overlayfs itself, or on NFS."""
    if os.geteuid():
        return None
    cache.root().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.root(), prefix=".overlay-") as folder:
        for name in ("lower", "upper", "work", "merged"):
            Path(folder, name).mkdir()
        options = f"lowerdir={folder}/lower,upperdir={folder}/upper,workdir={folder}/work"
        done = subprocess.run(
            # In a mount namespace of its own, so that nothing can be left mounted.
            ["unshare", "--mount", "mount", "-t", "overlay", "overlay", "-o", options, f"{folder}/merged"],
            capture_output=True,
            text=True,
            check=False,
        )
    if done.returncode:
        return (
            f"overlayfs cannot be used in {cache.root()}: set KVPLANE_CACHE to a folder on ext4, xfs or btrfs (in a "
            f"container: on a volume). It said: {done.stderr.strip()}"
        )
    return None


def disk(needed: int) -> str | None:
    """What is wrong with the cache's disk, if it does not have `needed` bytes free."""
    cache.root().mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(cache.root()).free
    if free >= needed:
        return None
    return (
        f"{cache.root()} has {free / GIB:.1f} GiB free; {needed / GIB:.0f} GiB are needed. Free some, or set "
        "KVPLANE_CACHE to a folder on a larger disk."
    )


def _disk() -> str | None:
    return disk(DISK_WARM if cache.binaries().exists() else DISK_COLD)


def _memory() -> str | None:
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    if available >= MEMORY:
        return None
    return f"{available / GIB:.1f} GiB of memory are available; {MEMORY / GIB:.0f} GiB are needed: close something."


CHECKS: tuple[Check, ...] = (_root, _packages, _cgroups, _namespaces_and_netfilter, _overlayfs, _disk, _memory)
